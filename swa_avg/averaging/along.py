"""Averages along a run: the mean of the latest checkpoints, at every checkpoint.

A window is a number of consecutive checkpoints. The averages of all windows are computed
while each checkpoint is read once. Each is the same as the average of the window's
checkpoints alone. All outputs are computed before the first one is committed.
"""

from __future__ import annotations

import os
from collections import Counter as Counted
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from swa_avg.averaging.computing import computed
from swa_avg.averaging.execution import Averaging
from swa_avg.averaging.prepare import average_of, check_kind, gathered, no_garbage
from swa_avg.averaging.report import Report, versions
from swa_avg.checkpoints import StateDict
from swa_avg.errors import MismatchError, SelectionError, SwaAvgError, counted, in_bytes
from swa_avg.planning import (
    OptionFields,
    Options,
    Paths,
    Selection,
    Treatment,
    Work,
    check_arguments,
    check_count,
    check_pattern,
    names_of,
    options_of,
)
from swa_avg.progress import Counter, Watch
from swa_avg.storage import AtomicFile, AtomicFolder, RemoteFile, allow_files, check_room, path_of
from swa_avg.tensors import TensorRef

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from swa_avg.batchnorm import BatchNorm, Session
    from swa_avg.kernel import Kernel, Outcome

File = AtomicFile | AtomicFolder | RemoteFile


@dataclass(frozen=True)
class WindowsReport:
    """The report of averages along a run.

    Attributes:
        averages: The report of each average, in the order of the run. Its `bytes_read` are
            the bytes of its checkpoints, which other averages share.
        bytes_read: The number of tensor bytes that were read for all averages together.
        notes: Notes for the user on the choice of checkpoints.
    """

    averages: tuple[Report, ...]
    bytes_read: int
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        averages, last = counted(len(self.averages), "average"), self.averages[-1].output
        return f"WindowsReport({averages}, {in_bytes(self.bytes_written)}, the last one {last})"

    @property
    def bytes_written(self) -> int:
        """The size of all outputs together."""
        return sum(report.bytes_written for report in self.averages)

    def to_dict(self) -> dict[str, object]:
        """Return the report as a dict for JSON."""
        averages = [report.to_dict() for report in self.averages]
        for content in averages:
            del content["versions"]
        return {
            "averages": averages,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "notes": list(self.notes),
            "versions": versions(),
        }


@dataclass(frozen=True)
class Draft:
    """An average of a window, complete in a file that is not committed yet.

    Attributes:
        file: The temporary file or folder.
        averaging: The plan of the average.
        report: The report.
    """

    file: File
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


@dataclass(frozen=True)
class _Shared:
    """The works of all windows, which are computed together.

    Attributes:
        works: The works, with the sources of all windows.
        rows: For each window and work, the numbers of the sources.
        numbers: For each window and work, the number of the work in the window's own plan.
    """

    works: list[Work] = field(default_factory=list)
    rows: list[list[tuple[int, ...]]] = field(default_factory=list)
    numbers: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Windows:
    """Planned averages along a run: all headers are read, and no tensor has been read.

    Attributes:
        averages: The plan of each average, in the order of the run.
        selection: All checkpoints, in order.
        shared: The works of all windows.
    """

    averages: tuple[Averaging, ...]
    selection: Selection
    shared: _Shared

    @property
    def states(self) -> tuple[StateDict, ...]:
        """All checkpoints, in order."""
        return self.selection.chosen

    @property
    def bytes_to_read(self) -> int:
        """The bytes of tensors to read from all checkpoints."""
        return sum(source.nbytes for work in self.shared.works for source in work.sources)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the choice of checkpoints."""
        return self.averages[0].options.worded(self.selection.notes)

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
        check_room((one.output, one.layout.size) for one in self.averages)
        inputs = [file for state in self.selection.chosen for file in state.checkpoint.files]
        outputs = sum(len(one.layout.files) or 1 for one in self.averages)
        allow_files(len(inputs) + outputs)
        with ExitStack() as opened:
            files: list[File] = []
            for one in self.averages:
                files.append(one.open_output())
                opened.enter_context(files[-1])
            count = Counter(progress, "averaging", self.bytes_to_read)
            outcome = computed(
                self.shared.works, inputs, lambda: self._kernel(files), threads, count
            )
            yield list(self._drafts(files, outcome, progress)), outcome.bytes_read

    def _kernel(self, files: Sequence[File]) -> Kernel:
        from swa_avg.kernel import Kernel, Window

        windows = []
        shared = zip(files, self.averages, self.shared.rows, self.shared.numbers, strict=True)
        for file, average, rows, numbers in shared:
            places = average.layout.places
            windows.append(Window(file, [places[number] for number in numbers], rows))
        last = windows[-1]
        return Kernel(last.output, last.places, self.shared.works, windows=windows)

    def _drafts(
        self, files: Sequence[File], outcome: Outcome, progress: Watch | None
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
        session = batchnorm.session() if batchnorm else None
        with self.computed(threads, progress) as (drafts, bytes_read):
            if session:
                drafts = [draft.recomputed(session, progress) for draft in drafts]
            reports = tuple(draft.commit(progress) for draft in drafts)
        return WindowsReport(reports, bytes_read, self.notes)


@contextmanager
def planned_windows(
    checkpoints: Paths,
    output: str | os.PathLike[str],
    last: int | Sequence[int],
    options: Options,
    progress: Watch | None = None,
) -> Iterator[Windows]:
    """Open checkpoints and plan the averages along the run.

    Args:
        checkpoints: As for `windows`.
        output: As for `windows`.
        last: As for `windows`.
        options: The options of the averages.
        progress: Called with a `Progress` as the headers are read.

    Raises:
        SwaAvgError: The checkpoints cannot be averaged, or an output cannot be written.
        ValueError: An option has an invalid value or cannot be combined with windows.
    """
    lasts = sorted({last} if isinstance(last, int) else set(last))
    pattern = os.fspath(output)
    _check_options(lasts, options)
    check_pattern(pattern, lasts)
    with ExitStack() as opened, no_garbage() as kept:
        _, selection = gathered(checkpoints, options, opened, progress)
        spans = _spans(lasts, len(selection.chosen))
        names = names_of(pattern, selection.chosen, spans)
        averages = []
        for name, span in zip(names, spans, strict=True):
            chosen = selection.chosen[span.start : span.stop]
            own = replace(selection, chosen=chosen, notes=())
            average = average_of(path_of(name), (), own, options, opened, selection.chosen)
            check_kind(name, average)
            averages.append(average)
        shared = _shared(averages, spans)
        kept()
        yield Windows(tuple(averages), selection, shared)


def _check_options(lasts: Sequence[int], options: Options) -> None:
    """Refuse options that cannot be combined with windows."""
    check_count("last", min(lasts, default=0))
    for name in ("last", "best"):
        if getattr(options.choice, name) is not None:
            raise ValueError(f"choice with {name} cannot be combined with windows")
    for name in ("start_from", "minus", "distances"):
        if getattr(options, name):
            raise ValueError(f"{name} cannot be combined with windows")


def _spans(lasts: Sequence[int], count: int) -> list[range]:
    """Return the numbers of the checkpoints of each window, in the order of the run."""
    if lasts[-1] > count:
        raise SelectionError(
            f"there are only {counted(count, 'checkpoint')}, so no window of {lasts[-1]}",
            remedy=f"Choose windows of at most {count}",
        )
    return [range(end - last, end) for end in range(1, count + 1) for last in lasts if last <= end]


def _shared(averages: Sequence[Averaging], spans: Sequence[range]) -> _Shared:
    """Return the works of all windows together."""
    shared = _Shared([], [[] for _ in averages], [[] for _ in averages])
    own = [{key: n for n, key in enumerate(_keys(one.plan.works))} for one in averages]
    first = [{tensor.name for tensor in one.plan.tensors if tensor.of_first} for one in averages]
    works = averages[-1].plan.works
    for key, like in zip(_keys(works), works, strict=True):
        sources: dict[int, TensorRef] = {}
        taken: list[list[int]] = []
        for place, (average, span) in enumerate(zip(averages, spans, strict=True)):
            number = own[place].get(key)
            work = like if number is None else average.plan.works[number]
            taken.append(_inputs_of(work, span, like.name in first[place]))
            before = [
                sources.setdefault(*pair) for pair in zip(taken[-1], work.sources, strict=True)
            ]
            fits = len(own[place]) == len(own[-1]) and _described(work) == _described(like)
            if number is None or not fits or before != list(work.sources):
                raise MismatchError([_unlike(like.name, average)])
            shared.numbers[place].append(number)
        order = {number: row for row, number in enumerate(sorted(sources))}
        shared.works.append(replace(like, sources=tuple(sources[number] for number in order)))
        for rows, numbers in zip(shared.rows, taken, strict=True):
            rows.append(tuple(order[number] for number in numbers))
    return shared


def _keys(works: Sequence[Work]) -> list[tuple[str, int]]:
    """Return the name of each work, numbered: a tensor written in parts has several works."""
    seen: Counted[str] = Counted()
    keys = []
    for work in works:
        keys.append((work.name, seen[work.name]))
        seen[work.name] += 1
    return keys


def _inputs_of(work: Work, span: range, of_first: bool) -> list[int]:
    """Return the numbers of the checkpoints that the sources of a work belong to."""
    ordered = [*reversed(span)] if of_first else [*span]
    return ordered[len(ordered) - len(work.sources) :]


def _described(work: Work) -> tuple[Treatment, tuple[int, ...], object, float]:
    return work.treatment, work.shape, work.dtype, work.fill


def _unlike(name: str, average: Averaging) -> SwaAvgError:
    """Return the error for a tensor that is not stored alike in all checkpoints."""
    return SwaAvgError(
        "is tied or stored in another order than in later checkpoints",
        file=average.states[-1].checkpoint.path,
        tensor=name,
        remedy="Average each window by itself",
    )


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
