"""The processor's floating-point environment, set to C's default while the kernel computes.

Flush-to-zero, the rounding mode and numpy's error handling are settings of a thread. A
user's module may have changed them; the results of the kernel do not depend on that.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import numpy as np

_ROOM = 256  # bytes: no processor's fenv_t has more


@contextmanager
def default_arithmetic() -> Iterator[None]:
    """Use the default environment of IEEE 754 in this thread, until the end of the context."""
    environment = _environment()
    before = environment.exchange() if environment else None
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        if environment:
            environment.restore(before)


class _Environment:
    """The functions of C's <fenv.h> that get and set the environment."""

    def __init__(self) -> None:
        library = ctypes.PyDLL(None)
        self._get, self._set = library.fegetenv, library.fesetenv
        # FE_DFL_ENV: the address -1 in glibc and musl, a variable on macOS.
        self._default: Any = ctypes.c_void_p(-1)
        if sys.platform == "darwin":
            self._default = ctypes.byref((ctypes.c_char * _ROOM).in_dll(library, "_FE_DFL_ENV"))

    def exchange(self) -> Any:
        """Set the default environment; return the previous one."""
        before = ctypes.create_string_buffer(_ROOM)
        self._get(before)
        self._set(self._default)
        return before

    def restore(self, before: Any) -> None:
        """Set an environment that `exchange` returned."""
        self._set(before)


@cache
def _environment() -> _Environment | None:
    try:
        return _Environment()
    except (OSError, AttributeError, TypeError, ValueError):
        return None  # no such library, for example on Windows


class RoundingDetector:
    """The processor's FE_INEXACT flag of this thread: some operation had to round.

    It is defined in the C standard's <fenv.h>, and stays set until it is cleared.
    """

    _INEXACT: ClassVar = {
        "x86_64": 0x20,
        "AMD64": 0x20,
        "i686": 0x20,
        "aarch64": 0x10,
        "arm64": 0x10,
    }

    def __init__(self) -> None:
        self._mask = self._INEXACT[os.uname().machine]
        library = ctypes.PyDLL(None)  # PyDLL keeps the GIL: the call is too short to release it
        self._clear = library.feclearexcept
        self._test = library.fetestexcept

    def clear(self) -> None:
        """Clear the flag."""
        self._clear(self._mask)

    def raised(self) -> bool:
        """Return whether any operation has rounded since `clear`."""
        return bool(self._test(self._mask))


class AlwaysRounded(RoundingDetector):
    """A detector for machines without the flag: every addition counts as rounded."""

    def __init__(self) -> None:
        pass

    def clear(self) -> None:
        """Do nothing."""

    def raised(self) -> bool:
        """Return True."""
        return True


class Attempts:
    """Decides whether a faster way is tried, after it has failed for similar numbers.

    After a failure the next attempts would probably fail too. So some are skipped, and more of
    them after each further failure.
    """

    _MOST_SKIPPED: ClassVar = 64

    def __init__(self) -> None:
        self._skipped = self._to_skip = 0

    def is_due(self) -> bool:
        """Return whether to try now."""
        if self._skipped < self._to_skip:
            self._skipped += 1
            return False
        self._skipped = 0
        return True

    def ended(self, *, well: bool) -> None:
        """Record how an attempt ended."""
        self._to_skip = 0 if well else min(self._MOST_SKIPPED, 2 * self._to_skip + 1)


@cache
def rounding_detector() -> RoundingDetector:
    """Return a detector that has been tested on the operations that the kernel uses.

    It must detect a single rounding in the last element, and report none if there is none.
    """
    try:
        detector = RoundingDetector()
    except (KeyError, OSError, AttributeError, TypeError):
        return AlwaysRounded()
    kinds = (("f4", "f4", 2.0**-30), ("f4", "f8", 2.0**-60), ("f8", "f8", 2.0**-60))
    for dtype, wider, little in kinds:
        rows = np.ones((3, 10_000), dtype)  # more than numpy converts in one piece
        out = np.empty(rows.shape[1], wider)
        for last, rounds in ((1.0, False), (little, True)):
            rows[-1, -1] = last
            detector.clear()
            np.add.reduce(rows, axis=0, dtype=wider, out=out)
            if detector.raised() is not rounds:
                return AlwaysRounded()
    return detector
