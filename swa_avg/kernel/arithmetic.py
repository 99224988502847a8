"""The processor's floating-point environment: as C begins with it, whatever others have set.

Flush-to-zero, another rounding mode and numpy's reaction to overflow are settings of a
thread, which a user's module may have changed. What is computed here does not depend on them.
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
    """Compute as IEEE 754 has it by default, in this thread, until the end of the context."""
    environment = _environment()
    before = environment.exchange() if environment else None
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        if environment:
            environment.restore(before)


class _Environment:
    """The functions of C's <fenv.h> for the whole of it."""

    def __init__(self) -> None:
        library = ctypes.PyDLL(None)
        self._get, self._set = library.fegetenv, library.fesetenv
        # FE_DFL_ENV: the address -1 in glibc and musl, a variable on macOS.
        self._default: Any = ctypes.c_void_p(-1)
        if sys.platform == "darwin":
            self._default = ctypes.byref((ctypes.c_char * _ROOM).in_dll(library, "_FE_DFL_ENV"))

    def exchange(self) -> Any:
        """Set the default; return what was set before."""
        before = ctypes.create_string_buffer(_ROOM)
        self._get(before)
        self._set(self._default)
        return before

    def restore(self, before: Any) -> None:
        """Set what `exchange` has returned."""
        self._set(before)


@cache
def _environment() -> _Environment | None:
    try:
        return _Environment()
    except (OSError, AttributeError, TypeError, ValueError):
        return None  # no such library: as on Windows


class RoundingDetector:
    """The processor's note, kept for each thread, that some operation had to round.

    Of the C standard's <fenv.h>: FE_INEXACT stays set until it is cleared.
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
        library = ctypes.PyDLL(None)  # PyDLL: the call is too short to give up the GIL for
        self._clear = library.feclearexcept
        self._test = library.fetestexcept

    def clear(self) -> None:
        """Forget earlier roundings."""
        self._clear(self._mask)

    def raised(self) -> bool:
        """Tell whether any operation has rounded since `clear`."""
        return bool(self._test(self._mask))


class AlwaysRounded(RoundingDetector):
    """Where the processor cannot be asked: every addition is taken to have rounded."""

    def __init__(self) -> None:
        pass

    def clear(self) -> None:
        """Do nothing."""

    def raised(self) -> bool:
        """Return True."""
        return True


@cache
def rounding_detector() -> RoundingDetector:
    """Return a detector that was seen to work with the operations that it is asked about.

    One rounding in the last element must be noticed, and none where there is none.
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
