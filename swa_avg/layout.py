"""Where in a checkpoint the state_dict is, and what else the checkpoint records.

Training frameworks wrap the state_dict in dicts of their own, and wrappers
around the model put prefixes on its names. Both are undone here. Nothing here
reads a tensor or compares checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from swa_avg.errors import LayoutError, listed
from swa_avg.formats import Checkpoint
from swa_avg.formats.pickles import Dict, Inert, UnreadableTensor, described
from swa_avg.tensors import TensorRef

# Where frameworks put the weights of the model, and where averages of them.
_WEIGHTS = ("state_dict", "model", "model_state_dict", "module", "state.model")
_AVERAGES = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "model_avg",
    "swa_state_dict", "extra_state.ema", "average_model_state",
)  # fmt: skip
_EPOCHS = ("epoch", "meta.epoch")
_STEPS = ("global_step", "global_steps", "step", "iteration", "iter_num", "iter", "meta.iter")
# What torch's wrappers put before every name: DataParallel, DDP and AveragedModel; compile.
_PREFIXES = ("module.", "_orig_mod.")
_COUNT = "n_averaged"
# What a state_dict holds besides tensors is small; nested lists can take for ever to look at.
_MOST_PLAIN_VALUES = 100_000


@dataclass(frozen=True)
class StateDict:
    """The state_dict of a checkpoint, with names as the plain model has them.

    Attributes:
        checkpoint: The checkpoint it is in.
        where: The dotted path to it; empty for the root.
        prefix: What was stripped from every name.
        tensors: Its tensors by name, in order.
        values: Its other plain values by name; each also stands in `order`.
        order: All names in order.
        dropped: Names whose values are objects that cannot be written again.
        metadata: The `_metadata` that torch keeps beside it, or None.
        epoch: The epoch that the checkpoint records, or None.
        step: The step that the checkpoint records, or None.
        averages: Dotted paths of averaged weights that the checkpoint has as well.
    """

    checkpoint: Checkpoint
    where: str
    prefix: str
    tensors: Mapping[str, TensorRef]
    values: Mapping[str, object]
    order: tuple[str, ...]
    dropped: tuple[str, ...]
    metadata: Mapping[str, object] | None
    epoch: int | None
    step: int | None
    averages: tuple[str, ...]


def find_state_dict(checkpoint: Checkpoint, key: str | None = None) -> StateDict:
    """Find the state_dict of a checkpoint.

    Args:
        checkpoint: An opened checkpoint.
        key: Its dotted path, where the user gave one.

    Raises:
        LayoutError: There is none, there are several, or it holds what cannot be averaged.
    """
    where, found = _locate(checkpoint, key)
    _check_entries(checkpoint, found)
    prefix = _common_prefix(found)
    entries = {
        str(name).removeprefix(prefix): value
        for name, value in found.items()
        if not ("module." in prefix and name == _COUNT)
    }
    tensors = {name: value for name, value in entries.items() if isinstance(value, TensorRef)}
    values = {
        name: value for name, value in entries.items() if name not in tensors and _is_plain(value)
    }
    return StateDict(
        checkpoint=checkpoint,
        where=where,
        prefix=prefix,
        tensors=tensors,
        values=values,
        order=tuple(name for name in entries if name in tensors or name in values),
        dropped=tuple(name for name in entries if name not in tensors and name not in values),
        metadata=_metadata(found, prefix),
        epoch=_recorded(checkpoint.tree, _EPOCHS),
        step=_recorded(checkpoint.tree, _STEPS),
        averages=tuple(
            path for path in _AVERAGES if path != where and _mapping(_at(checkpoint.tree, path))
        ),
    )


_Entries = Mapping[object, object]


def _locate(checkpoint: Checkpoint, key: str | None) -> tuple[str, _Entries]:
    tree = checkpoint.tree
    if key is not None:
        found = _mapping(_at(tree, key))
        if found is None or not _tensor_count(found):
            raise _absent(checkpoint, f"has no state_dict at {key!r}")
        return key, found
    candidates = [path for path in _WEIGHTS if _tensor_count(_mapping(_at(tree, path)))]
    if len(candidates) > 1:
        raise LayoutError(
            f"has several state_dicts ({', '.join(candidates)})",
            file=checkpoint.path,
            expected="one",
            remedy=f"Name the one to average, as in --key {candidates[0]}",
        )
    if candidates:
        return candidates[0], _mapping(_at(tree, candidates[0])) or {}
    root = _mapping(tree)
    if root is None or 2 * _tensor_count(root) <= len(root):
        raise _absent(checkpoint, "has no state_dict where frameworks put it")
    return "", root


def _absent(checkpoint: Checkpoint, found: str) -> LayoutError:
    """Say that there is no state_dict, and what might be meant."""
    near = list(_dicts_of_tensors(checkpoint.tree))
    objects = [path for path in ("", *_WEIGHTS) if isinstance(_at(checkpoint.tree, path), Inert)]
    if near:
        remedy = f"Name its place with --key; tensors are at: {listed(near, 8)}"
    elif objects:
        remedy = "It holds a whole pickled object; save its state_dict() instead"
    else:
        remedy = "It holds no tensors by name"
    return LayoutError(found, file=checkpoint.path, remedy=remedy)


def _dicts_of_tensors(tree: object, path: str = "", depth: int = 4) -> Iterator[str]:
    """Yield the dotted paths of the dicts that hold tensors themselves."""
    entries = _mapping(tree)
    if entries is None or depth == 0:
        return
    if path and _tensor_count(entries):
        yield path
    for name, value in entries.items():
        if isinstance(name, str):
            yield from _dicts_of_tensors(value, f"{path}.{name}" if path else name, depth - 1)


def _mapping(value: object) -> Mapping[object, object] | None:
    """Return `value` as a mapping, if it is one, of whatever class it was."""
    if isinstance(value, Inert) and value.entries:
        return value.entries
    return value if isinstance(value, dict) else None


def _tensor_count(entries: Mapping[object, object] | None) -> int:
    tensors = (TensorRef, UnreadableTensor)
    return sum(isinstance(value, tensors) for value in entries.values()) if entries else 0


def _at(tree: object, path: str) -> object:
    """Return what stands at a dotted path, or None; names may hold dots themselves."""
    if not path:
        return tree
    entries = _mapping(tree)
    if entries is None:
        return None
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        if name in entries:
            return _at(entries[name], ".".join(parts[count:]))
    return None


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


def _common_prefix(entries: Mapping[object, object]) -> str:
    """Return the wrappers' prefixes that every name bears, in their order."""
    names = [str(name) for name in entries]
    prefix = ""
    while True:
        for wrapper in _PREFIXES:
            longer = prefix + wrapper
            bearing = [name.startswith(longer) for name in names if name != _COUNT]
            # n_averaged is a wrapper's own counter only beside names under `module.`
            counted = _COUNT in names and "module." not in longer
            if any(bearing) and all(bearing) and not counted:
                prefix = longer
                break
        else:
            return prefix


def _metadata(entries: Mapping[object, object], prefix: str) -> Mapping[str, object] | None:
    """Return the `_metadata` of a state_dict, its module paths stripped like the names."""
    state = entries.state if isinstance(entries, Dict) else None
    metadata = state.get("_metadata") if isinstance(state, dict) else None
    if not isinstance(metadata, dict):
        return None
    plain = {
        path: value
        for path, value in metadata.items()
        if isinstance(path, str) and _is_plain(value)
    }
    if not prefix:
        return plain
    return {
        f"{path}.".removeprefix(prefix).removesuffix("."): value
        for path, value in plain.items()
        if f"{path}.".startswith(prefix)
    }


def _is_plain(value: object) -> bool:
    """Tell whether a value can be written again as it is, and is of reasonable size."""
    values, left = [value], _MOST_PLAIN_VALUES
    while values:
        value = values.pop()
        left -= 1
        if left < 0:
            return False
        if isinstance(value, dict):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            values += value
        elif not (value is None or isinstance(value, bool | int | float | complex | str | bytes)):
            return False
    return True


def _recorded(tree: object, paths: tuple[str, ...]) -> int | None:
    """Return the first whole number that stands at one of `paths`."""
    for path in paths:
        value = _at(tree, path)
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
            return int(value)
    return None
