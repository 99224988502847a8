"""Finds the state_dict in a checkpoint, and removes the prefixes of wrappers from its names.

Training frameworks nest the state_dict in other dicts, and wrappers around the model add
prefixes to its names. This module undoes both. It does not read tensors or compare
checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from shlex import quote

from swa_avg.checkpoints import recorded
from swa_avg.checkpoints.entries import Plain, read_part
from swa_avg.checkpoints.frameworks import PARTNERS, Framework, Loads
from swa_avg.checkpoints.halves import dotted
from swa_avg.checkpoints.places import (
    NOWHERE,
    Places,
    candidates,
    no_average,
    no_state_dict,
    notes_beside,
    only_of,
    places,
)
from swa_avg.checkpoints.tree import (
    at,
    dicts_of_tensors,
    has_parameters,
    has_tensors,
    is_extra_state,
    mapping,
    tensor_count,
)
from swa_avg.errors import LayoutError, listed, naming
from swa_avg.formats import Checkpoint, Components, averages
from swa_avg.tensors import TensorRef, View, is_optimizer


@dataclass(frozen=True)
class StateDict:
    """The state_dict of a checkpoint, with the names of the plain model.

    Attributes:
        checkpoint: The checkpoint.
        where: The dotted path of the state_dict, or of its parts; empty for the root.
        prefix: The prefix that was removed from every name.
        views: The tensors by name, in order. Checkpoints for which a `Finder` found the same
            headers share one object.
        values: The other plain values by name; `order` contains their names too. The extra
            state of a module may hold tensors.
        order: All names in order.
        dropped: Names of objects that cannot be written.
        metadata: The `_metadata` that torch attaches to a state_dict, or None.
        averages: Dotted paths of averaged weights in the checkpoint that were not taken.
        counter: The counter that torch's AveragedModel saves with its weights, or None.
        ema: Whether the average or the raw weights are taken of a state_dict with both; None
            for both.
        places: The places of weights and averages in the checkpoint, taken or not.
        notes: Notes for the user about the choice.
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
    ema: bool | None = None
    places: Places = NOWHERE
    notes: tuple[str, ...] = ()

    @property
    def framework(self) -> Framework | None:
        """The row of the table of frameworks that the checkpoint matches, or None."""
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
    def for_average(self) -> str:
        """The option that takes its average; of several in one file it takes the first."""
        found = self.places.averages
        alone = len(found) < 2 or isinstance(self.checkpoint.tree, Components)
        return "--ema" if alone else f"--key {quote(found[0])}"

    @property
    def is_running(self) -> bool:
        """Whether it is an equal-weight mean that the run kept since a fixed start."""
        row = self.framework
        return row is not None and row.running and self.where in self.places.averages

    @property
    def run_count(self) -> int | None:
        """The number of models in a running average, if the run records it."""
        row = self.framework
        if row is None or not row.count:
            return None
        beside = self.where.rpartition(".")[0] if row.count.startswith(".") else ""
        return recorded.count(self.checkpoint, beside + row.count, row.period)

    @property
    def n_averaged(self) -> TensorRef | None:
        """The location of the counter of torch's AveragedModel, or None."""
        return self.checkpoint.located(self.counter) if self.counter else None


def find_state_dict(
    checkpoint: Checkpoint, keys: Sequence[str] = (), ema: bool | None = None
) -> StateDict:
    """Find the state_dict of a checkpoint.

    Args:
        checkpoint: An opened checkpoint.
        keys: The dotted path of the state_dict or of a prefix of its names, if the user gave
            one; or several paths, which together make up one model. With several, names get
            the last part of their path as a prefix (`generator.weight`), except under a path
            where frameworks store the model.
        ema: Take the averaged weights of the run; False takes only the raw weights; None
            takes the raw weights and everything else in the same state_dict.

    Raises:
        LayoutError: There is no state_dict, there are several, or it cannot be averaged.
    """
    with naming(checkpoint.path):
        return _found(checkpoint, (keys,) if isinstance(keys, str) else tuple(keys), ema)


def _found(checkpoint: Checkpoint, keys: tuple[str, ...], ema: bool | None) -> StateDict:
    """Implement `find_state_dict`."""
    tree = checkpoint.tree
    found = _pairs(tree) if isinstance(tree, Components) else places(tree)
    taken, notes = (keys, []) if keys else _locate(checkpoint, found, ema)
    # In a folder of several models each place is either raw weights or an average.
    half = None if isinstance(tree, Components) else ema
    entries: dict[str, object] = {}
    metadata: dict[str, object] = {}
    prefixes: list[str] = []
    counter = None
    for place in taken:
        named = bool(keys) or place in found.averages
        part = read_part(checkpoint, place, len(taken) == 1, half, named)
        taken_here = part.entries
        if half and place in found.averages and len(found.weights) == 1:
            taken_here = dotted(taken_here, map(str, mapping(at(tree, found.weights[0])) or ()))
        twice = [name for name in taken_here if name in entries]
        if twice:
            raise LayoutError(
                f"has {listed(twice)} both at {place} and at another place", file=checkpoint.path
            )
        entries.update(taken_here)
        metadata.update(part.metadata or {})
        prefixes += [part.prefix] if part.prefix else []
        counter = counter or part.counter
        notes += part.notes
    views = {n: value for n, value in entries.items() if isinstance(value, View | TensorRef)}
    plain = Plain()
    values = {
        name: value
        for name, value in entries.items()
        if name not in views and plain(value, tensors=is_extra_state(name))
    }
    _check_budget(checkpoint, [*views.values(), *plain.views], plain.bytes)
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
        ema=half,
        places=found,
        notes=tuple(notes),
    )


def _check_budget(
    checkpoint: Checkpoint, views: Collection[View | TensorRef], value_bytes: int
) -> None:
    """Refuse a small file that would give a large output."""
    budget, given = checkpoint.budget, sum(file.size for file in checkpoint.files)
    budget.check_tensors(len(views))
    budget.write("plain values", value_bytes, budget.header_bytes)
    wanted = sum(view.nbytes for view in views)
    if wanted > given:  # tied tensors are written once
        where = [(v.record if isinstance(v, TensorRef) else v.stored, v.offset) for v in views]
        each = zip(where, views, strict=True)
        distinct = {(place, v.shape, v.stride): v.nbytes for place, v in each}
        wanted = sum(distinct.values())
    budget.write("tensors", wanted, given)


def check_choice(state: StateDict, keys: Sequence[str], ema: bool | None) -> None:
    """Refuse to replace either raw weights or an average in a file, if the choice is open.

    Args:
        state: The state_dict that was found with `keys` and `ema`.
        keys: The paths of the state_dict, if the user gave them.
        ema: The user's choice between the average and the raw weights, if any.

    Raises:
        LayoutError: The file has raw weights and an average, and its framework may load the
            one that is not replaced.
    """
    found, row = state.places, state.framework
    averages = (*found.averages, *found.unnamed)
    raw = found.weights or ((state.where,) if state.where not in averages else ())
    if keys or ema is not None or not (raw and averages):
        return
    known = row is not None and row.average
    if known and row and row.loads is Loads.WEIGHTS:
        return
    loads = f"{row.name} loads {row.loads.value}" if known and row else "it may load either"
    alone = "--last 1 " if row and row.running else ""
    named = f"{alone}{state.for_average} (the average) or " if found.averages else ""
    raise LayoutError(
        f"has raw weights at {raw[0] or 'its top'} and an average at {averages[0]}; {loads}",
        file=state.checkpoint.path,
        remedy=f"Choose which to replace: {named}--no-ema (the raw weights)",
    )


def check_running(states: Sequence[StateDict]) -> None:
    """Refuse to average several running means, because each includes the earlier ones.

    Args:
        states: The checkpoints to average.

    Raises:
        LayoutError: One of several state_dicts is an equal-weight mean since a fixed start.
    """
    running = [state for state in states if state.is_running]
    if not running or len(states) == 1:
        return
    last = running[-1]
    row = last.framework
    assert row is not None, "a running mean has a framework"
    between = ""
    earlier = [state for state in running if 0 < (state.run_count or 0) < (last.run_count or 0)]
    if earlier:
        paths = [quote(str(state.checkpoint.path)) for state in (last, earlier[0])]
        between = f", take the mean between two (--start-from {paths[0]} --minus {paths[1]} --ema)"
    last_one = f"se only the last (--last 1 --ema){between}, or average the raw weights (--no-ema)"
    others = len(running) < len(states)  # averages to go on from
    raise LayoutError(
        f"has at {last.where} the mean of the run so far ({row.name}), "
        "which includes the means of the earlier checkpoints",
        file=last.checkpoint.path,
        remedy=f"Without --start-from, u{last_one}" if others else f"U{last_one}",
    )


class Finder:
    """Finds the state_dicts of the checkpoints of one run; checkpoints may share one tree."""

    def __init__(self, keys: Sequence[str] = (), ema: bool | None = None) -> None:
        """Take the arguments of `find_state_dict`."""
        self._keys = keys
        self._ema = ema
        self._found: dict[int, StateDict] = {}

    def find(self, checkpoint: Checkpoint) -> StateDict:
        """Find the state_dict of a checkpoint.

        Raises:
            LayoutError: As `find_state_dict` does.
        """
        # A StateDict in `_found` keeps its tree alive, so its id cannot be reused.
        like = self._found.get(id(checkpoint.tree))
        if like is not None:
            return replace(like, checkpoint=checkpoint)
        try:
            found = find_state_dict(checkpoint, self._keys, self._ema)
        except LayoutError:
            # An average that swa-avg wrote may be a bare state_dict, unlike its inputs.
            if not checkpoint.provenance:
                raise
            found = find_state_dict(checkpoint)
        self._found[id(checkpoint.tree)] = found
        return found


def _locate(
    checkpoint: Checkpoint, found: Places, ema: bool | None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the place of the state_dict, or the places of its parts, and notes; or refuse."""
    tree = checkpoint.tree
    if isinstance(tree, Components):
        return _components(checkpoint, tree, found, ema)
    if ema and (found.averages or found.unnamed):
        place = only_of(checkpoint, found.averages, found.unnamed)
        return (place,), list(notes_beside(tree, place, ema=True))
    try:
        return _locate_weights(checkpoint, found)
    except LayoutError as error:
        if ema and not has_tensors(tree):
            raise no_average(checkpoint) from error
        raise


def _pairs(tree: Components) -> Places:
    """Return the components of a folder that are averages of others, with those others."""
    pairs = {average: raw for average, raw in averages(tree).items() if raw is not None}
    return replace(NOWHERE, weights=tuple(pairs.values()), averages=tuple(pairs))


def _components(
    checkpoint: Checkpoint, tree: Components, found: Places, ema: bool | None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the components of a folder to average separately.

    If one component is an average of another, only one of the two is taken.
    """
    if ema and not averages(tree):
        raise no_average(checkpoint)
    passed = found.weights if ema else found.averages
    notes = []
    if checkpoint.is_bundle:
        # SpeechBrain saves statistics of features like a model, but not under names of parameters.
        others = [name for name in tree if not has_parameters(mapping(tree[name]) or {})]
        passed = (*passed, *others)
        if others:
            notes = [f"{listed(others)}: not a model; copied from the last checkpoint"]
    return tuple(name for name in tree if name not in passed), notes


def _locate_weights(checkpoint: Checkpoint, found: Places) -> tuple[tuple[str, ...], list[str]]:
    tree = checkpoint.tree
    if found.weights:
        place = only_of(checkpoint, found.weights)
        partner = PARTNERS.get(place)
        if partner and has_tensors(at(tree, partner)):
            one, other = quote(place), quote(partner)
            raise LayoutError(
                f"has {partner} beside {place}",
                file=checkpoint.path,
                remedy=f"If both make up one model, add --key {one} --key {other}; "
                f"otherwise add --key {one}",
            )
        return (place,), list(notes_beside(tree, place))
    if found.chunks:
        return found.chunks, []
    inner = candidates(tree)
    if _is_state_dict(tree, bool(inner)):
        return ("",), []
    if len(inner) == 1:
        said = f"the state_dict is at {inner[0]}, the only candidate"
        return tuple(inner), [said, *notes_beside(tree, inner[0])]
    if found.averages and not inner:
        raise LayoutError(
            f"has only averaged weights, at {', '.join(found.averages)}",
            file=checkpoint.path,
            remedy="Use them with --ema"
            if len(found.averages) == 1
            else f"Choose one, as in --key {quote(found.averages[0])}",
        )
    raise no_state_dict(checkpoint, "has no state_dict in any known place", found.averages)


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
