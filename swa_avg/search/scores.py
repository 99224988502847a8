"""How good a model is, as the user's own function says: scores, and which way is better.

`evaluate(model)` returns a number, or a mapping of names to numbers of which one
counts. Whether a small or a large one is good is asked, or told by the metric's
name; it is never guessed. Knows no averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swa_avg.batchnorm import (
    Recompute,
    Session,
    found,
    importable,
    load_weights,
    model_of,
    read_state,
    same_draws,
    session,
    users_code,
)
from swa_avg.checkpoints import StateDict, mode_of
from swa_avg.errors import DataError, SelectionError, listed

Evaluate = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Scale:
    """What is measured.

    Attributes:
        name: What the score is called.
        mode: Whether a small (min) or a large (max) one is good.
    """

    name: str
    mode: str

    def is_better(self, one: float, other: float) -> bool:
        """Tell whether a score is better than another, and not just as good."""
        return one < other if self.mode == "min" else one > other


class Judge:
    """The user's `evaluate`, and the model that it is given.

    Args:
        evaluate: Is called with the model, in eval mode, where and as it was made.
        model: Takes the weights to be judged.
        called: The name of `evaluate`.
        metric: The name of the score, and of its entry where there are several.
        mode: min or max, where neither name tells.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        model: nn.Module,
        called: str,
        metric: str | None = None,
        mode: str | None = None,
    ) -> None:
        self.model = model
        self._evaluate = evaluate
        self._called = called
        self._metric = metric
        self._mode = mode
        self._scale: Scale | None = None

    @property
    def scale(self) -> Scale:
        """What is measured; known when something has been."""
        assert self._scale is not None, "nothing has been judged yet"
        return self._scale

    def score(self, state: StateDict, whose: str) -> float:
        """Return the score of a state_dict.

        Args:
            state: Is loaded into the model.
            whose: What it is, for people.

        Raises:
            DataError: `evaluate` raises, or gives no finite number; or the model does
                not take these weights.
            SelectionError: Nothing tells which way is better.
        """
        load_weights(self.model, read_state(state))
        doing = f"{self._called} of {whose}: "
        with users_code(f"{type(self.model).__name__}.eval(): "):
            self.model.eval()
        with same_draws(), users_code(doing):
            result = self._evaluate(self.model)
        entry = self._entry(result, doing) if isinstance(result, Mapping) else None
        if self._scale is None:
            self._scale = self._measured(entry)
        return _number(result if entry is None else result[entry], doing)  # type: ignore[index]

    def _entry(self, result: Mapping[Any, object], doing: str) -> Any:
        """Return the key of the entry that counts."""
        if self._metric in result:
            return self._metric
        if self._metric is None and len(result) == 1:
            return next(iter(result))
        there = listed([str(key) for key in result], 10) or "nothing"
        found = f"gives {there}" + (f", but no {self._metric}" if self._metric else "")
        raise DataError(doing + found, remedy="Say which of them counts with --metric NAME")

    def _measured(self, entry: Any) -> Scale:
        """Say what is measured, from what the user calls it."""
        if entry is not None:
            names = [str(entry)]
        else:
            names = [name for name in (self._metric, self._called) if name]
        modes = {mode for name in names if (mode := mode_of(name))}
        if self._mode:
            modes = {self._mode}
        if len(modes) != 1:
            raise SelectionError(
                f"nothing tells whether a small or a large {names[0]} is good",
                remedy="Say it with --mode min or --mode max",
            )
        return Scale(names[0], modes.pop())


@contextmanager
def judged(
    evaluate: str,
    recompute: Recompute | None,
    *,
    model: str | None = None,
    metric: str | None = None,
    mode: str | None = None,
) -> Iterator[tuple[Judge, Session | None]]:
    """Load the user's code; inside the `with` it can still import.

    Args:
        evaluate: `MOD:ATTR` of the function.
        recompute: What to recompute BatchNorm statistics with, if that is wanted.
        model: `MOD:ATTR` of the model; by default `model` of the data's module, else
            of `evaluate`'s.
        metric: As for `Judge`.
        mode: As for `Judge`.

    Returns:
        Who judges, and who recomputes BatchNorm statistics.

    Raises:
        DataError: Something that is named is not there, or of no use.
    """
    folder = recompute.folder if recompute else Path.cwd()
    with ExitStack() as opened:
        opened.enter_context(importable(folder))
        module, function = found(evaluate, folder)
        if not callable(function):
            raise DataError(
                f"{evaluate} is of type {type(function).__name__}",
                expected="a function evaluate(model)",
            )
        called = evaluate.rpartition(":")[2].rpartition(".")[2]
        bn: Session | None = None
        if recompute:
            if model is None and not hasattr(found(recompute.data, folder)[0], "model"):
                model = f"{evaluate.rpartition(':')[0]}:model"
            bn = opened.enter_context(session(replace(recompute, model=model)))
        network = bn.model if bn else model_of(module, evaluate, model, folder)
        yield Judge(function, network, called, metric, mode), bn


def _number(value: object, doing: str) -> float:
    """Return a score as a float: a number, or a tensor of one element.

    Raises:
        DataError: It is no finite number.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise DataError(
            f"{doing}gives a {type(value).__name__}",
            expected="a number, or a mapping of names to numbers",
        )
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction that is larger than any float
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{doing}gives {number}", expected="a finite number")
    return number
