"""From checkpoints to a committed output and a report.

In: paths and `Options`. Out: the averaged file or folder, verified, and a `Report`. Does not
print. `joint` and `torchrun` (several ranks, which import torch), `along` (averages along a
run) and `pictures` are imported only where they are used.
"""

from swa_avg.averaging.distances import Distances
from swa_avg.averaging.execution import Averaging
from swa_avg.averaging.prepare import average, planned
from swa_avg.averaging.report import STALE, Report, WindowsReport

__all__ = [
    "STALE",
    "Averaging",
    "Distances",
    "Report",
    "WindowsReport",
    "along",
    "average",
    "joint",
    "pictures",
    "planned",
    "torchrun",
]
