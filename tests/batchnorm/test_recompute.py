"""The laws of `--recompute-bn`: what it does to a file, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from preloaded import on_ranks
from safetensors.torch import load_file, save_file
from torch import nn

from swa_avg import __main__ as entry

SCRIPTS = Path(sys.executable).parent

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def model(dtype=torch.float32):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 36, 4), nn.BatchNorm1d(4), nn.Linear(4, 2),
    ).to(dtype)

def double(): return model(torch.float64)

images = torch.randn(150, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 + 7
loader = DataLoader(TensorDataset(images, torch.zeros(150)), batch_size=32)
doubles = DataLoader(TensorDataset(images.double()), batch_size=32)

def breaks():
    yield images[:8]
    yield images[8:16]
    raise OSError("the disk of the data is gone")

def nothing(): return []
def not_numbers(): return [images[:8], torch.full((8, 3, 8, 8), float("nan"))]
def other(): return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
def forward(network, batch): return network(batch[0] if isinstance(batch, list) else batch)
def bad_forward(network, batch): raise RuntimeError("no such head")
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a data module and twelve checkpoints of its model."""
    (tmp_path / "mod.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpts").mkdir()
    for epoch in range(12):
        torch.manual_seed(epoch)
        state = module(tmp_path)["model"]().state_dict()
        torch.save({"epoch": epoch, "model": state}, tmp_path / f"ckpts/epoch_{epoch}.pt")
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: exit code, stdout, stderr."""
    # Where it is loaded, a command does not end its process at once.
    import swa_avg.batchnorm  # noqa: F401

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["swa-avg", *arguments])
        monkeypatch.delitem(sys.modules, "mod", raising=False)
        with pytest.raises(SystemExit) as ended:
            entry.main()
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return run


def module(folder: Path) -> dict[str, Callable[[], nn.Module]]:
    names: dict[str, Callable[[], nn.Module]] = {}
    exec((folder / "mod.py").read_text(), names)
    return names


def averaged(folder: Path, run: Run, name: str = "swa.pt") -> Path:
    checkpoints = map(str, folder.glob("ckpts/epoch_*.pt"))
    assert run(*checkpoints, "-o", name, "-q")[0] == 0
    return folder / name


def listed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


def is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def two_pass(folder: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the statistics that the layers should have, in float64, all data at once."""
    network = module(folder)["double"]().eval()
    network.load_state_dict(state)
    seen = module(folder)["images"].double()
    made = {}
    for name, layer in network.named_children():
        if isinstance(layer, nn.BatchNorm2d):
            dims = [0, 2, 3]
        elif isinstance(layer, nn.BatchNorm1d):
            dims = [0]
        else:
            seen = layer(seen)
            continue
        layer.running_mean = seen.mean(dims).detach()
        layer.running_var = seen.var(dims, unbiased=False).detach()
        made[f"{name}.running_mean"], made[f"{name}.running_var"] = (
            layer.running_mean,
            layer.running_var,
        )
        # Each batch is normalised by its own moments while statistics are gathered.
        parts = seen.split(32)
        layer.train()
        layer.momentum = 0.0
        seen = torch.cat([layer(part) for part in parts]).detach()
        layer.eval()
    return made


def test_both_lines_of_the_card(folder: Path) -> None:
    """Typed as they are, the lines give an average with statistics of its own."""
    environment = os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}

    def type_in(line: str) -> None:
        subprocess.run(["bash", "-c", line], check=True, env=environment, capture_output=True)

    type_in("swa-avg ckpts/epoch_*.pt -o swa.pt")
    before = torch.load("swa.pt")
    type_in("swa-avg --recompute-bn --data mod:loader")
    after = torch.load("swa.pt")

    assert list(after) == list(before)
    for name in after:
        assert torch.equal(after[name], before[name]) != is_buffer(name), name
    assert zipfile.ZipFile("swa.pt").testzip() is None
    for name, expected in two_pass(folder, after).items():
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert after["1.num_batches_tracked"] == 5
    module(folder)["model"]().load_state_dict(after, strict=True)


def test_one_go_equals_two(folder: Path, run: Run) -> None:
    """Averaging and recomputing in one command gives the bytes of doing it in two."""
    two = averaged(folder, run)
    assert run("--recompute-bn", "--data", "mod:loader")[0] == 0
    one = ["-o", "one.pt", "--recompute-bn", "--data", "mod.py:loader"]
    assert run("ckpts/epoch_*.pt", *one)[0] == 0
    assert Path("one.pt").read_bytes() == two.read_bytes()


def test_one_checkpoint_keeps_its_weights(folder: Path, run: Run) -> None:
    """Of a single checkpoint nothing changes but the statistics."""
    assert run("ckpts/epoch_3.pt", "--recompute-bn", "--data", "mod:loader")[0] == 0
    given, made = torch.load("ckpts/epoch_3.pt")["model"], torch.load("swa.pt")
    for name in given:
        assert torch.equal(given[name], made[name]) != is_buffer(name), name


def test_in_place_touches_only_the_buffers(folder: Path, run: Run) -> None:
    """In a framework's checkpoint every record but the buffers' keeps its bytes."""
    target = folder / "swa.pt"
    state = {f"model.{k}": v for k, v in torch.load("ckpts/epoch_3.pt")["model"].items()}
    moments = {name: torch.randn_like(value.float()) for name, value in state.items()}
    wrapped = {"epoch": 3, "state_dict": state, "optimizer": moments, "args": [1, "a"]}
    torch.save(wrapped, target)
    with zipfile.ZipFile(target) as archive:
        before = {name: archive.read(name) for name in archive.namelist()}
    code, out, _ = run("--recompute-bn", "--data", "mod:loader", "--json", "--force")
    assert code == 0
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        after = {name: archive.read(name) for name in archive.namelist()}
    assert after.keys() == before.keys()
    assert sum(before[name] != after[name] for name in before) == 6
    made = torch.load(target)
    assert made["epoch"] == 3 and made["args"] == [1, "a"]
    assert all(torch.equal(moments[name], made["optimizer"][name]) for name in moments)
    assert not torch.equal(
        state["model.1.running_mean"], made["state_dict"]["model.1.running_mean"]
    )
    notes = " ".join(json.loads(out)["batchnorm_notes"])
    assert "model." in notes


def test_safetensors_in_place(folder: Path, run: Run) -> None:
    """A safetensors file keeps its header and its weights, byte for byte."""
    save_file(torch.load("ckpts/epoch_3.pt")["model"], "swa.safetensors")
    before, given = Path("swa.safetensors").read_bytes(), load_file("swa.safetensors")
    assert run("-o", "swa.safetensors", "--recompute-bn", "--data", "mod:loader", "-f")[0] == 0
    after, made = Path("swa.safetensors").read_bytes(), load_file("swa.safetensors")
    header = 8 + int.from_bytes(before[:8], "little")
    assert after[:header] == before[:header] and len(after) == len(before)
    for name in given:
        assert torch.equal(given[name], made[name]) != is_buffer(name), name


def test_dtype_of_the_file_is_kept(folder: Path, run: Run) -> None:
    """Statistics are computed in the model's dtype and stored in the file's."""
    written = ["-o", "half.pt", "--dtype", "bfloat16", "--recompute-bn", "--data", "mod:loader"]
    assert run("ckpts/epoch_*.pt", *written)[0] == 0
    made = torch.load("half.pt")
    assert made["1.running_var"].dtype is torch.bfloat16
    assert made["1.num_batches_tracked"].dtype is torch.int64
    for name, expected in two_pass(folder, made).items():
        torch.testing.assert_close(made[name].double(), expected, rtol=2**-8, atol=1e-3)


def test_torch_estimator_is_update_bn(folder: Path, run: Run) -> None:
    """`--bn-estimator torch` writes what torch's own update_bn gives, to the bit."""
    target = averaged(folder, run)
    names = module(folder)
    torch.manual_seed(0)  # dropout is on: the same seed, the same draws
    network = names["model"]()
    network.load_state_dict(torch.load(target))
    torch.optim.swa_utils.update_bn(names["loader"], network)
    torch.manual_seed(0)
    torch_like = ["--recompute-bn", "--data", "mod:loader", "--bn-estimator", "torch"]
    assert run(*torch_like, "--device", "cpu")[0] == 0
    made = torch.load(target)
    for name, value in network.state_dict().items():
        assert torch.equal(value, made[name]), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "mod:breaks"], ["batch 2", "OSError", "the disk of the data is gone"]),
        (["--data", "mod:nothing"], ["no batch"]),
        (["--data", "mod:not_numbers"], ["batch 1"]),
        (["--data", "mod:absent"], ["absent"]),
        (["--data", "no_such_module:x"], ["no_such_module"]),
        (["--data", "mod:loader", "--model", "mod:other"], ["0.weight"]),
        (["--data", "mod:loader", "--model", "mod:images"], ["mod:images"]),
        (["--data", "mod:loader", "--forward", "mod:bad_forward"], ["batch 0", "no such head"]),
        (["--data", "mod:loader", "--device", "cuda:77"], ["cuda"]),
        (["--data", "mod:loader", "-o", "absent.pt"], ["absent.pt", "does not exist"]),
    ],
)
def test_failures_leave_the_target(
    folder: Path, run: Run, arguments: list[str], words: list[str]
) -> None:
    """Whatever fails, there is one line that says so, exit 1, and the target as it was."""
    target = averaged(folder, run)
    before, listing = target.read_bytes(), listed(folder)
    code, out, err = run("--recompute-bn", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert target.read_bytes() == before
    assert listed(folder) == listing


@pytest.mark.parametrize(
    "arguments",
    [
        ["--recompute-bn"],
        ["ckpts/epoch_1.pt", "--data", "mod:loader"],
        ["ckpts/epoch_1.pt", "--amp", "bf16"],
        ["--recompute-bn", "--data", "mod:loader", "--dtype", "float16"],
        ["--recompute-bn", "--data", "mod:loader", "--bn-buffers", "mean"],
        ["--recompute-bn", "--data", "mod:loader", "--bn-batches", "0"],
    ],
)
def test_options_that_would_be_ignored_are_usage_errors(
    folder: Path, run: Run, arguments: list[str]
) -> None:
    """No option is accepted and ignored: exit 2, nothing written."""
    code, _, err = run(*arguments)
    assert code == 2 and "Error: " in err
    assert not (folder / "swa.pt").exists()


def test_two_ranks_equal_one(folder: Path, run: Run) -> None:
    """The batches shared by two processes give the statistics of one, to 1e-12."""
    for epoch in range(2):
        torch.manual_seed(epoch)
        torch.save(module(folder)["double"]().state_dict(), f"double_{epoch}.pt")
    options = ["--recompute-bn", "--data", "mod:doubles", "--model", "mod:double"]
    assert run("double_*.pt", "-o", "one.pt", *options)[0] == 0
    ended = on_ranks(folder, 2, "double_0.pt", "double_1.pt", "-o", "two.pt", *options)
    assert [one.returncode for one in ended] == [0, 0], ended
    assert [one.stdout.count("wrote two.pt") for one in ended] == [1, 0]
    one, two = torch.load("one.pt"), torch.load("two.pt")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["expanded", "shared"])
def test_buffers_without_room_of_their_own(folder: Path, run: Run, kind: str) -> None:
    """A buffer that shares its elements is refused: new statistics have no room there."""
    state = torch.load("ckpts/epoch_1.pt")["model"]
    if kind == "expanded":
        state["1.running_mean"] = torch.zeros(1).expand(8)
    else:
        state["1.running_mean"] = state["1.running_var"]
    torch.save(state, "swa.pt")
    before = Path("swa.pt").read_bytes()
    code, _, err = run("--recompute-bn", "--data", "mod:loader", "--force")
    assert code == 1 and "1.running_" in err and "cannot be replaced" in err
    assert Path("swa.pt").read_bytes() == before


def test_rank_without_world_is_no_torchrun(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RANK that a scheduler set by itself does not make this process a follower."""
    monkeypatch.setenv("RANK", "1")
    assert run("ckpts/epoch_*.pt", "-q")[0] == 0
    assert Path("swa.pt").exists()
    monkeypatch.setenv("RANK", "two")
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert run("--recompute-bn", "--data", "mod:loader", "-q")[0] == 0


def test_dry_run_says_what_would_be_recomputed(folder: Path, run: Run) -> None:
    """The plan mentions the recompute, runs none of the user's code, writes nothing."""
    code, out, _ = run("ckpts/epoch_*.pt", "--recompute-bn", "--data", "mod:absent", "--dry-run")
    assert code == 0 and "would recompute BatchNorm over mod:absent" in out
    assert not Path("swa.pt").exists()
    assert run("ckpts/epoch_*.pt", "--dry-run", "-q") == (0, "", "")


def test_output_that_is_a_folder(folder: Path, run: Run) -> None:
    """A folder that is no checkpoint is refused in one line."""
    (folder / "swa").mkdir()
    code, out, err = run("--recompute-bn", "--data", "mod:loader", "-o", "swa")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: swa: is a folder")
    assert not listed(folder / "swa")


def test_names_under_a_prefix_and_without_counters(folder: Path, run: Run) -> None:
    """Put into a file in its own terms: its prefix stays, and no counter is added to it."""
    plain = torch.load(averaged(folder, run))
    old = {f"net.{k}": v for k, v in plain.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, folder / "old.pt")
    assert run("--recompute-bn", "--data", "mod:loader", "-q")[0] == 0
    code, _, err = run("--recompute-bn", "--data", "mod:loader", "-o", "old.pt", "--force")
    assert code == 0
    assert "the prefix net. was removed from the names in the file to match the model" in err
    right, found = torch.load(folder / "swa.pt"), torch.load(folder / "old.pt")
    assert list(found) == list(old)
    assert all(torch.equal(value, right[name[4:]]) for name, value in found.items())


def test_statistic_that_the_file_cannot_hold(folder: Path, run: Run) -> None:
    """A mean beyond float16 is refused by its name; the file is as it was."""
    with (folder / "mod.py").open("a") as module:
        module.write("def large(): return [images * 1e5]\n")
    path = folder / "half.pt"
    torch.save({k: v.half() for k, v in torch.load(averaged(folder, run)).items()}, path)
    before = path.read_bytes()
    code, out, err = run("--recompute-bn", "--data", "mod:large", "-o", "half.pt", "-f")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "1.running_mean: has a new statistic that float16 cannot represent" in err
    assert path.read_bytes() == before
