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
from swa_avg.planning.inputs import Inputs, leaving_out, remedy_in_subfolders
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
    finder = Finder(keys, ema)
    found = _Sorted()
    count = Counter(progress, "reading headers", len(inputs.paths), "file")
    for path, checkpoint in _read(inputs, closing):
        count(1)
        if isinstance(checkpoint, ForeignError):
            found.others[path] = checkpoint.texts.found.removeprefix("is ")
            found.remedies[path] = checkpoint.texts.remedy
            continue
        found.checkpoints.append(checkpoint)
        with naming(path):
            other = None if keys else other_than_model(checkpoint.tree)
        if other:
            found.others[path] = other
            continue
        try:
            found.states.append(finder.find(checkpoint))
        except LayoutError as error:
            if not ema and path not in inputs.found:
                raise
            found.unfit[path] = error
    return _chosen(found, inputs, finder, ema=bool(ema))


@dataclass
class _Sorted:
    """The inputs, sorted by what they contain.

    Attributes:
        checkpoints: All checkpoints, with and without a model.
        states: The state_dicts that were found.
        others: What a file contains that is no model, by path.
        remedies: What the user can do about some of these files.
        unfit: The errors of checkpoints in which no state_dict was found, or no averaged
            weights if those are wanted.
    """

    checkpoints: list[Checkpoint] = field(default_factory=list)
    states: list[StateDict] = field(default_factory=list)
    others: dict[Path, str] = field(default_factory=dict)
    remedies: dict[Path, str] = field(default_factory=dict)
    unfit: dict[Path, LayoutError] = field(default_factory=dict)


def _chosen(found: _Sorted, inputs: Inputs, finder: Finder, *, ema: bool) -> Opened:
    """Return the inputs that have a model, and leave out or refuse the others."""
    if found.unfit and not ema:
        raise _unfit(found.unfit, found.states)
    if not found.states and found.unfit:
        raise next(iter(found.unfit.values()))
    if not found.states:
        _refuse(found, inputs)
        # A file with nothing but integers still counts as a state_dict.
        return Opened([*map(finder.find, found.checkpoints)], list(inputs.notes))
    kept = [state.checkpoint.path for state in found.states]
    notes = [
        *inputs.notes,
        *_left_out(found.others, _OTHERS, inputs, kept),
        *_left_out(dict.fromkeys(found.unfit, ""), _WITHOUT_EMA, inputs, kept),
    ]
    return Opened(found.states, notes)


@dataclass(frozen=True)
class _Wording:
    """How files without the wanted weights are called; `{}` is their list, or what one contains.

    Attributes:
        note: The note on files that were found in a folder.
        refusal: What is wrong with a file that the user named.
    """

    note: str
    refusal: str


_OTHERS = _Wording("left out, because they contain no model: {}", "is not a model: it contains {}")
_WITHOUT_EMA = _Wording(
    "left out, because they contain no averaged weights: {}",
    "has no averaged weights, unlike the others",
)


def _read(inputs: Inputs, closing: ExitStack) -> Iterator[tuple[Path, Checkpoint | ForeignError]]:
    """Yield each checkpoint, or the error of a file in a folder that is not a checkpoint."""
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


def _refuse(found: _Sorted, inputs: Inputs) -> None:
    """Raise the error for inputs that all contain something other than a model."""
    for path, other in found.others.items():
        if other != NO_WEIGHTS or path in inputs.found:
            given = path in inputs.found and not is_remote(path)
            remedy = remedy_in_subfolders(path.parent, [*path.parent.iterdir()]) if given else ""
            remedy = remedy or found.remedies.get(path, "")
            raise LayoutError(f"is not a model: it contains {other}", file=path, remedy=remedy)


def _unfit(unfit: Mapping[Path, LayoutError], states: Sequence[StateDict]) -> LayoutError:
    """Return the error for files of a folder whose model is not found, if others have one."""
    error = next(iter(unfit.values()))
    kept = [state.checkpoint.path for state in states]
    option = leaving_out([*unfit], kept) if kept else ""
    if not option:
        return error
    found, expected, remedy = error.texts
    return LayoutError(
        found,
        file=error.file,
        tensor=error.tensor,
        expected=expected,
        remedy=f"{remedy}. {option}",
    )


def _left_out(
    left: Mapping[Path, str], wording: _Wording, inputs: Inputs, kept: Sequence[Path]
) -> Iterator[str]:
    """Yield the note on files that are left out.

    Args:
        left: The files, each with what it contains; empty if that is not noted.
        wording: The wording of the note and of the error.
        inputs: The input paths.
        kept: The checkpoints that are not left out.

    Raises:
        LayoutError: The user named one of the files.
    """
    named = [path for path in left if path not in inputs.found]
    if named:
        raise LayoutError(
            wording.refusal.format(left[named[0]]),
            file=named[0],
            remedy=leaving_out(named, kept),
        )
    if left:
        shown = [f"{path} ({what})" if what else str(path) for path, what in left.items()]
        yield wording.note.format(listed(shown))
