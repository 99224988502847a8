"""Runs as they lie on disk: folders of frameworks and `.nemo` archives, in and out.

The output is a copy of the last checkpoint with the mean in place of its weights. Where a
framework is installed, it writes the checkpoints and loads the output; else the files have
the same layout and are read as its loader reads them.
"""

from __future__ import annotations

import gzip
import importlib.machinery
import importlib.util
import io
import shlex
import shutil
import subprocess
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fails, run, snapshot
from folders import members, save_nemo
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, not ours
State = dict[str, torch.Tensor]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


STATES = [dict(network(n).state_dict()) for n in range(3)]


def mean(states: list[State], name: str) -> torch.Tensor:
    values = torch.stack([state[name].double() for state in states])
    return values.mean(0).to(states[0][name].dtype)


def assert_mean(found: State, states: list[State]) -> None:
    assert found.keys() == states[0].keys()
    for name, value in states[0].items():
        kept = not value.is_floating_point() or "running" in name
        assert torch.equal(found[name], states[-1][name] if kept else mean(states, name)), name


def done(folder: Path, *arguments: str) -> str:
    """Run the command, which succeeds and changes no input; return what it says on stderr."""
    before = snapshot(folder)
    ended = run(folder, *arguments)
    assert ended.returncode == 0, ended.stderr
    after = snapshot(folder)
    files = [path for path, found in before.items() if found[-1] is not None]  # type: ignore[index]
    assert {path: after[path] for path in files} == {path: before[path] for path in files}
    return ended.stderr


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def differing(one: Path, other: Path) -> set[str]:
    """Return the files whose bytes differ between two folders, or that only one has."""

    def files(folder: Path) -> dict[str, bytes]:
        inner = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in inner}

    these, those = files(one), files(other)
    return {name for name in these | those if these.get(name) != those.get(name)}


# DeepSpeed.


def deepspeed_file(state: State, step: int) -> dict[str, Any]:
    """Return what DeepSpeed's `_save_checkpoint` writes."""
    return {"module": state, "buffer_names": [], "optimizer": None, "lr_scheduler": None,
            "global_steps": step, "dp_world_size": 1, "mp_world_size": 1,
            "ds_version": "0.19.8", "ds_config": {}}  # fmt: skip


def deepspeed_run(folder: Path) -> Path:
    for n, state in enumerate(STATES):
        home = folder / f"global_step{(n + 1) * 10}"
        home.mkdir(parents=True)
        torch.save(deepspeed_file(state, (n + 1) * 10), home / "mp_rank_00_model_states.pt")
        optimizer = {"optimizer_state_dict": {"fp32": state["0.weight"].clone()}}
        torch.save(optimizer, home / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("global_step30")
    return folder


def test_deepspeed_run(tmp_path: Path) -> None:
    """A run folder gives a `global_stepN` without optimizer state, --keep-wrapper one with it."""
    deepspeed_run(tmp_path / "run")
    said = done(tmp_path, "run", "-o", "run/swa", "--verify")
    assert "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt: optimizer state" in said
    assert "load_module_only=True" in said
    names = {path.name for path in (tmp_path / "run/swa").iterdir()}
    assert names == {"mp_rank_00_model_states.pt", "swa_avg.json"}
    made = load(tmp_path / "run/swa/mp_rank_00_model_states.pt")
    assert_mean(made.pop("module"), STATES)
    kept = deepspeed_file(STATES[-1], 30)
    del kept["module"]
    assert made == kept
    # The average beside the checkpoints of the run is left out, and can be continued from.
    said = done(tmp_path, "run", "-o", "kept", "--keep-wrapper", "--epochs", "20:30")
    assert "run/swa: is already an average; left out" in said
    assert differing(tmp_path / "kept", tmp_path / "run/global_step30") == names
    assert_mean(load(tmp_path / "kept/mp_rank_00_model_states.pt")["module"], STATES[1:])
    done(tmp_path, "run/global_step10", "--start-from", "kept", "-o", "all")
    made = load(tmp_path / "all/mp_rank_00_model_states.pt")["module"]
    torch.testing.assert_close(made["0.weight"], mean(STATES, "0.weight"))
    # A single file takes what a copy cannot.
    line = fails(tmp_path, "run", "-o", "half", "--dtype", "bfloat16")
    assert "keeps its dtypes" in line and "-o swa.pt" in line
    done(tmp_path, "run", "-o", "swa.pt", "--dtype", "bfloat16")
    assert load(tmp_path / "swa.pt")["0.weight"].dtype == torch.bfloat16


def test_deepspeed_inside_another_checkpoint(tmp_path: Path) -> None:
    """accelerate and Lightning save with DeepSpeed into a sub-folder, which `latest` names."""
    for n, state in enumerate(STATES):
        home = tmp_path / f"run/checkpoint_{n}"
        (home / "pytorch_model").mkdir(parents=True)
        (home / "latest").write_text("pytorch_model")
        torch.save(deepspeed_file(state, n), home / "pytorch_model/mp_rank_00_model_states.pt")
        (home / "random_states_0.pkl").write_bytes(b"random")
    done(tmp_path, "run", "-o", "swa")
    changed = differing(tmp_path / "swa", tmp_path / "run/checkpoint_2")
    assert changed == {"pytorch_model/mp_rank_00_model_states.pt", "swa_avg.json"}
    made = load(tmp_path / "swa/pytorch_model/mp_rank_00_model_states.pt")
    assert_mean(made["module"], STATES)


def test_parts_of_models_are_refused_with_their_tool(tmp_path: Path) -> None:
    """Files of several ranks, of ZeRO-3 and of pipelines are refused with the tool that merges."""
    for path, tool in {
        "zero3/global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt":
            "zero_to_fp32.py zero3 merged/global_step1 -t global_step1",
        "ranks/global_step1/mp_rank_01_model_states.pt": "deepspeed_to_megatron.py --target_tp 1",
        "pipe/global_step1/layer_00-model_00-model_states.pt": "deepspeed_to_megatron.py",
        "megatron/iter_0000001/mp_rank_01/model_optim_rng.pt": "tools/checkpoint/convert.py",
    }.items():  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True)
        torch.save({"module": STATES[0]}, tmp_path / path)
        if not path.startswith("zero3"):
            whole = tmp_path / path.replace("layer_00-model_00-", "mp_rank_00_").replace(
                "01_", "00_"
            )
            whole = Path(str(whole).replace("rank_01/", "rank_00/"))
            whole.parent.mkdir(exist_ok=True)
            torch.save({"module": STATES[0]}, whole)
        line = fails(tmp_path, path.split("/")[0], "-o", "out")
        assert "has parts of a model" in line and tool in line, line


ENGINE = """
import os, sys, torch
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1",
                  LOCAL_RANK="0", DS_ACCELERATOR="cpu")
from torch import distributed, nn
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
import deepspeed
def engine(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    config = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True},
              "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
made = engine(0)
if sys.argv[1] == "save":
    for step in (1, 2, 3):
        made.backward(made(torch.rand(2, 3).bfloat16()).float().square().mean())
        made.step()
        made.save_checkpoint("run", tag=f"global_step{step}")
else:
    made.load_checkpoint("run", tag="swa", load_module_only=True)
    flat = made.optimizer.single_partition_of_fp32_groups[0].detach()
    torch.save({"module": made.module.state_dict(), "fp32": flat}, "loaded.pt")
"""


@pytest.mark.frameworks
def test_deepspeed_engine_takes_the_mean(tmp_path: Path) -> None:
    """The engine writes a run with ZeRO-2; `load_checkpoint` takes the mean, in float32 too."""
    if not importlib.util.find_spec("deepspeed"):
        pytest.skip("needs deepspeed")

    def call(what: str) -> None:
        command = [sys.executable, "-c", ENGINE, what]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        if "ModuleNotFoundError" in ended.stderr or "ImportError" in ended.stderr:
            pytest.skip("deepspeed cannot be imported")
        assert ended.returncode == 0, ended.stderr

    call("save")
    done(tmp_path, "run", "-o", "run/swa")
    call("load")
    files = [tmp_path / f"run/global_step{n}/mp_rank_00_model_states.pt" for n in (1, 2, 3)]
    loaded = load(tmp_path / "loaded.pt")
    assert_mean(dict(loaded["module"]), [dict(load(file)["module"]) for file in files])
    values = torch.cat([value.flatten() for value in loaded["module"].values()])
    assert torch.equal(loaded["fp32"][: len(values)].sort()[0], values.float().sort()[0])


# Megatron-LM and LitGPT.


def test_megatron_run(tmp_path: Path) -> None:
    """`iter_N/mp_rank_00/` comes out as such a folder; the distributed optimizer is left out."""
    for n, state in enumerate(STATES):
        home = tmp_path / f"run/iter_000{n}/mp_rank_00"
        home.mkdir(parents=True)
        content = {"args": None, "checkpoint_version": 3.0, "iteration": n, "model": state}
        torch.save(content, home / "model_optim_rng.pt")
        torch.save({"fp32": state["0.weight"]}, home / "distrib_optim.pt")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("2")
    said = done(tmp_path, "run", "-o", "run/release")
    assert "--no-load-optim" in said and "mp_rank_00/distrib_optim.pt: optimizer state" in said
    made = load(tmp_path / "run/release/mp_rank_00/model_optim_rng.pt")
    assert_mean(made["model"], STATES)
    assert (made["checkpoint_version"], made["iteration"]) == (3.0, 2)
    assert not (tmp_path / "run/release/mp_rank_00/distrib_optim.pt").exists()


@pytest.mark.frameworks
def test_litgpt_run(tmp_path: Path) -> None:
    """`step-N/lit_model.pth` comes out in a folder that litgpt's own function loads."""
    pytest.importorskip("litgpt")
    import yaml
    from litgpt import GPT, Config
    from litgpt.utils import check_valid_checkpoint_dir, lazy_load, save_config

    config = Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, padded_vocab_size=16,
                    block_size=8)  # fmt: skip
    states = []
    for n in range(3):
        home = tmp_path / f"out/step-{n:06d}"
        home.mkdir(parents=True)
        torch.manual_seed(n)
        states.append(dict(GPT(config).state_dict()))
        torch.save({"model": states[-1]}, home / "lit_model.pth")
        save_config(config, home)
        (home / "tokenizer.json").write_text("{}")
        (home / "tokenizer_config.json").write_text("{}")
    done(tmp_path, "out", "-o", "swa")
    check_valid_checkpoint_dir(tmp_path / "swa")
    assert yaml.safe_load((tmp_path / "swa/model_config.yaml").read_text())["n_embd"] == 8
    model = GPT(Config.from_file(tmp_path / "swa/model_config.yaml"))
    model.load_state_dict(lazy_load(tmp_path / "swa/lit_model.pth")["model"])
    assert_mean(dict(model.state_dict()), states)


# SpeechBrain.


def speechbrain_by_hand(save: Path) -> None:
    """Write what SpeechBrain's Checkpointer writes."""
    for n, state in enumerate(STATES):
        home = save / f"CKPT+2024-05-0{n + 1}+10-00-00+00"
        home.mkdir(parents=True)
        torch.save(state, home / "model.ckpt")
        torch.save(STATES[2 - n], home / "encoder.ckpt")
        torch.save({"state": {}, "param_groups": []}, home / "optimizer.ckpt")
        statistics = {"count": n, "glob_mean": torch.full((3,), float(n)), "spk_dict_mean": {}}
        torch.save(statistics, home / "normalizer.ckpt")
        (home / "counter.ckpt").write_text(str(n + 1))
        lines = ["# yamllint disable", f"WER: {[7.5, 9.0, 8.0][n]}", "end-of-epoch: true"]
        lines += [f"epoch: {n + 1}", f"unixtime: {1714557600.5 + n}"]
        (home / "CKPT.yaml").write_text("\n".join(lines) + "\n")


def test_speechbrain_run(tmp_path: Path) -> None:
    """Each recoverable that is a model is averaged by itself; the rest is copied from the last."""
    speechbrain_by_hand(tmp_path / "results/save")
    said = done(tmp_path, "results", "-o", "CKPT+swa", "--verify")
    assert "normalizer: not a model; copied from the last checkpoint" in said
    last = tmp_path / "results/save/CKPT+2024-05-03+10-00-00+00"
    changed = {"model.ckpt", "encoder.ckpt", "swa_avg.json"}
    assert differing(tmp_path / "CKPT+swa", last) == changed
    assert_mean(load(tmp_path / "CKPT+swa/model.ckpt"), STATES)
    assert_mean(load(tmp_path / "CKPT+swa/encoder.ckpt"), STATES[::-1])
    said = done(tmp_path, "results", "-o", "best", "--best", "2", "--metric", "WER")
    assert_mean(load(tmp_path / "best/model.ckpt"), [STATES[0], STATES[2]])
    line = fails(tmp_path, "results", "-o", "swa.pt")
    assert "several models (encoder, model)" in line
    done(tmp_path, "results", "-o", "swa.pt", "--key", "model")
    assert_mean(load(tmp_path / "swa.pt"), STATES)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Forget the modules of speechbrain: hypothesis looks at all, and some are imported by that."""
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "speechbrain"]:
        del sys.modules[name]


@pytest.mark.frameworks
@pytest.mark.usefixtures("forgotten")
def test_speechbrain_checkpointer_recovers_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SpeechBrain's Checkpointer writes the run and recovers every recoverable of the output."""
    pytest.importorskip("hyperpyyaml")
    for name in ("torchaudio", "torchaudio.transforms", "torchaudio.functional"):
        # Only the import of speechbrain needs it.
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__version__, module.list_audio_backends = "2.1.0", list
        monkeypatch.setitem(sys.modules, name, module)
    checkpoints = pytest.importorskip("speechbrain.utils.checkpoints")
    model, states = network(0), []
    parts = {"model": model, "optimizer": torch.optim.Adam(model.parameters())}
    writer = checkpoints.Checkpointer(tmp_path / "save", parts)
    for n in range(3):
        model(torch.rand(8, 3)).square().mean().backward()
        parts["optimizer"].step()
        writer.save_checkpoint(meta={"WER": 9.0 - n, "epoch": n}, name=f"epoch{n}")
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    (tmp_path / "found").mkdir()
    done(tmp_path, "save", "-o", "found/CKPT+swa")
    fresh = network(9)
    parts = {"model": fresh, "optimizer": torch.optim.Adam(fresh.parameters())}
    found = checkpoints.Checkpointer(tmp_path / "found", parts).recover_if_possible()
    assert found.meta["WER"] == 7.0
    assert_mean(dict(fresh.state_dict()), states)


# NeMo.


def weights_of(path: Path) -> State:
    """Load the weights as NeMo does, with its own connector if it is installed."""
    try:
        from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
    except Exception:  # whatever its own dependencies raise
        loaded: State = load_bytes(members(path)["./model_weights.ckpt"])
        return loaded
    out = path.parent / "unpacked"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    SaveRestoreConnector._unpack_nemo_file(str(path), str(out))
    return dict(SaveRestoreConnector._load_state_dict_from_disk(out / "model_weights.ckpt"))


def load_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def test_nemo_archives(tmp_path: Path) -> None:
    """`-o x.nemo` is the last archive with other weights; every other member keeps its bytes."""
    for n, state in enumerate(STATES):
        save_nemo(tmp_path / f"epoch={n}.nemo", state, n)
    inputs = [f"epoch={n}.nemo" for n in range(3)]
    done(tmp_path, *inputs, "-o", "swa.nemo", "--verify")
    last, made = members(tmp_path / "epoch=2.nemo"), members(tmp_path / "swa.nemo")
    assert list(made) == [*last, "./swa_avg.json"]
    assert {name for name in last if last[name] != made[name]} == {"./model_weights.ckpt"}
    assert_mean(load_bytes(made["./model_weights.ckpt"]), STATES)
    assert_mean(weights_of(tmp_path / "swa.nemo"), STATES)
    assert "average of 3 checkpoints" in run(tmp_path, "--show", "swa.nemo").stdout
    done(tmp_path, "--start-from", "swa.nemo", "-o", "again.pt")
    assert_mean(load(tmp_path / "again.pt"), STATES)
    assert run(tmp_path, ".", "-o", "swa.safetensors").returncode == 0  # found in a folder
    (tmp_path / "swa.safetensors").unlink()
    # No other input gives an archive.
    torch.save(STATES[0], tmp_path / "a.pt")
    line = fails(tmp_path, "a.pt", "-o", "b.nemo")
    assert "Name it b.pt" in line


def test_compressed_archives_and_their_remedy(tmp_path: Path) -> None:
    """A compressed archive is refused; after the command in the message it is read."""
    save_nemo(tmp_path / "old.nemo", STATES[0], 0, "w:gz")
    save_nemo(tmp_path / "new.nemo", STATES[1], 1)
    line = fails(tmp_path, "old.nemo", "new.nemo", "-o", "out.nemo")
    assert "is a compressed archive" in line
    remedy = line.partition("Decompress it: ")[2].removesuffix(".")
    subprocess.run(remedy, shell=True, cwd=tmp_path, check=True)
    assert shlex.split(remedy)[-1] == "uncompressed.nemo"
    done(tmp_path, "uncompressed.nemo", "new.nemo", "-o", "out.nemo")
    found = load_bytes(members(tmp_path / "out.nemo")["./model_weights.ckpt"])
    expected = mean(STATES[:2], "0.weight")
    assert torch.equal(found["0.weight"], expected)


def header_of_size(size: int) -> bytes:
    """Return the header of a tar member whose size is in GNU's binary form, which has a sign."""
    block = bytearray(tarfile.TarInfo("more").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size.to_bytes(12, "big", signed=True)
    block[148:155] = b"%06o\0" % tarfile.calc_chksums(block)[0]
    return bytes(block)


def test_archives_that_are_not_sound_are_refused(tmp_path: Path) -> None:
    """Cut archives, negative sizes, two files of one name, links: one line, no output."""
    whole = save_nemo(tmp_path / "whole.nemo", STATES[0], 0).read_bytes()
    start = whole.index(b"./model_weights.ckpt")
    filled = whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512)
    cases = {
        "cut": (whole[: start + 2000], "is cut short"),
        "end": (filled, "its end is missing"),
        "size": (filled + header_of_size(-1024) + bytes(1024), "archive (more has -1024 bytes)"),
        "weights": (whole[:start] + whole[start:].replace(b"PK\1\2", b"PK\1\3"), "damaged"),
    }
    for name, (data, says) in cases.items():
        (tmp_path / f"{name}.nemo").write_bytes(data)
        assert says in fails(tmp_path, f"{name}.nemo", "-o", "out.nemo"), name
    for name, entries, says in (
        ("twice", ["model_weights.ckpt", "./model_weights.ckpt"], "two files"),
        ("folder", ["model_weights/.metadata", "model_weights/0.distcp"], "tar -xf folder.nemo"),
        ("ranks", ["mp_rank_00/model_weights.ckpt", "mp_rank_01/model_weights.ckpt"],
         "megatron_change_num_partitions.py"),
        ("none", ["weights.txt"], "looks like a tar archive"),
    ):  # fmt: skip
        with tarfile.open(tmp_path / f"{name}.nemo", "w:") as archive:
            for entry in entries:
                archive.addfile(tarfile.TarInfo(entry))
        assert says in fails(tmp_path, f"{name}.nemo", "-o", "out.nemo"), name
    with tarfile.open(tmp_path / "link.nemo", "w:") as archive:
        link = tarfile.TarInfo("model_weights.ckpt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert "looks like a tar archive" in fails(tmp_path, "link.nemo", "-o", "out.nemo")
    (tmp_path / "text.nemo").write_bytes(gzip.compress(b"text"))
    assert "is a compressed archive" in fails(tmp_path, "text.nemo", "-o", "out.nemo")
