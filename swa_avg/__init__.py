"""swa-avg averages the checkpoints of a finished run and recomputes BatchNorm statistics.

This module holds the public API. Each name is imported when it is first used, so that
`import swa_avg` and `swa-avg --help` do not import torch.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers know this name; importing `typing` is slow
if TYPE_CHECKING:
    from typing import Any

    from swa_avg.averaging import Averaging as Averaging
    from swa_avg.averaging import Report as Report
    from swa_avg.averaging import average as average
    from swa_avg.averaging import planned as planned
    from swa_avg.batchnorm import BatchNormReport as BatchNormReport
    from swa_avg.batchnorm import recompute_batchnorm as recompute_batchnorm
    from swa_avg.checkpoints import CheckpointReader as CheckpointReader
    from swa_avg.checkpoints import open_checkpoint as open_checkpoint
    from swa_avg.errors import SwaAvgError as SwaAvgError
    from swa_avg.planning import Choice as Choice
    from swa_avg.planning import Options as Options
    from swa_avg.search import SweepReport as SweepReport
    from swa_avg.search import sweep as sweep

__version__ = "0.1.0"

_HOME = {
    "Averaging": "averaging",
    "Report": "averaging",
    "average": "averaging",
    "planned": "averaging",
    "BatchNormReport": "batchnorm",
    "recompute_batchnorm": "batchnorm",
    "CheckpointReader": "checkpoints",
    "open_checkpoint": "checkpoints",
    "SwaAvgError": "errors",
    "Choice": "planning",
    "Options": "planning",
    "SweepReport": "search",
    "sweep": "search",
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
