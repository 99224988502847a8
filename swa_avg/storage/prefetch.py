"""Prefetching for sources with slow requests: known ranges are fetched in blocks.

Several requests run at once. The amount of data that is fetched but not yet read is
limited. This module knows neither files nor networks: a function returns the bytes.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass

Range = tuple[int, int]  # the first byte, and the number of bytes
Fetch = Callable[[int, int], bytes]  # from the first byte to one past the last

# Ranges with a smaller gap are fetched together: a second request would cost more.
_GAP = 64 * 1024
# Blocks can be tiny and many: at most this many are requested at once.
_MOST_REQUESTS = 64


@dataclass
class _Block:
    """A block that was requested.

    Attributes:
        size: Its size in bytes.
        data: The request.
        touched: Whether a reader has begun to read it.
        spent: Whether a reader has reached its end.
    """

    size: int
    data: Future[bytes]
    touched: bool = False
    spent: bool = False


class ReadAhead:
    """Prefetched ranges of one file, read roughly in order, from any thread.

    Reading in a block starts the requests for the next blocks, as far as there is room.
    Blocks that were read to their end are dropped first.
    """

    def __init__(
        self, fetch: Fetch, ranges: Iterable[Range], block: int, room: int, pool: Executor
    ) -> None:
        """Plan the blocks; nothing is fetched yet.

        Args:
            fetch: Returns the bytes of a range.
            ranges: The ranges that will be read.
            block: The maximum number of bytes in one request.
            room: How many bytes may be in memory or requested; a block that a reader
                waits for is fetched even beyond that.
            pool: Runs the requests.
        """
        self._fetch = fetch
        self._blocks = list(_blocks(ranges, block))
        self._starts = [start for start, _ in self._blocks]
        self._room = room
        self._pool = pool
        self._requested: dict[int, _Block] = {}
        self._unspent = len(self._blocks)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Request the first blocks, before the first read."""
        with self._lock:
            self._request_from(0)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the start of `buffer`; return the number of bytes, 0 outside the ranges."""
        number = bisect_right(self._starts, offset) - 1
        if number < 0 or offset >= self._blocks[number][1]:
            return 0
        start, end = self._blocks[number]
        with self._lock:
            block = self._requested.get(number) or self._request(number)
            block.touched = True
            self._request_from(number + 1)
        count = min(len(buffer), end - offset)
        buffer[:count] = memoryview(block.data.result())[offset - start :][:count]
        if offset + count == end and not block.spent:
            self._mark_spent(block)
        return count

    def close(self) -> None:
        """Cancel all requests and make no more."""
        with self._lock:
            for block in self._requested.values():
                block.data.cancel()
            self._requested.clear()
            self._starts.clear()

    def _mark_spent(self, block: _Block) -> None:
        """Mark a block as read to its end; a late reader may still read a few bytes of it."""
        with self._lock:
            block.spent = True
            self._unspent -= 1
            if not self._unspent:
                self._requested.clear()

    def _request_from(self, first: int) -> None:
        """Request the next blocks, as far as there is room."""
        for number in range(first, min(first + _MOST_REQUESTS, len(self._blocks))):
            if number in self._requested:
                continue
            if not self._make_room(number, lambda block: block.spent):
                return
            self._request(number)

    def _request(self, number: int) -> _Block:
        """Request a block, and drop others if there is no room."""
        # First the blocks read to their end, then blocks not begun, the last ones first.
        if not self._make_room(number, lambda block: block.spent):
            self._make_room(number, lambda block: not block.touched)
        start, end = self._blocks[number]
        block = _Block(end - start, self._pool.submit(self._fetch, start, end))
        self._requested[number] = block
        return block

    def _make_room(self, number: int, may_drop: Callable[[_Block], bool]) -> bool:
        """Drop blocks until another one fits; return whether it does."""
        start, end = self._blocks[number]
        missing = sum(block.size for block in self._requested.values()) + end - start - self._room
        for other in sorted(self._requested, reverse=True) if missing > 0 else ():
            if missing > 0 and may_drop(self._requested[other]):
                missing -= self._requested[other].size
                self._requested.pop(other).data.cancel()
        return missing <= 0


def _blocks(ranges: Iterable[Range], most: int) -> Iterator[Range]:
    """Yield the start and end of each block; ranges with small gaps share blocks."""
    start = end = -1
    for first, length in sorted(ranges):
        if start >= 0 and first <= end + _GAP:
            end = max(end, first + length)
            continue
        yield from _cut(start, end, most)
        start, end = first, first + length
    yield from _cut(start, end, most)


def _cut(start: int, end: int, most: int) -> Iterator[Range]:
    return ((at, min(at + most, end)) for at in range(start, end, most))
