"""The plan of an average: what happens to each tensor, and why. Only headers are read.

All checkpoints are compared with the last one. The output has the names, the order, the
shapes and the strides of the last one. Every disagreement in the headers is found before
a tensor is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from swa_avg.checkpoints import BN_COUNTER, StateDict, leaf_of, members
from swa_avg.errors import MismatchError, SwaAvgError, listed
from swa_avg.formats import OutputStateDict, OutputStorage, OutputTensor
from swa_avg.pickles import leaves, rebuilt
from swa_avg.planning.agreement import disagreements
from swa_avg.planning.notes import header_notes
from swa_avg.planning.ties import ties
from swa_avg.planning.treatments import (
    Planned,
    Rules,
    Treatment,
    family_notes,
    no_weights,
    treatments,
)
from swa_avg.storage import InputFile
from swa_avg.tensors import (
    Box,
    DType,
    Record,
    TensorRef,
    View,
    contiguous_stride,
    cut,
    is_dense,
    memory_order,
    permuted,
    same_bytes,
)

_RESET = {"running_mean": 0.0, "running_var": 1.0, BN_COUNTER: 0.0}


@dataclass(frozen=True, slots=True)
class Work:
    """One storage of the output, and the input tensors that it is made from.

    Attributes:
        name: The name of its tensor, for messages.
        treatment: The treatment of the tensor.
        shape: The sizes, the outermost dimension in memory first.
        sources: The same tensor in each checkpoint, with dimensions in the order of
            `shape`. If it is copied or kept, the last source is written, and the others
            are compared with it.
        dtype: The dtype in the output.
        fill: The value of a reset tensor.
        weights: The number of checkpoints in each source; empty if each is one.
        replaces: The tensor of the last checkpoint, or the part of one, whose bytes it
            replaces if the wrapper is kept; otherwise None.
    """

    name: str
    treatment: Treatment
    shape: tuple[int, ...]
    sources: tuple[TensorRef, ...]
    dtype: DType
    fill: float = 0.0
    weights: tuple[int, ...] = ()
    replaces: TensorRef | None = None


@dataclass(frozen=True)
class Statistics:
    """The names of BatchNorm means and variances, sorted by what the headers show.

    Attributes:
        alike: Statistics that are the same in all inputs, for example of frozen layers.
        unfit: Statistics that differ between inputs, or are reset or averaged.
        compared: Statistics that are compared while averaging, because no checksum is recorded.
    """

    alike: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The plan of one average.

    Attributes:
        tensors: The tensors of the output, in order.
        works: The works to compute, one for each storage of the output.
        state_dict: The state_dict to write.
        notes: Notes for the user.
        statistics: The BatchNorm statistics, as far as headers show.
    """

    tensors: tuple[Planned, ...]
    works: tuple[Work, ...]
    state_dict: OutputStateDict
    notes: tuple[str, ...]
    statistics: Statistics

    @property
    def bytes_to_read(self) -> int:
        """The bytes of tensors to read from all checkpoints."""
        return sum(source.nbytes for work in self.works for source in work.sources)

    @property
    def ranges(self) -> Iterator[tuple[InputFile, int, int]]:
        """The ranges to read: file, first byte and length, in the order of the output."""
        return ranges_of(self.works)

    @property
    def counts(self) -> dict[str, int]:
        """The number of tensors of each treatment."""
        treated = Counter(tensor.treatment.value for tensor in self.tensors)
        return {treatment.value: treated[treatment.value] for treatment in Treatment}

    @property
    def families(self) -> dict[str, int]:
        """The number of tensors of each family that are taken from one checkpoint or reset."""
        apart = (Treatment.KEPT, Treatment.RESET)
        return dict(Counter(t.family for t in self.tensors if t.treatment in apart))

    @property
    def stale(self) -> bool:
        """Whether some BatchNorm statistics may not fit the averaged weights."""
        return self.stale_after(self.statistics.compared)

    def stale_after(self, differing: Container[str]) -> bool:
        """Return whether some BatchNorm statistics do not fit the averaged weights.

        Args:
            differing: The compared works that are not the same in all inputs.
        """
        means = any(
            work.treatment is Treatment.AVERAGED and len(work.sources) > 1 for work in self.works
        )
        known = self.statistics
        return means and bool(known.unfit or [name for name in known.compared if name in differing])

    def unlike(self, crcs: Mapping[Record, int]) -> Iterator[str]:
        """Yield the averaged BatchNorm statistics that are not the same in all inputs.

        Args:
            crcs: The CRC-32 of the records that were read.
        """
        for work in self.works:
            averaged = work.treatment is Treatment.AVERAGED
            compared = averaged and work.name in self.statistics.compared
            if compared and not same_bytes(work.sources, crcs):
                yield work.name

    def frozen_after(self, differing: Container[str]) -> list[str]:
        """Return the BatchNorm statistics that are the same in all inputs."""
        same = [name for name in self.statistics.compared if name not in differing]
        return [*self.statistics.alike, *same]


def make_plan(states: Sequence[StateDict], rules: Rules, counts: Sequence[int] = ()) -> Plan:
    """Plan the average of checkpoints.

    Args:
        states: The state_dicts, in the order of the run.
        rules: The rules for tensors.
        counts: The number of checkpoints in each state_dict; 1 by default.

    Raises:
        MismatchError: The checkpoints do not agree; it lists all disagreements.
    """
    last = states[-1]
    counts = tuple(counts) or (1,) * len(states)
    _refuse([error for state in states for error in no_weights(state)])
    families = members(last.tensors)
    planned = treatments(states, rules, sum(counts), families)
    _refuse(disagreements(states, rules, planned))
    _refuse([p.refusal(last.checkpoint.path) for p in planned.values() if _unlike(p, states)])
    ways = {name: (tensor.treatment, tensor.of_first) for name, tensor in planned.items()}
    all_ties, untied = ties(states, ways, views=rules.strides)
    works: list[Work] = []
    views: dict[str, OutputTensor] = {}
    for tie in all_ties:
        made, base = _works(states, planned[tie.base], rules, counts, len(works))
        for name in tie.names:
            views[name] = _view(last.tensors[name], last.tensors[tie.base], base)
        works += made
    statistics = _statistics(works, planned, states)
    values = _values(last, rules, works)
    notes = list(header_notes(states, rules))
    if len(states) > 1:
        notes += family_notes(families, last.checkpoint.path)
    if untied:
        notes.append(f"{listed(untied)}: tied only in some checkpoints; written untied")
    return Plan(
        tuple(planned.values()),
        tuple(works),
        _output(last, works, {**values, **views}),
        tuple(notes),
        statistics,
    )


def _refuse(errors: Sequence[SwaAvgError]) -> None:
    if errors:
        raise MismatchError(errors)


def _unlike(planned: Planned, states: Sequence[StateDict]) -> bool:
    """Return whether the headers show that a tensor differs that must be the same."""
    if not planned.must_agree:
        return False
    return same_bytes([state.tensors[planned.name] for state in states]) is False


def _statistics(
    works: Sequence[Work], planned: Mapping[str, Planned], states: Sequence[StateDict]
) -> Statistics:
    """Sort the BatchNorm means and variances by what the headers show."""
    alike, unfit, compared = [], [], []
    for work in {work.name: work for work in works}.values():
        if not planned[work.name].statistic or leaf_of(work.name) == BN_COUNTER:
            continue
        known = same_bytes([state.tensors[work.name] for state in states])
        if known and work.treatment is not Treatment.RESET:
            alike.append(work.name)
        elif len(work.sources) > 1 and (known is None or work.treatment is Treatment.KEPT):
            compared.append(work.name)
        else:
            unfit.append(work.name)
    return Statistics(tuple(alike), tuple(unfit), tuple(compared))


def _works(
    states: Sequence[StateDict], planned: Planned, rules: Rules, counts: Sequence[int], first: int
) -> tuple[list[Work], OutputTensor]:
    """Return the works for a tensor, and the tensor's layout in its new storages.

    A kept wrapper has a storage for each part that a rank wrote; all other outputs have one
    for the whole tensor.

    Args:
        states: The state_dicts.
        planned: The tensor.
        rules: The rules for tensors.
        counts: The number of checkpoints in each state_dict.
        first: The number of the first new storage.
    """
    ref = states[-1].tensors[planned.name]
    sources = _sources(planned, states)
    if not (rules.wrapper and ref.parts):
        work, written = _work(ref, sources, planned, rules, counts)
        return [work], replace(written, storage=first)
    boxes = [Box(part.start, part.ref.shape) for part in ref.parts]
    columns = [cut(source, boxes) for source in sources]
    works, parts = [], []
    for number, part in enumerate(ref.parts):
        column = tuple(column[number] for column in columns)
        work, written = _work(part.ref, column, planned, rules, counts)
        works.append(work)
        parts.append((part.start, replace(written, storage=first + number)))
    return works, OutputTensor(first, 0, ref.shape, ref.stride, tuple(parts))


def _work(
    ref: TensorRef,
    sources: tuple[TensorRef, ...],
    planned: Planned,
    rules: Rules,
    counts: Sequence[int],
) -> tuple[Work, OutputTensor]:
    """Return the work for one storage, and the layout of its tensor, like that of `ref`."""
    keeps = rules.strides and is_dense(ref.shape, ref.stride)
    stride = ref.stride if keeps else contiguous_stride(ref.shape)
    order = memory_order(ref.shape, stride)
    shape = tuple(ref.shape[dim] for dim in order)
    if order != tuple(range(len(order))):
        sources = tuple(permuted(source, order, shape) for source in sources)
    fill = _RESET.get(leaf_of(planned.name), 0.0)
    equal = planned.treatment is not Treatment.AVERAGED or set(counts) == {1}
    weights = () if equal else tuple(counts)
    place = ref if rules.wrapper else None
    work = Work(
        planned.name, planned.treatment, shape, sources, planned.dtype, fill, weights, place
    )
    return work, OutputTensor(0, 0, ref.shape, stride)


def _sources(planned: Planned, states: Sequence[StateDict]) -> tuple[TensorRef, ...]:
    """Return the sources of a tensor; a tensor that is taken from one input has it last."""
    every = tuple(state.tensors[planned.name] for state in states)
    if planned.treatment is Treatment.RESET:
        return ()
    if planned.treatment is not Treatment.KEPT:
        return every
    if planned.of_first:
        every = every[::-1]
    counter = leaf_of(planned.name) == BN_COUNTER
    compared = planned.statistic and not counter and same_bytes(every) is None
    return every if compared and len({ref.dtype for ref in every}) == 1 else every[-1:]


def _view(ref: TensorRef, base: TensorRef, written: OutputTensor) -> OutputTensor:
    """Return the layout of a tied tensor in the new storage of the tie's base."""
    if (ref.offset, ref.shape, ref.stride) == (base.offset, base.shape, base.stride):
        return written
    return OutputTensor(written.storage, ref.offset - base.offset, ref.shape, ref.stride)


def _values(last: StateDict, rules: Rules, works: list[Work]) -> dict[str, object]:
    """Return the values with tensors in them as they are written, and add their works."""
    written: dict[TensorRef, OutputTensor] = {}
    made: dict[str, object] = {}

    def moved(value: object, name: str) -> object:
        if not isinstance(value, View):
            return value
        ref = last.checkpoint.located(value)
        if ref not in written:
            kept = Planned(
                f"{name}, tensor {len(written)}", Treatment.KEPT, "", ref.dtype, ref.shape
            )
            work, tensor = _work(ref, (ref,), kept, rules, ())
            written[ref] = replace(tensor, storage=len(works))
            works.append(work)
        return written[ref]

    # Other formats store only tensors, and a kept wrapper has all values already.
    for name, value in last.values.items() if rules.strides and not rules.wrapper else ():
        if any(isinstance(one, View) for one in leaves(value)):
            made[name] = rebuilt(value, partial(moved, name=name))
    return made


def _output(last: StateDict, works: Sequence[Work], made: Mapping[str, object]) -> OutputStateDict:
    storages = tuple(OutputStorage(work.dtype, math.prod(work.shape)) for work in works)
    items = {name: made[name] if name in made else last.values[name] for name in last.order}
    # transformers requires this entry to load a safetensors file.
    text = dict(last.checkpoint.metadata) or {"format": "pt"}
    text = {name: value for name, value in text.items() if name not in made}
    return OutputStateDict(storages, items, last.metadata, text)


def ranges_of(works: Iterable[Work]) -> Iterator[tuple[InputFile, int, int]]:
    """Yield the ranges to read for some works: file, first byte and length."""
    for work in works:
        for source in work.sources:
            # Whole records, because a checksum covers the whole record.
            yield from ((rec.file, rec.offset, rec.length) for rec in source.records)
