"""Pictures: how they are drawn and saved, and the picture of the distances.

Needs matplotlib (the extra `plot`), which is imported only to draw. The same report gives the
same bytes of SVG and HTML: a picture has no date and no random names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa_avg.averaging.distances import APART, Distances
from swa_avg.averaging.report import Input, Report
from swa_avg.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".html")
_DPI = 200
_MOST_LABELS = 12  # of checkpoints along an axis
# Colours of the colour-blind-safe palette of Okabe and Ito, and greys.
BLUE, ORANGE, GREY, PALE = "#0072B2", "#D55E00", "#8C8C8C", "#E6E6E6"
_BARS = "#D0D0D0"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "swa-avg",
    "text.parse_math": False,  # a metric's name may have a $ in it
    "svg.fonttype": "none",  # keep text as text, so that it can be searched and edited
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
    """Check, before any work, that a plot can be drawn.

    Returns:
        The suffix of its name.

    Raises:
        OutputError: The suffix is not supported, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError("cannot be drawn", file=path, expected=f"one of {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise OutputError(
            "cannot be drawn without matplotlib",
            file=path,
            remedy="Install it with: pip install 'swa-avg[plot]'",
        )
    return path.suffix.lower()


def saved(figure: Callable[[], Figure], title: str, suffix: str) -> bytes:
    """Return a picture as the bytes of a file.

    Args:
        figure: Draws it.
        title: Its title, in the metadata of the file.
        suffix: .png, .svg or .html; .html is a page that contains the SVG.
    """
    from matplotlib import rc_context

    with rc_context(_STYLE):
        drawn = figure()
        if suffix == ".png":
            return _bytes_of(drawn, "png", {"Software": None})
        svg = _bytes_of(drawn, "svg", {"Date": None, "Creator": None, "Title": title})
    return svg if suffix == ".svg" else _page(svg.decode(), title).encode()


def _bytes_of(figure: Figure, form: str, metadata: dict[str, Any]) -> bytes:
    stream = BytesIO()
    figure.savefig(stream, format=form, metadata=metadata, dpi=_DPI)
    return stream.getvalue()


def _page(svg: str, title: str) -> str:
    """Return an HTML page that contains the SVG."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n"
        "<style>body { margin: 2em auto; max-width: 50em } svg { width: 100%; height: auto }"
        f"</style>\n</head>\n<body>\n{svg[svg.index('<svg') :]}</body>\n</html>\n"
    )


def of_distances(report: Report, distances: Distances, suffix: str) -> bytes:
    """Return the picture of the distances along the run, as the bytes of a file.

    Its upper part has the distance of each checkpoint from the mean, and the length of the step
    that leads to it. Its lower part has the angle by which the run turns at each checkpoint.
    """
    title = "Distances of the checkpoints from their mean"
    return saved(lambda: _figure(report.inputs, distances), title, suffix)


def _figure(inputs: Sequence[Input], distances: Distances) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    _draw_distances(upper, inputs, distances)
    _draw_turns(lower, distances)
    labels, what = _labels(inputs)
    shown = range(0, len(inputs), -(-len(inputs) // _MOST_LABELS))
    lower.set_xticks([number + 1 for number in shown], [labels[number] for number in shown])
    lower.set_xlabel(f"checkpoint, by {what}")
    lower.set_xlim(0.4, len(inputs) + 0.6)
    for axes in (upper, lower):
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
    figure.align_ylabels()
    handles, names = upper.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=2, borderaxespad=0.2)
    return figure


def _draw_distances(axes: Axes, inputs: Sequence[Input], distances: Distances) -> None:
    """Draw the distance of each checkpoint as a dot, and the step before it as a bar."""
    places = list(range(1, len(inputs) + 1))
    far, steps = _numbers(distances.overall), _numbers(distances.steps)
    bars: dict[str, Any] = {"width": 0.5, "color": _BARS}
    dots: dict[str, Any] = {"color": BLUE, "linewidth": 1.2, "marker": "o", "markersize": 4.5}
    axes.bar(places[1:], steps, gid="steps", label="step from the one before", **bars)
    axes.plot(places, far, gid="distances", label="distance from the mean", **dots)
    axes.set_ylabel("relative to the mean's norm")
    highest = max(filter(math.isfinite, (*far, *steps)), default=0.0)
    axes.set_ylim(0, 1.18 * highest or 1.0)
    if max(filter(math.isfinite, far), default=0.0) > APART:
        text: dict[str, Any] = {"ha": "right", "va": "bottom", "color": ORANGE, "fontsize": 8}
        text["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0}
        axes.axhline(APART, color=ORANGE, linewidth=0.9, linestyle="dashed")
        axes.text(len(inputs) + 0.55, APART, "one run stays below this line", **text)
    for number in distances.outliers:
        name = Path(inputs[number].path).name
        _mark(axes, number + 1, far[number], name, on_left=2 * number < len(inputs))


def _mark(axes: Axes, place: int, value: float, name: str, *, on_left: bool) -> None:
    """Mark an outlier with a ring and its name, which stays inside the picture."""
    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": ORANGE}
    axes.plot([place], [value], "o", gid="outlier", markersize=11, markeredgewidth=1.6, **ring)
    axes.annotate(
        name,
        (place, value),
        xytext=(10 if on_left else -10, 0),
        textcoords="offset points",
        ha="left" if on_left else "right",
        va="center",
        color=ORANGE,
        fontweight="bold",
    )


def _draw_turns(axes: Axes, distances: Distances) -> None:
    """Draw the angle between the steps before and after each checkpoint."""
    turns = [
        math.nan if cosine is None else math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
        for cosine in distances.cosines
    ]
    places = list(range(2, len(turns) + 2))
    axes.axhline(90, color=GREY, linewidth=0.8)
    axes.vlines(places, 90, turns, color=BLUE, linewidth=1.2)
    axes.plot(places, turns, "o", gid="turns", color=BLUE, markersize=4.5)
    axes.set_ylim(-12, 192)
    axes.set_yticks([0, 90, 180], ["straight on, 0°", "90°", "back, 180°"])
    axes.set_ylabel("turn")


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _labels(inputs: Sequence[Input]) -> tuple[list[str], str]:
    """Return a short label for each checkpoint, and what the labels are."""
    for what in ("epoch", "step"):
        numbers = [getattr(one, what) for one in inputs]
        if None not in numbers and len({*numbers}) == len(numbers):
            return list(map(str, numbers)), what
    return [str(number) for number in range(1, len(inputs) + 1)], "its place in the order"
