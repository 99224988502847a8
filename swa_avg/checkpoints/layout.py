"""Where in a checkpoint the state_dict is, and how its names read without their wrappers.

Training frameworks wrap the state_dict in dicts of their own, and wrappers
around the model put prefixes on its names. Both are undone here. Nothing here
reads a tensor or compares checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from swa_avg.checkpoints import recorded
from swa_avg.checkpoints.entries import Plain, read_part
from swa_avg.checkpoints.frameworks import PARTNERS, Framework, Loads
from swa_avg.checkpoints.places import (
    NOWHERE,
    Places,
    candidates,
    no_average,
    no_state_dict,
    only_of,
    places,
)
from swa_avg.checkpoints.tree import (
    at,
    dicts_of_tensors,
    has_parameters,
    mapping,
    tensor_count,
)
from swa_avg.errors import LayoutError, listed, naming
from swa_avg.formats import Checkpoint, Components, averages
from swa_avg.tensors import TensorRef, View, is_optimizer


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
        places: Where the checkpoint has weights and averages, taken or not.
        notes: What the user should know about what was taken.
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
    places: Places = NOWHERE
    notes: tuple[str, ...] = ()

    @property
    def framework(self) -> Framework | None:
        """The kind of file that the checkpoint is, as far as the table knows."""
        return self.places.framework

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


def find_state_dict(
    checkpoint: Checkpoint, keys: Sequence[str] = (), ema: bool | None = None
) -> StateDict:
    """Find the state_dict of a checkpoint.

    Args:
        checkpoint: An opened checkpoint.
        keys: Its dotted path, where the user gave one, or that of a prefix of its names; or
            several, which make up one model. Then names bear the last part of the path that
            they come from (`generator.weight`), but for a path where frameworks put models.
        ema: Take the averaged weights that the run has kept; False takes the raw ones, and
            only these. None takes the raw ones, and what stands in one state_dict with them.

    Raises:
        LayoutError: There is none, there are several, or it holds what cannot be averaged.
    """
    with naming(checkpoint.path):
        return _found(checkpoint, (keys,) if isinstance(keys, str) else tuple(keys), ema)


def _found(checkpoint: Checkpoint, keys: tuple[str, ...], ema: bool | None) -> StateDict:
    """Do what `find_state_dict` does."""
    tree = checkpoint.tree
    found = _pairs(tree) if isinstance(tree, Components) else places(tree)
    taken, notes = (keys, []) if keys else _locate(checkpoint, found, ema)
    # Of a folder of several models each place is one of the two already.
    half = None if keys or isinstance(tree, Components) else ema
    entries: dict[str, object] = {}
    metadata: dict[str, object] = {}
    prefixes: list[str] = []
    counter = None
    for place in taken:
        part = read_part(checkpoint, place, len(taken) == 1, half, found)
        twice = [name for name in part.entries if name in entries]
        if twice:
            raise LayoutError(f"has {listed(twice)} at {place} and before", file=checkpoint.path)
        entries.update(part.entries)
        metadata.update(part.metadata or {})
        prefixes += [part.prefix] if part.prefix else []
        counter = counter or part.counter
        notes += part.notes
    views = {n: value for n, value in entries.items() if isinstance(value, View | TensorRef)}
    plain = Plain()
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
        averages=() if ema else tuple(path for path in found.averages if path not in taken),
        counter=counter,
        places=found,
        notes=tuple(notes),
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


def check_choice(state: StateDict, keys: Sequence[str], ema: bool | None) -> None:
    """Refuse to change one of two slots of a file that stays, if nobody said which.

    Args:
        state: What was found with `keys` and `ema`.
        keys: Where the state_dict is, if the user said so.
        ema: Which of the two is meant, if the user said so.

    Raises:
        LayoutError: The file has raw weights and an average, and its framework may load the
            one that would stay as it is.
    """
    found, row = state.places, state.framework
    averages = (*found.averages, *found.unnamed)
    if keys or ema is not None or not (found.weights and averages):
        return
    known = row is not None and row.average
    if known and row and row.loads is Loads.WEIGHTS:
        return
    loads = f"{row.name} loads {row.loads.value}" if known and row else "it may load either"
    alone = "--last 1 " if row and row.running else ""
    named = f"{alone}--ema (the average) or " if found.averages else ""
    raise LayoutError(
        f"has raw weights at {found.weights[0]} and an average at {averages[0]}; {loads}",
        file=state.checkpoint.path,
        remedy=f"Say which to replace: {named}--no-ema (the raw weights)",
    )


def check_running(states: Sequence[StateDict], ema: bool | None) -> None:
    """Refuse to average several running means: each contains those before it.

    Args:
        states: The checkpoints that would be averaged.
        ema: Whether it is their averages that were taken.

    Raises:
        LayoutError: There are several, of a framework whose average is an equal-weight mean
            from a fixed start on.
    """
    row = states[-1].framework if states else None
    if ema and len(states) > 1 and row and row.running:
        raise LayoutError(
            f"has at {states[-1].where} the mean of the run so far ({row.name}), "
            "which contains those of the checkpoints before it",
            file=states[-1].checkpoint.path,
            remedy="Take it alone (--last 1 --ema), or average the raw weights (--no-ema)",
        )


class Finder:
    """Finds the state_dicts of checkpoints of one run; in trees that are one object only once."""

    def __init__(self, keys: Sequence[str] = (), ema: bool | None = None) -> None:
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
        try:
            found = find_state_dict(checkpoint, self._keys, self._ema)
        except LayoutError:
            # An average of ours may be bare, whatever its checkpoints look like.
            if not checkpoint.provenance:
                raise
            found = find_state_dict(checkpoint)
        self._found[id(checkpoint.tree)] = found
        return found


def _locate(
    checkpoint: Checkpoint, found: Places, ema: bool | None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the one place of the state_dict, or those of its parts, and notes; or refuse."""
    tree = checkpoint.tree
    if isinstance(tree, Components):
        return _components(checkpoint, tree, found, ema)
    if ema and (found.averages or found.unnamed):
        return (only_of(checkpoint, found.averages, found.unnamed),), []
    try:
        return _locate_weights(checkpoint, found)
    except LayoutError as error:
        if ema and not tensor_count(tree):
            raise no_average(checkpoint) from error
        raise


def _pairs(tree: Components) -> Places:
    """Return which components of a folder are averages of others, and of which."""
    pairs = {average: raw for average, raw in averages(tree).items() if raw is not None}
    return replace(NOWHERE, weights=tuple(pairs.values()), averages=tuple(pairs))


def _components(
    checkpoint: Checkpoint, tree: Components, found: Places, ema: bool | None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the components of a folder that are averaged, each by itself.

    Of a component and an average of it one is taken.
    """
    if ema and not averages(tree):
        raise no_average(checkpoint)
    passed = found.weights if ema else found.averages
    return tuple(name for name in tree if name not in passed), []


def _locate_weights(checkpoint: Checkpoint, found: Places) -> tuple[tuple[str, ...], list[str]]:
    tree = checkpoint.tree
    if found.weights:
        place = only_of(checkpoint, found.weights)
        partner = PARTNERS.get(place)
        if partner and tensor_count(at(tree, partner)):
            raise LayoutError(
                f"has {partner} beside {place}",
                file=checkpoint.path,
                remedy=f"If both make up one model, add --key {place} --key {partner}, "
                f"else --key {place}",
            )
        return (place,), []
    if found.chunks:
        return found.chunks, []
    inner = candidates(tree)
    if _is_state_dict(tree, bool(inner)):
        return ("",), []
    if len(inner) == 1:
        return tuple(inner), [f"the state_dict is at {inner[0]}, the only place for one"]
    if found.averages:
        raise LayoutError(
            f"has averaged weights only, at {', '.join(found.averages)}",
            file=checkpoint.path,
            remedy="Take them with --ema",
        )
    raise no_state_dict(checkpoint, "has no state_dict where frameworks put it")


def _is_state_dict(tree: object, holds_others: bool) -> bool:
    """Tell whether the tensors of a dict are those of a model.

    A script may save an accuracy or a mask as a tensor beside its state_dict. Only the
    names of parameters say that both make up one model.

    Args:
        tree: What was saved.
        holds_others: Whether dicts in it may be a state_dict.
    """
    root, tensors = mapping(tree) or {}, tensor_count(tree)
    if not tensors or is_optimizer(root):
        return False
    few = 2 * tensors <= len(root) and any(dicts_of_tensors(tree))
    return has_parameters(root) or not (holds_others or few)
