"""Cases of remedies: a command, what its line tells, and the commands that follow it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import preloaded
import torch
from command import load, run
from safetensors.torch import save_file
from stored import settled

Build = Callable[[Path], object]


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 3), float(value)), "a.bias": torch.full((2,), float(value))}


def save(folder: Path, files: Mapping[str, Any]) -> None:
    """Save weights of a value, or a tree, or text under each name."""
    for name, what in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, str | bytes):
            path.write_bytes(what.encode() if isinstance(what, str) else what)
        else:
            _save_tree(weights(what) if isinstance(what, int | float) else what, path)
        settled(path)


def _save_tree(tree: Any, path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(tree, path, {"format": "pt"})
    else:
        torch.save(tree, path)


TWO = {"1.pt": 1, "2.pt": 2}


def several(make: Callable[[int], Any], suffix: str = ".pt") -> dict[str, Any]:
    """Return what to save as checkpoints 1 and 2."""
    return {f"{n}{suffix}": make(n) for n in (1, 2)}


@dataclass(frozen=True)
class Passing:
    """Adds to the user's module the function that a line tells, with these arguments."""

    arguments: str

    def __call__(self, folder: Path, name: str, call: str) -> None:
        adding(f"def {name}():", f"    {call}({self.arguments})")(folder)


# As `python` does with the script that is the first of its arguments.
A_SCRIPT = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
Then = tuple[str | Build | Passing, ...]


@dataclass(frozen=True)
class Case:
    """A situation, and what its line tells.

    Attributes:
        files: What is saved under each name, or a function that saves it.
        given: The command.
        says: A pattern of the remedy; its groups are what can be typed.
        then: Commands that follow the remedy; `{0}` is the first group. The shell runs those
            that begin with `$ `, and those that begin with `python ` run a script. A function,
            or a `Passing`, changes what is in the folder.
        mean: `a.weight` in the outputs of these commands, or of each; None to look at nothing.
        notes: Whether the remedy is in a note on a run that succeeds.
        exits: The exit code of the refused command, if it matters which.
    """

    files: Mapping[str, Any] | Build
    given: str
    says: str
    then: Then
    mean: float | tuple[float, ...] | None = None
    notes: bool = False
    exits: int | None = None


def check(case: Case, folder: Path) -> None:
    """Save what is needed, run the command, and follow its remedy."""
    if callable(case.files):
        case.files(folder)
    else:
        save(folder, case.files)
    _follow(folder, case, _told(folder, case))


def _told(folder: Path, case: Case) -> tuple[str, ...]:
    """Run the command of a case; return what its line tells to type."""
    before = _files(folder)
    ended = run(folder, *_with_output(case.given, "out.pt"), env=_environment(folder))
    assert (ended.returncode == 0) == case.notes, (ended.returncode, ended.stderr)
    assert case.exits in (None, ended.returncode), ended.stderr
    lines = ended.stderr.splitlines()
    wanted = [line for line in lines if re.search(case.says, line)]
    assert len(wanted) == 1, (case.says, lines)
    assert wanted[0].startswith(("note: ", "error: ", "Error: ")), wanted
    if case.notes:
        (folder / "out.pt").unlink(missing_ok=True)
    else:
        assert wanted[0] == lines[-1]
        assert _files(folder) == before
    found = re.search(case.says, wanted[0])
    assert found
    return found.groups()


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def _with_output(line: str, name: str) -> list[str]:
    words = shlex.split(line)
    return words if {"-o", "--each", "--show"} & {*words} else [*words, "-o", name]


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(folder)}


def _follow(folder: Path, case: Case, groups: Sequence[str]) -> None:
    """Do what the remedy says."""
    means = [*case.mean] if isinstance(case.mean, tuple) else []
    for number, step in enumerate(case.then):
        if isinstance(step, Passing):
            step(folder, *groups)
            continue
        if callable(step):
            step(folder)
            continue
        line = step.format(*groups)
        if line.startswith("$ "):
            subprocess.run(line[2:], shell=True, cwd=folder, check=True)
        elif line.startswith("python "):
            words = tuple(shlex.split(line)[1:])
            ended = preloaded.run(folder, words, os.environ, 300, A_SCRIPT, preloaded.TORCH)
            assert ended.returncode == 0, (line, ended.stderr)
        else:
            words = _with_output(line, f"out_{number}.pt")
            ended = run(folder, *words, env=_environment(folder))
            assert ended.returncode == 0, (words, ended.stderr)
            if case.mean is not None:
                out = folder / words[words.index("-o") + 1]
                found = load(out / "model.safetensors" if out.is_dir() else out)
                mean = means.pop(0) if isinstance(case.mean, tuple) else case.mean
                assert torch.equal(found["a.weight"], torch.full((2, 3), mean)), words


def adding(*lines: str) -> Build:
    """Return what adds lines to the user's module."""

    def add(folder: Path) -> None:
        with (folder / "mod.py").open("a") as module:
            module.write("\n".join((*lines, "")))

    return add


# A model of the user, batches for it, and functions that judge it.
SEARCH = """
from collections import OrderedDict
from torch import nn
def model(): return nn.Sequential(OrderedDict(a=nn.Linear(3, 2)))
def acc(network): return network.a.bias.mean().item()
def judge(network): return acc(network)
def both(network): return {"acc": acc(network), "loss": -acc(network)}
"""
MODULE = """
import torch
from collections import OrderedDict
from torch import nn
from torch.utils.data import DataLoader

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(OrderedDict(a=nn.Linear(3, 2), bn=nn.BatchNorm1d(2)))

images = torch.arange(24.0).reshape(8, 3) ** 1.5
loader = DataLoader(images, batch_size=4)
"""
MODEL = "model = Net"
BN = "1.pt 2.pt --recompute-bn --data mod:loader"


def of_net(n: int) -> dict[str, torch.Tensor]:
    """Return weights of `Net`, with other statistics than those of its data."""
    named = {"weight": torch.ones(2), "bias": torch.zeros(2), "running_mean": torch.ones(2),
             "running_var": torch.ones(2), "num_batches_tracked": torch.tensor(n)}  # fmt: skip
    return {**weights(n), **{f"bn.{name}": value for name, value in named.items()}}


def users(*lines: str, **files: Any) -> dict[str, Any]:
    """Return two checkpoints of `Net` and the user's module with further lines."""
    return {**several(of_net), "mod.py": "\n".join((MODULE, *lines, "")), **files}
