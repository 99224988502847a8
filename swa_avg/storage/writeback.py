"""Telling the kernel to begin to write a file to disk, so that forcing it there takes no time.

Without it the disk is idle while the average is computed, and at the end the
whole output is waited for. Nothing depends on it: what is written is forced to
disk in the end all the same.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_EVERY = 32 * 1024 * 1024
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, wait for nothing


class WriteBack:
    """Counts what is written to a file, and has it on its way to the disk every 32 MiB."""

    def __init__(self, fd: int) -> None:
        self._fd, self._waiting = fd, 0

    def wrote(self, count: int) -> None:
        """Note that so many bytes were written; threads may, each losing a few of them."""
        self._waiting += count
        if self._waiting >= _EVERY:
            self._waiting = 0
            begin = _sync_file_range()
            if begin is not None:
                begin(self._fd, 0, 0, _WRITE)


@cache
def _sync_file_range() -> Any:
    """Return the C library's function, which Linux has; None elsewhere."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function
