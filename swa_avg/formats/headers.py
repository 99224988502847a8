"""What was read in the headers of some files, and need not be read again in others.

Checkpoints of one run have mostly the same headers, often to the byte. What is
kept here is told by its bytes, all of them, and has no file in it: of two files
with equal headers it is equally true. One object serves one run, and is dropped
when its files are open.
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
    """Headers that were read before.

    Attributes:
        forms: Directories of zip archives.
    """

    def __init__(self) -> None:
        self.forms: dict[int, Form] = {}
        self._read: dict[tuple[Callable[[bytes, Budget], Any], bytes], Any] = {}
        self._kept = 0
        self._lock = threading.Lock()

    def once(self, read: Callable[[bytes, Budget], _T], data: bytes, budget: Budget) -> _T:
        """Return `read(data, budget)`, which depends on the bytes only.

        Of equal bytes it is the same object, and then nothing is drawn on the budget.
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
