"""The entries of a state_dict, under the names that the plain model has.

Wrappers around a model put prefixes on its names, modules that average a model
hold both halves, and optimizers save into the same dict. All of that is undone
here, for one place of one checkpoint. Nothing here reads a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from swa_avg.checkpoints.frameworks import WEIGHTS
from swa_avg.checkpoints.halves import Chosen, Half, averaged_halves, lone_average
from swa_avg.checkpoints.places import Places, no_average, no_state_dict, only_of
from swa_avg.checkpoints.tree import at, flattened, mapping, split_prefix, tensor_count
from swa_avg.errors import LayoutError, listed
from swa_avg.formats import ROOT, Checkpoint, Components
from swa_avg.pickles import Dict, Stream, UnreadableTensor, described
from swa_avg.tensors import Tensor, TensorRef, View, in_groups, is_optimizer, optimizer_groups

# What torch's wrappers put before every name: DataParallel, DDP and AveragedModel; compile.
_PREFIXES = ("module.", "_orig_mod.")
# A wrapper's own counter stands beside its `module.`: torch's AveragedModel, mmengine's.
_COUNTERS = {"ema_state_dict": "steps"}
_COUNTER = "n_averaged"
# What a state_dict holds besides tensors is small; nested lists can take for ever to look at.
_MOST_PLAIN_VALUES = 1_000_000


@dataclass(frozen=True)
class Part:
    """What stands at one place: entries and `_metadata`, with the names of the plain model."""

    prefix: str
    entries: Mapping[str, object]
    metadata: Mapping[str, object] | None
    counter: View | TensorRef | None
    notes: list[str]


def read_part(
    checkpoint: Checkpoint, place: str, alone: bool, ema: bool | None, found: Places
) -> Part:
    """Read what stands at one place of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        place: Its dotted path, or that of a prefix of names.
        alone: Whether it is the whole model; else names bear the last part of the path.
        ema: Take the averaged half, if it holds two; False the raw one; None both.
        found: Where the checkpoint has weights and averages.

    Raises:
        LayoutError: There is no state_dict, or the half that is asked for is not there.
    """
    there, asked = _named(checkpoint, place)
    _check_entries(checkpoint, there)
    names = [str(name) for name in there if str(name).startswith(asked)]
    inner = [name.removeprefix(asked) for name in names]
    prefix = asked + _common_prefix(inner, _COUNTERS.get(place, _COUNTER))
    entries = {name.removeprefix(prefix): there[name] for name in names if name.startswith(prefix)}
    entries, notes = _without_optimizer(entries)
    chosen, said = _half_of(checkpoint, entries, ema, place in found.averages)
    notes += said
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
    """Return what the names of one of several places begin with."""
    if isinstance(checkpoint.tree, Components):
        return "" if place == ROOT else f"{place}/"
    return "" if place in WEIGHTS else place.rpartition(".")[2] + "."


def _named(checkpoint: Checkpoint, place: str) -> tuple[Mapping[object, object], str]:
    """Return the dict at a place, and the prefix of names in it that the place asks for."""
    found, asked = mapping(at(checkpoint.tree, place)), ""
    if found is None and place:
        inside = split_prefix(checkpoint.tree, place)
        if inside:
            found, asked = mapping(at(checkpoint.tree, inside[0])), inside[1]
    found = None if found is None else flattened(found)
    if found is None or not tensor_count(found):
        if place:
            raise no_state_dict(checkpoint, f"has no state_dict at {place!r}")
        raise no_state_dict(checkpoint, "has no state_dict")
    return found, asked


def _without_optimizer(entries: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """Leave out what an optimizer keeps, and say so."""
    groups = optimizer_groups(entries)
    kept = {
        name: value
        for name, value in entries.items()
        if not in_groups(name, groups) and not is_optimizer(mapping(value) or {})
    }
    # A dict of an optimizer has no names that could be taken for weights.
    nested = [name for name in entries if name not in kept and not in_groups(name, groups)]
    left = [*groups, *nested]
    note = f"{listed(left)}: optimizer state beside the weights; not averaged"
    return kept, [note] if left else []


def _half_of(
    checkpoint: Checkpoint, entries: Mapping[str, object], ema: bool | None, is_average: bool
) -> tuple[Chosen | None, list[str]]:
    """Choose the raw or the averaged half of a state_dict, if it has two and one is wanted."""
    shapes = {name: value.shape for name, value in entries.items() if isinstance(value, Tensor)}
    halves = averaged_halves(shapes)
    if ema is None:
        return None, [_said(half) for half in halves]
    if halves:
        only_of(checkpoint, [half.prefix.removesuffix(".") for half in halves])
        return halves[0].chosen(entries, ema), []
    chosen = lone_average(shapes) if ema else None
    if ema and not chosen and not is_average:
        raise no_average(checkpoint)
    return chosen, []


def _said(half: Half) -> str:
    average, raw = half.prefix.removesuffix("."), half.raw.removesuffix(".") or "the others"
    return (
        f"{average} is an average of {raw}; both are averaged, each by itself "
        "(--ema writes the average alone, --no-ema the raw weights)"
    )


def _check_entries(checkpoint: Checkpoint, entries: Mapping[object, object]) -> None:
    for name, value in entries.items():
        if not isinstance(name, str):
            raise LayoutError(
                f"has a key that is no text, {described(name)}",
                file=checkpoint.path,
                expected="names of tensors",
                remedy="Name the place of the state_dict with --key",
            )
        if isinstance(value, UnreadableTensor):
            raise LayoutError(
                f"is a {value.what}",
                file=checkpoint.path,
                tensor=name,
                expected="a dense tensor",
                remedy="It cannot be averaged",
            )


def _common_prefix(names: Iterable[str], counter: str) -> str:
    """Return the wrappers' prefixes that every name bears, in their order."""
    names = list(names)
    prefix = ""
    while True:
        # The counter stands beside its wrapper's `module.`, and goes with it.
        others = [name for name in names if name != prefix + counter]
        for wrapper in _PREFIXES:
            bearing = others and all(name.startswith(prefix + wrapper) for name in others)
            if bearing and (wrapper == "module." or others == names):
                prefix, names = prefix + wrapper, others
                break
        else:
            return prefix


def _metadata(entries: Mapping[object, object], prefix: str) -> dict[str, object] | None:
    """Return the `_metadata` of a state_dict, its module paths changed like the names."""
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
    """Tells whether values can be written again as they are, and are of reasonable size."""

    def __init__(self) -> None:
        self.left = _MOST_PLAIN_VALUES
        self.bytes = 0

    def __call__(self, value: object, depth: int = 8) -> bool:
        """Tell whether a value is plain, with all that is in it."""
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
        return all(self(item, depth - 1) for item in inner)
