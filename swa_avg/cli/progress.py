"""The progress of a run on stderr, shown only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from swa_avg.progress import ProgressBar, Watch


@contextmanager
def watching(quiet: bool, stream: TextIO | None = None) -> Iterator[Watch | None]:
    """Show progress on `stream` (default stderr); yield None if it is not a terminal."""
    stream = stream or sys.stderr
    if quiet or stream is None or not stream.isatty():
        yield None
        return
    with ProgressBar(stream) as bar:
        yield bar
