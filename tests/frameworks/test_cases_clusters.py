"""What FSDP, DeepSpeed and recipes leave in the folders of Trainer, accelerate, Lightning, OLMo.

Each comes out as the right average in the right layout, or is refused with a remedy that works.
The files have the layout that the source of the framework gives them.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from command import fails, run
from safetensors.torch import load_file, save_file
from stored import content, tensors
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's and the frameworks' savers
State = dict[str, torch.Tensor]
NUMBERS = (1, 2, 3)


def states(seed: int) -> list[State]:
    found = []
    for number in NUMBERS:
        torch.manual_seed(seed + number)
        found.append(dict(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()))
    return found


ONE, TWO = states(0), states(100)


def assert_mean(found: State, of: list[State]) -> None:
    assert found.keys() == of[0].keys()
    for name in found:
        expected = torch.stack([state[name].double() for state in of]).mean(0).float()
        assert torch.equal(found[name], expected), name


def done(folder: Path, *arguments: str) -> str:
    ended = run(folder, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def as_told(folder: Path, given: str) -> str:
    """Return the pattern that is recommended instead of a folder of folders."""
    line = fails(folder, given, "-o", "out", code=2)
    assert "Its sub-folders contain checkpoints: give " in line
    return shlex.split(line.rpartition("give ")[2].removesuffix("."))[0]


def of_dcp(folder: Path, *where: str) -> State:
    """Return what `dcp.load` gives."""
    inner = {name: torch.zeros_like(value) for name, value in ONE[0].items()}
    target: Any = inner
    for key in reversed(where):
        target = {key: target}
    dcp.load(target, checkpoint_id=folder)
    return inner


def deepspeed(folder: Path, state: State, step: int, name: str = "") -> None:
    """Write what DeepSpeed saves with ZeRO-2, in a sub-folder."""
    inner = folder / (name or f"global_step{step}")
    inner.mkdir(parents=True)
    content = {"module": state, "global_steps": step, "dp_world_size": 1, "ds_version": "0.19.8"}
    torch.save(content, inner / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, inner / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text(inner.name)
    (folder / "zero_to_fp32.py").write_text("# of DeepSpeed\n")


def of_trainer(folder: Path, state: State | None, step: int) -> Path:
    """Write the files that Trainer saves itself."""
    folder.mkdir(parents=True)
    if state:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text("{}")
    log = [{"step": step, "eval_loss": float(step)}]
    state_of_run = {"global_step": step, "epoch": 1.0, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state_of_run))
    (folder / "rng_state.pth").write_bytes(b"random")
    torch.save({}, folder / "scheduler.pt")
    return folder


# Trainer and accelerate.


@pytest.mark.parametrize("beside", ["deepspeed", "full", "sharded"])
def test_model_that_trainer_saves_beside_the_engine(beside: str, tmp_path: Path) -> None:
    """The model is averaged; to keep the wrapper would leave stale weights to resume from."""
    for number, state in zip(NUMBERS, ONE, strict=True):
        home = of_trainer(tmp_path / f"run/checkpoint-{number}", state, number)
        if beside == "deepspeed":
            deepspeed(home, state, number)
        elif beside == "full":
            torch.save(state, home / "pytorch_model_fsdp.bin")
        else:
            dcp.save({"model": state}, checkpoint_id=home / "pytorch_model_fsdp_0")
    done(tmp_path, "run", "-o", "swa")
    assert_mean(load_file(tmp_path / "swa/model.safetensors"), ONE)
    names = {path.name for path in (tmp_path / "swa").iterdir()}
    assert names - {"zero_to_fp32.py"} == {"model.safetensors", "config.json", "swa_avg.json"}
    line = fails(tmp_path, "run", "-o", "kept", "--keep-wrapper")
    assert "has its weights a second time" in line and "Leave out --keep-wrapper" in line


def test_trainer_with_only_what_the_engine_saves(tmp_path: Path) -> None:
    """ZeRO-2 comes out as such a checkpoint; ZeRO-3 is refused with the command that merges."""
    for number, state in zip(NUMBERS, ONE, strict=True):
        deepspeed(of_trainer(tmp_path / f"run/checkpoint-{number}", None, number), state, number)
        home = of_trainer(tmp_path / f"three/checkpoint-{number}", None, number)
        (home / f"global_step{number}").mkdir()
        (home / "latest").write_text(f"global_step{number}")
        part = "zero_pp_rank_0_mp_rank_00_model_states.pt"
        torch.save({"module": {}}, home / f"global_step{number}/{part}")
    done(tmp_path, "run", "-o", "swa")
    made = load(tmp_path / "swa/global_step3/mp_rank_00_model_states.pt")
    assert_mean(made["module"], ONE)
    assert (tmp_path / "swa/trainer_state.json").exists()
    done(tmp_path, "run", "-o", "best.pt", "--best", "2", "--metric", "eval_loss")
    assert_mean(load(tmp_path / "best.pt"), ONE[:2])
    line = fails(tmp_path, "three", "-o", "out")
    assert (
        "python three/checkpoint-1/zero_to_fp32.py three/checkpoint-1 merged/checkpoint-1 "
        "-t global_step1" in line
    )


def test_several_models_of_an_engine(tmp_path: Path) -> None:
    """accelerate saves each in a sub-folder: refused; with one of them, as the line says, right."""
    for number, one, two in zip(NUMBERS, ONE, TWO, strict=True):
        home = tmp_path / f"ds/checkpoint_{number}"
        deepspeed(home, one, number, "pytorch_model")
        deepspeed(home, two, number, "pytorch_model_1")
        (home / "random_states_0.pkl").write_bytes(b"random")
        home = tmp_path / f"fsdp/checkpoint_{number}"
        for name, state in (("0", one), ("1", two)):
            dcp.save({"model": state}, checkpoint_id=home / f"pytorch_model_fsdp_{name}")
        (home / "random_states_0.pkl").write_bytes(b"random")
    for kind, second in (("ds", "pytorch_model_1"), ("fsdp", "pytorch_model_fsdp_1")):
        line = fails(tmp_path, kind, "-o", "out")
        assert "has several models (" in line and second in line
        given = shlex.split(line.rpartition("as in ")[2].removesuffix("."))[0]
        first = given.replace("checkpoint_1", "checkpoint_*")
        for pattern, of in ((first, ONE), (str(Path(first).parent / second), TWO)):
            done(tmp_path, pattern, "-o", "one.safetensors", "--force")
            assert_mean(load_file(tmp_path / "one.safetensors"), of)
        line = fails(tmp_path, f"{given}", f"{Path(given).parent}/{second}", "-o", "x.pt")
        assert "expected the same model of each checkpoint" in line, line


def test_full_state_of_fsdp_in_accelerate(tmp_path: Path) -> None:
    """One file for each model: a copy of the folder; files of ranks are refused."""
    for number, one, two in zip(NUMBERS, ONE, TWO, strict=True):
        for kind in ("one", "two", "ranks"):
            home = tmp_path / f"{kind}/checkpoint_{number}"
            home.mkdir(parents=True)
            name = "pytorch_model_fsdp.bin" if kind != "ranks" else "pytorch_model_fsdp_0_rank0.bin"
            torch.save(one, home / name)
            torch.save({"state": {}, "param_groups": []}, home / "optimizer.bin")
            (home / "random_states_0.pkl").write_bytes(b"random")
        torch.save(two, tmp_path / f"two/checkpoint_{number}/pytorch_model_fsdp_1.bin")
    for kind in ("one", "two"):
        done(tmp_path, kind, "-o", f"swa_{kind}")
        made = content(tmp_path / f"swa_{kind}")
        assert made.keys() == {*content(tmp_path / kind / "checkpoint_3"), "swa_avg.json"}
        assert_mean(load(tmp_path / f"swa_{kind}/pytorch_model_fsdp.bin"), ONE)
    assert_mean(load(tmp_path / "swa_two/pytorch_model_fsdp_1.bin"), TWO)
    done(tmp_path, "one", "-o", "swa.pt")
    assert_mean(load(tmp_path / "swa.pt"), ONE)
    line = fails(tmp_path, "ranks", "-o", "out")
    assert "has parts of a model" in line and "FULL_STATE_DICT" in line


def test_universal_checkpoint_of_deepspeed_is_refused(tmp_path: Path) -> None:
    """Its engine loads `zero/*/fp32.pt`, whatever `mp_rank_00_model_states.pt` holds."""
    for number, state in zip(NUMBERS, ONE, strict=True):
        deepspeed(tmp_path / "run", state, number, f"global_step{number}_universal")
        for name, value in state.items():
            home = tmp_path / f"run/global_step{number}_universal/zero/{name}"
            home.mkdir(parents=True)
            torch.save({"param": value}, home / "fp32.pt")
    line = fails(tmp_path, "run", "-o", "out")
    assert "has parts of a model (DeepSpeed (universal checkpoint)" in line
    assert "Average the checkpoints that ds_to_universal.py made it from" in line


def test_other_weights_are_named(tmp_path: Path) -> None:
    """A copy may hold weights that are not averaged, such as an adapter: a note says so."""
    for number, state in zip(NUMBERS, ONE, strict=True):
        home = tmp_path / f"lit/step-{number}"
        home.mkdir(parents=True)
        torch.save({"model": state}, home / "lit_model.pth")
        torch.save({"model": state}, home / "lit_model.pth.lora")
        home = tmp_path / f"run/checkpoint_{number}"
        (home / "unet_ema").mkdir(parents=True)
        (home / "random_states_0.pkl").write_bytes(b"random")
        for path in (home, home / "unet_ema"):
            save_file(state, path / "model.safetensors", {"format": "pt"})
    said = done(tmp_path, "lit", "-o", "lit_swa")
    assert "lit_model.pth.lora: other weights in the folder; not averaged" in said
    said = done(tmp_path, "run", "-o", "kept", "--keep-wrapper")
    assert "unet_ema/model.safetensors: other weights; copied, not averaged" in said


FSDP = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import load_fsdp_model, save_fsdp_model
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
import swa_avg

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))

def made(seed):
    torch.manual_seed(seed)
    return fully_shard(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), mesh=mesh)

def whole(model):
    return {name: value.full_tensor().clone() for name, value in model.state_dict().items()}

saved = {}
for kind, models in (("FULL_STATE_DICT", 2), ("SHARDED_STATE_DICT", 1)):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    given = plugin, Accelerator(cpu=True)
    for index in range(models):
        states = saved[kind, index] = []
        for n in range(3):
            model = made(10 * index + n)
            save_fsdp_model(*given, model, f"{kind}/checkpoint_{n}", model_index=index)
            states.append(whole(model))
    swa_avg.average(kind, f"swa_{kind}", keep_wrapper=True)
    for index in range(models):
        load_fsdp_model(*given, model, f"swa_{kind}", model_index=index)
        saved[kind, index].append(whole(model))
torch.save(saved, "saved.pt")
distributed.destroy_process_group()
"""


@pytest.mark.frameworks
def test_accelerate_loads_what_its_fsdp_saves(tmp_path: Path) -> None:
    """accelerate's own functions write the run, and load the mean of each model."""
    pytest.importorskip("accelerate")
    command = [sys.executable, "-c", FSDP]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    saved = load(tmp_path / "saved.pt")
    assert len(saved) == 3
    for *of, loaded in saved.values():
        assert_mean(loaded, of)


# Lightning, Composer, OLMo.


@pytest.mark.frameworks
@pytest.mark.parametrize("place", ["model", "state_dict"])
def test_sharded_checkpoint_of_lightning(place: str, tmp_path: Path) -> None:
    """FSDPStrategy and ModelParallelStrategy: Lightning's own reader gives the mean."""
    pytest.importorskip("lightning")
    from lightning.fabric.strategies.fsdp import _distributed_checkpoint_save
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    for number, state in zip(NUMBERS, ONE, strict=True):
        path = tmp_path / f"ckpts/epoch={number}-step={10 * number}.ckpt"
        path.mkdir(parents=True)
        optimizer = {"state": {"0.weight": {"exp_avg": state["0.weight"] * 0}}}
        _distributed_checkpoint_save({place: dict(state), "optimizer_0": optimizer}, path)
        meta = {"epoch": number, "global_step": 10 * number, "pytorch-lightning_version": "2.6"}
        torch.save(meta | {"callbacks": {}, "loops": {}}, path / "meta.pt")
    for output, options in (("kept", ["--keep-wrapper"]), ("bare", [])):
        done(tmp_path, "ckpts", "-o", output, "--epochs", "1:3", *options)
        assert_mean(of_dcp(tmp_path / output, place), ONE)
    # A folder may have the name that Lightning gives it.
    done(tmp_path, "ckpts", "-o", "swa.ckpt", "--keep-wrapper")
    made = _load_distributed_checkpoint(tmp_path / "swa.ckpt")
    assert_mean(made[place], ONE)
    assert (made["epoch"], made["global_step"]) == (3, 30)


def test_deepspeed_in_lightning(tmp_path: Path) -> None:
    """A folder `epoch=E-step=S.ckpt` with `checkpoint/` in it comes out as such a folder."""
    for number, state in zip(NUMBERS, ONE, strict=True):
        home = tmp_path / f"ckpts/epoch={number}-step={10 * number}.ckpt"
        deepspeed(home, state, number, "checkpoint")
    for output, options in (("swa", []), ("swa.ckpt", ["--keep-wrapper"])):
        done(tmp_path, "ckpts", "-o", output, *options)
        made = load(tmp_path / output / "checkpoint/mp_rank_00_model_states.pt")
        assert_mean(made["module"], ONE)
        assert (tmp_path / output / "latest").read_text() == "checkpoint"
    done(tmp_path, "ckpts", "-o", "file.ckpt")
    assert_mean(load(tmp_path / "file.ckpt"), ONE)


def test_sharded_checkpoint_of_composer(tmp_path: Path) -> None:
    """`ep1-ba3/` holds state.model and state.optimizers; the latter is not averaged."""
    for number, state in zip(NUMBERS, ONE, strict=True):
        optimizer = {"DecoupledAdamW": {"state": {"0.weight": {"exp_avg": state["0.weight"] * 5}}}}
        content = {"model": dict(state), "optimizers": optimizer, "run_name": "a"}
        dcp.save({"state": content}, checkpoint_id=tmp_path / f"run/ep1-ba{number}")
    for output, options in (("kept", ["--keep-wrapper"]), ("bare", [])):
        said = done(tmp_path, "run", "-o", output, *options)
        assert "optimizer" in said or not options
        assert_mean(of_dcp(tmp_path / output, "state", "model"), ONE)
    kept = tensors(tmp_path / "kept")
    assert_mean(kept, ONE)


def test_folders_of_olmo(tmp_path: Path) -> None:
    """`stepN-unsharded/model.pt` is the model; the files of ranks are refused."""
    for number, state in zip(NUMBERS, ONE, strict=True):
        home = tmp_path / f"run/step{number}000-unsharded"
        home.mkdir(parents=True)
        torch.save(state, home / "model.pt")
        torch.save({"state": {}, "param_groups": []}, home / "optim.pt")
        torch.save({"epoch": 0, "global_step": number * 1000, "rng": {}}, home / "train.pt")
        (home / "config.yaml").write_text("run_name: a\n")
        for part in ("model", "optim", "train"):
            (tmp_path / f"ranks/step{number}000/{part}").mkdir(parents=True)
            for rank in range(2):
                torch.save(state, tmp_path / f"ranks/step{number}000/{part}/rank{rank}.pt")
    done(tmp_path, "run/step*-unsharded", "-o", "swa.pt")
    assert_mean(load(tmp_path / "swa.pt"), ONE)
    done(tmp_path, "run/step*-unsharded/model.pt", "-o", "files.pt")
    assert_mean(load(tmp_path / "files.pt"), ONE)
    done(tmp_path, as_told(tmp_path, "run"), "-o", "told.pt")
    assert_mean(load(tmp_path / "told.pt"), ONE)
    line = fails(tmp_path, "ranks/step*/model/", "-o", "out.pt")
    assert "contains rank 0 of a model" in line
    part = shlex.split(line.rpartition("as in ")[2].removesuffix("."))[0]
    done(tmp_path, part, "-o", "rank0.pt")
    assert_mean(load(tmp_path / "rank0.pt"), ONE)


# torchtune.


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_folders_of_torchtune(lora: bool, tmp_path: Path) -> None:
    """`epoch_N/`: shards with an index; with LoRA, the merged model beside the adapter."""
    for number, state in zip(NUMBERS, ONE, strict=True):
        home = tmp_path / f"out/epoch_{number}"
        home.mkdir(parents=True)
        name = "model-00001-of-00001.safetensors"
        save_file(state, home / name, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, name)}
        (home / "model.safetensors.index.json").write_text(json.dumps(index))
        (home / "config.json").write_text("{}")
        if lora:
            adapter = {"base_model.model.q_proj.lora_A.weight": state["0.weight"] * 3}
            save_file(adapter, home / "adapter_model.safetensors", {"format": "pt"})
            torch.save(adapter, home / "adapter_model.pt")
            (home / "adapter_config.json").write_text("{}")
        (tmp_path / "out/recipe_state").mkdir(exist_ok=True)
        torch.save(
            {"optimizer": {}, "epochs_run": 1}, tmp_path / "out/recipe_state/recipe_state.pt"
        )
    said = done(tmp_path, "out", "-o", "swa")
    assert_mean(tensors(tmp_path / "swa"), ONE)
    names = {path.name for path in (tmp_path / "swa").iterdir()}
    assert names == {"model.safetensors", "config.json", "swa_avg.json"}
    assert ("adapter_model.safetensors" in said) == lora


def test_own_format_of_torchtune(tmp_path: Path) -> None:
    """`epoch_N/model-00001-of-00001.bin` without an index is the whole model."""
    for number, state in zip(NUMBERS, ONE, strict=True):
        home = tmp_path / f"out/epoch_{number}"
        home.mkdir(parents=True)
        torch.save(state, home / "model-00001-of-00001.bin")
        (home / "config.json").write_text("{}")
    (tmp_path / "out/recipe_state").mkdir()
    torch.save({"optimizer": {}, "epochs_run": 1}, tmp_path / "out/recipe_state/recipe_state.pt")
    for pattern in ("out/epoch_*", as_told(tmp_path, "out")):
        done(tmp_path, pattern, "-o", "swa.pt", "--force")
        assert_mean(load(tmp_path / "swa.pt"), ONE)


def test_index_of_an_unusual_stem(tmp_path: Path) -> None:
    """Whatever the stem of an index is, the output is found again, in one file or in shards."""
    for number, state in zip(NUMBERS, ONE, strict=True):
        home = tmp_path / f"epoch_{number}"
        home.mkdir(parents=True)
        name = "ft-model-00001-of-00001.safetensors"
        save_file(state, home / name, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, name)}
        (home / "ft-model.safetensors.index.json").write_text(json.dumps(index))
    done(tmp_path, *(f"epoch_{number}" for number in NUMBERS), "-o", "swa")
    assert_mean(tensors(tmp_path / "swa"), ONE)
    names = {path.name for path in (tmp_path / "swa").iterdir()}
    assert names == {path.name for path in home.iterdir()} | {"swa_avg.json"}
