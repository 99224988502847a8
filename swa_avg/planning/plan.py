"""What happens to each tensor, and why; decided from the headers alone.

All checkpoints are compared with the last one, whose names, order, shapes and
strides the output has. Every disagreement is found before a tensor is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from swa_avg.checkpoints import BN_COUNTER, StateDict, is_bn_buffer
from swa_avg.errors import MismatchError, SwaAvgError, listed
from swa_avg.formats import OutputStateDict, OutputStorage, OutputTensor
from swa_avg.planning.ties import families
from swa_avg.storage import InputFile
from swa_avg.tensors import (
    DType,
    Kind,
    TensorRef,
    contiguous_stride,
    is_dense,
    memory_order,
    permuted,
)

_RESET = {"running_mean": 0.0, "running_var": 1.0, BN_COUNTER: 0.0}


class Treatment(Enum):
    """What is done with a tensor."""

    AVERAGED = "averaged"
    KEPT = "kept"
    RESET = "reset"
    COPIED = "copied"


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the output.

    Attributes:
        name: Its name.
        treatment: What is done with it.
        reason: Why.
        dtype: Its dtype in the output.
        shape: Its shape.
    """

    name: str
    treatment: Treatment
    reason: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """One storage of the output, and the input tensors it is made from.

    Attributes:
        name: The tensor it is named after in messages.
        treatment: What is done with it.
        shape: Its sizes, the outermost dimension in memory first.
        sources: The same tensor in each checkpoint that takes part, dimensions in
            the order of `shape`. Of a copied one the last is written, the others
            are compared with it.
        dtype: Its dtype in the output.
        fill: What a reset one is filled with.
        weights: How many checkpoints each source stands for; empty where each is one.
    """

    name: str
    treatment: Treatment
    shape: tuple[int, ...]
    sources: tuple[TensorRef, ...]
    dtype: DType
    fill: float = 0.0
    weights: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that will be done.

    Attributes:
        tensors: Each tensor of the output, in its order.
        works: What is computed: one for each storage of the output.
        state_dict: What is written.
        notes: What the user should know.
    """

    tensors: tuple[Planned, ...]
    works: tuple[Work, ...]
    state_dict: OutputStateDict
    notes: tuple[str, ...]

    @property
    def bytes_to_read(self) -> int:
        """Bytes of tensors that are read from all checkpoints."""
        return sum(source.nbytes for work in self.works for source in work.sources)

    @property
    def ranges(self) -> Iterator[tuple[InputFile, int, int]]:
        """What is read of which file: the first byte and how many, in the order of the output."""
        return ranges_of(self.works)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors are treated how."""
        treated = Counter(tensor.treatment.value for tensor in self.tensors)
        return {treatment.value: treated[treatment.value] for treatment in Treatment}

    @property
    def stale(self) -> bool:
        """Whether there are BatchNorm statistics that belong to none of the averaged weights."""
        names = {tensor.name: None for tensor in self.tensors}
        means = any(
            work.treatment is Treatment.AVERAGED and len(work.sources) > 1 for work in self.works
        )
        return means and any(is_bn_buffer(name, names) for name in names)


@dataclass(frozen=True)
class Rules:
    """How the user wants tensors treated.

    Attributes:
        bn_buffers: Where BN statistics come from: last, first, mean or reset.
        dtype: The dtype that floating tensors are written in; None keeps theirs.
        strides: Whether the output's format keeps strides and views.
    """

    bn_buffers: str = "last"
    dtype: DType | None = None
    strides: bool = True


def make_plan(states: Sequence[StateDict], rules: Rules, counts: Sequence[int] = ()) -> Plan:
    """Plan the average of checkpoints that are in their order.

    Args:
        states: Their state_dicts.
        rules: How tensors are treated.
        counts: How many checkpoints each stands for; by default one.

    Raises:
        MismatchError: They do not agree; it holds all disagreements.
    """
    last = states[-1]
    counts = tuple(counts) or (1,) * len(states)
    disagreements = [error for state in states[:-1] for error in _differences(state, last, rules)]
    if disagreements:
        raise MismatchError(disagreements)
    planned = {name: _treat(name, states, rules, sum(counts)) for name in last.tensors}
    made, untied = families(
        states, {name: tensor.treatment for name, tensor in planned.items()}, rules.strides
    )
    works: list[Work] = []
    views: dict[str, OutputTensor] = {}
    for family in made:
        work, base = _work(family.base, states, planned[family.base], rules, counts)
        for name in family.names:
            views[name] = _view(last.tensors[name], last.tensors[family.base], base, len(works))
        works.append(work)
    notes = list(_notes(states, rules))
    if untied:
        notes.append(f"{listed(untied)}: tied in some checkpoints only; written untied")
    return Plan(tuple(planned.values()), tuple(works), _output(last, works, views), tuple(notes))


def _differences(state: StateDict, last: StateDict, rules: Rules) -> Iterator[SwaAvgError]:
    """Yield each way in which a checkpoint does not agree with the last one."""
    if state.views is last.views:
        return
    path, other = state.checkpoint.path, last.checkpoint.path
    missing = [name for name in last.tensors if name not in state.tensors]
    extra = [name for name in state.tensors if name not in last.tensors]
    for names, has in ((missing, "lacks"), (extra, "has")):
        if names:
            count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
            yield SwaAvgError(
                f"{has} {count} that {other} {'has' if has == 'lacks' else 'lacks'}: "
                f"{listed(names)}",
                file=path,
                remedy="Average checkpoints of one model",
            )
    for name, ref in state.tensors.items():
        wanted = last.tensors.get(name)
        if wanted is None:
            continue
        if ref.shape != wanted.shape:
            yield SwaAvgError(
                f"has shape {list(ref.shape)}",
                file=path,
                tensor=name,
                expected=f"{list(wanted.shape)} as in {other}",
                remedy="Average checkpoints of one model",
            )
        elif ref.dtype != wanted.dtype:
            floats = ref.dtype.kind is wanted.dtype.kind is Kind.FLOAT
            if not (floats and rules.dtype):
                yield SwaAvgError(
                    f"has dtype {ref.dtype}",
                    file=path,
                    tensor=name,
                    expected=f"{wanted.dtype} as in {other}",
                    remedy=f"Choose one with --dtype {wanted.dtype}" if floats else "",
                )


def _treat(name: str, states: Sequence[StateDict], rules: Rules, count: int) -> Planned:
    """Decide what happens to a tensor of an average of `count` checkpoints."""
    last = states[-1]
    ref = last.tensors[name]
    dtype = rules.dtype if rules.dtype and ref.dtype.kind is Kind.FLOAT else ref.dtype
    treatment, reason = Treatment.AVERAGED, f"mean of {count}"
    if is_bn_buffer(name, last.tensors):
        treatment, reason = _treat_bn_buffer(name, ref, states, rules, count)
    elif ref.dtype.kind in (Kind.EXACT, Kind.OPAQUE):
        treatment, reason = Treatment.COPIED, f"{ref.dtype} has no mean"
    return Planned(name, treatment, reason, dtype, ref.shape)


def _treat_bn_buffer(
    name: str, ref: TensorRef, states: Sequence[StateDict], rules: Rules, count: int
) -> tuple[Treatment, str]:
    if rules.bn_buffers == "reset":
        return Treatment.RESET, "BatchNorm buffer"
    counter = name.rpartition(".")[2] == BN_COUNTER
    if rules.bn_buffers == "mean" and ref.dtype.kind is Kind.FLOAT and not counter:
        return Treatment.AVERAGED, f"BatchNorm buffer, mean of {count}"
    of = states[0] if rules.bn_buffers == "first" else states[-1]
    return Treatment.KEPT, f"BatchNorm buffer of {of.checkpoint.path}"


def _work(
    name: str, states: Sequence[StateDict], planned: Planned, rules: Rules, counts: Sequence[int]
) -> tuple[Work, OutputTensor]:
    """Return what is computed for a tensor, and how it lies in its new storage."""
    ref = states[-1].tensors[name]
    keeps = rules.strides and is_dense(ref.shape, ref.stride)
    stride = ref.stride if keeps else contiguous_stride(ref.shape)
    order = memory_order(ref.shape, stride)
    shape = tuple(ref.shape[dim] for dim in order)
    taken: Sequence[StateDict] = states
    if planned.treatment is Treatment.KEPT:
        taken = states[:1] if rules.bn_buffers == "first" else states[-1:]
    elif planned.treatment is Treatment.RESET:
        taken = ()
    sources = tuple(state.tensors[name] for state in taken)
    if order != tuple(range(len(order))):
        sources = tuple(permuted(source, order, shape) for source in sources)
    fill = _RESET.get(name.rpartition(".")[2], 0.0)
    equal = planned.treatment is not Treatment.AVERAGED or set(counts) == {1}
    weights = () if equal else tuple(counts)
    work = Work(name, planned.treatment, shape, sources, planned.dtype, fill, weights)
    return work, OutputTensor(0, 0, ref.shape, stride)


def _view(ref: TensorRef, base: TensorRef, written: OutputTensor, storage: int) -> OutputTensor:
    """Return how a tensor looks at the new storage of its family's base."""
    if (ref.offset, ref.shape, ref.stride) == (base.offset, base.shape, base.stride):
        return OutputTensor(storage, 0, written.shape, written.stride)
    return OutputTensor(storage, ref.offset - base.offset, ref.shape, ref.stride)


def _output(
    last: StateDict, works: Sequence[Work], views: Mapping[str, OutputTensor]
) -> OutputStateDict:
    storages = tuple(OutputStorage(work.dtype, math.prod(work.shape)) for work in works)
    items = {name: views[name] if name in views else last.values[name] for name in last.order}
    # What transformers looks for before it loads a safetensors file.
    text = dict(last.checkpoint.metadata) or {"format": "pt"}
    text = {name: value for name, value in text.items() if name not in views}
    return OutputStateDict(storages, items, last.metadata, text)


def _notes(states: Sequence[StateDict], rules: Rules) -> Iterator[str]:
    """Yield what the user should know about the checkpoints."""
    for state in states:
        for note in state.checkpoint.notes:
            yield f"{state.checkpoint.path}: {note}"
    last = states[-1]
    if last.averages:
        where = listed(last.averages)
        yield f"{last.checkpoint.path}: has averages too, at {where}; not used (--ema takes them)"
    if last.dropped:
        yield f"{listed(last.dropped)}: no tensor and no plain value; left out"
    if last.values and not rules.strides:
        yield f"{listed(list(last.values))}: no tensor; left out, for want of a place in the output"
    differing = [
        name
        for name, value in last.values.items()
        if any(state.values.get(name) != value for state in states[:-1])
    ]
    if differing and rules.strides:
        yield f"{listed(differing)}: differs between checkpoints; taken from {last.checkpoint.path}"


def ranges_of(works: Iterable[Work]) -> Iterator[tuple[InputFile, int, int]]:
    """Yield what is read for some works, of which file: the first byte and how many."""
    for work in works:
        for source in work.sources:
            # Whole records: their checksums are over all of them.
            yield from ((rec.file, rec.offset, rec.length) for rec in source.records)
