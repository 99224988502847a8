"""Reads the contents and single tensors of a checkpoint without running its code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from typing import TYPE_CHECKING

from swa_avg import formats
from swa_avg.checkpoints.layout import find_state_dict
from swa_avg.errors import counted
from swa_avg.tensors import TensorRef, read_tensor, verify

if TYPE_CHECKING:
    import torch


def open_checkpoint(
    path: str | os.PathLike[str], key: str | Sequence[str] = (), *, ema: bool | None = None
) -> CheckpointReader:
    """Open a checkpoint: headers are read, tensors stay on disk, and none of its code runs.

    ```python
    with swa_avg.open_checkpoint("epoch_3.pt") as checkpoint:
        for name in checkpoint.names:
            print(name, checkpoint.dtype(name), checkpoint.shape(name))
        weight = checkpoint.read("conv1.weight")
    ```

    Args:
        path: A checkpoint of any format that can be averaged.
        key: The dotted path of its state_dict, if it is not found automatically.
        ema: Take the averaged weights of the run; False takes only the raw weights.

    Returns:
        The checkpoint with open files. Close it, or use it in a `with` statement.

    Raises:
        SwaAvgError: The path is not a checkpoint, is damaged, or has no state_dict.
    """
    return CheckpointReader(path, key, ema)


class CheckpointReader(AbstractContextManager["CheckpointReader"]):
    """A checkpoint that is open for reading.

    Attributes:
        format: The name of its format, for display.
        where: The dotted path of its state_dict; empty for the root.
        prefix: The prefix that was removed from every name (`module.`, `_orig_mod.`).
        names: The names of its tensors, in order.
        epoch: The epoch that it records, or None.
        step: The step that it records, or None.
        notes: Notes for the user about the file.
    """

    def __init__(
        self, path: str | os.PathLike[str], key: str | Sequence[str], ema: bool | None
    ) -> None:
        self._checkpoint = formats.open_checkpoint(path)
        try:
            state = find_state_dict(self._checkpoint, key, ema)
        except BaseException:
            self._checkpoint.close()
            raise
        self._tensors = state.tensors
        self.format = self._checkpoint.format
        self.where = state.where
        self.prefix = state.prefix
        self.names = tuple(state.tensors)
        self.epoch = state.epoch
        self.step = state.step
        self.notes = self._checkpoint.notes

    def __repr__(self) -> str:
        path, count = self._checkpoint.path, counted(len(self.names), "tensor")
        return f"CheckpointReader({path}: {self.format}, {count})"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """Return the name of a tensor's dtype in torch, without `torch.`."""
        return self._tensor(name).dtype.name

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor. No other tensor is read.

        Returns:
            A contiguous tensor of `shape(name)`, on the CPU.

        Raises:
            KeyError: There is no tensor of this name.
            FormatError: The bytes of the tensor do not match its checksum.
        """
        ref = self._tensor(name)
        verify((record, name) for record in ref.records)
        return read_tensor(ref)

    def _tensor(self, name: str) -> TensorRef:
        if name not in self._tensors:
            close = get_close_matches(name, self._tensors, 1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise KeyError(f"{self._checkpoint.path} has no tensor {name!r}{meant}")
        return self._tensors[name]

    def close(self) -> None:
        """Close its files."""
        self._checkpoint.close()

    def __exit__(self, *failure: object) -> None:
        self.close()
