"""Every remedy works, where another tool merges, converts or repairs what the command refuses.

The tools of Megatron and NeMo do not run here, and that of DeepSpeed only where it is installed.
What they write is made by hand, in the layout of their sources, and the command averages it.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import folders
import pytest
import torch
from command import load
from remedies import Case, check, save, weights

Weights = folders.Weights


def halves(state: Weights) -> list[Weights]:
    """Return what two ranks have of a model: half of the rows of each tensor."""
    return [
        {name: value.chunk(2)[rank].clone() for name, value in state.items()} for rank in (0, 1)
    ]


# In place of the script that DeepSpeed puts beside its checkpoints: its arguments, and its output.
ZERO_TO_FP32 = """
import argparse, pathlib, torch
parser = argparse.ArgumentParser()
parser.add_argument("checkpoint_dir")
parser.add_argument("output_dir")
parser.add_argument("-t", "--tag")
given = parser.parse_args()
parts = sorted(pathlib.Path(given.checkpoint_dir, given.tag).glob("*_optim_states.pt"))
states = [torch.load(part)["fp32"] for part in parts]
out = pathlib.Path(given.output_dir)
out.mkdir(parents=True, exist_ok=True)
whole = {name: torch.cat([state[name] for state in states]) for name in states[0]}
torch.save(whole, out / "pytorch_model.bin")
"""
OF_STEP_2 = "python run/zero_to_fp32.py run merged/global_step2 -t global_step2"


def zero_3(folder: Path) -> None:
    """Save stand-ins of tensors, and the parts of two ranks beside the optimizer state."""
    save(folder, {"run/zero_to_fp32.py": ZERO_TO_FP32})
    for n in (1, 2):
        home = folder / f"run/global_step{n}"
        home.mkdir()
        for rank, part in enumerate(halves(weights(n))):
            shapes = [{name: value.shape for name, value in weights(n).items()}]
            module = dict.fromkeys(part, torch.empty(0))
            name = f"zero_pp_rank_{rank}_mp_rank_00"
            torch.save({"module": module, "param_shapes": shapes}, home / f"{name}_model_states.pt")
            torch.save({"fp32": part}, home / f"{name}_optim_states.pt")


def engines(folder: Path) -> None:
    """Save what an engine saves with ZeRO-2, and the universal checkpoints made from it."""
    for n in (1, 2):
        content = {"module": weights(n), "global_steps": n}
        file = "mp_rank_00_model_states.pt"
        save(folder, {f"run/global_step{n}/{file}": content,
                      f"universal/global_step{n}_universal/{file}": content,
                      f"universal/global_step{n}_universal/zero/a.bias/fp32.pt": {}})  # fmt: skip


def ranks(name: str, key: str = "module") -> dict[str, object]:
    """Return what two ranks save under a name with their numbers."""
    return {
        name.format(n=n, rank=rank): {key: part}
        for n in (1, 2)
        for rank, part in enumerate(halves(weights(n)))
    }


def merged(folder: Path) -> None:
    """Save what Megatron's converters write: one rank."""
    for n in (1, 2):
        folders.save_megatron(folder / f"merged/iter_000000{n}", weights(n), n)


def merged_archives(folder: Path) -> None:
    for n in (1, 2):
        folders.save_nemo(folder / f"merged_{n}.nemo", weights(n), n)


def archives_of_ranks(folder: Path) -> None:
    names = [f"mp_rank_0{rank}/model_weights.ckpt" for rank in (0, 1)]
    for n in (1, 2):
        save(folder, dict(zip(names, halves(weights(n)), strict=True)))
        with tarfile.open(folder / f"{n}.nemo", "w:") as archive:
            for name in names:
                archive.add(folder / name, f"./{name}")


def full_states(folder: Path) -> None:
    save(folder, {f"full/checkpoint_{n}/{name}": what for n in (1, 2) for name, what in (
        ("pytorch_model_fsdp.bin", weights(n)), ("random_states_0.pkl", b"random"))})  # fmt: skip


def sharded_states(folder: Path) -> None:
    boxes: dict[str, list[folders.Box]] = {"a.weight": [((0, 0), (1, 3)), ((1, 0), (1, 3))],
                                           "a.bias": [((0,), (2,))]}  # fmt: skip
    for n in (1, 2):
        home = folder / f"sharded/checkpoint_{n}"
        folders.save_chunks(home / "pytorch_model_fsdp_0", weights(n), boxes)
        (home / "random_states_0.pkl").write_bytes(b"random")


def put_together(folder: Path) -> None:
    for n in (1, 2):
        parts = [torch.load(folder / f"step_{n}/rank_{rank}.pt")["model"] for rank in (0, 1)]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        torch.save(whole, folder / f"whole_{n}.pt")


def cut_archive(folder: Path) -> None:
    """Save two archives, and a copy of one that was cut."""
    for n in (1, 2):
        folders.save_nemo(folder / f"source/{n}.nemo", weights(n), n)
    whole = (folder / "source/2.nemo").read_bytes()
    (folder / "2.nemo").write_bytes(whole[: whole.index(b"./model_weights.ckpt") + 200])


TOOLS: dict[str, Case] = {
    "ZeRO-3": Case(
        zero_3, "run",
        r"Merge them with DeepSpeed's zero_to_fp32\.py, and average what it writes: (python .+)\.$",
        ("{0}", OF_STEP_2, "merged"), 1.5,
    ),
    "files of ZeRO-3": Case(
        zero_3, "run/*/zero_pp_rank_0_mp_rank_00_model_states.pt",
        r"Run zero_to_fp32\.py, which DeepSpeed puts beside its checkpoints, and average its ",
        (OF_STEP_2.replace("step2", "step1"), OF_STEP_2, "merged/*"), 1.5,
    ),
    "universal checkpoints": Case(
        engines, "universal",
        r"Average the checkpoints that ds_to_universal\.py made it from\.$", ("run",), 1.5,
    ),
    "ranks of Megatron-DeepSpeed": Case(
        ranks("run/global_step{n}/mp_rank_0{rank}_model_states.pt"), "run",
        r"Merge them with Megatron-DeepSpeed's \S+/deepspeed_to_megatron\.py --target_tp 1 ",
        (merged, "merged"), 1.5,
    ),
    "stages of Megatron-DeepSpeed": Case(
        ranks("run/global_step{n}/mp_rank_00_model_states.pt")
        | ranks("run/global_step{n}/layer_0{rank}-model_00-model_states.pt"), "run",
        r"Merge them with Megatron-DeepSpeed's .+ --target_pp 1\.$", (merged, "merged"), 1.5,
    ),
    "ranks of Megatron-LM": Case(
        ranks("run/iter_000000{n}/mp_rank_0{rank}/model_optim_rng.pt", "model"), "run",
        r"Merge them with Megatron-LM's tools/checkpoint/convert\.py --target-tensor-parallel-size",
        (merged, "merged"), 1.5,
    ),
    "ranks of NeMo": Case(
        archives_of_ranks, "1.nemo 2.nemo",
        r"Merge them with NeMo's megatron_change_num_partitions\.py\.$",
        (merged_archives, "merged_?.nemo"), 1.5,
    ),
    "ranks of accelerate": Case(
        ranks("run/checkpoint_{n}/pytorch_model_fsdp_0_rank{rank}.bin"), "run",
        r"Load it with accelerate, and save it with FSDP's state_dict_type FULL_STATE_DICT or ",
        (full_states, "full", sharded_states, "sharded"), 1.5,
    ),
    "ranks of a script": Case(
        ranks("step_{n}/rank_{rank}.pt", "model"), "step_1/rank_0.pt step_1/rank_1.pt",
        r"Merge them into one file first, with the framework that wrote them\. "
        r"If each .+: epoch_1\.pt, …\.$",
        (put_together, "whole_?.pt"), 1.5,
    ),
    "several files of each rank": Case(
        {f"run/rank_{rank}_step_{n}.pt": n + 4 * rank for n in (1, 2) for rank in (0, 1)}, "run",
        r"Average each part separately, as in (\S+)\.$", ("{0}",), 1.5,
    ),
    "a cut archive": Case(
        cut_archive, "source/1.nemo 2.nemo -o out.pt",
        r"2\.nemo: is a damaged tar archive .+\. Copy it again from its source\.$",
        ("$ cp source/2.nemo .", "source/1.nemo 2.nemo"), 1.5,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TOOLS)
def test_remedies_on_other_tools(name: str, tmp_path: Path) -> None:
    """What the tool of the line writes gives the mean."""
    check(TOOLS[name], tmp_path)


ENGINE = """
import os, torch
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1",
                  LOCAL_RANK="0", DS_ACCELERATOR="cpu")
from torch import distributed, nn
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
import deepspeed
from deepspeed.utils import safe_get_full_fp32_param
net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
config = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True},
          "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True}
optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
whole = []
for step in (1, 2):
    engine.backward(engine(torch.rand(2, 3).bfloat16()).float().square().mean())
    engine.step()
    engine.save_checkpoint("run", tag=f"global_step{step}")
    named = engine.module.named_parameters()
    whole.append({name: safe_get_full_fp32_param(value).clone() for name, value in named})
torch.save(whole, "whole.pt")
"""


@pytest.mark.frameworks
def test_zero_to_fp32_of_deepspeed(tmp_path: Path) -> None:
    """DeepSpeed's own script, as the line says, gives the mean of an engine's float32 weights."""
    if not (find_spec("deepspeed") and find_spec("huggingface_hub")):
        pytest.skip("needs deepspeed and huggingface_hub, which its script imports")
    command = [sys.executable, "-W", "ignore", "-c", ENGINE]
    saved = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert saved.returncode == 0, saved.stderr
    check(Case(lambda _: None, "run", TOOLS["ZeRO-3"].says, TOOLS["ZeRO-3"].then), tmp_path)
    whole, found = load(tmp_path / "whole.pt"), load(tmp_path / "out_2.pt")
    for name, value in found.items():
        assert torch.equal(value, ((whole[0][name].double() + whole[1][name]) / 2).float()), name
