"""Several processes that torchrun started: who takes which batches, and how they meet.

Imported only in a process that has `WORLD_SIZE` > 1. No collective operation
runs while the ranks work: what they have to say to each other they say once all
have arrived, or none if one has failed. So a rank may have less to do than
another, and one that fails takes the others with it instead of leaving them
waiting; one that says nothing any more is given up (`pulse.py`).
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

from swa_avg.averaging.heartbeat import Pulse
from swa_avg.batchnorm import error_line
from swa_avg.errors import SwaAvgError, printable

_FAILED = "failed"
_LEFT = "left"
_SAID = "said"
_POLL_SECONDS = 0.02
_FAREWELL_SECONDS = 10
_PATIENCE = timedelta(minutes=2)


@dataclass(frozen=True)
class ProcessRanks:
    """The ranks of one run, seen from one of them: a `swa_avg.batchnorm.batches.Ranks`.

    Attributes:
        rank: The number of this process.
        world: How many there are.
        local: The number of this process on its machine.
        neighbours: How many there are on its machine, itself among them.
        store: The key-value store that torchrun gave all ranks.
        pulse: Tells whether the others live.
    """

    rank: int
    world: int
    local: int
    neighbours: int
    store: Store
    pulse: Pulse
    _meetings: Iterator[int] = field(default_factory=count)
    _told: Iterator[int] = field(default_factory=count)

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
        self.meet()
        all_values = [torch.empty_like(values) for _ in range(self.world)]
        with _connected():
            dist.all_gather(all_values, values)
        return all_values

    def collect(self, data: bytes) -> list[bytes]:
        """Return on rank 0 what all ranks have, in their order; on the others nothing.

        Raises:
            SwaAvgError: If another rank fails before it gets here.
        """
        sizes = [int(size) for size in self.gather(torch.tensor(len(data)))]
        with _connected():
            if self.rank:
                dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)
                return []
            received = [data]
            for rank, size in enumerate(sizes[1:], 1):
                buffer = bytearray(size)
                dist.recv(torch.frombuffer(buffer, dtype=torch.uint8), rank)
                received.append(bytes(buffer))
        return received

    def tell(self, data: bytes = b"") -> bytes:
        """Return what rank 0 has to say, something short; what the others give is not asked.

        Raises:
            SwaAvgError: If another rank fails before it gets here.
        """
        key = f"told {next(self._told)}"
        if self.rank == 0:
            self.store.set(key, data)  # type: ignore[arg-type]
        self.meet()
        return self.store.get(key)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give rank 0's values to the same tensors, in place, of all ranks.

        Raises:
            SwaAvgError: If another rank fails before it gets here.
        """
        self.meet()
        with torch.no_grad():
            for tensor in tensors:
                values = tensor.detach().cpu().contiguous()
                with _connected():
                    dist.broadcast(values, src=0)
                tensor.copy_(values)

    def once(self, job: Callable[[], object]) -> None:
        """Run `job` on one rank of each machine, while the others wait for it."""
        if self.local == 0:
            job()
        self.meet()

    def check(self) -> None:
        """Raise if another rank has failed, or has been silent for too long.

        Raises:
            SwaAvgError: With that rank's number and its error.
        """
        try:
            self.pulse.check()
            failed = self.store.check([_FAILED])
            message = self.store.get(_FAILED).decode() if failed else ""
        except RuntimeError as error:
            raise SwaAvgError(f"rank 0 has gone away ({error_line(error)})") from error
        if message:
            raise SwaAvgError(message)

    def fail(self, error: BaseException) -> None:
        """Let the other ranks know; only the first failure is told."""
        if isinstance(error, SwaAvgError):
            said = str(error)
        else:
            said = error_line(error) if isinstance(error, Exception) else "it was told to end"
        with suppress(RuntimeError):  # the store has gone: there is nobody to tell
            self.store.compare_set(_FAILED, "", f"rank {self.rank} failed: {printable(said)}")

    def _every_nth(self, items: Iterable[Any]) -> _EveryNth:
        return _EveryNth(items, self.rank, self.world)

    def meet(self) -> None:
        """Wait until every rank is here.

        Raises:
            SwaAvgError: Another rank has failed, or is silent for too long.
        """
        place = f"meeting {next(self._meetings)}"
        self.check()
        self.store.add(place, 1)
        while self.store.add(place, 0) < self.world:
            time.sleep(_POLL_SECONDS)
            self.check()

    def _told_by_first(self, state: Tensor) -> Tensor:
        self.meet()
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
def _connected() -> Iterator[None]:
    """Say it in one line if another rank goes away while it sends or receives."""
    try:
        yield
    except RuntimeError as error:
        raise SwaAvgError(f"another rank has gone away ({error_line(error)})") from error


@contextmanager
def ranks(
    timeout: timedelta = timedelta(minutes=5), patience: timedelta = _PATIENCE
) -> Iterator[ProcessRanks]:
    """Join the other processes of a run that torchrun started; leave them at the end.

    torch's default process group is up meanwhile (gloo for CPU tensors, and NCCL
    for CUDA ones where there is CUDA), as in the training script, so that a data
    module which asks for its rank gets an answer. What leaves the `with` by an
    exception, on any rank, ends all of them.

    Args:
        timeout: How long to wait for the other processes to appear, and for what they
            send once they have all met.
        patience: How long another process may give no sign of life.

    Raises:
        SwaAvgError: If the environment is not torchrun's, or a rank does not appear.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise SwaAvgError(
            f"the ranks do not find each other ({error_line(error)})",
            remedy="Start them with torchrun, or unset WORLD_SIZE",
        ) from error
    local = int(os.environ.get("LOCAL_RANK", rank))
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ours_only = PrefixStore("swa_avg", store)
    pulse = Pulse(ours_only, rank, world, patience)
    ours = ProcessRanks(rank, world, local, neighbours, ours_only, pulse)
    at_once = False
    try:
        yield ours
        at_once = rank > 0
    except Exception as error:
        ours.fail(error)
        raise
    except BaseException as error:
        ours.fail(error)
        at_once = True  # who is told to end does not stay for the others
        raise
    finally:
        _leave(ours, at_once=at_once)


def _leave(ours: ProcessRanks, *, at_once: bool) -> None:
    """Close the group, perhaps not before others have come as far, or seem to be lost.

    Rank 0 speaks for all, and may keep the store: it stays until the others have gone.
    They stay until it has said what went wrong, for torchrun ends all when one has ended.
    """
    deadline = time.monotonic() + _FAREWELL_SECONDS
    try:
        ours.store.add(_LEFT, 1)
        if ours.rank == 0:
            ours.store.set(_SAID, "")
        while not at_once and time.monotonic() < deadline:
            if ours.rank and ours.store.check([_SAID]):
                break
            if ours.store.add(_LEFT, 0) + len(ours.pulse.lost) >= ours.world:
                break
            time.sleep(_POLL_SECONDS)
    except RuntimeError:
        pass  # the store has gone first, and with it whom to wait for
    finally:
        ours.pulse.stop()
        dist.destroy_process_group()
