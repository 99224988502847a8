"""The value of a metric that a checkpoint records.

Frameworks record metrics in the checkpoint, in a file beside it, or in its name. All places
are read, so that checkpoints are compared by values recorded in the same place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swa_avg.checkpoints import names
from swa_avg.checkpoints.tree import at, mapping
from swa_avg.checkpoints.words import MODES as MODE_OF
from swa_avg.formats import Checkpoint, numbers_in_yaml
from swa_avg.pickles import Inert
from swa_avg.tensors import Kind, TensorRef, View, read_numbers

MODES = ("min", "max")
# The places where a metric is recorded under its name.
_PLACES = (
    "{}",
    "metrics.{}",  # timm and many scripts
    "extra_state.{}",  # fairseq
    "loss_dict.{}",  # wenet
)
# The places where the name and the value of a metric are recorded separately.
_NAMED = (
    ("metric_name", "metric"),
    ("args.eval_metric", "metric"),  # timm
)
_REAL = (Kind.FLOAT, Kind.EXACT)
_SIDECARS = (".json", ".yaml", ".yml")
_MOST_SIDECAR_BYTES = 1_000_000


@dataclass(frozen=True)
class Score:
    """A metric of one checkpoint.

    Attributes:
        name: The metric's name.
        value: Its value.
        where: The place where it is recorded.
    """

    name: str
    value: float
    where: str


def mode_of(name: str) -> str | None:
    """Return `min` or `max` for a metric whose name shows which is better, otherwise None."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    stems = (word if word in MODE_OF else word.rstrip("0123456789") for word in words)
    modes = {MODE_OF[stem] for stem in stems if stem in MODE_OF}
    return modes.pop() if len(modes) == 1 else None  # `acc_loss` is ambiguous


def scores(checkpoint: Checkpoint, name: str) -> dict[str, Score]:
    """Return the recorded values of a metric by place, in order of preference."""
    found: dict[str, Score] = {}
    for where, value in _values(checkpoint, name):
        number = _number(value, checkpoint)
        if number is not None:
            found.setdefault(where, Score(name, number, where))
    return found


def looked_at(checkpoint: Checkpoint) -> str:
    """Return the places that were searched for a metric, for a message."""
    beside = [path.name for path in _sidecars(checkpoint.path)]
    return ", ".join(["the checkpoint itself", "trainer_state.json", *beside, "its name"])


def _values(checkpoint: Checkpoint, name: str) -> Iterator[tuple[str, object]]:
    """Yield all places of a metric and their values."""
    for tree in (checkpoint.tree, checkpoint.beside):
        yield from _in_tree(tree, name)
        yield from _in_callbacks(tree, name, checkpoint.path.name)
        yield from _in_history(tree, name)
    for path in _sidecars(checkpoint.path):
        for where, value in _in_tree(_read_sidecar(path), name):
            yield f"{path.suffix} beside it: {where}", value
    # A metric `val/acc` in a file name of Lightning creates a folder.
    yield "file name", names.read(checkpoint.path, 1 + name.count("/")).metric(name)


def _in_tree(tree: object, name: str) -> Iterator[tuple[str, object]]:
    for place in _PLACES:
        where = place.format(name)
        yield where, at(tree, where)
    for naming, where in _NAMED:
        if _attribute(tree, naming) == name:
            yield where, at(tree, where)


def _attribute(tree: object, path: str) -> object:
    """Return the value at a dotted path whose last part may be an attribute of an object."""
    first, _, last = path.rpartition(".")
    holder = at(tree, first)
    if isinstance(holder, Inert) and isinstance(holder.state, dict):  # an argparse.Namespace
        return holder.state.get(last)
    return at(holder, last)


def _in_callbacks(tree: object, name: str, file: str) -> Iterator[tuple[str, object]]:
    """Yield the score of a checkpoint from the state of Lightning's ModelCheckpoint.

    `current_score` is the score of the last file that was saved because of its score, and
    later files (`last.ckpt`, files of other callbacks) repeat it. The dict `best_k_models`
    is used instead if there is one.
    """
    for callback in (mapping(at(tree, "callbacks")) or {}).values():
        if at(callback, "monitor") != name:
            continue
        best = mapping(at(callback, "best_k_models")) or {}
        files = {re.split(r"[/\\]", path)[-1]: path for path in best if isinstance(path, str)}
        value = best.get(files.get(file)) if best else at(callback, "current_score")
        yield "ModelCheckpoint", value


def _in_history(tree: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield the values that Trainer logged for `name` or `eval_name` at a checkpoint's step."""
    step, history = at(tree, "global_step"), at(tree, "log_history")
    if step is None or not isinstance(history, list):
        return
    for key in (name, f"eval_{name}"):
        for entry in reversed(history):
            if isinstance(entry, dict) and entry.get("step") == step and key in entry:
                yield f"log_history: {key}", entry[key]


def _number(value: object, checkpoint: Checkpoint) -> float | None:
    """Return a number, or a tensor of one element in an open file, as a float."""
    if isinstance(value, View | TensorRef) and value.numel == 1 and value.dtype.kind in _REAL:
        is_open = isinstance(value, TensorRef) or value.stored in checkpoint.records
        value = float(read_numbers(checkpoint.located(value))[0]) if is_open else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _sidecars(path: Path) -> list[Path]:
    """Return the JSON and YAML files beside a checkpoint with its name, with or without suffix."""
    stems = dict.fromkeys((path.stem if path.suffix else path.name, path.name))
    found = (path.with_name(stem + suffix) for stem in stems for suffix in _SIDECARS)
    return [beside for beside in found if beside.is_file()]


def _read_sidecar(path: Path) -> object:
    """Return the content of a small JSON or YAML file, or None if it cannot be read."""
    try:
        if path.stat().st_size > _MOST_SIDECAR_BYTES:
            return None
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else numbers_in_yaml(text)
    except (OSError, ValueError, RecursionError):
        return None
