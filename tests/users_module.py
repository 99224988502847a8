"""A folder with two checkpoints of a small network and a module of the user's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from command import one_line, run, snapshot

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))

model = Net

def images(count, number=0):
    return torch.randn(
        count, 3, 8, 8, dtype=torch.float32, device="cpu",
        generator=torch.Generator(device="cpu").manual_seed(number),
    ) * 2 + 1

loader = [images(8, number) for number in range(4)]
"""
RECOMPUTE = ("a.pt", "b.pt", "-o", "out.pt", "--recompute-bn", "--data", "mod:loader")


def made(folder: Path, module: str = "", **others: str) -> Path:
    """Write checkpoints, `mod.py` with the network and what is added, and other modules."""
    names: dict[str, Any] = {}
    exec(NET, names)
    for number, name in enumerate(("a.pt", "b.pt")):
        torch.manual_seed(number)
        torch.save(names["Net"]().state_dict(), folder / name)
    (folder / "mod.py").write_text(NET + module)
    for name, text in others.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def data(spec: str, *more: str) -> tuple[str, ...]:
    """Return the arguments that recompute over other data."""
    return (*RECOMPUTE[:-1], spec, *more)


def done(folder: Path, *arguments: str, **options: Any) -> dict[str, Any]:
    """Run the command, which succeeds and says nothing on stderr; return its report."""
    ended = run(folder, *(arguments or RECOMPUTE), "--json", **options)
    assert ended.returncode == 0, ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


def failed(folder: Path, *arguments: str, **options: Any) -> str:
    """Run the command, which fails with one line and writes nothing; return the line."""
    before = snapshot(folder)
    line = one_line(run(folder, *(arguments or RECOMPUTE), **options))
    after = snapshot(folder)
    for found in (before, after):
        for name in [name for name in found if "__pycache__" in name or name == str(folder)]:
            del found[name]
    assert before == after
    return line


def told(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command, which fails, with -v."""
    ended = run(folder, *(arguments or RECOMPUTE), "-v")
    assert ended.returncode == 1, ended.stderr
    assert not (folder / "out.pt").exists()
    return ended


def same(one: Path, other: Path) -> bool:
    """Tell whether two outputs hold the same values."""
    first, second = torch.load(one), torch.load(other)
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)
