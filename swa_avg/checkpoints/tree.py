"""Lookup in the nested containers of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from swa_avg.errors import FormatError
from swa_avg.pickles import Inert, UnreadableTensor, state_dict_of
from swa_avg.tensors import Kind, Tensor, is_optimizer

# The depth of the search in nested dicts; a pickle can nest them without end or in a cycle.
_DEEPEST = 8
# Dicts that contain each other can give a small file an endless number of paths.
_MOST_DICTS = 10_000
# The key of the extra state of Transformer Engine layers, which only they can interpret.
_EXTRA_STATE = "_extra_state"
# The names of the parameters of a single layer.
_PARAMETERS = ("weight", "bias")


def mapping(value: object) -> Mapping[object, object] | None:
    """Return a value as a mapping, or None; a pickled module gives its state_dict."""
    if isinstance(value, Inert):
        return value.entries or state_dict_of(value)
    return value if isinstance(value, dict) else None


def is_extra_state(name: str) -> bool:
    """Return whether a name is that of the extra state of a module."""
    return name.rpartition(".")[2] == _EXTRA_STATE


def tensor_count(value: object) -> int:
    """Return the number of tensors directly in a mapping; 0 for any other value."""
    entries = mapping(value) or {}
    return sum(isinstance(item, Tensor | UnreadableTensor) for item in entries.values())


def has_tensors(value: object) -> bool:
    """Return whether a mapping directly holds tensors."""
    entries = mapping(value) or {}
    return any(isinstance(item, Tensor | UnreadableTensor) for item in entries.values())


def at(tree: object, path: str) -> object:
    """Return the value at a dotted path, or None.

    Names may contain dots: the longest name that exists is used. A number is an index of a
    list, counted from the end if it is negative.
    """
    if not path:
        return tree
    if isinstance(tree, list | tuple):
        return _element(tree, *path.partition(".")[::2])
    entries = mapping(tree) or {}
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        if name in entries:
            return at(entries[name], ".".join(parts[count:]))
    return None


def _element(values: Sequence[object], number: str, rest: str) -> object:
    try:
        return at(values[int(number)], rest)
    except (ValueError, IndexError):
        return None


def matching(tree: object, pattern: str) -> Iterator[str]:
    """Yield the paths that exist for a dotted path in which `*` is any one name or index."""
    before, star, after = pattern.partition(".*.")
    if not star:
        if at(tree, pattern) is not None:
            yield pattern
        return
    there = at(tree, before)
    numbered = enumerate(there) if isinstance(there, list | tuple) else ()
    for name, value in [*numbered, *(mapping(there) or {}).items()]:
        if isinstance(name, str | int) and at(value, after) is not None:
            yield f"{before}.{name}.{after}"


def split_prefix(tree: object, path: str) -> tuple[str, str] | None:
    """Split a dotted path into the path of a dict and a prefix of its names, or return None."""
    parts = path.split(".")
    for count in range(len(parts) - 1, -1, -1):
        place, prefix = ".".join(parts[:count]), ".".join(parts[count:]) + "."
        entries = mapping(at(tree, place)) or {}
        if any(isinstance(name, str) and name.startswith(prefix) for name in entries):
            return place, prefix
    return None


def children(value: object) -> Iterator[tuple[str, object]]:
    """Yield the entries of a mapping that are mappings, and may contain named tensors."""
    entries = mapping(value) or {}
    if is_optimizer(entries):
        return
    for name, child in entries.items():
        is_mapping = isinstance(child, dict | Inert)
        if is_mapping and isinstance(name, str) and not is_extra_state(name):
            yield name, child


def holds_tensors(value: object, seen: set[int] | None = None, depth: int = _DEEPEST) -> bool:
    """Return whether a mapping, or a mapping nested in it, holds named tensors."""
    seen = set() if seen is None else seen
    entries = mapping(value)
    if depth == 0 or entries is None or id(value) in seen or is_optimizer(entries):
        return False
    seen.add(id(value))
    return has_tensors(entries) or any(
        holds_tensors(child, seen, depth - 1) for _, child in children(entries)
    )


def innermost(value: object, path: str) -> str:
    """Return the path of the state_dict in the value at `path`, which holds tensors.

    Dicts that only contain one other dict with tensors are passed through. If several
    nested dicts hold tensors, they are parts of one state_dict: the dict around them.
    """
    for _ in range(_DEEPEST):
        below = [pair for pair in children(value) if holds_tensors(pair[1])]
        if has_tensors(value) or len(below) != 1:
            break
        name, value = below[0]
        path = f"{path}.{name}" if path else name
    return path


def flattened(entries: Mapping[object, object]) -> Mapping[object, object]:
    """Return a mapping with the tensors of nested mappings under dotted names.

    The result is the same object if there are no nested mappings with tensors. A mapping
    that contains itself stays a value there.

    Raises:
        FormatError: The mappings contain each other.
    """
    if not any(holds_tensors(child) for _, child in children(entries)):
        return entries
    made: dict[object, object] = {}
    left = _MOST_DICTS

    def add(entries: Mapping[object, object], prefix: str, around: tuple[int, ...]) -> None:
        nonlocal left
        inner = {
            name
            for name, child in children(entries)
            if len(around) <= _DEEPEST and id(child) not in around and holds_tensors(child)
        }
        left -= len(inner)
        if left < 0:
            raise FormatError("holds dicts that contain each other")
        for name, value in entries.items():
            if name in inner:
                add(mapping(value) or {}, f"{prefix}{name}.", (*around, id(value)))
            else:
                made[f"{prefix}{name}" if prefix else name] = value

    add(entries, "", (id(entries),))
    return made


def has_weights(value: object) -> bool:
    """Return whether a mapping directly holds a floating tensor of at least one dimension."""
    return any(map(is_weight, (mapping(value) or {}).values()))


def has_parameters(entries: Mapping[object, object]) -> bool:
    """Return whether a mapping directly holds such a tensor under the name of a parameter."""
    return any(
        isinstance(name, str) and ("." in name or name in _PARAMETERS) and is_weight(value)
        for name, value in entries.items()
    )


def is_weight(value: object) -> bool:
    """Return whether a value is a floating tensor of at least one dimension."""
    return isinstance(value, Tensor) and bool(value.shape) and value.dtype.kind is Kind.FLOAT


def dicts_of_tensors(
    tree: object, seen: set[int] | None = None, path: str = "", depth: int = 4
) -> Iterator[str]:
    """Yield the dotted paths of the dicts that directly hold tensors, each dict once.

    Optimizer state is skipped.
    """
    seen = set() if seen is None else seen
    entries = mapping(tree)
    listed = enumerate(tree) if isinstance(tree, list | tuple) and not path else ()
    if depth == 0 or id(tree) in seen:
        return
    seen.add(id(tree))
    if path and entries and has_tensors(entries) and not is_optimizer(entries):
        yield path
    for name, value in (*listed, *children(tree)):
        below = f"{path}.{name}" if path else str(name)
        yield from dicts_of_tensors(value, seen, below, depth - 1)
