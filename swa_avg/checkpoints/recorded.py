"""The epoch and step that a checkpoint records."""

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
            value = at(tree, path)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if value >= 0 and value == value // 1:  # stripped Ultralytics files have epoch -1
                return int(value)
    values = (checkpoint.metadata.get(text, "") for text in texts)
    return next((int(text) for text in values if text.isdecimal() and len(text) < 19), None)
