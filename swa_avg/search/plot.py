"""The plots of a search.

Scores against the number of averaged checkpoints, or the scores of averages along the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from swa_avg.averaging import pictures
from swa_avg.search.along import WindowScores
from swa_avg.search.candidates import SweepReport
from swa_avg.search.scores import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = 5.5, 3.6  # inches: about one and a half columns of a paper
_AVERAGE, _SINGLE, _BEST = pictures.BLUE, pictures.GREY, pictures.ORANGE
# For windows of several lengths, colours of the same palette without that of the best one.
_LINES = (_AVERAGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("solid", "dashed", "dotted")  # for more lengths than colours


def drawn(report: SweepReport, suffix: str) -> bytes:
    """Return the plot of a search as the bytes of a file.

    Args:
        report: The report of the search.
        suffix: .png, .svg or .html; .html is a page that contains the SVG.
    """
    return pictures.saved(lambda: _figure(report), _title(report), suffix)


def _figure(report: SweepReport) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    places, labels = _places(report)
    averages = _averages(report)
    alone = [report.singles[report.added(place - 1)] for place in places]
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "color": _SINGLE}
    curve: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 4.5, "color": _AVERAGE}
    (singles,) = axes.plot(places, alone, gid="singles", label=labels[1], **dots)
    (line,) = axes.plot(places, averages, gid="averages", label=labels[0], **curve)
    best = averages[report.best]
    share = report.best / max(len(report.paths) - 1, 1)
    what = f"best: {len(report.winner.members)} averaged, {best:.4g}"
    _mark_best(axes, (report.best + 1, best), share, what, above=report.scale.mode == "max")
    axes.set_xlabel(labels[2])
    _finish(axes, report.scale)
    figure.legend(handles=[line, singles], loc="outside upper left", borderaxespad=0.2)
    return figure


def _finish(axes: Axes, scale: Scale) -> None:
    """Label the axis of the scores, and draw the grid."""
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel(f"{scale.name} ({scale.better} is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.04, y=0.14)
    axes.grid(axis="y", color=pictures.PALE, linewidth=0.6)
    axes.set_axisbelow(True)


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


def _mark_best(
    axes: Axes, point: tuple[float, float], share: float, what: str, *, above: bool
) -> None:
    """Mark the best average.

    Args:
        axes: The axes.
        point: The place of its score.
        share: Where it lies between the left end of the plot, 0, and the right one, 1.
        what: The text at the mark.
        above: Whether the text is above the mark.
    """
    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": _BEST}
    x, y = point
    axes.plot([x], [y], "o", gid="best", markersize=10, markeredgewidth=1.6, **ring)
    # Keep the text inside the plot near both ends.
    side: Literal["left", "center", "right"] = "center"
    if not 0.25 < share < 0.75:
        side = "left" if share < 0.5 else "right"
    axes.annotate(
        what,
        point,
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


def drawn_along(scores: WindowScores, suffix: str) -> bytes:
    """Return the plot of the scores along a run as the bytes of a file.

    It has one line for each length of the windows, and a dot for each checkpoint.

    Args:
        scores: The scores.
        suffix: .png, .svg or .html; .html is a page that contains the SVG.
    """
    title = f"Averages along the run: {scores.scale.name}"
    return pictures.saved(lambda: _along(scores), title, suffix)


def _along(scores: WindowScores) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "color": _SINGLE}
    curve: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 4.5}
    singles = axes.plot(
        scores.numbers, scores.singles, gid="singles", label="checkpoint alone", **dots
    )
    lines = []
    for number, last in enumerate(scores.lasts):
        of_last = [one for one in scores.tried if len(one.members) == last]
        ends = [scores.numbers[one.members[-1]] for one in of_last]
        curve["color"] = _LINES[number % len(_LINES)]
        curve["linestyle"] = _DASHES[number // len(_LINES) % len(_DASHES)]
        label = f"average of the last {last}"
        lines += axes.plot(
            ends, [one.score for one in of_last], gid=f"last-{last}", label=label, **curve
        )
    best = scores.winner
    x, first, final = scores.numbers[best.members[-1]], scores.numbers[0], scores.numbers[-1]
    share = (x - first) / (final - first) if final != first else 0.0
    what = f"best: the last {len(best.members)}, {best.score:.4g}"
    _mark_best(axes, (x, best.score), share, what, above=scores.scale.mode == "max")
    axes.set_xlabel(scores.axis)
    _finish(axes, scores.scale)
    legend: dict[str, Any] = {"loc": "outside upper left", "borderaxespad": 0.2, "ncols": 2}
    if scores.is_recomputed:
        legend |= {"title": "averages: BatchNorm recomputed", "alignment": "left"}
    figure.legend(handles=[*lines, *singles], **legend)
    return figure
