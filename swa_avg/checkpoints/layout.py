"""Where in a checkpoint the state_dict is, and how its names read without their wrappers.

Training frameworks wrap the state_dict in dicts of their own, and wrappers
around the model put prefixes on its names. Both are undone here. Nothing here
reads a tensor or compares checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from swa_avg.checkpoints import recorded
from swa_avg.checkpoints.tree import at, dicts_of_tensors, mapping, matching, tensor_count
from swa_avg.errors import FormatError, LayoutError, listed
from swa_avg.formats import Checkpoint, Dict, Inert, UnreadableTensor, described
from swa_avg.tensors import TensorRef, View

# Where frameworks put the weights of the model.
_WEIGHTS = ("state_dict", "model", "model_state_dict", "module", "state.model", "app.model")
# Where they put averages of them that the run has kept.
_AVERAGES = (
    "state_dict_ema",  # timm
    "model_ema",  # timm, torchvision
    "ema_state_dict",
    "ema",
    "model_avg",  # icefall
    "swa_state_dict",  # timgaripov/swa
    "extra_state.ema",  # fairseq
    "callbacks.*.average_model_state",  # Lightning's StochasticWeightAveraging
)
# Who puts the average where the weights belong: raw weights, average, and what tells.
_EXCHANGED = (
    ("current_model_state", "state_dict", "averaging_state"),  # Lightning's WeightAveraging
    ("ema_state_dict", "state_dict", "meta.mmengine_version"),
)
# What some frameworks take out of the model to save it beside the rest.
_PARTNERS = {"model": "generator"}  # OpenNMT-py
# What torch's wrappers put before every name: DataParallel, DDP and AveragedModel; compile.
_PREFIXES = ("module.", "_orig_mod.")
# A wrapper's own counter stands beside its `module.`: torch's AveragedModel, mmengine's.
_COUNTERS = {"ema_state_dict": "steps"}
_COUNTER = "n_averaged"
# What normalisation layers with running statistics keep.
BN_STATISTICS = ("running_mean", "running_var")
BN_COUNTER = "num_batches_tracked"
# What a state_dict holds besides tensors is small; nested lists can take for ever to look at.
_MOST_PLAIN_VALUES = 1_000_000


@dataclass(frozen=True)
class StateDict:
    """The state_dict of a checkpoint, with names as the plain model has them.

    Attributes:
        checkpoint: The checkpoint it is in.
        where: The dotted path to it, or to its parts; empty for the root.
        prefix: What was stripped from every name.
        views: Its tensors by name, in order, as the headers speak of them: one object for
            all checkpoints that a `Finder` found alike.
        values: Its other plain values by name; each also stands in `order`.
        order: All names in order.
        dropped: Names whose values are objects that cannot be written again.
        metadata: The `_metadata` that torch keeps beside it, or None.
        averages: Dotted paths of averaged weights that the checkpoint has as well, not taken.
        counter: The counter of torch's AveragedModel that stood beside its weights, or None.
    """

    checkpoint: Checkpoint
    where: str
    prefix: str
    views: Mapping[str, View | TensorRef]
    values: Mapping[str, object]
    order: tuple[str, ...]
    dropped: tuple[str, ...]
    metadata: Mapping[str, object] | None
    averages: tuple[str, ...]
    counter: View | TensorRef | None = None

    @cached_property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Its tensors by name, in order."""
        return dict(zip(self.views, map(self.checkpoint.located, self.views.values()), strict=True))

    @cached_property
    def epoch(self) -> int | None:
        """The epoch that the checkpoint records, or None."""
        return recorded.epoch(self.checkpoint)

    @cached_property
    def step(self) -> int | None:
        """The step that the checkpoint records, or None."""
        return recorded.step(self.checkpoint)

    @property
    def n_averaged(self) -> TensorRef | None:
        """Where the counter of torch's AveragedModel is, or None."""
        return self.checkpoint.located(self.counter) if self.counter else None


def is_bn_buffer(name: str, tensors: Container[str]) -> bool:
    """Tell whether a tensor is a statistic of a normalisation layer, or its counter."""
    layer, _, buffer = name.rpartition(".")
    if buffer not in (*BN_STATISTICS, BN_COUNTER):
        return False
    before = f"{layer}." if layer else ""
    return all(before + statistic in tensors for statistic in BN_STATISTICS)


def find_state_dict(
    checkpoint: Checkpoint, keys: Sequence[str] = (), ema: bool = False
) -> StateDict:
    """Find the state_dict of a checkpoint.

    Args:
        checkpoint: An opened checkpoint.
        keys: Its dotted path, where the user gave one; or several, which make up one
            model. Then names bear the last part of the path that they come from
            (`generator.weight`), but for a path where frameworks put models (`model`).
        ema: Take the averaged weights that the run has kept.

    Raises:
        LayoutError: There is none, there are several, or it holds what cannot be averaged.
    """
    try:
        return _found(checkpoint, (keys,) if isinstance(keys, str) else tuple(keys), ema)
    except FormatError as error:
        error.file = error.file or str(checkpoint.path)
        raise


def _found(checkpoint: Checkpoint, keys: tuple[str, ...], ema: bool) -> StateDict:
    """Do what `find_state_dict` does."""
    weights, averages = _places(checkpoint.tree)
    taken = keys or (_locate(checkpoint, weights, averages, ema),)
    entries: dict[str, object] = {}
    metadata: dict[str, object] = {}
    prefixes: list[str] = []
    counter = None
    for place in taken:
        part = _read_part(checkpoint, place, alone=len(taken) == 1)
        twice = [name for name in part.entries if name in entries]
        if twice:
            raise LayoutError(f"has {listed(twice)} at {place} and before", file=checkpoint.path)
        entries.update(part.entries)
        metadata.update(part.metadata or {})
        prefixes += [part.prefix] if part.prefix else []
        counter = counter or part.counter
    views = {n: value for n, value in entries.items() if isinstance(value, View | TensorRef)}
    plain = _Plain()
    values = {name: value for name, value in entries.items() if name not in views and plain(value)}
    _check_budget(checkpoint, views.values(), plain.bytes)
    return StateDict(
        checkpoint=checkpoint,
        where=" + ".join(taken),
        prefix=" + ".join(dict.fromkeys(prefixes)),
        views=views,
        values=values,
        order=tuple(name for name in entries if name in views or name in values),
        dropped=tuple(name for name in entries if name not in views and name not in values),
        metadata=metadata or None,
        averages=() if ema else tuple(path for path in averages if path not in taken),
        counter=counter,
    )


def _check_budget(
    checkpoint: Checkpoint, views: Collection[View | TensorRef], value_bytes: int
) -> None:
    """Refuse a small file of which a large output would be made."""
    budget, given = checkpoint.budget, sum(file.size for file in checkpoint.files)
    budget.check_tensors(len(views))
    budget.write("plain values", value_bytes, budget.header_bytes)
    wanted = sum(view.nbytes for view in views)
    if wanted > given:  # what is tied is written once
        where = [(v.record if isinstance(v, TensorRef) else v.stored, v.offset) for v in views]
        each = zip(where, views, strict=True)
        distinct = {(place, v.shape, v.stride): v.nbytes for place, v in each}
        wanted = sum(distinct.values())
    budget.write("tensors", wanted, given)


class Finder:
    """Finds the state_dicts of checkpoints of one run; in trees that are one object only once."""

    def __init__(self, keys: Sequence[str] = (), ema: bool = False) -> None:
        """Take what `find_state_dict` takes."""
        self._keys = keys
        self._ema = ema
        self._found: dict[int, StateDict] = {}

    def find(self, checkpoint: Checkpoint) -> StateDict:
        """Find the state_dict of a checkpoint.

        Raises:
            LayoutError: As `find_state_dict` does.
        """
        # What was found keeps its tree, so that no other one can have its id.
        like = self._found.get(id(checkpoint.tree))
        if like is not None:
            return replace(like, checkpoint=checkpoint)
        found = find_state_dict(checkpoint, self._keys, self._ema)
        self._found[id(checkpoint.tree)] = found
        return found


def _places(tree: object) -> tuple[list[str], list[str]]:
    """Return where there are weights of a model, and where averages of them."""
    weights = [path for path in _WEIGHTS if tensor_count(at(tree, path))]
    averages = [
        path
        for pattern in _AVERAGES
        for path in matching(tree, pattern)
        if tensor_count(at(tree, path))
    ]
    for raw, average, sign in _EXCHANGED:
        if at(tree, sign) is not None and average in weights and tensor_count(at(tree, raw)):
            weights = [raw if path == average else path for path in weights]
            averages = [average, *(path for path in averages if path != raw)]
    return weights, averages


def _locate(
    checkpoint: Checkpoint, weights: Sequence[str], averages: Sequence[str], ema: bool
) -> str:
    """Return the one place of the state_dict, or refuse."""
    tree = checkpoint.tree
    found = averages if ema else weights
    if len(found) > 1:
        raise LayoutError(
            f"has several state_dicts ({', '.join(found)})",
            file=checkpoint.path,
            expected="one",
            remedy=f"Name the one to average, as in --key {found[0]}",
        )
    if found:
        partner = _PARTNERS.get(found[0])
        if partner and tensor_count(at(tree, partner)):
            raise LayoutError(
                f"has {partner} beside {found[0]}",
                file=checkpoint.path,
                remedy=f"If both make up one model, add --key {found[0]} --key {partner}, "
                f"else --key {found[0]}",
            )
        return found[0]
    if ema:
        raise _absent(checkpoint, "has no averaged weights where frameworks put them")
    root = mapping(tree)
    tensors = tensor_count(tree)
    if (
        root is not None
        and tensors
        and (2 * tensors > len(root) or not any(dicts_of_tensors(tree)))
    ):
        return ""
    if averages:
        raise LayoutError(
            f"has averaged weights only, at {', '.join(averages)}",
            file=checkpoint.path,
            remedy="Take them with --ema",
        )
    raise _absent(checkpoint, "has no state_dict where frameworks put it")


def _absent(checkpoint: Checkpoint, found: str) -> LayoutError:
    """Say that there is no state_dict, and what might be meant."""
    near = list(dicts_of_tensors(checkpoint.tree))
    objects = [path for path in ("", *_WEIGHTS) if isinstance(at(checkpoint.tree, path), Inert)]
    if near:
        remedy = f"Name its place with --key; tensors are at: {listed(near, 8)}"
    elif objects:
        remedy = "It holds a whole pickled object; save its state_dict() instead"
    else:
        remedy = "It holds no tensors by name"
    return LayoutError(found, file=checkpoint.path, remedy=remedy)


@dataclass(frozen=True)
class _Part:
    """What stands at one place: entries and `_metadata`, with the names of the plain model."""

    prefix: str
    entries: Mapping[str, object]
    metadata: Mapping[str, object] | None
    counter: View | TensorRef | None


def _read_part(checkpoint: Checkpoint, place: str, alone: bool) -> _Part:
    found = mapping(at(checkpoint.tree, place))
    if found is None or not tensor_count(found):
        if place:
            raise _absent(checkpoint, f"has no state_dict at {place!r}")
        raise _absent(checkpoint, "has no state_dict")
    _check_entries(checkpoint, found)
    names = [str(name) for name in found]
    prefix = _common_prefix(names, _COUNTERS.get(place, _COUNTER))
    added = "" if alone or place in _WEIGHTS else place.rpartition(".")[2] + "."
    entries = {
        added + name.removeprefix(prefix): value
        for name, value in zip(names, found.values(), strict=True)
        if name.startswith(prefix)
    }
    counter = found.get(_COUNTER) if "module." in prefix else None
    known = counter if isinstance(counter, View | TensorRef) else None
    return _Part(prefix, entries, _metadata(found, prefix, added), known)


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


def _metadata(
    entries: Mapping[object, object], prefix: str, added: str
) -> Mapping[str, object] | None:
    """Return the `_metadata` of a state_dict, its module paths changed like the names."""
    state = entries.state if isinstance(entries, Dict) else None
    metadata = state.get("_metadata") if isinstance(state, dict) else None
    if not isinstance(metadata, dict):
        return None
    plain = _Plain()
    dotted = {
        f"{path}." if path else "": value
        for path, value in metadata.items()
        if isinstance(path, str) and plain(value)
    }
    return {
        (added + path.removeprefix(prefix)).removesuffix("."): value
        for path, value in dotted.items()
        if path.startswith(prefix)
    }


class _Plain:
    """Tells whether values can be written again as they are, and are of reasonable size."""

    def __init__(self) -> None:
        self.left = _MOST_PLAIN_VALUES
        self.bytes = 0

    def __call__(self, value: object, depth: int = 8) -> bool:
        if not isinstance(value, dict | list | tuple):
            if isinstance(value, str | bytes):
                self.bytes += len(value)
            return value is None or isinstance(value, bool | int | float | complex | str | bytes)
        self.left -= 1 + len(value)
        if self.left < 0 or depth == 0:
            return False
        inner = chain(value, value.values()) if isinstance(value, dict) else value
        return all(self(item, depth - 1) for item in inner)
