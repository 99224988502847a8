"""Which checkpoints are averaged, and what happens to each of their tensors.

In: paths and options. Out: a `Selection` and a `Plan`, from headers alone. Knows nothing
of how a mean is computed.
"""

from swa_avg.planning import start_from
from swa_avg.planning.plan import Plan, Rules, Treatment, Work, make_plan, ranges_of
from swa_avg.planning.select import ALL, Choice, Selection, expand, select
from swa_avg.planning.settings import Options, Paths
from swa_avg.planning.start_from import Base, base_of

__all__ = [
    "ALL",
    "Base",
    "Choice",
    "Options",
    "Paths",
    "Plan",
    "Rules",
    "Selection",
    "Treatment",
    "Work",
    "base_of",
    "expand",
    "make_plan",
    "ranges_of",
    "select",
    "start_from",
]
