"""The picture of a search: scores against how many checkpoints are averaged.

Needs matplotlib (the extra `plot`), which is imported when a picture is asked for. The
same search gives the same bytes of SVG and HTML: no date, no random names.
"""

from __future__ import annotations

from html import escape
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from swa_avg.errors import OutputError
from swa_avg.search.candidates import SweepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".html")
_SIZE = 5.5, 3.6  # inches: a column and a half of most papers
_DPI = 200
# Of the palette of Okabe and Ito, which the colour-blind can tell apart, and grey.
_AVERAGE, _SINGLE, _BEST = "#0072B2", "#8C8C8C", "#D55E00"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "swa-avg",
    "text.parse_math": False,  # a metric's name may have a $ in it
    "svg.fonttype": "none",  # words stay words: to be searched, read aloud, edited
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.labelsize": 9.5,
    "legend.frameon": False,
}


def check_plot(path: Path) -> str:
    """Refuse, before any work, a picture that could not be drawn.

    Returns:
        Its suffix.

    Raises:
        OutputError: Its suffix names no form that we know, or matplotlib is not there.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError("cannot be drawn", file=path, expected=f"a name in {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise OutputError(
            "cannot be drawn without matplotlib",
            file=path,
            remedy="Install it with: pip install 'swa-avg[plot]'",
        )
    return path.suffix.lower()


def drawn(report: SweepReport, suffix: str) -> bytes:
    """Return a picture of a search.

    Args:
        report: The search.
        suffix: .png, .svg or .html, which is a page with the SVG in it.
    """
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure = _figure(report)
        if suffix == ".png":
            return _saved(figure, "png", {"Software": None})
        svg = _saved(figure, "svg", {"Date": None, "Creator": None, "Title": _title(report)})
    return svg if suffix == ".svg" else _page(svg.decode(), _title(report)).encode()


def _saved(figure: Figure, form: str, metadata: dict[str, Any]) -> bytes:
    stream = BytesIO()
    figure.savefig(stream, format=form, metadata=metadata, dpi=_DPI)
    return stream.getvalue()


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
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(handles=[line, singles], loc="outside upper left", borderaxespad=0.2)
    return figure


def _places(report: SweepReport) -> tuple[list[int], tuple[str, str, str]]:
    """Return the places along the axis; what the two series and the axis are called."""
    places = list(range(1, len(report.paths) + 1))
    recomputed = ", BatchNorm recomputed" if report.batchnorm else ""
    if report.greedy:
        return places, (
            f"soup of the best so far{recomputed}",
            "the checkpoint alone",
            "checkpoints tried, the best first",
        )
    return places, (
        f"average of the last n{recomputed}",
        "the n-th from the end alone",
        "number n of checkpoints averaged, counted from the end of the run",
    )


def _averages(report: SweepReport) -> list[float]:
    """Return what is drawn as the averages' scores; of a soup that of the best so far."""
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
    # Text near the ends must not leave the picture.
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


def _page(svg: str, title: str) -> str:
    """Return a page that shows a picture, and is one file."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n"
        "<style>body { margin: 2em auto; max-width: 50em } svg { width: 100%; height: auto }"
        f"</style>\n</head>\n<body>\n{svg[svg.index('<svg') :]}</body>\n</html>\n"
    )
