"""BatchNorm statistics of a model over the user's batches.

In: a model and batches, or a file and the user's module. Out: new running statistics, in
the model or in the file. Knows nothing of averaging.
"""

from swa_avg.batchnorm.batches import Alone, Forward, blamed, same_draws, theirs
from swa_avg.batchnorm.recompute import Recompute, Session, copy_of, read_state, session
from swa_avg.batchnorm.statistics import Amp, BatchNormReport, Estimator, recompute_batchnorm
from swa_avg.batchnorm.userdata import UserCode, found, importable, load_weights, model_of

__all__ = [
    "Alone",
    "Amp",
    "BatchNormReport",
    "Estimator",
    "Forward",
    "Recompute",
    "Session",
    "UserCode",
    "blamed",
    "copy_of",
    "found",
    "importable",
    "load_weights",
    "model_of",
    "read_state",
    "recompute_batchnorm",
    "same_draws",
    "session",
    "theirs",
]
