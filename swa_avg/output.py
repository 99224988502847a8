"""The output: whole or not at all.

It is written to a temporary file beside its target, forced to disk, and put
in the target's place by one rename. Until then the target is as it was;
whatever goes wrong, the temporary file goes.
"""

from __future__ import annotations

import os
import secrets
import stat
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from swa_avg.errors import OutputError
from swa_avg.files import InputFile


def check_target(target: Path, inputs: Iterable[InputFile], force: bool) -> None:
    """Refuse a target that may not be written, before anything is read.

    Raises:
        OutputError: It is an input, exists without `force`, or is no regular file.
    """
    try:
        found = target.stat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise _refusal(target, error) from error
    for file in inputs:
        if file.identity == (found.st_dev, found.st_ino):
            raise OutputError(
                "is one of the inputs", file=target, remedy="Choose another output with -o"
            )
    if not stat.S_ISREG(found.st_mode):
        raise OutputError(
            "is a folder" if stat.S_ISDIR(found.st_mode) else "is not a regular file",
            file=target,
            expected="the name of a file to write",
        )
    if not force:
        raise OutputError(
            "exists already",
            file=target,
            remedy="Choose another output, or replace it with --force",
        )


class AtomicFile:
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
            folder = os.open(self._final.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise _refusal(self.target, error) from error

    def _discard(self) -> None:
        os.close(self._fd)
        self._remove()

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _refusal(target: Path, error: OSError | ValueError) -> OutputError:
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return OutputError(f"cannot be written: {reason}", file=target)
