"""Recomputes the BatchNorm statistics of a model over the user's batches.

In: a model and batches, or a file and the user's module. Out: new running statistics in the
model or in the file. Does not average.
"""

from swa_avg.batchnorm.batches import Alone, same_draws
from swa_avg.batchnorm.calling import Forward, default_forward
from swa_avg.batchnorm.in_place import Copy, copy_of
from swa_avg.batchnorm.isolation import (
    error_line,
    frames_of,
    importable,
    is_foreign,
    users_code,
)
from swa_avg.batchnorm.named import load_attribute
from swa_avg.batchnorm.recompute import BatchNorm, Session, read_state, session
from swa_avg.batchnorm.settings import Recompute
from swa_avg.batchnorm.statistics import (
    Amp,
    BatchNormReport,
    Estimator,
    check_model,
    recompute_batchnorm,
)
from swa_avg.batchnorm.userdata import UserCode, load_weights, model_of

__all__ = [
    "Alone",
    "Amp",
    "BatchNorm",
    "BatchNormReport",
    "Copy",
    "Estimator",
    "Forward",
    "Recompute",
    "Session",
    "UserCode",
    "check_model",
    "copy_of",
    "default_forward",
    "error_line",
    "frames_of",
    "importable",
    "is_foreign",
    "load_attribute",
    "load_weights",
    "model_of",
    "read_state",
    "recompute_batchnorm",
    "same_draws",
    "session",
    "users_code",
]
