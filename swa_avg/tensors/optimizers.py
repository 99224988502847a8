"""Optimizer state among the names of a checkpoint, recognised by its structure.

Optimizer state has names of its own (`optimizer.state.…`), beside the model's names or
between them. A model may have a submodule called `optimizer`, so the prefix proves
nothing. The names of an optimizer's buffers do (Adam's `exp_avg`, `param_groups`).
This module reads no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

# The buffers that the classes of torch.optim, and classes derived from them, keep.
_KEPT = r"(?:max_)?exp_avg\w*|momentum_buffer|square_avg|acc_delta|exp_inf|param_groups"
_EVIDENCE = re.compile(rf"(?:^|\.)({_KEPT})(?=\.|$)")
_CALLED = re.compile(r"(?:^|\.)(?:[^.]*(?<![a-z]))?opt(?:im(?:izer)?s?)?(?![a-z])[^.]*(?=\.)")
# Every name of optimizer state contains one of these; a fast first search in many names.
_HINTS = ("opt", "exp_avg", "momentum_buffer", "square_avg", "acc_delta", "exp_inf", "param_groups")
_STATE = re.compile(r".*(?:^|\.)state(?=\.|$)")
_KEPT_NAME = re.compile(rf"^(?:{_KEPT})$", re.MULTILINE)
# The parts of an optimizer's state_dict.
_PARTS = {"state", "param_groups"}


def optimizer_groups(names: Collection[str]) -> dict[str, None]:
    """Return the dotted prefixes that contain only optimizer state.

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
    """Return the prefix that a match of `_EVIDENCE` belongs to; empty if it proves nothing."""
    before, after = name[: found.start()], name[found.end() + 1 :]
    called = _CALLED.search(before + ".")
    if called:
        return before[: called.end()]
    state = _STATE.match(before)
    if state:
        return state.group()
    # A tensor has no children, so names below a tensor's name are optimizer state.
    if before in names:
        return before
    return name[: found.end()] if after in names else ""


def in_groups(name: str, groups: Collection[str]) -> bool:
    """Return whether a name begins with one of the prefixes."""
    if not groups:
        return False
    return any(name[:at] in groups for at, char in enumerate(name) if char == ".")


def is_optimizer(names: Iterable[object]) -> bool:
    """Return whether a dict with these keys is the state of an optimizer."""
    texts = [name for name in names if isinstance(name, str)]
    # One search in all names is fast. A name may contain a line break, so a match is looked at.
    there = _KEPT_NAME.search("\n".join(texts))
    return bool(there) and any(map(_KEPT_NAME.fullmatch, texts))
