"""Runs a model temporarily on a device, in other modes, with copies of its tensors.

Its parameters, buffers, modes and settings are restored on exit, also after an exception.
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
from swa_avg.batchnorm.isolation import users_code
from swa_avg.errors import DataError


@contextmanager
def on_device(
    model: nn.Module, device: torch.device, statistics: Statistics
) -> Iterator[Callable[[], None]]:
    """Put the model on `device`, in the modes of the estimator, with copies of its tensors.

    The original parameters and buffers are not modified, and are put back on exit.

    Args:
        model: The model.
        device: The device.
        statistics: The estimator, which observes the layers and defines their modes.

    Yields:
        A function to call after a batch. It raises a DataError if the weights or the modes
        have changed.
    """
    modules = list(model.modules())
    layers = [layer.module for layer in statistics.layers]
    before = _Before(model, layers)
    unsynced = [module for module in modules if _synchronises(module)]
    try:
        with torch.no_grad(), users_code(f"moving the model to {device}: "):
            _replace_buffers(modules)
            model.to(device)
            _replace_weights(modules, before.data)
        for module in modules:
            module.training = statistics.everywhere
        for module in unsynced:
            module.__dict__["forward"] = MethodType(_BatchNorm.forward, module)
        statistics.prepare()

        def check() -> None:
            _check_weights(model, before.tensors, dict(before.data))
            if not statistics.everywhere:
                _check_modes(model, set(layers))

        yield check
    finally:
        before.restore()
        for module in unsynced:
            module.__dict__.pop("forward", None)


class _Before:
    """The tensors, modes and settings of a model, which are put back.

    Args:
        model: The model.
        layers: The BatchNorm layers whose settings change.

    Attributes:
        tensors: The dicts of parameters and of buffers of each module, with their contents.
        data: The values of each parameter.
    """

    def __init__(self, model: nn.Module, layers: Iterable[_BatchNorm]) -> None:
        self.tensors: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (own, dict(own))
            for module in model.modules()
            for own in (module._parameters, module._buffers)
        ]
        self.data = [(parameter, parameter.data) for parameter in model.parameters()]
        self._modes = [(module, module.training) for module in model.modules()]
        self._settings = [(one, one.momentum, one.track_running_stats) for one in layers]

    def restore(self) -> None:
        """Put everything back."""
        for own, contents in self.tensors:
            own.clear()
            own.update(contents)
        for parameter, values in self.data:
            parameter.data = values
        for module, training in self._modes:
            module.training = training
        for layer, momentum, tracks in self._settings:
            layer.momentum, layer.track_running_stats = momentum, tracks


def _replace_buffers(modules: Iterable[nn.Module]) -> None:
    copies: dict[int, Tensor] = {}  # a buffer shared by two modules stays shared
    for module in modules:
        for key, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                module._buffers[key] = copies[id(buffer)]


def _replace_weights(
    modules: Iterable[nn.Module], data: Iterable[tuple[nn.Parameter, Tensor]]
) -> None:
    """Copy each parameter that the move to the device has not copied."""
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
    """Check that forward has not changed the weights, which would invalidate the statistics.

    Raises:
        DataError: The values of a weight have changed.
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
                    expected="a forward that does not change the weights",
                )


def _check_modes(model: nn.Module, layers: Set[nn.Module]) -> None:
    """Check that forward has not put modules other than the layers in training mode.

    Raises:
        DataError: A module is in training mode. Active dropout, for example, adds noise.
    """
    for name, module in model.named_modules():
        if module.training and module not in layers:
            raise DataError(
                f"{name or 'the model'} is in training mode after forward",
                expected="evaluation mode for everything except the BatchNorm layers",
                remedy="Use a forward(model, batch) that does not change the modes, or use"
                " the torch estimator",
            )


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or torch.equal(one, other):
        return one.shape == other.shape
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _synchronises(module: nn.Module) -> bool:
    """Return whether a layer is SyncBatchNorm, which uses other processes or needs a GPU.

    Processes may have different numbers of batches here, and each collects the statistics of
    its own batches, so such a layer runs as plain BatchNorm.
    """
    return (
        isinstance(module, nn.SyncBatchNorm)
        and type(module).forward is nn.SyncBatchNorm.forward
        and "forward" not in module.__dict__
    )
