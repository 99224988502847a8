"""Averages given with --start-from: how many checkpoints each was made from, and which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from swa_avg.checkpoints import Source, StateDict, fingerprints, provenance, sources_of
from swa_avg.errors import ProvenanceError
from swa_avg.tensors import Kind, TensorRef, read_numbers, verify

_COUNTER = "n_averaged"
_NUMBERS = (Kind.FLOAT, Kind.EXACT)


@dataclass(frozen=True)
class Base:
    """An average given with --start-from.

    Attributes:
        state: The state_dict of the average.
        sources: The checkpoints it was made from; only itself if it does not record them.
        batchnorm: The origin of its BatchNorm statistics, if it records that.
    """

    state: StateDict
    sources: tuple[Source, ...]
    batchnorm: object = None

    @property
    def count(self) -> int:
        """The number of checkpoints it was made from, which is its weight."""
        return sum(source.count for source in self.sources)


def base_of(state: StateDict) -> Base:
    """Return the average in a state_dict.

    An average of swa-avg records the checkpoints it was made from. torch's `AveragedModel`
    records their number in `n_averaged`.

    Raises:
        ProvenanceError: It does not record how many checkpoints it was made from.
    """
    known = provenance.of(state.checkpoint)
    if known:
        return Base(state, known.sources, known.batchnorm)
    count, why = _count(state.n_averaged)
    if not count:
        raise ProvenanceError(
            f"does not record how many checkpoints it was made from{why}",
            file=state.checkpoint.path,
            expected="an average written by swa-avg, or an AveragedModel's state_dict",
            remedy="Average all of the checkpoints again, without --start-from",
        )
    (source,) = sources_of([state], fingerprints([state], {}))
    return Base(state, (replace(source, count=count),))


def _count(counter: TensorRef | None) -> tuple[int, str]:
    """Return the value of an AveragedModel's counter, or 0 and what is wrong with it."""
    if counter is None:
        return 0, ""
    if counter.numel != 1 or counter.dtype.kind not in _NUMBERS or counter.dtype.name == "bool":
        return 0, f": {_COUNTER} has shape {list(counter.shape)} and dtype {counter.dtype}"
    verify((record, _COUNTER) for record in counter.records)
    (value,) = read_numbers(counter)
    if 1 <= value <= provenance.MOST_COUNT and value == int(value):
        return int(value), ""
    return 0, f": {_COUNTER} is {value}"


def refuse_repeats(bases: Sequence[Base]) -> None:
    """Refuse averages made from the same checkpoint, which would count twice.

    Raises:
        ProvenanceError: Two averages have a checkpoint in common.
    """
    counted: list[Source] = []
    for base in bases:
        path = str(base.state.checkpoint.path)
        provenance.refuse_repeats(counted, ((source, path) for source in base.sources))
        counted += base.sources
