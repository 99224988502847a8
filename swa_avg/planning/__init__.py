"""The plan of an average: which checkpoints take part, and what happens to each tensor.

In: paths and options. Out: a `Selection` and a `Plan`. Reads headers, and tensors only to
detect copies and differences. Does not compute a mean.
"""

from swa_avg.planning import start_from
from swa_avg.planning.agreement import refuse_unlike
from swa_avg.planning.arguments import (
    check_arguments,
    check_count,
    listed_paths,
    suggesting,
    with_block,
)
from swa_avg.planning.inputs import Inputs, expand, find_inputs
from swa_avg.planning.naming import check_pattern, names_of
from swa_avg.planning.opening import Opened, open_all
from swa_avg.planning.order import axis_of, gap_notes
from swa_avg.planning.plan import Plan, Work, make_plan, ranges_of
from swa_avg.planning.select import ALL, Choice, Selection, select
from swa_avg.planning.settings import OptionFields, Options, Paths, options_of
from swa_avg.planning.start_from import Base, base_of
from swa_avg.planning.treatments import Rules, Treatment

__all__ = [
    "ALL",
    "Base",
    "Choice",
    "Inputs",
    "Opened",
    "OptionFields",
    "Options",
    "Paths",
    "Plan",
    "Rules",
    "Selection",
    "Treatment",
    "Work",
    "axis_of",
    "base_of",
    "check_arguments",
    "check_count",
    "check_pattern",
    "expand",
    "find_inputs",
    "gap_notes",
    "listed_paths",
    "make_plan",
    "names_of",
    "open_all",
    "options_of",
    "ranges_of",
    "refuse_unlike",
    "select",
    "start_from",
    "suggesting",
    "with_block",
]
