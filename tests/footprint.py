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
    """Return how many bytes a process and its children have in memory now.

    What they share is parted anew when one comes or goes; then it is looked at again.
    """
    while True:
        family = _family(pid)
        total = sum(map(_part_of, family))
        if _family(pid) == family:
            return total


def _family(pid: int) -> list[int]:
    """Return a process and its children."""
    with suppress(OSError):  # it has just ended
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]
    return [pid]


def _part_of(pid: int) -> int:
    """Return the bytes of a process, of shared ones its part."""
    with suppress(OSError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        return 1024 * int(found[1]) if found else 0
    return 0


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
