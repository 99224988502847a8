"""The two estimators of BatchNorm statistics.

`population` is the mean and the variance of all inputs of a layer; `torch` gives the same
result as `torch.optim.swa_utils.update_bn`. Both observe the layers while the caller runs
the model. Neither writes into the user's buffers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swa_avg.batchnorm.batches import Ranks
from swa_avg.batchnorm.layers import Layer
from swa_avg.batchnorm.moments import Moments, two_pass, vector
from swa_avg.errors import DataError
from swa_avg.kernel import default_arithmetic

# The largest difference between a layer's float32 moments and the float64 moments, in standard
# deviations and relative to the variance, at which the former are used.
_AGREEMENT = 1e-6


@dataclass(frozen=True)
class Outcome:
    """New statistics of one layer, on the CPU; not valid if `batches` is 0."""

    layer: Layer
    mean: Tensor
    var: Tensor
    tracked: int
    batches: int


class Statistics(ABC):
    """The base of the two estimators: the layers, and the first batch with NaN.

    Attributes:
        everywhere: Whether the whole model runs in training mode.
        momentum: The momentum of the layers during the run.
        number: The number of the current batch.
    """

    everywhere: bool
    momentum: float | None

    def __init__(self, layers: list[Layer], device: torch.device) -> None:
        self.layers = layers
        self.number = 0
        # MPS has no float64.
        self._home = torch.device("cpu") if device.type == "mps" else device
        channels = layers[-1].span.stop
        self._first_bad = torch.full((channels,), -1, dtype=torch.int64, device=self._home)

    def prepare(self) -> None:
        """Set up the layers, after they are moved to the device."""
        for layer in self.layers:
            layer.module.training = True
            layer.module.momentum = self.momentum
            mean, var = layer.buffers
            mean.zero_()
            var.fill_(1)
            if layer.module.num_batches_tracked is not None:
                layer.module.num_batches_tracked.zero_()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Register a hook on every layer that observes its input."""
        with ExitStack() as hooks:
            for layer in self.layers:
                hook = partial(self._before_forward, layer)
                handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    def _before_forward(
        self, layer: Layer, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.check_mode(layer)
        layer.calls += 1
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if x.dim() < 2 or x.shape[1] != layer.channels:
            raise DataError(
                f"{layer.name} got an input of shape {tuple(x.shape)}",
                batch=self.number,
                expected=f"{layer.channels} channels in dimension 1",
            )
        values = x.numel() // layer.channels
        if values < 2:
            raise DataError(
                f"{layer.name} got {values} value{'' if values == 1 else 's'} per channel,"
                " which has no variance",
                batch=self.number,
                expected="2 or more",
                remedy="Use larger batches, or drop the last one (drop_last=True)",
            )
        self.observe(layer, x, values)

    def check_mode(self, layer: Layer) -> None:
        """Check that the model has not changed the mode or the momentum of a layer.

        If it has, the buffers of the layer do not hold the statistics of the batch.

        Raises:
            DataError: The layer is in evaluation mode, or its momentum or
                `track_running_stats` has changed.
        """
        module = layer.module
        if not module.training:
            found, expected = "is in evaluation mode", "training mode"
        elif module.momentum != self.momentum or not module.track_running_stats:
            found, expected = "has a new momentum or track_running_stats", "both unchanged"
        else:
            return
        raise DataError(
            f"forward changes a BatchNorm layer: {layer.name} {found}",
            batch=self.number,
            expected=expected,
            remedy="Use a forward(model, batch) that does not change the layers",
        )

    def check_calls(self) -> None:
        """Check that each layer has counted as many batches as calls were observed.

        Raises:
            DataError: `forward` calls a layer without its hooks, or changes its counter.
        """
        for layer in self.layers:
            tracked = layer.module.num_batches_tracked
            if tracked is None:
                continue
            counted, own = int(tracked), type(layer.module).forward is _BatchNorm.forward
            if counted != layer.calls and (counted or own):
                raise DataError(
                    f"{layer.name} has counted {counted} batches in {layer.calls} calls",
                    expected="one batch for each call: forward must call the layer itself,"
                    " not its forward(), and must not change its buffers",
                )

    def observe(self, layer: Layer, x: Tensor, values: int) -> None:
        """Record that `layer` is about to run on `x`, with `values` values per channel."""
        layer.values = values

    def after_batch(self) -> None:
        """Collect the statistics of the batch that has just run."""
        for layer in self.layers:
            self.check_mode(layer)
            layer.batches += bool(layer.values)
            layer.values = 0
            layer.exact = None
        if self._home.type == "cpu":  # on a GPU the check would wait for all kernels
            self.check_finite()

    @abstractmethod
    def outcomes(self, ranks: Ranks) -> list[Outcome]:
        """Return the new statistics of every layer, merged over all ranks."""

    def check_finite(self) -> None:
        """Raise for the first batch after which statistics were NaN or infinite."""
        first_bad = self._first_bad.cpu()
        bad = first_bad[first_bad >= 0]
        if bad.numel():
            number = int(bad.min())
            channel = int((first_bad == number).nonzero()[0])
            layer = next(x for x in self.layers if channel < x.span.stop)
            raise DataError(
                f"{layer.name} got values that are NaN or infinite, or too large to square",
                batch=number,
                remedy="Check the batch and the weights, and --amp fp16 if you use it",
            )

    def _note_bad(self, span: slice, mean: Tensor, var: Tensor) -> None:
        first_bad = self._first_bad[span]
        new = ~(mean.isfinite() & var.isfinite()) & (first_bad < 0)
        first_bad.masked_fill_(new, self.number)

    def _all(self, which: int) -> Tensor:
        return torch.cat([layer.buffers[which].to(self._home) for layer in self.layers])


class _Torch(Statistics):
    """The estimator of `torch.optim.swa_utils.update_bn`, computed by the layers themselves."""

    everywhere = True
    momentum = None

    def after_batch(self) -> None:
        self._note_bad(slice(None), self._all(0), self._all(1))
        super().after_batch()

    def outcomes(self, ranks: Ranks) -> list[Outcome]:
        outcomes = []
        for layer in self.layers:
            mean, var = (buffer.cpu().clone() for buffer in layer.buffers)
            tracked = layer.module.num_batches_tracked
            calls = layer.batches if tracked is None else int(tracked)
            outcomes.append(Outcome(layer, mean, var, calls, layer.batches))
        return outcomes


class _Population(Statistics):
    """The mean and population variance of all inputs of each layer.

    With momentum 1, a layer stores the mean and the unbiased variance of the batch in its
    buffers. Reading them is cheap, because the layer computes them anyway. But the mean is
    rounded to float32, and some kernels sum in float32, so their accuracy depends on the data
    and the kernel. On the first batch that reaches a layer, and on each larger one, they are
    compared with the float64 moments of its input. If they do not agree, as in subclasses that
    compute something else, the moments of this layer are computed in float64 from then on.

    A batch costs a dozen small kernels for all layers together, and no wait for the GPU.
    """

    everywhere = False
    momentum = 1.0

    def __init__(self, layers: list[Layer], device: torch.device) -> None:
        super().__init__(layers, device)
        self._moments = Moments.none(layers[-1].span.stop, self._home)
        self._counts: dict[tuple[int, ...], Tensor] = {}

    def prepare(self) -> None:
        super().prepare()
        for layer in self.layers:
            if layer.module.num_batches_tracked is not None:
                # Each layer increments its counter: on the CPU this needs no kernel launch.
                layer.module.num_batches_tracked = torch.tensor(0, device="cpu")

    def observe(self, layer: Layer, x: Tensor, values: int) -> None:
        # If one call in a forward has float64 moments, the next ones have them too.
        wanted = not layer.trusted or values > layer.tested or layer.exact is not None
        with ExitStack() as ours:
            if layer.values or wanted:  # otherwise the buffers are enough
                ours.enter_context(torch.no_grad())
                ours.enter_context(default_arithmetic())
            if layer.values:  # the layer was called before in this forward: all calls are merged
                self._take([layer], layer.span)
            super().observe(layer, x, values)
            if wanted:
                layer.exact = two_pass(x.to(self._home), values)

    def after_batch(self) -> None:
        untried = [x for x in self.layers if x.exact is not None and x.trusted is not False]
        if untried:
            self._try(untried)
        self._take(self.layers, slice(None))
        super().after_batch()

    def outcomes(self, ranks: Ranks) -> list[Outcome]:
        moments = self._moments
        reached = vector(layer.batches for layer in self.layers)
        mine = [moments.count.cpu(), moments.mean.cpu(), moments.m2.cpu(), reached]
        channels = moments.count.numel()
        total = Moments.none(channels, torch.device("cpu"))
        batches = torch.zeros_like(reached)
        for received in ranks.gather(torch.cat(mine)):
            total.add(Moments(*received[: 3 * channels].view(3, channels).unbind()))
            batches += received[3 * channels :]
        var = total.m2 / total.count.clamp(min=1)
        return [
            Outcome(layer, total.mean[layer.span], var[layer.span], int(n), int(n))
            for layer, n in zip(self.layers, batches.tolist(), strict=True)
        ]

    def _try(self, layers: list[Layer]) -> None:
        """Decide whether the moments in the buffers are accurate; this waits for the GPU."""
        off = []
        for layer in layers:
            assert layer.exact is not None
            mean, var = layer.exact
            own_mean, own_var = (b.to(self._home).double() for b in layer.buffers)
            scale = var + layer.module.eps
            apart = (own_mean - mean).abs() / scale.sqrt()
            off.append(torch.maximum(apart, (own_var - var).abs() / scale).max())
        for layer, worst in zip(layers, torch.stack(off).tolist(), strict=True):
            layer.trusted = worst <= _AGREEMENT  # NaN does not agree
            layer.tested = max(layer.tested, layer.values)
            if layer.trusted:
                layer.exact = None

    def _take(self, layers: list[Layer], span: slice) -> None:
        """Merge the new moments of `layers` into the moments of `span`."""
        known = self._moments.part(span)
        moments = [self._of(layer) for layer in layers]
        mean = torch.cat([mean for mean, _ in moments]).double()
        var = torch.cat([var for _, var in moments]).double()
        values = self._values(layers)
        known.add(Moments(values, mean, var * (values - 1).clamp_(min=0)))
        self._note_bad(span, mean, var)

    def _of(self, layer: Layer) -> tuple[Tensor, Tensor]:
        if layer.exact is not None:
            return layer.exact
        if layer.values:
            mean, var = layer.buffers
            return mean.to(self._home), var.to(self._home)
        known = self._moments.part(layer.span)  # not reached: zero weight
        return known.mean, known.m2

    def _values(self, layers: list[Layer]) -> Tensor:
        """Return the values per channel as a vector; cached, since batch sizes repeat."""
        key = (layers[0].span.start, *(layer.values for layer in layers))
        if key not in self._counts:
            if len(self._counts) >= 64:  # the shapes keep changing
                self._counts.clear()
            values = vector(key[1:])
            widths = vector(layer.channels for layer in layers).long()
            self._counts[key] = values.repeat_interleave(widths).to(self._home)
        return self._counts[key]


ESTIMATORS: dict[str, type[Statistics]] = {"population": _Population, "torch": _Torch}
