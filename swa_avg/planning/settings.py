"""The options of one average."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from swa_avg.errors import as_parameters, kind_of
from swa_avg.planning.arguments import (
    check_count,
    check_texts,
    either,
    near,
    parameters_of,
    suggesting,
)
from swa_avg.planning.select import ALL, Choice

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
BnBuffers = Literal["last", "first", "mean", "reset"]
OutputDtype = Literal["keep", "float32", "bfloat16", "float16"]
BN_BUFFERS: tuple[BnBuffers, ...] = get_args(BnBuffers)
OUTPUT_DTYPES: tuple[OutputDtype, ...] = get_args(OutputDtype)


class OptionFields(TypedDict, total=False):
    """The fields of `Options` as keyword arguments."""

    bn_buffers: BnBuffers
    dtype: OutputDtype
    force: bool
    key: str | Sequence[str]
    ema: bool | None
    keep_wrapper: bool
    max_shard_size: int | None
    choice: Choice
    start_from: Paths
    minus: str | os.PathLike[str] | None
    distances: bool
    verify: bool


@suggesting
@dataclass(frozen=True)
class Options:
    """The options of one average.

    Attributes:
        bn_buffers: The source of BatchNorm statistics: last, first, mean or reset.
        dtype: The dtype of floating tensors in the output: keep, float32, bfloat16 or float16.
        force: Replace an existing output.
        key: The dotted path of the state_dict in each checkpoint, if it is not found
            automatically; or several paths, which together are one model.
        ema: True averages the averaged weights (EMA, SWA) that the training run kept, False
            the raw weights. None averages the raw weights, but refuses a checkpoint with
            both if `keep_wrapper` is set.
        keep_wrapper: Write a copy of the last checkpoint's file, in which only the averaged
            tensors are replaced.
        max_shard_size: The maximum bytes of tensors in one file of a folder; 5 GB by default.
        choice: Which of the checkpoints to average; all by default.
        start_from: Averages to continue from. Each weighs as much as all the checkpoints
            that it was made from.
        minus: An average of some of the checkpoints of the one in `start_from`: the result is
            the mean of the others.
        distances: Report the distances of the checkpoints from their mean.
        verify: Read the whole output again before the commit, and recompute a sample of its
            elements.
        by_sample: Detect copies without checksums by a sample of their bytes, as in a dry run.
        of_command: Notes name the options of the command line, not the parameters of the API.

    Raises:
        ValueError: An option has an unknown value, or two options exclude each other.
    """

    bn_buffers: BnBuffers = "last"
    dtype: OutputDtype = "keep"
    force: bool = False
    key: str | Sequence[str] = ()
    ema: bool | None = None
    keep_wrapper: bool = False
    max_shard_size: int | None = None
    choice: Choice = ALL
    start_from: Paths = ()
    minus: str | os.PathLike[str] | None = None
    distances: bool = False
    verify: bool = False
    by_sample: bool = False
    of_command: bool = False

    def __post_init__(self) -> None:
        if self.bn_buffers not in BN_BUFFERS:
            raise ValueError(f"bn_buffers is {self.bn_buffers!r}; use {either(BN_BUFFERS)}")
        if self.dtype not in OUTPUT_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; use {either(OUTPUT_DTYPES)}")
        if self.keep_wrapper and self.dtype != "keep":
            raise ValueError("keep_wrapper cannot change the dtype; use dtype keep")
        if not isinstance(self.choice, Choice):
            kind = kind_of(self.choice)
            raise TypeError(f"choice must be a Choice, as in Choice(last=5), not {kind}")
        check_texts("key", self.key)
        if self.max_shard_size is not None:
            size = check_count("max_shard_size", self.max_shard_size)
            object.__setattr__(self, "max_shard_size", size)
        if self.minus is not None:
            self._check_minus()

    def _check_minus(self) -> None:
        if not self.start_from:
            raise ValueError("minus needs the average to subtract from, in start_from")
        if self.bn_buffers in ("first", "mean"):
            raise ValueError(f"bn_buffers {self.bn_buffers} cannot be combined with minus")
        if self.distances or self.keep_wrapper:
            other = "distances" if self.distances else "keep_wrapper"
            raise ValueError(f"{other} cannot be combined with minus")

    @property
    def described(self) -> dict[str, object]:
        """The options that affect the output's tensors and differ from their defaults."""
        names = ("bn_buffers", "dtype", "key", "ema")
        return {name: getattr(self, name) for name in names if self._is_set(name)}

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(Options, name))

    @property
    def keeps_values(self) -> bool:
        """Whether the average of one checkpoint has the values of the checkpoint."""
        return self.dtype == "keep" and self.bn_buffers != "reset"

    def worded(self, notes: Iterable[str]) -> tuple[str, ...]:
        """Return notes in the words of the command line or of the API."""
        return tuple(notes if self.of_command else map(as_parameters, notes))


def options_of(function: Callable[..., Any], given: Mapping[str, Any]) -> Options:
    """Return the options that were given as keyword arguments.

    Args:
        function: The function, for the message.
        given: The arguments.

    Raises:
        TypeError: There is no option of such a name; the message says what was meant.
        ValueError: An option has an invalid value.
    """
    for name in given:
        if name not in OptionFields.__annotations__:
            meant = _meant(name, given[name], parameters_of(function))
            raise TypeError(f"{function.__name__}() has no parameter {name!r}.{meant}")
    return Options(**given)


def _meant(name: str, value: object, parameters: Sequence[str]) -> str:
    """Return what was probably meant by the name of an unknown option."""
    own = [*parameters, *OptionFields.__annotations__]
    of_choice = [one.name for one in fields(Choice) if one.name not in own]
    close = near(name, [*own, *of_choice])
    if close in of_choice:
        return f" Did you mean choice=Choice({close}={value!r})?"
    return f" Did you mean {close}?" if close else f" Its parameters are {', '.join(sorted(own))}."
