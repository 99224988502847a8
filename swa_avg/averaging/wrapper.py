"""The last checkpoint itself as the output, with only the averaged bytes replaced.

What a framework put around the weights (optimizer, hyper-parameters, schedules)
stays as it is, byte for byte: it is neither understood nor written anew, so
that the framework's own loader takes the file, or the folder. Only the ranges
of the averaged tensors, and the checksums over them, are other ones; and how the
average was made is put in, where the format has room for it.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from swa_avg.checkpoints import Loads, StateDict
from swa_avg.errors import OutputError
from swa_avg.formats import PROVENANCE, Splice, checksum_places, with_provenance
from swa_avg.planning import Plan, Work
from swa_avg.storage import InputFile
from swa_avg.tensors import Piece, Record, combined, is_dense, with_gaps


@dataclass(frozen=True)
class _Range:
    """Bytes of a file that come from elsewhere: a part of a record, from `start` on."""

    record: Record
    start: int
    length: int


@dataclass(frozen=True)
class WrapperLayout:
    """A copy of a file, or of a folder of files, in which some ranges come from elsewhere.

    Attributes:
        sources: The files, by their names in the folder; of a single file the name is empty.
        ranges: What is replaced, in the order of the storages.
        provenance: How the output was made, as far as that is known before it is.
    """

    sources: Mapping[str, InputFile]
    ranges: tuple[_Range, ...]
    provenance: str

    @property
    def _single(self) -> InputFile | None:
        return self.sources.get("")

    @property
    def files(self) -> Mapping[str, int]:
        """The size of each file of a folder; none for a single file."""
        if self._single:
            return {}
        sizes = {name: file.size for name, file in self.sources.items()}
        return sizes | {PROVENANCE: len(self.provenance)}

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        if self._single:
            return _moved(self._single.size, self._splices)
        return sum(self.files.values())

    @cached_property
    def _splices(self) -> tuple[Splice, ...]:
        """What is changed in a single file beside the ranges; nothing in a folder's files."""
        return with_provenance(self._single, self.provenance) if self._single else ()

    @property
    def places(self) -> Sequence[int]:
        """Where each range goes; places count through the files one after the other."""
        starts = {self.sources[name].identity: start for name, start in self._starts()}
        return [
            starts[file] + _moved(place, self._splices) for file, place in map(_place, self.ranges)
        ]

    def headers(self, checksums: Sequence[int], provenance: str) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes outside the ranges, then the checksums over what is inside.

        Args:
            checksums: The CRC-32 of each range.
            provenance: How the output was made.
        """
        splices = replace(self, provenance=provenance)._splices
        for name, first in self._starts():
            file = self.sources[name]
            for start, length in self._outside(file):
                for chunk in file.chunks(start, length):
                    yield first + _moved(start, splices), chunk
                    start += len(chunk)
            for number, splice in enumerate(splices):
                yield _moved(splice.start, splices[:number]), splice.data
            for place, checksum in self._checksums(file, checksums):
                yield first + _moved(place, splices), struct.pack("<I", checksum)
        if not self._single:
            yield self.size - len(provenance), provenance.encode()

    def _starts(self) -> Iterator[tuple[str, int]]:
        place = 0
        for name, file in self.sources.items():
            yield name, place
            place += file.size

    def _outside(self, file: InputFile) -> Iterator[tuple[int, int]]:
        """Yield the start and length of each stretch of a file that stays as it is."""
        place = 0
        inside = [r for r in self.ranges if r.record.file.identity == file.identity]
        stretches = [(_place(r)[1], r.length) for r in inside if r.length]
        stretches += [(splice.start, splice.length) for splice in self._splices]
        for start, length in sorted(stretches):
            yield place, start - place
            place = start + length
        yield place, file.size - place

    def _checksums(self, file: InputFile, checksums: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the new checksums of a file's records, and their places."""
        pieces: dict[Record, list[Piece]] = {}
        for r, checksum in zip(self.ranges, checksums, strict=True):
            if r.record.file.identity == file.identity:
                pieces.setdefault(r.record, []).append(Piece(r.start, r.length, checksum))
        # An item of a distributed checkpoint is a section of a file, with checksums of its own.
        places = {part: checksum_places(part) for part in {record.file for record in pieces}}
        for record, replaced in pieces.items():
            if record.offset in places[record.file]:
                checksum = combined(with_gaps(record, replaced))
                for place in places[record.file][record.offset]:
                    yield record.file.start + place, checksum


def _moved(place: int, splices: Sequence[Splice]) -> int:
    """Return where a byte of a file is when what comes before it is spliced."""
    before = [splice for splice in splices if splice.start + splice.length <= place]
    return place + sum(len(splice.data) - splice.length for splice in before)


def layout(last: StateDict, plan: Plan, opened: Callable[[InputFile], object]) -> WrapperLayout:
    """Give every range that is computed its place in the last checkpoint.

    Args:
        last: The state_dict of the last checkpoint.
        plan: What is computed.
        opened: Is told of each file that is opened here, to close it in the end.

    Raises:
        OutputError: A tensor cannot be replaced where it is.
    """
    ranges = tuple(_range(work, last) for work in plan.works)
    named = [(r, work.name) for r, work in zip(ranges, plan.works, strict=True) if r.length]
    named.sort(key=lambda pair: _place(pair[0]))
    for (one, _), (other, name) in pairwise(named):
        before, after = _place(one), _place(other)
        if before[0] == after[0] and before[1] + one.length > after[1]:
            raise _irreplaceable(name, "shares its bytes, but not in every checkpoint")
    path = last.checkpoint.path
    if not path.is_dir():
        (file,) = last.checkpoint.files
        return WrapperLayout({"": file}, ranges, plan.state_dict.provenance)
    sources = {}
    for inner in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        sources[inner.relative_to(path).as_posix()] = file = InputFile(inner)
        opened(file)
    counted = Counter(file.identity for file in sources.values())
    for r in ranges:
        if counted[r.record.file.identity] > 1:
            raise OutputError(
                "is in its folder under two names",
                file=r.record.file.path,
                remedy="Remove one of the links, or leave out --keep-wrapper",
            )
    return WrapperLayout(sources, ranges, plan.state_dict.provenance)


def notes(last: StateDict, kept: bool, folder: bool) -> Iterator[str]:
    """Yield what the user should know about the file around the average.

    Args:
        last: The state_dict of the last checkpoint.
        kept: Whether its wrapper is kept.
        folder: Whether the output is a folder.
    """
    path, row, found = last.checkpoint.path, last.framework, last.places
    if not kept:
        if row and row.needs and not folder and last.where:
            yield (
                f"the output is a bare state_dict; {row.needs} needs the whole file "
                "of the framework, which --keep-wrapper writes"
            )
        return
    yield f"what else is in the file (optimizer state, for one) is that of {path}"
    if row and row.average and row.loads is not Loads.EITHER:
        averages = (*found.averages, *found.unnamed)
        loaded = averages if row.loads is Loads.AVERAGE else found.weights
        if loaded and last.where not in loaded:
            yield f"the mean is at {last.where}; {row.name} loads {loaded[0]}, that of {path}"


def _range(work: Work, last: StateDict) -> _Range:
    ref = last.tensors[work.name]
    if ref.parts:
        raise _irreplaceable(work.name, "is stored in several parts")
    if not is_dense(ref.shape, ref.stride):
        raise _irreplaceable(work.name, "is a view with gaps")
    return _Range(ref.record, ref.offset * ref.dtype.itemsize, ref.nbytes)


def _place(r: _Range) -> tuple[tuple[object, object], int]:
    """Return which file on disk a range is in, and where."""
    return r.record.file.identity, r.record.file.start + r.record.offset + r.start


def _irreplaceable(name: str, found: str) -> OutputError:
    return OutputError(
        f"{found}, so that it cannot be replaced where it is",
        tensor=name,
        remedy="Leave out --keep-wrapper",
    )
