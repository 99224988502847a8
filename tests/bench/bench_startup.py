"""What there is before the first tensor is read: start-up, headers, the plan.

    python tests/bench/bench_startup.py [--rounds 5]

Three tables, medians of so many rounds, subjects in turn within each round:
the whole command on ten ResNet-18-sized checkpoints against `import torch`;
headers and plan of 100 checkpoints of 2,000 small tensors, with equal headers
and with an epoch number that differs in each; one checkpoint of more and more
tensors. The latter two without the start of Python and all imports.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from torch import Tensor

PLAN = """
import sys, time
from swa_avg.averaging import planned

started = time.perf_counter()
with planned(sys.argv[2:], sys.argv[1]) as averaging:
    print(time.perf_counter() - started)
"""
MANY = (12_500, 25_000, 50_000, 100_000)


def resnet18() -> Iterator[tuple[str, Tensor]]:
    """The state_dict of a ResNet-18 by its shapes: 62 parameters, 60 BatchNorm buffers."""

    def batchnorm(name: str, width: int) -> Iterator[tuple[str, Tensor]]:
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{part}", torch.rand(width)
        yield f"{name}.num_batches_tracked", torch.tensor(1000)

    yield "conv1.weight", torch.randn(64, 3, 7, 7)
    yield from batchnorm("bn1", 64)
    before = 64
    for layer, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"layer{layer}.{block}"
            yield f"{name}.conv1.weight", torch.randn(width, before, 3, 3)
            yield from batchnorm(f"{name}.bn1", width)
            yield f"{name}.conv2.weight", torch.randn(width, width, 3, 3)
            yield from batchnorm(f"{name}.bn2", width)
            if before != width:
                yield f"{name}.downsample.0.weight", torch.randn(width, before, 1, 1)
                yield from batchnorm(f"{name}.downsample.1", width)
            before = width
    yield from (("fc.weight", torch.randn(1000, 512)), ("fc.bias", torch.randn(1000)))


def small(tensors: int, numel: int) -> dict[str, Tensor]:
    return {f"block{n // 10}.layer{n % 10}.weight": torch.randn(numel) for n in range(tensors)}


def seconds(*command: str | Path) -> float:
    """Return how long a command takes as a whole."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def planning(folder: Path) -> float:
    """Return how long headers and plan of a folder's checkpoints take."""
    paths = sorted(folder.glob("*.pt"))
    command = (sys.executable, "-c", PLAN, folder / "out.pt", *paths)
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def medians(rounds: int, subjects: dict[str, Callable[[], float]]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, measured in subjects.items():
            taken[name].append(measured())
    return {name: statistics.median(times) for name, times in taken.items()}


def show(title: str, found: dict[str, float], base: str) -> None:
    print(f"{title:50}{'seconds':>9}{'ratio':>8}")
    for name, value in found.items():
        print(f"  {name:48}{value:9.3f}{value / found[base]:8.2f}")


def start_up(folder: Path, rounds: int) -> None:
    for epoch in range(10):
        torch.save(dict(resnet18()), folder / f"epoch_{epoch}.pt")
    command = (sys.executable, "-m", "swa_avg", *sorted(folder.glob("*.pt")))
    subjects = {
        "python -c 'import torch'": lambda: seconds(sys.executable, "-c", "import torch"),
        "swa-avg, 10 x ResNet-18": lambda: seconds(*command, "-o", folder / "out", "-f"),
        "swa-avg --help": lambda: seconds(sys.executable, "-m", "swa_avg", "--help"),
    }
    show("whole commands, warm cache", medians(rounds, subjects), "python -c 'import torch'")


def many_files(folder: Path, rounds: int) -> None:
    for name in ("equal", "epochs"):
        (folder / name).mkdir()
    for epoch in range(100):
        state = small(2000, 2500)
        torch.save(state, folder / "equal" / f"epoch_{epoch:02}.pt")
        torch.save({"epoch": epoch, "model": state}, folder / "epochs" / f"epoch_{epoch:02}.pt")
    subjects = {
        "equal headers": lambda: planning(folder / "equal"),
        "an epoch number in each": lambda: planning(folder / "epochs"),
    }
    show("headers and plan, 100 x 2,000 tensors", medians(rounds, subjects), "equal headers")


def many_tensors(folder: Path, rounds: int) -> None:
    for count in MANY:
        (folder / str(count)).mkdir()
        torch.save(small(count, 4), folder / str(count) / "in.pt")
    subjects: dict[str, Callable[[], float]] = {
        f"{count:,}": lambda count=count: planning(folder / str(count)) for count in MANY
    }
    show("headers and plan, one file of so many tensors", medians(rounds, subjects), f"{MANY[0]:,}")


@click.command()
@click.option("--rounds", default=5)
def main(rounds: int) -> None:
    """Print the tables."""
    for measure in (start_up, many_files, many_tensors):
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            measure(Path(folder), rounds)


if __name__ == "__main__":
    main()
