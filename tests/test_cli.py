"""The command, as a user runs it: exit codes, one line of error, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from command import fails, run, snapshot
from safetensors.torch import save_file

from swa_avg import cli, settings


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(4, 3), "b": torch.arange(5), "c": torch.randn(7)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three checkpoints, 0.pt to 2.pt."""
    for number in range(3):
        torch.save(state(number), tmp_path / f"{number}.pt")
    return tmp_path


# What is refused, from the headers alone.


ALL = ("0.pt", "1.pt", "2.pt", "-o", "out.pt")
# Most of what is refused is in the catalogue of faults: tests/test_faults_*.py.
REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...], int, str]] = {
    "folder": (lambda folder: (folder / "3.pt").mkdir(), ("3.pt", *ALL), 2, "3.pt: is a folder"),
    "output is a folder": (
        lambda folder: (folder / "out.pt").mkdir(), (*ALL, "-f"), 1, "out.pt: is a folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_is_one_line_and_leaves_no_trace(folder: Path, name: str) -> None:
    """Each fault: its exit code, its line, and the folder as it was."""
    make, arguments, code, says = REFUSED[name]
    make(folder)
    line = fails(folder, *arguments, code=code)
    assert says in line


@pytest.mark.parametrize(
    "arguments",
    [(), ("--no-such",), ("0.pt", "--dtype", "int8"), ("0.pt", "--threads", "0"), ("-o",)],
)
def test_wrong_usage(folder: Path, arguments: tuple[str, ...]) -> None:
    """Exit code 2, told how it is used, nothing done."""
    before = snapshot(folder)
    ended = run(folder, *arguments)
    assert ended.returncode == 2
    assert "Error: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert snapshot(folder) == before


# What is done.


def test_average_says_what_it_did(folder: Path) -> None:
    """A short summary on stdout; the output is the mean, and its mode the umask's."""
    ended = run(folder, *ALL, umask=0o027)
    assert ended.returncode == 0, ended.stderr
    assert "averaged 3 checkpoints: 0.pt … 2.pt" in ended.stdout
    assert "tensors: 2 averaged, 1 copied" in ended.stdout
    assert "wrote out.pt" in ended.stdout
    assert ended.stderr == ""
    assert (folder / "out.pt").stat().st_mode & 0o777 == 0o640
    found = torch.load(folder / "out.pt", weights_only=True)
    mean = sum(state(n)["c"].double() for n in range(3)) / 3
    assert torch.equal(found["c"], mean.float())
    assert not list(folder.glob(".*"))


def test_dry_run_writes_nothing(folder: Path) -> None:
    """The plan, from headers alone."""
    before = snapshot(folder)
    ended = run(folder, *ALL[:3], "-o", "out.safetensors", "--dry-run", "-v")
    assert ended.returncode == 0, ended.stderr
    assert "3 checkpoints, in this order:" in ended.stdout
    assert "a.weight" in ended.stdout and "averaged: mean of 3" in ended.stdout
    assert "b " in ended.stdout and "copied: int64 has no mean" in ended.stdout
    assert snapshot(folder) == before


def test_epochs_are_in_natural_order(tmp_path: Path) -> None:
    """The last is epoch 10, not 9, from the names alone; a pattern is expanded by us."""
    for number in (1, 2, 9, 10):
        save_file({"n": torch.tensor([number])}, tmp_path / f"epoch_{number}.safetensors")
    ended = run(tmp_path, "epoch_*", "-o", "o.safetensors", "--dry-run", "--json")
    assert ended.returncode == 0, ended.stderr
    paths = [source["path"] for source in json.loads(ended.stdout)["inputs"]]
    assert paths == [f"epoch_{number}.safetensors" for number in (1, 2, 9, 10)]


def test_help_needs_no_torch(tmp_path: Path) -> None:
    """--help, --version and wrong usage answer at once."""
    code = (
        "import sys; from swa_avg.cli import main\n"
        "for word in ('--help', '--version', '--no-such'):\n"
        "    sys.argv = ['swa-avg', word]\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "Examples:" in ended.stdout


def test_choices_are_those_of_the_library() -> None:
    """The command line offers what `average` takes, no less and no more."""
    choices = {
        parameter.name: tuple(parameter.type.choices)
        for parameter in cli.command.params
        if isinstance(parameter.type, click.Choice)
    }
    assert choices["bn_buffers"] == settings.BN_BUFFERS
    assert choices["dtype"] == settings.OUTPUT_DTYPES
