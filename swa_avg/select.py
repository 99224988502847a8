"""Which of the given checkpoints take part, and in which order."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from swa_avg.errors import FileError, SelectionError
from swa_avg.formats import is_checkpoint
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
            paths += _within(Path(text))
            continue
        matches = sorted(glob(text))  # noqa: PTH207 - paths stay as the user wrote them
        if not matches:
            raise SelectionError("matches no file", file=text, remedy="Check the pattern")
        paths.extend(path for match in matches for path in _within(Path(match)))
    if not paths:
        raise SelectionError("no checkpoints were given")
    return paths


def _within(path: Path) -> list[Path]:
    """Return the checkpoints in a folder, unless it is one itself; not those further down."""
    try:
        if not path.is_dir() or is_checkpoint(path):
            return [path]
        found = [
            child
            for child in sorted(path.iterdir())
            if not child.name.startswith(".")
            and (child.is_file() or child.is_dir())
            and is_checkpoint(child)
        ]
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", file=path) from error
    if not found:
        raise SelectionError("is a folder without checkpoints", file=path)
    return found


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
