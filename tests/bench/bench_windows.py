"""Windows along a run against reading the checkpoints once and writing as many outputs.

    python tests/bench/bench_windows.py [MB of each checkpoint ...] [--rounds N] [--folder PATH]

Both are processes of their own and take turns. Prints for each size the median seconds of both,
the median of their ratios, the bytes read, and the peak memory of the largest process.

    python tests/bench/bench_windows.py --arithmetic

Prints the processor's time for the means of all windows, and for the mean of each by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNT, LAST = 20, 8
_BLOCK = 8 * 1024 * 1024
# Waits for a command, and prints the peak memory of its largest process in KiB.
_MEASURED = """
import resource, subprocess, sys
ended = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(ended.returncode)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", nargs="*", type=int, default=[300])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder")
    parser.add_argument("--arithmetic", action="store_true")
    given = parser.parse_args()
    if given.arithmetic:
        for name in ("float32", "bfloat16", "float16"):
            arithmetic(name)
        return
    for size in given.sizes or [300]:
        with tempfile.TemporaryDirectory(dir=given.folder) as made:
            measure(Path(made), size, given.rounds)


def measure(folder: Path, size: int, rounds: int) -> None:
    import torch  # not in the process that only reads and writes

    paths = [folder / f"epoch_{n}.pt" for n in range(COUNT)]
    for path in paths:
        torch.save({f"w{k}": torch.randn(size * 250_000 // 8) for k in range(8)}, path)
    os.sync()
    each = ["-m", "swa_avg", *map(str, paths), "--last", str(LAST), "--each"]
    each += ["-o", f"{folder}/merged_{{epoch}}.pt", "--report", f"{folder}/report"]
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        windows, memory = timed([sys.executable, *each])
        plain, _ = timed([sys.executable, __file__, "--plain", str(folder)])
        times.append((windows, plain))
        report = json.loads((folder / "report").read_text())
        for path in (*folder.glob("merged_*"), *folder.glob("plain_*")):
            path.unlink()
        os.sync()
    whole = sum(path.stat().st_size for path in paths)
    ours, floor = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(
        f"{COUNT} checkpoints of {size} MB, {len(report['averages'])} windows of {LAST}: ", end=""
    )
    print(f"{ours:.2f} s; reading once and writing {floor:.2f} s; ratio {ratio:.2f} ", end="")
    print(f"({', '.join(f'{a / b:.2f}' for a, b in times)})")
    print(f"read {report['bytes_read'] / whole:.3f} of the inputs; peak {memory // 1024} MiB")


def arithmetic(name: str) -> None:
    """Print nanoseconds for each element of all windows together, the best of ten rounds."""
    import numpy as np
    import torch

    from swa_avg.kernel import default_arithmetic
    from swa_avg.kernel.compensated import Block, some
    from swa_avg.kernel.elements import carrier
    from swa_avg.kernel.exact import Averager
    from swa_avg.tensors import DTYPES

    dtype, size = DTYPES[name], 26_000
    values = torch.randn(COUNT, size).to(getattr(torch, name)).view(torch.uint8).numpy()
    rows = [Block(values.view(carrier(dtype)), dtype)]
    spans = [range(end - LAST, end) for end in range(LAST, COUNT + 1)]
    out = np.empty(size, carrier(dtype))
    averager = Averager()

    def together() -> None:
        for _ in averager.window_means(rows, spans, out, dtype):
            pass

    def apart() -> None:
        for span in spans:
            averager.mean_into(some(rows, span), out, dtype)

    with default_arithmetic():
        for what in (together, apart):
            best = float("inf")
            for _ in range(10):
                start = time.process_time_ns()
                for _ in range(10):
                    what()
                best = min(best, (time.process_time_ns() - start) / 10 / size)
            print(f"{name}: {what.__name__} {best:.0f} ns for each element")


def timed(command: list[str]) -> tuple[float, int]:
    """Return the seconds of a command, and its peak memory in KiB."""
    start = time.perf_counter()
    made = subprocess.run(
        [sys.executable, "-c", _MEASURED, *command], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - start, int(made.stdout)


def read_and_write(folder: Path) -> None:
    """Read the files once, and write one file to disk for each window."""
    paths = list(folder.glob("epoch_*.pt"))
    size = paths[0].stat().st_size
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                data = block
    data = data.ljust(_BLOCK)
    for n in range(COUNT - LAST + 1):
        with (folder / f"plain_{n}").open("wb", buffering=0) as file:
            for start in range(0, size, _BLOCK):
                file.write(data[: min(_BLOCK, size - start)])
            os.fsync(file.fileno())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        read_and_write(Path(sys.argv[2]))
    else:
        main()
