"""The works of several averages together, so that tensors that they share are read once."""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from swa_avg.averaging.execution import Averaging
from swa_avg.errors import MismatchError, SwaAvgError
from swa_avg.planning import Treatment, Work
from swa_avg.tensors import TensorRef

# The name of a work, and its number among the works of this name.
_Key = tuple[str, int]


@dataclass(frozen=True)
class Shared:
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
class _Window:
    """One window, with the works of its own plan.

    Attributes:
        average: The planned average.
        span: The numbers of its checkpoints.
        numbers: The number of each work in its plan.
        of_first: The names of tensors that it takes from its first checkpoint.
    """

    average: Averaging
    span: range
    numbers: Mapping[_Key, int]
    of_first: Collection[str]

    @classmethod
    def of(cls, average: Averaging, span: range) -> _Window:
        """Return the window of a planned average."""
        numbers = {key: number for number, key in enumerate(_keys(average.plan.works))}
        of_first = {tensor.name for tensor in average.plan.tensors if tensor.of_first}
        return cls(average, span, numbers, of_first)

    def work(self, key: _Key, like: Work) -> Work:
        """Return a work of the plan, after comparing it with that of the last window.

        Raises:
            MismatchError: The tensor is stored in another way than in the last window.
        """
        number = self.numbers.get(key)
        work = None if number is None else self.average.plan.works[number]
        if work is None or _described(work) != _described(like):
            raise MismatchError([_unlike(like.name, self.average)])
        return work

    def inputs(self, work: Work) -> list[int]:
        """Return the numbers of the checkpoints that the sources of a work belong to."""
        ordered = [*self.span]
        if work.name in self.of_first:
            ordered.reverse()
        return ordered[len(ordered) - len(work.sources) :]


def shared_by(averages: Sequence[Averaging], spans: Sequence[range]) -> Shared:
    """Return the works of all windows together.

    Args:
        averages: The planned average of each window.
        spans: The numbers of the checkpoints of each window.

    Raises:
        MismatchError: A tensor is not stored in the same way in all checkpoints.
    """
    windows = [_Window.of(*pair) for pair in zip(averages, spans, strict=True)]
    shared = Shared([], [[] for _ in windows], [[] for _ in windows])
    works = averages[-1].plan.works
    for key, like in zip(_keys(works), works, strict=True):
        sources: dict[int, TensorRef] = {}  # by the number of the checkpoint
        taken: list[list[int]] = []
        for window, numbers in zip(windows, shared.numbers, strict=True):
            work = window.work(key, like)
            taken.append(window.inputs(work))
            pairs = zip(taken[-1], work.sources, strict=True)
            same = all(sources.setdefault(number, source) == source for number, source in pairs)
            if not same or len(window.numbers) != len(works):
                raise MismatchError([_unlike(like.name, window.average)])
            numbers.append(window.numbers[key])
        order = {number: row for row, number in enumerate(sorted(sources))}
        shared.works.append(replace(like, sources=tuple(sources[number] for number in order)))
        for rows, inputs in zip(shared.rows, taken, strict=True):
            rows.append(tuple(order[number] for number in inputs))
    return shared


def _keys(works: Sequence[Work]) -> list[_Key]:
    """Return the name of each work, numbered: a tensor written in parts has several works."""
    seen: Counted[str] = Counted()
    keys: list[_Key] = []
    for work in works:
        keys.append((work.name, seen[work.name]))
        seen[work.name] += 1
    return keys


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
