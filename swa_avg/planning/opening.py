"""Opening the inputs: headers are read, state_dicts found, files without a model left out.

A folder may contain other files. Those are left out with a note. A file that the user
named must contain a model.
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
from swa_avg.planning.inputs import Inputs, exclusion, remedy_in_subfolders
from swa_avg.progress import Counter, Watch
from swa_avg.storage import RequestPool, allow_files, is_remote

_OPENERS = 16  # URLs that are opened at once


@dataclass
class Opened:
    """The opened inputs.

    Attributes:
        states: The state_dicts, in the order of the inputs.
        notes: Notes for the user.
    """

    states: list[StateDict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_all(
    inputs: Inputs,
    keys: str | Sequence[str],
    ema: bool | None,
    closing: ExitStack,
    progress: Watch | None = None,
) -> Opened:
    """Open checkpoints and find their state_dicts.

    Args:
        inputs: The paths.
        keys: The paths of the state_dict in each checkpoint, if the user gave them.
        ema: Use the averaged weights that the training run kept.
        closing: Closes the checkpoints.
        progress: Called with the progress.

    Raises:
        SwaAvgError: A checkpoint is damaged, or a named file contains no model.
    """
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    others: dict[Path, str] = {}
    remedies: dict[Path, str] = {}
    without_ema: dict[Path, LayoutError] = {}
    unfit: dict[Path, LayoutError] = {}
    whole: list[Checkpoint] = []
    opened, finder = Opened(notes=list(inputs.notes)), Finder(keys, ema)
    count = Counter(progress, "reading headers", len(inputs.paths), "file")
    for path, checkpoint in _read(inputs, closing):
        count(1)
        if isinstance(checkpoint, ForeignError):
            others[path] = checkpoint.texts.found.removeprefix("is ")
            remedies[path] = checkpoint.texts.remedy
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
            if ema:
                without_ema[path] = error
            elif path in inputs.found:
                unfit[path] = error
            else:
                raise
    if unfit:
        raise _unfit(unfit, opened)
    if not opened.states and without_ema:
        raise next(iter(without_ema.values()))
    if not opened.states:
        _refuse(others, inputs, remedies)
        # A file with nothing but integers still counts as a state_dict.
        opened.states += map(finder.find, whole)
        return opened
    _leave_out(inputs, others, opened, _OTHERS)
    _leave_out(inputs, dict.fromkeys(without_ema, ""), opened, _WITHOUT_EMA)
    return opened


# The note on files in a folder, and the error for a file that the user named.
_OTHERS = ("left out, because they contain no model: {}", "is not a model: it contains {}")
_WITHOUT_EMA = (
    "left out, because they contain no averaged weights: {}",
    "has no averaged weights, unlike the others",
)


def _read(inputs: Inputs, closing: ExitStack) -> Iterator[tuple[Path, Checkpoint | ForeignError]]:
    """Yield the checkpoints, and the error of each file in a folder that is none."""
    headers = Headers()  # equal headers are parsed once

    def read(path: Path) -> Checkpoint | ForeignError:
        try:
            return open_checkpoint(path, headers)
        except ForeignError as error:
            if path not in inputs.found:
                raise
            return error

    allow_files(sum(_files_in(path) for path in inputs.paths if not is_remote(path)))
    with RequestPool(_OPENERS) as pool:
        # Requests are slow, so URLs are opened in parallel.
        in_parallel = any(map(is_remote, inputs.paths))
        opened = (pool.map if in_parallel else map)(read, inputs.paths)
        for path, checkpoint in zip(inputs.paths, opened, strict=True):
            if isinstance(checkpoint, Checkpoint):
                closing.callback(checkpoint.close)
            yield path, checkpoint


def _files_in(path: Path) -> int:
    """Return the maximum number of files that a checkpoint keeps open."""
    with suppress(OSError):
        return len(os.listdir(path))  # noqa: PTH208 - not a Path for each
    return 1


def _refuse(others: Mapping[Path, str], inputs: Inputs, remedies: Mapping[Path, str]) -> None:
    """Raise the error for inputs that all contain something other than a model."""
    for path, other in others.items():
        if other != NO_WEIGHTS or path in inputs.found:
            given = path in inputs.found and not is_remote(path)
            remedy = remedy_in_subfolders(path.parent, [*path.parent.iterdir()]) if given else ""
            remedy = remedy or remedies.get(path, "")
            raise LayoutError(f"is not a model: it contains {other}", file=path, remedy=remedy)


def _unfit(unfit: Mapping[Path, LayoutError], opened: Opened) -> LayoutError:
    """Return the error for files of a folder whose model is not found, if others have one."""
    error = next(iter(unfit.values()))
    kept = [state.checkpoint.path for state in opened.states]
    option = exclusion([*unfit], kept) if kept else ""
    if not option:
        return error
    found, expected, remedy = error.texts.found, error.texts.expected, error.texts.remedy
    remedy += f". {option} leaves {'it' if len(unfit) == 1 else 'them'} out"
    return LayoutError(
        found, file=error.file, tensor=error.tensor, expected=expected, remedy=remedy
    )


def _leave_out(
    inputs: Inputs, left: Mapping[Path, str], opened: Opened, words: tuple[str, str]
) -> None:
    """Leave out files found in a folder, in one note; refuse files that the user named."""
    named = [path for path in left if path not in inputs.found]
    if named:
        kept = [state.checkpoint.path for state in opened.states]
        option = exclusion(named, kept)
        raise LayoutError(
            words[1].format(left[named[0]]),
            file=named[0],
            remedy=f"{option} leaves {'it' if len(named) == 1 else 'them'} out" if option else "",
        )
    if left:
        shown = [f"{path} ({what})" if what else str(path) for path, what in left.items()]
        opened.notes.append(words[0].format(listed(shown)))
