"""Verification of an output before it is committed.

`read_back` opens the output with the package's own readers and compares the headers with
the plan; it always runs. `verify` also reads all bytes again and recomputes a sample of
the elements.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from swa_avg.checkpoints import StateDict, at, find_state_dict, mapping
from swa_avg.errors import OutputError, SwaAvgError
from swa_avg.formats import (
    Checkpoint,
    Components,
    DcpLayout,
    Layout,
    OutputStorage,
    OutputTensor,
    open_checkpoint,
)
from swa_avg.pickles import rebuilt
from swa_avg.planning import Plan
from swa_avg.progress import Counter, Watch
from swa_avg.storage import InputFile
from swa_avg.tensors import TensorRef, View

# What is compared, what was found, and what is expected.
Check = tuple[str, object, object]

_SMALL = 64  # bytes: shorter header data overwrite parts of longer ones
_REMEDY = (
    "Run the command again. If it fails again, the disk or the memory may be faulty, or swa-avg "
    "has a bug"
)


@dataclass(frozen=True)
class Written:
    """An output that is written but not committed, and its expected content.

    Attributes:
        path: The path of the temporary file or folder.
        target: The path of the output, for messages.
        states: The inputs, in order.
        plan: The plan that was executed.
        layout: The layout of the output.
        wrapped: Whether the output is a copy of the last checkpoint with other weights.
        checksums: The CRC-32 of each storage, computed while writing.
        headers: Yields all other bytes with their places, in the order of writing.
    """

    path: Path
    target: Path
    states: Sequence[StateDict]
    plan: Plan
    layout: Layout
    wrapped: bool
    checksums: Sequence[int]
    headers: Callable[[], Iterator[tuple[int, bytes]]]

    def refusal(self, found: str, tensor: str | None = None) -> OutputError:
        """Return the error for an output that was not written correctly."""
        return OutputError(
            f"was not written correctly: {found}",
            file=self.target,
            tensor=tensor,
            remedy=_REMEDY,
        )


def read_back(written: Written) -> None:
    """Compare the headers of an output with the plan.

    Checks names, dtypes, shapes, strides, ties, places and checksums; reads no tensor.

    Raises:
        OutputError: The headers differ from the plan.
    """
    with _opened(written) as checkpoint:
        _compare(written, checkpoint)


def verify(written: Written, progress: Watch | None = None) -> None:
    """Read all of an output again, and recompute a sample of it.

    Args:
        written: The output.
        progress: Called with the progress.

    Raises:
        OutputError: The output differs from the plan or from the computed values.
        FormatError: An input has changed since it was read.
    """
    from swa_avg.averaging.sampling import wrong_in_sample

    _forget(written.path)
    with _opened(written) as checkpoint:
        found = _compare(written, checkpoint)
        _check_bytes(written, _Places(written, checkpoint), progress)
        Counter(progress, "recomputing a sample")
        tensors = [state.tensors for state in written.states]
        wrong = wrong_in_sample(written.plan.works, tensors, found)
        if wrong:
            for state in written.states:
                for file in state.checkpoint.files:
                    file.check_unchanged()
            raise written.refusal(f"its value at {list(wrong.place)} is wrong", wrong.name)


@contextmanager
def _opened(written: Written) -> Iterator[Checkpoint]:
    """Open the written output; errors name the target, not the temporary file."""
    try:
        checkpoint = open_checkpoint(written.path, own=True)
    except SwaAvgError as error:
        raise written.refusal(error.texts.found, error.tensor) from error
    try:
        yield checkpoint
    finally:
        checkpoint.close()


def _forget(path: Path) -> None:
    """Drop the files from the page cache, so that they are read from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


class _Places:
    """Access to the bytes of an output by place; places count through its files in order."""

    def __init__(self, written: Written, checkpoint: Checkpoint) -> None:
        sizes = dict(written.layout.files) or {"": written.layout.size}
        self._path = written.path
        self._names = list(sizes)
        self._starts = [0, *accumulate(sizes.values())]
        self._sizes = sizes
        self._open = {file.path: file for file in checkpoint.files}

    def of(self, file: InputFile) -> int:
        """Return the place of a file's first byte."""
        name = "" if self._names == [""] else file.path.relative_to(self._path).as_posix()
        return self._starts[self._names.index(name)] + file.start

    def chunks(self, place: int, length: int) -> Iterator[bytes]:
        """Yield the bytes of a range that lies in one file."""
        number = min(bisect_right(self._starts, place), len(self._names)) - 1
        path = self._path / self._names[number] if self._names[number] else self._path
        known = self._open.get(path)
        file = known or InputFile(path)
        try:
            yield from file.chunks(place - self._starts[number], length)
        finally:
            if known is None:
                file.close()


def _compare(written: Written, checkpoint: Checkpoint) -> Mapping[str, TensorRef]:
    """Compare headers with the plan; return the tensors that were found."""
    entries = _entries(written, checkpoint)
    found = {name: ref for name, ref in entries.items() if isinstance(ref, TensorRef)}
    planned = written.plan.state_dict
    for name in planned.tensors.keys() ^ found.keys():
        raise written.refusal("it is missing" if name not in found else "it is not planned", name)
    places = _Places(written, checkpoint)
    starts = {file.path: places.of(file) - file.start for file in checkpoint.files}
    wanted = written.layout.places  # of each storage; computed once
    for name, item in planned.tensors.items():
        for what, actual, expected in _checks(written, found[name], item, starts, wanted):
            if actual != expected:
                raise written.refusal(f"its {what} is {actual} instead of {expected}", name)
    if checkpoint.format == "torch zip" and not written.wrapped:
        _compare_values(written, entries)
    return found


def _checks(
    written: Written,
    ref: TensorRef,
    item: OutputTensor,
    starts: Mapping[Path, int],
    places: Sequence[int],
) -> Iterator[Check]:
    """Yield what was found and what is expected of a tensor, and of each of its parts.

    Args:
        written: The output.
        ref: What was found.
        item: What is expected.
        starts: The place of the first byte of each file.
        places: The expected place of each storage.
    """
    yield "shape", ref.shape, item.shape
    yield "parts", [part.start for part in ref.parts], [start for start, _ in item.parts]
    refs = [part.ref for part in ref.parts] or [ref]
    items = [one for _, one in item.parts] or [item]
    for one, wanted in zip(refs, items, strict=True):
        storage = written.plan.state_dict.storages[wanted.storage]
        record = one.record
        start = starts[record.file.path] + record.file.start + record.offset
        moved = start - places[wanted.storage]
        yield from _stored(one, wanted, storage, moved)
        if record.crc32 is not None and record.length == storage.nbytes:
            yield "checksum", record.crc32, written.checksums[wanted.storage]


def _stored(
    ref: TensorRef, item: OutputTensor, storage: OutputStorage, moved: int
) -> Iterator[Check]:
    """Yield what was found and what is expected of a tensor in one storage.

    Args:
        ref: What was found.
        item: What is expected.
        storage: The expected storage.
        moved: How far the found record begins behind the expected place of the storage.
    """
    yield "dtype", ref.dtype.name, storage.dtype.name
    yield "shape", ref.shape, item.shape
    if ref.numel:
        itemsize = ref.dtype.itemsize
        yield "stride", ref.stride, item.stride
        yield "place in its storage", moved + ref.offset * itemsize, item.offset * itemsize


def _entries(written: Written, checkpoint: Checkpoint) -> Mapping[str, object]:
    """Return the entries of an output, under the names of the plan."""
    last = written.states[-1]
    if written.wrapped or isinstance(checkpoint.tree, Components):
        return find_state_dict(checkpoint, last.where.split(" + "), last.ema).tensors
    where = last.where if isinstance(written.layout, DcpLayout) else ""
    entries = mapping(at(checkpoint.tree, where)) or {}
    return {
        str(name): checkpoint.located(value) if isinstance(value, View | TensorRef) else value
        for name, value in entries.items()
    }


def _compare_values(written: Written, found: Mapping[str, object]) -> None:
    """Compare the order of names, and the values that are not tensors."""
    planned, storages = written.plan.state_dict.items, written.plan.state_dict.storages

    def leaf(value: object) -> object:
        """Return a tensor in a value as its dtype and shape."""
        if isinstance(value, OutputTensor):
            return storages[value.storage].dtype, value.shape
        return (value.dtype, value.shape) if isinstance(value, View) else value

    if list(found) != list(planned):
        raise written.refusal("the order of its names differs")
    for name, value in planned.items():
        # Compare as text: NaN is not equal to itself.
        if not isinstance(value, OutputTensor) and not (
            repr(rebuilt(value, leaf)) == repr(rebuilt(found[name], leaf))
        ):
            raise written.refusal("its value differs", name)


def _check_bytes(written: Written, places: _Places, progress: Watch | None) -> None:
    """Compare every byte of an output with its checksum or its expected value."""
    count = Counter(progress, "verifying", written.layout.size)
    stored = zip(written.plan.works, written.layout.places, written.checksums, strict=True)
    for work, place, checksum in stored:
        crc = 0
        for chunk in places.chunks(place, math.prod(work.shape) * work.dtype.itemsize):
            crc = crc32(chunk, crc)
            count(len(chunk))
        if crc != checksum:
            raise written.refusal("the checksum of its bytes differs", work.name)
    # New checksums are written last, over the old ones in copied headers.
    small = {place: data for place, data in written.headers() if len(data) <= _SMALL}
    tops = sorted(small)
    for place, data in written.headers():
        expected = bytearray(data)
        for top in tops[bisect_right(tops, place - _SMALL) : bisect_right(tops, place + len(data))]:
            first, last = max(top, place), min(top + len(small[top]), place + len(data))
            if first < last:
                expected[first - place : last - place] = small[top][first - top : last - top]
        if b"".join(places.chunks(place, len(data))) != expected:
            raise written.refusal(f"its header differs at byte {place}")
