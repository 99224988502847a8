"""Progress on the terminal: how far a long step is, on stderr, where somebody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from swa_avg.errors import printable


@contextmanager
def bar(total: int | None, quiet: bool, unit: str, desc: str) -> Iterator[Any]:
    """Show a progress bar, if somebody is there to see it; else give None."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own: processes are not forked beside one
    made: Any = tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=desc, leave=False)
    with made:
        yield made


def advance(bar: Any, samples: int) -> None:
    """Count a batch, and show how fast samples come."""
    bar.samples = getattr(bar, "samples", 0) + samples
    elapsed = bar.format_dict["elapsed"]
    bar.set_postfix_str(f"{bar.samples / elapsed:.0f} samples/s" if elapsed else "", refresh=False)
    bar.update(1)


def move(bar: Any, done: int, step: str) -> None:
    """Say what comes now."""
    bar.n = done
    bar.set_description_str(printable(step))
