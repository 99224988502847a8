"""The entries of a state_dict, under the names of the plain model.

Wrappers around a model add prefixes to its names, modules that average a model hold both the
raw weights and the average, and optimizers may save into the same dict. This module removes
all of these, and joins the entries of several places. It does not read tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from swa_avg.checkpoints.frameworks import WEIGHTS
from swa_avg.checkpoints.halves import (
    WRAPPERS,
    Chosen,
    Half,
    averaged_halves,
    dotted,
    lone_average,
)
from swa_avg.checkpoints.places import Places, no_average, no_state_dict, only_of
from swa_avg.checkpoints.tree import (
    at,
    dicts_of_tensors,
    flattened,
    has_tensors,
    has_weights,
    mapping,
    split_prefix,
)
from swa_avg.errors import LayoutError, listed
from swa_avg.formats import ROOT, Checkpoint, Components
from swa_avg.pickles import Dict, Stream, UnreadableTensor, described
from swa_avg.tensors import Tensor, TensorRef, View, in_groups, is_optimizer, optimizer_groups

# The counter that a wrapper saves next to `module.*`: AveragedModel of torch and of mmengine.
_COUNTERS = {"ema_state_dict": "steps"}
_COUNTER = "n_averaged"
# State_dicts hold few values besides tensors; nested lists can take forever to check.
_MOST_PLAIN_VALUES = 1_000_000
# The bytes of a reference to a tensor in the pickle of an output; many may be to one tensor.
_REFERENCE = 200


@dataclass(frozen=True)
class Part:
    """The entries at one place or at several, with the names of the plain model.

    Attributes:
        prefix: The prefix that was removed from the names.
        entries: The entries, in order.
        metadata: The `_metadata` that torch attaches to a state_dict, or None.
        counter: The counter that torch's AveragedModel saves with its weights, or None.
        notes: Notes for the user.
    """

    prefix: str
    entries: Mapping[str, object]
    metadata: Mapping[str, object] | None
    counter: View | TensorRef | None
    notes: list[str]


def read_parts(
    checkpoint: Checkpoint, taken: Sequence[str], found: Places, half: bool | None, *, named: bool
) -> Part:
    """Read the state_dict at one place, or at several places that make up one model.

    Args:
        checkpoint: The checkpoint.
        taken: The dotted paths of the state_dicts, or of prefixes of their names.
        found: The places of the weights in the checkpoint.
        half: Take the average, if a state_dict also has the raw weights; False takes the raw
            weights; None takes both.
        named: Whether the user gave the paths.

    Raises:
        LayoutError: There is no state_dict, it does not have the requested weights, or two of
            several have a name in common.
    """
    prefixes: dict[str, None] = {}
    entries: dict[str, object] = {}
    metadata: dict[str, object] = {}
    counters: list[View | TensorRef] = []
    notes: list[str] = []
    for place in taken:
        is_average = place in found.averages
        part = _read_part(
            checkpoint, place, alone=len(taken) == 1, ema=half, named=named or is_average
        )
        own = part.entries
        if half and is_average and len(found.weights) == 1:
            raw = mapping(at(checkpoint.tree, found.weights[0])) or ()
            own = dotted(own, map(str, raw))
        twice = [name for name in own if name in entries]
        if twice:
            raise LayoutError(
                f"has {listed(twice)} both at {place} and at another place", file=checkpoint.path
            )
        prefixes |= {part.prefix: None} if part.prefix else {}
        entries.update(own)
        metadata.update(part.metadata or {})
        counters += [part.counter] if part.counter else []
        notes += part.notes
    counter = counters[0] if counters else None
    return Part(" + ".join(prefixes), entries, metadata or None, counter, notes)


def _read_part(
    checkpoint: Checkpoint, place: str, *, alone: bool, ema: bool | None, named: bool
) -> Part:
    """Read the state_dict at one place of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        place: The dotted path of the state_dict, or of a prefix of its names.
        alone: Whether it is the whole model; otherwise names get the last part of the path
            as a prefix.
        ema: As `half` of `read_parts`.
        named: Whether the place itself may be the average: the user named it, or it is known.
    """
    there, selected = _named(checkpoint, place)
    _check_entries(checkpoint, there)
    names = [str(name) for name in there if str(name).startswith(selected)]
    inner = [name.removeprefix(selected) for name in names]
    prefix = selected + _common_prefix(inner, _COUNTERS.get(place, _COUNTER))
    entries = {name.removeprefix(prefix): there[name] for name in names if name.startswith(prefix)}
    entries, notes = _without_optimizer(entries)
    chosen, half_notes = _half_of(checkpoint, entries, ema, named)
    notes += half_notes
    cut = chosen.cut if chosen else ""
    entries = {name: entries[of] for name, of in chosen.names.items()} if chosen else entries
    metadata = _metadata(there, prefix + cut)
    added = "" if alone else _added(checkpoint, place)
    if added:
        entries = {added + name: value for name, value in entries.items()}
        metadata = metadata and {
            (added + path).removesuffix("."): value for path, value in metadata.items()
        }
    counter = there.get(_COUNTER) if "module." in prefix else None
    known = counter if isinstance(counter, View | TensorRef) else None
    return Part(prefix + cut, entries, metadata, known, notes)


def _added(checkpoint: Checkpoint, place: str) -> str:
    """Return the prefix for the names from one of several places."""
    if isinstance(checkpoint.tree, Components):
        return "" if place == ROOT else f"{place}/"
    return "" if place in WEIGHTS else place.rpartition(".")[2] + "."


def _named(checkpoint: Checkpoint, place: str) -> tuple[Mapping[object, object], str]:
    """Return the dict at a place, and the prefix of names that the place selects in it."""
    found, selected = mapping(at(checkpoint.tree, place)), ""
    if found is None and place:
        inside = split_prefix(checkpoint.tree, place)
        if inside:
            found, selected = mapping(at(checkpoint.tree, inside[0])), inside[1]
    found = None if found is None else flattened(found)
    if found is None or not has_tensors(found):
        if place:
            raise no_state_dict(checkpoint, f"has no state_dict at {place!r}")
        raise no_state_dict(checkpoint, "has no state_dict")
    return found, selected


def _without_optimizer(entries: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """Return the entries without optimizer state, and a note about it."""
    groups = optimizer_groups(entries)
    kept = {
        name: value
        for name, value in entries.items()
        if not in_groups(name, groups)
        and (isinstance(value, Tensor) or not is_optimizer(mapping(value) or {}))
    }
    # Names inside an optimizer's dict cannot be mistaken for weights.
    nested = [name for name in entries if name not in kept and not in_groups(name, groups)]
    left = [*groups, *nested]
    note = f"{listed(left)}: optimizer state beside the weights; not averaged"
    return kept, [note] if left else []


def _half_of(
    checkpoint: Checkpoint, entries: Mapping[str, object], ema: bool | None, is_average: bool
) -> tuple[Chosen | None, list[str]]:
    """Choose the raw weights or the average in a state_dict that has both, if requested."""
    shapes = {name: value.shape for name, value in entries.items() if isinstance(value, Tensor)}
    halves = averaged_halves(shapes)
    if ema is None:
        return None, [_note(half) for half in halves]
    if halves:
        only_of(checkpoint, [half.prefix.removesuffix(".") for half in halves])
        return halves[0].chosen(entries, ema), []
    chosen = lone_average(shapes) if ema else None
    if ema and not chosen and not is_average:
        raise no_average(checkpoint)
    return chosen, []


def _note(half: Half) -> str:
    average, raw = half.prefix.removesuffix("."), half.raw.removesuffix(".") or "the others"
    return (
        f"{average} is an average of {raw}; each is averaged separately "
        "(--ema writes only the average, --no-ema only the raw weights)"
    )


def _check_entries(checkpoint: Checkpoint, entries: Mapping[object, object]) -> None:
    for name, value in entries.items():
        if not isinstance(name, str):
            near = [
                path for path in dicts_of_tensors(checkpoint.tree) if _is_named(checkpoint, path)
            ]
            raise LayoutError(
                f"has a key that is not a string, {described(name)}",
                file=checkpoint.path,
                expected="names of tensors",
                remedy=f"Give the path of a state_dict with --key: {listed(near)}" if near else "",
            )
        if isinstance(value, UnreadableTensor):
            raise LayoutError(
                f"is a {value.what}",
                file=checkpoint.path,
                tensor=name,
                expected="a dense tensor",
                remedy="It cannot be averaged",
            )


def _is_named(checkpoint: Checkpoint, place: str) -> bool:
    """Return whether all keys at a place are strings, and some are names of weights."""
    found = at(checkpoint.tree, place)
    return has_weights(found) and all(isinstance(name, str) for name in mapping(found) or {})


def _common_prefix(names: Iterable[str], counter: str) -> str:
    """Return the prefixes of wrappers that every name has, in order."""
    names = list(names)
    prefix = ""
    while True:
        # The counter next to `module.*` belongs to the wrapper, and is removed with the prefix.
        others = [name for name in names if name != prefix + counter]
        for wrapper in WRAPPERS:
            bearing = others and all(name.startswith(prefix + wrapper) for name in others)
            if bearing and (wrapper == "module." or others == names):
                prefix, names = prefix + wrapper, others
                break
        else:
            return prefix


def _metadata(entries: Mapping[object, object], prefix: str) -> dict[str, object] | None:
    """Return the `_metadata` of a state_dict, with prefixes removed from the module paths."""
    state = entries.state if isinstance(entries, Dict) else None
    metadata = state.get("_metadata") if isinstance(state, dict) else None
    if not isinstance(metadata, dict):
        return None
    plain = Plain()
    dotted = {
        f"{path}." if path else "": value
        for path, value in metadata.items()
        if isinstance(path, str) and plain(value)
    }
    return {
        path.removeprefix(prefix).removesuffix("."): value
        for path, value in dotted.items()
        if path.startswith(prefix)
    }


class Plain:
    """Checks whether values are plain, so that they can be written unchanged, and small.

    Attributes:
        bytes: The bytes of the text in the values so far.
        views: The tensors in them.
    """

    def __init__(self) -> None:
        self.left = _MOST_PLAIN_VALUES
        self.bytes = 0
        self.views: list[View] = []

    def __call__(self, value: object, depth: int = 8, tensors: bool = False) -> bool:
        """Return whether a value and all values in it are plain.

        Args:
            value: The value.
            depth: The number of containers that may be nested in each other.
            tensors: Whether the containers may hold tensors.
        """
        if tensors and isinstance(value, View):
            self.views.append(value)
            self.bytes += _REFERENCE
            return True
        if isinstance(value, Stream):
            self.bytes += len(value.content or b"")
            return value.content is not None
        if isinstance(value, str | bytes):
            self.bytes += len(value)
        if not isinstance(value, dict | list | tuple):
            return value is None or isinstance(value, bool | int | float | complex | str | bytes)
        self.left -= 1 + len(value)
        if self.left < 0 or depth == 0:
            return False
        inner = chain(value, value.values()) if isinstance(value, dict) else value
        return all(self(item, depth - 1, tensors) for item in inner)
