"""Averaging against the floor and against load-and-add: ratios of one run, side by side.

    python tests/bench/bench_average.py [--checkpoints 10] [--megabytes 400] [--dtype float32]

The floor is `cat` of all inputs and a copy of one. Every subject runs in a
process of its own; its time is without the start of Python and the import of
torch, its memory the peak of the process over that of `import torch`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

PRELUDE = """
import glob, os, re, shutil, sys, time, torch

def peak():  # not ru_maxrss, which a child inherits from its parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

files, base = sorted(glob.glob("epoch_*")), peak()
started = time.perf_counter()
"""
EPILOGUE = """
seconds = time.perf_counter() - started
print(seconds, peak() - base)
"""
SUBJECTS = {
    "floor: cat all, cp one": """
os.system("cat epoch_* > /dev/null")
shutil.copy(files[0], "out_floor")
""",
    "swa-avg": """
from swa_avg.averaging import average
average(files, "out_ours.pt", force=True)
""",
    "torch.load, add in float64": """
total = {}
for file in files:
    for name, value in torch.load(file).items():
        total[name] = total[name] + value.double() if name in total else value.double()
made = {name: (value / len(files)).to(torch.DTYPE) for name, value in total.items()}
torch.save(made, "out_load")
""",
    "torch.load(mmap=True), add per tensor": """
states = [torch.load(file, mmap=True) for file in files]
made = {}
for name in states[0]:
    total = states[0][name].double()
    for state in states[1:]:
        total += state[name]
    made[name] = (total / len(files)).to(torch.DTYPE)
torch.save(made, "out_mmap")
""",
}


def write_checkpoints(folder: Path, count: int, megabytes: int, dtype: str) -> None:
    import torch

    element = getattr(torch, dtype)
    layers = max(1, megabytes * 10**6 // (2048 * 2048 * element.itemsize))
    for epoch in range(count):
        generator = torch.Generator().manual_seed(epoch)
        state = {
            f"layer{number}.weight": torch.randn(2048, 2048, generator=generator).to(element)
            for number in range(layers)
        }
        torch.save(state, folder / f"epoch_{epoch}.pt")


def measured(code: str, folder: Path, dtype: str) -> tuple[float, float]:
    source = PRELUDE + code.replace("DTYPE", dtype) + EPILOGUE
    ended = subprocess.run(
        [sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, check=True
    )
    seconds, megabytes = map(float, ended.stdout.split())
    return seconds, megabytes


@click.command()
@click.option("--checkpoints", default=10)
@click.option("--megabytes", default=400)
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--rounds", default=5)
def main(checkpoints: int, megabytes: int, dtype: str, rounds: int) -> None:
    """Print a row for each subject, medians of so many rounds."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        write_checkpoints(folder, checkpoints, megabytes, dtype)
        size = sum(path.stat().st_size for path in folder.glob("epoch_*"))
        rows: dict[str, list[tuple[float, float]]] = {subject: [] for subject in SUBJECTS}
        for _ in range(rounds):  # in turn, so that what else goes on meets all of them
            for subject, code in SUBJECTS.items():
                rows[subject].append(measured(code, folder, dtype))
    medians = {subject: statistics.median(t for t, _ in row) for subject, row in rows.items()}
    floor = medians["floor: cat all, cp one"]
    print(f"{checkpoints} x {megabytes} MB {dtype}, {os.cpu_count()} cores, warm cache")
    print(f"{'':40}{'seconds':>9}{'GB/s':>7}{'x floor':>9}{'MB over torch':>15}")
    for subject, row in rows.items():
        memory = max(megabytes for _, megabytes in row)
        seconds = medians[subject]
        rate = size / seconds / 1e9
        print(f"{subject:40}{seconds:9.2f}{rate:7.2f}{seconds / floor:9.2f}{memory:15.0f}")


if __name__ == "__main__":
    main()
