"""The kernel: the byte ranges of N inputs in, one range of the output out.

The works are cut into cells. For a cell the same range of every input is read into
a row of one buffer; the mean of the rows is written to the place that the output has
for it. Processes, or threads, take tasks of many cells. Memory does not grow with
the model. Knows no format.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swa_avg.errors import NotFiniteError
from swa_avg.kernel.arithmetic import default_arithmetic
from swa_avg.kernel.buffers import Desk
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

_CHECKS = 1024  # checksums that are compared in one task
_WORTH_FORKING = 32 * 1024 * 1024  # bytes; what is less takes less time than the forks


@dataclass(frozen=True)
class Kernel:
    """What all tasks share.

    Attributes:
        output: The file that is written.
        places: Where each work's bytes begin in it.
        works: What is computed.
        chunk: How many elements are averaged at once, at most.
        groups: For each work the number of the group, 0 or more, to the inner products
            of which it counts; -1 for none. Empty where none are wanted.
        partials: As many outputs as there are checkpoints, less one, or none: number
            k - 1 receives, at the same places, the mean of the last k sources of each
            averaged work, and of every other work the same bytes as `output`.
    """

    output: Output
    places: Sequence[int]
    works: Sequence[Work]
    chunk: int = CHUNK
    groups: Sequence[int] = ()
    partials: Sequence[Output] = ()

    @property
    def outputs(self) -> tuple[Output, ...]:
        """All that is written; number k - 1 is of the last k sources."""
        return (*self.partials, self.output)

    def tasks(self, threads: int) -> list[list[Item]]:
        """Return all that is to be done, in order, a few tasks for each of so many threads."""
        groups = [self.group(number) for number in range(len(self.works))]
        elements = min(self.chunk, MOST_OF_ONE) if self.partials else self.chunk
        chunking = Chunking.for_threads(threads, elements)
        return list(tasks(self.works, groups, chunking, threads))

    def group(self, number: int) -> int:
        """Return the group to which a work's inner products count; -1 for none."""
        averaged = self.works[number].treatment is Treatment.AVERAGED
        return self.groups[number] if self.groups and averaged else -1


@dataclass(frozen=True)
class Outcome:
    """What was found while averaging.

    Attributes:
        checksums: The CRC-32 of each storage as written.
        differing: Names of copied tensors that are not the same in all inputs.
        bytes_read: Bytes read from all inputs.
        crcs: The CRC-32, whole, of every record that was read and of which the file
            records none, and of some others. (Where it records one, that was compared.)
            Equal length and CRC: the same bytes, but for one chance in 2^32.
        grams: For each group that has an averaged work, the float64 matrix of
            <x_i - x_0, x_j - x_0>, i and j the sources, summed over its averaged works
            in float64. Complex numbers count as twice as many real ones. What is not
            finite (it is then the same in all sources) counts as no difference.
        squares: For each of these groups the squared norm of the mean as written;
            what is not finite is left out.
        partial_checksums: The same as `checksums` for each of the kernel's `partials`.
    """

    checksums: tuple[int, ...]
    differing: tuple[str, ...]
    bytes_read: int
    crcs: Mapping[Record, int] = field(default_factory=dict)
    grams: Mapping[int, Array] = field(default_factory=dict)
    squares: Mapping[int, float] = field(default_factory=dict)
    partial_checksums: tuple[tuple[int, ...], ...] = ()


def run(kernel: Kernel, workers: int, progress: Progress | None = None) -> Outcome:
    """Compute all works and write them.

    Args:
        kernel: What to do.
        workers: How many processes or threads do it.
        progress: Called in the calling thread with the bytes read since the last call.

    Raises:
        SwaAvgError: The first problem, in the order of the tasks, that any of them met.
    """
    findings = compute(kernel, kernel.tasks(workers), workers, progress)
    return settle(kernel, findings, workers)


@default_arithmetic()
def compute(
    kernel: Kernel,
    dealt: Sequence[Sequence[Item]],
    workers: int,
    progress: Progress | None = None,
) -> Findings:
    """Do tasks: all of a kernel, or of several ranks one's part.

    Args:
        kernel: What they belong to.
        dealt: The tasks.
        workers: How many processes or threads do them.
        progress: Called in the calling thread with the bytes read since the last call.

    Returns:
        What was found; `settle` makes sure of it, once all tasks are done.

    Raises:
        SwaAvgError: The first problem, in the order of the tasks, that any of them met.
    """
    job = _Job(kernel, dealt)
    findings = Findings(len(kernel.outputs))
    with ExitStack() as ended:
        total = bytes_read(dealt, kernel.works)
        results = _begun(job, workers, total, ended)
        ended.callback(job.stop.set)
        # Only now: processes are not forked beside a thread.
        ahead = ended.enter_context(LookAhead(dealt, kernel.works, workers, total))
        ahead.start()
        for number, found in results:
            findings.merge(found, job.records(number))
            ahead.done(number)
            if progress:
                progress(found["read"])
    return findings


def _begun(job: _Job, workers: int, total: int, ended: ExitStack) -> Results[Plain]:
    """Have the tasks done: by processes where that is possible and worth it, else by threads."""
    count = len(job.dealt)
    if workers > 1 and total >= _WORTH_FORKING and can_fork():
        with suppress(OSError):
            return ended.enter_context(in_processes(job.do, count, workers))
    job.at_once = BESIDE_THREADS if workers > 1 else ALONE
    return ended.enter_context(in_threads(job.do, count, workers))


@default_arithmetic()
def settle(kernel: Kernel, findings: Findings, threads: int) -> Outcome:
    """Make sure of what all tasks together have read, and sum up.

    Args:
        kernel: What was done.
        findings: What all tasks have found.
        threads: How many threads compare checksums.

    Raises:
        FormatError: What was read is not what was saved.
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
    differing = tuple(kernel.works[number].name for number in sorted(findings.differing))
    grams = {group: gram.products for group, gram in sorted(findings.grams.items())}
    squares = {group: gram.square for group, gram in sorted(findings.grams.items())}
    read, crcs = findings.bytes_read, findings.ledger.found
    return Outcome(checksums, differing, read, crcs, grams, squares, tuple(partial))


class _Job:
    """Tasks of a kernel, and what they have in common.

    Attributes:
        kernel: What they belong to.
        dealt: The tasks.
        at_once: How many numbers a worker has in float64 at once.
        stop: Set where what is not done yet is not needed any more.
    """

    def __init__(self, kernel: Kernel, dealt: Sequence[Sequence[Item]]) -> None:
        self.kernel = kernel
        self.dealt = dealt
        self.at_once = ALONE
        self.stop = threading.Event()
        self._shared = shared(kernel.works)
        self._outputs = kernel.outputs
        self._local = threading.local()

    def records(self, number: int) -> Records:
        """Return the records of one task."""
        works = self.kernel.works
        return Records([works[n] for n in works_in([self.dealt[number]])])

    def do(self, number: int) -> Plain:
        """Do one task; return what was found."""
        with default_arithmetic():
            return self._done(number)

    def _done(self, number: int) -> Plain:
        if not hasattr(self._local, "desk"):
            self._local.desk = Desk(self.at_once)
        findings = Findings(len(self._outputs), self._shared)
        for item in self.dealt[number]:
            self._do(item, self._local.desk, findings)
        return findings.plain(self.records(number))

    def _do(self, item: Item, desk: Desk, findings: Findings) -> None:
        """Do one item, cell by cell."""
        work = self.kernel.works[item.number]
        readers = readers_of(item, self.kernel.works)
        writers = [
            writer_to(output, item, self.kernel.places, work.dtype) for output in self._outputs
        ]
        group = self.kernel.group(item.number)
        gram = Gram(len(work.sources)) if group >= 0 else None
        for cell in item.cells():
            if self.stop.is_set():
                return
            try:
                for numbers, data in self._computed(item, readers, cell, gram, desk, findings):
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

    def _computed(
        self,
        item: Item,
        readers: Sequence[Reader],
        cell: Cell | Box,
        gram: Gram | None,
        desk: Desk,
        findings: Findings,
    ) -> Iterator[tuple[Iterable[int], memoryview]]:
        """Yield the bytes of a cell, with the numbers of the outputs they are for."""
        work = self.kernel.works[item.number]
        everywhere = range(len(self._outputs))
        if work.treatment is not Treatment.AVERAGED:
            data, same = desk.without_mean(work, readers, cell)
            if not same:
                findings.differing.add(item.number)
            yield everywhere, data
        elif len(everywhere) == 1:
            yield everywhere, desk.mean(work, readers, cell, gram)
        else:
            for count, data in desk.means(work, readers, cell, gram):
                yield (count - 1,), data

    def _refuse(self, item: Item, error: NonFiniteError) -> None:
        """Raise what makes an element not finite: damage, if it is that."""
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
