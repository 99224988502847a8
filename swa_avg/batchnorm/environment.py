"""The floating-point environment of the calling thread, as the C standard begins with it.

Rounding is to the nearest and subnormal numbers are numbers. A library or a module of the
user's may have set something else for the whole process, such as
`torch.set_flush_denormal(True)`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Compute with the default environment; afterwards it is what it was.

    Where the C library has no such functions nothing happens.
    """
    functions = _functions()
    if functions is None:
        yield
        return
    get, put, default = functions
    before = _Room()
    get(before)
    put(default)
    try:
        yield
    finally:
        put(before)


_Room = ctypes.c_char * 256  # bytes; an fenv_t has at most 32 on the systems that are known


@cache
def _functions() -> tuple[Any, Any, Any] | None:
    """Return fegetenv, fesetenv and FE_DFL_ENV: an object on macOS, elsewhere the address -1."""
    try:
        library = ctypes.CDLL(None)
        get, put = library.fegetenv, library.fesetenv
    except (OSError, AttributeError, TypeError):
        return None
    try:
        default: Any = ctypes.byref(ctypes.c_char.in_dll(library, "_FE_DFL_ENV"))
    except ValueError:
        default = ctypes.c_void_p(-1)
    return get, put, default
