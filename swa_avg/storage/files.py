"""Input files, opened once and read at offsets.

A file stays open from the reading of its header to the end of the averaging,
so that a trainer that renames a new checkpoint over it changes nothing for us,
and one that writes into it is noticed. What a URL names is read in the same
way, through `fetching.py`.
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

    @property
    def state(self) -> tuple[int, int, int, int] | None:
        """On disk its device, inode, size and last change in nanoseconds; else None."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the start of `buffer`; return with how many bytes, 0 at the end of the file."""

    def check_unchanged(self) -> None:
        """Raise `FormatError` if the file was written to since it was opened."""

    def close(self) -> None:
        """Close the file."""


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
        self.source: Source = (
            RemoteSource(path) if isinstance(path, RemotePath) else DiskSource(path)
        )
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
        if isinstance(source, DiskSource) and source.read_scattered(buffers, self.start + offset):
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
        """Tell the kernel, where it listens, that a range is wanted soon."""
        if isinstance(self.source, DiskSource):
            self.source.will_read(self.start + offset, length)

    def will_not_read(self, offset: int, length: int) -> None:
        """Tell the kernel, where it listens, that a range need not stay in its cache."""
        if isinstance(self.source, DiskSource):
            self.source.will_not_read(self.start + offset, length)

    def is_cached(self, offset: int) -> bool:
        """Tell whether a byte is in the kernel's cache; True where it cannot be asked."""
        return not isinstance(self.source, DiskSource) or self.source.is_cached(self.start + offset)

    def check_unchanged(self) -> None:
        """Raise `FormatError` if the file was written to since it was opened."""
        self.source.check_unchanged()

    def check_in_place(self) -> None:
        """Raise `FormatError` if its name leads to another file by now."""
        if isinstance(self.source, DiskSource):
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
        pool = ended.enter_context(RequestPool(_MOST_REQUESTS))
        for number, (source, parts) in enumerate(wanted.items()):
            ahead = ReadAhead(source.fetch, parts, block, share, pool)
            ended.callback(ahead.close)
            ended.enter_context(source.reading(ahead))
            if number < together:
                ahead.start()
        yield


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
