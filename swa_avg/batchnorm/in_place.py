"""The output that is there already, to be changed in place: a copy that takes its name.

What may be changed in place without being asked twice is an average, which can be made
again; a checkpoint of a run cannot. Nothing here knows what is changed.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from swa_avg.checkpoints import StateDict, check_choice, find_state_dict, provenance
from swa_avg.errors import LayoutError, OutputError, listed
from swa_avg.formats import PROVENANCE, Checkpoint, is_checkpoint, open_checkpoint
from swa_avg.storage import AtomicFile, AtomicFolder, InputFile, RemoteFile, is_remote
from swa_avg.tensors import verify

File = AtomicFile | AtomicFolder | RemoteFile
_MOST_LEVELS = 3  # between a file of an average and the folder that says how it was made


@dataclass(frozen=True)
class Copy:
    """A copy of a checkpoint, which takes its place when it is committed.

    Attributes:
        file: The copy.
        key: Where its state_dict is, if that is not found.
        ema: Whether the averaged weights in it are meant, or the raw ones, if it has both.
    """

    file: File
    key: Sequence[str]
    ema: bool | None


@contextmanager
def copy_of(
    path: Path, key: Sequence[str] = (), *, ema: bool | None = None, force: bool = False
) -> Iterator[Copy]:
    """Copy a checkpoint to change the copy.

    Its bytes are checked against the checksums that it carries.

    Args:
        path: A file, or a folder.
        key: The dotted path to its state_dict, where it is not found.
        ema: Take the averaged weights in it, or the raw ones, if it has both.
        force: Whether it may be the checkpoint of a run; else it must be an average.

    Raises:
        SwaAvgError: It is not there, is no average, or is damaged.
    """
    if not path.exists():
        raise OutputError(
            "does not exist",
            file=path,
            expected="an average whose BatchNorm is to be recomputed",
            remedy="Give the checkpoints to average, or name a file with -o",
        )
    with ExitStack() as opened:
        checkpoint = open_checkpoint(path)
        opened.callback(checkpoint.close)
        state, key, ema = _meant(checkpoint, key, ema)
        if not force:
            _check_is_average(state, ema)
        _check_is_whole(path, checkpoint)
        verify((record, name) for name, ref in state.tensors.items() for record in ref.records)
        sources = _sources(checkpoint, opened)
        file = _opened(path, sources, opened)
        place = 0
        for name, source in sources.items():
            for chunk in source.chunks(0, source.size):
                file.write(chunk, place)
                place += len(chunk)
            if name:
                (file.path / name).chmod(stat.S_IMODE((path / name).stat().st_mode))
        for source in sources.values():
            source.check_unchanged()
        yield Copy(file, key, ema)


def _meant(
    checkpoint: Checkpoint, key: Sequence[str], ema: bool | None
) -> tuple[StateDict, Sequence[str], bool | None]:
    """Find the state_dict: where the user says, or where the record of the average does.

    The record of a file that holds nothing but an average may name a place that only its
    inputs have.
    """
    said = provenance.of(checkpoint)
    if said and not key and ema is None:
        there, half = said.options.get("key", ()), said.options.get("ema")
        keys = (there,) if isinstance(there, str) else there
        if isinstance(keys, list | tuple) and half in (None, True, False):
            keys, half = tuple(map(str, keys)), None if half is None else bool(half)
            with suppress(LayoutError):
                return find_state_dict(checkpoint, keys, half), keys, half
    state = find_state_dict(checkpoint, key, ema)
    check_choice(state, key, ema)
    return state, key, ema


def _check_is_average(state: StateDict, ema: bool | None) -> None:
    """Refuse to change a checkpoint of the user's own run.

    The averages that a run has kept beside its weights make no average of its checkpoint.
    """
    counted = state.counter is not None and not ema
    if not counted and provenance.of(state.checkpoint) is None:
        raise OutputError(
            "is no average: it has neither a record of swa-avg nor a counter of AveragedModel",
            file=state.checkpoint.path,
            remedy="To replace its BatchNorm statistics all the same, add --force",
        )


def _check_is_whole(path: Path, checkpoint: Checkpoint) -> None:
    """Refuse a part of an average: what its folder says of how it was made would be wrong."""
    if is_remote(path):
        return
    files = {file.identity for file in checkpoint.files}
    for folder in list(path.absolute().parents)[:_MOST_LEVELS]:
        if not ((folder / PROVENANCE).is_file() and is_checkpoint(folder)):
            continue
        whole = open_checkpoint(folder)
        whole.close()
        if files & {file.identity for file in whole.files}:
            raise OutputError(
                f"is a part of the average {folder}, whose record would be wrong",
                file=path,
                remedy=f"Name the whole of it with -o {folder}",
            )


def _sources(checkpoint: Checkpoint, opened: ExitStack) -> Mapping[str, InputFile]:
    """Return all files of a checkpoint by their names in its folder; of a file that is empty."""
    path = checkpoint.path
    if not path.is_dir():
        (source,) = checkpoint.files
        return {"": source}
    if is_remote(path):
        raise OutputError(
            "is a folder, which no store can put in its place at once",
            file=path,
            remedy="Copy it to this machine, and back again",
        )
    inner = sorted(path.rglob("*"))
    links = [entry.relative_to(path).as_posix() for entry in inner if entry.is_symlink()]
    if links:
        taken = "with --start-from" if checkpoint.provenance else "as the checkpoint"
        raise OutputError(
            f"holds links, which would be replaced by copies: {listed(links)}",
            file=path,
            remedy=f"Give it {taken}, and name a new folder with -o",
        )
    sources = {}
    for entry in inner:
        if entry.is_file():
            sources[entry.relative_to(path).as_posix()] = file = InputFile(entry)
            opened.callback(file.close)
    return sources


def _opened(path: Path, sources: Mapping[str, InputFile], opened: ExitStack) -> File:
    """Make room for the copy; it is closed with `opened`."""
    sizes = {name: source.size for name, source in sources.items()}
    if is_remote(path):
        return opened.enter_context(RemoteFile(path, sizes[""], over=sources[""].source))
    states = {name: source.source.state for name, source in sources.items()}
    if "" in sizes:
        return opened.enter_context(AtomicFile(path, sizes[""], over=states[""]))
    return opened.enter_context(AtomicFolder(path, sizes, over=states))
