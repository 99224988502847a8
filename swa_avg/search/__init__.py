"""The search for the best average, scored by the user's `evaluate` function.

In: a planned average and an `evaluate` function. Out: the best average and the scores of
all candidates. Does not print.
"""

from swa_avg.search import candidates, plot, sweeping
from swa_avg.search.candidates import Found, SweepReport
from swa_avg.search.scores import judged
from swa_avg.search.sweeping import sweep

__all__ = [
    "Found",
    "SweepReport",
    "candidates",
    "judged",
    "plot",
    "sweep",
    "sweeping",
]
