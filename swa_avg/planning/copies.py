"""Which of several checkpoints are one and the same, under two names.

`last.ckpt` and `model_best.pth.tar` are links to an epoch's file, or copies of
it; counted twice, they would weigh twice. Links are told by the file system,
copies by the checksums in their headers; only where some have none, a few bytes
are read, and all of them where those agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from swa_avg.checkpoints import StateDict
from swa_avg.tensors import Record, TensorRef

_SAMPLES = 8
_SAMPLE_BYTES = 4096


def copies(states: Sequence[StateDict]) -> Iterator[tuple[StateDict, StateDict, str]]:
    """Yield each checkpoint that is the same as an earlier one, that one, and why they are."""
    checked = all(map(_has_checksums, states))
    links: dict[object, StateDict] = {}
    alike: dict[object, list[StateDict]] = {}
    for state in states:
        files = tuple(file.identity for file in state.checkpoint.files)
        if files in links:
            yield state, links[files], "is the same file as"
            continue
        links[files] = state
        like = alike.setdefault(_glance(state) if checked else _contents(state, checked), [])
        same = next((other for other in like if _same(state, other, checked)), None)
        if same:
            yield state, same, "holds the same weights as"
        else:
            like.append(state)


def _glance(state: StateDict) -> object:
    """Return what copies have in common at least, and others hardly ever: told quickly."""
    return tuple(sorted(ref.record.crc32 or 0 for ref in state.tensors.values()))


def _same(state: StateDict, other: StateDict, checked: bool) -> bool:
    """Tell whether one checkpoint is a copy of another that looks like it."""
    if checked:
        return _contents(state, checked) == _contents(other, checked)
    return _same_bytes(state, other)


def _contents(state: StateDict, checked: bool) -> object:
    """Return what copies have in common: with checksums all, else a few of their bytes."""
    described = tuple(
        (name, ref.dtype, ref.shape, ref.stride, ref.offset, _lengths(ref, checked))
        for name, ref in sorted(state.tensors.items())
    )
    return described, None if checked else _sample(state)


def _lengths(ref: TensorRef, checked: bool) -> tuple[tuple[int, int | None], ...]:
    return tuple((record.length, record.crc32 if checked else None) for record in ref.records)


def _has_checksums(state: StateDict) -> bool:
    return all(
        record.crc32 is not None
        for ref in state.tensors.values()
        for record in ref.records
        if record.length
    )


def _records(state: StateDict) -> list[Record]:
    """Return the stretches of bytes that a state_dict's tensors lie in, by their names."""
    found = (record for _, ref in sorted(state.tensors.items()) for record in ref.records)
    return [record for record in dict.fromkeys(found) if record.length]


def _sample(state: StateDict) -> str:
    """Return a digest of the first bytes of a few tensors."""
    records = _records(state)
    digest = hashlib.sha256()
    for record in records[:: max(1, len(records) // _SAMPLES)]:
        digest.update(record.file.read(record.offset, min(_SAMPLE_BYTES, record.length)))
    return digest.hexdigest()


def _same_bytes(state: StateDict, other: StateDict) -> bool:
    """Tell whether two checkpoints whose headers and samples are alike are copies."""
    mine, theirs = _records(state), _records(other)
    if len(mine) != len(theirs):  # tied in one of them only
        return False
    return all(
        here == there
        for one, another in zip(mine, theirs, strict=True)
        for here, there in zip(_chunks(one), _chunks(another), strict=True)
    )


def _chunks(record: Record) -> Iterator[bytes]:
    return record.file.chunks(record.offset, record.length)
