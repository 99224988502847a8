"""Input files, opened once and read at offsets.

A file stays open from the reading of its header to the end of the averaging,
so that a trainer that renames a new checkpoint over it changes nothing for us,
and one that writes into it is noticed. Plain reads, never a memory map: a
mapped file that shrinks kills the process.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from swa_avg.errors import FileError, FormatError

_CHUNK = 1 << 20


class InputFile:
    """A regular file, open for reading.

    Attributes:
        path: The name that the user gave.
        size: Its bytes when it was opened.
    """

    __slots__ = ("_stat", "fd", "path", "size")

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = _open(path)
        except (OSError, ValueError) as error:
            raise FileError(f"cannot be opened: {_reason(error)}", file=path) from error
        self._stat = os.fstat(self.fd)
        if not stat.S_ISREG(self._stat.st_mode):
            self.close()
            raise FileError("is not a regular file", file=path)
        self.size = self._stat.st_size

    @property
    def start(self) -> int:
        """Where in the file on disk its first byte is: 0, but for a section."""
        return 0

    @property
    def identity(self) -> tuple[int, int]:
        """What two names of one file have in common: its device and inode."""
        return self._stat.st_dev, self._stat.st_ino

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on.

        Raises:
            FormatError: The file ends before the buffer is full.
            FileError: The system refuses.
        """
        while buffer:
            try:
                count = os.preadv(self.fd, [buffer], offset)
            except OSError as error:
                raise FileError(f"cannot be read: {_reason(error)}", file=self.path) from error
            if count == 0:
                self.check_unchanged()
                raise FormatError(
                    f"ends at byte {offset}",
                    file=self.path,
                    expected=f"{len(buffer)} bytes more",
                    remedy="The file was cut short",
                )
            buffer = buffer[count:]
            offset += count

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on; for headers, not for tensors."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                f"ends at byte {self.size}",
                file=self.path,
                expected=f"{length} bytes at {offset}",
                remedy="The file is cut short or damaged",
            )
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield the bytes of a range in pieces of at most 1 MiB."""
        for start in range(offset, offset + length, _CHUNK):
            yield self.read(start, min(_CHUNK, offset + length - start))

    def will_read(self, offset: int, length: int) -> None:
        """Tell the kernel, where it listens, that a range is wanted soon."""
        if hasattr(os, "posix_fadvise") and length > 0:
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise `FormatError` if the file was written to since it was opened."""
        now = os.fstat(self.fd)
        before = self._stat
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise FormatError(
                "changed while being read",
                file=self.path,
                remedy="Wait until the run has finished writing it, and start again",
            )

    def close(self) -> None:
        """Close the file; reading from it is then an error."""
        os.close(self.fd)


class Section(InputFile):
    """A stretch of a file, read as if it were a file of its own. It is never closed by itself."""

    __slots__ = ("_start",)

    def __init__(self, file: InputFile, start: int, length: int) -> None:
        self.path, self.fd, self._stat = file.path, file.fd, file._stat
        if not 0 <= start <= start + length <= file.size:
            raise FormatError(
                f"ends at byte {file.size}",
                file=file.path,
                expected=f"{length} bytes at {start}",
                remedy="The file is cut short, or belongs to another checkpoint",
            )
        self._start, self.size = start, length

    @property
    def start(self) -> int:
        """Where in the file on disk its first byte is."""
        return self._start

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on, counted from the section's start."""
        super().read_into(buffer, self._start + offset)

    def will_read(self, offset: int, length: int) -> None:
        """Tell the kernel, where it listens, that a range is wanted soon."""
        super().will_read(self._start + offset, length)

    def close(self) -> None:
        """Leave the file open: it is not the section's."""


def _open(path: Path) -> int:
    # Without O_NONBLOCK the opening of a FIFO waits for a writer for ever.
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        # Ten checkpoints of a hundred shards are more files than are allowed at first.
        if error.errno != errno.EMFILE or not _allow_more_files():
            raise
        return os.open(path, flags)


def _allow_more_files() -> bool:
    """Raise this process's limit of open files as far as it may; tell whether that helped."""
    try:
        import resource
    except ImportError:
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft != hard


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
