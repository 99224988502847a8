"""Early write-back: the kernel starts to write a file to disk while it is still growing.

Without it the disk is idle while the average is computed, and the final sync has to
write the whole output. It only saves time: the final sync happens in any case.
`wait` waits for the write-back range by range, so that its progress can be shown.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_EVERY = 32 * 1024 * 1024
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: start the write-back and do not wait
_WAIT = 7  # also wait for what is being written before and after


class WriteBack:
    """Counts the bytes written to a file, and starts its write-back every 32 MiB."""

    def __init__(self, fd: int) -> None:
        self._fd, self._waiting = fd, 0

    def wrote(self, count: int) -> None:
        """Count written bytes; the count is approximate when several threads call it."""
        self._waiting += count
        if self._waiting >= _EVERY:
            self._waiting = 0
            begin = _sync_file_range()
            if begin is not None:
                begin(self._fd, 0, 0, _WRITE)


def wait(path: Path, count: Callable[[int], object]) -> None:
    """Wait until a file is written back; the sync that follows is then short.

    Args:
        path: The file.
        count: Called with the number of bytes of each range.
    """
    function = _sync_file_range()
    # An error is reported once for each open file: a second one leaves it to the sync.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        for start in range(0, size, _EVERY):
            length = min(_EVERY, size - start)
            if function is not None:
                function(descriptor, start, length, _WAIT)
            count(length)
    finally:
        os.close(descriptor)


@cache
def _sync_file_range() -> Any:
    """Return the C library's `sync_file_range`, or None on systems other than Linux."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function
