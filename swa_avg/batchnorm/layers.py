"""The BatchNorm layers of a model, and what is known about each while it is observed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from swa_avg.errors import DataError


@dataclass(eq=False)
class Layer:
    """An observed BatchNorm layer.

    Attributes:
        name: The name of the layer in the model.
        module: The layer.
        span: The range of its channels in the vectors over all layers.
        values: The number of values per channel in the current batch; 0 for none.
        exact: The mean and unbiased variance of these values in float64, if computed.
        trusted: Whether the moments in its buffers are used; None before the first test.
        tested: The largest number of values per channel for which they were tested.
        batches: The number of batches that reached the layer.
        calls: The number of calls of the layer.
    """

    name: str
    module: _BatchNorm
    span: slice
    values: int = 0
    calls: int = 0
    exact: tuple[Tensor, Tensor] | None = None
    trusted: bool | None = None
    tested: int = 0
    batches: int = 0

    @property
    def channels(self) -> int:
        """The number of channels."""
        return int(self.span.stop - self.span.start)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """The current `running_mean` and `running_var`."""
        mean, var = self.module.running_mean, self.module.running_var
        assert mean is not None and var is not None  # otherwise the layer is frozen
        return mean, var


def is_frozen(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm layer that tracks no statistics."""
    return isinstance(module, _BatchNorm) and (
        not module.track_running_stats or module.running_mean is None or module.running_var is None
    )


def layers_of(model: nn.Module) -> list[Layer]:
    """Return the BatchNorm layers of `model` that track statistics.

    Raises:
        DataError: There are no such layers, or the model has an uninitialized lazy layer.
    """
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    lazy += [name for name, b in model.named_buffers() if is_lazy(b)]
    if lazy:
        raise DataError(
            f"the model has lazy layers that have no shape yet ({lazy[0]})",
            remedy="Run one batch through the model first",
        )
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise DataError(
            f"{scripted[0] or 'the model'} is compiled by torch.jit, so its layers cannot be seen",
            remedy="Give the model as it is before torch.jit.script",
        )
    layers: list[Layer] = []
    start = 0
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not is_frozen(module):
            mean = module.running_mean
            assert mean is not None
            # num_features is 0 in a lazy layer that was loaded but not run.
            layers.append(Layer(name, module, slice(start, start + mean.numel())))
            start = layers[-1].span.stop
    if not layers:
        raise DataError(
            "the model has no BatchNorm layer with running statistics",
            remedy="No recompute is needed: leave out --recompute-bn and its options",
        )
    return layers
