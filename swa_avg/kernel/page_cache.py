"""Advice for the operating system's page cache: the ranges read next, and those not needed again.

Reading a little of each of N files in turn is slow on a cold disk without read-ahead. A
separate thread requests the ranges some tasks early, because these calls block while the
disk is busy. Inputs larger than half the memory would evict all other files from the
cache, so their ranges are dropped after they are read, except for ranges that were cached
before. Smaller inputs stay in the cache for a second run.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress

from swa_avg.kernel.tasks import Bundle, Item, Stretch, Strip
from swa_avg.planning import Work
from swa_avg.storage import InputFile
from swa_avg.tensors import Part, whole

_AT_ONCE = 1024 * 1024  # Linux reads only the start of a longer range
_WASTE = 2  # a bundle may span this many times the bytes that it needs
_MORE_TASKS = 2  # tasks requested early, in addition to one for each thread

Range = tuple[InputFile, int, int]


class LookAhead(AbstractContextManager["LookAhead"]):
    """Advises the page cache on the tasks that come next, and on those that are done.

    Args:
        tasks: All tasks, in the order in which they start.
        works: The works of the tasks.
        threads: How many tasks run at once.
        total: How many bytes the tasks read.
    """

    def __init__(
        self, tasks: Sequence[Sequence[Item]], works: Sequence[Work], threads: int, total: int
    ) -> None:
        self._tasks, self._works = tasks, works
        self._room = threading.Semaphore(threads + _MORE_TASKS)
        self._stop = threading.Event()
        self._drops = total > _memory() // 2
        self._cold: dict[int, list[Range]] = {}
        self._thread = threading.Thread(target=self._advise, name="swa-avg-ahead", daemon=True)

    def start(self) -> None:
        """Start the thread, which stops at the end of the context."""
        self._thread.start()

    def done(self, number: int) -> None:
        """Drop the ranges of a finished task, if the inputs are too large for the cache."""
        for file, offset, length in self._cold.pop(number, ()):
            file.will_not_read(offset, length)
        self._room.release()

    def _advise(self) -> None:
        with suppress(OSError):  # an interrupted run may close the files before the thread stops
            self._advise_all()

    def _advise_all(self) -> None:
        for number, task in enumerate(self._tasks):
            self._room.acquire()
            if self._stop.is_set():
                return
            cold = []
            for file, offset, length in _ranges(task, self._works):
                # The first page may belong to the range before as well.
                if self._drops and not file.is_cached(offset + length // 2):
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
    """Return the size of this machine's memory in bytes."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62


def _ranges(task: Sequence[Item], works: Sequence[Work]) -> Iterator[Range]:
    """Yield the ranges of files that a task reads, except those of tensors in another order."""
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
        else:
            yield from _of_boxes(item, works[item.number])


def _of_boxes(item: Stretch, work: Work) -> Iterator[Range]:
    """Yield the ranges of boxes: in each stored part, the rows from the first to the last box."""
    first, last = item.boxes[0], item.boxes[-1]
    if not first.shape:
        return
    top, bottom = first.start[0], last.start[0] + last.shape[0]
    for source in work.sources:
        flat = len(first.shape) != len(source.shape)  # cut as if it had one dimension
        parts = source.parts or (Part((0,) * len(first.shape), source),)
        for part in parts:
            ref = part.ref
            if not whole(ref):
                continue
            step = 1 if flat else math.prod(ref.shape[1:])
            start = max(top - part.start[0], 0) * step
            end = min((bottom - part.start[0]) * step, ref.numel)
            if start < end:
                size = ref.dtype.itemsize
                place = ref.record.offset + (ref.offset + start) * size
                yield ref.record.file, place, (end - start) * size
