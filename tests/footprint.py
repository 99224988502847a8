"""The memory of a process and of those that it has forked, seen from outside.

What they share is counted once. What others have mapped too (the libraries) does not
count less for that, so that what else the machine does makes no difference.
"""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from pathlib import Path

_EVERY = 0.005  # seconds


def of(pid: int) -> int:
    """Return how many bytes a process and its children have in memory now.

    Of memory that belongs to no file each has its part; of files, which are the same
    for all, that counts which has the most of them in memory.

    What they share is parted anew when one comes or goes; then it is looked at again. One
    that has ended is there until its parent has noticed, but has given its memory back.
    """
    while True:
        family = _family(pid)
        own = sum(map(_own_part, family))
        files = max(map(_of_files, family))
        if _family(pid) == family:
            return own + files


def _family(pid: int) -> list[int]:
    """Return a process and its children, but for those that have no memory any more."""
    children: list[int] = []
    with suppress(OSError):  # it has just ended
        children = [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return [pid, *filter(_has_memory, children)]


def _has_memory(pid: int) -> bool:
    with suppress(OSError):
        return not Path(f"/proc/{pid}/statm").read_text().startswith("0 ")
    return False


def _own_part(pid: int) -> int:
    """Return the bytes of a process that are of no file, of shared ones its part."""
    return _sum(pid, "smaps_rollup", r"^Pss_(?:Anon|Shmem):\s+(\d+) kB")


def _of_files(pid: int) -> int:
    """Return the bytes of files that a process has in memory."""
    return _sum(pid, "status", r"^RssFile:\s+(\d+) kB")


def _sum(pid: int, table: str, line: str) -> int:
    """Return the sum of some lines of a table of a process; 0 where it has ended."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/{table}").read_text()
        return 1024 * sum(map(int, re.findall(line, text, re.MULTILINE)))
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
