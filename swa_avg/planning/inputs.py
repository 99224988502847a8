"""Which files and folders are meant: patterns expanded, folders looked into, what is excluded.

Nothing is opened here but the first bytes of the files in a folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape, glob
from pathlib import Path
from shlex import quote

from swa_avg.checkpoints import names, words
from swa_avg.errors import FileError, SelectionError, listed
from swa_avg.formats import is_checkpoint
from swa_avg.storage import is_remote, path_of, remote_matches

_MAGIC = re.compile(r"[*?[]")


@dataclass
class Inputs:
    """The paths that are meant.

    Attributes:
        paths: The paths, in the order given.
        found: Those of them that nobody named: they were in a folder that was given.
        excluded: What was left out by a pattern.
        notes: What the user should know.
    """

    paths: list[Path] = field(default_factory=list)
    found: set[Path] = field(default_factory=set)
    excluded: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def expand(patterns: Iterable[str | os.PathLike[str]], exclude: Sequence[str] = ()) -> list[Path]:
    """Return the paths that are meant: see `meant`."""
    return meant(patterns, exclude).paths


def meant(patterns: Iterable[str | os.PathLike[str]], exclude: Sequence[str] = ()) -> Inputs:
    """Return the paths that are meant, a pattern that the shell left alone expanded.

    Args:
        patterns: Files, folders, or patterns of them.
        exclude: Patterns of paths or names that are left out, before anything is opened.

    Raises:
        SelectionError: A pattern matches nothing, or nothing was given or is left.
    """
    given = [path for pattern in patterns for path in _matching(path_of(pattern), str(pattern))]
    inputs = Inputs()
    for path in given:
        if matches(path, exclude):
            inputs.excluded.append(path)
        else:
            _look(path, exclude, inputs, alone=len(given) == 1)
    if not inputs.paths and inputs.excluded:
        raise SelectionError(
            "--exclude leaves out all that was given: "
            + listed([str(path) for path in inputs.excluded])
        )
    if not inputs.paths:
        raise SelectionError("no checkpoints were given")
    return inputs


def _matching(path: Path, text: str) -> list[Path]:
    """Return a path, or those that there are of a pattern."""
    # A file may be called `run[1].pt`: what exists is no pattern.
    if not _MAGIC.search(text) or (path.exists() if is_remote(path) else os.path.lexists(path)):
        return [path]
    if is_remote(path):
        found = remote_matches(path)
    else:
        # Path.glob would not leave them as the user wrote them.
        found = [path_of(match) for match in sorted(glob(text, recursive=True))]  # noqa: PTH207
    if not found:
        raise SelectionError("matches no file", file=text, remedy="Check the pattern")
    return found


def matches(path: Path, patterns: Iterable[str]) -> bool:
    """Tell whether a path, or its name alone, matches one of the patterns."""
    return any(fnmatchcase(text, p) for p in patterns for text in (str(path), path.name))


def exclusion(paths: Sequence[Path], others: Sequence[Path]) -> str:
    """Return the option that leaves out some paths and none of the others; empty for none.

    Args:
        paths: What is to be left out.
        others: What is to stay.
    """
    read = names.read_all(paths)
    short = dict.fromkeys(names.read(path).pattern for path in paths)
    long = dict.fromkeys(
        escape(str(name.path).removesuffix(name.text)) + name.pattern for name in read
    )
    for patterns in (short, long):
        covered = all(matches(path, patterns) for path in paths)
        if covered and len(patterns) <= 8 and not any(matches(path, patterns) for path in others):
            return " ".join(f"--exclude {quote(pattern)}" for pattern in patterns)
    return ""


def _look(path: Path, exclude: Sequence[str], inputs: Inputs, alone: bool) -> None:
    """Take a file, or a folder that is a checkpoint, or else the checkpoints in it."""
    try:
        if not path.is_dir():
            inputs.paths.append(path)
            return
        own = is_checkpoint(path)
        children = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
        if own:
            children = [child for child in children if _is_of_run(child)]
        left_out = [child for child in children if matches(child, exclude)]
        found = [
            child
            for child in children
            if child not in left_out
            and (child.is_file() or child.is_dir())
            and is_checkpoint(child)
        ]
        if not own and not found and not left_out:
            raise SelectionError(
                "is a folder without checkpoints", file=path, remedy=_further_down(path, children)
            )
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", file=path) from error
    inputs.excluded += left_out
    if not own or (found and alone):
        inputs.paths += found
        inputs.found.update(found)
    else:
        inputs.paths.append(path)
    if own and found:
        inputs.notes.append(_of_run(path, found, alone))


def _is_of_run(child: Path) -> bool:
    """Tell whether something beside a model is a checkpoint of the same run by its name.

    `checkpoint-500` is, of Trainer, PEFT or diffusers; `1_Pooling` and a shard are not.
    """
    name = names.read(child)
    nouns = {word for word in re.split(r"[^a-z]+", child.name.lower()) if word}
    worded = name.epoch is not None or name.step is not None
    numbered = name.number is not None and bool(nouns & words.CHECKPOINT_NOUNS)
    return (worded or numbered) and not name.parts and not name.average


def _of_run(path: Path, found: Sequence[Path], alone: bool) -> str:
    """Say which of the two is taken: the model at the top of a run's folder, or its checkpoints."""
    if alone:
        option = exclusion(found, [path])
        instead = f"; {option} takes the model instead" if option else ""
        return f"{path}: the model at its top is left out, its checkpoints are taken{instead}"
    return f"{path}: the model at its top is taken, not the {len(found)} checkpoints in it"


def _further_down(path: Path, children: Sequence[Path]) -> str:
    """Say where checkpoints are, if the folders in a folder hold some."""
    for child in children:
        if child.is_dir() and any(is_checkpoint(inner) for inner in child.iterdir()):
            pattern = quote(f"{escape(str(path)).rstrip('/')}/*/")
            return f"Folders in it hold some: give {pattern}"
    return ""
