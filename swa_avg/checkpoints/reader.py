"""Looking into a checkpoint without running it: what is in it, and any tensor of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from swa_avg import formats
from swa_avg.checkpoints.layout import find_state_dict
from swa_avg.tensors import read_tensor, verify

if TYPE_CHECKING:
    import torch


def open_checkpoint(
    path: str | os.PathLike[str], key: str | Sequence[str] = (), *, ema: bool | None = None
) -> CheckpointReader:
    """Open a checkpoint: its headers are read, its tensors stay on disk, nothing in it runs.

    ```python
    with swa_avg.open_checkpoint("epoch_3.pt") as checkpoint:
        for name in checkpoint.names:
            print(name, checkpoint.dtype(name), checkpoint.shape(name))
        weight = checkpoint.read("conv1.weight")
    ```

    Args:
        path: A checkpoint of any format that can be averaged.
        key: The dotted path to its state_dict, where it is not found.
        ema: Take the averaged weights that the run has kept; False takes the raw ones only.

    Returns:
        The checkpoint, its files open; to be closed, or used in a `with`.

    Raises:
        SwaAvgError: It is no sound checkpoint, or has no state_dict.
    """
    return CheckpointReader(path, key, ema)


class CheckpointReader(AbstractContextManager["CheckpointReader"]):
    """A checkpoint that is open for reading.

    Attributes:
        format: The name of its format, for people.
        where: The dotted path to its state_dict; empty for the root.
        prefix: What was stripped from every name (`module.`, `_orig_mod.`).
        names: The names of its tensors, in order.
        epoch: The epoch that it records, or None.
        step: The step that it records, or None.
        notes: What a user should know about the file itself.
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

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's sizes."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Return the name of a tensor's dtype in torch, without the `torch.`."""
        return self._tensors[name].dtype.name

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, and only it.

        Returns:
            A contiguous tensor of `shape(name)`, on the CPU.

        Raises:
            KeyError: There is no tensor of this name.
            FormatError: Its bytes are not those that were saved.
        """
        ref = self._tensors[name]
        verify((record, name) for record in ref.records)
        return read_tensor(ref)

    def close(self) -> None:
        """Close its files."""
        self._checkpoint.close()

    def __exit__(self, *failure: object) -> None:
        self.close()
