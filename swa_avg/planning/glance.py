"""An early check of tensors that must be the same in all checkpoints.

Before the checkpoints are read, it compares the first few kilobytes of these tensors.
Tensors that differ after that are found while averaging.
"""

from __future__ import annotations

from collections.abc import Sequence

from swa_avg.checkpoints import StateDict
from swa_avg.errors import MismatchError
from swa_avg.planning.treatments import Planned
from swa_avg.storage import is_remote
from swa_avg.tensors import TensorRef

_MOST_TENSORS = 16
_MOST_BYTES = 16 << 10


def refuse_unlike(planned: Sequence[Planned], states: Sequence[StateDict]) -> None:
    """Refuse tensors that must be the same and already differ in their first bytes.

    Raises:
        MismatchError: Some tensors differ; it lists those that were compared.
    """
    last = states[-1]
    if len(states) < 2 or any(is_remote(state.checkpoint.path) for state in states):
        return  # requests to a server are slow
    must = [tensor for tensor in planned if tensor.must_agree][:_MOST_TENSORS]
    unlike = [
        tensor.refusal(last.checkpoint.path)
        for tensor in must
        if _differ([state.tensors[tensor.name] for state in states])
    ]
    if unlike:
        raise MismatchError(unlike)


def _differ(refs: Sequence[TensorRef]) -> bool:
    """Return whether the first bytes of contiguous tensors differ."""
    if any(ref.parts or not ref.contiguous for ref in refs):
        return False
    return len({_beginning(ref) for ref in refs}) > 1


def _beginning(ref: TensorRef) -> bytes:
    record = ref.record
    place = record.offset + ref.offset * ref.dtype.itemsize
    return record.file.read(place, min(ref.nbytes, _MOST_BYTES))
