"""The layout for `--keep-wrapper`: a copy of the last checkpoint with averaged weights.

Everything that a framework stores around the weights (optimizer, hyper-parameters,
schedules) is copied byte for byte and not parsed, so that the framework's own loader
accepts the file or folder. Only the byte ranges of the averaged tensors and their checksums
are replaced. The provenance is added if the format has a place for it.
"""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from swa_avg.checkpoints import Loads, StateDict
from swa_avg.errors import OutputError, listed
from swa_avg.formats import (
    DISTRIBUTED,
    PROVENANCE,
    Splice,
    checksum_places,
    is_weights_name,
    leaves,
    links_note,
    with_provenance,
)
from swa_avg.planning import Plan, Work
from swa_avg.storage import InputFile
from swa_avg.tensors import Piece, Record, combined, is_dense, with_gaps

# Files with the weights a second time: HuggingFaceStorageWriter leaves the parts of the ranks
# after it has joined them; Trainer resumes from what FSDP or DeepSpeed saved beside its model.
_COPIES = (
    "sharded/*.safetensors",
    "pytorch_model_fsdp*.bin",
    "pytorch_model_fsdp_*/*.distcp",
    "global_step*/*model_states.pt",
)


@dataclass(frozen=True)
class _Range:
    """A range of bytes to replace: `length` bytes of a record, from `start` on."""

    record: Record
    start: int
    length: int


@dataclass(frozen=True)
class WrapperLayout:
    """A copy of a file or folder in which some ranges of bytes are replaced.

    Attributes:
        sources: The files, by their names in the folder; a single file has an empty name.
        ranges: The replaced ranges, in the order of the storages.
        provenance: The provenance text, as far as it is known before averaging.
        notes: Notes about files that are not copied.
    """

    sources: Mapping[str, InputFile]
    ranges: tuple[_Range, ...]
    provenance: str
    notes: tuple[str, ...] = ()

    @property
    def copied(self) -> Iterable[InputFile]:
        """The files that are copied."""
        return self.sources.values()

    @property
    def _single(self) -> InputFile | None:
        return self.sources.get("")

    @property
    def files(self) -> Mapping[str, int]:
        """The size of each file of a folder; empty for a single file."""
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
        """The changes that add the provenance to a single file; empty for a folder."""
        return with_provenance(self._single, self.provenance) if self._single else ()

    @property
    def places(self) -> Sequence[int]:
        """The place of each range; places count through the files in order."""
        starts = {self.sources[name].identity: start for name, start in self._starts()}
        return [
            starts[file] + _moved(place, self._splices) for file, place in map(_place, self.ranges)
        ]

    def headers(self, checksums: Sequence[int], provenance: str) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes outside the ranges, then the new checksums of the ranges.

        Args:
            checksums: The CRC-32 of each range.
            provenance: The provenance text.
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

    @cached_property
    def _of_file(self) -> Mapping[object, Sequence[tuple[_Range, int]]]:
        """The ranges of each file with their numbers, by the identity of the file."""
        found: dict[object, list[tuple[_Range, int]]] = defaultdict(list)
        for number, r in enumerate(self.ranges):
            found[r.record.file.identity].append((r, number))
        return found

    def _outside(self, file: InputFile) -> Iterator[tuple[int, int]]:
        """Yield the start and length of each part of a file that is copied unchanged."""
        place = 0
        inside = (r for r, _ in self._of_file[file.identity])
        stretches = [(_place(r)[1], r.length) for r in inside if r.length]
        stretches += [(splice.start, splice.length) for splice in self._splices]
        for start, length in sorted(stretches):
            yield place, start - place
            place = start + length
        yield place, file.size - place

    def _checksums(self, file: InputFile, checksums: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the new checksums of a file's records, and their places."""
        pieces: dict[Record, list[Piece]] = {}
        for r, number in self._of_file[file.identity]:
            piece = Piece(r.start, r.length, checksums[number])
            pieces.setdefault(r.record, []).append(piece)
        # An item of a distributed checkpoint is a section of a file with its own checksums.
        places = {part: checksum_places(part) for part in {record.file for record in pieces}}
        for record, replaced in pieces.items():
            if record.offset in places[record.file]:
                checksum = combined(with_gaps(record, replaced))
                for place in places[record.file][record.offset]:
                    yield record.file.start + place, checksum


def _moved(place: int, splices: Sequence[Splice]) -> int:
    """Return the new place of a byte of a file, after the splices before it."""
    before = [splice for splice in splices if splice.start + splice.length <= place]
    return place + sum(len(splice.data) - splice.length for splice in before)


def layout(
    last: StateDict,
    plan: Plan,
    opened: Callable[[InputFile], object],
    without: Sequence[str] = (),
) -> WrapperLayout:
    """Return the layout that replaces the averaged tensors in the last checkpoint.

    Args:
        last: The state_dict of the last checkpoint.
        plan: The plan of the average.
        opened: Called with each file that is opened here; the caller closes it.
        without: The patterns of files that are left out.

    Raises:
        OutputError: A tensor cannot be replaced in place.
    """
    ranges = tuple(map(_range, plan.works))
    _check_apart(ranges, [work.name for work in plan.works])
    path = last.checkpoint.path
    if not path.is_dir():
        (file,) = last.checkpoint.files
        return WrapperLayout({"": file}, ranges, plan.state_dict.provenance)
    weights = {file.path for file in last.checkpoint.files}
    _check_no_copies(path, weights)
    copied, notes = _to_copy(path, weights, without)
    sources: dict[str, InputFile] = {}
    for inner in copied:
        sources[inner.relative_to(path).as_posix()] = file = InputFile(inner)
        opened(file)
    _check_names(sources.values(), {r.record.file for r in ranges})
    return WrapperLayout(sources, ranges, plan.state_dict.provenance, notes)


def _check_apart(ranges: Sequence[_Range], names: Sequence[str]) -> None:
    """Refuse tensors that share bytes of the last checkpoint, but are averaged separately."""
    named = [(*_place(r), r.length, name) for r, name in zip(ranges, names, strict=True)]
    filled = sorted((one for one in named if one[2]), key=lambda one: one[:2])
    for (file, start, length, _), (other_file, other_start, _, name) in pairwise(filled):
        if file == other_file and start + length > other_start:
            raise _irreplaceable(name, "shares bytes with another, but not in every checkpoint")


def _check_no_copies(folder: Path, weights: Collection[Path]) -> None:
    """Refuse a folder that holds its weights a second time: those would not be averaged."""
    # A file without averaged tensors may lie beside those with averaged tensors.
    homes = {file.parent for file in weights} - {folder}
    for pattern in _COPIES:
        found = (copy for copy in folder.glob(pattern) if copy not in weights)
        if any(copy.parent not in homes for copy in found):
            raise OutputError(
                f"has its weights a second time, as {pattern}, which would not be averaged",
                file=folder,
                remedy="Leave out --keep-wrapper",
            )


def _to_copy(
    folder: Path, weights: Collection[Path], without: Sequence[str]
) -> tuple[list[Path], tuple[str, ...]]:
    """Return the files of a folder that are copied, and notes on those that are not."""
    copied, left, leaving = [], [], []
    homes = {file.parent for file in weights}
    for inner in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
        if any(inner.match(pattern) for pattern in without):
            left.append(inner.relative_to(folder).as_posix())
        elif inner not in weights and leaves(inner, folder):
            leaving.append(inner.relative_to(folder).as_posix())
        else:
            copied.append(inner)
    notes = [links_note(folder, leaving)] if leaving else []
    if left:
        state = "optimizer state; not copied without --keep-wrapper"
        notes.append(f"{folder}: {listed(left)}: {state}")
    # Reading the folder has noted other weights beside the averaged ones.
    apart = [file for file in copied if file.parent not in homes and is_weights_name(file.name)]
    names = [file.relative_to(folder).as_posix() for file in apart if file.suffix != ".json"]
    if names:
        notes.append(f"{folder}: {listed(names)}: other weights; copied, not averaged")
    return copied, tuple(notes)


def _check_names(copied: Iterable[InputFile], replaced: Iterable[InputFile]) -> None:
    """Refuse files of weights that are not copied exactly once."""
    counted = Counter(file.identity for file in copied)
    for file in replaced:
        if counted[file.identity] > 1:
            raise OutputError(
                "has two names in its folder",
                file=file.path,
                remedy="Remove one of the links, or leave out --keep-wrapper",
            )
        if not counted[file.identity]:
            raise OutputError(
                "was replaced by another program during this run",
                file=file.path,
                remedy="Run the command again",
            )


def notes_on_bare(last: StateDict, *, folder: bool) -> Iterator[str]:
    """Yield notes on what an output without the wrapper lacks.

    Args:
        last: The state_dict of the last checkpoint.
        folder: Whether the output is a folder.
    """
    path, row = last.checkpoint.path, last.framework
    if row and row.needs and not folder and last.where:
        yield (
            f"the output is a bare state_dict; {row.needs} needs the framework's whole "
            "file, which --keep-wrapper writes"
        )
    homes = {file.path.parent for file in last.checkpoint.files}
    if folder and last.checkpoint.format == DISTRIBUTED and homes != {path}:
        yield (
            f"the output is not in a sub-folder {min(homes).name}, as in {path}; "
            "--keep-wrapper keeps it there"
        )


def notes_on_copy(last: StateDict, *, folder: bool, whole: bool) -> Iterator[str]:
    """Yield notes on what a copy of the last checkpoint holds besides the averaged weights.

    Args:
        last: The state_dict of the last checkpoint.
        folder: Whether the output is a folder.
        whole: Whether all of its files are copied; otherwise those with optimizer state are not.
    """
    path, row, found = last.checkpoint.path, last.framework, last.places
    such_as = " (such as optimizer state)" if whole else ""
    yield f"everything else in the {'folder' if folder else 'file'}{such_as} is copied from {path}"
    if row and row.alone:
        yield (
            f"{row.name}'s optimizer state may hold a copy of the last checkpoint's weights; "
            f"load the output with {row.alone}"
        )
    if row and row.average and row.loads is not Loads.EITHER:
        averages = (*found.averages, *found.unnamed)
        loaded = averages if row.loads is Loads.AVERAGE else found.weights
        if loaded and last.where not in loaded:
            yield (
                f"the mean is at {last.where}; {row.name} loads {loaded[0]}, "
                f"which is copied from {path}"
            )


def _range(work: Work) -> _Range:
    ref = work.replaces
    assert ref is not None
    if not is_dense(ref.shape, ref.stride):
        raise _irreplaceable(work.name, "is a view with gaps")
    return _Range(ref.record, ref.offset * ref.dtype.itemsize, ref.nbytes)


def _place(r: _Range) -> tuple[tuple[object, object], int]:
    """Return the file on disk that contains a range, and the range's place in it."""
    return r.record.file.identity, r.record.file.start + r.record.offset + r.start


def _irreplaceable(name: str, found: str) -> OutputError:
    return OutputError(
        f"{found}, so it cannot be replaced in place",
        tensor=name,
        remedy="Leave out --keep-wrapper",
    )
