"""A file on this machine, open for reading at offsets: the system calls and their errors.

Files are read, never memory-mapped: the process is killed when a mapped file shrinks.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path

from swa_avg.errors import FileError, FormatError
from swa_avg.storage.limits import allow_all_files

_TICK = 20 * 10**6  # nanoseconds: twice the longest tick of a kernel's clock
_SLOW_TICK = 2 * 10**9  # for file systems whose timestamps are whole seconds
_TRIES = 5


class DiskSource:
    """A regular file on this machine, open for reading.

    Args:
        path: The file.
        own: Whether no other process writes to the file, which this process has written.
    """

    __slots__ = ("_path", "_stat", "fd", "size")

    def __init__(self, path: Path, *, own: bool = False) -> None:
        self._path = path
        try:
            self.fd = _open(path)
        except (OSError, ValueError) as error:
            raise FileError(f"cannot be opened: {_reason(error)}", file=path) from error
        try:
            self._stat = os.fstat(self.fd) if own else _stable_status(self.fd, path)
        except BaseException:
            self.close()
            raise
        self.size = self._stat.st_size

    @property
    def modified(self) -> float:
        """The time of the last write in seconds since 1970."""
        return self._stat.st_mtime

    @property
    def identity(self) -> tuple[int, int]:
        """The device and the inode."""
        return self._stat.st_dev, self._stat.st_ino

    @property
    def state(self) -> tuple[int, int, int, int]:
        """Device, inode, size and last change in nanoseconds when the file was opened."""
        return *self.identity, self.size, self._stat.st_mtime_ns

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the start of `buffer`; return the number of bytes, 0 at the end of the file."""
        try:
            return os.preadv(self.fd, [buffer], offset)
        except OSError as error:
            raise FileError(f"cannot be read: {_reason(error)}", file=self._path) from error

    def read_scattered(self, buffers: Sequence[memoryview], offset: int) -> bool:
        """Fill buffers one after the other; return whether the file filled all of them."""
        try:
            return os.preadv(self.fd, buffers, offset) == sum(map(len, buffers))
        except OSError as error:
            raise FileError(f"cannot be read: {_reason(error)}", file=self._path) from error

    def read_pieces(self, places: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Return short pieces; a piece beyond the end of the file is shorter."""
        try:
            return list(map(os.pread, repeat(self.fd), lengths, places))
        except OSError as error:
            raise FileError(f"cannot be read: {_reason(error)}", file=self._path) from error

    def will_read(self, offset: int, length: int) -> None:
        """Advise the kernel, where it supports this, that a range is read soon."""
        if hasattr(os, "posix_fadvise") and length > 0:
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def will_not_read(self, offset: int, length: int) -> None:
        """Advise the kernel, where it supports this, that a range can leave its cache."""
        if hasattr(os, "posix_fadvise") and length > 0:
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)

    def is_cached(self, offset: int) -> bool:
        """Return whether a byte is in the kernel's cache; True if that is unknown."""
        try:
            os.preadv(self.fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except (AttributeError, OSError):
            pass
        return True

    def check_unchanged(self) -> None:
        """Raise `FormatError` if the file was written to after it was opened."""
        now = os.fstat(self.fd)
        before = self._stat
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise FormatError(
                "changed while being read",
                file=self._path,
                remedy="Wait until the run has finished writing it, then run the command again",
            )

    def check_in_place(self) -> None:
        """Raise `FormatError` if another file now has this file's path."""
        try:
            now = self._path.stat()
        except OSError:
            return  # removed, not replaced
        if (now.st_dev, now.st_ino) != self.identity:
            raise FormatError(
                "was replaced while its folder was being read",
                file=self._path,
                remedy="Wait until the run has finished writing it, then run the command again",
            )

    def close(self) -> None:
        """Close the file; later reads are errors."""
        # The number may soon belong to another file: it must not be read in place of this one.
        descriptor, self.fd = self.fd, -1
        if descriptor >= 0:
            os.close(descriptor)


def _stable_status(descriptor: int, path: Path) -> os.stat_result:
    """Return a file's status when every later write is sure to change its timestamp.

    File timestamps advance in ticks. A second write within the tick of the first one
    leaves the timestamp the same, so this function waits until that tick is over.

    Raises:
        FileError: It is not a regular file, or another process keeps writing to it.
    """
    for _ in range(_TRIES):
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileError("is not a regular file", file=path)
        age = time.time_ns() - status.st_mtime_ns
        tick = _TICK if status.st_mtime_ns % 10**9 else _SLOW_TICK
        if not 0 <= age < tick:
            return status
        time.sleep((tick - age) / 10**9)
    raise FileError(
        "is being written to",
        file=path,
        remedy="Wait until the run has finished writing it, then run the command again",
    )


def _open(path: Path) -> int:
    # Without O_NONBLOCK, opening a FIFO blocks until a writer opens it.
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        # A checkpoint with hundreds of shards can exceed the default limit on open files.
        if error.errno != errno.EMFILE or not allow_all_files():
            raise
        return os.open(path, flags)


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.errno == errno.EBADF:
        return "it is closed"
    return (isinstance(error, OSError) and error.strerror) or str(error)
