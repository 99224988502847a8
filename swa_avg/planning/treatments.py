"""The treatment of each tensor and its reason, by name, dtype and neighbouring tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from swa_avg.checkpoints import (
    BEFORE_QUANTISATION,
    BN_COUNTER,
    Family,
    StateDict,
    Way,
    at,
    leaf_of,
    module_of,
)
from swa_avg.errors import LayoutError, SwaAvgError, listed
from swa_avg.pickles import Inert, buffers_of
from swa_avg.tensors import DType, Kind, TensorRef

# Names of tensors that contain the scales of quantised weights.
_SCALE = re.compile(r"(?!logit).*(?:scale|absmax|zero|scb)", re.IGNORECASE)
# Names of weights, whose bytes are codes.
_CODED = ("weight", "qweight", "weight_packed", "packed_weight")
_CODES_OR_TABLE = (
    f"If it contains codes of quantised weights: {BEFORE_QUANTISATION[0].lower()}"
    f"{BEFORE_QUANTISATION[1:]}. If it is a table, remove it from the files"
)


class Treatment(Enum):
    """The treatment of a tensor."""

    AVERAGED = "averaged"
    KEPT = "kept"
    RESET = "reset"
    COPIED = "copied"


@dataclass(frozen=True)
class Rules:
    """The rules for tensors, from the user's options and the output's format.

    Attributes:
        bn_buffers: The source of BatchNorm statistics: last, first, mean or reset.
        dtype: The dtype of floating tensors in the output; None keeps their own.
        strides: Whether the output's format keeps strides and views.
        wrapper: Whether the output is a copy of the last checkpoint's file.
    """

    bn_buffers: str = "last"
    dtype: DType | None = None
    strides: bool = True
    wrapper: bool = False


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the output.

    Attributes:
        name: The name.
        treatment: The treatment.
        reason: The reason for the treatment.
        dtype: The dtype in the output.
        shape: The shape.
        family: The family that it belongs to; empty for none.
        statistic: Whether it is a BatchNorm statistic or counter.
        of_first: Whether a kept tensor is taken from the first checkpoint, not the last.
        must_agree: Whether a copied tensor must be the same in all checkpoints.
        remedy: The remedy if it is not the same.
    """

    name: str
    treatment: Treatment
    reason: str
    dtype: DType
    shape: tuple[int, ...]
    family: str = ""
    statistic: bool = False
    of_first: bool = False
    must_agree: bool = False
    remedy: str = ""

    @property
    def alone(self) -> bool:
        """Whether it is taken from one checkpoint and not compared with the others."""
        return self.treatment is Treatment.KEPT and not self.statistic

    def refusal(self, path: object) -> SwaAvgError:
        """Return the error for a tensor that is not the same in all checkpoints."""
        what = f"is part of {self.family}" if self.family else f"{self.dtype} cannot be averaged"
        return SwaAvgError(
            f"differs between checkpoints, and {what}",
            file=path,
            tensor=self.name,
            remedy=self.remedy,
        )


def treatments(
    states: Sequence[StateDict], rules: Rules, count: int, families: Mapping[str, Family]
) -> dict[str, Planned]:
    """Decide what happens to each tensor of an average.

    Args:
        states: The state_dicts, in the order of the run.
        rules: The rules for tensors.
        count: The number of checkpoints in all state_dicts together.
        families: The family of each tensor that has one.
    """
    last = states[-1]
    buffers = _buffers(last)
    scaled = frozenset(module_of(name) for name in last.tensors if _SCALE.match(leaf_of(name)))
    decide = _Decision(states, rules, count, buffers, scaled)
    return {name: decide(name, ref, families.get(name)) for name, ref in last.tensors.items()}


def family_notes(families: Mapping[str, Family], path: object) -> Iterator[str]:
    """Yield notes for the user on families, one for each kind.

    Args:
        families: The family of each tensor that has one.
        path: The last checkpoint.
    """
    by_note: dict[str, list[str]] = {}
    for name, family in families.items():
        if family.note:
            by_note.setdefault(family.note, []).append(name)
    for note, names in by_note.items():
        first = families[names[0]]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        kept = f": taken from {path}; they" if first.way is Way.KEPT else ":"
        yield f"{names[0]}{more} ({first.name}){kept} {note}"


def no_weights(state: StateDict) -> Iterator[LayoutError]:
    """Yield an error if the tensors of a checkpoint are not weights that can be averaged."""
    tensors, path = state.tensors, state.checkpoint.path
    sizes = _recorded_shapes(at(state.checkpoint.tree, "param_shapes"))
    empty = [name for name, ref in tensors.items() if ref.shape == (0,)]
    partitioned = [name for name in empty if 0 not in sizes.get(name, (0,))]
    floats = [name for name, ref in tensors.items() if ref.dtype.kind is Kind.FLOAT]
    if partitioned or (len(empty) > 1 and 2 * len(empty) > len(floats)):
        yield LayoutError(
            f"contains empty placeholders for {len(empty)} tensors ({listed(empty)}), "
            "as written by DeepSpeed ZeRO-3",
            file=path,
            remedy="Run zero_to_fp32.py, which DeepSpeed puts beside its checkpoints, and "
            "average its outputs",
        )
    packed = [name for name in state.dropped if name.endswith("_packed_params")]
    if packed:
        yield LayoutError(
            f"contains quantised weights (torch.ao.nn.quantized): {listed(packed)}",
            file=path,
            remedy=BEFORE_QUANTISATION,
        )


@dataclass(frozen=True)
class _Decision:
    """Decides on the treatment of tensors."""

    states: Sequence[StateDict]
    rules: Rules
    count: int
    buffers: frozenset[str]
    scaled: frozenset[str]

    def __call__(self, name: str, ref: TensorRef, family: Family | None) -> Planned:
        """Return the plan for a tensor."""
        floating = ref.dtype.kind is Kind.FLOAT
        dtype = self.rules.dtype if self.rules.dtype and floating else ref.dtype
        plain = Planned(name, Treatment.AVERAGED, f"mean of {self.count}", dtype, ref.shape)
        if family is not None:
            return self._of_family(replace(plain, family=family.name), ref, family)
        if ref.dtype.kind in (Kind.EXACT, Kind.OPAQUE):
            return self._without_mean(plain, ref)
        if name in self.buffers:
            of = self.states[-1].checkpoint.path
            reason = f"buffer of {of}: not trained; AveragedModel keeps the last one too"
            return replace(plain, treatment=Treatment.KEPT, reason=reason, family="buffer")
        return plain

    def _of_family(self, plain: Planned, ref: TensorRef, family: Family) -> Planned:
        what = f"{family.name} ({family.where})"
        if family.way is Way.BATCHNORM:
            return self._batchnorm(plain, ref)
        if family.way is Way.KEPT:
            reason = f"{what} of {self.states[-1].checkpoint.path}: {family.because}"
            return replace(plain, treatment=Treatment.KEPT, reason=reason)
        if family.way is Way.SAME:
            return replace(
                plain,
                treatment=Treatment.COPIED,
                reason=f"{what}, must be the same in all: {family.because}",
                dtype=ref.dtype,
                must_agree=True,
                remedy=family.remedy,
            )
        if ref.dtype.kind in (Kind.EXACT, Kind.OPAQUE):
            return self._without_mean(plain, ref)
        return replace(plain, reason=f"{plain.reason}; {what}: {family.because}")

    def _batchnorm(self, plain: Planned, ref: TensorRef) -> Planned:
        plain = replace(plain, statistic=True)
        choice, counter = self.rules.bn_buffers, leaf_of(plain.name) == BN_COUNTER
        if choice == "reset":
            return replace(plain, treatment=Treatment.RESET, reason="BatchNorm buffer")
        if choice == "mean" and ref.dtype.kind is Kind.FLOAT and not counter:
            return replace(plain, reason=f"BatchNorm buffer, {plain.reason}")
        of = self.states[0] if choice == "first" else self.states[-1]
        reason = f"BatchNorm buffer of {of.checkpoint.path}"
        first = choice == "first"
        return replace(plain, treatment=Treatment.KEPT, reason=reason, of_first=first)

    def _without_mean(self, plain: Planned, ref: TensorRef) -> Planned:
        copied = replace(
            plain,
            treatment=Treatment.COPIED,
            reason=f"{ref.dtype} has no mean",
            must_agree=ref.dtype.kind is Kind.OPAQUE,
        )
        integers = ref.dtype.kind is Kind.EXACT and ref.dtype.name != "bool" and ref.numel > 1
        # Counts have 64 bits, codes never do.
        beside = ref.dtype.itemsize < 8 and module_of(plain.name) in self.scaled
        beside = beside or (ref.dtype.itemsize == 1 and leaf_of(plain.name) in _CODED)
        if integers and (len(ref.shape) > 1 or beside):
            return replace(copied, must_agree=True, remedy=_CODES_OR_TABLE)
        return copied


def _recorded_shapes(groups: object) -> dict[object, tuple[int, ...]]:
    """Return the parameter shapes that DeepSpeed records, in one dict or one for each group."""
    found: dict[object, tuple[int, ...]] = {}
    for group in groups if isinstance(groups, list | tuple) else [groups]:
        shapes = group.items() if isinstance(group, dict) else ()
        found.update((name, shape) for name, shape in shapes if isinstance(shape, tuple))
    return found


def _buffers(state: StateDict) -> frozenset[str]:
    """Return the names of buffers, from a pickled module or from DeepSpeed's list of names."""
    tree = state.checkpoint.tree
    value = at(tree, state.where)
    if isinstance(value, Inert):
        found = buffers_of(value)
        return frozenset(name.removeprefix(state.prefix) for name in found)
    listed = at(tree, "buffer_names")  # DeepSpeed
    if state.where and isinstance(listed, list | tuple):
        return frozenset(name for name in listed if isinstance(name, str))
    return frozenset()
