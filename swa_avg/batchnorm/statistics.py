"""Recomputes the BatchNorm statistics of a model over batches of data.

The model runs with its current weights, and every BatchNorm layer gets the running
statistics for them. This module does not use files or user modules, and does not print.
Weights, training modes, momenta, hooks and all other buffers are unchanged, also after an
exception. The new statistics are written at the end, either all of them or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from swa_avg.batchnorm.batches import (
    Alone,
    Feed,
    Ranks,
    chosen_device,
    numbered,
)
from swa_avg.batchnorm.calling import Forward, default_forward, explained, samples_in
from swa_avg.batchnorm.estimators import ESTIMATORS, Outcome, Statistics
from swa_avg.batchnorm.isolation import users_code
from swa_avg.batchnorm.layers import is_frozen, layers_of
from swa_avg.batchnorm.loading import batches_of
from swa_avg.batchnorm.on_device import on_device
from swa_avg.errors import DataError, SwaAvgError, counted, kind_of
from swa_avg.kernel import default_arithmetic
from swa_avg.progress import Counter, Watch

Estimator = Literal["population", "torch"]
Amp = Literal["off", "bf16", "fp16"]

_AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LayerShift:
    """The change of the statistics of one BatchNorm layer.

    Attributes:
        name: The name of the layer in the model.
        mean_shift: The largest change of a channel's mean, in (new) standard deviations.
        std_ratio: The largest factor, up or down, between old and new standard deviation.
        batches: The number of batches that reached the layer.
    """

    name: str
    mean_shift: float
    std_ratio: float
    batches: int


@dataclass(frozen=True)
class BatchNormReport:
    """The result of `recompute_batchnorm`.

    Attributes:
        estimator: `population` or `torch`.
        device: The device on which the model ran.
        ranks: The number of processes that shared the batches.
        batches: The number of batches over all ranks.
        samples: The number of samples over all ranks; None if it is not certain.
        layers: The layers with new statistics, in the order of the model.
        unreached: Layers that no batch reached; their statistics are unchanged.
        frozen: BatchNorm layers that track no statistics; unchanged.
        instance_norms: InstanceNorm layers that track statistics; unchanged.
    """

    estimator: str
    device: str
    ranks: int
    batches: int
    samples: int | None
    layers: tuple[LayerShift, ...]
    unreached: tuple[str, ...]
    frozen: tuple[str, ...]
    instance_norms: tuple[str, ...]

    def __repr__(self) -> str:
        samples = "" if self.samples is None else f" ({self.samples:,} samples)"
        layers, batches = counted(len(self.layers), "layer"), counted(self.batches, "batch")
        return f"BatchNormReport({layers} over {batches}{samples}, on {self.device})"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types; a shift that is not finite becomes None."""
        report = asdict(self)
        for layer in report["layers"]:
            for key in ("mean_shift", "std_ratio"):
                layer[key] = layer[key] if math.isfinite(layer[key]) else None
        return {key: list(v) if isinstance(v, tuple) else v for key, v in report.items()}


def recompute_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: str = "auto",
    estimator: Estimator = "population",
    forward: Forward | None = None,
    amp: Amp = "off",
    max_batches: int | None = None,
    progress: Watch | None = None,
    ranks: Ranks | None = None,
) -> BatchNormReport:
    """Recompute the BatchNorm statistics of `model` over `batches`.

    `population`: BatchNorm layers that track statistics run in training mode, and all other
    modules run in evaluation mode. `running_mean` and `running_var` become the mean and the
    population variance, per channel, of all inputs of the layer, and `num_batches_tracked`
    becomes the number of batches that reached it.

    `torch`: equals `torch.optim.swa_utils.update_bn` to the bit. The whole model runs in
    training mode, and the result is the mean of the batch means and of the unbiased batch
    variances, with equal weight for every batch. Unlike there, layers that no batch reaches
    and InstanceNorm layers keep their statistics.

    Args:
        model: The model. On success it has new values in its BatchNorm buffers, which keep
            their dtype and device, and is otherwise unchanged: it is in training mode if it
            was before. After an error nothing has changed.
        batches: The batches: tensors, lists, tuples or mappings of tensors, or objects with a
            `to` method. They may be endless if `max_batches` is given. As with
            `BatchNorm(data=...)`, a function that returns them, a Dataset or a DataModule
            may be given.
        device: The device to run on: `auto`, `cpu`, `cuda`, `cuda:i` or `mps`.
        estimator: `population` or `torch`.
        forward: `forward(model, batch)` runs the model on a batch that is already on the
            device; the default is `swa_avg.default_forward`.
        amp: `bf16` or `fp16` runs the model under `torch.autocast`; statistics still have
            float32 or more. `off` does not.
        max_batches: The maximum number of batches over all ranks.
        progress: Called at the start and after every batch with a `Progress`.
        ranks: The processes that share the batches (`swa_avg.averaging.torchrun`).

    Returns:
        The layers that changed, with the size of the change, and the layers that did not.

    Raises:
        DataError: The loader, the model or `forward` raises, there is no batch, a batch has
            one value per channel, statistics are not finite, or the model has no BatchNorm
            layer with running statistics.
        SwaAvgError: The device is not available, or `torch` is used with several ranks.
        TypeError: The model is not an `nn.Module`.
        ValueError: An argument has an invalid value.
    """
    check_model(model)
    if ranks is None:
        batches = batches_of(batches, "batches")
    ranks = ranks or Alone()
    check_values(estimator, amp, max_batches)
    if estimator == "torch" and ranks.world > 1:
        raise SwaAvgError(
            f"the torch estimator works with only one process, not with {ranks.world}",
            remedy="Use the population estimator, or one process",
        )
    layers = layers_of(model)
    there = chosen_device(device, ranks.local)
    statistics = ESTIMATORS[estimator](layers, there)
    run = partial(_run, _bare(model), device=there, forward=forward or default_forward, amp=amp)
    seen: list[int | None] = []
    total = _length(batches, max_batches) if progress else None
    counter = Counter(progress, "recomputing BatchNorm", total, "batch")
    with on_device(model, there, statistics) as check, statistics.watching():
        mine = numbered(ranks.share(batches), _numbers(ranks, max_batches))
        for samples in run(mine, statistics):
            if not seen:  # also at the end: most changes occur in the first batch
                check()
            seen.append(samples)
            counter(1, samples or 0)
            ranks.check()
        check()
        with default_arithmetic():
            statistics.check_finite()
            statistics.check_calls()
            total_batches, total_samples = _gathered(ranks, seen)
            outcomes = statistics.outcomes(ranks)
    with default_arithmetic():
        shifts = _committed(outcomes)
    return BatchNormReport(
        estimator=estimator,
        device=str(there),
        ranks=ranks.world,
        batches=total_batches,
        samples=total_samples,
        layers=shifts,
        unreached=tuple(x.layer.name for x in outcomes if not x.batches),
        frozen=_named(model, is_frozen),
        instance_norms=_named(model, _tracks_instances),
    )


def _named(model: nn.Module, test: Callable[[nn.Module], bool]) -> tuple[str, ...]:
    """Return the names of the modules that pass a test."""
    return tuple(name for name, module in model.named_modules() if test(module))


def _tracks_instances(module: nn.Module) -> bool:
    """Return whether a module is an InstanceNorm layer with running statistics."""
    return isinstance(module, _InstanceNorm) and module.running_mean is not None


def recomputed_buffers(model: nn.Module, report: BatchNormReport) -> dict[str, Tensor]:
    """Return the buffers that `recompute_batchnorm` wrote, by their `state_dict` keys.

    A layer with several names in the model appears under each of them.
    """
    done = {model.get_submodule(layer.name) for layer in report.layers}
    return {
        f"{name}.{key}" if name else key: buffer
        for name, module in model.named_modules(remove_duplicate=False)
        if module in done
        for key, buffer in module._buffers.items()
        if key in ("running_mean", "running_var", "num_batches_tracked") and buffer is not None
    }


def check_model(model: object) -> None:
    """Refuse a model that is not a module, such as the class of one.

    Raises:
        TypeError: It is not an `nn.Module`.
    """
    if isinstance(model, nn.Module):
        return
    name = getattr(model, "__name__", "") if callable(model) else ""
    made = f"; give {name}()" if name and name != "<lambda>" else ""
    raise TypeError(f"model must be a torch.nn.Module, not {kind_of(model)}{made}")


def check_values(estimator: str, amp: str, max_batches: int | None) -> None:
    """Refuse invalid values of the parameters of `recompute_batchnorm`.

    Raises:
        ValueError: A value is invalid.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected population or torch")
    if amp not in _AMP_DTYPES:
        raise ValueError(f"amp is {amp!r}, expected off, bf16 or fp16")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}, expected 1 or more")


def _length(batches: object, most: int | None) -> int | None:
    """Return the number of batches, or None if it is unknown."""
    try:
        with users_code():
            count = len(batches)  # type: ignore[arg-type]
    except DataError:  # the user's __len__ raises; the progress needs no length
        return most
    return count if most is None else min(count, most)


def _numbers(ranks: Ranks, max_batches: int | None) -> Iterator[int]:
    """Return the numbers of this rank's batches, counted over all ranks."""
    if max_batches is None:
        return count(ranks.rank, ranks.world)
    return iter(range(ranks.rank, max_batches, ranks.world))


def _bare(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel or DistributedDataParallel.

    Compiled code does not call hooks, and the other two use other devices or processes.
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
    return _bare(inner) if isinstance(inner, nn.Module) else model


# --- running the model --------------------------------------------------------------


def _run(
    model: nn.Module,
    batches: Iterable[tuple[int, Any]],
    statistics: Statistics,
    device: torch.device,
    forward: Forward,
    amp: str,
) -> Iterator[int | None]:
    """Run the model on each numbered batch; yield the number of samples in the batch."""
    feed, context = Feed(device), partial(_forward_context, device, amp)
    for number, batch in batches:
        statistics.number = number
        with users_code(batch=number), context():
            there = feed.send(batch)
        try:
            with users_code(batch=number), context():
                forward(model, there)
        except DataError as error:
            if error.remedy:
                raise
            raise explained(error, model, there, forward, context) from error.__cause__
        with torch.no_grad(), default_arithmetic():
            statistics.after_batch()
        feed.done(there)
        yield samples_in(batch)


@contextmanager
def _forward_context(device: torch.device, amp: str) -> Iterator[None]:
    """Use the device, without gradients, and with mixed precision if requested.

    `inference_mode` is not faster here, and tensors that a model creates once and keeps
    (position tables, masks) could not be used for training afterwards.
    """
    dtype = _AMP_DTYPES[amp]
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.no_grad())
        if dtype is not None:
            stack.enter_context(torch.autocast(device.type, dtype=dtype))
        yield


def _gathered(ranks: Ranks, seen: Sequence[int | None]) -> tuple[int, int | None]:
    """Return the number of batches of all ranks, and of samples if that is certain."""
    facts = [len(seen), sum(filter(None, seen)), seen.count(None)]
    mine = torch.tensor(facts, dtype=torch.float64, device="cpu")
    total = torch.stack(list(ranks.gather(mine))).sum(0).tolist()
    if not total[0]:
        raise DataError(
            "the loader gave no batches",
            expected="at least one",
            remedy="An exhausted generator gives no batches: pass a function that returns one",
        )
    return int(total[0]), None if total[2] else int(total[1])


# --- writing the statistics ---------------------------------------------------------


def _committed(outcomes: Sequence[Outcome]) -> tuple[LayerShift, ...]:
    """Write the new statistics into the model, either all or none; return the shifts."""
    reached = [x for x in outcomes if x.batches]
    for outcome in reached:
        for new, buffer in zip((outcome.mean, outcome.var), outcome.layer.buffers, strict=True):
            if not new.to(buffer.dtype).isfinite().all():
                raise DataError(f"{outcome.layer.name}: statistics too large for {buffer.dtype}")
    shifts = tuple(_shift(outcome) for outcome in reached)
    with torch.no_grad():
        for outcome in reached:
            mean, var = outcome.layer.buffers
            mean.copy_(outcome.mean)
            var.copy_(outcome.var)
            if outcome.layer.module.num_batches_tracked is not None:
                outcome.layer.module.num_batches_tracked.fill_(outcome.tracked)
    return shifts


def _shift(outcome: Outcome) -> LayerShift:
    old_mean, old_var = (buffer.cpu().double() for buffer in outcome.layer.buffers)
    eps = outcome.layer.module.eps
    std = (outcome.var.double() + eps).sqrt()
    ratio = std / (old_var + eps).sqrt()
    return LayerShift(
        name=outcome.layer.name,
        mean_shift=float(((outcome.mean.double() - old_mean).abs() / std).max()),
        std_ratio=float(torch.maximum(ratio, 1 / ratio).max()),
        batches=outcome.batches,
    )
