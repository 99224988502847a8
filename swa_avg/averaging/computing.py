"""Computing planned works: the kernel runs while the inputs are read ahead.

Also the pause of garbage collection while headers are read.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from swa_avg.planning import Work, ranges_of
from swa_avg.storage import ROOM, InputFile, announce, is_remote, reading_ahead

if TYPE_CHECKING:
    from swa_avg.kernel import Kernel, Outcome

_MOST_CORES = 16


def computed(
    works: Sequence[Work],
    files: Iterable[InputFile],
    kernel: Callable[[], Kernel],
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Compute works and write them to the outputs of a kernel.

    Args:
        works: The works.
        files: The files of the inputs.
        kernel: Returns the kernel of these works.
        threads: The number of workers; by default one per usable core.
        progress: Called with the number of bytes read since the last call.

    Raises:
        SwaAvgError: An input is damaged, or its values have no mean.
    """
    with ThreadPoolExecutor(1, "swa-avg-ahead") as pool:
        # Importing numpy takes a tenth of a second: start reading ahead meanwhile.
        pool.submit(announce, ranges_of(works))
        from swa_avg.kernel import run

    threads = threads or usable_cores()
    ranges = ranges_of(works) if any(is_remote(file.path) for file in files) else ()
    inputs = max((len(work.sources) for work in works), default=0)
    with reading_ahead(ranges, threads, inputs, ROOM):
        return run(kernel(), threads, progress)


def usable_cores() -> int:
    """Return the number of cores this process may use, at most 16: more do not help a disk."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(_MOST_CORES, len(affinity(0)) if affinity else os.cpu_count() or 1)


@contextmanager
def no_garbage() -> Iterator[Callable[[], None]]:
    """Pause garbage collection while the headers are read, and exempt their objects later.

    The collector would scan these objects again and again, although none is garbage. In
    forked processes, scanning would also copy the shared memory pages.

    Yields:
        A function to call once all headers are read; it resumes the collection.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()

    def kept() -> None:
        gc.freeze()
        if enabled:
            gc.enable()

    gc.disable()
    try:
        yield kept
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()
