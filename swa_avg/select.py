"""Which of the given checkpoints take part, and in which order."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from swa_avg.errors import SelectionError
from swa_avg.layout import StateDict

_MAGIC = re.compile(r"[*?[]")


def expand(patterns: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the paths that are meant, a pattern that the shell left alone expanded.

    Raises:
        SelectionError: A pattern matches nothing, or nothing was given.
    """
    paths: list[Path] = []
    for pattern in patterns:
        text = os.fspath(pattern)
        # A file may be called `run[1].pt`: what exists is no pattern.
        if not _MAGIC.search(text) or os.path.lexists(text):
            paths.append(Path(text))
            continue
        matches = sorted(glob(text))  # noqa: PTH207 - paths stay as the user wrote them
        if not matches:
            raise SelectionError("matches no file", file=text, remedy="Check the pattern")
        paths.extend(Path(match) for match in matches)
    if not paths:
        raise SelectionError("no checkpoints were given")
    return paths


@dataclass(frozen=True)
class Selection:
    """The checkpoints that are averaged, in their order.

    Attributes:
        chosen: The checkpoints, the earliest first.
        repeats: For each file that was named twice, its other name and the one counted.
    """

    chosen: tuple[StateDict, ...]
    repeats: tuple[tuple[Path, Path], ...]


def select(candidates: Sequence[StateDict]) -> Selection:
    """Put checkpoints into order and count none of them twice.

    The order is that of the epochs and steps that the checkpoints record, where
    all of them do; else that of their names, numbers counted as numbers.
    """
    ordered = sorted(candidates, key=lambda state: natural(state.checkpoint.path))
    if all(state.epoch is not None for state in ordered):
        steps = all(state.step is not None for state in ordered)
        ordered.sort(key=lambda state: (state.epoch or 0, (state.step or 0) if steps else 0))
    elif all(state.step is not None for state in ordered):
        ordered.sort(key=lambda state: state.step or 0)
    first: dict[object, StateDict] = {}
    repeats = []
    for state in ordered:
        identity = tuple(file.identity for file in state.checkpoint.files)
        counted = first.setdefault(identity, state)
        if counted is not state:
            repeats.append((state.checkpoint.path, counted.checkpoint.path))
    return Selection(tuple(first.values()), tuple(repeats))


def natural(path: Path) -> tuple[tuple[int, int, str], ...]:
    """Return a sorting key that puts epoch_2 before epoch_10.

    Digits sort as numbers, and before letters.
    """
    return tuple(
        (0, int(part), part) if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", os.fspath(path))
        if part
    )
