"""A model that is lent: it runs on a device, in other modes, with tensors that may be spoilt.

Whatever happens, its own parameters, buffers, modes and settings are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swa_avg.batchnorm.estimators import Statistics
from swa_avg.batchnorm.foreign import users_code
from swa_avg.errors import DataError


@contextmanager
def lent(
    model: nn.Module, device: torch.device, statistics: Statistics
) -> Iterator[Callable[[], None]]:
    """Have the model on `device`, in the estimator's modes, with copies of its tensors.

    The model's own parameters and buffers are set aside untouched, so that putting
    them back is all there is to restoring them.

    Args:
        model: The model.
        device: Where it is to run.
        statistics: Watches its layers, and says in which modes it runs.

    Yields:
        What raises a DataError if the weights or the modes are no longer those that
        were lent. Called after a batch.
    """
    modules = list(model.modules())
    tensors: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (own, dict(own)) for module in modules for own in (module._parameters, module._buffers)
    ]
    data = [(parameter, parameter.data) for parameter in model.parameters()]
    modes = [(module, module.training) for module in modules]
    layers = [layer.module for layer in statistics.layers]
    settings = [(one, one.momentum, one.track_running_stats) for one in layers]
    unsynced = [m for m in modules if _synchronises(m)]
    try:
        with torch.no_grad(), users_code(f"moving the model to {device}: "):
            _replace_buffers(modules)
            model.to(device)
            _replace_weights(modules, data)
        for module in modules:
            module.training = statistics.everywhere
        for module in unsynced:
            module.__dict__["forward"] = MethodType(_BatchNorm.forward, module)
        statistics.prepare()

        def check() -> None:
            _check_weights(model, tensors, dict(data))
            if not statistics.everywhere:
                _check_modes(model, set(layers))

        yield check
    finally:
        for own, before in tensors:
            own.clear()
            own.update(before)
        for parameter, before_data in data:
            parameter.data = before_data
        for module, training in modes:
            module.training = training
        for layer, momentum, tracks in settings:
            layer.momentum, layer.track_running_stats = momentum, tracks
        for module in unsynced:
            module.__dict__.pop("forward", None)


def _replace_buffers(modules: Iterable[nn.Module]) -> None:
    copies: dict[int, Tensor] = {}  # a buffer that two modules share stays shared
    for module in modules:
        for key, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                module._buffers[key] = copies[id(buffer)]


def _replace_weights(
    modules: Iterable[nn.Module], data: Iterable[tuple[nn.Parameter, Tensor]]
) -> None:
    """Give each parameter a copy of its values, where the move to the device has not."""
    for parameter, before in data:
        if parameter.data_ptr() == before.data_ptr():
            parameter.data = before.clone()
    for module in modules:
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


def _check_weights(
    model: nn.Module,
    tensors: Iterable[tuple[dict[str, Any], dict[str, Any]]],
    data: Mapping[nn.Parameter, Tensor],
) -> None:
    """Refuse a model whose forward changes its weights: the statistics fit neither.

    Raises:
        DataError: A weight has other values than before.
    """
    names = {id(module._parameters): name for name, module in model.named_modules()}
    for own, before in tensors:
        for key, parameter in before.items():
            now = own.get(key)
            if parameter not in data or now is None:
                continue
            if not _same(now.detach(), data[parameter].to(now.device)):
                raise DataError(
                    f"forward changes a weight, {names[id(own)]}.{key}".replace(", .", ", "),
                    expected="a forward that leaves the weights as they are",
                )


def _check_modes(model: nn.Module, layers: Set[nn.Module]) -> None:
    """Refuse a model whose forward puts other modules than the layers in training mode.

    Raises:
        DataError: One of them is; if it is dropout, it is noise in the statistics.
    """
    for name, module in model.named_modules():
        if module.training and module not in layers:
            raise DataError(
                f"{name or 'the model'} is in training mode after forward",
                expected="evaluation mode, as all but the BatchNorm layers",
                remedy="Give a forward(model, batch) that leaves the modes as they are, or use"
                " the torch estimator",
            )


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or torch.equal(one, other):
        return one.shape == other.shape
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _synchronises(module: nn.Module) -> bool:
    """Whether a layer would ask other processes for their batch, or fail for want of a GPU.

    Here each process has batches of its own, maybe not equally many, and what the
    layer saw is what it saw here: it runs as plain BatchNorm.
    """
    return (
        isinstance(module, nn.SyncBatchNorm)
        and type(module).forward is nn.SyncBatchNorm.forward
        and "forward" not in module.__dict__
    )
