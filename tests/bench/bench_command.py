"""Whole commands, from the start of Python to the last fsync, against what is measured beside them.

    python tests/bench/bench_command.py [CASE]... [--rounds 5] [--scale 1.0]

Ten checkpoints of one kind, the cache warm. Subjects take turns within a round; a ratio is the
median over the rounds of ratios within one. The floor is `cat` of all, `cp` of one and `sync`
of the copy. Memory is looked at in one more run: the peak of all processes together.
Modules are compiled beforehand, as an installation does.
"""

from __future__ import annotations

import compileall
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import footprint
from bench_startup import resnet18

import swa_avg

COUNT = 10
TENSORS = 40
ELEMENTS = 2_000_000  # of each: 0.32 GB of float32
LOAD_AND_ADD = """
import glob, torch
from safetensors.torch import load_file, save_file
load = load_file if SAFE else torch.load
total, files = {}, sorted(glob.glob("epoch_*"))
for file in files:
    for name, value in load(file).items():
        total[name] = total[name] + value.double() if name in total else value.double()
made = {name: (value / len(files)).to(torch.DTYPE) for name, value in total.items()}
save_file(made, "out_script") if SAFE else torch.save(made, "out_script")
"""
CASES = ("resnet18", "float32", "bfloat16", "float16")


def write(folder: Path, name: str, scale: float) -> None:
    """Write checkpoints of one run, each a small step from the one before."""
    if name == "resnet18":
        for epoch in range(COUNT):
            torch.save(dict(resnet18()), folder / f"epoch_{epoch}.pt")
        return
    weights = [0.02 * torch.randn(int(ELEMENTS * scale)) for _ in range(TENSORS)]
    for epoch in range(COUNT):
        for row in weights:
            row.add_(torch.randn(row.numel()), alpha=0.0004)
        state = {f"l{n}": row.to(getattr(torch, name)) for n, row in enumerate(weights)}
        if name == "float32":
            torch.save(state, folder / f"epoch_{epoch}.pt")
        else:
            save_file(state, folder / f"epoch_{epoch}.safetensors")


def subjects(folder: Path, name: str) -> dict[str, list[str]]:
    """Return the command of each subject; the first is the floor."""
    files = sorted(path.name for path in folder.glob("epoch_*"))
    safe = files[0].endswith("safetensors")
    copy = f"cat epoch_* > /dev/null; cp {files[0]} out_copy; sync out_copy"
    out = "out.safetensors" if safe else "out.pt"
    dtype = "float32" if name == "resnet18" else name
    script = f"SAFE = {safe}\n" + LOAD_AND_ADD.replace("DTYPE", dtype)
    return {
        "cat; cp; sync": ["sh", "-c", copy],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "swa-avg": [sys.executable, "-m", "swa_avg", *files, "-o", out, "-f", "-q"],
        "load, add in float64": [sys.executable, "-c", script],
    }


def seconds(folder: Path, command: list[str]) -> float:
    os.sync()
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - started


def measure(folder: Path, name: str, rounds: int) -> None:
    commands = subjects(folder, name)
    taken = [{one: seconds(folder, how) for one, how in commands.items()} for _ in range(rounds)]
    size = sum(path.stat().st_size for path in folder.glob("epoch_*"))
    print(f"\n{name}: {COUNT} x {size / COUNT / 1e6:.0f} MB; {os.cpu_count()} cores")
    print(f"{'':28}{'seconds':>9}{'x floor':>9}{'x import':>10}{'MB peak':>9}")
    base, torch_only, *_ = commands
    for one, how in commands.items():
        ratio: Callable[[str], float] = lambda other, one=one: statistics.median(  # noqa: E731
            run[one] / run[other] for run in taken
        )
        with subprocess.Popen(how, cwd=folder, text=True, stdout=subprocess.DEVNULL) as process:
            peak = footprint.peak(process) / 1e6
        median = statistics.median(run[one] for run in taken)
        print(f"{one:28}{median:9.2f}{ratio(base):9.2f}{ratio(torch_only):10.2f}{peak:9.0f}")


@click.command()
@click.argument("names", nargs=-1, metavar="[CASE]...", type=click.Choice(CASES))
@click.option("--rounds", default=5, help="Of how many the median is taken.")
@click.option("--scale", default=1.0, help="How large the tensors are, of their usual size.")
def main(names: tuple[str, ...], rounds: int, scale: float) -> None:
    """Print a table for each CASE; without one, for all."""
    compileall.compile_dir(Path(swa_avg.__file__).parent, quiet=1)
    for name in names or CASES:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as made:
            write(Path(made), name, scale)
            measure(Path(made), name, rounds)


if __name__ == "__main__":
    main()
