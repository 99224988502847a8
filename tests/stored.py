"""What our own readers find in a checkpoint, as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from swa_avg.formats import open_checkpoint
from swa_avg.gather import read_tensor
from swa_avg.layout import find_state_dict


def tensors(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    try:
        state = find_state_dict(checkpoint, **options)
        return {name: read_tensor(ref) for name, ref in state.tensors.items()}
    finally:
        checkpoint.close()
