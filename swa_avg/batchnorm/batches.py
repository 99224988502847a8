"""Fetches batches, shares them among ranks, and sends them to a device.

Any exception of the user's loader becomes a `DataError` with the number of the batch. This
module does not depend on BatchNorm or files.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from swa_avg.batchnorm.isolation import error_line, users_code
from swa_avg.errors import SwaAvgError

_END = object()


class Ranks(Protocol):
    """Processes that share the batches; `swa_avg.averaging.torchrun` implements them."""

    @property
    def rank(self) -> int:
        """The number of this process."""

    @property
    def world(self) -> int:
        """The number of processes."""

    @property
    def local(self) -> int:
        """The number of this process on its machine, which selects its GPU."""

    def share(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Return the batches of this rank: numbers rank, rank + world, ..."""

    def gather(self, values: Tensor) -> Sequence[Tensor]:
        """Return the float64 CPU vectors of all ranks, in rank order."""

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the tensors of rank 0 into the tensors of all ranks, in place."""

    def once(self, job: Callable[[], object]) -> None:
        """Run `job` on one rank of each machine, while the other ranks wait."""

    def check(self) -> None:
        """Raise if another rank has failed."""


@dataclass(frozen=True)
class Alone:
    """A single process, which gets all batches."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def share(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Return all batches."""
        return batches

    def gather(self, values: Tensor) -> Sequence[Tensor]:
        """Return the values of the only rank."""
        return [values]

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Do nothing: there is no other rank."""

    def once(self, job: Callable[[], object]) -> None:
        """Run `job`."""
        job()

    def check(self) -> None:
        """Do nothing: there is no other rank."""


@contextmanager
def same_draws(batches: object = None) -> Iterator[None]:
    """Restore the states of torch's random generators on exit.

    Args:
        batches: The batches; the generators of a DataLoader are restored, too.
    """
    sampler = getattr(batches, "sampler", None)
    holders = (batches, sampler, getattr(batches, "batch_sampler", None))
    own = (getattr(holder, "generator", None) for holder in holders)
    states = [(one, one.get_state()) for one in own if isinstance(one, torch.Generator)]
    # Before the first use of CUDA there is no state to restore.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


def numbered(batches: Iterable[Any], numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
    """Yield the batches with their numbers, until either ends.

    A batch is fetched only if there is a number for it, so that no extra batch is fetched
    from an endless loader.

    Raises:
        DataError: The loader raises.
    """
    iterator: Iterator[Any] | None = None
    for number in numbers:
        with users_code(batch=number):
            iterator = iter(batches) if iterator is None else iterator
            batch = next(iterator, _END)
        if batch is _END:
            return
        yield number, batch


def moved(batch: Any, device: torch.device) -> Any:
    """Return a copy of `batch` with every tensor on `device`.

    Lists, tuples, named tuples and mappings are copied recursively and keep their types. Any
    other object with a `to` method is moved with it. Other values are returned unchanged.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        there = {key: moved(value, device) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return there
        same_kind = copy.copy(batch)
        same_kind.update(there)
        return same_kind
    if isinstance(batch, tuple):
        items = [moved(item, device) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    if isinstance(batch, list):
        return [moved(item, device) for item in batch]
    return batch


def chosen_device(name: str, index: int = 0) -> torch.device:
    """Return the device with the given name, after checking that it is available.

    Args:
        name: `auto` (the first available of CUDA, MPS, CPU), `cpu`, `cuda`, `cuda:i` or
            `mps`.
        index: The CUDA device for a name without a number, modulo the number of devices.

    Raises:
        SwaAvgError: The device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", index % max(torch.cuda.device_count(), 1))
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = "" if "Expected one of" in str(error) else f" ({error_line(error)})"
        raise SwaAvgError(
            f"device {name} is not available{known}",
            remedy="Choose auto, which takes one of this machine, or cpu",
        ) from error
    return device


class Feed:
    """Sends batches to a device; copies to CUDA use a separate stream.

    Kernels are launched asynchronously, so the next batch is copied while the GPU computes,
    if the loader pins its memory. A batch is kept until the GPU has finished with it. At
    most `AHEAD` batches are in flight, which limits the memory; this is the only place that
    waits for the GPU.
    """

    AHEAD = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way: deque[tuple[torch.cuda.Event, Any]] = deque()

    def send(self, batch: Any) -> Any:
        """Return `batch` on the device, ready for the current stream."""
        if self._copies is None:
            return moved(batch, self._device)
        with torch.cuda.stream(self._copies):
            there = moved(batch, self._device)
        torch.cuda.current_stream(self._device).wait_stream(self._copies)
        return there

    def done(self, batch: Any) -> None:
        """Record that all work on a sent batch has been launched."""
        if self._copies is None:
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._under_way.append((event, batch))
        if len(self._under_way) > self.AHEAD:
            self._under_way[0][0].synchronize()
            self._under_way.popleft()
