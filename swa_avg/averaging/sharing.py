"""The works of several averages together, so that tensors that they share are read once."""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from swa_avg.averaging.execution import Averaging
from swa_avg.errors import MismatchError, SwaAvgError
from swa_avg.planning import Treatment, Work
from swa_avg.tensors import TensorRef


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


def shared_by(averages: Sequence[Averaging], spans: Sequence[range]) -> Shared:
    """Return the works of all windows together."""
    shared = Shared([], [[] for _ in averages], [[] for _ in averages])
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
