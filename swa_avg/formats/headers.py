"""A cache of parsed headers.

The headers of checkpoints of one run are mostly the same, often to the byte. The cache is
keyed by all bytes of a header, and its values do not refer to a file, so they are valid for
every file with an equal header. One object serves one run, and is dropped when the files of
the run are open.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from swa_avg.formats.zip_directory import Form
from swa_avg.pickles import Budget

_T = TypeVar("_T")
_MOST_BYTES = 16 << 20


class Headers:
    """A cache of headers that were parsed before.

    Attributes:
        forms: Parsed directories of zip archives, by size.
    """

    def __init__(self) -> None:
        self.forms: dict[int, Form] = {}
        self._read: dict[tuple[Callable[[bytes, Budget], Any], bytes], Any] = {}
        self._kept = 0
        self._lock = threading.Lock()

    def once(self, read: Callable[[bytes, Budget], _T], data: bytes, budget: Budget) -> _T:
        """Return `read(data, budget)`, which depends only on the bytes.

        For equal bytes the result is the same object and the budget is not charged again.
        """
        if (read, data) in self._read:
            made: _T = self._read[read, data]
            return made
        made = read(data, budget)
        with self._lock:
            self._read[read, data] = made
            self._kept += len(data)
            while self._kept > _MOST_BYTES and len(self._read) > 1:
                oldest = next(iter(self._read))
                del self._read[oldest]
                self._kept -= len(oldest[1])
        return made
