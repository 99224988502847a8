"""Scores: calls the user's `evaluate` and decides whether low or high is better.

`evaluate(model)` returns a number, or a mapping of names to numbers of which one is the
score. Whether low or high is better follows from `--mode` or from the metric's name; it
is never guessed. This module does not know about averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn

from swa_avg.batchnorm import (
    Recompute,
    Session,
    check_model,
    importable,
    load_attribute,
    load_weights,
    model_of,
    read_state,
    same_draws,
    session,
    users_code,
)
from swa_avg.checkpoints import StateDict, mode_of
from swa_avg.errors import DataError, SelectionError, kind_of, listed

Evaluate = Callable[[nn.Module], object]
_SCORES = "a number, or a dict of numbers"


@dataclass(frozen=True)
class Scale:
    """The meaning of a score.

    Attributes:
        name: The name of the score.
        mode: Whether low (min) or high (max) scores are better.
    """

    name: str
    mode: str

    @property
    def better(self) -> str:
        """Which scores are better, as a word: larger or smaller."""
        return "larger" if self.mode == "max" else "smaller"

    def merit(self, score: float) -> float:
        """Return a number that is larger for a better score, for sorting."""
        return score if self.mode == "max" else -score

    def is_better(self, one: float, other: float) -> bool:
        """Return whether `one` is strictly better than `other`."""
        return self.merit(one) > self.merit(other)


class Judge:
    """The user's `evaluate` function and the model that it scores.

    Args:
        evaluate: Called with the model in eval mode; device and dtype are left as they are.
        model: The model into which the weights are loaded.
        called: The name of `evaluate`.
        metric: The name of the score, and its key if `evaluate` returns a mapping.
        mode: min or max; None derives it from the names.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        model: nn.Module,
        called: str,
        metric: str | None = None,
        mode: str | None = None,
    ) -> None:
        if not callable(evaluate):
            raise TypeError(f"evaluate must be a function evaluate(model), not {kind_of(evaluate)}")
        check_model(model)
        self.model = model
        self._evaluate = evaluate
        self._called = called
        self._metric = metric
        self._mode = mode
        self._scale: Scale | None = None

    @classmethod
    def of(
        cls, evaluate: Evaluate, model: nn.Module, metric: str | None, mode: str | None
    ) -> Judge:
        """Return the judge for a function, which is called by its own name."""
        return cls(evaluate, model, getattr(evaluate, "__name__", "score"), metric, mode)

    @property
    def scale(self) -> Scale:
        """The scale of the scores; known after the first one."""
        assert self._scale is not None, "no model has been scored yet"
        return self._scale

    def load(self, state: StateDict) -> None:
        """Load a state_dict into the model, and put the model into eval mode."""
        load_weights(self.model, read_state(state))
        with users_code(f"{type(self.model).__name__}.eval(): "):
            self.model.eval()

    def score(self, state: StateDict, label: str) -> float:
        """Return the score of a state_dict.

        Args:
            state: The state_dict, which is loaded into the model.
            label: The name of the state_dict in messages.

        Raises:
            DataError: `evaluate` raises or does not return a finite number, or the weights
                do not fit the model.
            SelectionError: It is not known whether low or high is better.
        """
        self.load(state)
        doing = f"{self._called} of {label}: "
        with same_draws(), users_code(doing):
            result = self._evaluate(self.model)
        entry = self._entry(result, doing) if isinstance(result, Mapping) else None
        if self._scale is None:
            self._scale = self._measured(entry)
        return _number(result if entry is None else result[entry], doing)  # type: ignore[index]

    def _entry(self, result: Mapping[Any, object], doing: str) -> Any:
        """Return the key of the score in a mapping."""
        if self._metric in result:
            return self._metric
        if self._metric is None and len(result) == 1:
            return next(iter(result))
        keys = [str(key) for key in result]
        found = f"returns {listed(keys, 10) or 'an empty dict'}"
        found += f", but not {self._metric}" if self._metric and keys else ""
        remedy = f"Choose one, as in --metric {quote(keys[0])}" if keys else ""
        raise DataError(doing + found, expected="" if keys else _SCORES, remedy=remedy)

    def _measured(self, entry: Any) -> Scale:
        """Return the scale, from `--mode` or from the names of the metric and `evaluate`."""
        if entry is not None:
            names = [str(entry)]
        else:
            names = [name for name in (self._metric, self._called) if name]
        modes = {mode for name in names if (mode := mode_of(name))}
        if self._mode:
            modes = {self._mode}
        if len(modes) != 1:
            raise SelectionError(
                f"the name {names[0]} does not show whether low or high values are better",
                remedy="Give --mode min or --mode max",
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
    """Load the user's code, which can import modules until the context ends.

    Args:
        evaluate: `MOD:ATTR` of the function.
        recompute: The options for recomputing BatchNorm statistics; None leaves them as
            they are.
        model: `MOD:ATTR` of the model; by default `model` of the module of `--data`, or of
            the module of `evaluate`.
        metric: As for `Judge`.
        mode: As for `Judge`.

    Yields:
        The judge, and the session that recomputes BatchNorm statistics or None.

    Raises:
        DataError: A module or an attribute does not exist or has the wrong type.
    """
    folder = recompute.folder if recompute else Path.cwd()
    with ExitStack() as opened:
        opened.enter_context(importable(folder))
        module, function = load_attribute(evaluate, folder)
        if not callable(function):
            raise DataError(
                f"{evaluate} is of type {type(function).__name__}",
                expected="a function evaluate(model)",
            )
        called = evaluate.rpartition(":")[2].rpartition(".")[2]
        bn: Session | None = None
        if recompute:
            if model is None and not hasattr(load_attribute(recompute.data, folder)[0], "model"):
                model = f"{evaluate.rpartition(':')[0]}:model"
            bn = opened.enter_context(session(replace(recompute, model=model)))
        network = bn.model if bn else model_of(module, evaluate, model, folder)
        yield Judge(function, network, called, metric, mode), bn


def _number(value: object, doing: str) -> float:
    """Convert a score, a number or a tensor of one element, to a float.

    Raises:
        DataError: The score is not a finite number.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise DataError(
            f"{doing}returns a {type(value).__name__}",
            expected=_SCORES,
        )
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction that is larger than any float
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{doing}returns {number}", expected="a finite number")
    return number
