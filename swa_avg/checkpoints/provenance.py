"""How an average was made: what its own file says of it.

Every output carries a small JSON text: the version of swa-avg, the checkpoints
it was made from, how many it stands for, and the options. Names only, no paths,
and no time: the same inputs give the same bytes. Where it is kept is a matter of
the format. Nothing here reads a tensor.
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
from swa_avg.errors import ProvenanceError
from swa_avg.formats import PROVENANCE, Checkpoint, open_checkpoint
from swa_avg.tensors import Kind, Record, TensorRef, View

# A fingerprint that is known only when the tensors have been read; as long as any other.
UNKNOWN = "0" * 16
_WITH_MEAN = (Kind.FLOAT, Kind.COMPLEX)
# The most that the mean weighs exactly (kernel): a checkpoint each second for two years.
MOST_COUNT = 1 << 26
_MOST = (1 << 63) - 1  # of sizes, epochs and steps: what a file system and torch can hold
# Room for what a later recompute of BatchNorm has to say, so that no other byte moves.
_ROOM = 256


@dataclass(frozen=True)
class Source:
    """A checkpoint that an average was made from.

    Attributes:
        name: The name of its file or folder.
        size: Its bytes.
        fingerprint: What equal weights have in common: 16 hexadecimal digits over the
            CRC-32 of its floating tensors. `UNKNOWN` where nobody has read them.
        epoch: The epoch that it records, or None.
        step: The step that it records, or None.
        count: How many checkpoints it stands for: more than one if it is an average
            itself that does not say which.
    """

    name: str
    size: int
    fingerprint: str
    epoch: int | None = None
    step: int | None = None
    count: int = 1


@dataclass(frozen=True)
class Provenance:
    """How an average was made.

    Attributes:
        version: The version of swa-avg.
        sources: The checkpoints, in their order.
        options: The options that its bytes depend on, where they are not the defaults.
        batchnorm: Which statistics its BatchNorm layers have: those of the last
            checkpoint, say, or how they were recomputed.
    """

    version: str
    sources: tuple[Source, ...]
    options: Mapping[str, object] = field(default_factory=dict)
    batchnorm: object = None

    @property
    def count(self) -> int:
        """How many checkpoints the average stands for."""
        return sum(source.count for source in self.sources)

    def to_dict(self) -> dict[str, object]:
        """Return it as what JSON can hold."""
        return {
            "swa_avg": self.version,
            "count": self.count,
            "checkpoints": [asdict(source) for source in self.sources],
            "options": dict(self.options),
            "batchnorm": self.batchnorm,
        }

    def text(self, like: str = "") -> str:
        """Return it as JSON in ASCII, filled up with white space.

        Args:
            like: What it takes the place of: it gets as long, and if it has fewer quotation
                marks also as long as that within another JSON text, which doubles them.

        Raises:
            ValueError: It is longer than `like`, if that is given.
        """
        made = json.dumps(self.to_dict())
        if not like:
            return made.ljust(len(made) + _ROOM)
        spare = len(like) - len(made)
        if spare < 0:
            raise ValueError(f"{len(made)} characters do not fit in {len(like)}")
        # A line feed takes two characters there, too.
        doubled = min(max(0, _doubled(like) - _doubled(made)), spare)
        return made + "\n" * doubled + " " * (spare - doubled)


def _doubled(text: str) -> int:
    """Return how many characters of a text take two within a JSON text."""
    return len(json.dumps(text)) - len(text)


def made_from(path: str | os.PathLike[str]) -> Provenance:
    """Return what an average on disk says of how it was made.

    Raises:
        ProvenanceError: It says nothing.
        SwaAvgError: It is no sound checkpoint.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.close()
    said = of(checkpoint)
    if said is None:
        raise ProvenanceError(
            "does not say how it was made", file=path, expected="an average that swa-avg wrote"
        )
    return said


def of(checkpoint: Checkpoint) -> Provenance | None:
    """Return what a checkpoint says of how it was made; None if it is no average of ours.

    Raises:
        ProvenanceError: It claims to be one, and what it says cannot be.
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
            f"has an unsound record of how it was made ({error})",
            file=checkpoint.path,
            expected=f"what swa-avg writes in {PROVENANCE}",
            remedy="The record is damaged, forged or of a newer version",
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
    """Raise `TypeError` where a value is not of the kind that belongs there."""
    for kind, values in expected.items():
        for value in values:
            if not isinstance(value, kind):
                raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")


def _check_range(name: str, value: object, least: int, most: int) -> None:
    """Raise `ValueError` where a number is no whole one, or lies outside of its range."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"its {name} is no whole number from {least} to {most}")


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
    """Yield what equal weights have in common, whatever file they are in.

    BatchNorm buffers and integers are left out: they are no part of the mean.

    Yields:
        For each state_dict 16 hexadecimal digits; `UNKNOWN` where a tensor's checksum
        is not known.
    """
    # What headers say is described once for all files that have it in common.
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
    """Return what the headers say of the tensors that have a mean, and these, by their names."""
    tensors = state.tensors
    names = [
        name
        for name in sorted(tensors)
        if tensors[name].dtype.kind in _WITH_MEAN and not is_bn_buffer(name, tensors)
    ]
    refs = [(name, tensors[name]) for name in names]
    said = [(name, ref.dtype.name, ref.shape, _view(ref)) for name, ref in refs]
    return repr(said).encode("utf-8", "surrogatepass"), [state.views[name] for name in names]


def _view(ref: TensorRef) -> object:
    """Return how a tensor looks at its records, if not simply at all of one."""
    if ref.parts:
        return [part.start for part in ref.parts]
    if ref.contiguous and ref.nbytes == ref.record.length:
        return None
    return ref.offset, ref.stride


def refuse_repeats(before: Iterable[Source], added: Iterable[tuple[Source, str]]) -> None:
    """Refuse checkpoints that an average was made from already.

    Args:
        before: What the averages to go on from were made from.
        added: What is to be added, each with the path that brings it.

    Raises:
        ProvenanceError: One would be counted twice.
    """
    counted = {source.fingerprint: source for source in before if source.fingerprint != UNKNOWN}
    for source, path in added:
        if source.fingerprint in counted:
            other = counted[source.fingerprint].name
            raise ProvenanceError(
                f"has the weights of {other}, which the average to start from was made from",
                file=path,
                remedy="Leave it out: it would count twice",
            )
