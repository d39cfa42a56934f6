"""Charts of the report. Each function takes plain data and returns one inline SVG, whose width follows the page.

They are drawn small (about 320 px wide), so that text stays readable on a phone, where nothing is scaled down.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INK, _MUTED, _GRID = "#1e293b", "#64748b", "#e2e8f0"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gmeta",
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 9.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
}
_COLOURS = {
    "after": "#2563eb",
    "before": "#f59e0b",
    "plain": "#a855f7",
    "plain-finetuned": "#db2777",
    "factor-analysis": "#0f766e",
    "item-mean+task-bias": "#65a30d",
    "candidate": "#2563eb",
    "current": "#f59e0b",
    "query": "#2563eb",
    "support, before adapting": "#f59e0b",
}
_OTHER_COLOUR = "#64748b"


@dataclass(frozen=True)
class Points:
    """One named line or set of dots; an entry of `y` may be None (nothing is drawn), and so may an interval."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


def colour(name: str) -> str:
    """Return the colour of a variant or curve, which is the same in every chart."""
    return _COLOURS.get(name, _OTHER_COLOUR)


def line_chart(title: str, series: Sequence[Points], *, x_label: str, y_label: str, from_zero: bool = False) -> str:
    """Draw lines over numbers; single points are marked, so that one validation is visible."""

    def draw(axes: Any) -> None:
        for points in series:
            xs, ys = _defined(points.x, points.y)
            marker = "o" if len(xs) < 40 else ""
            axes.plot(xs, ys, color=colour(points.name), label=points.name, lw=1.6, marker=marker, ms=3)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(series) > 1:
            _legend(axes)

    return _svg(title, draw)


def category_chart(
    title: str, categories: Sequence[str], series: Sequence[Points], *, x_label: str, y_label: str
) -> str:
    """Draw intervals over ordered categories and join them by lines; `x` counts categories."""

    def draw(axes: Any) -> None:
        for number, points in enumerate(series):
            shift = 0.09 * (number - (len(series) - 1) / 2)
            _intervals(axes, points, shift, upright=True)
            xs, ys = _defined(points.x, points.y)
            axes.plot([x + shift for x in xs], ys, color=colour(points.name), lw=1.3)
        axes.set_xticks(range(len(categories)), categories)
        axes.set_xlim(-0.5, len(categories) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(axes)

    return _svg(title, draw)


def dot_chart(
    title: str, categories: Sequence[str], series: Sequence[Points], *, x_label: str, separate: bool = True
) -> str:
    """Draw intervals along a scale, categories from top to bottom; `x` counts categories, and `y` is drawn across.

    `separate` sets the dots of one category apart and names the series; without it, each category holds one.
    """
    lines = len(categories) * (1 + 0.6 * (len(series) - 1) if separate else 1)

    def draw(axes: Any) -> None:
        for number, points in enumerate(series):
            shift = 0.17 * (number - (len(series) - 1) / 2) if separate else 0.0
            _intervals(axes, points, shift, upright=False)
        axes.set_yticks(range(len(categories)), categories)
        axes.set_ylim(len(categories) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_label)
        if separate:
            _legend(axes)

    return _svg(title, draw, height=0.9 + (0.26 if separate else 0.36) * lines)


def calibration_chart(title: str, series: Sequence[Points]) -> str:
    """Draw observed over predicted values, beside the diagonal of a calibrated model."""

    def draw(axes: Any) -> None:
        values = [v for points in series for v in (*points.x, *_defined(points.x, points.y)[1])]
        span = [min(values), max(values)]
        axes.plot(span, span, color=_MUTED, lw=0.9, ls="--", label="calibrated")
        for points in series:
            axes.plot(points.x, points.y, color=colour(points.name), label=points.name, lw=1.4, marker="o", ms=3)
        axes.set_xlabel("mean prediction")
        axes.set_ylabel("mean label")
        _legend(axes)

    return _svg(title, draw)


def fraction_chart(title: str, steps: Sequence[float], fractions: Mapping[str, Sequence[float]]) -> str:
    """Draw over steps how something is divided, one above the other."""
    colours = ["#94a3b8", "#f59e0b", "#2563eb"]

    def draw(axes: Any) -> None:
        percent = [[100 * value for value in values] for values in fractions.values()]
        axes.stackplot(steps, percent, labels=list(fractions), colors=colours, alpha=0.85, linewidth=0)
        axes.set_xlim(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1)
        axes.set_ylim(0, 100)
        axes.set_xlabel("step")
        axes.set_ylabel("% of step time")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _legend(axes)

    return _svg(title, draw)


def _intervals(axes: Any, points: Points, shift: float, *, upright: bool) -> None:
    tint = colour(points.name)
    positions, values = _defined([x + shift for x in points.x], points.y)
    across = (positions, values) if upright else (values, positions)
    axes.plot(*across, color=tint, marker="o", ms=4.5, ls="", label=points.name)
    for i, x in enumerate(points.x):
        low, high = (None if side is None else side[i] for side in (points.low, points.high))
        if low is not None and high is not None:
            bar = axes.vlines if upright else axes.hlines
            bar(x + shift, low, high, color=tint, lw=1.6, alpha=0.55)


def _defined(xs: Sequence[float], ys: Sequence[float | None]) -> tuple[list[float], list[float]]:
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _legend(axes: Any) -> None:
    """Put the legend above the plot, where it hides nothing."""
    names = axes.get_legend_handles_labels()[1]
    columns = len(names) if sum(map(len, names)) < 36 else 2
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.2)


def _svg(title: str, draw: Callable[[Any], None], *, height: float = 2.8) -> str:
    """Draw on fresh axes and return the SVG; `height` is in inches of 72 px."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type, unused-ignore]
        figure = Figure(figsize=(4.5, height))
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The page must not inherit style rules, must set the size itself, and needs ids that are unique on it.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;]*; ", "", text)
    text = re.sub(r' (width|height)="[^"]*"', "", text, count=2)
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
