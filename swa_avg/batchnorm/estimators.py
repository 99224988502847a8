"""The two ways to estimate BatchNorm statistics, layer by layer, batch by batch.

`population` is the mean and the variance of all that a layer saw; `torch` what
`torch.optim.swa_utils.update_bn` makes of it. Both watch layers while someone
else runs the model; neither writes anything into the user's buffers.
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
from torch.nn.parameter import is_lazy

from swa_avg.batchnorm.batches import Ranks
from swa_avg.batchnorm.moments import Moments, two_pass, vector
from swa_avg.errors import DataError
from swa_avg.kernel import default_arithmetic

# How far a layer's own float32 moments may be from those in float64, in standard
# deviations and as a share of the variance, to be read back instead of computed.
# Rounding the batch means to float32 costs |mean|/std * 6e-8, and so at most this.
_AGREEMENT = 1e-6


@dataclass(eq=False)
class Layer:
    """A BatchNorm layer under observation.

    Attributes:
        span: Where its channels are in the vectors over all layers.
        values: The values per channel it has seen in the batch at hand; 0 for none.
        exact: Mean and unbiased variance of those, in float64, where computed.
        trusted: Whether its own kernel's moments are read back; None until tried.
        batches: The number of batches that reached it.
        calls: The number of times that it was called.
    """

    name: str
    module: _BatchNorm
    span: slice
    values: int = 0
    calls: int = 0
    exact: tuple[Tensor, Tensor] | None = None
    trusted: bool | None = None
    batches: int = 0

    @property
    def channels(self) -> int:
        """The number of its channels."""
        return int(self.span.stop - self.span.start)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Its `running_mean` and `running_var`, those that are there now."""
        mean, var = self.module.running_mean, self.module.running_var
        assert mean is not None and var is not None  # else it would be frozen
        return mean, var


def is_frozen(module: nn.Module) -> bool:
    """Whether it is a BatchNorm layer that tracks no statistics."""
    return isinstance(module, _BatchNorm) and (
        not module.track_running_stats or module.running_mean is None or module.running_var is None
    )


def layers_of(model: nn.Module) -> list[Layer]:
    """Return the BatchNorm layers of `model` that track statistics.

    Raises:
        DataError: If there are none, or if something in the model has no shape yet.
    """
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    lazy += [name for name, b in model.named_buffers() if is_lazy(b)]
    if lazy:
        raise DataError(
            f"the model has lazy layers that have no shape yet ({lazy[0]})",
            remedy="Run one batch through it before",
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
            # Not num_features, which is 0 in a lazy layer that was loaded, not run.
            layers.append(Layer(name, module, slice(start, start + mean.numel())))
            start = layers[-1].span.stop
    if not layers:
        raise DataError(
            "the model has no BatchNorm layer with running statistics",
            remedy="There is nothing to recompute",
        )
    return layers


@dataclass(frozen=True)
class Outcome:
    """New statistics of one layer, on the CPU; meaningless where `batches` is 0."""

    layer: Layer
    mean: Tensor
    var: Tensor
    tracked: int
    batches: int


class Statistics(ABC):
    """What the two estimators have in common: which layers, and where NaN began.

    Attributes:
        everywhere: Whether the whole model runs in training mode.
        momentum: The momentum that the layers run with.
        number: The number of the batch at hand.
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
        """Set the (borrowed) layers up, once they are on their device."""
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
        """Have a hook on every layer that sees what goes in."""
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
                remedy="Make the batches larger, or drop the last one (drop_last=True)",
            )
        self.sees(layer, x, values)

    def check_mode(self, layer: Layer) -> None:
        """Refuse a layer that the model has put in another state than it was prepared in.

        Its buffers would then not hold the statistics of the batch.

        Raises:
            DataError: It is in evaluation mode, or has another momentum, or tracks nothing.
        """
        module = layer.module
        if not module.training:
            found, expected = "is in evaluation mode", "training mode"
        elif module.momentum != self.momentum or not module.track_running_stats:
            found, expected = "has a new momentum or track_running_stats", "both as they were"
        else:
            return
        raise DataError(
            f"forward changes a BatchNorm layer: {layer.name} {found}",
            batch=self.number,
            expected=expected,
            remedy="Give a forward(model, batch) that leaves the layers as they are",
        )

    def check_calls(self) -> None:
        """Refuse a layer that has run more or less often than it was seen to run.

        Raises:
            DataError: `forward` calls it in a way that no hook sees, or changes its counter.
        """
        for layer in self.layers:
            tracked = layer.module.num_batches_tracked
            if tracked is None:
                continue
            counted, own = int(tracked), type(layer.module).forward is _BatchNorm.forward
            if counted != layer.calls and (counted or own):
                raise DataError(
                    f"{layer.name} has counted {counted} batches in {layer.calls} calls",
                    expected="as many as calls: forward must call the layer itself,"
                    " not its forward(), and leave its buffers alone",
                )

    def sees(self, layer: Layer, x: Tensor, values: int) -> None:
        """Take note that `layer` is about to run on `x`, with so many values per channel."""
        layer.values = values

    def after_batch(self) -> None:
        """Take the statistics of the batch that has run."""
        for layer in self.layers:
            self.check_mode(layer)
            layer.batches += bool(layer.values)
            layer.values = 0
            layer.exact = None
        if self._home.type == "cpu":  # elsewhere looking would mean waiting
            self.check_finite()

    @abstractmethod
    def outcomes(self, ranks: Ranks) -> list[Outcome]:
        """Return the new statistics of every layer, those of all ranks merged."""

    def check_finite(self) -> None:
        """Raise, if statistics were NaN or infinite after some batch, for the first one."""
        first_bad = self._first_bad.cpu()
        bad = first_bad[first_bad >= 0]
        if bad.numel():
            number = int(bad.min())
            channel = int((first_bad == number).nonzero()[0])
            layer = next(x for x in self.layers if channel < x.span.stop)
            raise DataError(
                f"{layer.name} got values that are NaN or infinite, or too large to square",
                batch=number,
                remedy="Look at the batch, at the weights, and at --amp fp16 if given",
            )

    def _note_bad(self, span: slice, mean: Tensor, var: Tensor) -> None:
        first_bad = self._first_bad[span]
        new = ~(mean.isfinite() & var.isfinite()) & (first_bad < 0)
        first_bad.masked_fill_(new, self.number)

    def _all(self, which: int) -> Tensor:
        return torch.cat([layer.buffers[which].to(self._home) for layer in self.layers])


class _Torch(Statistics):
    """The estimator of `torch.optim.swa_utils.update_bn`: the layers do it themselves."""

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
    """Mean and population variance of everything that each layer saw.

    With momentum 1, a layer leaves the mean and the unbiased variance of the batch
    in its buffers: the cheapest way to them, since the layer computes them anyway.
    But it rounds the mean to float32, and some kernels sum in float32, so how good
    they are depends on the data and on the kernel. Hence on the first batch that
    reaches a layer they are compared with the moments of its input in float64; a
    layer that does not agree (also one of another make, that does not do this)
    has its inputs' moments computed in float64 from then on.

    One batch costs a dozen small kernels for all layers together, and no waiting.
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
                # Each layer counts up: on the CPU that needs no kernel launch.
                layer.module.num_batches_tracked = torch.tensor(0, device="cpu")

    def sees(self, layer: Layer, x: Tensor, values: int) -> None:
        with ExitStack() as ours:
            if layer.values or not layer.trusted:  # else there is nothing to compute
                ours.enter_context(torch.no_grad())
                ours.enter_context(default_arithmetic())
            if layer.values:  # called before in this forward: every call counts
                self._take([layer], layer.span)
            super().sees(layer, x, values)
            if not layer.trusted:
                layer.exact = two_pass(x.to(self._home), values)

    def after_batch(self) -> None:
        untried = [x for x in self.layers if x.values and x.trusted is None]
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
        for theirs in ranks.gather(torch.cat(mine)):
            total.add(Moments(*theirs[: 3 * channels].view(3, channels).unbind()))
            batches += theirs[3 * channels :]
        var = total.m2 / total.count.clamp(min=1)
        return [
            Outcome(layer, total.mean[layer.span], var[layer.span], int(n), int(n))
            for layer, n in zip(self.layers, batches.tolist(), strict=True)
        ]

    def _try(self, layers: list[Layer]) -> None:
        """Decide whether the layers' own moments are good enough: the one look at the GPU."""
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
            if layer.trusted:
                layer.exact = None

    def _take(self, layers: list[Layer], span: slice) -> None:
        """Merge what `layers` saw, since last taken, into the moments of `span`."""
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
        known = self._moments.part(layer.span)  # not reached: counts for nothing
        return known.mean, known.m2

    def _values(self, layers: list[Layer]) -> Tensor:
        """Return the values per channel as a vector; kept, since batches repeat."""
        key = (layers[0].span.start, *(layer.values for layer in layers))
        if key not in self._counts:
            if len(self._counts) >= 64:  # data of ever new shapes
                self._counts.clear()
            values = vector(key[1:])
            widths = vector(layer.channels for layer in layers).long()
            self._counts[key] = values.repeat_interleave(widths).to(self._home)
        return self._counts[key]


ESTIMATORS: dict[str, type[Statistics]] = {"population": _Population, "torch": _Torch}
