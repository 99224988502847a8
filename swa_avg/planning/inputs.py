"""The input paths: patterns are expanded, folders are searched, excluded files are left out.

This module reads only the first bytes of the files in a folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape, glob
from itertools import islice
from pathlib import Path
from shlex import quote

from swa_avg.checkpoints import names, words
from swa_avg.errors import FileError, SelectionError, listed
from swa_avg.formats import component_of, is_checkpoint
from swa_avg.planning.unfinished import backups, beginnings, broken, is_unfinished
from swa_avg.storage import home_written_out, is_remote, nearest, path_of, remote_matches

# Where checkpoints are looked for below a folder without any.
_MOST_LEVELS = 4
_MOST_LOOKED_AT = 2000
_MAGIC = re.compile(r"[*?[]")
# The sub-folders of a run in which accelerate, Lightning and NeMo, SpeechBrain, and Ultralytics
# save checkpoints.
_OF_RUNS = ("checkpoints", "save", "weights")


@dataclass
class Inputs:
    """The input paths.

    Attributes:
        paths: The paths, in the order given.
        found: The paths that were found in a given folder, not named by the user.
        excluded: The paths that --exclude left out.
        notes: Notes for the user.
    """

    paths: list[Path] = field(default_factory=list)
    found: set[Path] = field(default_factory=set)
    excluded: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def expand(patterns: Iterable[str | os.PathLike[str]], exclude: Sequence[str] = ()) -> list[Path]:
    """Return the paths of `find_inputs`."""
    return find_inputs(patterns, exclude).paths


def find_inputs(patterns: Iterable[str | os.PathLike[str]], exclude: Sequence[str] = ()) -> Inputs:
    """Return the input paths, with patterns expanded that the shell has not expanded.

    Args:
        patterns: Files, folders, or patterns of them.
        exclude: Patterns of paths or names to leave out, before any file is opened.

    Raises:
        SelectionError: A pattern matches nothing, nothing was given, or --exclude leaves
            out everything.
    """
    patterns = list(patterns)
    if any(not str(pattern) for pattern in patterns):
        raise SelectionError("a path is empty", remedy="If it is a variable, check that it is set")
    given = [path for pattern in patterns for path in _matching(path_of(pattern), str(pattern))]
    inputs = Inputs()
    for path in given:
        if matches(path, exclude):
            inputs.excluded.append(path)
        else:
            _add(path, exclude, inputs, alone=len(given) == 1)
    if not inputs.paths and inputs.excluded:
        raise SelectionError(
            "all of the inputs are left out by --exclude: "
            + listed([str(path) for path in inputs.excluded])
        )
    if not inputs.paths:
        raise SelectionError("no checkpoints were given")
    return inputs


def _matching(path: Path, text: str) -> list[Path]:
    """Return the path itself, or the matches of a pattern."""
    # The name of a file may be `run[1].pt`: an existing path is not a pattern.
    if not _MAGIC.search(text) or (path.exists() if is_remote(path) else os.path.lexists(path)):
        return [path]
    if is_remote(path):
        found = remote_matches(path)
    else:
        # Path.glob would change the paths as the user wrote them.
        found = [path_of(match) for match in sorted(glob(text, recursive=True))]  # noqa: PTH207
    if not found:
        remedy = "" if is_remote(path) else _what_is_there(path)
        raise SelectionError("matches no file", file=text, remedy=remedy)
    return found


def _check_there(path: Path) -> None:
    """Refuse a path of this machine that does not exist, and name the nearest that does."""
    if is_remote(path):
        return
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = nearest(path)
        reason = f"cannot be opened: {error.strerror}"
        raise FileError(reason, file=path, remedy=remedy) from error


def _what_is_there(pattern: Path) -> str:
    """Return what the folder of a pattern without matches contains."""
    if home := home_written_out(pattern):
        return home
    folder = pattern.parent
    while _MAGIC.search(str(folder)):
        folder = folder.parent
    if not folder.is_dir():
        return nearest(folder) or f"There is no folder {folder}"
    with suppress(OSError):
        there = sorted(name for name in os.listdir(folder) if name[0] != ".")  # noqa: PTH208
        return f"{folder} contains {listed(there)}" if there else f"{folder} is empty"
    return ""


def matches(path: Path, patterns: Iterable[str]) -> bool:
    """Return whether a path, or its name alone, matches one of the patterns."""
    return any(fnmatchcase(text, p) for p in patterns for text in (str(path), path.name))


def exclusion(paths: Sequence[Path], others: Sequence[Path]) -> str:
    """Return the --exclude options that leave out exactly some paths; empty if there are none.

    Args:
        paths: The paths to leave out.
        others: The paths to keep.
    """
    read = names.read_all(paths)
    short = dict.fromkeys(names.read(path).pattern for path in paths)
    long = dict.fromkeys(
        escape(str(name.path).removesuffix(name.text)) + name.pattern for name in read
    )
    alone = dict.fromkeys(escape(path.name) for path in paths)
    whole = dict.fromkeys(escape(str(path)) for path in paths)
    shared = os.path.commonprefix([path.name for path in paths])  # noqa: RUF071 - characters
    start = {f"{escape(shared)}*": None}
    for patterns in (short, long, alone, whole, start):
        covered = all(matches(path, patterns) for path in paths)
        if covered and len(patterns) <= 8 and not any(matches(path, patterns) for path in others):
            return " ".join(f"--exclude {quote(pattern)}" for pattern in patterns)
    return ""


def leaving_out(paths: Sequence[Path], others: Sequence[Path]) -> str:
    """Return the remedy that leaves out exactly some paths; empty if no option can do that.

    Args:
        paths: The paths to leave out.
        others: The paths to keep.
    """
    option = exclusion(paths, others)
    return f"{option} leaves {'it' if len(paths) == 1 else 'them'} out" if option else ""


def _add(path: Path, exclude: Sequence[str], inputs: Inputs, *, alone: bool) -> None:
    """Add a file, a folder that is a checkpoint, or the checkpoints in a folder.

    Args:
        path: The file or folder.
        exclude: Patterns of paths or names to leave out.
        inputs: The input paths so far.
        alone: Whether nothing else was given.
    """
    with _reading(path):
        if not path.is_dir():
            _check_there(path)
            inputs.paths.append(path)
            return
        home = _home_in_run(path)
    if home != path:
        inputs.notes.append(f"{path}: the checkpoints in its folder {home.name} are used")
    with _reading(home):
        folder = _read_folder(home, exclude, alone=alone)
    inputs.notes += folder.notes
    inputs.excluded += folder.excluded
    if folder.found and (alone or not folder.is_checkpoint):
        inputs.paths += folder.found
        inputs.found.update(folder.found)
    elif folder.is_checkpoint:
        inputs.paths.append(home)


@dataclass(frozen=True)
class _Folder:
    """What a given folder contains.

    Attributes:
        is_checkpoint: Whether the folder is a checkpoint itself.
        found: The checkpoints in it.
        excluded: The entries that --exclude leaves out.
        notes: Notes for the user.
    """

    is_checkpoint: bool
    found: Sequence[Path]
    excluded: Sequence[Path]
    notes: Sequence[str]


def _read_folder(path: Path, exclude: Sequence[str], *, alone: bool) -> _Folder:
    """List a folder, and sort its entries.

    Raises:
        SelectionError: The folder is not a checkpoint and contains none.
    """
    own = is_checkpoint(path)
    children = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
    if own:
        children = [child for child in children if _is_of_same_run(child)]
    excluded, rest = _divided(children, lambda child: matches(child, exclude))
    begun, unlike = _divided(rest, _may_be_checkpoint)
    found, notes = _whole(begun)
    lost = {} if is_remote(path) else broken(unlike, found)
    if not (own or found or excluded):
        raise _without_checkpoints(path, children, lost)
    if len(found) == 1 and alone and not own and not is_remote(path):
        inside = remedy_in_subfolders(path, children)
        notes += [f"{path}: contains only {found[0].name}. {inside}"] if inside else []
    if lost:
        shown = listed([f"{one} ({why})" for one, why in lost.items()])
        notes.append(f"left out, because they are no checkpoints: {shown}")
    if own and found:
        notes.append(_note_on_run_folder(path, found, alone=alone))
    return _Folder(own, found, excluded, notes)


def _without_checkpoints(
    path: Path, children: Sequence[Path], lost: Mapping[Path, str]
) -> SelectionError:
    """Return the error for a folder that contains no checkpoints.

    Args:
        path: The folder.
        children: Its entries.
        lost: The entries whose names are those of checkpoints, each with what it is instead.
    """
    what = ""
    for entry, why in list(lost.items())[:1]:
        what = f" ({entry.name} {why if why.startswith('looks') else f'is {why}'})"
    return SelectionError(
        f"is a folder without checkpoints{what}",
        file=path,
        remedy=remedy_in_subfolders(path, children),
    )


def _divided(paths: Iterable[Path], test: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """Return the paths that pass a test, and the others, each in their order."""
    passed: list[Path] = []
    others: list[Path] = []
    for path in paths:
        (passed if test(path) else others).append(path)
    return passed, others


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the error of a folder, or of an entry that could not be read, into a `FileError`."""
    try:
        yield
    except OSError as error:
        place = Path(os.fspath(error.filename or path))
        place = place if os.path.lexists(place) else place.parent
        inner = place.name and place.name != Path(os.fspath(path)).name
        raise FileError(
            f"cannot be read: {error.strerror}",
            file=path / place.name if inner else path,
            remedy="If it is no checkpoint, give the others by their names" if inner else "",
        ) from error


def _whole(found: list[Path]) -> tuple[list[Path], list[str]]:
    """Return the checkpoints of a folder that belong to its run, and notes on the others.

    Names mark unfinished checkpoints, backups, and the weights before the training.
    """
    notes: list[str] = []
    for what, left in (
        ("unfinished checkpoints", [path for path in found if is_unfinished(path)]),
        ("copies of other checkpoints", backups(found)),
        ("weights from before the training", beginnings(found)),
    ):
        if left and len(left) < len(found):
            shown = listed([str(path) for path in left])
            notes.append(f"left out, because their names mark {what}: {shown}")
            found = [path for path in found if path not in left]
    return found, notes


def _home_in_run(path: Path) -> Path:
    """Return a folder, or the only sub-folder in which its run saved checkpoints."""
    if is_checkpoint(path):
        return path
    homes = [path / name for name in _OF_RUNS if (path / name).is_dir()]
    inside = [home for home in homes if any(map(_may_be_checkpoint, home.iterdir()))]
    if len(inside) != 1:
        return path
    with suppress(OSError):  # what cannot be read is no checkpoint to choose
        if any(_may_be_checkpoint(child) for child in path.iterdir() if child not in homes):
            return path
    return inside[0]


def _may_be_checkpoint(path: Path) -> bool:
    return (path.is_file() or path.is_dir()) and is_checkpoint(path)


def _is_of_same_run(child: Path) -> bool:
    """Return whether a path beside a model is a checkpoint of the same run, by its name.

    `checkpoint-500` of Trainer, PEFT or diffusers is one; `1_Pooling` and shards are not.
    """
    name = names.read(child)
    nouns = {word for word in re.split(r"[^a-z]+", child.name.lower()) if word}
    worded = name.epoch is not None or name.step is not None
    numbered = name.number is not None and bool(nouns & words.CHECKPOINT_NOUNS)
    is_other = name.parts or name.average or (child.is_file() and component_of(child))
    return (worded or numbered) and not is_other


def _note_on_run_folder(path: Path, found: Sequence[Path], *, alone: bool) -> str:
    """Return the note that says whether a folder's own model or its checkpoints are used."""
    if alone:
        option = exclusion(found, [path])
        instead = f"; to use that model instead, give {option}" if option else ""
        return (
            f"{path}: the checkpoints in this folder are used, and the model beside them is "
            f"left out{instead}"
        )
    return f"{path}: the model in this folder is used, not the {len(found)} checkpoints beside it"


def _holds_series(folder: Path) -> bool:
    """Return whether a folder that is not a checkpoint holds several files of one series."""
    if is_checkpoint(folder):
        return False
    with suppress(OSError):
        inner = islice(folder.iterdir(), _MOST_LOOKED_AT)
        read = [names.read(one) for one in inner if one.name[0] != "." and is_checkpoint(one)]
        series = [name.series for name in read if not name.parts]
        return len(set(series)) < len(series)
    return False


def remedy_in_subfolders(path: Path, children: Iterable[Path]) -> str:
    """Return the path or pattern to give, if folders below one contain checkpoints.

    Args:
        path: The folder.
        children: Its entries.
    """
    homes = _homes_below(path, children)
    if len(homes) == 1:
        within = Path(str(homes[0])).relative_to(str(path))
        return f"Its folder {within} contains checkpoints: give {quote(str(homes[0]))}"
    if homes and homes[0].parent == path:
        if any(map(_holds_series, homes)):
            runs = listed([quote(str(home)) for home in homes])
            return f"Its sub-folders contain several checkpoints; give those of one run: {runs}"
        pattern = quote(f"{escape(str(path)).rstrip('/')}/*/")
        return f"Its sub-folders contain checkpoints: give {pattern}"
    some = [quote(str(home)) for home in homes]
    return f"Folders below it contain checkpoints: {listed(some)}" if homes else ""


def _homes_below(path: Path, children: Iterable[Path]) -> list[Path]:
    """Return the folders below one that contain checkpoints, all of the first level with any."""
    level, left = [child for child in children if child.is_dir()], _MOST_LOOKED_AT
    for _ in range(1 if is_remote(path) else _MOST_LEVELS):
        homes: list[Path] = []
        below: list[Path] = []
        for folder in level:
            with suppress(OSError):
                inner = list(islice(folder.iterdir(), left))
                left -= len(inner)
                below += [one for one in sorted(inner) if one.is_dir() and one.name[0] != "."]
                if any(map(is_checkpoint, inner)):
                    homes.append(folder)
        if homes:
            return homes
        level = below
    return []
