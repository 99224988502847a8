"""The exact mean of the same byte range of every input, written to one range of the output.

In: the works of a plan. Out: bytes of the output, checksums, inner products. Does not depend
on file formats or on the names of tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swa_avg.kernel.arithmetic import default_arithmetic as default_arithmetic
    from swa_avg.kernel.findings import Findings as Findings
    from swa_avg.kernel.findings import Records as Records
    from swa_avg.kernel.mean import Kernel as Kernel
    from swa_avg.kernel.mean import Outcome as Outcome
    from swa_avg.kernel.mean import Window as Window
    from swa_avg.kernel.mean import compute as compute
    from swa_avg.kernel.mean import conclude as conclude
    from swa_avg.kernel.mean import run as run
    from swa_avg.kernel.tasks import buffer_bytes as buffer_bytes
    from swa_avg.kernel.tasks import share as share
    from swa_avg.kernel.tasks import works_in as works_in

# Imported at first use, because importing numpy takes a tenth of a second.
_HOME = {
    "Findings": "findings",
    "Records": "findings",
    "Kernel": "mean",
    "Outcome": "mean",
    "Window": "mean",
    "compute": "mean",
    "conclude": "mean",
    "run": "mean",
    "default_arithmetic": "arithmetic",
    "buffer_bytes": "tasks",
    "share": "tasks",
    "works_in": "tasks",
}

__all__ = [
    "Findings",
    "Kernel",
    "Outcome",
    "Records",
    "Window",
    "buffer_bytes",
    "compute",
    "conclude",
    "default_arithmetic",
    "run",
    "share",
    "works_in",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
