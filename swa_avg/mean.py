"""The kernel: the byte ranges of N inputs in, one range of the output out.

Each storage of the output is cut into chunks that stay in the processor's
cache. For a chunk the same range of every input is read in turn into one
buffer and added up; the mean is written to the place that the output has for
it. Threads take batches of chunks. Memory does not grow with the model or
with the number of checkpoints. Knows no format.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from typing import TypeVar

import torch
from zlib_ng.zlib_ng import crc32

from swa_avg.checksums import Ledger, Piece, combined, verify
from swa_avg.errors import NotFiniteError
from swa_avg.exact import BITS, Averager, NonFiniteError, cast_into
from swa_avg.gather import Box, boxes, read_box, whole
from swa_avg.output import Output
from swa_avg.plan import Treatment, Work
from swa_avg.tensors import DTYPES, DType, Kind, Record, TensorRef, contiguous_stride

_T = TypeVar("_T")
Progress = Callable[[int], None]

CHUNK = 128 * 1024  # elements: they and their float64 sums stay in the processor's cache
_STRIDED = 8  # times as many where inputs lie in another order than the output
_WIDEST = max(dtype.itemsize for dtype in DTYPES.values())
_WORTH_ANNOUNCING = 1024 * 1024  # bytes of one input
_LEAST_BATCH_BYTES = 4 * 1024 * 1024
_CHECKS = 1024  # checksums that are compared in one task
_TORCH_THREADS = threading.Lock()
_BATCH_BYTES = 256 * 1024 * 1024  # of all inputs together: what one task reads
_PARTS = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


@dataclass(frozen=True)
class Kernel:
    """What all tasks share.

    Attributes:
        output: The file that is written.
        places: Where each work's bytes begin in it.
        works: What is computed.
        chunk: How many elements are averaged at once.
    """

    output: Output
    places: Sequence[int]
    works: Sequence[Work]
    chunk: int = CHUNK


@dataclass(frozen=True)
class Outcome:
    """What was found while averaging.

    Attributes:
        checksums: The CRC-32 of each storage as written.
        differing: Names of copied tensors that are not the same in all inputs.
        bytes_read: Bytes read from all inputs.
    """

    checksums: tuple[int, ...]
    differing: tuple[str, ...]
    bytes_read: int


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Consecutive boxes of one work: what a task does of it."""

    number: int
    boxes: tuple[Box, ...]
    start: int  # the first element, counted in C order of the work's shape
    steps: tuple[int, ...]  # between neighbours in the shape that was cut into boxes


def run(kernel: Kernel, threads: int, progress: Progress | None = None) -> Outcome:
    """Compute all works and write them.

    Args:
        kernel: What to do.
        threads: How many threads do it.
        progress: Called in the calling thread with the bytes read since the last call.

    Raises:
        SwaAvgError: The first problem, in the order of the output, that any task met.
    """
    job = _Job(kernel)
    for work in kernel.works:
        for source in work.sources:
            for record in source.records:
                job.ledger.expect(record, work.name)
    read = 0
    with _one_torch_thread(), ThreadPoolExecutor(threads, "swa-avg") as pool:
        tasks = [pool.submit(job.do, batch) for batch in _batches(kernel, threads)]
        try:
            for count in _results(tasks):
                read += count
                if progress:
                    progress(count)
            records = job.ledger.records
            for _ in _results(
                [
                    pool.submit(job.check, records[at : at + _CHECKS])
                    for at in range(0, len(records), _CHECKS)
                ]
            ):
                pass
        except BaseException:
            job.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    checksums = tuple(combined(job.written[number]) for number in range(len(kernel.works)))
    differing = tuple(kernel.works[number].name for number in sorted(job.differing))
    return Outcome(checksums, differing, read)


def _results(tasks: Sequence[Future[_T]]) -> Iterator[_T]:
    """Yield results as they come; raise the error of the earliest task that has one."""
    for done in as_completed(tasks):
        if done.exception():
            # An earlier task may be about to fail too: which error is shown must not be chance.
            for task in tasks:
                task.result()
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


def _batches(kernel: Kernel, threads: int) -> Iterator[list[_Stretch]]:
    """Deal the works out into tasks of about equal reading, a few for each thread."""
    total = sum(source.nbytes for work in kernel.works for source in work.sources)
    enough = min(_BATCH_BYTES, max(_LEAST_BATCH_BYTES, total // (4 * threads)))
    batch: list[_Stretch] = []
    weight = 0
    for number, work in enumerate(kernel.works):
        # All inputs in C order are cut as if they had one dimension. Another order is read
        # in short runs: longer ones in larger boxes.
        flat = all(map(whole, work.sources))
        shape = (math.prod(work.shape),) if flat else work.shape
        most = kernel.chunk if flat else _STRIDED * kernel.chunk
        steps = contiguous_stride(shape)
        itemsize = max([work.dtype.itemsize, *(ref.dtype.itemsize for ref in work.sources)])
        each = itemsize * max(len(work.sources), 1)
        collected: list[Box] = []
        start = place = 0
        for box in boxes(shape, most):
            collected.append(box)
            place += box.numel
            weight += box.numel * each
            if weight >= enough:
                yield [*batch, _Stretch(number, tuple(collected), start, steps)]
                batch, collected, start, weight = [], [], place, 0
        if collected:
            batch.append(_Stretch(number, tuple(collected), start, steps))
    if batch:
        yield batch


class _Job:
    """One run of a kernel: its tasks and what they have in common."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.ledger = Ledger()
        self.stop = threading.Event()
        self.written: list[list[Piece]] = [[] for _ in kernel.works]
        self.differing: set[int] = set()
        self._local = threading.local()

    def check(self, records: Sequence[Record]) -> None:
        """Compare the checksums of some records with those of what was read."""
        for record in records:
            self.ledger.check(record)

    def do(self, batch: list[_Stretch]) -> int:
        """Do one task; return how many bytes it read."""
        if not hasattr(self._local, "desk"):
            self._local.desk = _Desk(self.kernel.chunk)
        return sum(self._average(stretch, self._local.desk) for stretch in batch)

    def _average(self, stretch: _Stretch, desk: _Desk) -> int:
        """Do a stretch of one work, chunk by chunk."""
        work = self.kernel.works[stretch.number]
        readers = [_Reader(source, stretch.steps) for source in work.sources]
        for reader in readers:
            reader.announce(stretch.start, sum(box.numel for box in stretch.boxes))
        itemsize = work.dtype.itemsize
        crc, place = 0, stretch.start * itemsize
        for box in stretch.boxes:
            if self.stop.is_set():
                break
            try:
                data, same = desk.compute(work, readers, box)
            except NonFiniteError as error:
                self._refuse(work, error)
            if not same:
                self.differing.add(stretch.number)
            self.kernel.output.write(data, self.kernel.places[stretch.number] + place)
            crc = crc32(data, crc)
            place += len(data)
        first = stretch.start * itemsize
        self.written[stretch.number].append(Piece(first, place - first, crc))
        for reader in readers:
            for record, piece in reader.pieces.items():
                self.ledger.add(record, piece)
        return sum(reader.bytes_read for reader in readers)

    def _refuse(self, work: Work, error: NonFiniteError) -> None:
        """Raise what makes an element not finite: damage, if it is that."""
        if error.source is None:
            raise NotFiniteError(
                f"has {error.value:g}, which {work.dtype} cannot hold",
                tensor=work.name,
                remedy="Choose a wider --dtype",
            ) from error
        source = work.sources[error.source]
        verify((record, work.name) for record in source.records)
        raise NotFiniteError(
            f"has {error.value:g}",
            file=source.record.file.path,
            tensor=work.name,
            expected="finite numbers, or the same in every checkpoint",
            remedy="Leave this checkpoint out",
        ) from error


class _Reader:
    """Reads one input of one stretch, box after box, and keeps its checksums."""

    def __init__(self, source: TensorRef, steps: tuple[int, ...]) -> None:
        self.source = source
        # Strides of the boxes' shape, where ranges can be read; None where boxes must be.
        self.steps = steps if whole(source) else None
        self.bytes_read = 0
        self.pieces: dict[Record, Piece] = {}

    def announce(self, start: int, count: int) -> None:
        """Tell the kernel which elements will be read: of a cold disk it reads all inputs ahead."""
        itemsize = self.source.dtype.itemsize
        if self.steps is not None and count * itemsize >= _WORTH_ANNOUNCING:
            place = self.source.record.offset + (self.source.offset + start) * itemsize
            self.source.record.file.will_read(place, count * itemsize)

    def read(self, box: Box, buffer: memoryview) -> torch.Tensor:
        """Read a box into `buffer`; return its elements, one-dimensional."""
        dtype = _carrier(self.source.dtype)
        count = box.numel * self.source.dtype.itemsize
        into = buffer[:count]
        values = torch.frombuffer(into, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        if self.steps is None:
            self.bytes_read += read_box(self.source, box, values.view(box.shape), self._seen)
            return values
        first = sum(at * step for at, step in zip(box.start, self.steps, strict=True))
        at = (self.source.offset + first) * self.source.dtype.itemsize
        self.source.record.file.read_into(into, self.source.record.offset + at)
        self._seen(self.source.record, at, into)
        self.bytes_read += count
        return values

    def _seen(self, record: Record, start: int, data: memoryview) -> None:
        """Take what was read into the checksum, unless it was read before."""
        if record.crc32 is None:
            return
        piece = self.pieces.get(record, Piece(start, 0, 0))
        if start == piece.start + piece.length:
            crc = crc32(data, piece.crc)
            self.pieces[record] = Piece(piece.start, piece.length + len(data), crc)


class _Desk:
    """The buffers of one thread."""

    def __init__(self, chunk: int) -> None:
        # Room for the largest boxes; what they do not need is never touched, nor taken.
        most = _STRIDED * chunk
        self._in = memoryview(mmap(-1, most * _WIDEST))
        self._out = memoryview(mmap(-1, most * _WIDEST))
        self._averager = Averager(2 * most)  # complex numbers are two each

    def compute(self, work: Work, readers: Sequence[_Reader], box: Box) -> tuple[memoryview, bool]:
        """Return the bytes of one box of the output, and whether all inputs had the same."""
        count = box.numel * work.dtype.itemsize
        data = self._out[:count]
        if not count:
            return data, True
        out = torch.frombuffer(data, dtype=_carrier(work.dtype))
        if work.treatment is Treatment.RESET:
            out.fill_(work.fill)
        elif work.treatment is Treatment.AVERAGED:
            self._average(work, readers, box, out)
        elif work.treatment is Treatment.KEPT:
            self._convert(readers[-1].read(box, self._in), work, readers[-1], out)
        else:
            return data, self._copy(readers, box, out)
        return data, True

    def _average(self, work: Work, readers: Sequence[_Reader], box: Box, out: torch.Tensor) -> None:
        def chunks() -> Iterable[torch.Tensor]:
            return (_parts(reader.read(box, self._in), reader.source.dtype) for reader in readers)

        dtype = DTYPES[_PARTS.get(work.dtype.name, work.dtype.name)]
        self._averager.mean_into(chunks, len(readers), _parts(out, work.dtype), dtype)

    def _convert(
        self, values: torch.Tensor, work: Work, reader: _Reader, out: torch.Tensor
    ) -> None:
        if reader.source.dtype == work.dtype:
            out.copy_(values)
        else:
            cast_into(values, out, work.dtype)

    def _copy(self, readers: Sequence[_Reader], box: Box, out: torch.Tensor) -> bool:
        out.copy_(readers[-1].read(box, self._in))
        same = True
        for reader in readers[:-1]:  # each is read to its end, for its checksum
            same &= torch.equal(reader.read(box, self._in), out)
        return same


def _parts(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Return complex numbers as twice as many real ones."""
    part = _PARTS.get(dtype.name)
    return values.view(getattr(torch, part)) if part else values


def _carrier(dtype: DType) -> torch.dtype:
    """Return the torch dtype in which elements travel: bits where there is no arithmetic."""
    # complex32 is bits too: torch warns of every tensor of it.
    if dtype.kind in (Kind.EXACT, Kind.OPAQUE) or dtype.name == "complex32":
        return BITS[dtype.itemsize]
    made = getattr(torch, dtype.name)
    assert isinstance(made, torch.dtype)
    return made
