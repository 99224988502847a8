"""Whether checkpoints agree: in the names, shapes and dtypes of their tensors, by their headers.

The output has those of the last checkpoint, so all are compared with it. If it is the odd one
out, the others are compared with each other, so that the message names the odd one.

Of the tensors that must be the same in all checkpoints, the first few kilobytes are compared,
too. Tensors that differ after that are found while averaging.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from swa_avg.checkpoints import StateDict, members
from swa_avg.errors import MismatchError, SwaAvgError, counted, listed
from swa_avg.planning.inputs import exclusion
from swa_avg.planning.treatments import Planned, Rules, treatments
from swa_avg.storage import is_remote
from swa_avg.tensors import Kind, TensorRef

_MOST_TENSORS = 16
_MOST_BYTES = 16 << 10
_OF_ONE_MODEL = "Average checkpoints of one model"


def disagreements(
    states: Sequence[StateDict], rules: Rules, planned: Mapping[str, Planned]
) -> list[SwaAvgError]:
    """Return one error for each way in which a checkpoint does not agree with most of them.

    Args:
        states: The state_dicts, in the order of the run.
        rules: The rules for tensors.
        planned: The treatment of the tensors of the last one.
    """
    last = states[-1]
    odd = _unlike(states, last, rules, planned)
    if not odd:
        return []
    of_others = _treated(odd, rules)
    others = _unlike(odd, odd[-1], rules, of_others)
    if len(odd) - len(others) > len(states) - len(odd):
        last, planned = odd[-1], of_others
        odd = _unlike(states, last, rules, planned)
    apart = set(map(id, odd))
    most = [state for state in states if id(state) not in apart]
    remedy = _leaving_out(odd, most) if len(most) > max(1, len(odd)) else _OF_ONE_MODEL
    return [e for state in odd for e in _differences(state, last, rules, planned, remedy)]


def _treated(states: Sequence[StateDict], rules: Rules) -> dict[str, Planned]:
    return treatments(states, rules, len(states), members(states[-1].tensors))


def _unlike(
    states: Sequence[StateDict],
    model: StateDict,
    rules: Rules,
    planned: Mapping[str, Planned],
) -> list[StateDict]:
    """Return the checkpoints that do not agree with one of them."""
    return [one for one in states if any(True for _ in _differences(one, model, rules, planned))]


def _leaving_out(odd: Sequence[StateDict], others: Sequence[StateDict]) -> str:
    """Return a remedy that leaves out some checkpoints, if an option can do that."""
    agree = f"The other {len(others)} agree with each other"
    if any(state.checkpoint.provenance or state.counter for state in odd):
        return agree  # averages to continue from, which no option leaves out
    paths, rest = ([one.checkpoint.path for one in some] for some in (odd, others))
    option = exclusion(paths, rest)
    them = "it" if len(odd) == 1 else "them"
    return f"{agree}: leave {them} out with {option}" if option else agree


def _differences(
    state: StateDict,
    model: StateDict,
    rules: Rules,
    planned: Mapping[str, Planned],
    remedy: str = _OF_ONE_MODEL,
) -> Iterator[SwaAvgError]:
    """Yield each way in which a checkpoint does not agree with another one.

    Args:
        state: The checkpoint.
        model: The other one.
        rules: The rules for tensors.
        planned: The treatment of the tensors of the other one.
        remedy: The remedy, unless a dtype is all that differs.
    """
    if state.views is model.views:
        return
    path, other = state.checkpoint.path, model.checkpoint.path
    missing = [name for name in model.tensors if name not in state.tensors]
    extra = [name for name in state.tensors if name not in model.tensors]
    for names, has, hasnt in ((missing, "lacks", "has"), (extra, "has", "lacks")):
        if names:
            yield SwaAvgError(
                f"{has} {counted(len(names), 'tensor')} that {other} {hasnt}: {listed(names)}",
                file=path,
                remedy=remedy,
            )
    for name, ref in state.tensors.items():
        wanted = model.tensors.get(name)
        if wanted is None or planned[name].alone:
            continue
        if ref.shape != wanted.shape:
            yield SwaAvgError(
                f"has shape {list(ref.shape)}",
                file=path,
                tensor=name,
                expected=f"{list(wanted.shape)} as in {other}",
                remedy=remedy,
            )
            continue
        floats = ref.dtype.kind is wanted.dtype.kind is Kind.FLOAT
        if ref.dtype != wanted.dtype and not (floats and rules.dtype):
            yield SwaAvgError(
                f"has dtype {ref.dtype}",
                file=path,
                tensor=name,
                expected=f"{wanted.dtype} as in {other}",
                remedy=f"Choose one with --dtype {wanted.dtype}" if floats else remedy,
            )


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
