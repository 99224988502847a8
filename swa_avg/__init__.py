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
    from swa_avg.averaging import WindowsReport as WindowsReport
    from swa_avg.averaging import average as average
    from swa_avg.averaging import planned as planned
    from swa_avg.averaging.along import windows as windows
    from swa_avg.batchnorm import BatchNorm as BatchNorm
    from swa_avg.batchnorm import BatchNormReport as BatchNormReport
    from swa_avg.batchnorm import default_forward as default_forward
    from swa_avg.batchnorm import recompute_batchnorm as recompute_batchnorm
    from swa_avg.checkpoints import CheckpointReader as CheckpointReader
    from swa_avg.checkpoints import Provenance as Provenance
    from swa_avg.checkpoints import made_from as made_from
    from swa_avg.checkpoints import open_checkpoint as open_checkpoint
    from swa_avg.errors import DataError as DataError
    from swa_avg.errors import FileError as FileError
    from swa_avg.errors import FormatError as FormatError
    from swa_avg.errors import LayoutError as LayoutError
    from swa_avg.errors import MismatchError as MismatchError
    from swa_avg.errors import NotFiniteError as NotFiniteError
    from swa_avg.errors import OutputError as OutputError
    from swa_avg.errors import ProvenanceError as ProvenanceError
    from swa_avg.errors import SelectionError as SelectionError
    from swa_avg.errors import SwaAvgError as SwaAvgError
    from swa_avg.planning import Choice as Choice
    from swa_avg.planning import Options as Options
    from swa_avg.progress import Progress as Progress
    from swa_avg.progress import ProgressBar as ProgressBar
    from swa_avg.search import ScoredWindows as ScoredWindows
    from swa_avg.search import SweepReport as SweepReport
    from swa_avg.search import score_windows as score_windows
    from swa_avg.search import sweep as sweep

__version__ = "0.1.0"

_HOME = {
    "Averaging": "averaging",
    "Report": "averaging",
    "WindowsReport": "averaging",
    "average": "averaging",
    "planned": "averaging",
    "windows": "averaging.along",
    "BatchNorm": "batchnorm",
    "BatchNormReport": "batchnorm",
    "default_forward": "batchnorm",
    "recompute_batchnorm": "batchnorm",
    "CheckpointReader": "checkpoints",
    "Provenance": "checkpoints",
    "made_from": "checkpoints",
    "open_checkpoint": "checkpoints",
    "DataError": "errors",
    "FileError": "errors",
    "FormatError": "errors",
    "LayoutError": "errors",
    "MismatchError": "errors",
    "NotFiniteError": "errors",
    "OutputError": "errors",
    "ProvenanceError": "errors",
    "SelectionError": "errors",
    "SwaAvgError": "errors",
    "Choice": "planning",
    "Options": "planning",
    "Progress": "progress",
    "ProgressBar": "progress",
    "ScoredWindows": "search",
    "SweepReport": "search",
    "score_windows": "search",
    "sweep": "search",
}

__all__ = [
    "Averaging",
    "BatchNorm",
    "BatchNormReport",
    "CheckpointReader",
    "Choice",
    "DataError",
    "FileError",
    "FormatError",
    "LayoutError",
    "MismatchError",
    "NotFiniteError",
    "Options",
    "OutputError",
    "Progress",
    "ProgressBar",
    "Provenance",
    "ProvenanceError",
    "Report",
    "ScoredWindows",
    "SelectionError",
    "SwaAvgError",
    "SweepReport",
    "WindowsReport",
    "average",
    "default_forward",
    "made_from",
    "open_checkpoint",
    "planned",
    "recompute_batchnorm",
    "score_windows",
    "sweep",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
