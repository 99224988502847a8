"""How checkpoints are averaged: all options of one average in one place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swa_avg.planning.select import ALL, Choice

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
BN_BUFFERS = ("last", "first", "mean", "reset")
OUTPUT_DTYPES = ("keep", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """How checkpoints are averaged; each default is what most want.

    Attributes:
        bn_buffers: Where BatchNorm statistics come from: last, first, mean or reset.
        dtype: What floating tensors are written in: keep, float32, bfloat16 or float16.
        force: Replace an output that exists.
        key: The dotted path to the state_dict in each checkpoint, where it is not found;
            or several paths, which make up one model.
        ema: Average the averaged weights (EMA, SWA) that the run has kept instead; False
            averages the raw weights and nothing else. None averages the raw weights, and
            refuses where a kept wrapper makes it a question which of the two is meant.
        keep_wrapper: Write the last checkpoint's own file, whatever its form, with only
            the averaged tensors replaced in it.
        max_shard_size: The most bytes of tensors in one file of a folder; by default 5 GB.
        choice: Which of the checkpoints are wanted; by default all.
        start_from: Averages to go on from, each of which weighs as much as all the
            checkpoints that it was made from.
        distances: Report how far the checkpoints lie from their mean.
        verify: Read all of the output again before it takes its place, and average a
            sample of its elements anew.
        by_sample: Tell copies without checksums by a sample of their bytes, as a dry run does.

    Raises:
        ValueError: There is no such option, or two do not go together.
    """

    bn_buffers: str = "last"
    dtype: str = "keep"
    force: bool = False
    key: str | Sequence[str] = ()
    ema: bool | None = None
    keep_wrapper: bool = False
    max_shard_size: int | None = None
    choice: Choice = ALL
    start_from: Paths = ()
    distances: bool = False
    verify: bool = False
    by_sample: bool = False

    def __post_init__(self) -> None:
        if self.bn_buffers not in BN_BUFFERS or self.dtype not in OUTPUT_DTYPES:
            raise ValueError(f"no such option: {self.bn_buffers!r}, {self.dtype!r}")
        if self.keep_wrapper and self.dtype != "keep":
            raise ValueError("a file that is kept keeps its dtypes too")

    @property
    def described(self) -> dict[str, object]:
        """Those that the output's tensors depend on, where they are not the defaults."""
        names = ("bn_buffers", "dtype", "key", "ema")
        return {name: getattr(self, name) for name in names if self._is_set(name)}

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(Options, name))
