"""A file on this machine, open for reading at offsets: the system calls, and what they say.

Plain reads, never a memory map: a mapped file that shrinks kills the process.
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
_SLOW_TICK = 2 * 10**9  # of file systems that know whole seconds only
_TRIES = 5


class DiskSource:
    """A regular file of this machine, open for reading."""

    __slots__ = ("_path", "_stat", "fd", "size")

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.fd = _open(path)
        except (OSError, ValueError) as error:
            raise FileError(f"cannot be opened: {_reason(error)}", file=path) from error
        try:
            self._stat = _settled(self.fd, path)
        except BaseException:
            self.close()
            raise
        self.size = self._stat.st_size

    @property
    def modified(self) -> float:
        """When it was last written, in seconds since 1970."""
        return self._stat.st_mtime

    @property
    def identity(self) -> tuple[int, int]:
        """Its device and inode."""
        return self._stat.st_dev, self._stat.st_ino

    @property
    def state(self) -> tuple[int, int, int, int]:
        """Its device, inode, size and last change in nanoseconds, when it was opened."""
        return *self.identity, self.size, self._stat.st_mtime_ns

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the start of `buffer`; return with how many bytes, 0 at the end of the file."""
        try:
            return os.preadv(self.fd, [buffer], offset)
        except OSError as error:
            raise FileError(f"cannot be read: {_reason(error)}", file=self._path) from error

    def read_scattered(self, buffers: Sequence[memoryview], offset: int) -> bool:
        """Fill buffers one after the other from `offset` on; tell whether all are full."""
        try:
            return os.preadv(self.fd, buffers, offset) == sum(map(len, buffers))
        except OSError as error:
            raise FileError(f"cannot be read: {_reason(error)}", file=self._path) from error

    def read_pieces(self, places: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Return short pieces; what lies behind the end of the file is missing from them."""
        try:
            return list(map(os.pread, repeat(self.fd), lengths, places))
        except OSError as error:
            raise FileError(f"cannot be read: {_reason(error)}", file=self._path) from error

    def will_read(self, offset: int, length: int) -> None:
        """Tell the kernel, where it listens, that a range is wanted soon."""
        if hasattr(os, "posix_fadvise") and length > 0:
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def will_not_read(self, offset: int, length: int) -> None:
        """Tell the kernel, where it listens, that a range need not stay in its cache."""
        if hasattr(os, "posix_fadvise") and length > 0:
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)

    def is_cached(self, offset: int) -> bool:
        """Tell whether a byte is in the kernel's cache; True where it cannot be asked."""
        try:
            os.preadv(self.fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except (AttributeError, OSError):
            pass
        return True

    def check_unchanged(self) -> None:
        """Raise `FormatError` if the file was written to since it was opened."""
        now = os.fstat(self.fd)
        before = self._stat
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise FormatError(
                "changed while being read",
                file=self._path,
                remedy="Wait until the run has finished writing it, and start again",
            )

    def check_in_place(self) -> None:
        """Raise `FormatError` if its name leads to another file by now."""
        try:
            now = self._path.stat()
        except OSError:
            return  # removed: what was opened is still what was there
        if (now.st_dev, now.st_ino) != self.identity:
            raise FormatError(
                "was replaced while its folder was being read",
                file=self._path,
                remedy="Wait until the run has finished writing it, and start again",
            )

    def close(self) -> None:
        """Close the file; reading from it is then an error."""
        os.close(self.fd)


def _settled(descriptor: int, path: Path) -> os.stat_result:
    """Return a file's status, once a later write to it cannot bear the same time.

    The system's clock for files ticks: what was written in this very tick may be
    written again in it, and nobody would see.

    Raises:
        FileError: It is no regular file, or is being written to all the time.
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
        remedy="Wait until the run has finished writing it, and start again",
    )


def _open(path: Path) -> int:
    # Without O_NONBLOCK the opening of a FIFO waits for a writer for ever.
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        # A checkpoint of hundreds of shards is more files than are allowed at first.
        if error.errno != errno.EMFILE or not allow_all_files():
            raise
        return os.open(path, flags)


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
