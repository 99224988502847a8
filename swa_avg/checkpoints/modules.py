"""The state_dict of a whole pickled `nn.Module`, read from what its pickle says of it.

`torch.save(model)` writes each module as an object with its `__dict__`. The
class stays unknown and nothing of it runs: where a module keeps its
parameters, buffers and children is torch's own and the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from swa_avg.errors import FormatError
from swa_avg.formats import Inert

# Modules that hold each other can make a small file name endlessly many paths.
_MOST_MODULES = 100_000


def state_dict_of(value: Inert) -> dict[object, object] | None:
    """Return what `state_dict()` of a pickled module holds, or None if it is no module.

    The order is that of `state_dict()`: of each module its parameters, its
    persistent buffers, then its children.
    """
    if _parts(value) is None:
        return None
    made: dict[object, object] = {}
    for prefix, parts in _modules(value):
        made.update((f"{prefix}{name}", tensor) for name, tensor in _own(parts))
    return made


def buffers_of(value: Inert) -> set[str]:
    """Return which names of a pickled module's `state_dict()` are buffers, not parameters."""
    found: set[str] = set()
    for prefix, parts in _modules(value):
        left_out = parts.get("_non_persistent_buffers_set", ())
        found.update(f"{prefix}{name}" for name in parts["_buffers"] if name not in left_out)
    return found


def _modules(value: Inert) -> Iterator[tuple[str, Mapping[str, dict[object, object]]]]:
    """Yield the `__dict__` of a module and of all below it, in order, each with its prefix."""
    waiting: list[tuple[str, object]] = [("", value)]
    left = _MOST_MODULES
    while waiting:
        prefix, module = waiting.pop()
        parts = _parts(module)
        if parts is None:
            continue
        yield prefix, parts
        children = reversed(parts["_modules"].items())
        left -= len(parts["_modules"])
        if left < 0:
            raise FormatError("holds modules that hold each other")
        waiting += [(f"{prefix}{name}.", child) for name, child in children]


def _own(parts: Mapping[str, dict[object, object]]) -> Iterator[tuple[object, object]]:
    """Yield the parameters and persistent buffers that a module holds itself."""
    left_out = parts.get("_non_persistent_buffers_set", ())
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
