"""OpenBLAS, which numpy loads: it is limited to one thread where nothing uses it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit OpenBLAS to one thread: numpy starts its pool on import, and nothing here uses it.

    Used only where no user code runs in this process. A value that the user has set is kept.
    """
    name = "OPENBLAS_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
