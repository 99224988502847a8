"""What one checkpoint holds: its state_dict, its place in the run, its metrics, its origin.

In: a `Checkpoint`. Out: a `StateDict` with the names of the plain model. Knows nothing of
other checkpoints.
"""

from swa_avg.checkpoints import metrics, provenance
from swa_avg.checkpoints.families import (
    BEFORE_QUANTISATION,
    BN_COUNTER,
    Family,
    Way,
)
from swa_avg.checkpoints.frameworks import Loads
from swa_avg.checkpoints.layout import (
    Finder,
    StateDict,
    check_choice,
    check_running,
    find_state_dict,
)
from swa_avg.checkpoints.membership import is_bn_buffer, members
from swa_avg.checkpoints.metrics import Score, mode_of
from swa_avg.checkpoints.modules import buffers_of
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
    "BEFORE_QUANTISATION",
    "BN_COUNTER",
    "UNKNOWN",
    "CheckpointReader",
    "Family",
    "Finder",
    "Loads",
    "Provenance",
    "Score",
    "Source",
    "StateDict",
    "Way",
    "at",
    "buffers_of",
    "check_choice",
    "check_running",
    "find_state_dict",
    "fingerprints",
    "is_bn_buffer",
    "made_from",
    "mapping",
    "members",
    "metrics",
    "mode_of",
    "open_checkpoint",
    "provenance",
    "refuse_repeats",
    "sources_of",
]
