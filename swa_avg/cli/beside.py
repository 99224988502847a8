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

from swa_avg.cli import ranks
from swa_avg.cli.show import json_text

if TYPE_CHECKING:
    from swa_avg.averaging import Averaging, along
    from swa_avg.cli.options import Run
    from swa_avg.storage import AtomicFile


@dataclass(frozen=True)
class Beside:
    """The files that a run writes after its output, open and not committed.

    Attributes:
        run: The run, which has their paths.
        files: The open files by path; empty in a process that writes none.
    """

    run: Run
    files: dict[Path, AtomicFile] = field(default_factory=dict)

    def write_report(self, content: object) -> None:
        """Write the report as JSON and commit it, if it is wanted.

        Raises:
            OutputError: The file cannot be written.
        """
        self._write(self.run.report, f"{json_text(content)}\n".encode())

    def write_picture(self, picture: bytes) -> None:
        """Write the plot and commit it, if it is wanted.

        Raises:
            OutputError: The file cannot be written.
        """
        self._write(self.run.plot, picture)

    def _write(self, path: Path | None, data: bytes) -> None:
        if path is not None:
            self.files[path].write(data, 0)
            self.files[path].commit()


@contextmanager
def opened_beside(
    run: Run,
    averaging: Averaging | along.Windows | None,
    outputs: Sequence[Path] | None = None,
) -> Iterator[Beside]:
    """Open the report and the plot; a file that is not committed is removed at the end.

    Of several ranks, only rank 0 writes them.

    Args:
        run: The run, which has the paths.
        averaging: The planned average or averages, or None.
        outputs: The outputs, if they are several.

    Raises:
        OutputError: A file cannot be written.
        UsageError: Two options name the same file.
    """
    with ExitStack() as opened:
        beside = Beside(run)
        if ranks.is_first():
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
