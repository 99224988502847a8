"""The kernel: it reads a byte range of N inputs and writes the mean to the output.

The works are cut into cells. For each cell, the same range of every input is read into
a row of one buffer, and the mean of the rows is written to its place in the output.
Processes or threads run tasks of many cells. The memory use does not depend on the size
of the model. This module knows no file format.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swa_avg.errors import NotFiniteError
from swa_avg.kernel.arithmetic import default_arithmetic
from swa_avg.kernel.buffers import Buffers
from swa_avg.kernel.exact import ALONE, BESIDE_THREADS, MOST_OF_ONE
from swa_avg.kernel.findings import Findings, Plain, Records, shared
from swa_avg.kernel.inner_products import Gram
from swa_avg.kernel.page_cache import LookAhead
from swa_avg.kernel.reading import Reader, readers_of
from swa_avg.kernel.rounding import NonFiniteError
from swa_avg.kernel.tasks import CHUNK, Cell, Chunking, Item, bytes_read, tasks, works_in
from swa_avg.kernel.workers import Results, can_fork, in_processes, in_threads
from swa_avg.kernel.writing import writer_to
from swa_avg.planning import Treatment, Work
from swa_avg.storage import Output
from swa_avg.tensors import Box, Kind, Record, combined, verify

if TYPE_CHECKING:
    from swa_avg.kernel.elements import Array

Progress = Callable[[int], None]

_CHECKS = 1024  # checksums compared in one task
_WORTH_FORKING = 32 * 1024 * 1024  # bytes; reading less takes less time than forking


@dataclass(frozen=True)
class Window:
    """An output that receives the mean of some of the sources of each work.

    Attributes:
        output: The output that is written.
        places: The offset of each work in it.
        rows: For each work the numbers of its sources. Those of an averaged work are
            consecutive. The last source of any other work is written, and the others are
            compared with it.
    """

    output: Output
    places: Sequence[int]
    rows: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Kernel:
    """The data that all tasks share.

    Attributes:
        output: The output that is written.
        places: The offset of each work in the output.
        works: The works to compute.
        chunk: The maximum number of elements averaged at once.
        groups: For each work, the number of the group of tensors whose inner products it
            adds to; -1 for none. Empty if no inner products are computed.
        partials: Further outputs, one fewer than there are checkpoints, or none. Output
            number k - 1 receives the mean of the last k sources of each averaged work,
            and the same bytes as `output` for every other work.
        windows: All outputs, if each receives the mean of some of the sources; the last one
            is `output`. Empty otherwise.
    """

    output: Output
    places: Sequence[int]
    works: Sequence[Work]
    chunk: int = CHUNK
    groups: Sequence[int] = ()
    partials: Sequence[Output] = ()
    windows: Sequence[Window] = ()

    @property
    def targets(self) -> tuple[tuple[Output, Sequence[int]], ...]:
        """All outputs, each with the offset of each work in it."""
        if self.windows:
            return tuple((window.output, window.places) for window in self.windows)
        return tuple((output, self.places) for output in (*self.partials, self.output))

    def tasks(self, threads: int) -> list[list[Item]]:
        """Return all tasks in order, several for each thread."""
        groups = [self.group(number) for number in range(len(self.works))]
        elements = min(self.chunk, MOST_OF_ONE) if self.partials else self.chunk
        chunking = Chunking.for_threads(threads, elements)
        return list(tasks(self.works, groups, chunking, threads))

    def group(self, number: int) -> int:
        """Return the group whose inner products a work adds to; -1 for none."""
        averaged = self.works[number].treatment is Treatment.AVERAGED
        return self.groups[number] if self.groups and averaged else -1


@dataclass(frozen=True)
class Outcome:
    """The results of averaging, besides the output itself.

    Attributes:
        checksums: The CRC-32 of each storage of the output.
        differing: Names of copied tensors that are not the same in all inputs.
        bytes_read: Bytes read from all inputs.
        crcs: The CRC-32 of every record that was read and for which the file records no
            checksum, and of some others. A recorded checksum has been compared. Records
            of equal length and CRC have the same bytes, except for one chance in 2^32.
        grams: For each group with an averaged work, the float64 matrix of
            <x_i - x_0, x_j - x_0>, where i and j are sources, summed over the works of the
            group. A complex number counts as two real ones. An element that is not finite
            is the same in all sources, and counts as a difference of 0.
        squares: For each of these groups, the squared norm of the written mean, without
            the elements that are not finite.
        partial_checksums: The same as `checksums` for each of the kernel's `partials`, or for
            each of its `windows` but the last.
        partial_differing: The same as `differing` for each of these.
    """

    checksums: tuple[int, ...]
    differing: tuple[str, ...]
    bytes_read: int
    crcs: Mapping[Record, int] = field(default_factory=dict)
    grams: Mapping[int, Array] = field(default_factory=dict)
    squares: Mapping[int, float] = field(default_factory=dict)
    partial_checksums: tuple[tuple[int, ...], ...] = ()
    partial_differing: tuple[tuple[str, ...], ...] = ()


def run(kernel: Kernel, workers: int, progress: Progress | None = None) -> Outcome:
    """Compute all works and write them.

    Args:
        kernel: The works and the output.
        workers: The number of processes or threads.
        progress: Is called in the calling thread with the bytes read since the last call.

    Raises:
        SwaAvgError: The error of the first task, in their order, that failed.
    """
    findings = compute(kernel, kernel.tasks(workers), workers, progress)
    return conclude(kernel, findings, workers)


@default_arithmetic()
def compute(
    kernel: Kernel,
    task_list: Sequence[Sequence[Item]],
    workers: int,
    progress: Progress | None = None,
) -> Findings:
    """Run tasks: all tasks of a kernel, or the share of one rank.

    Args:
        kernel: The kernel of the tasks.
        task_list: The tasks.
        workers: The number of processes or threads.
        progress: Is called in the calling thread with the bytes read since the last call.

    Returns:
        The findings of these tasks; `conclude` checks the merged findings of all tasks.

    Raises:
        SwaAvgError: The error of the first task, in their order, that failed.
    """
    job = _Job(kernel, task_list)
    findings = Findings(len(kernel.targets))
    with ExitStack() as stack:
        total = bytes_read(task_list, kernel.works)
        results = _start(job, workers, total, stack)
        stack.callback(job.stop.set)
        # Started after the fork: a process must not be forked while other threads run.
        ahead = stack.enter_context(LookAhead(task_list, kernel.works, workers, total))
        ahead.start()
        for number, found in results:
            findings.merge(found, job.records(number))
            ahead.done(number)
            if progress:
                progress(found["read"])
    return findings


def _start(job: _Job, workers: int, total: int, stack: ExitStack) -> Results[Plain]:
    """Start the tasks: in processes if that is possible and worthwhile, else in threads."""
    count = len(job.task_list)
    if workers > 1 and total >= _WORTH_FORKING and can_fork():
        with suppress(OSError):
            return stack.enter_context(in_processes(job.run, count, workers))
    job.at_once = BESIDE_THREADS if workers > 1 else ALONE
    return stack.enter_context(in_threads(job.run, count, workers))


@default_arithmetic()
def conclude(kernel: Kernel, findings: Findings, threads: int) -> Outcome:
    """Check the checksums of all records that were read, and return the results.

    Args:
        kernel: The kernel whose tasks have run.
        findings: The merged findings of all tasks.
        threads: The number of threads that compare checksums.

    Raises:
        FormatError: The checksum of an input is wrong.
    """
    ledger = findings.ledger
    left = ledger.open

    def check(number: int) -> None:
        for record in left[number * _CHECKS : (number + 1) * _CHECKS]:
            ledger.check(record)

    with in_threads(check, -(-len(left) // _CHECKS), threads) as checked:
        for _ in checked:
            pass
    return _outcome(kernel, findings)


def _outcome(kernel: Kernel, findings: Findings) -> Outcome:
    numbers = range(len(kernel.works))
    *partial, checksums = (
        tuple(combined(pieces.get(number, [])) for number in numbers) for pieces in findings.written
    )
    # A tensor that is written in parts has several works.
    *others, differing = (
        tuple(dict.fromkeys(kernel.works[number].name for number in sorted(of_output)))
        for of_output in findings.differing
    )
    grams = {group: gram.products for group, gram in sorted(findings.grams.items())}
    squares = {group: gram.square for group, gram in sorted(findings.grams.items())}
    read, crcs = findings.bytes_read, findings.ledger.found
    return Outcome(checksums, differing, read, crcs, grams, squares, tuple(partial), tuple(others))


class _Job:
    """Tasks of a kernel, and the data that they share.

    Attributes:
        kernel: The kernel of the tasks.
        task_list: The tasks.
        at_once: How many numbers a worker holds in float64 at once.
        stop: Is set when the remaining work is no longer needed.
    """

    def __init__(self, kernel: Kernel, task_list: Sequence[Sequence[Item]]) -> None:
        self.kernel = kernel
        self.task_list = task_list
        self.at_once = ALONE
        self.stop = threading.Event()
        self._shared = shared(kernel.works)
        self._targets = kernel.targets
        self._local = threading.local()

    def records(self, number: int) -> Records:
        """Return the input records of one task."""
        works = self.kernel.works
        return Records([works[n] for n in works_in([self.task_list[number]])])

    def run(self, number: int) -> Plain:
        """Run one task and return its findings."""
        with default_arithmetic():
            return self._run_task(number)

    def _run_task(self, number: int) -> Plain:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers(self.at_once)
        findings = Findings(len(self._targets), self._shared)
        for item in self.task_list[number]:
            self._run_item(item, self._local.buffers, findings)
        return findings.plain(self.records(number))

    def _run_item(self, item: Item, buffers: Buffers, findings: Findings) -> None:
        """Compute and write one item, cell by cell."""
        work = self.kernel.works[item.number]
        readers = readers_of(item, self.kernel.works)
        writers = [writer_to(output, item, places, work.dtype) for output, places in self._targets]
        group = self.kernel.group(item.number)
        gram = Gram(len(work.sources)) if group >= 0 else None
        for cell in item.cells():
            if self.stop.is_set():
                return
            try:
                for numbers, data in self._compute(item, readers, cell, gram, buffers, findings):
                    for number in numbers:
                        writers[number].write(data)
            except NonFiniteError as error:
                self._refuse(item, error)
        for writer, written in zip(writers, findings.written, strict=True):
            for number, piece in writer.pieces():
                written[number].append(piece)
        if gram is not None:
            findings.add_gram(group, gram)
        findings.bytes_read += sum(reader.close(findings.ledger) for reader in readers)

    def _compute(
        self,
        item: Item,
        readers: Sequence[Reader],
        cell: Cell | Box,
        gram: Gram | None,
        buffers: Buffers,
        findings: Findings,
    ) -> Iterator[tuple[Iterable[int], memoryview]]:
        """Yield the bytes of a cell, with the numbers of the outputs that receive them."""
        work = self.kernel.works[item.number]
        everywhere = range(len(self._targets))
        if self.kernel.windows:
            yield from self._windows(item, readers, cell, buffers, findings)
        elif work.treatment is not Treatment.AVERAGED:
            ((data, same),) = buffers.without_mean(work, readers, cell, [range(len(readers))])
            if not same:
                for differing in findings.differing:
                    differing.add(item.number)
            yield everywhere, data
        elif len(everywhere) == 1:
            yield everywhere, buffers.mean(work, readers, cell, gram)
        else:
            for count, data in buffers.means(work, readers, cell, gram):
                yield (count - 1,), data

    def _windows(
        self,
        item: Item,
        readers: Sequence[Reader],
        cell: Cell | Box,
        buffers: Buffers,
        findings: Findings,
    ) -> Iterator[tuple[Iterable[int], memoryview]]:
        """Yield the bytes of a cell for each window, with the number of its output."""
        work = self.kernel.works[item.number]
        spans = [window.rows[item.number] for window in self.kernel.windows]
        if work.treatment is Treatment.AVERAGED:
            for number, data in enumerate(buffers.window_means(work, readers, cell, spans)):
                yield (number,), data
            return
        found = buffers.without_mean(work, readers, cell, spans)
        for number, (data, same) in enumerate(found):
            if not same:
                findings.differing[number].add(item.number)
            yield (number,), data

    def _refuse(self, item: Item, error: NonFiniteError) -> None:
        """Raise the error for an element that is not finite; if the file is damaged, that one."""
        parts = 2 if self.kernel.works[item.number].dtype.kind is Kind.COMPLEX else 1
        work = self.kernel.works[item.number_at(error.element // parts)]
        if error.source is None:
            raise NotFiniteError(
                f"has {error.value:g}, which {work.dtype} cannot hold",
                tensor=work.name,
                remedy="Choose a wider --dtype",
            ) from error
        source = work.sources[error.source]
        verify((record, work.name) for record in source.records)
        source.record.file.check_unchanged()
        raise NotFiniteError(
            f"has {error.value:g}",
            file=source.record.file.path,
            tensor=work.name,
            expected="finite numbers, or the same in every checkpoint",
            remedy="Leave this checkpoint out",
        ) from error
