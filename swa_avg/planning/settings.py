"""The options of one average."""

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
        distances: Report the distances of the checkpoints from their mean.
        verify: Read the whole output again before the commit, and recompute a sample of its
            elements.
        by_sample: Detect copies without checksums by a sample of their bytes, as in a dry run.

    Raises:
        ValueError: An option has an unknown value, or two options exclude each other.
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
        if self.bn_buffers not in BN_BUFFERS:
            raise ValueError(f"bn_buffers is {self.bn_buffers!r}; use {', '.join(BN_BUFFERS)}")
        if self.dtype not in OUTPUT_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; use {', '.join(OUTPUT_DTYPES)}")
        if self.keep_wrapper and self.dtype != "keep":
            raise ValueError("keep_wrapper cannot change the dtype; use dtype keep")

    @property
    def described(self) -> dict[str, object]:
        """The options that affect the output's tensors and differ from their defaults."""
        names = ("bn_buffers", "dtype", "key", "ema")
        return {name: getattr(self, name) for name in names if self._is_set(name)}

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(Options, name))
