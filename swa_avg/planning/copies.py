"""Detection of checkpoints that are given twice, as links or copies.

`last.ckpt` and `model_best.pth.tar` are often links to an epoch's file, or copies of it, and
would weigh twice in the average. Links are found by inode, copies by the checksums in their
headers. If a checkpoint has no checksums, a few bytes of each tensor are compared, and the
rest is read only for checkpoints that are still equal. No byte is read twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from zlib_ng.zlib_ng import crc32

from swa_avg.checkpoints import StateDict
from swa_avg.storage import is_remote
from swa_avg.tensors import Piece, Record, TensorRef, combined, with_gaps

# Most checkpoints differ in the first sample. The second one reads the middle of each tensor,
# because the tensors of a frozen backbone are equal. It is skipped for URLs, where each read is
# a request.
_FEW, _FEW_BYTES = 8, 4096
_MANY, _MANY_BYTES = 4096, 256


def copies(
    states: Sequence[StateDict], *, by_sample: bool = False
) -> Iterator[tuple[StateDict, StateDict, str]]:
    """Yield each checkpoint that equals an earlier one, the earlier one, and the reason.

    Args:
        states: The state_dicts of the checkpoints.
        by_sample: Compare only a sample of the bytes; the reason says so.
    """
    links: dict[object, StateDict] = {}
    for state in states:
        files = tuple(file.identity for file in state.checkpoint.files)
        if files in links:
            yield state, links[files], "is the same file as"
        else:
            links[files] = state
    apart = list(links.values())
    if all(map(_has_checksums, apart)):
        yield from _repeats(_split(_split([apart], _checksums), _headers_and_checksums))
        return
    samples = {id(state): _Sample(state) for state in apart}
    groups = _split([apart], _headers)
    groups = _split(groups, lambda state: samples[id(state)].few())
    groups = _split(groups, lambda state: samples[id(state)].many())
    certain = [group for group in groups if not by_sample or all(map(_has_checksums, group))]
    presumed = [group for group in groups if group not in certain]
    yield from _repeats(_split(certain, lambda state: samples[id(state)].whole()))
    yield from _repeats(presumed, ", in a sample of its bytes,")


def _repeats(
    groups: Iterable[Sequence[StateDict]], how: str = ""
) -> Iterator[tuple[StateDict, StateDict, str]]:
    for first, *others in groups:
        for other in others:
            yield other, first, f"has{how} the same weights as"


def _split(
    groups: Iterable[Sequence[StateDict]], key: Callable[[StateDict], object]
) -> list[list[StateDict]]:
    """Split groups by a key that is equal for copies; drop groups of one."""
    result = []
    for group in groups:
        parts: defaultdict[object, list[StateDict]] = defaultdict(list)
        for state in group if len(group) > 1 else ():
            parts[key(state)].append(state)
        result += [part for part in parts.values() if len(part) > 1]
    return result


def _checksums(state: StateDict) -> object:
    """Return a key that is fast to compute, and equal for copies and rarely for others."""
    return tuple(sorted(ref.record.crc32 or 0 for ref in state.tensors.values()))


def _headers(state: StateDict) -> object:
    """Return a key of the headers without checksums, which is equal for copies."""
    described = tuple((*_described(name, ref), _lengths(ref)) for name, ref in _sorted(state))
    return described, len(_records(state))  # the number of records differs if one has ties


def _headers_and_checksums(state: StateDict) -> object:
    return tuple(
        (*_described(name, ref), _lengths(ref), tuple(record.crc32 for record in ref.records))
        for name, ref in _sorted(state)
    )


def _described(name: str, ref: TensorRef) -> tuple[object, ...]:
    return name, ref.dtype, ref.shape, ref.stride, ref.offset


def _lengths(ref: TensorRef) -> tuple[int, ...]:
    return tuple(record.length for record in ref.records)


def _sorted(state: StateDict) -> list[tuple[str, TensorRef]]:
    return sorted(state.tensors.items())


def _has_checksums(state: StateDict) -> bool:
    return all(record.crc32 is not None for record in _records(state))


def _records(state: StateDict) -> list[Record]:
    """Return the records of a state_dict's tensors, in the order of the names."""
    found = (record for _, ref in _sorted(state) for record in ref.records)
    return [record for record in dict.fromkeys(found) if record.length]


class _Sample:
    """The checksums of the bytes that were read of a checkpoint, each byte once."""

    def __init__(self, state: StateDict) -> None:
        self._records = _records(state)
        self._remote = is_remote(state.checkpoint.path)
        self._pieces: defaultdict[Record, list[Piece]] = defaultdict(list)

    def few(self) -> object:
        """Return checksums of the first bytes of a few records."""
        return tuple(self._read(one, 0, _FEW_BYTES) for one in _spread(self._records, _FEW))

    def many(self) -> object:
        """Return checksums of bytes within many records."""
        some = [] if self._remote else _spread(self._records, _MANY)
        return tuple(self._read(one, one.length // 2, _MANY_BYTES) for one in some)

    def whole(self) -> object:
        """Return the checksums of all records, recorded or computed from all bytes."""
        return tuple(
            combined(with_gaps(record, self._pieces[record]))
            if record.crc32 is None
            else record.crc32
            for record in self._records
        )

    def _read(self, record: Record, start: int, length: int) -> int:
        """Return the checksum of a piece, without the bytes that were read before."""
        pieces = self._pieces[record]
        start = max([start, *(piece.start + piece.length for piece in pieces)])
        length = min(length, record.length - start)
        crc = crc32(record.file.read(record.offset + start, length))
        pieces.append(Piece(start, length, crc))
        return crc


def _spread(records: Sequence[Record], most: int) -> Sequence[Record]:
    """Return at most `most` records, evenly spaced."""
    return records[:: -(-len(records) // most) or 1]
