"""The selection of checkpoints: which of the given ones take part, and in which order."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from swa_avg.checkpoints import Number, Score, StateDict, metrics
from swa_avg.errors import SelectionError, counted, listed
from swa_avg.planning import series
from swa_avg.planning.arguments import check_count, check_texts, suggesting
from swa_avg.planning.copies import copies
from swa_avg.planning.inputs import exclusion
from swa_avg.planning.order import Member, measured, members, ordered

_MOST_NOTES = 5  # on copies; if there are more, one note counts them


@suggesting
@dataclass(frozen=True)
class Choice:
    """Which of the given checkpoints to average; all by default.

    Attributes:
        last: The number of latest checkpoints to take, after the other options.
        epochs: `A:B` or `A:B:STEP`, with both ends included and each end optional. The
            numbers are epochs in the checkpoints or their names, else steps, else the
            numbers in the names.
        best: The number of best checkpoints by `metric` to take.
        metric: The name of the metric.
        mode: min if lower values of the metric are better, max if higher ones are. It can be
            left out if the name shows that, for example loss or accuracy.
        exclude: A pattern of paths or names to leave out, or several; these files are not opened.

    Raises:
        ValueError: An option has an invalid value, or another option is missing.
    """

    last: int | None = None
    epochs: str | None = None
    best: int | None = None
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    exclude: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        check_texts("exclude", self.exclude)
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", (self.exclude,))
        for name, count in (("last", self.last), ("best", self.best)):
            if count is not None:
                object.__setattr__(self, name, check_count(name, count))
        if self.epochs is not None:
            _Span.parse(self.epochs)
        if self.best is not None and not self.metric:
            raise ValueError("best needs a metric, for example val_loss")
        if self.best is None and (self.metric is not None or self.mode):
            raise ValueError("metric and mode need best, the number of best checkpoints to take")
        metrics.check_mode(self.mode)
        if self.metric is not None and self.better is None:
            raise ValueError(
                f"it is unknown whether a lower or a higher {self.metric} is better; give the "
                "mode, min or max"
            )

    @property
    def better(self) -> str | None:
        """Whether lower (min) or higher (max) values of the metric are better; None if unknown."""
        return self.mode or metrics.mode_of(self.metric or "")


ALL = Choice()


@dataclass(frozen=True)
class _Span:
    """The numbers `first`, `first + step`, … up to and including `last`."""

    first: int
    last: int | None
    step: int

    @classmethod
    def parse(cls, text: str) -> _Span:
        parts = re.fullmatch(r"(\d*):(\d*)(?::(\d+))?", str(text))
        if not parts:
            raise ValueError(f"epochs must be A:B or A:B:STEP, as in 10:20 or 10:, not {text}")
        span = cls(int(parts[1] or 0), int(parts[2]) if parts[2] else None, int(parts[3] or 1))
        if span.step < 1 or (span.last is not None and span.last < span.first):
            raise ValueError(f"epochs {text} contains no epoch: B is below A, or STEP is 0")
        return span

    def __contains__(self, number: Number) -> bool:
        upper = number if self.last is None else self.last
        return self.first <= number <= upper and (number - self.first) % self.step == 0


@dataclass(frozen=True)
class Selection:
    """The checkpoints to average, in the order of the run.

    Attributes:
        chosen: The checkpoints, the earliest first.
        scores: The metric of each of them, by path, if a metric chose them.
        notes: Notes for the user, for example on copies and on files left out.
    """

    chosen: tuple[StateDict, ...]
    scores: Mapping[Path, Score] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def select(
    candidates: Sequence[StateDict], choice: Choice = ALL, *, by_sample: bool = False
) -> Selection:
    """Order checkpoints, drop copies, and apply a choice.

    Files that are not checkpoints of the run are left out with a note, or refused: see
    `series`.

    Args:
        candidates: The checkpoints.
        choice: Which of them to take.
        by_sample: Detect copies without checksums by a sample of their bytes.

    Raises:
        SelectionError: No checkpoint is left, or one does not record the metric.
        MismatchError: The checkpoints cannot be of one run.
    """
    notes: list[str] = []
    given = series.without_averages(members(candidates), notes)
    series.refuse_parts(given, notes)
    series.refuse_components(given)
    chosen = _distinct(ordered(given), notes, by_sample=by_sample)
    series.refuse_mixed(chosen)
    scores: dict[Path, Score] = {}
    if choice.epochs is not None:
        chosen = _of_epochs(chosen, choice.epochs, notes)
    if choice.best is not None and choice.metric is not None:
        scores = _scores(chosen, choice.metric)
        chosen = _best(chosen, scores, choice, notes)
    if choice.last is not None:
        _note_if_few(chosen, choice.last, "last", notes)
        chosen = chosen[-choice.last :]
    return Selection(
        tuple(member.state for member in chosen),
        {member.path: scores[member.path] for member in chosen if member.path in scores},
        (*notes, *series.notes_on(chosen)),
    )


def _distinct(given: Sequence[Member], notes: list[str], *, by_sample: bool) -> list[Member]:
    """Return each checkpoint once, and add a note for each copy.

    Of several copies, the one is kept whose name has a number and belongs to the largest
    series: `epoch_3.pt` and not `best.pt`.
    """
    usual = Counter(member.name.series for member in given)
    preferred = sorted(
        given,
        key=lambda member: (not member.name.is_placed, -usual[member.name.series]),
    )
    repeats = {
        id(copy): f"{why} {kept.checkpoint.path}"
        for copy, kept, why in copies([member.state for member in preferred], by_sample=by_sample)
    }
    left = [(m.path, repeats[id(m.state)]) for m in given if id(m.state) in repeats]
    if len(left) > _MOST_NOTES:
        some = listed([f"{path} ({why})" for path, why in left])
        notes.append(f"{len(left)} copies are not counted again: {some}")
    else:
        notes += [f"{path}: {why}; counted once" for path, why in left]
    return [member for member in given if id(member.state) not in repeats]


def _of_epochs(given: list[Member], text: str, notes: list[str]) -> list[Member]:
    """Return the checkpoints in a range of epochs."""
    span = _Span.parse(text)
    what, numbers = measured(given)
    numbered = [(m, n) for m, n in zip(given, numbers, strict=True) if n is not None]
    chosen = [member for member, number in numbered if number in span]
    if not chosen:
        there = listed([str(number) for _, number in numbered], 8)
        raise SelectionError(
            f"--epochs {text} matches no checkpoint",
            expected=f"a range with some of these, by {what}: {there or 'none'}",
        )
    notes += [
        f"{member.path}: has no {what if member.is_placed else 'number in its name'}; "
        "left out by --epochs"
        for member, number in zip(given, numbers, strict=True)
        if number is None
    ]
    if what == "step":
        notes.append(f"--epochs {text} selects by step, because the checkpoints have no epochs")
    return chosen


def _scores(given: Sequence[Member], metric: str) -> dict[Path, Score]:
    """Return the metric of each checkpoint, recorded in the same place in all of them."""
    run = metrics.run_of(member.state.checkpoint for member in given)
    found = [metrics.scores(m.state.checkpoint, metric, m.name, run) for m in given]
    lacking = [member for member, scores in zip(given, found, strict=True) if not scores]
    if lacking:
        path = lacking[0].path
        rest = [member.path for member in given if member not in lacking]
        option = exclusion([member.path for member in lacking], rest) if rest else ""
        searched = metrics.looked_at(lacking[0].state.checkpoint, metric, lacking[0].name, run)
        remedy = f"Searched {searched}"
        if option:
            left = "it" if len(lacking) == 1 else "all such checkpoints"
            remedy += f"; {option} leaves {left} out"
        raise SelectionError(f"records no {metric}", file=path, remedy=remedy)
    for where in found[0]:
        if all(where in scores for scores in found):
            return {m.path: scores[where] for m, scores in zip(given, found, strict=True)}
    first = next(iter(found[0]))
    lacks = next(m for m, scores in zip(given, found, strict=True) if first not in scores)
    raise SelectionError(
        f"records {metric} in another place than {given[0].path} ({first})",
        file=lacks.path,
        remedy="A metric can be compared only if all checkpoints record it in the same place",
    )


def _best(
    given: list[Member], scores: Mapping[Path, Score], choice: Choice, notes: list[str]
) -> list[Member]:
    """Return the best checkpoints in the order of the run; later ones win ties."""
    values = [scores[member.path].value for member in given]
    finite = [number for number, value in enumerate(values) if math.isfinite(value)]
    if not finite:
        raise SelectionError(f"no checkpoint has a finite {choice.metric} for --best")
    notes += [
        f"{member.path}: {choice.metric} is {value}; left out by --best"
        for member, value in zip(given, values, strict=True)
        if not math.isfinite(value)
    ]
    sign = 1 if choice.better == "max" else -1
    ranked = sorted(finite, key=lambda number: (sign * values[number], number))
    _note_if_few(ranked, choice.best or 0, "best", notes)
    return [given[number] for number in sorted(ranked[-(choice.best or 0) :])]


def _note_if_few(there: Sequence[object], wanted: int, what: str, notes: list[str]) -> None:
    if len(there) < wanted:
        every = ("all " if len(there) > 1 else "") + counted(len(there), "checkpoint")
        notes.append(f"--{what} {wanted} takes {every}: there are no more")
