"""Input files, opened once and read at offsets.

A file stays open from the reading of its header to the end of the averaging.
So the average does not change when a trainer renames a new checkpoint over the
file, and a trainer that writes into the file is noticed. Remote files are read
through the same interface by `fetching.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import add
from pathlib import Path
from typing import Protocol

from swa_avg.errors import FormatError
from swa_avg.storage.disk import DiskSource
from swa_avg.storage.fetching import RemoteSource
from swa_avg.storage.prefetch import Range, ReadAhead
from swa_avg.storage.remote import RemotePath
from swa_avg.storage.request_pool import RequestPool

_CHUNK = 1 << 20
_ANNOUNCED = 1 << 30
# For remote files: how much is read ahead, the size of one request, how many run at once.
ROOM = 128 << 20
_LITTLE_ROOM = 16 << 20
_LEAST_BLOCK = 256 << 10
_MOST_BLOCK = 8 << 20
_MOST_REQUESTS = 64


class Source(Protocol):
    """The bytes of a file, on this machine's disk or behind a URL."""

    @property
    def size(self) -> int:
        """The size in bytes when the file was opened."""

    @property
    def modified(self) -> float | None:
        """The time of the last write in seconds since 1970, or None if it is unknown."""

    @property
    def identity(self) -> tuple[object, object]:
        """A key that is equal for two names of one file."""

    @property
    def state(self) -> tuple[int, int, int, int] | None:
        """Device, inode, size and last change in nanoseconds; None for a remote file."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the start of `buffer`; return the number of bytes, 0 at the end of the file."""

    def check_unchanged(self) -> None:
        """Raise `FormatError` if the file was written to after it was opened."""

    def close(self) -> None:
        """Close the file."""


class InputFile:
    """A regular file, open for reading.

    Attributes:
        path: The path as the user wrote it.
        size: The size in bytes when the file was opened.
        source: The object that reads the bytes.
    """

    __slots__ = ("path", "size", "source")

    def __init__(self, path: Path, own: bool = False) -> None:
        self.path = path
        self.source: Source = (
            RemoteSource(path) if isinstance(path, RemotePath) else DiskSource(path, own=own)
        )
        self.size = self.source.size

    @property
    def start(self) -> int:
        """The offset of the first byte in the file on disk; 0 except for a `Section`."""
        return 0

    @property
    def modified(self) -> float | None:
        """The time of the last write in seconds since 1970, or None if it is unknown."""
        return self.source.modified

    @property
    def identity(self) -> tuple[object, object]:
        """A key that is equal for two names of one file: on disk, its device and inode."""
        return self.source.identity

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            FormatError: The file ends before the buffer is full.
            FileError: The system reports an error.
        """
        while buffer:
            count = self.source.read_into(buffer, offset)
            if count == 0:
                self.check_unchanged()
                raise FormatError(
                    f"ends at byte {offset}",
                    file=self.path,
                    expected=f"{len(buffer)} more bytes",
                    remedy="The file was cut short",
                )
            buffer = buffer[count:]
            offset += count

    def read_scattered(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill up to 1024 buffers, one after the other, with the bytes at `offset`.

        Raises:
            FormatError: The file ends before the buffers are full.
            FileError: The system reports an error.
        """
        source = self.source
        if isinstance(source, DiskSource) and source.read_scattered(buffers, self.start + offset):
            return
        for buffer in buffers:
            self.read_into(buffer, offset)
            offset += len(buffer)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`; for headers, not for tensors."""
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
        """Return the bytes of many short pieces, as `read` returns each of them."""
        source = self.source
        ends = map(add, places, lengths)
        inside = min(places, default=0) >= 0 and max(ends, default=0) <= self.size
        if isinstance(source, DiskSource) and inside:
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
        """Advise the kernel, where it supports this, that a range is read soon."""
        if isinstance(self.source, DiskSource):
            self.source.will_read(self.start + offset, length)

    def will_not_read(self, offset: int, length: int) -> None:
        """Advise the kernel, where it supports this, that a range can leave its cache."""
        if isinstance(self.source, DiskSource):
            self.source.will_not_read(self.start + offset, length)

    def is_cached(self, offset: int) -> bool:
        """Return whether a byte is in the kernel's cache; True if that is unknown."""
        return not isinstance(self.source, DiskSource) or self.source.is_cached(self.start + offset)

    def check_unchanged(self) -> None:
        """Raise `FormatError` if the file was written to after it was opened."""
        self.source.check_unchanged()

    def check_in_place(self) -> None:
        """Raise `FormatError` if another file now has this file's path."""
        if isinstance(self.source, DiskSource):
            self.source.check_in_place()

    @property
    def closed(self) -> bool:
        """Whether the file was closed; a URL is read without an open file."""
        return isinstance(self.source, DiskSource) and self.source.fd < 0

    def close(self) -> None:
        """Close the file; later reads are errors."""
        self.source.close()


class Section(InputFile):
    """A range of a file, read like a separate file. Closing a section leaves the file open."""

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
        """The offset of the section's first byte in the file on disk."""
        return self._start

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`, counted from the section's start."""
        super().read_into(buffer, self._start + offset)

    def close(self) -> None:
        """Do nothing: the file belongs to another object."""


@contextmanager
def reading_ahead(
    ranges: Iterable[tuple[InputFile, int, int]],
    threads: int = 1,
    together: int = 1,
    room: int = _LITTLE_ROOM,
) -> Iterator[None]:
    """Fetch ranges of remote files before they are read.

    Files on disk are skipped: the kernel reads them ahead.

    Args:
        ranges: The ranges in about the order in which they are read: the file, the first
            byte, the number of bytes.
        threads: How many threads read.
        together: How many of the files are read at the same time.
        room: How many bytes of all files may be in memory. A block has at least 256 KiB,
            and each file has at least two blocks per thread, even if that exceeds `room`.
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
    with ExitStack() as stack:
        pool = stack.enter_context(RequestPool(_MOST_REQUESTS))
        for number, (source, parts) in enumerate(wanted.items()):
            ahead = ReadAhead(source.fetch, parts, block, share, pool)
            stack.callback(ahead.close)
            stack.enter_context(source.reading(ahead))
            if number < together:
                ahead.start()
        yield


def announce(ranges: Iterable[tuple[InputFile, int, int]]) -> None:
    """Make the kernel read the first GiB of `ranges` into its cache; for files on disk.

    Args:
        ranges: The ranges in about the order in which they are read: the file, the first
            byte, the number of bytes.
    """
    left = _ANNOUNCED
    ends: dict[InputFile, int] = {}
    for file, offset, length in ranges:
        for start in range(max(offset, ends.get(file, 0)), offset + length, _CHUNK):
            file.will_read(start, _CHUNK)  # Linux reads only the start of a longer range
            ends[file] = start + _CHUNK
            left -= _CHUNK
            if left <= 0:
                return
