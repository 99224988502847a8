"""The ranks that torchrun started: sharing of batches, barriers, messages.

Imported only in a process with `WORLD_SIZE` > 1. No collective operation runs while the
ranks work: they exchange data only after all have reached a barrier. A rank may therefore
have less work than another. If a rank fails, the others stop waiting and fail too. A rank
that no longer responds is given up (`heartbeat.py`).
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

from swa_avg.averaging.heartbeat import Heartbeat
from swa_avg.batchnorm import error_line
from swa_avg.errors import SwaAvgError, printable

_FAILED = "failed"
_LEFT = "left"
_REPORTED = "reported"
_POLL_SECONDS = 0.02
_LEAVE_SECONDS = 10
_PATIENCE = timedelta(minutes=2)


@dataclass(frozen=True)
class ProcessRanks:
    """One rank's connection to the others: a `swa_avg.batchnorm.batches.Ranks`.

    Attributes:
        rank: The number of this process.
        world: The number of processes.
        local: The number of this process on its machine.
        neighbours: The number of processes on its machine, including this one.
        store: The key-value store that torchrun provides to all ranks.
        heartbeat: Detects ranks that no longer respond.
    """

    rank: int
    world: int
    local: int
    neighbours: int
    store: Store
    heartbeat: Heartbeat
    _meetings: Iterator[int] = field(default_factory=count)
    _messages: Iterator[int] = field(default_factory=count)

    def share(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Return this rank's batches: those numbered rank, rank + world, ...

        With a map-style DataLoader, the batches of other ranks are not loaded. A
        `DistributedSampler` is not added, because it repeats samples until all ranks have
        equally many, which changes the statistics. If the user's loader has one, the loader
        is returned unchanged: it already yields this rank's share. All ranks shuffle like
        rank 0 if they use torch's default generator.
        """
        torch.set_rng_state(self._from_first(torch.get_rng_state()))
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
        """Return the data of all ranks in order on rank 0, and an empty list on the others.

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
        """Return the short message of rank 0 on every rank; other ranks' `data` is ignored.

        Raises:
            SwaAvgError: If another rank fails before it gets here.
        """
        key = f"told {next(self._messages)}"
        with _connected("rank 0"):
            if self.rank == 0:
                self.store.set(key, data)  # type: ignore[arg-type]
            self.meet()
            return self.store.get(key)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy rank 0's values into the tensors of all ranks, in place.

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
        """Raise if another rank has failed or no longer responds.

        Raises:
            SwaAvgError: With that rank's number and its error.
        """
        with _connected("rank 0"):
            self.heartbeat.check()
            failed = self.store.check([_FAILED])
            message = self.store.get(_FAILED).decode() if failed else ""
        if message:
            raise SwaAvgError(message)

    def fail(self, error: BaseException) -> None:
        """Report an error to the other ranks; only the first report of the run counts."""
        if isinstance(error, SwaAvgError):
            text = error.of_command()
        else:
            text = error_line(error) if isinstance(error, Exception) else "it was interrupted"
        with suppress(RuntimeError):  # the store is gone
            self.store.compare_set(_FAILED, "", f"rank {self.rank} failed: {printable(text)}")

    def _every_nth(self, items: Iterable[Any]) -> _EveryNth:
        return _EveryNth(items, self.rank, self.world)

    def meet(self) -> None:
        """Wait until every rank has called this method (a barrier).

        Raises:
            SwaAvgError: Another rank has failed or no longer responds.
        """
        place = f"meeting {next(self._meetings)}"
        with _connected("rank 0"):
            self.check()
            self.store.add(place, 1)
            while self.store.add(place, 0) < self.world:
                time.sleep(_POLL_SECONDS)
                self.check()

    def _from_first(self, state: Tensor) -> Tensor:
        self.meet()
        with _connected():
            dist.broadcast(state, src=0)
        return state


class _EveryNth(Sampler[Any]):
    """Every n-th item of an iterable; each iteration starts from the beginning."""

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
def _connected(to: str = "another rank") -> Iterator[None]:
    """Turn a lost connection into a one-line error."""
    try:
        yield
    except RuntimeError as error:
        raise SwaAvgError(f"the connection to {to} is lost ({error_line(error)})") from error


@contextmanager
def ranks(
    timeout: timedelta = timedelta(minutes=5), patience: timedelta = _PATIENCE
) -> Iterator[ProcessRanks]:
    """Join the other processes of a run that torchrun started; leave them at the end.

    Inside the context torch's default process group is initialized (gloo for CPU tensors,
    NCCL for CUDA tensors if there is CUDA), so that a data module can ask for its rank as
    in a training script. An exception that leaves the context on one rank ends all ranks.

    Args:
        timeout: How long to wait for other processes to connect, and for their data.
        patience: How long another process may send no heartbeat.

    Raises:
        SwaAvgError: The environment is not torchrun's, or a rank does not connect.
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
            f"the ranks cannot connect to each other ({error_line(error)})",
            remedy="Start them with torchrun, or unset WORLD_SIZE",
        ) from error
    local = int(os.environ.get("LOCAL_RANK", rank))
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ours_only = PrefixStore("swa_avg", store)
    heartbeat = Heartbeat(ours_only, rank, world, patience)
    ours = ProcessRanks(rank, world, local, neighbours, ours_only, heartbeat)
    at_once = False
    try:
        yield ours
        at_once = rank > 0
    except Exception as error:
        ours.fail(error)
        raise
    except BaseException as error:
        ours.fail(error)
        at_once = True  # an interrupted rank does not wait for the others
        raise
    finally:
        _leave(ours, at_once=at_once)


def _leave(ours: ProcessRanks, *, at_once: bool) -> None:
    """Close the process group, unless `at_once` after waiting for the other ranks.

    Rank 0 prints the messages and may host the store, so it waits until the others have
    left. After an error the others wait until rank 0 has printed it, because torchrun ends
    all ranks as soon as one has ended.
    """
    deadline = time.monotonic() + _LEAVE_SECONDS
    try:
        ours.store.add(_LEFT, 1)
        if ours.rank == 0:
            ours.store.set(_REPORTED, "")
        while not at_once and time.monotonic() < deadline:
            if ours.rank and ours.store.check([_REPORTED]):
                break
            if ours.store.add(_LEFT, 0) + len(ours.heartbeat.lost) >= ours.world:
                break
            time.sleep(_POLL_SECONDS)
    except RuntimeError:
        pass  # the store is gone: its rank has already left
    finally:
        ours.heartbeat.stop()
        dist.destroy_process_group()
