"""A small model of mmengine; import it only where mmengine is installed."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import BaseModel
from torch import nn


class Small(BaseModel):  # type: ignore[misc]
    """Trains a network to give zeros."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: torch.Tensor, mode: str = "loss") -> Any:
        return {"loss": self.net(batch).square().mean()}

    def train_step(self, data: Any, optim_wrapper: Any) -> Any:
        loss = self(torch.stack(list(data)))["loss"]
        optim_wrapper.update_params(loss)
        return {"loss": loss.detach()}

    def val_step(self, data: Any) -> Any:
        return list(data)
