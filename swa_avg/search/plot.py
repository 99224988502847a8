"""The plot of a search: scores against the number of averaged checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from swa_avg.averaging import pictures
from swa_avg.search.candidates import SweepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = 5.5, 3.6  # inches: about one and a half columns of a paper
_AVERAGE, _SINGLE, _BEST = pictures.BLUE, pictures.GREY, pictures.ORANGE


def drawn(report: SweepReport, suffix: str) -> bytes:
    """Return the plot of a search as the bytes of a file.

    Args:
        report: The report of the search.
        suffix: .png, .svg or .html; .html is a page that contains the SVG.
    """
    return pictures.saved(lambda: _figure(report), _title(report), suffix)


def _figure(report: SweepReport) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    places, labels = _places(report)
    averages = _averages(report)
    alone = [report.singles[report.added(place - 1)] for place in places]
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "color": _SINGLE}
    curve: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 4.5, "color": _AVERAGE}
    (singles,) = axes.plot(places, alone, gid="singles", label=labels[1], **dots)
    (line,) = axes.plot(places, averages, gid="averages", label=labels[0], **curve)
    _mark_best(axes, report, report.best + 1, averages[report.best])
    axes.set_xlabel(labels[2])
    better = "larger" if report.scale.mode == "max" else "smaller"
    axes.set_ylabel(f"{report.scale.name} ({better} is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.04, y=0.14)
    axes.grid(axis="y", color=pictures.PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(handles=[line, singles], loc="outside upper left", borderaxespad=0.2)
    return figure


def _places(report: SweepReport) -> tuple[list[int], tuple[str, str, str]]:
    """Return the x values, and the labels of the two series and the x axis."""
    places = list(range(1, len(report.paths) + 1))
    recomputed = ", BatchNorm recomputed" if report.batchnorm else ""
    if report.greedy:
        return places, (
            f"best soup so far{recomputed}",
            "checkpoint alone",
            "checkpoints tried, best first",
        )
    return places, (
        f"average of the last n{recomputed}",
        "n-th checkpoint from the end, alone",
        "number n of checkpoints averaged, counted from the end of the run",
    )


def _averages(report: SweepReport) -> list[float]:
    """Return the plotted scores of the averages; for a greedy soup, the best score so far."""
    scores = [one.score for one in report.tried]
    if not report.greedy:
        return scores
    best, kept = scores[0], []
    for score in scores:
        best = score if report.scale.is_better(score, best) else best
        kept.append(best)
    return kept


def _mark_best(axes: Axes, report: SweepReport, place: int, score: float) -> None:
    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": _BEST}
    axes.plot([place], [score], "o", gid="best", markersize=10, markeredgewidth=1.6, **ring)
    above = report.scale.mode == "max"
    count = len(report.winner.members)
    # Keep the text inside the plot near both ends.
    share = (place - 1) / max(len(report.paths) - 1, 1)
    side: Literal["left", "center", "right"] = "center"
    if not 0.25 < share < 0.75:
        side = "left" if share < 0.5 else "right"
    axes.annotate(
        f"best: {count} averaged, {score:.4g}",
        (place, score),
        xytext=({"left": -5, "right": 5, "center": 0}[side], 10 if above else -10),
        textcoords="offset points",
        ha=side,
        va="bottom" if above else "top",
        color=_BEST,
        fontsize=9,
        fontweight="bold",
    )


def _title(report: SweepReport) -> str:
    what = "Greedy soup" if report.greedy else "Averages of the last n checkpoints"
    return f"{what}: {report.scale.name}"
