"""Windows along a run against reading the checkpoints once and writing as many outputs.

    python tests/bench/bench_windows.py [MB of each checkpoint] [folder]

Prints the seconds of both, their ratio, the bytes read, and the peak memory.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

import swa_avg

COUNT, LAST = 20, 8
_BLOCK = 8 * 1024 * 1024


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    place = sys.argv[2] if len(sys.argv) > 2 else None
    with tempfile.TemporaryDirectory(dir=place) as made:
        folder = Path(made)
        paths = [folder / f"epoch_{n}.pt" for n in range(COUNT)]
        for path in paths:
            torch.save({f"w{k}": torch.randn(size * 250_000 // 8) for k in range(8)}, path)
        best = [float("inf")] * 2
        for _ in range(3):
            start = time.perf_counter()
            report = swa_avg.windows(paths, f"{folder}/merged_{{epoch}}.pt", LAST, force=True)
            best[0] = min(best[0], time.perf_counter() - start)
            start = time.perf_counter()
            read_and_write(paths, folder)
            best[1] = min(best[1], time.perf_counter() - start)
        given = sum(path.stat().st_size for path in paths)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"{COUNT} checkpoints of {size} MB, {len(report.averages)} windows of {LAST}")
    print(f"windows {best[0]:.2f} s, reading once and writing {best[1]:.2f} s: "
          f"{best[0] / best[1]:.2f}")  # fmt: skip
    print(f"read {report.bytes_read / given:.3f} of the inputs; workers {memory // 1024} MiB")


def read_and_write(paths: list[Path], folder: Path) -> None:
    """Read the files once, and write one file to disk for each window."""
    size = paths[0].stat().st_size
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                data = block
    for n in range(COUNT - LAST + 1):
        with (folder / f"plain_{n}").open("wb", buffering=0) as file:
            for start in range(0, size, _BLOCK):
                file.write(data[:1] * min(_BLOCK, size - start))
            os.fsync(file.fileno())


if __name__ == "__main__":
    main()
