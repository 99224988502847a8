"""Optimizer state among the names of a checkpoint, recognised by its structure.

Optimizers save under names of their own (`optimizer.state.…`), beside the
model or in its midst. A model may have a submodule called `optimizer` as well,
so that a name alone is no proof: what optimizers keep for each parameter is
(Adam's `exp_avg`, `param_groups`). Nothing here reads a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

# What torch.optim's classes, and those derived from them, keep of each parameter.
_KEPT = r"(?:max_)?exp_avg\w*|momentum_buffer|square_avg|acc_delta|exp_inf|param_groups"
_EVIDENCE = re.compile(rf"(?:^|\.)({_KEPT})(?=\.|$)")
_CALLED = re.compile(r"(?:^|\.)(?:[^.]*(?<![a-z]))?opt(?:im(?:izer)?s?)?(?![a-z])[^.]*(?=\.)")
# One of these is in every name that is an optimizer's: quickly looked for in many names.
_HINTS = ("opt", "exp_avg", "momentum_buffer", "square_avg", "acc_delta", "exp_inf", "param_groups")
_STATE = re.compile(r".*(?:^|\.)state(?=\.|$)")
# The parts of an optimizer's state_dict.
_PARTS = {"state", "param_groups"}


def optimizer_groups(names: Collection[str]) -> dict[str, None]:
    """Return the dotted prefixes under which only optimizer state stands.

    Args:
        names: All names of a state_dict or a folder.
    """
    groups: dict[str, None] = {}
    there = "\n".join(names)
    hints = [hint for hint in _HINTS if hint in there]
    hinting = [name for name in names if any(hint in name for hint in hints)] if hints else []
    for name in hinting:
        found = _EVIDENCE.search(name)
        if found:
            group = _group_of(name, found, names)
            groups.update({group: None} if group else {})
    parts: dict[str, set[str]] = {}
    for name in hinting:
        called = _CALLED.search(name)
        if called:
            below = [part for part in name[called.end() + 1 :].split(".") if not part.isdecimal()]
            parts.setdefault(name[: called.end()], set()).update(below[:1])
    groups.update({group: None for group, below in parts.items() if below and below <= _PARTS})
    return groups


def _group_of(name: str, found: re.Match[str], names: Collection[str]) -> str:
    """Return the group that a piece of evidence stands in; empty if it proves nothing."""
    before, after = name[: found.start()], name[found.end() + 1 :]
    called = _CALLED.search(before + ".")
    if called:
        return before[: called.end()]
    state = _STATE.match(before)
    if state:
        return state.group()
    # A tensor has no children: what stands below its name is kept of it.
    if before in names:
        return before
    return name[: found.end()] if after in names else ""


def in_groups(name: str, groups: Collection[str]) -> bool:
    """Tell whether a name stands below one of the prefixes."""
    if not groups:
        return False
    return any(name[:at] in groups for at, char in enumerate(name) if char == ".")


def is_optimizer(names: Iterable[object]) -> bool:
    """Tell whether a dict with these keys is what an optimizer keeps."""
    return any(isinstance(name, str) and re.fullmatch(_KEPT, name) for name in names)
