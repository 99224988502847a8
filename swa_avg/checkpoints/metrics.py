"""The value of a metric that a checkpoint records.

Frameworks record metrics in the checkpoint, in a file beside it, in its name or in the name
of its folder, and in other checkpoints of the run. All places are read, so that checkpoints
are compared by values recorded in the same place.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path

from swa_avg.checkpoints import names, recorded, words
from swa_avg.checkpoints.names import Name
from swa_avg.checkpoints.tree import at, mapping
from swa_avg.checkpoints.words import DERIVED, Label
from swa_avg.checkpoints.words import MODES as MODE_OF
from swa_avg.errors import SwaAvgError
from swa_avg.formats import Checkpoint, Components, numbers_in_yaml, open_checkpoint
from swa_avg.pickles import Inert
from swa_avg.storage import is_remote
from swa_avg.tensors import Kind, TensorRef, View, read_numbers

MODES = ("min", "max")


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The places where a metric is recorded under its name.
_PLACES = (
    "{}",
    "metrics.{}",  # timm and many scripts
    "train_metrics.{}",  # Ultralytics
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
_MOST_SCALARS_BYTES = 100_000_000
_MOST_NAMES = 8
# Numbers of checkpoints and of logs that are not metrics.
_NOT_METRICS = _set(
    "epoch step global_step global_steps iteration iter iter_num num_updates cur_epoch updates "
    "train_batch_size max_steps num_train_epochs save_steps eval_steps logging_steps unixtime "
    "version checkpoint_version batch_idx_train skipped_steps dp_world_size mp_world_size "
    "global_samples lr learning_rate time data_time"
)
# Words before the name of a metric in the name of a file: best_loss.
_UNRELATED = words.NOUNS | words.ROLES
_REPORT = "checkpoint.pth"  # of ESPnet
_SCALARS = "message_hub.log_scalars"  # of mmengine
_SCALARS_FILE = "scalars.json"  # of mmengine


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


def check_mode(mode: str | None) -> None:
    """Raise `ValueError` if a mode is neither min nor max nor None."""
    if mode not in (None, *MODES):
        raise ValueError(f"mode must be min or max, not {mode}")


def mode_of(name: str) -> str | None:
    """Return `min` or `max` for a metric whose name shows which is better, otherwise None."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    stems = (word if word in MODE_OF else word.rstrip("0123456789") for word in words)
    modes = {MODE_OF[stem] for stem in stems if stem in MODE_OF}
    if len(modes) != 1 or DERIVED.intersection(words):  # `acc_loss`, `neg_log_loss`, `acc_std`
        return None
    return modes.pop()


@dataclass
class Run:
    """What the checkpoints of a run record about each other.

    Attributes:
        logs: The values by step that Trainer logged: in each checkpoint, those until then.
        reports: The report of ESPnet in each folder that has been searched.
        scalars: The lines that mmengine logged, in each folder that has been searched.
    """

    logs: Sequence[object] = ()
    reports: dict[Path, object] = field(default_factory=dict)
    scalars: dict[Path, list[Mapping[str, object]]] = field(default_factory=dict)


def run_of(checkpoints: Iterable[Checkpoint]) -> Run:
    """Return what the checkpoints of a run record, for `scores` of each of them."""
    trees = (tree for one in checkpoints for tree in (one.tree, one.beside))
    logs = (at(tree, "log_history") for tree in trees if not isinstance(tree, Components))
    return Run(tuple(log for log in logs if isinstance(log, list)))


def scores(checkpoint: Checkpoint, name: str, label: Name, run: Run) -> dict[str, Score]:
    """Return the recorded values of a metric by place, in order of preference.

    Args:
        checkpoint: The checkpoint.
        name: The name of the metric.
        label: The parsed path of the checkpoint.
        run: What the checkpoints of its run record.
    """
    found: dict[str, Score] = {}
    for where, value in _values(checkpoint, name, label, run):
        number = _number(value, checkpoint)
        if number is not None:
            found.setdefault(where, Score(name, number, where))
    return found


def looked_at(checkpoint: Checkpoint, name: str, label: Name, run: Run) -> str:
    """Return the places that were searched for a metric and the names found, for a message."""
    beside = [path.name for path in _sidecars(checkpoint.path)]
    places = ", ".join(["the checkpoint itself", "trainer_state.json", *beside, "its name"])
    known = list(dict.fromkeys(_names(checkpoint, label, run)))
    close = get_close_matches(name, known, n=_MOST_NAMES, cutoff=0.3)
    known = [*close, *(one for one in known if one not in close)]
    if not known:
        return f"{places}; no metric is recorded there"
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return f"{places}; recorded there: {', '.join(known[:_MOST_NAMES])}{more}"


def _values(
    checkpoint: Checkpoint, name: str, label: Name, run: Run
) -> Iterator[tuple[str, object]]:
    """Yield all places of a metric and their values."""
    for tree in (checkpoint.tree, checkpoint.beside):
        yield from _in_tree(tree, name)
        yield from _in_callbacks(tree, name, checkpoint.path.name)
    for log in _logged(checkpoint, label, run):
        for key in (name, f"eval_{name}"):
            if key in log:
                yield f"log_history: {key}", log[key]
    for path in _sidecars(checkpoint.path):
        for where, value in _in_tree(_read_sidecar(path), name):
            yield f"{path.suffix} beside it: {where}", value
    # A metric `val/acc` in a file name of Lightning creates a folder.
    own = names.read(checkpoint.path, 1 + name.count("/"))
    yield "file name", own.metric(name)
    yield "file name", label.metric(name)
    yield _REPORT, dict(_reported(checkpoint, label, run)).get(name)
    yield "message_hub", _last_of(at(at(checkpoint.tree, _SCALARS), name), name)
    yield _SCALARS_FILE, _scalars(checkpoint, label, run).get(name)


def _names(checkpoint: Checkpoint, label: Name, run: Run) -> Iterator[str]:
    """Yield the names of the metrics that a checkpoint records."""
    trees = [checkpoint.tree, checkpoint.beside, *map(_read_sidecar, _sidecars(checkpoint.path))]
    for tree in trees:
        yield from _names_in_tree(tree, checkpoint)
    for log in _logged(checkpoint, label, run):
        yield from (name for name in log if name not in _NOT_METRICS)
    yield from (name for name, _ in _reported(checkpoint, label, run))
    hub = mapping(at(checkpoint.tree, _SCALARS)) or {}
    yield from (str(name) for name in hub if _last_of(hub[name], str(name)) is not None)
    yield from (name for name in _scalars(checkpoint, label, run) if name not in _NOT_METRICS)
    for metric, _ in label.metrics:
        yield _shown(metric)


def _names_in_tree(tree: object, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the names of the metrics in one object: a saved one, or that of a file beside it."""
    for place in () if isinstance(tree, Components) else _PLACES:
        values = mapping(at(tree, place.removesuffix("{}").removesuffix("."))) or {}
        for name, value in values.items():
            plain = None if isinstance(value, View) else value
            named = isinstance(name, str) and name not in _NOT_METRICS
            if named and _number(plain, checkpoint) is not None:
                yield str(name)
    for naming, where in _NAMED:
        named_by = _attribute(tree, naming)
        if isinstance(named_by, str) and at(tree, where) is not None:
            yield named_by
    for callback in (mapping(at(tree, "callbacks")) or {}).values():
        monitor = at(callback, "monitor")
        if isinstance(monitor, str):
            yield monitor


def _shown(label: Label) -> str:
    """Return the metric of a label as text, without the unrelated words before its name."""
    own = list(takewhile(_UNRELATED.isdisjoint, ({word} for word in reversed(label.words))))
    start = len(label.words) - max(len(own), 1)
    pairs = zip(label.joints[start:], label.words[start:], strict=True)
    return "".join(joint + word for joint, word in pairs).removeprefix(label.joints[start])


def _logged(checkpoint: Checkpoint, label: Name, run: Run) -> Iterator[Mapping[str, object]]:
    """Yield the entries that Trainer logged at the step of a checkpoint, the last first.

    Its own log comes first. The last checkpoint of the run has the entries of all steps.
    """
    own = [at(tree, "log_history") for tree in (checkpoint.tree, checkpoint.beside)]
    steps = (recorded.step(checkpoint), label.step, label.number)
    number = next((step for step in steps if step is not None), None)
    for log in (*own, *run.logs):
        for entry in reversed(log) if isinstance(log, list) and number is not None else ():
            if isinstance(entry, dict) and entry.get("step") == number:
                yield entry


def _reported(checkpoint: Checkpoint, label: Name, run: Run) -> Iterator[tuple[str, object]]:
    """Yield the metrics that ESPnet's reporter has of a checkpoint's epoch: `valid.acc`.

    ESPnet saves `12epoch.pth`, and the reporter in `checkpoint.pth` beside it.
    """
    folder = checkpoint.path.parent
    if folder not in run.reports:
        run.reports[folder] = _report_in(folder / _REPORT)
    own = at(checkpoint.tree, "reporter.stats")
    epochs = mapping(own if own is not None else run.reports[folder]) or {}
    epoch = at(checkpoint.tree, "reporter.epoch") if own is not None else label.epoch
    for part, values in (mapping(epochs.get(epoch)) or {}).items():
        for name, value in (mapping(values) or {}).items():
            yield f"{part}.{name}", value


def _report_in(path: Path) -> object:
    """Return the values by epoch in ESPnet's `checkpoint.pth`, or None."""
    try:
        if not path.is_file():
            return None
        opened = open_checkpoint(path)
    except SwaAvgError:  # another program's file
        return None
    opened.close()
    return at(opened.tree, "reporter.stats")


def _last_of(history: object, name: str) -> float | None:
    """Return the last value of a history in mmengine's message hub, except of validations.

    mmengine saves a checkpoint before it validates it, so that the last validation in the hub
    is mostly that of an earlier checkpoint.
    """
    array = at(history.state, "_log_history") if isinstance(history, Inert) else None
    state = array.state if isinstance(array, Inert) else None
    if name.startswith("val/") or not isinstance(state, tuple) or len(state) != 5:
        return None
    _, shape, _, _, data = state
    is_double = isinstance(data, bytes) and data and shape == (len(data) // 8,)
    return float(struct.unpack("<d", data[-8:])[0]) if is_double else None


def _scalars(checkpoint: Checkpoint, label: Name, run: Run) -> Mapping[str, object]:
    """Return what mmengine logged for the validation of a checkpoint."""
    folder = checkpoint.path.parent
    if folder not in run.scalars:
        run.scalars[folder] = list(_lines_of_scalars(folder))
    number = label.step if label.epoch is None else label.epoch
    lines = [line for line in run.scalars[folder] if line.get("step") == number]
    return lines[-1] if lines and number is not None else {}


def _lines_of_scalars(folder: Path) -> Iterator[Mapping[str, object]]:
    """Yield the lines of validations, of which `step` is the epoch or iteration."""
    if is_remote(folder) or not folder.is_dir():
        return
    for path in sorted(folder.glob(f"*/vis_data/{_SCALARS_FILE}")):
        if path.stat().st_size > _MOST_SCALARS_BYTES:
            continue
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and "step" in line and not {"iter", "lr"} & set(line):
                yield line


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
