"""What the kernel's page cache is told: which ranges come next, and which are done with.

N files that are read in turn, a little of each, are slow from a cold disk unless
it knows what comes next. A thread of its own tells it, some tasks ahead: where the
disk is busy, telling it takes time. Inputs of more than half the memory would push
everybody else's files out of the cache; their ranges are given up as soon as they
are read, but for those that were in the cache before, which somebody may need.
Smaller inputs stay, so that a second run finds them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress

from swa_avg.kernel.tasks import Bundle, Item, Strip
from swa_avg.planning import Work
from swa_avg.storage import InputFile

_AT_ONCE = 1024 * 1024  # of a longer range Linux heeds the start only
_WASTE = 2  # times as much as is needed may lie between the ends of a bundle
_MORE_TASKS = 2  # than there are threads

Range = tuple[InputFile, int, int]


class LookAhead(AbstractContextManager["LookAhead"]):
    """Tells the kernel about the tasks to come, and those done.

    Args:
        tasks: All tasks, in the order in which they will be begun.
        works: What they refer to.
        threads: How many are done at once.
        total: How many bytes they read.
    """

    def __init__(
        self, tasks: Sequence[Sequence[Item]], works: Sequence[Work], threads: int, total: int
    ) -> None:
        self._tasks, self._works = tasks, works
        self._room = threading.Semaphore(threads + _MORE_TASKS)
        self._stop = threading.Event()
        self._gives_up = total > _memory() // 2
        self._cold: dict[int, list[Range]] = {}
        self._thread = threading.Thread(target=self._tell, name="swa-avg-ahead", daemon=True)

    def start(self) -> None:
        """Begin, in a thread of its own, which is ended with the context."""
        self._thread.start()

    def done(self, number: int) -> None:
        """Note that a task is done."""
        for file, offset, length in self._cold.pop(number, ()):
            file.will_not_read(offset, length)
        self._room.release()

    def _tell(self) -> None:
        with suppress(OSError):  # an interrupted run may close the files before it has stopped
            self._tell_all()

    def _tell_all(self) -> None:
        for number, task in enumerate(self._tasks):
            self._room.acquire()
            if self._stop.is_set():
                return
            cold = []
            for file, offset, length in _ranges(task, self._works):
                if self._gives_up and not file.is_cached(offset):
                    cold.append((file, offset, length))
                for start in range(offset, offset + length, _AT_ONCE):
                    if self._stop.is_set():
                        return
                    file.will_read(start, min(_AT_ONCE, offset + length - start))
            if cold:
                self._cold[number] = cold

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._room.release()
        if self._thread.is_alive():
            self._thread.join()


def _memory() -> int:
    """Return the bytes of memory of this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62


def _ranges(task: Sequence[Item], works: Sequence[Work]) -> Iterator[Range]:
    """Yield the ranges of files that a task reads; what is read in boxes is left to itself."""
    for item in task:
        if isinstance(item, Strip):
            for source in works[item.number].sources:
                size = source.dtype.itemsize
                place = source.record.offset + (source.offset + item.start) * size
                yield source.record.file, place, item.numel * size
        elif isinstance(item, Bundle):
            first, last = works[item.numbers[0]].sources, works[item.numbers[-1]].sources
            for one, other in zip(first, last, strict=True):
                size = one.dtype.itemsize
                place = one.record.offset + one.offset * size
                end = other.record.offset + other.offset * size + other.nbytes
                near = 0 < end - place <= _WASTE * item.bounds[-1] * size
                if near and one.record.file is other.record.file:
                    yield one.record.file, place, end - place
