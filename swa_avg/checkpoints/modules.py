"""The state_dict of a whole pickled `nn.Module`, read from what its pickle says of it.

`torch.save(model)` writes each module as an object with its `__dict__`. The
class stays unknown and nothing of it runs: where a module keeps its
parameters, buffers and children is torch's own and the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from swa_avg.formats import Budget, Inert


def state_dict_of(value: Inert) -> dict[object, object] | None:
    """Return what `state_dict()` of a pickled module holds, or None if it is no module.

    The order is that of `state_dict()`: of each module its parameters, its
    persistent buffers, then its children.
    """
    if _parts(value) is None:
        return None
    # Modules that hold each other can make a small file name endlessly many tensors.
    budget = Budget()
    made: dict[object, object] = {}
    waiting: list[tuple[str, object, int]] = [("", value, 0)]
    while waiting:
        prefix, module, depth = waiting.pop()
        parts = _parts(module)
        budget.name(len(prefix), depth)
        if parts is None:
            continue
        for name, tensor in _own(parts):
            budget.hold(1)
            budget.name(len(prefix), depth)
            made[f"{prefix}{name}"] = tensor
        children = reversed(parts["_modules"].items())
        budget.hold(len(parts["_modules"]))
        waiting += [(f"{prefix}{name}.", child, depth + 1) for name, child in children]
    return made


def _own(parts: Mapping[str, dict[object, object]]) -> Iterator[tuple[object, object]]:
    """Yield the parameters and persistent buffers that a module holds itself."""
    left_out = parts.get("_non_persistent_buffers_set")
    if not isinstance(left_out, set | frozenset | dict):
        left_out = {}
    for name, tensor in parts["_parameters"].items():
        if tensor is not None:
            yield name, tensor
    for name, tensor in parts["_buffers"].items():
        if tensor is not None and name not in left_out:
            yield name, tensor


def _parts(module: object) -> Mapping[str, dict[object, object]] | None:
    """Return the `__dict__` of a pickled module, or None for anything else."""
    state = module.state if isinstance(module, Inert) else None
    if not isinstance(state, dict):
        return None
    parts = ("_parameters", "_buffers", "_modules")
    return state if all(isinstance(state.get(part), dict) for part in parts) else None
