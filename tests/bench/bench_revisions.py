"""Whole commands by this revision and by an earlier one, in turns.

    python tests/bench/bench_revisions.py [REVISION] [--rounds 5]

REVISION is the last one that averaged with torch (925cb35) by default. Its files are taken from
git into a temporary folder. The inputs are ten ResNet-18-sized checkpoints, ten of 0.32 GB and,
for what runs a model, those of the built-in demo. Averaging alone needs no torch now, and the
other commands need it anyway. A ratio is the median over the rounds of ratios within one.
"""

from __future__ import annotations

import compileall
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from bench_command import write

sys.path.insert(0, str(Path(__file__).parents[1]))
from revisions import ROOT, package_of

RECOMPUTE = ("--recompute-bn", "--data", "swa_avg.demo:loader")
SWEEP = ("--sweep", "swa_avg.demo:evaluate")
SWA_AVG = (sys.executable, "-m", "swa_avg")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "swa_avg")  # fmt: skip
DEMO, LARGE, HUGE = "ckpts/epoch_*.pt", "resnet18/epoch_*.pt", "float32/epoch_*.pt"
CASES = {
    "average 10 x 47 MB": (*SWA_AVG, LARGE),
    "average 10 x 320 MB": (*SWA_AVG, HUGE),
    "average and --recompute-bn": (*SWA_AVG, DEMO, *RECOMPUTE),
    "--sweep with --recompute-bn": (*SWA_AVG, DEMO, *RECOMPUTE, *SWEEP),
    "torchrun, two ranks": (*TORCHRUN, LARGE),
    "torchrun with --recompute-bn": (*TORCHRUN, DEMO, *RECOMPUTE),
}


def prepare(folder: Path, revision: str) -> dict[str, Path]:
    """Write the inputs; return where the package of each revision is."""
    trees = {"this": ROOT, revision: package_of(revision, folder / "before")}
    for tree in trees.values():
        compileall.compile_dir(tree / "swa_avg", quiet=2)
    run((sys.executable, "-m", "swa_avg.demo", "run"), folder, ROOT)
    for name in ("resnet18", "float32"):
        (folder / "run" / name).mkdir()
        write(folder / "run" / name, name, scale=1)
    return trees


def run(command: tuple[str, ...], folder: Path, tree: Path) -> float:
    """Run a command with one revision of the package; return the seconds."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    os.sync()
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


@click.command()
@click.argument("revision", default="925cb35")
@click.option("--rounds", default=5, help="Of how many the median is taken.")
def main(revision: str, rounds: int) -> None:
    """Print a table: the seconds of both revisions, and their ratio."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        trees = prepare(folder, revision)
        print(f"{'':30}{'this':>8}{revision:>10}{'ratio':>8}   {os.cpu_count()} cores")
        for name, command in CASES.items():
            whole = (*command, "-o", "out.pt", "-f", "-q")
            taken = [
                {which: run(whole, folder / "run", tree) for which, tree in trees.items()}
                for _ in range(rounds)
            ]
            now, then = ([times[which] for times in taken] for which in trees)
            ratio = statistics.median(a / b for a, b in zip(now, then, strict=True))
            middle = [statistics.median(times) for times in (now, then)]
            print(f"{name:30}{middle[0]:8.2f}{middle[1]:10.2f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
