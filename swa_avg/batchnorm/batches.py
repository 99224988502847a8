"""How batches are fetched, shared among ranks, and sent to a device.

Whatever the user's loader raises leaves here as one `DataError` with the number of
the batch. This module knows neither BatchNorm nor files.
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

from swa_avg.batchnorm.foreign import theirs, users_code
from swa_avg.errors import SwaAvgError

_END = object()


class Ranks(Protocol):
    """Processes that share the batches; `swa_avg.averaging.torchrun` has the real ones."""

    @property
    def rank(self) -> int:
        """The number of this process."""

    @property
    def world(self) -> int:
        """How many processes there are."""

    @property
    def local(self) -> int:
        """The number of this process on its machine: which GPU to take."""

    def share(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Return this rank's batches: the ones numbered rank, rank + world, ..."""

    def gather(self, values: Tensor) -> Sequence[Tensor]:
        """Return the float64 CPU vectors of all ranks, in the order of the ranks."""

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give rank 0's values to the same tensors, in place, of all ranks."""

    def once(self, job: Callable[[], object]) -> None:
        """Run `job` on one rank of each machine, while the others wait for it."""

    def check(self) -> None:
        """Raise if another rank has failed."""


@dataclass(frozen=True)
class Alone:
    """One process: all batches are its own."""

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
        """There is no other rank that needs the values."""

    def once(self, job: Callable[[], object]) -> None:
        """Run `job`."""
        job()

    def check(self) -> None:
        """There is no other rank that could fail."""


@contextmanager
def same_draws(batches: object = None) -> Iterator[None]:
    """Put torch's random numbers back where they were, so that what comes next draws the same.

    Args:
        batches: What has generators of its own, if it is a DataLoader.
    """
    sampler = getattr(batches, "sampler", None)
    holders = (batches, sampler, getattr(batches, "batch_sampler", None))
    own = (getattr(holder, "generator", None) for holder in holders)
    states = [(one, one.get_state()) for one in own if isinstance(one, torch.Generator)]
    # Before CUDA is first used there is nothing to put back.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


def numbered(batches: Iterable[Any], numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
    """Yield the batches with their numbers, until either ends.

    No batch is fetched for which there is no number, so that an endless loader
    is not asked for one batch too many.

    Raises:
        DataError: Where the loader raises.
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
    """Return `batch` with every tensor in it on `device`; the batch itself is left alone.

    Goes into lists, tuples, named tuples and mappings, which keep their types;
    anything else that has a `to` is asked to go; the rest stays as it is.
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
    """Return the device called `name`, having made sure that it is there.

    Args:
        name: `auto` (the first there is of CUDA, MPS, CPU), `cpu`, `cuda`,
            `cuda:i` or `mps`.
        index: Which CUDA device, where the name does not say; counted round.

    Raises:
        SwaAvgError: If there is no such device here.
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
        raise SwaAvgError(
            f"device {name} cannot be used here ({theirs(error)})",
            remedy="Choose auto, cpu, cuda, cuda:0 or mps",
        ) from error
    return device


class Feed:
    """Sends batches to a device; to CUDA on a stream of its own, beside the computation.

    Kernels are launched ahead of their execution, so while the GPU computes one
    batch the next one is already being copied, if the loader pins its memory.
    A batch is kept until the GPU is done with it, and at most `AHEAD` are under
    way: that bounds the memory, and is the only waiting there is.
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
        """Say that all work on a batch that was sent has been launched."""
        if self._copies is None:
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._under_way.append((event, batch))
        if len(self._under_way) > self.AHEAD:
            self._under_way[0][0].synchronize()
            self._under_way.popleft()
