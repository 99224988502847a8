"""From checkpoints to a committed output and a report.

In: paths and `Options`. Out: the averaged file or folder, verified, and a `Report`. Does not
print. `joint` and `torchrun` (several ranks) import torch, so they are imported only where
they are used.
"""

from swa_avg.averaging import pictures
from swa_avg.averaging.along import Windows, WindowsReport, planned_windows, windows
from swa_avg.averaging.distances import Distances
from swa_avg.averaging.execution import Averaging
from swa_avg.averaging.prepare import average, planned
from swa_avg.averaging.report import Report

__all__ = [
    "Averaging",
    "Distances",
    "Report",
    "Windows",
    "WindowsReport",
    "average",
    "joint",
    "pictures",
    "planned",
    "planned_windows",
    "torchrun",
    "windows",
]
