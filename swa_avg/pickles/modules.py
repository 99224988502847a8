"""The state_dict of a pickled `nn.Module`, read from its pickle.

`torch.save(model)` writes each module as an object with its `__dict__`. The class is not
imported and none of its code runs. This works because torch stores parameters, buffers and
children under the same attributes in every module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

from swa_avg.pickles.budget import Budget
from swa_avg.pickles.pickled import Inert


def state_dict_of(value: Inert) -> dict[object, object] | None:
    """Return the entries of a pickled module's `state_dict()`, or None if it is not a module.

    The order is the same as in `state_dict()`: the parameters of a module, its persistent
    buffers, then its children.
    """
    if _parts(value) is None:
        return None
    made: dict[object, object] = {}
    budget = Budget()
    for prefix, parts in _modules(value, budget):
        for name, tensor in _own(parts, budget):
            budget.hold(1)
            budget.name(len(prefix), 0)
            made[f"{prefix}{name}"] = tensor
    return made


def buffers_of(value: Inert) -> set[str]:
    """Return which names of a pickled module's `state_dict()` are buffers, not parameters."""
    found: set[str] = set()
    budget = Budget()
    for prefix, parts in _modules(value, budget):
        left_out = _left_out(parts, budget)
        budget.hold(len(parts["_buffers"]))
        budget.name(len(prefix) * len(parts["_buffers"]), 0)
        found.update(f"{prefix}{name}" for name in parts["_buffers"] if name not in left_out)
    return found


def _modules(
    value: Inert, budget: Budget
) -> Iterator[tuple[str, Mapping[str, dict[object, object]]]]:
    """Yield the `__dict__` of a module and of its descendants, in order, each with its prefix.

    The budget limits the walk: modules that contain each other would never end.
    """
    waiting: list[tuple[str, object, int]] = [("", value, 0)]
    while waiting:
        prefix, module, depth = waiting.pop()
        parts = _parts(module)
        budget.name(len(prefix), depth)
        if parts is None:
            continue
        yield prefix, parts
        budget.hold(len(parts["_modules"]))
        children = reversed(parts["_modules"].items())
        waiting += [(f"{prefix}{name}.", child, depth + 1) for name, child in children]


def _own(
    parts: Mapping[str, dict[object, object]], budget: Budget
) -> Iterator[tuple[object, object]]:
    """Yield the module's own parameters and persistent buffers."""
    left_out = _left_out(parts, budget)
    for name, tensor in parts["_parameters"].items():
        if tensor is not None:
            yield name, tensor
    for name, tensor in parts["_buffers"].items():
        if tensor is not None and name not in left_out:
            yield name, tensor


def _left_out(parts: Mapping[str, dict[object, object]], budget: Budget) -> Set[object]:
    """Return the names of a module's non-persistent buffers; old files store them as a list."""
    names: object = parts.get("_non_persistent_buffers_set")
    if isinstance(names, list | tuple):
        budget.make(len(names))
        return {name for name in names if isinstance(name, str)}
    return names if isinstance(names, set | frozenset) else set()


def _parts(module: object) -> Mapping[str, dict[object, object]] | None:
    """Return the `__dict__` of a pickled module, or None for anything else."""
    state = module.state if isinstance(module, Inert) else None
    if not isinstance(state, dict):
        return None
    parts = ("_parameters", "_buffers", "_modules")
    return state if all(isinstance(state.get(part), dict) for part in parts) else None
