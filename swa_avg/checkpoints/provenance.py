"""The provenance of an average: a record in its file of how it was made.

Every output holds a small JSON text with the version of swa-avg, the checkpoints that were
averaged, their number, and the options. It has names but no full paths and no times, so the
same inputs give the same bytes. The format decides where the text is stored. This module
does not read tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain

from swa_avg.checkpoints.layout import StateDict
from swa_avg.checkpoints.membership import is_bn_buffer
from swa_avg.errors import ProvenanceError, counted, listed
from swa_avg.formats import PROVENANCE, Checkpoint, open_checkpoint
from swa_avg.tensors import Kind, Record, TensorRef, View

# The placeholder for a fingerprint before the tensors are read; of the same length.
UNKNOWN = "0" * 16
_WITH_MEAN = (Kind.FLOAT, Kind.COMPLEX)
# The largest count that the kernel handles exactly: a checkpoint each second for two years.
MOST_COUNT = 1 << 26
_MOST = (1 << 63) - 1  # of sizes, epochs and steps: the limit of file systems and torch
# Padding for the provenance of a later BatchNorm recompute, so that no other byte moves.
_ROOM = 256


@dataclass(frozen=True)
class Source:
    """A checkpoint that an average was made from.

    Attributes:
        name: The name of its file or folder.
        size: Its bytes.
        fingerprint: A hash that is equal for equal weights: 16 hexadecimal digits over the
            CRC-32 of its floating tensors. `UNKNOWN` if the tensors were not read.
        epoch: The epoch that it records, or None.
        step: The step that it records, or None.
        count: The number of checkpoints that it counts for: more than one if it is an
            average without a list of its checkpoints.
    """

    name: str
    size: int
    fingerprint: str
    epoch: int | None = None
    step: int | None = None
    count: int = 1


@dataclass(frozen=True)
class Provenance:
    """The provenance of an average.

    Attributes:
        version: The version of swa-avg.
        sources: The checkpoints, in order.
        options: The options that affect the bytes and differ from the defaults.
        batchnorm: The source of the BatchNorm statistics: the last checkpoint, for example,
            or how they were recomputed.
    """

    version: str
    sources: tuple[Source, ...]
    options: Mapping[str, object] = field(default_factory=dict)
    batchnorm: object = None

    def __repr__(self) -> str:
        return (
            f"Provenance(average of {counted(self.count, 'checkpoint')}, by swa-avg {self.version})"
        )

    @property
    def count(self) -> int:
        """The number of checkpoints in the average."""
        return sum(source.count for source in self.sources)

    def to_dict(self) -> dict[str, object]:
        """Return the provenance as JSON types."""
        return {
            "swa_avg": self.version,
            "count": self.count,
            "checkpoints": [asdict(source) for source in self.sources],
            "options": dict(self.options),
            "batchnorm": self.batchnorm,
        }

    def text(self, like: str = "") -> str:
        """Return the provenance as JSON in ASCII, padded with white space.

        Args:
            like: The text to replace. The result has the same length, also when both are
                escaped inside another JSON text, unless the result has more quotation marks.

        Raises:
            ValueError: The result is longer than `like`.
        """
        made = json.dumps(self.to_dict())
        if not like:
            return made.ljust(len(made) + _ROOM)
        spare = len(like) - len(made)
        if spare < 0:
            raise ValueError(f"{len(made)} characters do not fit in {len(like)}")
        # An escaped line feed takes two characters, like an escaped quotation mark.
        doubled = min(max(0, _doubled(like) - _doubled(made)), spare)
        return made + "\n" * doubled + " " * (spare - doubled)


def _doubled(text: str) -> int:
    """Return the number of characters that take two when escaped inside a JSON text."""
    return len(json.dumps(text)) - len(text)


def made_from(path: str | os.PathLike[str]) -> Provenance:
    """Return the provenance of an average on disk.

    Raises:
        ProvenanceError: The file has no provenance.
        SwaAvgError: The file is not a checkpoint, or is damaged.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.close()
    found = of(checkpoint)
    if found is None:
        raise ProvenanceError(
            "has no record of how it was made", file=path, expected="an average that swa-avg wrote"
        )
    return found


def of(checkpoint: Checkpoint) -> Provenance | None:
    """Return the provenance of a checkpoint, or None if swa-avg did not write it.

    Raises:
        ProvenanceError: The provenance is invalid.
    """
    try:
        found = json.loads(checkpoint.provenance)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(found, dict) and isinstance(found.get("swa_avg"), str)):
        return None
    try:
        _check_kinds({dict: (found["options"],), list: (found["checkpoints"],)})
        sources = tuple(_source(entry) for entry in found["checkpoints"])
        _check_range("count", sum(source.count for source in sources), 1, MOST_COUNT)
        return Provenance(found["swa_avg"], sources, found["options"], found["batchnorm"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProvenanceError(
            f"has an invalid record of how it was made ({error})",
            file=checkpoint.path,
            expected=f"a record {PROVENANCE} as swa-avg writes it",
            remedy="The record is damaged, forged or from a newer version",
        ) from error


def _source(entry: object) -> Source:
    _check_kinds({dict: (entry,)})
    source = Source(**entry)  # type: ignore[arg-type]
    _check_kinds({str: (source.name, source.fingerprint)})
    _check_range("count", source.count, 1, MOST_COUNT)
    _check_range("size", source.size, 0, _MOST)
    for name, value in (("epoch", source.epoch), ("step", source.step)):
        if value is not None:
            _check_range(name, value, -_MOST, _MOST)
    return source


def _check_kinds(expected: Mapping[type, Iterable[object]]) -> None:
    """Raise `TypeError` if a value has the wrong type."""
    for kind, values in expected.items():
        for value in values:
            if not isinstance(value, kind):
                raise TypeError(f"a {type(value).__name__} instead of a {kind.__name__}")


def _check_range(name: str, value: object, least: int, most: int) -> None:
    """Raise `ValueError` if a number is not an integer, or is out of range."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"its {name} is not a whole number from {least} to {most}")


def sources_of(states: Sequence[StateDict], found: Iterable[str]) -> list[Source]:
    """Describe checkpoints.

    Args:
        states: Their state_dicts.
        found: Their `fingerprints`.
    """
    return [
        Source(
            name=state.checkpoint.path.name,
            size=sum(file.size for file in state.checkpoint.files),
            fingerprint=fingerprint,
            epoch=state.epoch,
            step=state.step,
        )
        for state, fingerprint in zip(states, found, strict=True)
    ]


def fingerprints(states: Iterable[StateDict], crcs: Mapping[Record, int]) -> Iterator[str]:
    """Yield a fingerprint of each state_dict, which is equal for equal weights in any file.

    BatchNorm buffers and integers are left out, because they are not part of the mean.

    Yields:
        16 hexadecimal digits for each state_dict; `UNKNOWN` if the checksum of a tensor is
        not known.
    """
    # Files with equal headers share one description.
    known: dict[int, tuple[bytes, list[View | TensorRef]]] = {}
    for state in states:
        if id(state.views) not in known:
            known[id(state.views)] = _described(state)
        described, views = known[id(state.views)]
        records = chain.from_iterable(map(state.checkpoint.records_of, views))
        found = [crcs.get(r) if r.crc32 is None else r.crc32 for r in records]
        digest = hashlib.sha256(described + repr(found).encode())
        yield UNKNOWN if None in found else digest.hexdigest()[: len(UNKNOWN)]


def _described(state: StateDict) -> tuple[bytes, list[View | TensorRef]]:
    """Return a description of the averaged tensors from the headers, and the tensors by name."""
    tensors = state.tensors
    names = [
        name
        for name in sorted(tensors)
        if tensors[name].dtype.kind in _WITH_MEAN and not is_bn_buffer(name, tensors)
    ]
    refs = [(name, tensors[name]) for name in names]
    described = [(name, ref.dtype.name, ref.shape, _view(ref)) for name, ref in refs]
    return repr(described).encode("utf-8", "surrogatepass"), [state.views[name] for name in names]


def _view(ref: TensorRef) -> object:
    """Return how a tensor uses its records, unless it is exactly one whole record."""
    if ref.parts:
        return [part.start for part in ref.parts]
    if ref.contiguous and ref.nbytes == ref.record.length:
        return None
    return ref.offset, ref.stride


def refuse_repeats(before: Iterable[Source], added: Iterable[tuple[Source, str]]) -> None:
    """Refuse checkpoints that are already part of an average.

    Args:
        before: The sources of the averages to continue from.
        added: The sources to add, each with the path that it comes from.

    Raises:
        ProvenanceError: A source would count twice.
    """
    counted = {source.fingerprint: source for source in before if source.fingerprint != UNKNOWN}
    twice = {path: source for source, path in added if source.fingerprint in counted}
    if twice:
        first, source = next(iter(twice.items()))
        other = counted[source.fingerprint].name
        several = f"Leave out {listed([*twice], 8)}: they would count twice"
        raise ProvenanceError(
            f"has the weights of {other}, which is already in the average to start from",
            file=first,
            remedy=several if len(twice) > 1 else "Leave it out: it would count twice",
        )
