"""Finds the raw weights and the averages of a run in a checkpoint.

The places are those in the table of `frameworks`, and any top-level dict whose name marks an
average. If nothing is found, the error suggests candidates. This module does not look at
names inside a state_dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import takewhile
from shlex import quote

from swa_avg.checkpoints.frameworks import FRAMEWORKS, WEIGHTS, Framework, entry_marks_average
from swa_avg.checkpoints.tree import (
    at,
    dicts_of_tensors,
    has_weights,
    holds_tensors,
    innermost,
    is_weight,
    mapping,
    matching,
)
from swa_avg.errors import LayoutError, listed
from swa_avg.formats import Checkpoint
from swa_avg.pickles import Inert
from swa_avg.tensors import Tensor, is_optimizer

# Entries next to a model that hold tensors but are not a model.
_NO_MODEL = re.compile(
    r"(?:^|_)(?:opt|optim\w*|\w*scheds?|\w*schedulers?|scaler|rng\w*|random\w*|sampler|loaders?"
    r"|frozen_param\w*|loss\w*|criterion|metrics?|callbacks?|history|args|config|hparams"
    r"|hyper_parameters)(?:_|$)",
    re.IGNORECASE,
)
_AVERAGES = [row.average for row in FRAMEWORKS if row.average and row.average not in WEIGHTS]
_CHUNK = re.compile(r"model\d+")
# The key under which torch_ema and diffusers' EMAModel save a list in parameter order.
_LIST = "shadow_params"
_EMA_MODEL = "ema_model."  # the averaged half in the state of ema_pytorch


@dataclass(frozen=True)
class Places:
    """The places of a model's weights in a checkpoint.

    Attributes:
        framework: The row of the table that matches, or None.
        weights: The dotted paths of raw weights.
        chunks: The dotted paths of parts that make up one model, if it is stored in several.
        averages: The dotted paths of averages with named tensors.
        unnamed: The dotted paths of averages that are lists of tensors without names.
    """

    framework: Framework | None
    weights: tuple[str, ...]
    chunks: tuple[str, ...]
    averages: tuple[str, ...]
    unnamed: tuple[str, ...]


NOWHERE = Places(None, (), (), (), ())


def places(tree: object) -> Places:
    """Find the places of a checkpoint's weights and averages."""
    row = _row(tree)
    exchanged = row is not None and row.average in WEIGHTS
    patterns = [row.weights] if row and exchanged else [*WEIGHTS, *([row.weights] if row else [])]
    weights = _holding(tree, patterns)
    root = mapping(tree) or {}
    marked = _marked(tree, () if exchanged else weights or candidates(tree))
    first = [row.average] if row and exchanged else []
    averages = _holding(tree, [*first, *_AVERAGES, *marked])
    # mmengine saves the raw weights under a name that marks an average.
    averages = tuple(path for path in averages if path not in weights)
    chunks: tuple[str, ...] = ()
    if not weights:
        numbered = [name for name in root if isinstance(name, str) and _CHUNK.fullmatch(name)]
        chunks = _holding(tree, numbered)
    unnamed = [path for path in dict.fromkeys(_slots(row, marked)) if _is_list(at(tree, path))]
    return Places(row, weights, chunks, averages, tuple(unnamed))


def _marked(tree: object, weights: Sequence[str]) -> list[str]:
    """Return the paths of dicts whose names mark an average: at the top and beside the weights."""
    parents = dict.fromkeys(("", *(path.rpartition(".")[0] for path in weights)))
    return [
        f"{parent}.{name}" if parent else name
        for parent in parents
        for name, value in (mapping(at(tree, parent)) or {}).items()
        if isinstance(name, str) and _is_dict(value) and entry_marks_average(name)
    ]


def _row(tree: object) -> Framework | None:
    """Return the row of the table that a checkpoint matches."""
    for row in FRAMEWORKS:
        if row.sign and at(tree, row.sign) is None:
            continue
        averages = bool(row.average) and (
            bool(_holding(tree, [row.average])) or _is_list(at(tree, row.average))
        )
        weights = bool(_holding(tree, [row.weights]))
        # A file may have only an average, but not at a place of raw weights in other rows.
        alone = bool(row.sign) and row.average not in WEIGHTS
        if averages and (weights or alone) if row.average else weights:
            return row
    return None


def _slots(row: Framework | None, marked: list[str]) -> Iterator[str]:
    if row and row.average:
        yield row.average
    yield from marked


def _holding(tree: object, patterns: list[str]) -> tuple[str, ...]:
    """Return the paths of the state_dicts that exist at the given patterns."""
    found = (path for pattern in patterns for path in matching(tree, pattern))
    holding = (path for path in found if holds_tensors(at(tree, path)))
    return tuple(dict.fromkeys(innermost(at(tree, path), path) for path in holding))


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping | Inert)


def _is_list(value: object) -> bool:
    """Return whether a value is an average saved as a list of tensors without names."""
    listed = (mapping(value) or {}).get(_LIST, value)
    return isinstance(listed, list | tuple) and any(isinstance(one, Tensor) for one in listed)


def candidates(tree: object) -> list[str]:
    """Return the paths of the dicts that may be a model."""
    found: list[str] = []
    for path in dicts_of_tensors(tree):
        parts = path.split(".")
        if any(_NO_MODEL.search(part) or entry_marks_average(part) for part in parts):
            continue
        # A dict inside a candidate belongs to the candidate.
        if has_weights(at(tree, path)) and not any(path.startswith(f"{one}.") for one in found):
            found.append(path)
    return found


def notes_beside(tree: object, place: str, ema: bool = False) -> Iterator[str]:
    """Yield a note on weights that are not part of the state_dict, such as a separate head.

    Args:
        tree: The saved object.
        place: The path of the state_dict that is taken.
        ema: Whether it is an average; the raw weights that it was computed from are not noted.
    """
    raw = _raw_names(at(tree, place)) if ema else []
    others = [
        path
        for path in candidates(tree)
        if not (f"{path}.".startswith(f"{place}.") or place.startswith(f"{path}."))
        and _plain_names(mapping(at(tree, path)) or {}) not in raw
    ]
    if others:
        keys = " ".join(f"--key {quote(path)}" for path in (place, *others[:7]))
        yield (
            f"{listed(others)}: weights beside {place}; not averaged (to average them with it, "
            f"use {keys})"
        )
    loose = [
        name
        for name, value in (mapping(tree) or {}).items()
        if isinstance(name, str) and is_weight(value) and not _NO_MODEL.search(name)
    ]
    if loose:
        yield f"{listed(loose)}: not part of {place}; not averaged"


def _raw_names(average: object) -> list[set[str]]:
    """Return what the names of the raw weights of an average may be.

    The state of ema_pytorch has both halves, each under its prefix.
    """
    names = [str(name) for name in mapping(average) or {}]
    inner = [name.removeprefix(_EMA_MODEL) for name in names if name.startswith(_EMA_MODEL)]
    return [_plain_names(names), _plain_names(inner)]


def _plain_names(given: Iterable[object]) -> set[str]:
    """Return the names of a state_dict without dots, a wrapper's prefix, and counters."""
    names = [str(name).removeprefix("module.") for name in given]
    return {name.replace(".", "") for name in names} - {"n_averaged", "num_updates", "decay"}


def no_state_dict(checkpoint: Checkpoint, found: str, averages: Sequence[str] = ()) -> LayoutError:
    """Return the error for a missing state_dict, with a suggestion."""
    tree = checkpoint.tree
    near = [path for path in dicts_of_tensors(tree) if has_weights(at(tree, path))]
    near = [path for path in near if path not in averages]
    objects = [path for path in ("", *WEIGHTS) if isinstance(at(tree, path), Inert)]
    if near:
        columns = zip(*(path.split(".")[:-1] for path in near), strict=False)
        around = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, columns)]
        remedy = f"Give its path with --key; tensors are at: {listed(near, 8)}"
        if len(near) > 1 and around:
            remedy += f". --key {'.'.join(around)} takes all of them"
        elif len(near) > 1:
            remedy += ". To take several as one model, repeat --key"
        if len(averages) == 1:
            remedy += f". --ema takes the average at {averages[0]}"
    elif is_optimizer(mapping(tree) or {}):
        remedy = (
            "It holds optimizer state; to average other files, leave it out with --exclude "
            + quote(escape(checkpoint.path.name))
        )
    elif has_weights(tree):
        remedy = "It is a state_dict itself: leave out --key"
    elif objects:
        remedy = "It holds a pickled object; save its state_dict() instead"
    else:
        remedy = "It has no named tensors"
    return LayoutError(found, file=checkpoint.path, remedy=remedy)


def no_average(checkpoint: Checkpoint) -> LayoutError:
    """Return the error for a missing average."""
    return LayoutError(
        "has no averaged weights",
        file=checkpoint.path,
        remedy="Average the raw weights without --ema",
    )


def only_of(checkpoint: Checkpoint, paths: Sequence[str], unnamed: Sequence[str] = ()) -> str:
    """Return the only path, or raise if there are several or the average has no names."""
    if not paths:
        raise LayoutError(
            f"has its average at {listed(unnamed)}, a list of tensors without names",
            file=checkpoint.path,
            remedy="Copy it into the model with the code that wrote it, and save its state_dict; "
            "or average the raw weights with --no-ema",
        )
    if len(paths) > 1:
        raise LayoutError(
            f"has several state_dicts ({', '.join(paths)})",
            file=checkpoint.path,
            expected="one",
            remedy=f"Choose one, as in --key {quote(paths[0])}",
        )
    return paths[0]
