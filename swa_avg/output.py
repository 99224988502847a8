"""The output: whole or not at all.

It is written to a temporary file beside its target, forced to disk, and put
in the target's place by one rename. Until then the target is as it was;
whatever goes wrong, the temporary file goes.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Protocol

from swa_avg.errors import OutputError, listed
from swa_avg.files import InputFile

# Files of weights in a folder: of Hugging Face, whatever their number, and of a distributed one.
_WEIGHTS = re.compile(
    r"(adapter_|(diffusion_)?pytorch_)?model[^/]*\.(safetensors|bin)(\.index\.json)?"
    r"|__\d+_\d+\.distcp|\.metadata"
)


class Output(Protocol):
    """What an average is written to: one file, or several that count as one."""

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""

    def commit(self) -> None:
        """Put it in its target's place."""


def check_target(
    target: Path, inputs: Iterable[InputFile], *, force: bool, folder: bool = False
) -> None:
    """Refuse a target that may not be written, before anything is read.

    Args:
        target: The output.
        inputs: Files that must not be overwritten.
        force: Whether it may be replaced if it exists.
        folder: Whether it will be a folder.

    Raises:
        OutputError: It is an input, exists without `force`, or is of another kind.
    """
    try:
        found = target.stat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise _refusal(target, error) from error
    for file in inputs:
        beneath = folder and _is_beneath(file.path, target)
        if file.identity == (found.st_dev, found.st_ino) or beneath:
            raise OutputError(
                "holds one of the inputs" if beneath else "is one of the inputs",
                file=target,
                remedy="Choose another output with -o",
            )
    fits = stat.S_ISDIR(found.st_mode) if folder else stat.S_ISREG(found.st_mode)
    if not fits:
        raise OutputError(
            "is a folder" if stat.S_ISDIR(found.st_mode) else "is no regular file",
            file=target,
            expected=f"the name of a {'folder' if folder else 'file'} to write",
        )
    if not force:
        raise OutputError(
            "exists already",
            file=target,
            remedy="Choose another output, or replace it with --force",
        )


def _is_beneath(path: Path, folder: Path) -> bool:
    """Tell whether a file is in a folder, however deep, under either of its names."""
    places = (Path(os.path.realpath(path)), Path(os.path.realpath(path.parent), path.name))
    return any(Path(os.path.realpath(folder)) in place.parents for place in places)


def check_replaceable(target: Path, names: Iterable[str]) -> None:
    """Refuse to replace a folder that holds more than weights and what takes its place.

    Args:
        target: The output, a folder that may exist.
        names: The files that the new folder will have.

    Raises:
        OutputError: Something in it would be lost.
    """
    if not target.is_dir():
        return
    kept = set(names)
    there = (path.relative_to(target).as_posix() for path in target.rglob("*"))
    lost = sorted(name for name in there if name not in kept and not _WEIGHTS.fullmatch(name))
    if lost:
        raise OutputError(
            f"holds what would be lost: {listed(lost)}",
            file=target,
            remedy="Choose another output with -o, or move it away first",
        )


class AtomicFile(AbstractContextManager["AtomicFile"]):
    """A file that comes into being whole, by `commit`, or not at all.

    A symbolic link stays a link: the file behind it is replaced. The mode is the
    replaced file's, or what the umask leaves of 0666.

    Attributes:
        target: The name that the user gave.
    """

    def __init__(self, target: Path, size: int) -> None:
        self.target = target
        self._final = Path(os.path.realpath(target))
        try:
            # A name too long is found here, not at the very end.
            with suppress(FileNotFoundError):
                self._final.lstat()
            self._temporary = self._final.parent / f".swa-avg-{secrets.token_hex(8)}.tmp"
            # A signal can come between any two steps: whatever happens, this is done at exit.
            self._remove = weakref.finalize(self, _unlink, self._temporary)
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise _refusal(target, error) from error
        try:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            self._discard()
            raise _refusal(target, error) from error

    @property
    def path(self) -> Path:
        """Where its bytes are until it is committed."""
        return self._temporary

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`; may be called from several threads.

        Raises:
            OutputError: The system refuses, for one because the disk is full.
        """
        view = memoryview(data)
        while view:
            try:
                count = os.pwrite(self._fd, view, offset)
            except OSError as error:
                raise _refusal(self.target, error) from error
            view = view[count:]
            offset += count

    def commit(self) -> None:
        """Force the file to disk and put it in the target's place.

        Raises:
            OutputError: The system refuses; the target is as it was.
        """
        try:
            with suppress(FileNotFoundError):
                os.fchmod(self._fd, stat.S_IMODE(self._final.stat().st_mode))
            # A failed fsync is final: the kernel may have dropped the pages it could not write.
            os.fsync(self._fd)
            self._temporary.replace(self._final)
        except OSError as error:
            raise _refusal(self.target, error) from error
        _sync(self._final.parent)

    def _discard(self) -> None:
        os.close(self._fd)
        self._remove()

    def __exit__(self, *failure: object) -> None:
        self._discard()


class AtomicFolder(AbstractContextManager["AtomicFolder"]):
    """A folder of files that comes into being whole, by `commit`, or not at all.

    Places count through the files as if they lay one behind the other. A folder
    that is replaced is moved away first: between that and the last rename there is
    a moment without it.

    Attributes:
        target: The name that the user gave.
    """

    def __init__(self, target: Path, files: Mapping[str, int]) -> None:
        self.target = target
        self._final = Path(os.path.realpath(target))
        self._temporary = self._final.parent / f".swa-avg-{secrets.token_hex(8)}.tmp"
        self._remove = weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        self._opened = ExitStack()
        self._starts: list[int] = []
        self._files: list[AtomicFile] = []
        try:
            self._temporary.mkdir()
            place = 0
            for name, size in files.items():
                (self._temporary / name).parent.mkdir(parents=True, exist_ok=True)
                file = AtomicFile(self._temporary / name, size)
                self._files.append(self._opened.enter_context(file))
                self._starts.append(place)
                place += size
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise _refusal(target, error) from error
            raise

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data`, which lies in one file, at `offset`.

        Raises:
            OutputError: The system refuses, for one because the disk is full.
        """
        # The last file that starts there: an empty one before it has no bytes to write.
        number = bisect_right(self._starts, offset) - 1
        self._files[number].write(data, offset - self._starts[number])

    def commit(self) -> None:
        """Force the files to disk and put the folder in the target's place.

        Raises:
            OutputError: The system refuses.
        """
        for file in self._files:
            file.commit()
        try:
            replaced = self._temporary.with_suffix(".old")
            with suppress(FileNotFoundError):
                self._final.rename(replaced)
            try:
                self._temporary.rename(self._final)
            except BaseException:
                with suppress(FileNotFoundError):
                    replaced.rename(self._final)
                raise
        except OSError as error:
            raise _refusal(self.target, error) from error
        _sync(self._final.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _discard(self) -> None:
        self._opened.close()
        self._remove()

    def __exit__(self, *failure: object) -> None:
        self._discard()


def _sync(folder: Path) -> None:
    """Force the names in a folder to disk, where its file system knows how and we may."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _refusal(target: Path, error: OSError | ValueError) -> OutputError:
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return OutputError(f"cannot be written: {reason}", file=target)
