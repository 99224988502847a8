"""Averages along a run: the mean of the latest checkpoints, at every checkpoint.

A window is a number of consecutive checkpoints. The averages of all windows are computed
while each checkpoint is read once. Each is the same as the average of the window's
checkpoints alone. All outputs are computed before the first one is committed. Without names for
the outputs, the averages are temporary files: something else is made of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from swa_avg.averaging.computing import computed, no_garbage
from swa_avg.averaging.execution import Averaging
from swa_avg.averaging.prepare import average_of, check_kind, gathered
from swa_avg.averaging.report import Report, WindowsReport
from swa_avg.averaging.sharing import Shared, shared_by
from swa_avg.checkpoints import StateDict
from swa_avg.errors import OutputError, SelectionError, counted
from swa_avg.planning import (
    OptionFields,
    Options,
    Paths,
    Selection,
    check_arguments,
    check_count,
    check_pattern,
    gap_notes,
    names_of,
    options_of,
)
from swa_avg.progress import Counter, Watch
from swa_avg.storage import (
    InputFile,
    OutputFile,
    allow_files,
    check_room,
    path_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from swa_avg.batchnorm import BatchNorm, Session
    from swa_avg.kernel import Kernel, Outcome


@dataclass(frozen=True)
class Draft:
    """An average of a window, complete in a file that is not committed yet.

    Attributes:
        file: The temporary file or folder.
        averaging: The plan of the average.
        report: The report.
    """

    file: OutputFile
    averaging: Averaging
    report: Report

    def recomputed(self, session: Session, progress: Watch | None = None) -> Draft:
        """Recompute the BatchNorm statistics of the average."""
        found = session.recompute(self.file, *self.averaging.found_at, progress)
        return replace(self, report=self.report.recomputed(*found))

    def commit(self, progress: Watch | None = None) -> Report:
        """Commit the output, and return the report."""
        notes = self.averaging.options.worded(self.file.commit(progress))
        return replace(self.report, notes=(*self.report.notes, *notes))

    def unwritten(self) -> Report:
        """Return the report of an average that does not become an output."""
        averaging = self.averaging
        chosen = averaging.options.worded((*averaging.selection.notes, *averaging.plan.notes))
        of_output = {*averaging.notes}.difference(chosen)
        notes = tuple(note for note in self.report.notes if note not in of_output)
        return replace(self.report, output="", bytes_written=0, notes=notes)


@dataclass(frozen=True)
class Windows:
    """Planned averages along a run: all headers are read, and no tensor has been read.

    Attributes:
        averages: The plan of each average, in the order of the run.
        spans: The numbers of the checkpoints of each average.
        selection: All checkpoints, in order.
        shared: The works of all windows.
        is_named: Whether the outputs have names. If not, the averages are temporary files.
    """

    averages: tuple[Averaging, ...]
    spans: tuple[range, ...]
    selection: Selection
    shared: Shared
    is_named: bool = True

    @property
    def states(self) -> tuple[StateDict, ...]:
        """All checkpoints, in order."""
        return self.selection.chosen

    @property
    def bytes_to_read(self) -> int:
        """The bytes of tensors to read from all checkpoints."""
        return sum(source.nbytes for work in self.shared.works for source in work.sources)

    @property
    def size(self) -> int:
        """The size of all averages together."""
        return sum(one.layout.size for one in self.averages)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the choice of checkpoints."""
        notes = (*self.selection.notes, *gap_notes(self.states))
        return self.averages[0].options.worded(notes)

    @contextmanager
    def computed(
        self, threads: int | None = None, progress: Watch | None = None
    ) -> Iterator[tuple[list[Draft], int]]:
        """Compute all averages; those that are not committed are removed at the end.

        Args:
            threads: The number of workers; by default one per usable core.
            progress: Called with a `Progress`.

        Yields:
            The averages, and the number of bytes that were read.

        Raises:
            SwaAvgError: A disk is full, or averaging failed.
        """
        with self.opened() as files:
            yield self.compute(files, threads, progress)

    @contextmanager
    def opened(self) -> Iterator[list[OutputFile]]:
        """Open the temporary file of each average; those not committed are removed at the end.

        Raises:
            OutputError: A disk is full, or an output cannot be written.
        """
        check_room(
            ((one.output, one.layout.size) for one in self.averages),
            temporary=not self.is_named,
        )
        outputs = sum(len(one.layout.files) or 1 for one in self.averages)
        allow_files(len(self._inputs) + outputs)
        with ExitStack() as opened:
            files: list[OutputFile] = []
            for one in self.averages:
                files.append(one.open_output())
                opened.enter_context(files[-1])
            yield files

    def compute(
        self, files: Sequence[OutputFile], threads: int | None = None, progress: Watch | None = None
    ) -> tuple[list[Draft], int]:
        """Compute all averages into opened files; return them and the number of bytes read.

        Raises:
            SwaAvgError: Averaging failed.
        """
        count = Counter(progress, "averaging", self.bytes_to_read)
        works = self.shared.works
        outcome = computed(works, self._inputs, lambda: self._kernel(files), threads, count)
        return list(self._drafts(files, outcome, progress)), outcome.bytes_read

    @property
    def _inputs(self) -> list[InputFile]:
        return [file for state in self.states for file in state.checkpoint.files]

    def _kernel(self, files: Sequence[OutputFile]) -> Kernel:
        from swa_avg.kernel import Kernel, Window

        windows = []
        shared = zip(files, self.averages, self.shared.rows, self.shared.numbers, strict=True)
        for file, average, rows, numbers in shared:
            places = average.layout.places
            windows.append(Window(file, [places[number] for number in numbers], rows))
        last = windows[-1]
        return Kernel(last.output, last.places, self.shared.works, windows=windows)

    def _drafts(
        self, files: Sequence[OutputFile], outcome: Outcome, progress: Watch | None
    ) -> Iterator[Draft]:
        """Complete the outputs: write their headers and verify them."""
        checksums = (*outcome.partial_checksums, outcome.checksums)
        differing = (*outcome.partial_differing, outcome.differing)
        for place, (file, average) in enumerate(zip(files, self.averages, strict=True)):
            found = dict(zip(self.shared.numbers[place], checksums[place], strict=True))
            own = replace(
                outcome,
                checksums=tuple(found[number] for number in range(len(found))),
                differing=differing[place],
                bytes_read=average.plan.bytes_to_read,
            )
            yield Draft(file, average, average.complete(file, own, progress))

    def write(
        self,
        *,
        batchnorm: BatchNorm | None = None,
        threads: int | None = None,
        progress: Watch | None = None,
    ) -> WindowsReport:
        """Average, and write all outputs.

        Args:
            batchnorm: The batches and the model with which to recompute the BatchNorm
                statistics of each average.
            threads: The number of workers; by default one per usable core.
            progress: Called with a `Progress`.

        Raises:
            SwaAvgError: Averaging failed. Nothing was written, unless a commit failed: the
                outputs before it are complete then.
        """
        check_arguments(batchnorm, threads)
        session = batchnorm.session() if batchnorm else None
        with self.computed(threads, progress) as (drafts, bytes_read):
            if session:
                drafts = [draft.recomputed(session, progress) for draft in drafts]
            reports = committed(drafts, progress)
        return WindowsReport(reports, bytes_read, self.notes)


def sync_all(drafts: Sequence[Draft], progress: Watch | None = None) -> None:
    """Sync all averages to disk, so that the commits that follow take little time.

    The disk writes all of them at once. If it fails, nothing is committed.

    Raises:
        OutputError: The system reports an error; the call is not repeated.
    """
    for draft in drafts:
        draft.file.sync(progress)


def committed(drafts: Sequence[Draft], progress: Watch | None = None) -> tuple[Report, ...]:
    """Commit all averages, in order, and return the reports.

    Raises:
        OutputError: The system reports an error. The outputs before it are complete.
    """
    sync_all(drafts, progress)
    return tuple(draft.commit(progress) for draft in drafts)


@contextmanager
def planned_windows(
    checkpoints: Paths,
    output: str | os.PathLike[str] | None,
    last: int | Sequence[int],
    options: Options,
    progress: Watch | None = None,
) -> Iterator[Windows]:
    """Open checkpoints and plan the averages along the run.

    Args:
        checkpoints: As for `windows`.
        output: As for `windows`; None for averages that are only temporary files.
        last: As for `windows`.
        options: The options of the averages.
        progress: Called with a `Progress` as the headers are read.

    Raises:
        SwaAvgError: The checkpoints cannot be averaged, or an output cannot be written.
        ValueError: An option has an invalid value or cannot be combined with windows.
    """
    lasts = _lengths(last)
    _check_options(lasts, options, named=output is not None)
    if output is not None:
        check_pattern(os.fspath(output), lasts)
    with ExitStack() as opened, no_garbage() as kept:
        _, selection = gathered(checkpoints, options, opened, progress)
        spans = _spans(lasts, len(selection.chosen))
        if output is None:
            names = _temporary_names(len(spans), opened)
        else:
            names = names_of(os.fspath(output), selection.chosen, spans)
        averages = []
        for name, span in zip(names, spans, strict=True):
            chosen = selection.chosen[span.start : span.stop]
            own = replace(selection, chosen=chosen, notes=())
            average = average_of(path_of(name), (), own, options, opened, selection.chosen)
            check_kind(name, average)
            averages.append(average)
        shared = shared_by(averages, spans)
        kept()
        named = output is not None
        yield Windows(tuple(averages), tuple(spans), selection, shared, named)


def _temporary_names(count: int, opened: ExitStack) -> list[str]:
    """Return names in a temporary folder, which `opened` removes."""
    try:
        folder = Path(opened.enter_context(TemporaryDirectory(prefix="swa-avg-")))
    except OSError as error:
        raise OutputError(
            f"the averages need a temporary folder, which cannot be made: {error.strerror}",
            remedy="Set TMPDIR to a folder that can be written",
        ) from error
    # torch's format holds what every other format holds, and ties.
    return [str(folder / f"{number}.pt") for number in range(count)]


def _lengths(last: object) -> list[int]:
    """Return the lengths of the windows, in order."""
    given = list(last) if isinstance(last, Iterable) and not isinstance(last, str) else [last]
    lengths = {int(one) for one in given if isinstance(one, Integral)}
    if not all(isinstance(one, Integral) for one in given):
        raise TypeError(f"last must be a number of checkpoints or several numbers, not {last!r}")
    return sorted(lengths)


def _check_options(lasts: Sequence[int], options: Options, *, named: bool) -> None:
    """Refuse options that cannot be combined with windows."""
    check_count("last", min(lasts, default=0))
    for name in ("last", "best"):
        if getattr(options.choice, name) is not None:
            raise ValueError(f"choice with {name} cannot be combined with windows")
    for name in ("start_from", "minus", "distances"):
        if getattr(options, name):
            raise ValueError(f"{name} cannot be combined with windows")
    for name in () if named else ("keep_wrapper", "max_shard_size"):
        if getattr(options, name):
            raise ValueError(f"{name} needs output: the name of the averages")


def _spans(lasts: Sequence[int], count: int) -> list[range]:
    """Return the numbers of the checkpoints of each window, in the order of the run."""
    if lasts[-1] > count:
        raise SelectionError(
            f"there are only {counted(count, 'checkpoint')}, so no window of {lasts[-1]}",
            remedy=f"Choose windows of at most {count}",
        )
    return [range(end - last, end) for end in range(1, count + 1) for last in lasts if last <= end]


def windows(
    checkpoints: Paths,
    output: str | os.PathLike[str],
    last: int | Sequence[int],
    *,
    batchnorm: BatchNorm | None = None,
    threads: int | None = None,
    progress: Watch | None = None,
    **options: Unpack[OptionFields],
) -> WindowsReport:
    """Average the latest checkpoints at every checkpoint of a run, and read each file once.

    Equal-weight averages of a sliding window are LAWA (Kaddour 2022, "Stop Wasting My Time!
    Saving Days of ImageNet and BERT Training with Latest Weight Averaging"). Each output
    equals that of `average` with the checkpoints of its window.

    Args:
        checkpoints: Files, folders or patterns.
        output: The pattern of the outputs' names: `{step}`, `{epoch}` and `{name}` are those
            of a window's last checkpoint, and `{last}` is the length of the window.
        last: The number of checkpoints in a window, or several such numbers.
        batchnorm: The batches and the model with which to recompute the BatchNorm statistics
            of each average. The batches are iterated over once for each average.
        threads: The number of workers; by default one per usable core.
        progress: Called with a `Progress` at the start of each step and as it proceeds.
        **options: The fields of `Options`, by name, except `start_from`, `minus` and
            `distances`; the `choice` without `last` and `best`.

    Returns:
        The report of all averages.

    Raises:
        SwaAvgError: Averaging failed. Nothing was written, unless a commit failed: the
            outputs before it are complete then.
        TypeError: An option has an unknown name.
        ValueError: An option has an invalid value or cannot be combined with windows.
    """
    wanted = options_of(windows, options)
    check_arguments(batchnorm, threads)
    with planned_windows(checkpoints, output, last, wanted, progress) as plan:
        return plan.write(batchnorm=batchnorm, threads=threads, progress=progress)
