"""Reading ahead: always the right bytes, never more than announced, never more held than agreed."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from swa_avg.storage.prefetch import ReadAhead

KIB = 1024
DATA = bytes(range(251)) * 9000  # 2 MB, no two stretches of which are alike
RANGES = st.lists(
    st.tuples(st.integers(0, len(DATA) - 1), st.integers(1, 300 * KIB)).map(
        lambda pair: (pair[0], min(pair[1], len(DATA) - pair[0]))
    ),
    min_size=1,
    max_size=8,
)


class Direct(Executor):
    """Does at once what it is given, so that a test has but one order of things."""

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        done: Future[bytes] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def read(ahead: ReadAhead, offset: int, length: int) -> bytes:
    """Read as a file does: again and again until the buffer is full."""
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        count = ahead.read_into(view, offset)
        assert count > 0
        view, offset = view[count:], offset + count
    return bytes(buffer)


@given(ranges=RANGES, block=st.integers(1 * KIB, 200 * KIB), room=st.integers(0, 800 * KIB),
       piece=st.integers(5 * KIB, 500 * KIB), order=st.randoms())  # fmt: skip
def test_right_bytes(ranges, block, room, piece, order) -> None:  # type: ignore[no-untyped-def]
    """In whatever order what was announced is read, it is what is there."""
    ahead = ReadAhead(lambda start, end: DATA[start:end], ranges, block, room, Direct())
    pieces = [
        (at, min(piece, start + length - at))
        for start, length in ranges
        for at in range(start, start + length, piece)
    ]
    order.shuffle(pieces)
    for at, length in pieces:
        assert read(ahead, at, length) == DATA[at : at + length]


@given(ranges=RANGES, block=st.integers(1 * KIB, 200 * KIB))
def test_only_what_was_announced(ranges: list[tuple[int, int]], block: int) -> None:
    """Each byte belongs to one request, none but those announced and gaps of 64 KiB to any."""
    asked: list[tuple[int, int]] = []

    def fetch(start: int, end: int) -> bytes:
        asked.append((start, end))
        return DATA[start:end]

    ahead = ReadAhead(fetch, ranges, block, 4 * block, Direct())
    for start, length in sorted(ranges):
        read(ahead, start, length)
    wanted = sorted((start, start + length) for start, length in ranges)
    allowed: list[list[int]] = []
    for start, end in wanted:
        if allowed and start <= allowed[-1][1] + 64 * KIB:
            allowed[-1][1] = max(end, allowed[-1][1])
        else:
            allowed.append([start, end])
    assert all(any(a <= start and end <= b for a, b in allowed) for start, end in asked)
    assert all(end - start <= block for start, end in asked)
    covered = sorted(set(asked))
    assert all(one[1] <= other[0] for one, other in pairwise(covered))


def test_room() -> None:
    """No more is asked for than there is room for, until somebody reads."""
    asked: list[int] = []

    def fetch(start: int, end: int) -> bytes:
        asked.append(start)
        return DATA[start:end]

    ahead = ReadAhead(fetch, [(0, 1000 * KIB)], 100 * KIB, 350 * KIB, Direct())
    assert asked == []
    ahead.start()
    assert asked == [0, 100 * KIB, 200 * KIB]
    read(ahead, 0, 100 * KIB)
    read(ahead, 100 * KIB, 50 * KIB)
    assert asked[3:] == [300 * KIB]
    assert ahead.read_into(memoryview(bytearray(9)), 1000 * KIB) == 0


def test_several_at_once() -> None:
    """Requests are under way together: none of these is answered before all are made."""
    together = threading.Barrier(5)

    def fetch(start: int, end: int) -> bytes:
        together.wait(20)
        return DATA[start:end]

    with ThreadPoolExecutor(5) as pool:
        ahead = ReadAhead(fetch, [(0, 500 * KIB)], 100 * KIB, 500 * KIB, pool)
        assert read(ahead, 0, 500 * KIB) == DATA[: 500 * KIB]
