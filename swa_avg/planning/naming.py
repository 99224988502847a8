"""The names of several outputs, from a pattern such as `merged/{step}.pt`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from string import Formatter

from swa_avg.checkpoints import Number, StateDict
from swa_avg.errors import OutputError, SelectionError
from swa_avg.planning.order import Member, members, numbers_of

FIELDS = ("step", "epoch", "name", "last")


def check_pattern(pattern: str, lasts: Sequence[int]) -> None:
    """Refuse a pattern that cannot name the outputs of windows.

    Args:
        pattern: The pattern of the outputs' names.
        lasts: The lengths of the windows.

    Raises:
        ValueError: The pattern is invalid, or gives several outputs the same name.
    """
    found = []
    for _, name, _, conversion in Formatter().parse(pattern):
        if name is None:
            continue
        if name not in FIELDS or conversion:
            wanted = ", ".join(f"{{{field}}}" for field in FIELDS)
            given = f"{name}!{conversion}" if conversion else name
            raise ValueError(f"the output's name has {{{given}}}; use {wanted}")
        found.append(name)
    if not {"step", "epoch", "name"} & set(found):
        raise ValueError(
            "each average needs a name of its own; name them with {step}, {epoch} or {name}, "
            "as in 'merged/{step}.pt'"
        )
    if len({*lasts}) > 1 and "last" not in found:
        raise ValueError(
            "windows of several lengths need {last} in the output's name, as in "
            "'merged/{step}_{last}.pt'"
        )


def names_of(pattern: str, states: Sequence[StateDict], windows: Sequence[range]) -> list[str]:
    """Return the names of the outputs, one for each window.

    Args:
        pattern: The pattern of their names.
        states: All checkpoints, in order.
        windows: The numbers of the checkpoints of each window.

    Raises:
        SelectionError: A checkpoint has no such number, or its format is invalid.
        OutputError: Two outputs would have the same name.
    """
    known = members(states)
    epochs, steps = numbers_of(known, "epoch"), numbers_of(known, "step")
    own = _names(known)
    taken: dict[str, str] = {}
    names: list[str] = []
    for window in windows:
        last = window[-1]
        values = {
            "step": steps[last],
            "epoch": epochs[last],
            "name": own[last],
            "last": len(window),
        }
        name = _filled(pattern, values, known[last])
        what = f"the last {len(window)} at {known[last].path}"
        same = taken.setdefault(os.path.normpath(name), what)
        if same != what:
            raise OutputError(
                f"would be the name of two averages: of {same}, and of {what}",
                file=name,
                remedy=_distinct(epochs, steps, own),
            )
        names.append(name)
    return names


def _names(known: Sequence[Member]) -> list[str]:
    """Return the names of checkpoints without the suffixes of files.

    If several files have the same name, as in `step_1/model.pt`, they are those of the folders.
    """
    paths = [member.path for member in known]
    files = [path.name if path.is_dir() else path.stem for path in paths]
    folders = [path.parent.name for path in paths]
    return folders if len({*files}) < len({*folders}) == len(files) else files


def _distinct(*fields: Sequence[object]) -> str:
    """Return the remedy for outputs of the same name: a field that tells checkpoints apart.

    Args:
        *fields: The epoch, the step and the name of each checkpoint.
    """
    for field, values in zip(("name", "step", "epoch"), reversed(fields), strict=True):
        if None not in values and len({*values}) == len(values):
            return f"Use {{{field}}} in the outputs' names"
    return "Give the checkpoints different names, and use {name} in the outputs' names"


def _filled(pattern: str, values: dict[str, Number | str | None], member: Member) -> str:
    parts: list[str] = []
    for text, field, form, _ in Formatter().parse(pattern):
        parts.append(text)
        if field is None:
            continue
        value = values[field]
        if value is None:
            there = next(name for name in ("epoch", "step", "name") if values[name] is not None)
            raise SelectionError(
                f"has no {field}, neither in the file nor in its name",
                file=member.path,
                remedy=f"Use {{{there}}} in place of {{{field}}} in the outputs' names",
            )
        try:
            parts.append(format(value, form or ""))
        except ValueError as error:
            raise SelectionError(
                f"{{{field}:{form}}} does not fit the {field} {value}: {error}"
            ) from error
    return "".join(parts)
