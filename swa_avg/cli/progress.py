"""Progress bars on stderr, shown only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from swa_avg.errors import printable


@contextmanager
def bar(
    total: int | None, quiet: bool, unit: str, desc: str, stream: TextIO | None = None
) -> Iterator[Any]:
    """Show a progress bar on `stream` (default stderr); yield None if it is not a terminal."""
    stream = stream or sys.stderr
    if quiet or stream is None or not stream.isatty():
        yield None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no monitor thread: a process with threads must not fork
    scaled = unit == "B"
    shown: Any = tqdm(
        total=total, unit=unit, unit_scale=scaled, desc=desc, leave=False, file=stream
    )
    with shown:
        yield shown


def advance(bar: Any, samples: int) -> None:
    """Count a batch and show the samples per second."""
    bar.samples = getattr(bar, "samples", 0) + samples
    elapsed = bar.format_dict["elapsed"]
    known = elapsed and bar.samples
    bar.set_postfix_str(f"{bar.samples / elapsed:.0f} samples/s" if known else "", refresh=False)
    bar.update(1)


def move(bar: Any, done: int, step: str) -> None:
    """Set the number of completed steps and the name of the current one."""
    bar.n = done
    bar.set_description_str(printable(step))
