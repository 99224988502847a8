"""Detects files without a model: optimizer state, random number states, schedulers.

Detection uses only the content. A model has floating tensors under names that do not belong
to an optimizer. This module does not read tensors and does not locate the model in a file;
`layout` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from swa_avg.checkpoints.tree import mapping
from swa_avg.pickles import UnreadableTensor
from swa_avg.tensors import Kind, TensorRef, View, is_optimizer

OPTIMIZER = "optimizer state"
RANDOM = "random number states"
SCALER = "the state of a gradient scaler"
SCHEDULER = "the state of a scheduler"
NO_WEIGHTS = "no weights under names"

# The keys that identify a dict: torch.optim.Optimizer, torch.amp.GradScaler,
# torch.optim.lr_scheduler (LRScheduler, ReduceLROnPlateau), SpeechBrain's NoamScheduler.
_SIGNS = (
    (OPTIMIZER, frozenset({"state", "param_groups"})),
    (SCALER, frozenset({"growth_factor", "growth_interval"})),
    (SCHEDULER, frozenset({"last_epoch", "_step_count"})),
    (SCHEDULER, frozenset({"base_lrs", "last_epoch"})),
    (SCHEDULER, frozenset({"num_bad_epochs", "patience"})),
    (SCHEDULER, frozenset({"n_warmup_steps", "n_steps"})),
)
# Names in a flat file of optimizer state: `state/0/exp_avg`, `exp_avg_sq.layer.weight`.
_OF_ADAM = re.compile(r"(?P<group>(?:.*[./])?)(?:exp_avg(?:_sq)?|momentum_buffer)(?:$|[./])")
_WITH_MEAN = (Kind.FLOAT, Kind.COMPLEX)
_DEPTH = 5
_MOST_ITEMS = 100_000


def other_than_model(tree: object) -> str | None:
    """Return a description of the content of a file without a model, or None if it may have one.

    Args:
        tree: The saved object.
    """
    seen = _Seen()
    if seen.has_weights(tree, _DEPTH):
        return None
    kinds = (OPTIMIZER, SCALER, SCHEDULER, RANDOM)
    return next((kind for kind in kinds if kind in seen.kinds), NO_WEIGHTS)


class _Seen:
    """A walk through a file that records the kinds of state found."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self._left = _MOST_ITEMS
        self._known: set[int] = set()

    def has_weights(self, value: object, depth: int) -> bool:
        """Return whether there are named weights, and record other kinds of state."""
        entries = mapping(value)
        if entries is None:
            return isinstance(value, list | tuple) and self._in_list(value, depth)
        if depth == 0 or id(value) in self._known:
            return False
        self._known.add(id(value))
        signs = set(_signs(entries))
        self.kinds |= signs
        names = [name for name in entries if not self._is_of_optimizer(name, signs)]
        if is_optimizer(entries):  # the tensors of one optimizer, beside its exp_avg
            signs.add(OPTIMIZER)
            self.kinds.add(OPTIMIZER)
        flat = _optimizer_groups(names)
        if flat:
            self.kinds.add(OPTIMIZER)
            names = [name for name in names if not _OF_ADAM.match(str(name))]
            names = [name for name in names if not str(name).startswith(flat)]
        # Tensors first: the first weight ends the search.
        own = () if signs - {RANDOM} else self._counted(names)
        if any(_is_weight(entries[name]) for name in own):
            return True
        return any(self.has_weights(entries[name], depth - 1) for name in names)

    def _in_list(self, values: list[object] | tuple[object, ...], depth: int) -> bool:
        """Look into what was saved as a list: several optimizers, a model and its epoch."""
        found = [
            self.has_weights(value, depth - 1)
            for value in (self._counted(values) if depth == _DEPTH else ())
            if mapping(value) is not None
        ]
        return any(found)

    def _counted(self, items: Iterable[object]) -> Iterable[object]:
        for item in items:
            self._left -= 1
            if self._left < 0:
                return
            yield item

    def _is_of_optimizer(self, name: object, signs: set[str]) -> bool:
        """Return whether the name of an entry marks optimizer state: `optimizer`, `optim.state`."""
        first = name.partition(".")[0].lower() if isinstance(name, str) else ""
        found = first.startswith("optim") or first.endswith(("optimizer", "optimizers"))
        if found:
            self.kinds.add(OPTIMIZER)
        return found or (OPTIMIZER in signs and first in ("state", "param_groups"))


def _optimizer_groups(names: Iterable[object]) -> tuple[str, ...]:
    """Return the prefixes of the names of optimizer state in a flat file, or nothing."""
    texts = (name for name in names if isinstance(name, str))
    found = {match["group"] for text in texts if (match := _OF_ADAM.match(text))}
    # Without a prefix only the names themselves are known: no name begins with a line end.
    return tuple(group or "\n" for group in found)


def _signs(entries: Mapping[object, object]) -> Iterator[str]:
    """Yield the kinds of state that the keys of a dict identify."""
    for kind, names in _SIGNS:
        if all(name in entries for name in names):
            yield kind
    texts = [name.lower() for name in entries if isinstance(name, str)]
    # transformers uses python, numpy, cpu; accelerate uses random_state, numpy_random_seed.
    if {"python", "numpy"} <= set(texts) or any("rng" in t or "random" in t for t in texts):
        yield RANDOM


def _is_weight(value: object) -> bool:
    if isinstance(value, UnreadableTensor):
        return True
    return isinstance(value, View | TensorRef) and value.dtype.kind in _WITH_MEAN
