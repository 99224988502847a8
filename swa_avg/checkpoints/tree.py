"""Finding one's way in what a checkpoint holds: nested containers of whatever class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from swa_avg.checkpoints.modules import state_dict_of
from swa_avg.formats import Inert, UnreadableTensor
from swa_avg.tensors import Tensor


def mapping(value: object) -> Mapping[object, object] | None:
    """Return `value` as a mapping, if it is one; a pickled module is its state_dict."""
    if isinstance(value, Inert):
        return value.entries or state_dict_of(value)
    return value if isinstance(value, dict) else None


def tensor_count(value: object) -> int:
    """Return how many tensors a mapping holds itself; 0 for anything else."""
    entries = mapping(value) or {}
    return sum(isinstance(item, Tensor | UnreadableTensor) for item in entries.values())


def at(tree: object, path: str) -> object:
    """Return what stands at a dotted path, or None.

    Names may hold dots themselves: the longest that is there is taken. A number
    is a place in a list, counted from the end if it is negative.
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
    """Yield the paths of what stands at a dotted path in which `*` is any one name."""
    before, star, after = pattern.partition(".*.")
    if not star:
        if at(tree, pattern) is not None:
            yield pattern
        return
    for name, value in (mapping(at(tree, before)) or {}).items():
        if isinstance(name, str) and at(value, after) is not None:
            yield f"{before}.{name}.{after}"


def dicts_of_tensors(
    tree: object, seen: set[int] | None = None, path: str = "", depth: int = 4
) -> Iterator[str]:
    """Yield the dotted paths of the dicts that hold tensors themselves, each dict once."""
    seen = set() if seen is None else seen
    entries = mapping(tree)
    if entries is None or depth == 0 or id(tree) in seen:
        return
    seen.add(id(tree))
    if path and tensor_count(entries):
        yield path
    for name, value in entries.items():
        if isinstance(name, str):
            below = f"{path}.{name}" if path else name
            yield from dicts_of_tensors(value, seen, below, depth - 1)
