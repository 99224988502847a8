"""The inputs, opened: headers read, state_dicts found, what holds no model left out.

In a folder there may be anything; what nobody named is left out and said. What was
named must be a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from swa_avg.checkpoints import NO_WEIGHTS, Finder, StateDict, other_than_model
from swa_avg.errors import ForeignError, LayoutError, listed, naming
from swa_avg.formats import Checkpoint, Headers, open_checkpoint
from swa_avg.planning.inputs import Inputs, exclusion
from swa_avg.storage import RequestPool, allow_files, is_remote

_OPENERS = 16  # URLs that are opened at once


@dataclass
class Opened:
    """What was opened.

    Attributes:
        states: The state_dicts, in the order of the inputs.
        notes: What the user should know.
    """

    states: list[StateDict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_all(inputs: Inputs, keys: Sequence[str], ema: bool | None, closing: ExitStack) -> Opened:
    """Open checkpoints and find their state_dicts.

    Args:
        inputs: Which.
        keys: Where in them, if the user said so.
        ema: Take the averaged weights that the run has kept.
        closing: What closes them.

    Raises:
        SwaAvgError: One is not sound, or a named one holds no model.
    """
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    others: dict[Path, str] = {}
    without_ema: dict[Path, LayoutError] = {}
    whole: list[Checkpoint] = []
    opened, finder = Opened(notes=list(inputs.notes)), Finder(keys, ema)
    for path, checkpoint in _read(inputs, closing):
        if isinstance(checkpoint, ForeignError):
            others[path] = checkpoint.found.removeprefix("is ")
            continue
        whole.append(checkpoint)
        with naming(path):
            other = None if keys else other_than_model(checkpoint.tree)
        if other:
            others[path] = other
            continue
        try:
            opened.states.append(finder.find(checkpoint))
        except LayoutError as error:
            if not ema:
                raise
            without_ema[path] = error
    if not opened.states and without_ema:
        raise next(iter(without_ema.values()))
    if not opened.states:
        _refuse(others, inputs)
        # What holds only integers is a state_dict, if not much of a model.
        opened.states += map(finder.find, whole)
        return opened
    _leave_out(inputs, others, opened, _OTHERS)
    _leave_out(inputs, dict.fromkeys(without_ema, ""), opened, _WITHOUT_EMA)
    return opened


# What is said of several files in a folder, and of one that was named.
_OTHERS = ("left out, as they hold no model: {}", "holds {}, no model")
_WITHOUT_EMA = (
    "left out, as they hold no averaged weights: {}",
    "has no averaged weights, unlike the others",
)


def _read(inputs: Inputs, closing: ExitStack) -> Iterator[tuple[Path, Checkpoint | ForeignError]]:
    """Yield the checkpoints, or what some file in a folder is instead."""
    headers = Headers()  # what they have in common is read once

    def read(path: Path) -> Checkpoint | ForeignError:
        try:
            return open_checkpoint(path, headers)
        except ForeignError as error:
            if path not in inputs.found:
                raise
            return error

    allow_files(sum(_files_in(path) for path in inputs.paths if not is_remote(path)))
    with RequestPool(_OPENERS) as pool:
        # A request takes its time, so URLs are opened side by side.
        side_by_side = any(map(is_remote, inputs.paths))
        opened = (pool.map if side_by_side else map)(read, inputs.paths)
        for path, checkpoint in zip(inputs.paths, opened, strict=True):
            if isinstance(checkpoint, Checkpoint):
                closing.callback(checkpoint.close)
            yield path, checkpoint


def _files_in(path: Path) -> int:
    """Return how many files a checkpoint keeps open, at most."""
    with suppress(OSError):
        return len(os.listdir(path))  # noqa: PTH208 - not a Path for each
    return 1


def _refuse(others: Mapping[Path, str], inputs: Inputs) -> None:
    """Refuse inputs of which none is a model, as far as their content tells."""
    for path, other in others.items():
        if other != NO_WEIGHTS or path in inputs.found:
            raise LayoutError(f"holds {other}, no model", file=path)


def _leave_out(
    inputs: Inputs, left: Mapping[Path, str], opened: Opened, words: tuple[str, str]
) -> None:
    """Leave out what nobody named, in one note; refuse what somebody did."""
    named = [path for path in left if path not in inputs.found]
    if named:
        kept = [state.checkpoint.path for state in opened.states]
        option = exclusion(named, kept)
        raise LayoutError(
            words[1].format(left[named[0]]),
            file=named[0],
            remedy=f"{option} leaves it out" if option else "",
        )
    if left:
        said = [f"{path} ({what})" if what else str(path) for path, what in left.items()]
        opened.notes.append(words[0].format(listed(said)))
