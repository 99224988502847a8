"""What one checkpoint holds: its state_dict, its place in the run, its metrics, its origin.

In: a `Checkpoint`. Out: a `StateDict` with the names of the plain model. Knows nothing of
other checkpoints.
"""

from swa_avg.checkpoints import metrics, provenance
from swa_avg.checkpoints.layout import BN_COUNTER, Finder, StateDict, find_state_dict, is_bn_buffer
from swa_avg.checkpoints.metrics import Score, mode_of
from swa_avg.checkpoints.provenance import (
    UNKNOWN,
    Provenance,
    Source,
    fingerprints,
    made_from,
    refuse_repeats,
    sources_of,
)
from swa_avg.checkpoints.reader import CheckpointReader, open_checkpoint
from swa_avg.checkpoints.tree import at, mapping

__all__ = [
    "BN_COUNTER",
    "UNKNOWN",
    "CheckpointReader",
    "Finder",
    "Provenance",
    "Score",
    "Source",
    "StateDict",
    "at",
    "find_state_dict",
    "fingerprints",
    "is_bn_buffer",
    "made_from",
    "mapping",
    "metrics",
    "mode_of",
    "open_checkpoint",
    "provenance",
    "refuse_repeats",
    "sources_of",
]
