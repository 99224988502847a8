"""Input files, opened once and read at offsets.

A file stays open from the reading of its header to the end of the averaging,
so that a trainer that renames a new checkpoint over it changes nothing for us,
and one that writes into it is noticed. Plain reads, never a memory map: a
mapped file that shrinks kills the process. What a URL names is read in the
same way, through `fetching.py`.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import repeat
from operator import add
from pathlib import Path
from typing import Protocol

from swa_avg.errors import FileError, FormatError
from swa_avg.storage.fetching import RemoteSource
from swa_avg.storage.prefetch import Range, ReadAhead
from swa_avg.storage.remote import RemotePath

_CHUNK = 1 << 20
_ANNOUNCED = 1 << 30
_TICK = 20 * 10**6  # nanoseconds: twice the longest tick of a kernel's clock
_SLOW_TICK = 2 * 10**9  # of file systems that know whole seconds only
_TRIES = 5
# Of remote files: how much is read ahead, in requests of which size, how many at once.
ROOM = 128 << 20
_LITTLE_ROOM = 16 << 20
_LEAST_BLOCK = 256 << 10
_MOST_BLOCK = 8 << 20
_MOST_REQUESTS = 64


class Source(Protocol):
    """Where the bytes of a file come from: this machine's disk, or elsewhere."""

    @property
    def size(self) -> int:
        """Its bytes when it was opened."""

    @property
    def modified(self) -> float | None:
        """When it was last written, in seconds since 1970, where that is known."""

    @property
    def identity(self) -> tuple[object, object]:
        """What two names of one file have in common."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the start of `buffer`; return with how many bytes, 0 at the end of the file."""

    def check_unchanged(self) -> None:
        """Raise `FormatError` if the file was written to since it was opened."""

    def close(self) -> None:
        """Close the file."""


class _Disk:
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


class InputFile:
    """A regular file, open for reading.

    Attributes:
        path: The name that the user gave.
        size: Its bytes when it was opened.
        source: Where its bytes come from.
    """

    __slots__ = ("path", "size", "source")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source: Source = RemoteSource(path) if isinstance(path, RemotePath) else _Disk(path)
        self.size = self.source.size

    @property
    def start(self) -> int:
        """Where in the file on disk its first byte is: 0, but for a section."""
        return 0

    @property
    def modified(self) -> float | None:
        """When it was last written, in seconds since 1970, where that is known."""
        return self.source.modified

    @property
    def identity(self) -> tuple[object, object]:
        """What two names of one file have in common: on disk its device and inode."""
        return self.source.identity

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on.

        Raises:
            FormatError: The file ends before the buffer is full.
            FileError: The system refuses.
        """
        while buffer:
            count = self.source.read_into(buffer, offset)
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

    def read_scattered(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill up to 1024 buffers, one after the other, from `offset` on.

        Raises:
            FormatError: The file ends before the buffers are full.
            FileError: The system refuses.
        """
        source = self.source
        if isinstance(source, _Disk) and source.read_scattered(buffers, self.start + offset):
            return
        for buffer in buffers:
            self.read_into(buffer, offset)
            offset += len(buffer)

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

    def read_pieces(self, places: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Return what `read` does for each of very many short pieces."""
        source = self.source
        ends = map(add, places, lengths)
        inside = min(places, default=0) >= 0 and max(ends, default=0) <= self.size
        if isinstance(source, _Disk) and inside:
            pieces = source.read_pieces([self.start + place for place in places], lengths)
            if list(map(len, pieces)) == list(lengths):
                return pieces
        return list(map(self.read, places, lengths))

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield the bytes of a range in pieces of at most 1 MiB."""
        with reading_ahead([(self, offset, length)] if length > _CHUNK else []):
            for start in range(offset, offset + length, _CHUNK):
                yield self.read(start, min(_CHUNK, offset + length - start))

    def will_read(self, offset: int, length: int) -> None:
        """Tell the kernel, where it listens, that a range is wanted soon."""
        if isinstance(self.source, _Disk):
            self.source.will_read(self.start + offset, length)

    def will_not_read(self, offset: int, length: int) -> None:
        """Tell the kernel, where it listens, that a range need not stay in its cache."""
        if isinstance(self.source, _Disk):
            self.source.will_not_read(self.start + offset, length)

    def is_cached(self, offset: int) -> bool:
        """Tell whether a byte is in the kernel's cache; True where it cannot be asked."""
        return not isinstance(self.source, _Disk) or self.source.is_cached(self.start + offset)

    def check_unchanged(self) -> None:
        """Raise `FormatError` if the file was written to since it was opened."""
        self.source.check_unchanged()

    def check_in_place(self) -> None:
        """Raise `FormatError` if its name leads to another file by now."""
        if isinstance(self.source, _Disk):
            self.source.check_in_place()

    def close(self) -> None:
        """Close the file; reading from it is then an error."""
        self.source.close()


class Section(InputFile):
    """A stretch of a file, read as if it were a file of its own. It is never closed by itself."""

    __slots__ = ("_start",)

    def __init__(self, file: InputFile, start: int, length: int) -> None:
        self.path, self.source = file.path, file.source
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

    def close(self) -> None:
        """Leave the file open: it is not the section's."""


@contextmanager
def reading_ahead(
    ranges: Iterable[tuple[InputFile, int, int]],
    threads: int = 1,
    together: int = 1,
    room: int = _LITTLE_ROOM,
) -> Iterator[None]:
    """Fetch ranges of remote files before they are asked for; a disk has the kernel for that.

    Args:
        ranges: What will be read, about in this order: the file, the first byte, how many.
        threads: How many threads will read.
        together: How many of the files are read at the same time.
        room: How many bytes may be held of them, all in all. Where the blocks would be less
            than 256 KiB (many files and threads) it is two of these for each and each.
    """
    wanted: dict[RemoteSource, list[Range]] = {}
    for file, offset, length in ranges:
        if isinstance(file.source, RemoteSource):
            start = file.start + offset
            part = (start, min(length, file.source.size - start))
            wanted.setdefault(file.source, []).append(part)
    if not wanted:
        yield
        return
    share = room // min(together, len(wanted))
    block = min(max(share // (2 * threads), _LEAST_BLOCK), _MOST_BLOCK)
    with ExitStack() as ended:
        pool = ThreadPoolExecutor(_MOST_REQUESTS, "swa-avg-remote")
        ended.callback(pool.shutdown, wait=True, cancel_futures=True)
        for number, (source, parts) in enumerate(wanted.items()):
            ahead = ReadAhead(source.fetch, parts, block, share, pool)
            ended.callback(ahead.close)
            ended.enter_context(source.reading(ahead))
            if number < together:
                ahead.start()
        yield


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


def announce(ranges: Iterable[tuple[InputFile, int, int]]) -> None:
    """Have the kernel read what comes first of each file, a disk's file, into its cache.

    Args:
        ranges: What will be read, about in this order: the file, the first byte, how many.
    """
    left = _ANNOUNCED
    ends: dict[InputFile, int] = {}
    for file, offset, length in ranges:
        for start in range(max(offset, ends.get(file, 0)), offset + length, _CHUNK):
            file.will_read(start, _CHUNK)  # of a longer range Linux heeds the start only
            ends[file] = start + _CHUNK
            left -= _CHUNK
            if left <= 0:
                return


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
