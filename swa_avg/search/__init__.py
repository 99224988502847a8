"""The search for the best average, scored by the user's `evaluate` function.

In: a planned average, or planned averages along a run, and an `evaluate` function. Out: the
scores of all candidates, and the best average. Does not print.
"""

from swa_avg.search import candidates, plot, sweeping
from swa_avg.search.along import ScoredWindows, WindowScores, score_windows, scored
from swa_avg.search.candidates import Found, SweepReport
from swa_avg.search.scores import judged
from swa_avg.search.sweeping import sweep

__all__ = [
    "Found",
    "ScoredWindows",
    "SweepReport",
    "WindowScores",
    "candidates",
    "judged",
    "plot",
    "score_windows",
    "scored",
    "sweep",
    "sweeping",
]
