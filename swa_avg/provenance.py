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
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from swa_avg.errors import ProvenanceError
from swa_avg.formats import Checkpoint, open_checkpoint
from swa_avg.layout import StateDict, is_bn_buffer
from swa_avg.tensors import Kind, Record, TensorRef

# A fingerprint that is known only when the tensors have been read; as long as any other.
UNKNOWN = "0" * 16
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

    def text(self, length: int = 0) -> str:
        """Return it as JSON in ASCII, filled up with spaces to `length` characters.

        Raises:
            ValueError: It is longer than `length`, if that is given.
        """
        made = json.dumps(self.to_dict())
        if length and len(made) > length:
            raise ValueError(f"{len(made)} characters do not fit in {length}")
        return made.ljust(length or len(made) + _ROOM)


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
    """Return what a checkpoint says of how it was made; None if it is no average of ours."""
    try:
        found = json.loads(checkpoint.provenance)
        version, options = found["swa_avg"], found["options"]
        _check_kinds({str: (version,), dict: (options,)})
        sources = tuple(_source(entry) for entry in found["checkpoints"])
        return Provenance(version, sources, options, found["batchnorm"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _source(entry: Mapping[str, object]) -> Source:
    source = Source(**entry)  # type: ignore[arg-type]
    numbers = (source.size, source.count, source.epoch or 0, source.step or 0)
    _check_kinds({str: (source.name, source.fingerprint), int: numbers})
    if source.count < 1:
        raise ValueError("a checkpoint that counts for none")
    return source


def _check_kinds(expected: Mapping[type, Iterable[object]]) -> None:
    """Raise `TypeError` where a value is not of the kind that belongs there."""
    for kind, values in expected.items():
        for value in values:
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{value!r} where a {kind.__name__} belongs")


def source_of(state: StateDict, crcs: Mapping[Record, int], count: int = 1) -> Source:
    """Describe a checkpoint.

    Args:
        state: Its state_dict.
        crcs: The CRC-32 of records that have been read; others may carry their own.
        count: How many checkpoints it stands for.
    """
    return Source(
        name=state.checkpoint.path.name,
        size=sum(file.size for file in state.checkpoint.files),
        fingerprint=fingerprint(state, crcs),
        epoch=state.epoch,
        step=state.step,
        count=count,
    )


def fingerprint(state: StateDict, crcs: Mapping[Record, int]) -> str:
    """Return what equal weights have in common, whatever file they are in.

    BatchNorm buffers and integers are left out: they are no part of the mean.

    Returns:
        16 hexadecimal digits; `UNKNOWN` where a tensor's checksum is not known.
    """
    digest = hashlib.sha256()
    for name in sorted(state.tensors):
        ref = state.tensors[name]
        if ref.dtype.kind not in (Kind.FLOAT, Kind.COMPLEX) or is_bn_buffer(name, state.tensors):
            continue
        found = [crcs.get(record, record.crc32) for record in ref.records]
        if None in found:
            return UNKNOWN
        digest.update(repr((name, ref.dtype.name, ref.shape, _view(ref), found)).encode())
    return digest.hexdigest()[: len(UNKNOWN)]


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
