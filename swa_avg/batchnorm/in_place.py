"""Changes an existing checkpoint in place, through a copy that replaces it.

An average may be changed without `--force`, because it can be computed again. A checkpoint
of a run cannot. This module does not decide what is changed.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from swa_avg.checkpoints import StateDict, check_choice, find_state_dict, provenance
from swa_avg.errors import LayoutError, OutputError, listed
from swa_avg.formats import PROVENANCE, Checkpoint, is_checkpoint, open_checkpoint
from swa_avg.progress import Counter, Watch
from swa_avg.storage import (
    AtomicFile,
    AtomicFolder,
    InputFile,
    OutputFile,
    RemoteFile,
    is_remote,
)
from swa_avg.tensors import verify

_MOST_LEVELS = 3  # between a file of an average and the folder with its provenance


@dataclass(frozen=True)
class Copy:
    """A copy of a checkpoint, which replaces the checkpoint on commit.

    Attributes:
        file: The copy.
        key: The paths of its state_dict, if it is not found automatically.
        ema: Whether to use the averaged weights or the raw weights, if it has both.
    """

    file: OutputFile
    key: Sequence[str]
    ema: bool | None


@contextmanager
def copy_of(
    path: Path,
    key: Sequence[str] = (),
    *,
    ema: bool | None = None,
    force: bool = False,
    progress: Watch | None = None,
) -> Iterator[Copy]:
    """Copy a checkpoint, so that the copy can be changed.

    The bytes are verified with the checksums of the checkpoint.

    Args:
        path: A file or a folder.
        key: The dotted path of its state_dict, if it is not found automatically.
        ema: Whether to use the averaged weights or the raw weights, if it has both.
        force: Whether to allow a checkpoint of a run; otherwise it must be an average.
        progress: Called with the progress.

    Raises:
        SwaAvgError: The checkpoint does not exist, is not an average, or is damaged.
    """
    if not path.exists():
        raise OutputError(
            "does not exist",
            file=path,
            expected="an average to recompute BatchNorm for",
            remedy="Give checkpoints to average, or an existing average with -o",
        )
    with ExitStack() as opened:
        checkpoint = open_checkpoint(path)
        opened.callback(checkpoint.close)
        state, key, ema = _meant(checkpoint, key, ema)
        _check_is_whole(path, checkpoint)
        if not force:
            _check_is_average(state, ema)
        Counter(progress, "verifying checksums")
        verify((record, name) for name, ref in state.tensors.items() for record in ref.records)
        sources = _sources(checkpoint, opened)
        file = _opened(path, sources, opened)
        place = 0
        count = Counter(progress, "copying", sum(source.size for source in sources.values()))
        for name, source in sources.items():
            for chunk in source.chunks(0, source.size):
                file.write(chunk, place)
                place += len(chunk)
                count(len(chunk))
            if name:
                (file.path / name).chmod(stat.S_IMODE((path / name).stat().st_mode))
        for source in sources.values():
            source.check_unchanged()
        yield Copy(file, key, ema)


def _meant(
    checkpoint: Checkpoint, key: Sequence[str], ema: bool | None
) -> tuple[StateDict, Sequence[str], bool | None]:
    """Find the state_dict with the user's options or with those in the provenance.

    The provenance of a bare average may name a path that exists only in its inputs.
    """
    record = provenance.of(checkpoint)
    if record and not key and ema is None:
        there, half = record.options.get("key", ()), record.options.get("ema")
        keys = (there,) if isinstance(there, str) else there
        if isinstance(keys, list | tuple) and half in (None, True, False):
            keys, half = tuple(map(str, keys)), None if half is None else bool(half)
            with suppress(LayoutError):
                return find_state_dict(checkpoint, keys, half), keys, half
    state = find_state_dict(checkpoint, key, ema)
    check_choice(state, key, ema)
    return state, key, ema


def _check_is_average(state: StateDict, ema: bool | None) -> None:
    """Refuse to change a checkpoint of a run.

    A checkpoint with raw weights is not an average, even if it also holds averaged weights.
    """
    counted = state.counter is not None and not ema
    if not counted and provenance.of(state.checkpoint) is None:
        raise OutputError(
            "is not an average: it has neither a record of swa-avg nor a counter of AveragedModel",
            file=state.checkpoint.path,
            remedy="To replace its BatchNorm statistics anyway, add --force",
        )


def _check_is_whole(path: Path, checkpoint: Checkpoint) -> None:
    """Refuse a part of an average, because the provenance in its folder would become wrong."""
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
                f"is a part of the average {folder}, whose record would become wrong",
                file=path,
                remedy=f"Give the whole average with -o {quote(str(folder))}",
            )


def _sources(checkpoint: Checkpoint, opened: ExitStack) -> Mapping[str, InputFile]:
    """Return all files of a checkpoint by name in its folder; a single file has an empty name."""
    path = checkpoint.path
    if not path.is_dir():
        (source,) = checkpoint.files
        return {"": source}
    if is_remote(path):
        raise OutputError(
            "is a folder at a URL, which cannot be replaced atomically",
            file=path,
            remedy="Copy it to this machine, change it there, and copy it back",
        )
    inner = sorted(path.rglob("*"))
    links = [entry.relative_to(path).as_posix() for entry in inner if entry.is_symlink()]
    if links:
        taken = "with --start-from" if checkpoint.provenance else "as the checkpoint"
        raise OutputError(
            f"contains links, which would be replaced by copies: {listed(links)}",
            file=path,
            remedy=f"Give it {taken}, and a new folder with -o",
        )
    sources = {}
    for entry in inner:
        if entry.is_file():
            sources[entry.relative_to(path).as_posix()] = file = InputFile(entry)
            opened.callback(file.close)
    return sources


def _opened(path: Path, sources: Mapping[str, InputFile], opened: ExitStack) -> OutputFile:
    """Create the file or folder of the copy; it is closed with `opened`."""
    sizes = {name: source.size for name, source in sources.items()}
    if is_remote(path):
        return opened.enter_context(RemoteFile(path, sizes[""], over=sources[""].source))
    states = {name: source.source.state for name, source in sources.items()}
    if "" in sizes:
        return opened.enter_context(AtomicFile(path, sizes[""], over=states[""]))
    return opened.enter_context(AtomicFolder(path, sizes, over=states))
