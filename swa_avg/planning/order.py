"""The order of checkpoints, and the numbers (epoch, step) that identify them for the user.

Recorded numbers take precedence over numbers in names. All checkpoints use the same source
if possible, because frameworks count epochs from 0 in one place and from 1 in another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from swa_avg.checkpoints import Name, Number, StateDict, names, words
from swa_avg.errors import listed

# The word before the number of a checkpoint, and the number of a stage of the training.
_LAST_WORD = re.compile(r"([^\W\d_]+)[-_. =]*$")
_STAGE = re.compile(r"(?:^|[^a-z])(?:stage|phase|cycle|restart)[-_ =]?([0-9]+)", re.IGNORECASE)
_Key = TypeVar("_Key")
_KINDS = ("epoch", "step", "count", "number")
_LEAST_GAPS = 3  # of which most can be said to be alike


@dataclass(frozen=True, eq=False)
class Member:
    """A checkpoint with its parsed name.

    Attributes:
        state: The state_dict.
        name: The parsed name.
    """

    state: StateDict
    name: Name

    @property
    def path(self) -> Path:
        """The path as the user wrote it."""
        return self.name.path

    @property
    def recorded(self) -> tuple[Number | None, Number | None]:
        """The recorded epoch and step."""
        return self.state.epoch, self.state.step

    def recorded_as(self, kind: str) -> Number | None:
        """Return the recorded epoch or step; None for any other kind."""
        return dict(zip(_KINDS, self.recorded, strict=False)).get(kind)

    def named(self, kind: str) -> Number | None:
        """Return the epoch, step, count or other number in the name."""
        return dict(zip(_KINDS, self.name.place, strict=True))[kind]

    @property
    def is_placed(self) -> bool:
        """Whether the file or its name contains an epoch, a step or another number."""
        return self.name.is_placed or self.recorded != (None, None)


def members(states: Sequence[StateDict]) -> list[Member]:
    """Read the names of checkpoints."""
    read = names.read_all([state.checkpoint.path for state in states])
    return [Member(state, name) for state, name in zip(states, read, strict=True)]


def ordered(given: Sequence[Member]) -> list[Member]:
    """Return checkpoints in the order of the run.

    Checkpoints without any number come first, except for those named as the last one
    (`last.pt`, `model_final.pth`, and `run.pt` beside `run-000002.pt`), which come last.
    """
    natural_order = sorted(given, key=lambda member: natural(member.path))
    placed = [member for member in natural_order if member.is_placed]
    others = [member for member in natural_order if not member.is_placed]
    others.sort(key=lambda member: (natural(Path(member.name.series)), member.name.version))
    if placed:
        keys = list(zip(*_keys(placed), strict=True))
        numbered = sorted(range(len(placed)), key=lambda number: keys[number])
        placed = [placed[number] for number in numbered]
    bare = {_without_number(member.name.series) for member in placed}
    last = [m for m in others if m.name.role in words.LATEST or m.name.series in bare]
    return [*(member for member in others if member not in last), *placed, *last]


def _without_number(series: str) -> str:
    """Return the name that a series has without its number: `run.pt` for `run-step#.pt`.

    kohya-ss, ai-toolkit and diffusers save the last weights under this name.
    """
    stem, number, suffix = series.partition("#")
    word = _LAST_WORD.search(stem)
    stem = stem[: word.start()] if word and word[1].lower() in words.KINDS else stem
    return stem.rstrip("-_. =") + suffix if number else ""


def _keys(placed: Sequence[Member]) -> list[Sequence[object]]:
    """Return the sort keys of checkpoints, the most important first."""
    recorded = [[member.recorded_as(kind) for member in placed] for kind in ("epoch", "step")]
    recorded = [numbers for numbers in recorded if _is_complete(numbers)]
    kinds = list(_KINDS)
    # If several numbers vary (a date and a time), only the natural order respects all of them.
    if len({member.name.shape for member in placed}) < len({m.name.series for m in placed}):
        kinds.remove("number")
    if recorded:
        named = [[member.named(kind) for member in placed] for kind in kinds]
    else:
        named = [numbers_of(placed, kind) for kind in kinds]
    return [
        *_stages(placed),
        *recorded,
        *(numbers for numbers in named if _is_complete(numbers)),
        [member.name.version for member in placed],
        [natural(member.path) for member in placed],
    ]


def _stages(placed: Sequence[Member]) -> list[Sequence[int]]:
    """Return the stages in the names, if all have one: epochs and steps may begin again in each."""
    found = [_STAGE.search(member.name.text) for member in placed]
    return [[int(stage[1]) for stage in found if stage]] if all(found) else []


def grouped(given: Sequence[Member], key: Callable[[Member], _Key]) -> dict[_Key, list[Member]]:
    """Return the checkpoints by a key, in their order."""
    groups: dict[_Key, list[Member]] = {}
    for member in given:
        groups.setdefault(key(member), []).append(member)
    return groups


def numbers_of(given: Sequence[Member], kind: str) -> list[Number | None]:
    """Return a number for each checkpoint: all recorded, all from names, or a mix of both.

    Args:
        given: The checkpoints.
        kind: epoch, step, count or number.
    """
    recorded = [member.recorded_as(kind) for member in given]
    named = [member.named(kind) for member in given]
    for numbers in (recorded, named):
        if _is_complete(numbers):
            return numbers
    return [one if one is not None else other for one, other in zip(recorded, named, strict=True)]


def _is_complete(numbers: Sequence[Number | None]) -> bool:
    return all(number is not None for number in numbers)


def measured(given: Sequence[Member]) -> tuple[str, list[Number | None]]:
    """Return the measure that identifies checkpoints for the user, and the number of each.

    The measure is the epoch, the step, or the number in the name: the first one that the
    most checkpoints have.
    """
    kind, numbers = min(_measures(given).items(), key=lambda measure: measure[1].count(None))
    return "number in the name" if kind == "number" else kind, numbers


def _measures(given: Sequence[Member]) -> dict[str, list[Number | None]]:
    """Return the epochs, the steps and the numbers in the names, in this order."""
    return {
        "epoch": numbers_of(given, "epoch"),
        "step": numbers_of(given, "step"),
        "number": [_number(member.name) for member in given],
    }


def axis_of(states: Sequence[StateDict]) -> tuple[str, tuple[Number, ...]]:
    """Return the measure along which a run is drawn, and the number of each checkpoint.

    It is the epoch, the step or the number in the name: the first one that increases along the
    run. Otherwise it is the place of a checkpoint in the order, counted from 1.

    Args:
        states: The checkpoints, in order.
    """
    known = members(states)
    for kind, given in _measures(known).items():
        numbers = [number for number in given if number is not None]
        if len(numbers) == len(known) and all(a < b for a, b in pairwise(numbers)):
            return kind, tuple(numbers)
    return "checkpoint", tuple(range(1, len(known) + 1))


def gap_notes(states: Sequence[StateDict]) -> Iterator[str]:
    """Yield a note on checkpoints that are much farther apart than most are.

    Args:
        states: The checkpoints, in order.
    """
    kind, numbers = axis_of(states)
    pairs = [(b - a, a, b) for a, b in pairwise(numbers)]
    if kind == "checkpoint" or len(pairs) < _LEAST_GAPS:
        return
    usual = sorted(pairs)[len(pairs) // 2][0]
    wide = [f"{kind} {a} to {b}" for gap, a, b in pairs if gap >= 2 * usual]
    if wide:
        yield (
            f"{listed(wide)}: no checkpoint lies between, although most are {usual} apart; "
            "averages across it span more of the run"
        )


def _number(name: Name) -> Number | None:
    return next(
        (n for n in (name.number, name.count, name.step, name.epoch) if n is not None), None
    )


def natural(path: Path) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts epoch_2 before epoch_10.

    Digits sort as numbers, and before letters.
    """
    return tuple(
        (0, int(part), part) if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", str(path))
        if part
    )
