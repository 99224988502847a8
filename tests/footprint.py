"""The memory of a process and of those that it has forked, seen from outside.

What several share is counted once: the kernel tells each one's part of it (Pss).
"""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from pathlib import Path

_EVERY = 0.005  # seconds


def of(pid: int) -> int:
    """Return how many bytes a process and its children have in memory now."""
    total = 0
    with suppress(OSError):  # it has just ended
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        total += 1024 * int(found[1]) if found else 0
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        total += sum(map(of, map(int, children)))
    return total


def peak(process: subprocess.Popen[str]) -> int:
    """Return the most that a process and its children have until it ends, seen every 5 ms."""
    most = 0
    while True:
        most = max(most, of(process.pid))
        try:
            process.wait(_EVERY)
            return most
        except subprocess.TimeoutExpired:
            continue
