"""Tied weights: names of a state_dict that share elements.

Tied weights (an embedding and the output layer) are two names of one tensor; views are
names of parts of it. They are averaged once and stay tied in the output if they are tied
in the same way in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from swa_avg.checkpoints import StateDict
from swa_avg.tensors import TensorRef, is_dense


@dataclass(frozen=True, slots=True)
class Tie:
    """Names that share one range of elements.

    Attributes:
        base: The name of the tensor that covers the elements of all others.
        names: All names, including `base`, in the order of the state_dict.
    """

    base: str
    names: tuple[str, ...]


def ties(
    states: Sequence[StateDict], treatments: Mapping[str, object], *, views: bool
) -> tuple[list[Tie], list[str]]:
    """Group the names of the last state_dict into ties.

    Args:
        states: The checkpoints, all with the same names.
        treatments: The treatment of each name; names with different ones cannot stay tied.
        views: Whether the output can store views. If not, only equal views stay tied.

    Returns:
        The ties, and the names that are tied only in some of the checkpoints.
    """
    tensors = states[-1].tensors
    found: list[Tie] = []
    untied: list[str] = []
    for names in _overlapping(tensors.items(), treatments):
        tie = _tie(names, tensors) if views else None
        for part in [tie] if tie else _equal(names, tensors):
            if all(_tied_alike(part, state, states[-1]) for state in states[:-1]):
                found.append(part)
            else:
                found += [Tie(name, (name,)) for name in part.names]
                untied += part.names
    untied += (name for name in _tied_before(states) if name not in untied)
    place = {name: number for number, name in enumerate(tensors)}
    return sorted(found, key=lambda tie: place[tie.names[0]]), untied


def _tied_before(states: Sequence[StateDict]) -> dict[str, None]:
    """Return names that are one tensor in an earlier checkpoint, but not in the last one."""
    found: dict[str, None] = {}
    last = states[-1].tensors
    for state in states[:-1]:
        if state.views is states[-1].views:
            continue
        by_view: dict[TensorRef, list[str]] = {}
        for name, ref in state.tensors.items():
            if ref.numel:
                by_view.setdefault(ref, []).append(name)
        for names in by_view.values():
            if len({last[name] for name in names}) > 1:
                found.update(dict.fromkeys(names))
    return found


def _overlapping(
    tensors: Iterable[tuple[str, TensorRef]], treatments: Mapping[str, object]
) -> Iterator[list[str]]:
    """Yield groups of names whose tensors share elements, directly or through other names."""
    by_storage: dict[object, list[tuple[int, int, int, str]]] = {}
    for number, (name, ref) in enumerate(tensors):
        # Empty tensors share no elements; their number makes the key unique.
        place = ref.parts or ref.record
        key = (place, ref.dtype.name, treatments[name]) if ref.numel else number
        span = (ref.offset, ref.offset + ref.extent, number, name)
        by_storage.setdefault(key, []).append(span)
    for spans in by_storage.values():
        group: list[tuple[int, str]] = []
        reach = -1
        for start, end, number, name in sorted(spans):
            if group and start >= reach:
                yield [member for _, member in sorted(group)]
                group = []
            group.append((number, name))
            reach = max(reach, end) if len(group) > 1 else end
        yield [member for _, member in sorted(group)]


def _tie(names: list[str], tensors: Mapping[str, TensorRef]) -> Tie | None:
    """Return a tie of views, if one of the tensors covers the elements of all others."""
    start = min(tensors[name].offset for name in names)
    end = max(tensors[name].offset + tensors[name].extent for name in names)
    for name in names:
        ref = tensors[name]
        if (ref.offset, ref.extent) == (start, end - start) and is_dense(ref.shape, ref.stride):
            return Tie(name, tuple(names))
    return None


def _equal(names: list[str], tensors: Mapping[str, TensorRef]) -> list[Tie]:
    """Return a tie for each distinct view of the storage."""
    by_view: dict[object, list[str]] = {}
    for name in names:
        ref = tensors[name]
        by_view.setdefault((ref.offset, ref.shape, ref.stride), []).append(name)
    return [Tie(equal[0], tuple(equal)) for equal in by_view.values()]


def _tied_alike(tie: Tie, state: StateDict, last: StateDict) -> bool:
    """Return whether names are tied in a checkpoint in the same way as in the last one."""
    if len(tie.names) == 1 or state.views is last.views:
        return True
    base, base_last = state.tensors[tie.base], last.tensors[tie.base]
    for name in tie.names:
        ref, ref_last = state.tensors[name], last.tensors[name]
        if (ref.record, ref.parts, ref.dtype) != (base.record, base.parts, base.dtype):
            return False
        same_here = (ref.offset, ref.stride) == (base.offset, base.stride)
        if _is_same_view(ref_last, base_last):
            if not same_here or ref.shape != base.shape:
                return False
        elif (ref.offset - base.offset, ref.stride, base.stride) != (
            ref_last.offset - base_last.offset,
            ref_last.stride,
            base_last.stride,
        ):
            return False
    return True


def _is_same_view(ref: TensorRef, base: TensorRef) -> bool:
    """Return whether a view is the base itself under another name."""
    return (ref.offset, ref.shape, ref.stride) == (base.offset, base.shape, base.stride)
