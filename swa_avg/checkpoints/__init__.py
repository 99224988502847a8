"""The content of one checkpoint: its state_dict, epoch and step, metrics, and provenance.

In: a `Checkpoint`. Out: a `StateDict` with the names of the plain model. `names` reads the
path of a checkpoint. Does not compare checkpoints.
"""

from swa_avg.checkpoints import metrics, names, provenance, words
from swa_avg.checkpoints.contents import NO_WEIGHTS, other_than_model
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
from swa_avg.checkpoints.membership import is_bn_buffer, leaf_of, members, module_of
from swa_avg.checkpoints.metrics import Score, mode_of
from swa_avg.checkpoints.names import Name, Number
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
    "NO_WEIGHTS",
    "UNKNOWN",
    "CheckpointReader",
    "Family",
    "Finder",
    "Loads",
    "Name",
    "Number",
    "Provenance",
    "Score",
    "Source",
    "StateDict",
    "Way",
    "at",
    "check_choice",
    "check_running",
    "find_state_dict",
    "fingerprints",
    "is_bn_buffer",
    "leaf_of",
    "made_from",
    "mapping",
    "members",
    "metrics",
    "mode_of",
    "module_of",
    "names",
    "open_checkpoint",
    "other_than_model",
    "provenance",
    "refuse_repeats",
    "sources_of",
    "words",
]
