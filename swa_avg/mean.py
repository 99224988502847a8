"""The kernel: the byte ranges of N inputs in, one range of the output out.

The works are cut into cells that stay in the processor's cache. For a cell the
same range of every input is read in turn into one buffer and added up; the mean
is written to the place that the output has for it. Threads take tasks of many
cells. Memory does not grow with the model or with the number of checkpoints.
Knows no format.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from swa_avg.checksums import combined, verify
from swa_avg.cutting import CHUNK, Cell, Item, tasks
from swa_avg.desk import Desk
from swa_avg.errors import NotFiniteError
from swa_avg.findings import Findings
from swa_avg.gather import Box
from swa_avg.grams import Gram
from swa_avg.lookahead import LookAhead
from swa_avg.output import Output
from swa_avg.plan import Treatment, Work
from swa_avg.reading import Reader, readers_of
from swa_avg.rounding import NonFiniteError
from swa_avg.tensors import Kind, Record
from swa_avg.writing import writer_to

_T = TypeVar("_T")
Progress = Callable[[int], None]

_CHECKS = 1024  # checksums that are compared in one task
_TORCH_THREADS = threading.Lock()


@dataclass(frozen=True)
class Kernel:
    """What all tasks share.

    Attributes:
        output: The file that is written.
        places: Where each work's bytes begin in it.
        works: What is computed.
        chunk: How many elements are averaged at once.
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
        return list(tasks(self.works, groups, self.chunk, threads))

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
        crcs: The CRC-32 of every record that an averaged work read, whole, whether the
            file records one or not. Equal length and CRC: the same bytes, but for one
            chance in 2^32.
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
    grams: Mapping[int, torch.Tensor] = field(default_factory=dict)
    squares: Mapping[int, float] = field(default_factory=dict)
    partial_checksums: tuple[tuple[int, ...], ...] = ()


def run(kernel: Kernel, threads: int, progress: Progress | None = None) -> Outcome:
    """Compute all works and write them.

    Args:
        kernel: What to do.
        threads: How many threads do it.
        progress: Called in the calling thread with the bytes read since the last call.

    Raises:
        SwaAvgError: The first problem, in the order of the tasks, that any of them met.
    """
    return settle(kernel, compute(kernel, kernel.tasks(threads), threads, progress), threads)


def compute(
    kernel: Kernel,
    dealt: Sequence[Sequence[Item]],
    threads: int,
    progress: Progress | None = None,
) -> Findings:
    """Do tasks: all of a kernel, or of several processes' one's part.

    Args:
        kernel: What they belong to.
        dealt: The tasks.
        threads: How many threads do them.
        progress: Called in the calling thread with the bytes read since the last call.

    Returns:
        What was found; `settle` makes sure of it, once all tasks are done.

    Raises:
        SwaAvgError: The first problem, in the order of the tasks, that any of them met.
    """
    job = _Job(kernel)
    with (
        _one_torch_thread(),
        LookAhead(dealt, kernel.works, threads) as ahead,
        ThreadPoolExecutor(threads, "swa-avg") as pool,
    ):

        def do(number: int) -> int:
            count = job.do(dealt[number])
            ahead.done(number)
            return count

        submitted = [pool.submit(do, number) for number in range(len(dealt))]
        try:
            for count in _results(submitted):
                job.findings.bytes_read += count
                if progress:
                    progress(count)
        except BaseException:
            job.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return job.findings


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

    def check(records: Sequence[Record]) -> None:
        for record in records:
            ledger.check(record)

    left = ledger.open
    parts = [left[at : at + _CHECKS] for at in range(0, len(left), _CHECKS)]
    with ThreadPoolExecutor(threads, "swa-avg") as pool:
        try:
            for _ in _results([pool.submit(check, records) for records in parts]):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return _outcome(kernel, findings)


def _outcome(kernel: Kernel, findings: Findings) -> Outcome:
    *partial, checksums = (tuple(map(combined, pieces)) for pieces in findings.written)
    differing = tuple(kernel.works[number].name for number in sorted(findings.differing))
    grams = {group: gram.products for group, gram in sorted(findings.grams.items())}
    squares = {group: gram.square for group, gram in sorted(findings.grams.items())}
    crcs = {
        record: findings.ledger.found[record]
        for work in kernel.works
        if work.treatment is Treatment.AVERAGED
        for source in work.sources
        for record in source.records
    }
    return Outcome(checksums, differing, findings.bytes_read, crcs, grams, squares, tuple(partial))


def _results(futures: Sequence[Future[_T]]) -> Iterator[_T]:
    """Yield results as they come; raise the error of the earliest task that has one."""
    for done in as_completed(futures):
        if done.exception():
            # An earlier task may be about to fail too: which error is shown must not be chance.
            for future in futures:
                future.result()
        yield done.result()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep torch from splitting our small operations: our threads are the parallelism.

    The setting is the process's: of two averages at once the second waits.
    """
    with _TORCH_THREADS:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class _Job:
    """One run of a kernel: its tasks and what they have in common."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.findings = Findings(kernel.works, len(kernel.outputs))
        self.stop = threading.Event()
        self._outputs = kernel.outputs
        self._local = threading.local()

    def do(self, task: Sequence[Item]) -> int:
        """Do one task; return how many bytes it read."""
        if not hasattr(self._local, "desk"):
            self._local.desk = Desk(self.kernel.chunk)
        return sum(self._do(item, self._local.desk) for item in task)

    def _do(self, item: Item, desk: Desk) -> int:
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
                return 0
            try:
                for numbers, data in self._compute(item, readers, cell, gram, desk):
                    for number in numbers:
                        writers[number].write(data)
            except NonFiniteError as error:
                self._refuse(item, error)
        for writer, written in zip(writers, self.findings.written, strict=True):
            for number, piece in writer.pieces():
                written[number].append(piece)
        if gram is not None:
            self.findings.add_gram(group, gram)
        return sum(reader.close(self.findings.ledger) for reader in readers)

    def _compute(
        self,
        item: Item,
        readers: Sequence[Reader],
        cell: Cell | Box,
        gram: Gram | None,
        desk: Desk,
    ) -> Iterator[tuple[Iterable[int], memoryview]]:
        """Yield the bytes of a cell, with the numbers of the outputs they are for."""
        work = self.kernel.works[item.number]
        everywhere = range(len(self._outputs))
        if work.treatment is not Treatment.AVERAGED:
            data, same = desk.without_mean(work, readers, cell)
            if not same:
                self.findings.differing.add(item.number)
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
