"""Averages given with --start-from and --minus: how many checkpoints each was made from, and which.

An average of n_b checkpoints, minus one of n_a of them, gives the mean of the rest:
(n_b b - n_a a) / (n_b - n_a). The earlier average then has a negative weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from swa_avg.checkpoints import UNKNOWN, Source, StateDict, fingerprints, provenance, sources_of
from swa_avg.errors import ProvenanceError
from swa_avg.tensors import Kind, TensorRef, read_numbers, verify

_COUNTER = "n_averaged"
_NUMBERS = (Kind.FLOAT, Kind.EXACT)


@dataclass(frozen=True)
class Base:
    """An average given with --start-from or --minus.

    Attributes:
        state: The state_dict of the average.
        sources: The checkpoints it was made from; only itself if it does not record them.
        batchnorm: The origin of its BatchNorm statistics, if it records that.
        subtracted: Whether it was given with --minus.
    """

    state: StateDict
    sources: tuple[Source, ...]
    batchnorm: object = None
    subtracted: bool = False

    @property
    def count(self) -> int:
        """The number of checkpoints it was made from."""
        return sum(source.count for source in self.sources)

    @property
    def weight(self) -> int:
        """The number of checkpoints it was made from; negative if it is subtracted."""
        return -self.count if self.subtracted else self.count


def base_of(state: StateDict) -> Base:
    """Return the average in a state_dict.

    An average of swa-avg records the checkpoints it was made from. torch's `AveragedModel`
    records their number in `n_averaged`, and some frameworks record that of their averages.

    Raises:
        ProvenanceError: It does not record how many checkpoints it was made from.
    """
    known = provenance.of(state.checkpoint)
    if known:
        return Base(state, known.sources, known.batchnorm)
    count, why = _count(state.n_averaged)
    if state.is_running:
        count = state.run_count or 0
    if not 1 <= count <= provenance.MOST_COUNT:
        averages = state.places.averages
        raise ProvenanceError(
            f"does not record how many checkpoints it was made from{why}",
            file=state.checkpoint.path,
            expected="an average written by swa-avg, or an AveragedModel's state_dict",
            remedy=f"To take the average at {averages[0]}, use {state.for_average}; to add raw "
            f"weights to it, write it first by itself with {state.for_average}"
            if averages and not state.is_running
            else "Average all of the checkpoints again, without --start-from",
        )
    return Base(state, (_itself(state, count),))


def _itself(state: StateDict, count: int) -> Source:
    """Describe an average that does not record the checkpoints it was made from."""
    (source,) = sources_of([state], fingerprints([state], {}))
    return replace(source, count=count)


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


def minus(whole: Base, part: Base) -> tuple[Base, Base]:
    """Return an average that is subtracted, and the one that it is subtracted from.

    Raises:
        ProvenanceError: Nothing is left, or a record shows that `part` is no part of `whole`.
    """
    path, of = part.state.checkpoint.path, whole.state.checkpoint.path
    if part.count >= whole.count:
        raise ProvenanceError(
            f"is the mean of {part.count} checkpoints, and {of} is the mean of {whole.count}:"
            " no checkpoints are left",
            file=path,
            remedy="Give the later average with --start-from, the earlier one with --minus"
            if part.count > whole.count
            else "Give an average of fewer checkpoints with --minus",
        )
    left, missing = _difference(whole.sources, part.sources)
    # An average without a list of its checkpoints may contain the missing ones.
    unlisted = sum(source.count for source in left if source.count > 1)
    listed = [source for source in missing if source.count == 1 and source.fingerprint != UNKNOWN]
    if len(listed) > unlisted:
        raise ProvenanceError(
            f"was made from {listed[0].name}, which is not among the checkpoints of {of}",
            file=path,
            remedy="Subtract an average of some of the same checkpoints",
        )
    return replace(part, subtracted=True), whole


def amplification(bases: Iterable[Base]) -> list[str]:
    """Return a note on the rounding errors of a difference; none without a subtracted average."""
    bases = tuple(bases)
    if not any(base.subtracted for base in bases):
        return []
    part, whole = bases
    factor = (whole.count + part.count) / (whole.count - part.count)
    return [
        f"{whole.state.checkpoint.path} is the mean of {whole.count} checkpoints, and "
        f"{part.state.checkpoint.path} of {part.count} of them: the mean of the other "
        f"{whole.count - part.count} has up to {factor:.3g} times their rounding errors"
    ]


def sources_in(bases: Sequence[Base]) -> list[Source]:
    """Return the checkpoints in several averages; without those of a subtracted one."""
    if not any(base.subtracted for base in bases):
        return [source for base in bases for source in base.sources]
    part, whole = bases
    left, missing = _difference(whole.sources, part.sources)
    return [_itself(whole.state, whole.count - part.count)] if missing else left


def _difference(
    whole: Iterable[Source], part: Iterable[Source]
) -> tuple[list[Source], list[Source]]:
    """Return the sources only in the first average, and those only in the second one."""
    taken = Counter((s.fingerprint, s.count) for s in part if s.fingerprint != UNKNOWN)
    left: list[Source] = []
    for source in whole:
        key = source.fingerprint, source.count
        if taken[key]:
            taken[key] -= 1
        else:
            left.append(source)
    missing = [s for s in part if s.fingerprint == UNKNOWN or taken[s.fingerprint, s.count] > 0]
    return left, missing
