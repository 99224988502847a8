"""Reading pickles without running them.

In: the bytes of a pickle, and a `Budget` that limits how much is built from them. Out:
containers, plain values, and a `View` for each tensor. Does not depend on file formats.
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
    leaves,
    rebuilt,
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
    "leaves",
    "rebuilt",
    "state_dict_of",
    "unpickler",
]
