"""The epoch, the step and the count of a running average that a checkpoint records."""

from __future__ import annotations

from swa_avg.checkpoints.tree import at
from swa_avg.formats import Checkpoint

# The places where frameworks record them; the first that exists is used.
_EPOCHS = (
    "epoch",
    "meta.epoch",  # mmengine
    "cur_epoch",  # icefall
    "extra_state.train_iterator.epoch",  # fairseq
    "extra_state.epoch",  # fairseq before 0.6
    "current_epoch",
    "epochs_run",  # torchtune
    "state.timestamp.Timestamp.epoch",  # Composer
    "state.timestamp.epoch",
)
_STEPS = (
    "global_step",  # Lightning, Trainer
    "global_steps",  # DeepSpeed
    "step",
    "iteration",  # detectron2
    "iter_num",  # nanoGPT
    "iter",
    "meta.iter",  # mmengine
    "batch_idx_train",  # icefall
    "num_updates",
    "optimizer_history.-1.num_updates",  # fairseq
    "state.timestamp.Timestamp.batch",  # Composer
    "state.timestamp.batch",
)

# The keys in the metadata of safetensors files; kohya uses the prefix ss_.
_EPOCH_TEXTS = ("epoch", "ss_epoch")
_STEP_TEXTS = ("global_step", "step", "ss_steps")


def epoch(checkpoint: Checkpoint) -> int | None:
    """Return the epoch that a checkpoint records, or None."""
    return _first(checkpoint, _EPOCHS, _EPOCH_TEXTS)


def step(checkpoint: Checkpoint) -> int | None:
    """Return the step that a checkpoint records, or None."""
    return _first(checkpoint, _STEPS, _STEP_TEXTS)


def _first(checkpoint: Checkpoint, paths: tuple[str, ...], texts: tuple[str, ...]) -> int | None:
    """Return the first whole number at one of `paths`, or in one of `texts` of the metadata."""
    for tree in (checkpoint.beside, checkpoint.tree):
        for path in paths:
            value = _whole(at(tree, path))  # stripped Ultralytics files have epoch -1
            if value is not None:
                return value
    values = (checkpoint.metadata.get(text, "") for text in texts)
    return next((int(text) for text in values if text.isdecimal() and len(text) < 19), None)


def count(checkpoint: Checkpoint, path: str, period: str = "") -> int | None:
    """Return the number of models in the running average of a checkpoint, or None.

    icefall adds a model each `average_period` steps, and records the number of steps.

    Args:
        checkpoint: The checkpoint.
        path: The dotted path of the number of models, or of steps if there is a period.
        period: The dotted path of the number of steps between models; empty if there is none.
    """
    steps = _whole(at(checkpoint.tree, path))
    between = _whole(at(checkpoint.tree, period)) if period else None
    return steps if steps is None or not between else steps // between


def _whole(value: object) -> int | None:
    """Return a value as an integer if it is a whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value >= 0 and value == value // 1 else None
