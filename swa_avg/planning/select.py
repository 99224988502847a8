"""Which of the given checkpoints take part, and in which order."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from swa_avg.checkpoints import Number, Score, StateDict, metrics
from swa_avg.errors import SelectionError, listed
from swa_avg.planning import series
from swa_avg.planning.copies import copies
from swa_avg.planning.inputs import exclusion
from swa_avg.planning.order import Member, measured, members, ordered


@dataclass(frozen=True)
class Choice:
    """Which checkpoints are wanted of those that are given; by default all.

    Attributes:
        last: So many of the latest, of those that the rest leaves.
        epochs: `A:B` or `A:B:STEP`, both ends in, each of them optional: epochs as the
            checkpoints or their names say them, else steps, else the numbers in their names.
        best: So many of the best by `metric`.
        metric: The metric's name.
        mode: Whether it should be small (min) or large (max); needed where its name,
            unlike that of a loss or an accuracy, does not tell.
        exclude: Patterns of paths or names that are left out, unopened.

    Raises:
        ValueError: There is no such choice.
    """

    last: int | None = None
    epochs: str | None = None
    best: int | None = None
    metric: str | None = None
    mode: str | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, count in (("last", self.last), ("best", self.best)):
            if count is not None and count < 1:
                raise ValueError(f"{name} {count}: at least one checkpoint must be wanted")
        if self.epochs is not None:
            _Span.parse(self.epochs)
        if (self.best is None) != (self.metric is None) or (self.mode and not self.metric):
            raise ValueError("best, metric and mode go together: best 5 by metric val_loss")
        if self.mode not in (None, *metrics.MODES):
            raise ValueError(f"mode {self.mode}: it is min or max")
        if self.metric is not None and self.better is None:
            raise ValueError(f"is a small or a large {self.metric} good? Give the mode, min or max")

    @property
    def better(self) -> str | None:
        """Whether a small or a large metric is good (min or max), if that is known."""
        return self.mode or metrics.mode_of(self.metric or "")


ALL = Choice()


@dataclass(frozen=True)
class _Span:
    """The numbers `first`, `first + step`, … up to `last`, which is in."""

    first: int
    last: int | None
    step: int

    @classmethod
    def parse(cls, text: str) -> _Span:
        parts = re.fullmatch(r"(\d*):(\d*)(?::(\d+))?", text)
        if not parts:
            raise ValueError(f"epochs {text}: they are A:B or A:B:STEP, as in 10:20 or 10:")
        span = cls(int(parts[1] or 0), int(parts[2]) if parts[2] else None, int(parts[3] or 1))
        if span.step < 1 or (span.last is not None and span.last < span.first):
            raise ValueError(f"epochs {text}: there are none from A to B by STEP")
        return span

    def __contains__(self, number: Number) -> bool:
        upper = number if self.last is None else self.last
        return self.first <= number <= upper and (number - self.first) % self.step == 0


@dataclass(frozen=True)
class Selection:
    """The checkpoints that are averaged, in their order.

    Attributes:
        chosen: The checkpoints, the earliest first.
        scores: The metric of each of them, by path, if they were chosen by one.
        notes: What the user should know: what was named twice, what was passed over.
    """

    chosen: tuple[StateDict, ...]
    scores: Mapping[Path, Score] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def select(
    candidates: Sequence[StateDict], choice: Choice = ALL, by_sample: bool = False
) -> Selection:
    """Put checkpoints into order, count none of them twice, and take those that are wanted.

    What is no checkpoint of the run is left out and said, or refused: see `series`.

    Args:
        candidates: The checkpoints.
        choice: Which of them are wanted.
        by_sample: Tell copies without checksums by a sample of their bytes.

    Raises:
        SelectionError: That leaves none, or a checkpoint lacks what it is chosen by.
        MismatchError: They cannot be of one run.
    """
    notes: list[str] = []
    given = series.without_averages(members(candidates), notes)
    series.refuse_parts(given)
    series.refuse_components(given)
    chosen = _distinct(ordered(given), notes, by_sample)
    series.refuse_mixed(chosen)
    scores: dict[Path, Score] = {}
    if choice.epochs is not None:
        chosen = _of_epochs(chosen, choice.epochs, notes)
    if choice.best is not None and choice.metric is not None:
        scores = _scored(chosen, choice.metric)
        chosen = _best(chosen, scores, choice, notes)
    if choice.last is not None:
        _say_if_few(chosen, choice.last, "last", notes)
        chosen = chosen[-choice.last :]
    return Selection(
        tuple(member.state for member in chosen),
        {member.path: scores[member.path] for member in chosen if member.path in scores},
        (*notes, *series.notes_on(chosen)),
    )


def _distinct(ordered: Sequence[Member], notes: list[str], by_sample: bool) -> list[Member]:
    """Return each checkpoint once, and note which were there twice.

    Of several that one counts whose name tells its place as the others' names do: of
    `best.pt` and `epoch_3.pt` only the latter does.
    """
    usual = Counter(member.name.series for member in ordered)
    preferred = sorted(
        ordered,
        key=lambda member: (not member.name.is_placed, -usual[member.name.series]),
    )
    repeats = {
        id(state): f"{state.checkpoint.path}: {why} {counted.checkpoint.path}; counted once"
        for state, counted, why in copies([member.state for member in preferred], by_sample)
    }
    notes += [repeats[id(m.state)] for m in ordered if id(m.state) in repeats]
    return [member for member in ordered if id(member.state) not in repeats]


def _of_epochs(given: list[Member], text: str, notes: list[str]) -> list[Member]:
    """Return the checkpoints of a span of epochs."""
    span = _Span.parse(text)
    what, numbers = measured(given)
    numbered = [(m, n) for m, n in zip(given, numbers, strict=True) if n is not None]
    chosen = [member for member, number in numbered if number in span]
    if not chosen:
        there = listed([str(number) for _, number in numbered], 8)
        raise SelectionError(
            f"--epochs {text} leaves no checkpoint",
            expected=f"some of those that there are, by {what}: {there or 'none'}",
        )
    notes += [
        f"{member.path}: has no {what if member.is_placed else 'number in its name'}; "
        "left out by --epochs"
        for member, number in zip(given, numbers, strict=True)
        if number is None
    ]
    if what == "step":
        notes.append(f"--epochs {text} is by step: the checkpoints do not say their epochs")
    return chosen


def _scored(given: Sequence[Member], metric: str) -> dict[Path, Score]:
    """Return the metric of each checkpoint, recorded in the same place for all."""
    found = [metrics.scores(member.state.checkpoint, metric) for member in given]
    lacking = [member for member, scores in zip(given, found, strict=True) if not scores]
    if lacking:
        path = lacking[0].path
        rest = [member.path for member in given if member not in lacking]
        option = exclusion([member.path for member in lacking], rest) if rest else ""
        remedy = f"Looked at {metrics.looked_at(lacking[0].state.checkpoint)}"
        remedy += f"; {option} leaves {'it' if len(lacking) == 1 else 'all such'} out" * bool(
            option
        )
        raise SelectionError(f"records no {metric}", file=path, remedy=remedy)
    for where in found[0]:
        if all(where in scores for scores in found):
            return {m.path: scores[where] for m, scores in zip(given, found, strict=True)}
    first = next(iter(found[0]))
    lacks = next(m for m, scores in zip(given, found, strict=True) if first not in scores)
    raise SelectionError(
        f"records {metric} elsewhere than {given[0].path} ({first})",
        file=lacks.path,
        remedy="Only what all record in the same place can be compared",
    )


def _best(
    given: list[Member], scores: Mapping[Path, Score], choice: Choice, notes: list[str]
) -> list[Member]:
    """Return the best checkpoints in their order; of equal ones the later."""
    values = [scores[member.path].value for member in given]
    finite = [number for number, value in enumerate(values) if math.isfinite(value)]
    if not finite:
        raise SelectionError(f"--best finds no checkpoint whose {choice.metric} is a finite number")
    notes += [
        f"{member.path}: its {choice.metric} is {value}; not among the best"
        for member, value in zip(given, values, strict=True)
        if not math.isfinite(value)
    ]
    sign = 1 if choice.better == "max" else -1
    ranked = sorted(finite, key=lambda number: (sign * values[number], number))
    _say_if_few(ranked, choice.best or 0, "best", notes)
    return [given[number] for number in sorted(ranked[-(choice.best or 0) :])]


def _say_if_few(there: Sequence[object], wanted: int, what: str, notes: list[str]) -> None:
    if len(there) < wanted:
        notes.append(f"--{what} {wanted}: there are only {len(there)}")
