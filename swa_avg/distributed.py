"""Several processes that torchrun started: who takes which batches, and how they meet.

Imported only in a process that has `WORLD_SIZE` > 1. No collective operation
runs while the model does: what the ranks have to say to each other they say in
`gather`, once all have arrived there, or none if one has failed. So a rank may
have fewer batches than another, and one that fails takes the others with it
instead of leaving them waiting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from swa_avg.batches import theirs
from swa_avg.errors import SwaAvgError, printable

_FAILED = "failed"
_LEFT = "left"
_POLL_SECONDS = 0.02
_FAREWELL_SECONDS = 10


@dataclass(frozen=True)
class ProcessRanks:
    """The ranks of one run, seen from one of them: a `swa_avg.batches.Ranks`.

    Attributes:
        rank: The number of this process.
        world: How many there are.
        local: The number of this process on its machine.
        store: The key-value store that torchrun gave all ranks.
    """

    rank: int
    world: int
    local: int
    store: Store
    _meetings: Iterator[int] = field(default_factory=count)

    def share(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Return this rank's batches: those numbered rank, rank + world, ...

        Of a map-style DataLoader the other ranks' batches are not even loaded. No
        `DistributedSampler` is put in: it repeats samples until all ranks have as
        many, which changes the statistics. But one that the user has put in stays,
        and the loader is then taken for this rank's share. All ranks shuffle as
        rank 0 does, if they do it with torch's default generator.
        """
        torch.set_rng_state(self._told_by_first(torch.get_rng_state()))
        if type(batches) is DataLoader and batches.batch_sampler is not None:
            if isinstance(batches.sampler, DistributedSampler):
                return batches
            if not isinstance(batches.dataset, IterableDataset):
                return _with_batch_sampler(batches, self._every_nth(batches.batch_sampler))
        return self._every_nth(batches)

    def gather(self, values: Tensor) -> Sequence[Tensor]:
        """Return the CPU tensors of all ranks, in the order of the ranks.

        Raises:
            SwaAvgError: If another rank fails before it gets here.
        """
        self._meet()
        all_values = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(all_values, values)
        return all_values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give rank 0's values to the same tensors, in place, of all ranks.

        Raises:
            SwaAvgError: If another rank fails before it gets here.
        """
        self._meet()
        with torch.no_grad():
            for tensor in tensors:
                values = tensor.detach().cpu().contiguous()
                dist.broadcast(values, src=0)
                tensor.copy_(values)

    def once(self, job: Callable[[], object]) -> None:
        """Run `job` on one rank of each machine, while the others wait for it."""
        if self.local == 0:
            job()
        self._meet()

    def check(self) -> None:
        """Raise if another rank has failed.

        Raises:
            SwaAvgError: With that rank's number and its error.
        """
        try:
            failed = self.store.check([_FAILED])
            message = self.store.get(_FAILED).decode() if failed else ""
        except RuntimeError as error:
            raise SwaAvgError(f"rank 0 has gone away ({theirs(error)})") from error
        if message:
            raise SwaAvgError(message)

    def fail(self, error: BaseException) -> None:
        """Let the other ranks know; only the first failure is told."""
        said = str(error) if isinstance(error, SwaAvgError) else theirs(error)
        with suppress(RuntimeError):  # the store has gone: there is nobody to tell
            self.store.compare_set(_FAILED, "", f"rank {self.rank} failed: {printable(said)}")

    def _every_nth(self, items: Iterable[Any]) -> _EveryNth:
        return _EveryNth(items, self.rank, self.world)

    def _meet(self) -> None:
        """Wait until every rank is here, or one has failed."""
        place = f"meeting {next(self._meetings)}"
        self.check()
        self.store.add(place, 1)
        while self.store.add(place, 0) < self.world:
            time.sleep(_POLL_SECONDS)
            self.check()

    def _told_by_first(self, state: Tensor) -> Tensor:
        self._meet()
        dist.broadcast(state, src=0)
        return state


class _EveryNth(Sampler[Any]):
    """Every n-th item of an iterable, which it iterates over anew each time."""

    def __init__(self, items: Iterable[Any], first: int, step: int) -> None:
        self._items = items
        self._first = first
        self._step = step

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._items), self._first, None, self._step)


def _with_batch_sampler(loader: DataLoader[Any], sampler: Sampler[list[Any]]) -> DataLoader[Any]:
    kept = {
        key: getattr(loader, key)
        for key in (
            "num_workers",
            "collate_fn",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "multiprocessing_context",
            "generator",
            "prefetch_factor",
            "persistent_workers",
        )
    }
    return DataLoader(loader.dataset, batch_sampler=sampler, **kept)


@contextmanager
def ranks(timeout: timedelta = timedelta(minutes=30)) -> Iterator[ProcessRanks]:
    """Join the other processes of a run that torchrun started; leave them at the end.

    torch's default process group is up meanwhile (gloo for CPU tensors, and NCCL
    for CUDA ones where there is CUDA), as in the training script, so that a data
    module which asks for its rank gets an answer. What leaves the `with` by an
    exception, on any rank, ends all of them.

    Args:
        timeout: How long to wait for the other processes to appear.

    Raises:
        SwaAvgError: If the environment is not torchrun's, or a rank does not appear.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
        dist.init_process_group(
            backend, store=PrefixStore("group", store), rank=rank, world_size=world
        )
    except (RuntimeError, ValueError) as error:
        raise SwaAvgError(
            f"the ranks do not find each other ({theirs(error)})", remedy="Start with torchrun"
        ) from error
    local = int(os.environ.get("LOCAL_RANK", rank))
    ours = ProcessRanks(rank, world, local, PrefixStore("swa_avg", store))
    try:
        yield ours
    except BaseException as error:
        ours.fail(error)
        raise
    finally:
        _leave(ours)


def _leave(ours: ProcessRanks) -> None:
    """Close the group; the rank that keeps the store stays until the others have gone."""
    try:
        left = ours.store.add(_LEFT, 1)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while ours.rank == 0 and left < ours.world and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            left = ours.store.add(_LEFT, 0)
    except RuntimeError:
        pass  # the store has gone first, and with it whom to wait for
    finally:
        dist.destroy_process_group()
