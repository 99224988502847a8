"""Which of the given checkpoints take part, and in which order."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import glob
from pathlib import Path

from swa_avg.checkpoints import Score, StateDict, metrics, provenance
from swa_avg.errors import FileError, SelectionError, listed
from swa_avg.formats import is_checkpoint
from swa_avg.planning.copies import copies
from swa_avg.storage import is_remote, path_of, remote_matches

_MAGIC = re.compile(r"[*?[]")
_EPOCH_IN_NAME = re.compile(r"epoch[-_=]?(\d+)|(\d+)epoch")


@dataclass(frozen=True)
class Choice:
    """Which checkpoints are wanted of those that are given; by default all.

    Attributes:
        last: So many of the latest, of those that the rest leaves.
        epochs: `A:B` or `A:B:STEP`, both ends in, each of them optional: epochs or steps
            as the checkpoints record them, else the numbers in their names.
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

    def __contains__(self, number: int) -> bool:
        upper = number if self.last is None else self.last
        return self.first <= number <= upper and (number - self.first) % self.step == 0


def expand(patterns: Iterable[str | os.PathLike[str]], exclude: Sequence[str] = ()) -> list[Path]:
    """Return the paths that are meant, a pattern that the shell left alone expanded.

    Args:
        patterns: Files, folders, or patterns of them.
        exclude: Patterns of paths or names that are left out, before anything is opened.

    Raises:
        SelectionError: A pattern matches nothing, or nothing was given or is left.
    """
    paths: list[Path] = []
    excluded: list[Path] = []
    for pattern in patterns:
        for path in _matching(path_of(pattern), str(pattern)):
            if _matches(path, exclude):
                excluded.append(path)
            else:
                paths += _within(path, exclude, excluded)
    if not paths and excluded:
        raise SelectionError(
            f"--exclude leaves out all that was given: {listed([str(p) for p in excluded])}"
        )
    if not paths:
        raise SelectionError("no checkpoints were given")
    return paths


def _matching(path: Path, text: str) -> list[Path]:
    """Return a path, or those that there are of a pattern."""
    # A file may be called `run[1].pt`: what exists is no pattern.
    if not _MAGIC.search(text) or (path.exists() if is_remote(path) else os.path.lexists(text)):
        return [path]
    if is_remote(path):
        matches = remote_matches(path)
    else:
        # Path.glob would not leave them as the user wrote them.
        matches = [Path(match) for match in sorted(glob(text, recursive=True))]  # noqa: PTH207
    if not matches:
        raise SelectionError("matches no file", file=text, remedy="Check the pattern")
    return matches


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(text, p) for p in patterns for text in (str(path), path.name))


def _within(path: Path, exclude: Sequence[str], excluded: list[Path]) -> list[Path]:
    """Return the checkpoints in a folder, unless it is one itself; not those further down."""
    try:
        if not path.is_dir() or is_checkpoint(path):
            return [path]
        children = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
        left_out = [child for child in children if _matches(child, exclude)]
        found = [
            child
            for child in children
            if child not in left_out
            and (child.is_file() or child.is_dir())
            and is_checkpoint(child)
        ]
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", file=path) from error
    if not found and not left_out:
        raise SelectionError("is a folder without checkpoints", file=path)
    excluded += left_out
    return found


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

    The order is that of the epochs and steps that the checkpoints record, where
    all of them do; else that of their names, numbers counted as numbers.

    Args:
        candidates: The checkpoints.
        choice: Which of them are wanted.
        by_sample: Tell copies without checksums by a sample of their bytes.

    Raises:
        SelectionError: That leaves none, or a checkpoint lacks what it is chosen by.
    """
    notes: list[str] = []
    chosen = _distinct(_ordered(_no_averages(candidates, notes)), notes, by_sample)
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
        tuple(chosen),
        {path: scores[path] for state in chosen if (path := state.checkpoint.path) in scores},
        tuple(notes),
    )


def _ordered(candidates: Sequence[StateDict]) -> list[StateDict]:
    ordered = sorted(candidates, key=lambda state: natural(state.checkpoint.path))
    if all(state.epoch is not None for state in ordered):
        steps = all(state.step is not None for state in ordered)
        ordered.sort(key=lambda state: (state.epoch or 0, (state.step or 0) if steps else 0))
    elif all(state.step is not None for state in ordered):
        ordered.sort(key=lambda state: state.step or 0)
    return ordered


def _distinct(ordered: Sequence[StateDict], notes: list[str], by_sample: bool) -> list[StateDict]:
    """Return each checkpoint once, and note which were there twice.

    Of several the first one with a number in its name counts: of `best.pt` and
    `epoch_3.pt` only the latter tells its place among the others.
    """
    numbered = sorted(ordered, key=lambda state: _number_in(state.checkpoint.path) is None)
    repeats = {
        id(state): f"{state.checkpoint.path}: {why} {counted.checkpoint.path}; counted once"
        for state, counted, why in copies(numbered, by_sample)
    }
    notes += [repeats[id(state)] for state in ordered if id(state) in repeats]
    return [state for state in ordered if id(state) not in repeats]


def _no_averages(candidates: Sequence[StateDict], notes: list[str]) -> list[StateDict]:
    """Return the checkpoints that are no averages of ours, and note which are."""
    averages = [state for state in candidates if provenance.of(state.checkpoint)]
    if averages and len(averages) == len(candidates):
        raise SelectionError(
            "is an average already, and nothing else was given",
            file=averages[0].checkpoint.path,
            remedy="To add checkpoints to it, or to write it anew, give it with --start-from",
        )
    notes += [
        f"{state.checkpoint.path}: is an average already; left out (--start-from takes it)"
        for state in averages
    ]
    return [state for state in candidates if state not in averages]


def _of_epochs(states: list[StateDict], text: str, notes: list[str]) -> list[StateDict]:
    """Return the checkpoints of a span of epochs."""
    span = _Span.parse(text)
    what, numbers = _measured(states)
    numbered = [(s, n) for s, n in zip(states, numbers, strict=True) if n is not None]
    chosen = [state for state, number in numbered if number in span]
    if not chosen:
        there = listed([str(number) for _, number in numbered], 8)
        raise SelectionError(
            f"--epochs {text} leaves no checkpoint",
            expected=f"some of those that there are, by {what}: {there or 'none'}",
        )
    notes += [
        f"{state.checkpoint.path}: has no number in its name; left out by --epochs"
        for state, number in zip(states, numbers, strict=True)
        if number is None
    ]
    return chosen


def _measured(states: Sequence[StateDict]) -> tuple[str, list[int | None]]:
    """Return by which numbers checkpoints are told apart, and the number of each."""
    for what, numbers in (
        ("epoch", [state.epoch for state in states]),
        ("step", [state.step for state in states]),
    ):
        if all(number is not None for number in numbers):
            return what, numbers
    return "number in the name", [_number_in(state.checkpoint.path) for state in states]


def _number_in(path: Path) -> int | None:
    """Return the epoch that a name bears, else the last number in it."""
    stem = path.name.removesuffix(path.suffix)
    epoch = _EPOCH_IN_NAME.search(stem)
    numbers = [epoch[1] or epoch[2]] if epoch else re.findall(r"\d+", stem)
    return int(numbers[-1]) if numbers else None


def _scored(states: Sequence[StateDict], metric: str) -> dict[Path, Score]:
    """Return the metric of each checkpoint, recorded in the same place for all."""
    found = [metrics.scores(state.checkpoint, metric) for state in states]
    for state, scores in zip(states, found, strict=True):
        if not scores:
            raise SelectionError(
                f"records no {metric}",
                file=state.checkpoint.path,
                remedy=f"Looked at {metrics.looked_at(state.checkpoint)}; --exclude leaves it out",
            )
    for where in found[0]:
        if all(where in scores for scores in found):
            return {s.checkpoint.path: f[where] for s, f in zip(states, found, strict=True)}
    first = next(iter(found[0]))
    lacks = next(s for s, f in zip(states, found, strict=True) if first not in f)
    raise SelectionError(
        f"records {metric} elsewhere than {states[0].checkpoint.path} ({first})",
        file=lacks.checkpoint.path,
        remedy="Only what all record in the same place can be compared",
    )


def _best(
    states: list[StateDict], scores: Mapping[Path, Score], choice: Choice, notes: list[str]
) -> list[StateDict]:
    """Return the best checkpoints in their order; of equal ones the later."""
    values = [scores[state.checkpoint.path].value for state in states]
    finite = [number for number, value in enumerate(values) if math.isfinite(value)]
    if not finite:
        raise SelectionError(f"--best finds no checkpoint whose {choice.metric} is a finite number")
    notes += [
        f"{state.checkpoint.path}: its {choice.metric} is {value}; not among the best"
        for state, value in zip(states, values, strict=True)
        if not math.isfinite(value)
    ]
    sign = 1 if choice.better == "max" else -1
    ranked = sorted(finite, key=lambda number: (sign * values[number], number))
    _say_if_few(ranked, choice.best or 0, "best", notes)
    return [states[number] for number in sorted(ranked[-(choice.best or 0) :])]


def _say_if_few(there: Sequence[object], wanted: int, what: str, notes: list[str]) -> None:
    if len(there) < wanted:
        notes.append(f"--{what} {wanted}: there are only {len(there)}")


def natural(path: Path) -> tuple[tuple[int, int, str], ...]:
    """Return a sorting key that puts epoch_2 before epoch_10.

    Digits sort as numbers, and before letters.
    """
    return tuple(
        (0, int(part), part) if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", str(path))
        if part
    )
