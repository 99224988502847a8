"""Progress on the terminal: how far a long step is, on stderr, where somebody looks."""

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
    """Show a progress bar on `stream`, by default stderr, if it is a terminal; else give None."""
    stream = stream or sys.stderr
    if quiet or stream is None or not stream.isatty():
        yield None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own: processes are not forked beside one
    scaled = unit == "B"
    made: Any = tqdm(total=total, unit=unit, unit_scale=scaled, desc=desc, leave=False, file=stream)
    with made:
        yield made


def advance(bar: Any, samples: int) -> None:
    """Count a batch, and show how fast samples come."""
    bar.samples = getattr(bar, "samples", 0) + samples
    elapsed = bar.format_dict["elapsed"]
    known = elapsed and bar.samples
    bar.set_postfix_str(f"{bar.samples / elapsed:.0f} samples/s" if known else "", refresh=False)
    bar.update(1)


def move(bar: Any, done: int, step: str) -> None:
    """Say what comes now."""
    bar.n = done
    bar.set_description_str(printable(step))
