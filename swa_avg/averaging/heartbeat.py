"""Heartbeats: each rank increments a counter in the shared store, and others watch it.

torchrun ends all ranks of a machine when one dies, and detects a lost machine. Other
launchers may not, and no launcher detects a rank that hangs.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from swa_avg.errors import SwaAvgError

_BEATS = 20  # heartbeats within the timeout


@dataclass(frozen=True)
class _Seen:
    """The last value of a rank's counter, and when it changed."""

    beats: int
    when: float = field(default_factory=time.monotonic)


class Heartbeat:
    """Sends the heartbeat of this rank and watches those of others.

    Rank 0 watches all ranks. The others watch rank 0, which reports a lost rank to them.
    The number of requests to the store therefore grows only linearly with the ranks.

    Attributes:
        lost: The ranks whose heartbeat has stopped.
    """

    def __init__(self, store: Store, rank: int, world: int, patience: timedelta) -> None:
        """Start sending.

        Args:
            store: The store that all ranks share.
            rank: The number of this process.
            world: The number of processes.
            patience: The time without a heartbeat after which a rank is lost.
        """
        self._store, self._rank = store, rank
        self._patience = patience.total_seconds()
        self._seen = {other: _Seen(0) for other in (range(1, world) if rank == 0 else (0,))}
        self.lost: set[int] = set()
        self._next = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send, name="swa-avg-heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check the heartbeats of the other ranks, at most once per interval.

        Raises:
            SwaAvgError: A rank is lost.
            RuntimeError: The store does not respond.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._patience / _BEATS
        for rank, seen in self._seen.items():
            beats = self._store.add(f"heartbeat {rank}", 0)
            if beats != seen.beats:
                self._seen[rank] = _Seen(beats)
            elif now - seen.when > self._patience:
                self.lost.add(rank)
                raise SwaAvgError(
                    f"rank {rank} has not responded for {self._patience:.0f} s",
                    remedy="Check that its machine is running",
                )

    def stop(self) -> None:
        """Stop sending."""
        self._stop.set()
        self._thread.join()

    def _send(self) -> None:
        with suppress(RuntimeError):  # the main thread reports that the store is gone
            self._store.add(f"heartbeat {self._rank}", 1)
            while not self._stop.wait(self._patience / _BEATS):
                self._store.add(f"heartbeat {self._rank}", 1)
