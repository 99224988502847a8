"""Pickles, read without running them: what torch pickled becomes plain values and views.

In: bytes of a pickle, and a `Budget` that limits what they may make. Out: containers,
plain values, and a `View` for each tensor. Knows nothing of file formats.
"""

from swa_avg.pickles import unpickler
from swa_avg.pickles.budget import MOST_SAFETENSORS_HEADER, MOST_STRING_BYTES, Budget
from swa_avg.pickles.modules import buffers_of, state_dict_of
from swa_avg.pickles.pickled import (
    STORAGE_DTYPES,
    Dict,
    Global,
    Inert,
    Pickled,
    Stream,
    UnreadableTensor,
    described,
    holds_stream,
)
from swa_avg.pickles.references import check_shape

__all__ = [
    "MOST_SAFETENSORS_HEADER",
    "MOST_STRING_BYTES",
    "STORAGE_DTYPES",
    "Budget",
    "Dict",
    "Global",
    "Inert",
    "Pickled",
    "Stream",
    "UnreadableTensor",
    "buffers_of",
    "check_shape",
    "described",
    "holds_stream",
    "state_dict_of",
    "unpickler",
]
