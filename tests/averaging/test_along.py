"""Averages along a run: each window equals a run of its own, and each file is read once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import COMMAND, fails, run, snapshot
from safetensors.torch import save_file
from torch import nn

import swa_avg
from swa_avg.errors import OutputError

COUNT, LAST = 9, 4


def weights(n: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(n)
    state: dict[str, torch.Tensor] = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Linear(2, 2)
    ).state_dict()
    state = {name: torch.randn_like(v) if v.is_floating_point() else v * 0 + n
             for name, v in state.items()}  # fmt: skip
    state["2.weight"] = state["2.weight"].t()  # a stride that .pt files keep
    return state | {"half": torch.randn(70000).bfloat16(), "wide": torch.randn(3).double()}


def torch_file(n: int, path: Path) -> Path:
    file = path / f"epoch_{n}.pt"
    torch.save({"state_dict": weights(n), "epoch": n, "global_step": 100 * n}, file)
    return file


def safe_file(n: int, path: Path) -> Path:
    file = path / f"epoch_{n}.safetensors"
    save_file({name: value.contiguous() for name, value in weights(n).items()}, file)
    return file


def hugging_face(n: int, path: Path) -> Path:
    folder = path / f"checkpoint-{n}"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {name: value.contiguous() for name, value in weights(n).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


FORMATS: list[tuple[Callable[[int, Path], Path], str, str, dict[str, Any]]] = [
    (torch_file, "{step}.pt", "{step}.pt", {}),
    (torch_file, "{epoch:03d}.pt", "{epoch:03d}.pt", {"keep_wrapper": True}),
    (torch_file, "{name}.safetensors", "epoch_{epoch}.safetensors", {"dtype": "bfloat16"}),
    (safe_file, "{epoch}.pt", "{epoch}.pt", {"bn_buffers": "first"}),
    (safe_file, "{epoch}.safetensors", "{epoch}.safetensors", {"bn_buffers": "reset"}),
    (hugging_face, "{name}/", "checkpoint-{epoch}", {"bn_buffers": "mean"}),
]


@pytest.mark.parametrize(("make", "pattern", "named", "options"), FORMATS)
def test_as_a_run_of_its_own(
    make: Callable[[int, Path], Path],
    pattern: str,
    named: str,
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    """The output of each window has the bytes of an average of its checkpoints alone."""
    ckpts, merged = tmp_path / "ckpts", tmp_path / "merged"
    ckpts.mkdir()
    merged.mkdir()
    paths = [make(n, ckpts) for n in range(COUNT)]
    report = swa_avg.windows(paths, f"{merged}/{pattern}", LAST, verify=True, **options)
    assert len(report.averages) == COUNT - LAST + 1 == len(list(merged.iterdir()))
    for end, of_one in zip(range(LAST, COUNT + 1), report.averages, strict=True):
        name = named.format(epoch=end - 1, step=100 * (end - 1))
        alone = tmp_path / "alone" / name
        alone.parent.mkdir(exist_ok=True)
        expected = swa_avg.average(paths[end - LAST : end], alone, **options)
        assert contents(merged / name) == contents(alone), name
        assert [one.path for one in of_one.inputs] == [one.path for one in expected.inputs]
        assert of_one.stale == expected.stale and of_one.counts == expected.counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("along")
    for n in range(COUNT):
        torch_file(n, made)
    return made


def test_several_windows_from_one_reading(folder: Path, tmp_path: Path) -> None:
    """Windows of several lengths are read once together, and the report lists them."""
    out = f"{tmp_path}/{{epoch}}_{{last}}.pt"
    ended = run(folder, "epoch_*.pt", "--last", "2,5", "--each", "-o", out, "--json")
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    expected = {f"{end}_{last}.pt" for last in (2, 5) for end in range(last - 1, COUNT)}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert [Path(one["output"]).name for one in said["averages"]][:2] == ["1_2.pt", "2_2.pt"]
    once = sum(v.nbytes for n in range(COUNT) for v in weights(n).values())
    assert said["bytes_read"] <= once
    for last in (2, 5):
        swa_avg.average(
            [folder / f"epoch_{n}.pt" for n in range(COUNT - last, COUNT)], tmp_path / "alone.pt",
            force=True,
        )  # fmt: skip
        found = (tmp_path / f"{COUNT - 1}_{last}.pt").read_bytes()
        assert found == (tmp_path / "alone.pt").read_bytes()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--each -o {step}.pt", "--each needs --last"),
        ("--each --last 3", "each average needs a name of its own"),
        ("--each --last 3 -o {nr}.pt", "the output's name has {nr}"),
        ("--each --last 3,4 -o {step}.pt", "need {last} in the output's name"),
        ("--each --last 0 -o {step}.pt", "--last must be at least 1"),
        ("--each --last 3 -o {step!r}.pt", "the output's name has {step!r}"),
        ("--last 3,4", "--last takes several numbers only with --each"),
        ("--each --last 3 --distances -o {step}.pt", "cannot be combined with --distances"),
        ("--each --last 3 --start-from x.pt -o {step}.pt", "combined with --start-from"),
    ],
)
def test_wrong_usage(folder: Path, line: str, says: str) -> None:
    """What cannot name or make the averages is refused: exit 2, nothing read or written."""
    before = snapshot(folder)
    ended = run(folder, "epoch_*.pt", *line.split())
    assert ended.returncode == 2 and says in ended.stderr, ended.stderr
    assert snapshot(folder) == before


def test_names_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    """Names of two averages, of inputs and of outputs that exist are refused before reading."""
    each = ("epoch_*.pt", "--each", "--last")
    assert "would be the name of two averages" in fails(folder, *each, "3", "-o", "x_{name:.5}.pt")
    line = fails(folder, *each, "3", "-o", "{name}.pt", "--force")
    assert "epoch_2.pt: is one of the inputs" in line
    line = fails(folder, *each, "10", "-o", "x_{epoch}.pt", code=2)
    assert "only 9 checkpoints, so no window of 10" in line
    (tmp_path / "5.pt").write_bytes(b"old")
    assert "5.pt: exists already" in fails(folder, *each, "3", "-o", f"{tmp_path}/{{epoch}}.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["5.pt"]


def test_names_of_folders(tmp_path: Path) -> None:
    """{name} is that of the folder where files have the same name; the remedy works."""
    for n in range(3):
        (tmp_path / f"ckpt-{n}").mkdir()
        torch.save({"model": weights(n), "global_step": 7}, tmp_path / f"ckpt-{n}" / "model.pt")
    each = ("ckpt-0/model.pt", "ckpt-1/model.pt", "ckpt-2/model.pt", "--each", "--last", "2", "-o")
    assert "Use {name} in the outputs' names." in fails(tmp_path, *each, "m_{step}.pt")
    ended = run(tmp_path, *each, "m_{name}.pt")
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in sorted(tmp_path.glob("m_*"))] == ["m_ckpt-1.pt", "m_ckpt-2.pt"]


def test_gaps_are_told(tmp_path: Path) -> None:
    """A note names the places where checkpoints are farther apart than most, only there."""
    for n, step in enumerate((100, 200, 300, 500, 600, 640)):
        torch.save({"model": {"w": torch.ones(2) * n}, "step": step}, tmp_path / f"{n}.pt")
    given = [tmp_path / f"{n}.pt" for n in range(6)]
    gap = "step 300 to 500: no checkpoint lies between, although most are 100 apart"
    report = swa_avg.windows(given, f"{tmp_path}/m_{{step}}.pt", 2)
    assert [gap in note for note in report.notes] == [True]
    report = swa_avg.windows(given[3:], f"{tmp_path}/n_{{step}}.pt", 2)
    assert not report.notes


def test_disk_is_checked_for_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that fit one by one but not together are refused before anything is written."""
    from swa_avg.storage import targets

    one = (folder / "epoch_0.pt").stat().st_size
    free = type("usage", (), {"free": 3 * one})
    monkeypatch.setattr(targets.shutil, "disk_usage", lambda _: free)
    with pytest.raises(OutputError, match=r"7 outputs need .* of disk space"):
        swa_avg.windows(folder / "epoch_*.pt", f"{tmp_path}/{{epoch}}.pt", 3)
    assert not list(tmp_path.iterdir())


def test_killed(folder: Path, tmp_path: Path) -> None:
    """A killed run leaves whole outputs or none; the next run removes its temporary files."""
    out = f"{tmp_path}/{{epoch}}.pt"
    arguments = ["epoch_*.pt", "--last", "3", "--each", "-o", out]
    process = subprocess.Popen([*COMMAND, *arguments], cwd=folder, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.iterdir()):
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = [path for path in tmp_path.iterdir() if path.name[0].isdigit()]
    assert all(torch.load(path) for path in whole)
    assert run(folder, *arguments, "--force").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}.pt" for n in range(2, COUNT)]


def test_recomputed_statistics(folder: Path, tmp_path: Path) -> None:
    """Each average gets the BatchNorm statistics that a run of its own gives it."""

    class Model(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](self[0](x))

    model = Model(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3))
    paths = [tmp_path / f"epoch_{n}.pt" for n in range(4)]
    for n, path in enumerate(paths):
        torch.save({k: weights(n)[k] for k in model.state_dict()}, path)
    bn = swa_avg.BatchNorm(data=[torch.ones(2, 1, 4, 4) * n for n in range(3)], model=model)
    report = swa_avg.windows(paths, f"{tmp_path}/swa_{{epoch}}.pt", 3, batchnorm=bn)
    assert [one.stale for one in report.averages] == [False, False]
    for end in (3, 4):
        swa_avg.average(paths[end - 3 : end], tmp_path / "alone.pt", batchnorm=bn, force=True)
        found = (tmp_path / f"swa_{end - 1}.pt").read_bytes()
        assert found == (tmp_path / "alone.pt").read_bytes()
