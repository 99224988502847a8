"""A folder that four ranks wrote against one file of its size: time and memory, as ratios.

    python tests/bench/bench_dcp.py [--gb 0.1] [--ranks 4] [--checkpoints 4] [--rounds 5]

Whole commands on a warm cache, in turns: one torch file, the folder with `--keep-wrapper`, the
folder written as one rank writes it, and a folder of columns that goes into a torch file. A
ratio is the median over the rounds of ratios within one. Memory is looked at in one more run:
the peak of all processes together.
"""

from __future__ import annotations

import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
import footprint

WIDTH = 4096
ROWS = 1024  # of a rank's part of a tensor: 16 MB


def write(folder: Path, gb: float, ranks: int, seed: int) -> None:
    """Write a file, a folder shared by rows and one shared by columns, all of one size."""
    count = max(1, round(gb * 1e9 / (4 * WIDTH * ROWS)))
    torch.manual_seed(seed)
    names = [f"layers.{number}.weight" for number in range(count)]
    rows = ROWS * ranks
    torch.save({name: torch.randn(rows, WIDTH) for name in names}, folder / f"one_{seed}.pt")
    for kind, dim in (("rows", 0), ("columns", 1)):
        shape = [ROWS, WIDTH] if dim == 0 else [rows, WIDTH // ranks]
        starts = [
            [rank * shape[0], 0] if dim == 0 else [0, rank * shape[1]] for rank in range(ranks)
        ]
        write_ranks(folder / f"{kind}_{seed}", names, (rows, WIDTH), shape, starts)


def write_ranks(
    folder: Path,
    names: list[str],
    whole: tuple[int, int],
    shape: list[int],
    starts: list[list[int]],
) -> None:
    """Write a folder in the form in which `dcp.save` writes it, a file for each start."""
    folder.mkdir()
    chunks = [ChunkStorageMetadata(torch.Size(start), torch.Size(shape)) for start in starts]
    items: dict[Any, Any] = {}
    for rank, start in enumerate(starts):
        file = f"__{rank}_0.distcp"
        with (folder / file).open("wb") as stream:
            for name in names:
                before = stream.tell()
                torch.save(torch.randn(shape), stream)
                index = MetadataIndex(name, torch.Size(start), rank)
                items[index] = _StorageInfo(file, before, stream.tell() - before)
    properties = TensorProperties(dtype=torch.float32)
    described = {
        name: TensorStorageMetadata(properties, torch.Size(whole), chunks) for name in names
    }
    metadata = Metadata(described, {name: (name,) for name in names}, items)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def subjects(folder: Path) -> dict[str, list[str]]:
    """Return the command of each subject; the first is what the others are compared with."""
    command = [sys.executable, "-m", "swa_avg", "-f", "-q"]

    def of(kind: str, *options: str) -> list[str]:
        return [*command, *sorted(str(path) for path in folder.glob(f"{kind}_*")), *options]

    return {
        "one file, -o swa.pt": of("one", "-o", "swa.pt"),
        "rows, --keep-wrapper": of("rows", "-o", "kept_rows", "--keep-wrapper"),
        "columns, --keep-wrapper": of("columns", "-o", "kept_columns", "--keep-wrapper"),
        "rows, -o swa/": of("rows", "-o", "swa_rows"),
        "columns, -o swa/": of("columns", "-o", "swa_columns"),
    }


def seconds(folder: Path, command: list[str]) -> float:
    os.sync()
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - started


@click.command()
@click.option("--gb", default=0.1, show_default=True, help="What each rank writes.")
@click.option("--ranks", default=4, show_default=True)
@click.option("--checkpoints", default=4, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Of how many the median is taken.")
def main(gb: float, ranks: int, checkpoints: int, rounds: int) -> None:
    """Print a table of the subjects."""
    with tempfile.TemporaryDirectory(prefix="swa-avg-bench-") as name:
        folder = Path(name)
        for seed in range(checkpoints):
            write(folder, gb, ranks, seed)
        commands = subjects(folder)
        taken = [
            {one: seconds(folder, how) for one, how in commands.items()} for _ in range(rounds)
        ]
        size = next(folder.glob("one_*")).stat().st_size
        print(f"{checkpoints} x {size / 1e9:.2f} GB by {ranks} ranks; {os.cpu_count()} cores")
        print(f"{'':28}{'seconds':>9}{'x file':>9}{'MB peak':>9}")
        base = next(iter(commands))
        for one, how in commands.items():
            median = statistics.median(run[one] for run in taken)
            ratio = statistics.median(run[one] / run[base] for run in taken)
            with subprocess.Popen(how, cwd=folder, text=True, stdout=subprocess.DEVNULL) as process:
                peak = footprint.peak(process) / 1e6
            print(f"{one:28}{median:9.2f}{ratio:9.2f}{peak:9.0f}")


if __name__ == "__main__":
    main()
