"""The files that a run writes after its output: the report and the plot.

Both are opened before the work starts, so that a missing folder or a full disk is found
before the output is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from swa_avg.averaging import Averaging, along
    from swa_avg.cli.options import Run
    from swa_avg.storage import AtomicFile


@dataclass(frozen=True)
class Beside:
    """Open files by the path that the user gave."""

    files: dict[Path, AtomicFile] = field(default_factory=dict)

    def write(self, path: Path, data: bytes) -> None:
        """Write a file and commit it.

        Raises:
            OutputError: The file cannot be written.
        """
        self.files[path].write(data, 0)
        self.files[path].commit()


@contextmanager
def opened_beside(
    run: Run,
    averaging: Averaging | along.Windows | None,
    outputs: Sequence[Path] | None = None,
    *,
    is_first: bool = True,
) -> Iterator[Beside]:
    """Open the report and the plot; a file that is not committed is removed at the end.

    Args:
        run: The run, which has the paths.
        averaging: The planned average or averages, or None.
        outputs: The outputs, if they are several.
        is_first: Whether this process is the only one or rank 0, which writes the files.

    Raises:
        OutputError: A file cannot be written.
        UsageError: Two options name the same file.
    """
    with ExitStack() as opened:
        beside = Beside()
        if is_first:
            from swa_avg.storage import AtomicFile

            for path in _checked(run, averaging, [run.output] if outputs is None else outputs):
                beside.files[path] = opened.enter_context(AtomicFile(path, 0))
        yield beside


def _checked(
    run: Run, averaging: Averaging | along.Windows | None, outputs: Sequence[Path]
) -> Iterator[Path]:
    """Yield the paths of the report and the plot, after checking that they can be written."""
    from swa_avg.storage import check_target, is_remote

    states = averaging.states if averaging else ()
    inputs = [file for state in states for file in state.checkpoint.files]
    local = [output for output in outputs if not is_remote(output)]
    taken = {os.path.realpath(output): "--output" for output in local}
    for option, path in (("--report", run.report), ("--plot", run.plot)):
        if not path:
            continue
        check_target(path, inputs, force=True)
        other = taken.setdefault(os.path.realpath(path), option)
        if other != option:
            raise click.UsageError(f"{option} and {other} name the same file. Give each its own.")
        yield path
