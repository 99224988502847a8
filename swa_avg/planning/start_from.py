"""Averages to go on from: how many checkpoints each of them stands for, and which."""

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
    """An average to go on from.

    Attributes:
        state: Its state_dict.
        sources: What it was made from; itself, where it does not say.
        batchnorm: Where its BatchNorm statistics come from, as far as it says.
    """

    state: StateDict
    sources: tuple[Source, ...]
    batchnorm: object = None

    @property
    def count(self) -> int:
        """How many checkpoints it stands for: what it weighs."""
        return sum(source.count for source in self.sources)


def base_of(state: StateDict) -> Base:
    """Return an average to go on from.

    One of ours says what it was made from; torch's `AveragedModel` counts in `n_averaged`.

    Raises:
        ProvenanceError: It does not say how many checkpoints it stands for.
    """
    known = provenance.of(state.checkpoint)
    if known:
        return Base(state, known.sources, known.batchnorm)
    count, why = _count(state.n_averaged)
    if not count:
        raise ProvenanceError(
            f"does not say how many checkpoints it is the average of{why}",
            file=state.checkpoint.path,
            expected="an average that swa-avg wrote, or an AveragedModel's state_dict",
            remedy="Average all of the checkpoints anew",
        )
    (source,) = sources_of([state], fingerprints([state], {}))
    return Base(state, (replace(source, count=count),))


def _count(counter: TensorRef | None) -> tuple[int, str]:
    """Return the number that an AveragedModel's counter holds, or why it is no such number."""
    if counter is None:
        return 0, ""
    if counter.numel != 1 or counter.dtype.kind not in _NUMBERS or counter.dtype.name == "bool":
        return 0, f": {_COUNTER} is of shape {list(counter.shape)} and dtype {counter.dtype}"
    verify((record, _COUNTER) for record in counter.records)
    (value,) = read_numbers(counter)
    if 1 <= value <= provenance.MOST_COUNT and value == int(value):
        return int(value), ""
    return 0, f": {_COUNTER} is {value}"


def refuse_repeats(bases: Sequence[Base]) -> None:
    """Refuse averages that were made from the same checkpoint: it would count twice.

    Raises:
        ProvenanceError: Two of them were.
    """
    counted: list[Source] = []
    for base in bases:
        path = str(base.state.checkpoint.path)
        provenance.refuse_repeats(counted, ((source, path) for source in base.sources))
        counted += base.sources
