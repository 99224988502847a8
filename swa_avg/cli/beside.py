"""What is written beside the output, once that is in its place: the report and the picture.

Both are opened before the work, so that what can be known of them is known before the
output is written: a folder that is missing, a disk that is full.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from swa_avg.averaging import Averaging
    from swa_avg.cli.options import Run
    from swa_avg.storage import AtomicFile


@dataclass(frozen=True)
class Beside:
    """Files that are open, each under the name that the user gave."""

    files: dict[Path, AtomicFile] = field(default_factory=dict)

    def write(self, path: Path, data: bytes) -> None:
        """Write one of them, and put it in its place.

        Raises:
            OutputError: The system refuses.
        """
        self.files[path].write(data, 0)
        self.files[path].commit()


@contextmanager
def opened_beside(run: Run, averaging: Averaging | None, *, leads: bool) -> Iterator[Beside]:
    """Open what a run writes beside its output; what is not written in the end goes.

    Args:
        run: Says what it is.
        averaging: What is averaged, if anything is.
        leads: Whether this process writes them; of several ranks only the first one does.

    Raises:
        OutputError: One of them cannot be written.
        UsageError: It would replace something else.
    """
    with ExitStack() as opened:
        beside = Beside()
        if leads:
            from swa_avg.storage import AtomicFile

            for path in _checked(run, averaging):
                beside.files[path] = opened.enter_context(AtomicFile(path, 0))
        yield beside


def _checked(run: Run, averaging: Averaging | None) -> Iterator[Path]:
    """Yield the names of the report and the picture, once nothing speaks against them."""
    from swa_avg.storage import check_target, is_remote

    states = averaging.states if averaging else ()
    inputs = [file for state in states for file in state.checkpoint.files]
    taken = {} if is_remote(run.output) else {os.path.realpath(run.output): "--output"}
    for option, path in (("--report", run.report), ("--plot", run.search and run.search.plot)):
        if not path:
            continue
        check_target(path, inputs, force=True)
        other = taken.setdefault(os.path.realpath(path), option)
        if other != option:
            raise click.UsageError(f"{option} and {other} name the same file.")
        yield path
