"""Reading ahead where every request takes its time: ranges that will be read, fetched in blocks.

Several requests are under way at once, and what has come and was not read yet
is bounded. Knows neither files nor networks: bytes come from a function.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass

Range = tuple[int, int]  # the first byte, and how many
Fetch = Callable[[int, int], bytes]  # from the first byte to the one behind the last

# Closer ranges are fetched with what is between them: a request costs more than that.
_GAP = 64 * 1024
# Blocks of a few bytes are many: no more than this are asked for at once.
_MOST_REQUESTS = 64


@dataclass
class _Held:
    """A block that was asked for."""

    size: int
    data: Future[bytes]
    touched: bool = False
    spent: bool = False


class ReadAhead:
    """The ranges of one file that will be read, about in their order, by any threads.

    Whoever reads in a block starts the fetching of those behind it, as far as there
    is room. A block that was read to its end gives way first.
    """

    def __init__(
        self, fetch: Fetch, ranges: Iterable[Range], block: int, room: int, pool: Executor
    ) -> None:
        """Note what will be read.

        Args:
            fetch: Gives the bytes of a range.
            ranges: What will be read.
            block: The most bytes of one request.
            room: How many bytes may be held or under way; a block that a reader waits
                for is fetched even where there is none.
            pool: Fetches.
        """
        self._fetch = fetch
        self._blocks = list(_blocks(ranges, block))
        self._starts = [start for start, _ in self._blocks]
        self._room = room
        self._pool = pool
        self._held: dict[int, _Held] = {}
        self._unspent = len(self._blocks)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Fetch the first blocks, before anybody reads."""
        with self._lock:
            self._go_on_from(0)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the start of `buffer`; return with how many bytes, 0 where none were announced."""
        number = bisect_right(self._starts, offset) - 1
        if number < 0 or offset >= self._blocks[number][1]:
            return 0
        start, end = self._blocks[number]
        with self._lock:
            held = self._held.get(number) or self._ask_for(number)
            held.touched = True
            self._go_on_from(number + 1)
        count = min(len(buffer), end - offset)
        buffer[:count] = memoryview(held.data.result())[offset - start :][:count]
        if offset + count == end and not held.spent:
            self._spend(held)
        return count

    def close(self) -> None:
        """Ask for nothing more."""
        with self._lock:
            for held in self._held.values():
                held.data.cancel()
            self._held.clear()
            self._starts.clear()

    def _spend(self, held: _Held) -> None:
        """Let a block give way; some bytes of it may be read again, but not for long."""
        with self._lock:
            held.spent = True
            self._unspent -= 1
            if not self._unspent:
                self._held.clear()

    def _go_on_from(self, first: int) -> None:
        """Ask for the next blocks, as far as there is room."""
        for number in range(first, min(first + _MOST_REQUESTS, len(self._blocks))):
            if number in self._held:
                continue
            if not self._make_room(number, lambda held: held.spent):
                return
            self._ask_for(number)

    def _ask_for(self, number: int) -> _Held:
        """Ask for a block that somebody waits for, or for which there is room."""
        # First what was read, then what nobody has begun to read, the last of it first.
        if not self._make_room(number, lambda held: held.spent):
            self._make_room(number, lambda held: not held.touched)
        start, end = self._blocks[number]
        asked = _Held(end - start, self._pool.submit(self._fetch, start, end))
        self._held[number] = asked
        return asked

    def _make_room(self, number: int, may_go: Callable[[_Held], bool]) -> bool:
        """Drop blocks until another one fits; tell whether it does."""
        start, end = self._blocks[number]
        missing = sum(held.size for held in self._held.values()) + end - start - self._room
        for other in sorted(self._held, reverse=True) if missing > 0 else ():
            if missing > 0 and may_go(self._held[other]):
                missing -= self._held[other].size
                self._held.pop(other).data.cancel()
        return missing <= 0


def _blocks(ranges: Iterable[Range], most: int) -> Iterator[Range]:
    """Yield where blocks begin and end: of ranges that lie close together as one."""
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
