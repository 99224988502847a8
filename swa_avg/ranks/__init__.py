"""The processes that torchrun started: how they find each other and share the work.

In: the environment of torchrun. Out: `ProcessRanks`. Knows nothing of what is shared.
"""

from swa_avg.ranks.distributed import ProcessRanks, ranks

__all__ = [
    "ProcessRanks",
    "ranks",
]
