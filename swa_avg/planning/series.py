"""Checks that a set of checkpoints belongs to one run.

Parts of one model are refused. Averages among the checkpoints are left out with a note.
Several series of names are refused if they cannot be of one run, else there is a note.
`names` reads the names, `order` orders the checkpoints, and `notes` has the notes on the chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from itertools import combinations
from shlex import quote
from typing import Any, TypeVar

from swa_avg.checkpoints import provenance, words
from swa_avg.errors import AlreadyAveragedError, MismatchError, SwaAvgError, listed
from swa_avg.formats import component_of
from swa_avg.planning.inputs import exclusion, leaving_out
from swa_avg.planning.order import Member, grouped
from swa_avg.storage import is_remote

_Key = TypeVar("_Key")
_INDEX = "*.index.json"
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?")
_WORD = re.compile(r"[^\W\d_]+")
_LETTER = re.compile(r"(?<![^\W\d_])[A-Z](?![^\W\d_])")
# A number of at most four digits of how many: ckpt_3_of_10, but not shard_3_of_10 or fold_3_of_10.
_COUNTED = re.compile(
    r"(?<![0-9])(?P<word>[^\W\d_]*)[-_. ]?[0-9]{1,4}[-_. ]?of[-_. ]?[0-9]{1,4}(?![0-9])"
)


def without_averages(given: Sequence[Member], notes: list[str]) -> list[Member]:
    """Leave out averages among checkpoints, and note which ones.

    Averages of swa-avg are recognised by their metadata, those of torch's AveragedModel by
    their counter, and averages of other tools by their names. If all inputs are averages of
    other tools, they are the checkpoints. Averages of swa-avg never are, because each
    weighs as much as the checkpoints that it was made from.

    Raises:
        SelectionError: All inputs are averages of swa-avg.
    """
    ours = [member for member in given if provenance.of(member.state.checkpoint)]
    if ours and len(ours) == len(given):
        raise _only_averages(ours)
    if ours:
        notes.append(_note_on_ours(ours))
    rest = [member for member in given if member not in ours]
    averages = [member for member in rest if _is_average(member)]
    if averages and not _are_checkpoints(averages, rest):
        one = len(averages) == 1
        notes.append(
            f"left out, because {'it is an average' if one else 'they are averages'}: "
            f"{listed([str(member.path) for member in averages])}; "
            f"to average {'it' if one else 'them'}, give no other checkpoints"
        )
        rest = [member for member in rest if member not in averages]
    return rest


def _only_averages(ours: Sequence[Member]) -> AlreadyAveragedError:
    """Return the error for inputs that are all averages of swa-avg."""
    return AlreadyAveragedError(
        "is already an average, and no other checkpoints were given",
        file=ours[0].path,
        remedy="To add checkpoints to it, or to write it again, give it with --start-from"
        if len(ours) == 1
        else "To merge averages, give each with --start-from",
    )


def _note_on_ours(ours: Sequence[Member]) -> str:
    """Return the note on averages of swa-avg among other checkpoints."""
    first, *more = ours
    if not more:
        return f"{first.path}: is already an average; left out (to include it, use --start-from)"
    return (
        f"{first.path} and {len(more)} more are already averages; left out (to include them, "
        "use --start-from)"
    )


def _are_checkpoints(averages: Sequence[Member], given: Sequence[Member]) -> bool:
    """Return whether apparent averages are the checkpoints themselves.

    They are if the other inputs are only a best or a last checkpoint. The name of the run
    may contain "swa": swa_run_epoch_1.pt to swa_run_epoch_9.pt, and best.pt.
    """
    others = [member for member in given if member not in averages]
    loose = all(member.name.role and not member.is_placed for member in others)
    placed = [member for member in averages if member.name.is_placed]
    return not others or (loose and len(placed) > 1 and len(placed) == len(averages))


def _is_average(member: Member) -> bool:
    return member.state.counter is not None or bool(member.name.average)


def refuse_parts(given: Sequence[Member], notes: list[str]) -> None:
    """Refuse parts of one model, such as the files of two ranks.

    Raises:
        MismatchError: Two inputs are different parts.
    """
    for group in grouped(given, lambda member: member.name.whole).values():
        parts = grouped(group, lambda member: member.name.parts)
        if len(parts) < 2 or _are_of_machines(parts):
            continue
        if _are_counted(group):
            notes.append(
                f"{listed([str(member.path) for member in group])}: read as checkpoints of one "
                "run, not as parts of a model, because all have the same tensors"
            )
            continue
        (this, *_), (other, *_) = list(parts.values())[:2]
        raise _disagreement(
            f"contains {_of_parts(this)} of a model, but {other.path} contains {_of_parts(other)}",
            file=this.path,
            expected="whole checkpoints, or the same part of each",
            remedy=_for_parts(parts),
        )


def _are_of_machines(parts: Mapping[_Key, Sequence[Member]]) -> bool:
    """Return whether the words for parts only name the machines that saved the checkpoints.

    A run that goes on elsewhere saves gpu01_epoch_3.pt and gpu02_epoch_4.pt. Parts of one model
    are saved at the same step.
    """
    every = [member for group in parts.values() for member in group]
    labels = {label for member in every for label, _ in member.name.parts}
    places = [{member.name.place for member in group} for group in parts.values()]
    placed = all(member.name.is_placed and member.name.parts for member in every)
    return (
        placed and labels <= words.MACHINES and len(set().union(*places)) == sum(map(len, places))
    )


def _are_counted(group: Sequence[Member]) -> bool:
    """Return whether the numbers in ckpt_3_of_10.pt count the checkpoints of a run.

    Parts that Hugging Face numbers so have five digits, and different tensors.
    """
    counts = [_COUNTED.search(member.name.text) for member in group]
    if not all(count and count["word"].lower() in words.CHECKPOINT_NOUNS for count in counts):
        return False
    if any(len(member.name.parts) != 1 or member.name.is_placed for member in group):
        return False
    return _are_alike(group)


def _are_alike(group: Sequence[Member]) -> bool:
    """Return whether all checkpoints have tensors of the same names and shapes."""
    first, *others = (
        {name: view.shape for name, view in member.state.views.items()} for member in group
    )
    return all(other == first for other in others)


def refuse_components(given: Sequence[Member]) -> None:
    """Refuse different models of a checkpoint: a unet has no mean with a text encoder.

    Raises:
        MismatchError: Two inputs are different models.
    """
    local = [member for member in given if not is_remote(member.path)]
    models = grouped(local, lambda member: component_of(member.path))
    models.pop("", None)
    if len(models) > 1:
        (name, first), *rest = models.items()
        (other, others), *_ = rest
        raise _disagreement(
            f"is {name} of a checkpoint, and {others[0].path} is {other}",
            file=first[0].path,
            expected="the same model of each checkpoint",
            remedy=_leaving_out([member for _, group in rest for member in group], given),
        )


def _of_parts(member: Member) -> str:
    parts = (f"{label} {number}" for label, number in member.name.parts)
    return ", ".join(parts) or "the whole"


def _for_parts(parts: Mapping[_Key, Sequence[Member]]) -> str:
    """Return the remedy for parts: give a folder, average each part, or merge them."""
    every = [member for group in parts.values() for member in group]
    folders = [] if any(is_remote(m.path) for m in every) else [m.path.parent for m in every]
    folders = list(dict.fromkeys(folders))
    if folders and all(any(folder.glob(_INDEX)) for folder in folders):
        return f"Give {' '.join(quote(str(folder)) for folder in folders[:8])} instead"
    several = [group for group in parts.values() if len(group) > 1 and group[0].name.parts]
    if several:
        name = several[0][0].name
        pattern = escape(str(name.path).removesuffix(name.text)) + name.part_pattern
        matching = [member for member in every if fnmatchcase(str(member.path), pattern)]
        if matching == list(several[0]):
            return f"Average each part separately, as in {quote(pattern)}"
    merge = "Merge them into one file first, with the framework that wrote them"
    if _are_alike(every):
        return f"{merge}. If each is a whole model, rename them: epoch_1{every[0].path.suffix}, …"
    return merge


def refuse_mixed(given: Sequence[Member]) -> None:
    """Refuse series that cannot be of one run.

    Two series cannot be of one run if they have several epochs or steps in common, or no
    tensor name in common.

    Raises:
        MismatchError: There are such series.
    """
    series = _series(given)
    if len(series) < 2 or all(len(group) == 1 for group in series.values()):
        return
    largest = max(series.values(), key=len)
    for group in series.values():
        if group is not largest and not (
            group[0].state.views.keys() & largest[0].state.views.keys()
        ):
            raise _disagreement(
                f"has no tensor in common with {largest[0].path}",
                file=group[0].path,
                expected="checkpoints of one model",
                remedy=_leaving_out(group, given),
            )
    for one, other in combinations(series.values(), 2):
        places = _places(one) & _places(other)
        if len(places) > 1:
            option = _leaving_out(other, given)
            merge = "to merge averages of several runs, use --start-from"
            raise _disagreement(
                f"has {len(places)} epochs or steps in common with the series of {one[0].path}",
                file=other[0].path,
                expected="checkpoints of one run",
                remedy=f"{option}; {merge}" if option else merge.capitalize(),
            )


def _disagreement(found: str, **where: Any) -> MismatchError:
    return MismatchError([SwaAvgError(found, **where)])


def _leaving_out(group: Sequence[Member], given: Sequence[Member]) -> str:
    """Return a remedy that leaves out exactly one group of checkpoints, if there is one."""
    rest = [member.path for member in given if member not in group]
    return leaving_out([member.path for member in group], rest)


def _places(group: Sequence[Member]) -> set[object]:
    """Return the epochs and steps of a series: the recorded ones, else those in the names.

    Equal values in all files of a series do not count, because many scripts record a
    constant.
    """
    recorded = {member.recorded for member in group}
    if len(recorded) > 1:
        return {("recorded", place) for place in recorded - {(None, None)}}
    return {("named", member.name.place) for member in group if member.name.is_placed}


def notes_on(chosen: Sequence[Member]) -> Iterator[str]:
    """Yield a note if checkpoints of several series are averaged together."""
    series = _series(chosen)
    if len(series) < 2 or not (
        any(len(group) > 1 or group[0].is_placed for group in series.values())
        or _are_several_runs(series)
    ):
        return
    described = [_described(group) for group in series.values()]
    fewest = min(series.values(), key=len)
    rest = [member.path for member in chosen if member not in fewest]
    option = exclusion([member.path for member in fewest], rest)
    without = f"; to leave out {_described(fewest)}, add {option}" if option else ""
    yield f"several series are averaged together: {listed(described, 5)}{without}"


def _are_several_runs(series: Iterable[str]) -> bool:
    """Return whether names differ in a number, letter or word that tells runs or models apart.

    Examples are seed_1 and seed_2, net_G_A and net_G_B, generator and discriminator.
    """
    alike = [_LETTER.sub("#", _NUMBER.sub("#", name)) for name in series]
    models = {frozenset(_WORD.findall(name.lower())) & words.MODELS for name in series}
    return len(set(alike)) < len(alike) or len(models) > 1


def _described(group: Sequence[Member]) -> str:
    if len(group) == 1:
        return str(group[0].path)
    return f"{group[0].path} and {len(group) - 1} more like it"


def _series(given: Sequence[Member]) -> Mapping[str, list[Member]]:
    """Group checkpoints by their series; names in which several numbers vary are one series."""
    series = grouped(given, lambda member: member.name.series)
    alone = all(len(group) == 1 for group in series.values())
    places = {member.name.place for member in given}
    if alone and len(places) == len(given) and len({member.name.shape for member in given}) == 1:
        return {"": list(given)}
    return series
