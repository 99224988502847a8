"""Whether the other ranks still live: each counts up a number in the store that all share.

torchrun ends all ranks of a machine when one dies, and notices when a machine is
gone. Other launchers may not; and a rank that hangs is not dead for anybody.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from swa_avg.errors import SwaAvgError

_BEATS = 20  # in the time after which a rank is given up


@dataclass(frozen=True)
class _Heard:
    beats: int
    when: float = field(default_factory=time.monotonic)


class Pulse:
    """The pulse of this rank, and what it has heard of the others.

    Rank 0 listens to all, and all listen to rank 0, through which they learn of the
    others: so the store is asked little, however many they are.

    Attributes:
        lost: The ranks that have been silent for too long.
    """

    def __init__(self, store: Store, rank: int, world: int, patience: timedelta) -> None:
        """Begin to beat.

        Args:
            store: Where to.
            rank: The number of this process.
            world: How many there are.
            patience: For how long a rank may be silent.
        """
        self._store, self._rank = store, rank
        self._patience = patience.total_seconds()
        self._heard = {other: _Heard(0) for other in (range(1, world) if rank == 0 else (0,))}
        self.lost: set[int] = set()
        self._next = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="swa-avg-pulse", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Listen to the others, if it is time for that.

        Raises:
            SwaAvgError: One has been silent for too long.
            RuntimeError: The store has gone.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._patience / _BEATS
        for rank, heard in self._heard.items():
            beats = self._store.add(f"pulse {rank}", 0)
            if beats != heard.beats:
                self._heard[rank] = _Heard(beats)
            elif now - heard.when > self._patience:
                self.lost.add(rank)
                raise SwaAvgError(
                    f"rank {rank} has not been heard of for {self._patience:.0f} s",
                    remedy="See whether its machine is still there",
                )

    def stop(self) -> None:
        """Beat no more."""
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store has gone: who asks it will see
            self._store.add(f"pulse {self._rank}", 1)
            while not self._stop.wait(self._patience / _BEATS):
                self._store.add(f"pulse {self._rank}", 1)
