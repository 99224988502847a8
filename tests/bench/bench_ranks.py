"""Several ranks on this machine against as many threads of one process: ratios, side by side.

    python tests/bench/bench_ranks.py [--ranks 2] [--rounds 5] [--checkpoints 10] [--mb 400]

Each subject runs in processes of its own, in turn. Its time is from the opening of the
checkpoints, when the ranks have met, to the commit; the start of Python and its imports
are not in it. The bytes of both outputs are compared. What is shown is the median of
the ratios of the rounds.
"""

from __future__ import annotations

import filecmp
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

SAVE = """
import sys, torch
for number in range(int(sys.argv[1])):
    torch.manual_seed(number)
    sizes = [1 << 22] * (int(sys.argv[2]) // 16) + [1000] * 100
    torch.save({str(n): torch.randn(size) for n, size in enumerate(sizes)}, f"epoch_{number}.pt")
"""
ALONE = """
import json, os, sys, time
import swa_avg.kernel.mean
from swa_avg import average

started = time.perf_counter()
report = average("epoch_*.pt", "alone.pt", threads=int(sys.argv[1]), force=True)
print(json.dumps([time.perf_counter() - started, report.bytes_read, report.bytes_written]))
"""
TOGETHER = """
import json, time
from swa_avg.averaging import joint, planned
from swa_avg.averaging.torchrun import ranks
from swa_avg.planning import Options

with ranks() as group:
    group.meet()
    started = time.perf_counter()
    with (
        planned("epoch_*.pt", "together.pt", Options(force=True)) as averaging,
        joint.written(averaging, group, threads=1) as made,
    ):
        if made:
            made[0].commit()
            report = made[1]
            seconds = time.perf_counter() - started
            print(json.dumps([seconds, report.bytes_read, report.bytes_written]))
        group.meet()
"""


@click.command()
@click.option("--ranks", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--checkpoints", default=10, show_default=True)
@click.option("--mb", default=400, show_default=True, help="Of each checkpoint.")
def main(ranks: int, rounds: int, checkpoints: int, mb: int) -> None:
    """Compare ranks with threads."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory(prefix="swa-avg-bench-") as name:
        folder = Path(name)
        _run(folder, ["-c", SAVE, str(checkpoints), str(mb)])
        (folder / "together.py").write_text(TOGETHER)
        commands = [["-c", ALONE, str(ranks)], [*several, "together.py"]]
        times: list[list[float]] = []
        for number in range(rounds):
            # In turn: what else goes on, or is still being written, meets both.
            results = {at: _run(folder, commands[at]) for at in ((0, 1), (1, 0))[number % 2]}
            (alone, *traffic), (together, *same) = (json.loads(results[at]) for at in (0, 1))
            assert traffic == same
            assert filecmp.cmp(folder / "alone.pt", folder / "together.pt", shallow=False)
            click.echo(f"{ranks} threads {alone:.2f} s, {ranks} ranks {together:.2f} s")
            times.append([alone, together])
        alone, together = map(statistics.median, zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        read, written = (count / 1e9 for count in traffic)
        click.echo(f"identical bytes; {read:.2f} GB read, {written:.2f} GB written")
        click.echo(f"medians {alone:.2f} s and {together:.2f} s; ranks : threads {ratio:.2f}")


def _run(folder: Path, arguments: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    ended = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return ended.stdout


if __name__ == "__main__":
    main()
