"""The division of the work into tasks that read about equally much, in the order of the output.

Most tensors are in C order in all inputs. They are averaged by ranges, and small ones
together, as if they were one tensor. All others, and tensors that are not averaged, are
cut into boxes. This module reads nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from swa_avg.planning import Treatment, Work
from swa_avg.tensors import Box, TensorRef, boxes, contiguous_stride, whole

# The maximum and the minimum of elements averaged at once. Between them the bytes of all inputs
# decide. Large chunks make threads contend for the GIL less often.
CHUNK = 256 * 1024
_LEAST_CHUNK = 4096
_CHUNK_BYTES = 2 * 1024 * 1024  # of one chunk, in all inputs together
_CHUNKS_BYTES = 48 * 1024 * 1024  # of the chunks of all threads together
_LEAST_CHUNK_BYTES = 1024 * 1024
_STRIDED = 2  # the factor for chunks whose inputs are in another order than the output
_TOGETHER = 256  # small works in a bundle: one read has up to 1024 pieces, including gaps
_TASK_BYTES = 64 * 1024 * 1024  # of one task, in all inputs together
_LEAST_TASK_BYTES = 4 * 1024 * 1024
_TASKS = 16  # tasks for each thread, so that all threads finish at about the same time


@dataclass(frozen=True, slots=True)
class Cell:
    """Consecutive elements that are averaged at once."""

    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Strip:
    """Consecutive elements of one averaged work whose inputs are all in C order."""

    number: int
    start: int
    numel: int
    chunk: int

    def number_at(self, element: int) -> int:
        """Return the number of the work to which an element of a cell belongs."""
        return self.number

    def cells(self) -> Iterator[Cell]:
        """Yield the chunks."""
        end = self.start + self.numel
        for at in range(self.start, end, self.chunk):
            yield Cell(at, min(self.chunk, end - at))


@dataclass(frozen=True, slots=True)
class Bundle:
    """Small works with the same treatment, averaged as if they were one work."""

    numbers: tuple[int, ...]
    bounds: tuple[int, ...]  # the first element of each work, and the end of the last one

    @property
    def number(self) -> int:
        """The number of the first work, which represents all."""
        return self.numbers[0]

    def number_at(self, element: int) -> int:
        """Return the number of the work to which an element of the cell belongs."""
        return self.numbers[bisect_right(self.bounds, element) - 1]

    def cells(self) -> Iterator[Cell]:
        """Yield the only chunk."""
        yield Cell(0, self.bounds[-1])


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive boxes of one work."""

    number: int
    boxes: tuple[Box, ...]
    start: int  # the first element, counted in C order of the work's shape
    steps: tuple[int, ...]  # the strides of the shape that was cut into boxes

    def number_at(self, element: int) -> int:
        """Return the number of the work to which an element of a cell belongs."""
        return self.number

    def cells(self) -> Iterator[Box]:
        """Yield the boxes."""
        yield from self.boxes


Item = Strip | Bundle | Stretch


@dataclass(frozen=True, slots=True)
class Chunking:
    """Limits on the elements averaged at once.

    Attributes:
        elements: The maximum number of elements.
        bytes: The maximum of bytes in all inputs together, unless that is less than the
            minimum of elements.
    """

    elements: int
    bytes: int

    @classmethod
    def for_threads(cls, threads: int, elements: int = CHUNK) -> Chunking:
        """Return the limits for a number of threads."""
        share = _CHUNKS_BYTES // threads
        return cls(elements, max(_LEAST_CHUNK_BYTES, min(_CHUNK_BYTES, share)))

    def of(self, work: Work, *, flat: bool) -> int:
        """Return how many elements of a work are averaged at once.

        Args:
            work: The work.
            flat: Whether its inputs are in C order. If not, larger boxes are faster to read.
        """
        fitting = self.bytes // _bytes_each(work)
        if flat:
            return min(self.elements, max(_LEAST_CHUNK, fitting))
        return min(8 * self.elements, max(_LEAST_CHUNK, _STRIDED * fitting))


def buffer_bytes(works: Sequence[Work], threads: int) -> int:
    """Return the maximum size of all threads' buffers, which grows with the number of inputs.

    Each thread holds one chunk of all inputs and of the output.
    """
    chunking = Chunking.for_threads(threads)
    most = 0
    for work in works:
        flat = _in_order(work.sources)
        numel = min(math.prod(work.shape), chunking.of(work, flat=flat))
        most = max(most, numel * (_bytes_each(work) + work.dtype.itemsize))
    return threads * most


def tasks(
    works: Sequence[Work], groups: Sequence[int], chunking: Chunking, threads: int
) -> Iterator[list[Item]]:
    """Divide works into tasks, several for each thread.

    Args:
        works: The works.
        groups: For each work the group whose inner products it adds to, or -1.
        chunking: The limits on the elements averaged at once.
        threads: The number of threads.
    """
    total = sum(math.prod(work.shape) * _bytes_each(work) for work in works)
    enough = min(_TASK_BYTES, max(_LEAST_TASK_BYTES, total // (_TASKS * threads)))
    task: list[Item] = []
    weight = 0
    for item, cost in _items(works, groups, chunking, enough):
        task.append(item)
        weight += cost
        if weight >= enough:
            yield task
            task, weight = [], 0
    if task:
        yield task


def share(
    task_list: Sequence[Sequence[Item]], works: Sequence[Work], number: int, count: int
) -> list[Sequence[Item]]:
    """Return one rank's share of the tasks: consecutive tasks, about equal in bytes.

    Args:
        task_list: All tasks, the same for every rank.
        works: The works of the tasks.
        number: The number of the rank, counted from 0.
        count: The number of ranks.
    """
    costs = [sum(_cost(item, works) for item in task) for task in task_list]
    total = sum(costs) or 1
    # A task belongs to the rank whose share contains the middle of the task.
    owners = (
        (2 * end - cost) * count // (2 * total)
        for end, cost in zip(accumulate(costs), costs, strict=True)
    )
    return [task for task, owner in zip(task_list, owners, strict=True) if owner == number]


def bytes_read(task_list: Iterable[Sequence[Item]], works: Sequence[Work]) -> int:
    """Return how many bytes tasks read."""
    return sum(_cost(item, works) for task in task_list for item in task)


def works_in(task_list: Iterable[Sequence[Item]]) -> list[int]:
    """Return the numbers of the works in some tasks, in order."""
    items = (item for task in task_list for item in task)
    each = (item.numbers if isinstance(item, Bundle) else (item.number,) for item in items)
    return list(dict.fromkeys(chain.from_iterable(each)))


def _cost(item: Item, works: Sequence[Work]) -> int:
    """Return how many bytes an item reads."""
    if isinstance(item, Strip):
        numel = item.numel
    elif isinstance(item, Bundle):
        numel = item.bounds[-1]
    else:
        numel = sum(box.numel for box in item.boxes)
    return numel * _bytes_each(works[item.number])


def _bytes_each(work: Work) -> int:
    return sum(source.dtype.itemsize for source in work.sources) or work.dtype.itemsize


def _items(
    works: Sequence[Work], groups: Sequence[int], chunking: Chunking, enough: int
) -> Iterator[tuple[Item, int]]:
    """Yield items and the bytes that they read; small works are collected into bundles."""
    waiting: list[int] = []
    bounds = [0]
    for number, work in enumerate(works):
        numel, each = math.prod(work.shape), _bytes_each(work)
        flat = _in_order(work.sources)
        most = chunking.of(work, flat=flat)
        if not (work.treatment is Treatment.AVERAGED and flat and numel):
            yield from _stretches(number, work, flat, most, max(1, enough // each))
        elif numel > most // 2:
            step = max(most, enough // each // most * most)
            for start in range(0, numel, step):
                size = min(step, numel - start)
                yield Strip(number, start, size, most), size * each
        else:
            full = bounds[-1] + numel > most or len(waiting) == _TOGETHER
            if waiting and (full or not _alike(number, waiting[0], works, groups)):
                yield Bundle(tuple(waiting), tuple(bounds)), bounds[-1] * each
                waiting, bounds = [], [0]
            waiting.append(number)
            bounds.append(bounds[-1] + numel)
    if waiting:
        yield Bundle(tuple(waiting), tuple(bounds)), bounds[-1] * _bytes_each(works[waiting[0]])


def _in_order(sources: Sequence[TensorRef]) -> bool:
    """Return whether all inputs are in C order, so that ranges of them can be read."""
    if not sources:
        return True
    stride = sources[-1].stride
    if whole(sources[-1]) and all(ref.stride == stride and not ref.parts for ref in sources):
        return True
    return all(map(whole, sources))


def _alike(a: int, b: int, works: Sequence[Work], groups: Sequence[int]) -> bool:
    """Return whether two averaged works can be in one bundle."""
    one, other = works[a], works[b]
    return (
        groups[a] == groups[b]
        and one.dtype is other.dtype
        and one.weights == other.weights
        and len(one.sources) == len(other.sources)
        and all(x.dtype is y.dtype for x, y in zip(one.sources, other.sources, strict=True))
    )


def _stretches(
    number: int, work: Work, flat: bool, most: int, enough: int
) -> Iterator[tuple[Stretch, int]]:
    """Cut a work into boxes of at most `most` elements, in items of about `enough` elements.

    Inputs in C order are cut as if they had one dimension.
    """
    shape = (math.prod(work.shape),) if flat else work.shape
    steps = contiguous_stride(shape)
    each = _bytes_each(work)
    collected: list[Box] = []
    start = place = 0
    for box in boxes(shape, most):
        collected.append(box)
        place += box.numel
        if place - start >= enough:
            yield Stretch(number, tuple(collected), start, steps), (place - start) * each
            collected, start = [], place
    if collected:
        yield Stretch(number, tuple(collected), start, steps), (place - start) * each
