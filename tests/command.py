"""The command, run as users run it, and the two things that it may do: average, or refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch
from safetensors.torch import load_file

COMMAND = [sys.executable, "-m", "swa_avg"]
# Who runs tests as root may read and write anything; a user may not. 24 is PR_CAPBSET_DROP,
# 1 and 2 are the capabilities to pass over permissions.
_AS_A_USER = """
import ctypes, os, sys
for capability in (1, 2):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
# Without what has a process write down its coverage at its end, where every write counts.
UNMEASURED = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
OUT = "out.pt"
OLD = b"the old output"
# A fault of the catalogue: its number, and once for each number its name and what happens.
fault = pytest.mark.fault


def run(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder.

    Args:
        folder: The current folder.
        arguments: Its arguments.
        options: Those of `subprocess.run`; `limits`, what a shell says before it
            (`ulimit -v 1000`); `without_privileges`, to be refused what a user is refused;
            `terminal`, the file of a terminal that is its stderr.
    """
    limited = _limits(options.get("limits", ""))
    shared = limited is not None and os.environ.get("SWA_AVG_TESTS") != "processes"
    if shared and not options.keys() - {"env", "timeout", "limits", "terminal"}:
        environment, timeout = options.get("env") or os.environ, options.get("timeout", 300)
        terminal = options.get("terminal")
        return preloaded.run(
            folder, arguments, environment, timeout, limits=limited, stderr=terminal
        )
    command = [*COMMAND, *arguments]
    if limits := options.pop("limits", ""):
        command = ["/bin/sh", "-c", f'{limits} && exec "$@"', "sh", *command]
    if options.pop("without_privileges", False):
        command = [sys.executable, "-c", _AS_A_USER, *command]
    if terminal := options.pop("terminal", None):
        options |= {"capture_output": False, "stdout": subprocess.PIPE, "stderr": terminal}
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run(command, cwd=folder, **options)


def _limits(text: str) -> dict[str, tuple[int | None, int | None]] | None:
    """Return the soft and the hard limits of memory or open files that a shell sets.

    None is for what only a shell can do.
    """
    if not text:
        return {}
    found = re.fullmatch(r"ulimit -(S?)([vn]) (\d+)", text)
    if not found:
        return None
    name, unit = {"v": ("RLIMIT_AS", 1024), "n": ("RLIMIT_NOFILE", 1)}[found[2]]
    value = int(found[3]) * unit
    return {name: (value, None if found[1] else value)}


def snapshot(folder: Path) -> dict[str, object]:
    """Return all that is in a folder: bytes, modes, times, links."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file() and status.st_size < 10**8:
            content = path.read_bytes()
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_ino, content)
    return found


def one_line(ended: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """Return the one line with which a run failed."""
    lines = ended.stderr.splitlines()
    assert ended.returncode == code, (ended.returncode, ended.stderr)
    assert ended.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert lines[0].isprintable()
    return lines[0]


def fails(folder: Path, *arguments: str, code: int = 1, **options: Any) -> str:
    """Run a command that fails: one line, and the folder as it was. Return the line."""
    before = snapshot(folder)
    line = one_line(run(folder, *arguments, **options), code)
    assert snapshot(folder) == before
    return line


def refused(
    folder: Path, *arguments: str, says: str | Sequence[str], code: int = 1, **options: Any
) -> None:
    """Averaging is refused in one line; an output that is there stays, and so does all else."""
    if "-o" not in arguments:
        (folder / OUT).write_bytes(OLD)
        arguments = (*arguments, "-o", OUT, "--force")
    line = fails(folder, *arguments, code=code, **options)
    for part in [says] if isinstance(says, str) else says:
        assert part in line, line


def each_refused(
    folder: Path, cases: Mapping[str, str], *arguments: str, **options: Any
) -> dict[str, str]:
    """Each of these inputs by itself is refused, in a line that begins with its name.

    Args:
        folder: Where the inputs lie.
        cases: Of each input its name in the folder, and what its line says.
        arguments: Further arguments.
        options: How to run.

    Returns:
        The line of each.
    """
    (folder / OUT).write_bytes(OLD)
    before = snapshot(folder)

    def refusal(name: str) -> str:
        return one_line(run(folder, name, "-o", OUT, "--force", *arguments, **options))

    with ThreadPoolExecutor(2) as pool:
        lines = dict(zip(cases, pool.map(refusal, cases), strict=True))
    assert snapshot(folder) == before
    for name, says in cases.items():
        assert lines[name].startswith(f"error: {name}"), lines[name]
        assert says in lines[name], lines[name]
    return lines


@dataclass(frozen=True)
class Averaged:
    """What came of a run that averaged.

    Attributes:
        tensors: The output.
        notes: What was said about the inputs.
        stdout: What was printed.
    """

    tensors: dict[str, Any]
    notes: tuple[str, ...]
    stdout: str


def averaged(folder: Path, *arguments: str, out: str = OUT, **options: Any) -> Averaged:
    """The inputs are averaged: nothing but the output has come or changed. Return it."""
    before = snapshot(folder)
    ended = run(folder, *arguments, "-o", out, **options)
    assert ended.returncode == 0, (ended.returncode, ended.stderr)
    lines = ended.stderr.splitlines()
    assert all(line.startswith("note: ") and line.isprintable() for line in lines), lines
    after = snapshot(folder)
    path = folder / out
    assert after.pop(str(path)) != before.pop(str(path), None)
    assert after == before
    notes = tuple(line.removeprefix("note: ") for line in lines)
    return Averaged(load(path), notes, ended.stdout)


def load(path: Path) -> dict[str, Any]:
    """Load an output as its users would."""
    if path.suffix == ".safetensors":
        return load_file(path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found
