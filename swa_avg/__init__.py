"""swa-avg: average the checkpoints of a finished run, and make BatchNorm right again.

Everything public is here and is imported when it is first used, so that
`import swa_avg` and `swa-avg --help` do not import torch.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in `typing`, which takes longer to import than all that is here
if TYPE_CHECKING:
    from typing import Any

    from swa_avg.averaging import Averaging as Averaging
    from swa_avg.batchnorm import BatchNormReport as BatchNormReport
    from swa_avg.batchnorm import recompute_batchnorm as recompute_batchnorm
    from swa_avg.errors import SwaAvgError as SwaAvgError
    from swa_avg.planning import average as average
    from swa_avg.planning import planned as planned
    from swa_avg.reader import CheckpointReader as CheckpointReader
    from swa_avg.reader import open_checkpoint as open_checkpoint
    from swa_avg.report import Report as Report
    from swa_avg.select import Choice as Choice
    from swa_avg.settings import Options as Options
    from swa_avg.sweeping import sweep as sweep
    from swa_avg.trials import SweepReport as SweepReport

__version__ = "0.1.0"

_HOME = {
    "average": "planning",
    "planned": "planning",
    "Averaging": "averaging",
    "Options": "settings",
    "Report": "report",
    "recompute_batchnorm": "batchnorm",
    "BatchNormReport": "batchnorm",
    "CheckpointReader": "reader",
    "open_checkpoint": "reader",
    "Choice": "select",
    "sweep": "sweeping",
    "SweepReport": "trials",
    "SwaAvgError": "errors",
}

__all__ = [
    "Averaging",
    "BatchNormReport",
    "CheckpointReader",
    "Choice",
    "Options",
    "Report",
    "SwaAvgError",
    "SweepReport",
    "average",
    "open_checkpoint",
    "planned",
    "recompute_batchnorm",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
