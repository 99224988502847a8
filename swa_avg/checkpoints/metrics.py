"""What a checkpoint records of how good it is: one metric of it, by name.

Frameworks keep it in the checkpoint, in a file beside it or in its name. All
places are looked at, so that checkpoints are compared by what is recorded in
the same place for each of them; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from swa_avg.checkpoints import names
from swa_avg.checkpoints.tree import at, mapping
from swa_avg.checkpoints.words import MODES as MODE_OF
from swa_avg.formats import Checkpoint
from swa_avg.pickles import Inert
from swa_avg.tensors import Kind, TensorRef, View, read_numbers

MODES = ("min", "max")
# Where a metric stands under its name.
_PLACES = (
    "{}",
    "metrics.{}",  # timm, and many a script
    "extra_state.{}",  # fairseq
    "loss_dict.{}",  # wenet
)
# Who puts the metric's name in one place and its value in another.
_NAMED = (
    ("metric_name", "metric"),
    ("args.eval_metric", "metric"),  # timm
)
_REAL = (Kind.FLOAT, Kind.EXACT)
_SIDECARS = (".json", ".yaml", ".yml")
_MOST_SIDECAR_BYTES = 1_000_000
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_YAML_LINE = re.compile(r" *(['\"]?)([^\s'\"#-][^:'\"]*)\1:(?:\s+([^#\s].*?))?(?:\s+#.*)?\s*")
_LONGEST_YAML_LINE = 1000


@dataclass(frozen=True)
class Score:
    """A metric of one checkpoint.

    Attributes:
        name: The metric's name.
        value: Its value.
        where: Where it is recorded.
    """

    name: str
    value: float
    where: str


def mode_of(name: str) -> str | None:
    """Return whether a metric should be small (min) or large (max), if its name tells."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    stems = (word if word in MODE_OF else word.rstrip("0123456789") for word in words)
    modes = {MODE_OF[stem] for stem in stems if stem in MODE_OF}
    return modes.pop() if len(modes) == 1 else None  # an `acc_loss` tells nothing


def scores(checkpoint: Checkpoint, name: str) -> dict[str, Score]:
    """Return a metric of a checkpoint by where it is recorded, the best place first."""
    found: dict[str, Score] = {}
    for where, value in _values(checkpoint, name):
        number = _number(value, checkpoint)
        if number is not None:
            found.setdefault(where, Score(name, number, where))
    return found


def looked_at(checkpoint: Checkpoint) -> str:
    """Return where a metric was looked for, for people."""
    beside = [path.name for path in _sidecars(checkpoint.path)]
    return ", ".join(["the checkpoint itself", "trainer_state.json", *beside, "its name"])


def _values(checkpoint: Checkpoint, name: str) -> Iterator[tuple[str, object]]:
    """Yield all places of a metric and what stands there."""
    for tree in (checkpoint.tree, checkpoint.beside):
        yield from _in_tree(tree, name)
        yield from _in_callbacks(tree, name, checkpoint.path.name)
        yield from _in_history(tree, name)
    for path in _sidecars(checkpoint.path):
        for where, value in _in_tree(_read_sidecar(path), name):
            yield f"{path.suffix} beside it: {where}", value
    # A metric `val/acc` in Lightning's file names makes a folder.
    yield "file name", names.read(checkpoint.path, 1 + name.count("/")).metric(name)


def _in_tree(tree: object, name: str) -> Iterator[tuple[str, object]]:
    for place in _PLACES:
        where = place.format(name)
        yield where, at(tree, where)
    for naming, where in _NAMED:
        if _attribute(tree, naming) == name:
            yield where, at(tree, where)


def _attribute(tree: object, path: str) -> object:
    """Return what stands at a dotted path whose last part may be an object's attribute."""
    first, _, last = path.rpartition(".")
    holder = at(tree, first)
    if isinstance(holder, Inert) and isinstance(holder.state, dict):  # an argparse.Namespace
        return holder.state.get(last)
    return at(holder, last)


def _in_callbacks(tree: object, name: str, file: str) -> Iterator[tuple[str, object]]:
    """Yield what Lightning's ModelCheckpoint says of a checkpoint.

    Its `current_score` is that of the last file that it saved for the score's sake,
    and stands in all that are saved later (`last.ckpt`, another callback's files). So
    its list of files is what counts, where it has one.
    """
    for callback in (mapping(at(tree, "callbacks")) or {}).values():
        if at(callback, "monitor") != name:
            continue
        best = mapping(at(callback, "best_k_models")) or {}
        files = {re.split(r"[/\\]", path)[-1]: path for path in best if isinstance(path, str)}
        value = best.get(files.get(file)) if best else at(callback, "current_score")
        yield "ModelCheckpoint", value


def _in_history(tree: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield what Trainer logged at the step of a checkpoint; it calls `loss` `eval_loss`, too."""
    step, history = at(tree, "global_step"), at(tree, "log_history")
    if step is None or not isinstance(history, list):
        return
    for key in (name, f"eval_{name}"):
        for entry in reversed(history):
            if isinstance(entry, dict) and entry.get("step") == step and key in entry:
                yield f"log_history: {key}", entry[key]


def _number(value: object, checkpoint: Checkpoint) -> float | None:
    """Return a number, or a tensor of one element in a file that is open, as a float."""
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
    """Return the files beside a checkpoint that bear its name, without its suffix or with it."""
    stems = dict.fromkeys((path.stem if path.suffix else path.name, path.name))
    found = (path.with_name(stem + suffix) for stem in stems for suffix in _SIDECARS)
    return [beside for beside in found if beside.is_file()]


def _read_sidecar(path: Path) -> object:
    """Return what a small JSON or YAML file holds; None if it cannot be read as that."""
    try:
        if path.stat().st_size > _MOST_SIDECAR_BYTES:
            return None
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else _numbers_in_yaml(text)
    except (OSError, ValueError, RecursionError):
        return None


def _numbers_in_yaml(text: str) -> Mapping[str, object]:
    """Return the numbers under plain keys in a YAML text, nested by indentation.

    All else in it (lists, texts, tags) is passed over, with what is indented below it.
    """
    root: dict[str, object] = {}
    # What is open at each indentation: a mapping, or None for what is passed over.
    levels: list[tuple[int, dict[str, object] | None]] = [(-1, root)]
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        depth = len(line) - len(line.lstrip(" "))
        while depth <= levels[-1][0]:
            levels.pop()
        parent, below = levels[-1][1], None
        parts = _YAML_LINE.fullmatch(line) if len(line) <= _LONGEST_YAML_LINE else None
        if parent is not None and parts:
            _, key, value = parts.groups()
            if value is None:
                parent[key] = below = dict[str, object]()
            elif re.fullmatch(rf"[-+]?{_NUMBER}", value):
                parent[key] = float(value)
        levels.append((depth, below))
    return root
