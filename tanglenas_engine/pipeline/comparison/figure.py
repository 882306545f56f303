"""The figure of a comparison, at the width of a column of a paper."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tanglenas_engine.pipeline.comparison.curves import VALUES, Curve, Curves
from tanglenas_engine.pipeline.comparison.estimates import LEVEL, Metric
from tanglenas_engine.pipeline.comparison.groups import Comparison, Table
from tanglenas_engine.pipeline.figures.drawing import BLUE, FAINT, GREEN, INK, ORANGE, STYLE, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 3.4  # inches: a column of most conferences
ROW = 0.24  # inches of a group whose label is beside its line
LONG = 0.23  # inches of one whose label is above, and each line of the label
LINE = 0.13  # inches of a line of text
LETTERS = 42  # letters that a line has room for
BESIDE = 14  # letters of the longest label beside a line
CURVES = 1.9  # inches of the anytime curves
AFTER = 0.03  # the length of the line behind the end of a search, as a share of the longest search
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", INK)
"""Okabe and Ito's colours, without yellow, which is pale on white. Dashes tell apart those that come again."""
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)))
COLUMN: dict[str, Any] = {
    **STYLE,
    "axes.titlesize": 8,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.dpi": 300,
    "font.size": 8,
    "lines.linewidth": 1.3,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}
UNITS = ((7200.0, 3600.0, "h"), (300.0, 60.0, "min"), (0.0, 1.0, "s"))
"""Units of time: the seconds from which one is used, its own seconds, and its sign."""


def draw(comparison: Comparison, curves: Sequence[Curves]) -> bytes:
    """Draw the first metric of each group with its interval, and the anytime curves below, as PNG.

    Args:
        comparison: The comparison.
        curves: The curves of each of its tables.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    labels = dict.fromkeys(group.label for table in comparison.tables for group in table.groups)
    colours = looks(list(labels))
    heights, around = [], 0.0
    for table, drawn in zip(comparison.tables, curves, strict=True):
        heights += [room(table)] + [CURVES, LINE * _lines(drawn)] * bool(drawn.curves)
        around += 0.7 + LINE * plain(table.title).count("\n") + 0.8 * bool(drawn.curves)
    with style.context(["default", COLUMN]):
        figure = Figure(figsize=(WIDTH, sum(heights) + around), layout="constrained")
        panels = iter(figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0])
        for table, drawn in zip(comparison.tables, curves, strict=True):
            axes = next(panels)
            if table.title:
                axes.set_title(plain(table.title), fontweight="bold")
            means(axes, table, comparison.metrics[0], comparison.metric(comparison.metrics[0]), colours)
            if drawn.curves:
                axes = next(panels)
                _anytime(axes, drawn, colours)
                _legend(next(panels), axes, drawn)
        return png(figure)


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the colour and the dashes of each group, as options of a line."""
    return {
        label: {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}
        for number, label in enumerate(labels)
    }


def means(axes: Axes, table: Table, metric: str, shown: Metric, colours: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a line for each group: a ring for each seed, the mean as a dot, and its interval."""
    beside, places = short(table), _places(table)
    for place, group in zip(places, table.groups, strict=True):
        colour = colours[group.label]["color"]
        if not beside:
            at_left = axes.get_yaxis_transform()
            axes.text(0.01, place - 0.07, plain(group.label), color=colour, va="bottom", transform=at_left)
        values = [value / shown.scale for value in group.values(metric).values()]
        axes.plot(values, [place] * len(values), "o", markersize=4, markerfacecolor="white", color=colour, zorder=3)
        if (estimate := table.estimates.get((metric, group.label))) is None:
            continue
        axes.plot(estimate.mean / shown.scale, place, "o", markersize=5, color=colour, zorder=4)
        if estimate.interval is not None:
            axes.plot([end / shown.scale for end in estimate.interval], [place] * 2, linewidth=1.8, color=colour)
    axes.set_ylim(room(table), 0)
    axes.set_yticks(places if beside else [])
    if beside:
        axes.set_yticklabels([plain(group.label) for group in table.groups], fontsize=8)
        axes.tick_params(axis="y", length=0)
        for text, group in zip(axes.get_yticklabels(), table.groups, strict=True):
            text.set_color(colours[group.label]["color"])
    axes.margins(x=0.06)
    axes.spines["left"].set_visible(False)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_xlabel(f"{shown.heading}: seeds, mean, {100 * LEVEL:.0f} % interval")


def _anytime(axes: Axes, drawn: Curves, colours: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a line for each group, and a band where it has several seeds."""
    longest = max(float(curve.seconds[-1]) for curve in drawn.curves)
    seconds, unit = next((own, sign) for least, own, sign in UNITS if longest >= least)
    for curve in drawn.curves:
        look = colours[curve.label]
        # What a search ended with would have no width at its end, and is what people look for.
        moments = np.append(curve.seconds, curve.seconds[-1] + AFTER * longest) / seconds
        mean, low, high = (np.append(line, line[-1]) for line in (curve.mean, *(curve.band or (curve.mean,) * 2)))
        axes.plot(moments, mean, label=_name(curve), drawstyle="steps-post", **look)
        if curve.band is not None:
            axes.fill_between(moments, low, high, step="post", color=look["color"], alpha=0.18, linewidth=0)
    axes.set_title(f"the search so far: mean, {100 * LEVEL:.0f} % interval over seeds")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"processor time of the search ({unit})")
    axes.set_ylabel(VALUES[drawn.value])
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.5)


def _legend(axes: Axes, panel: Axes, drawn: Curves) -> None:
    """Name the curves of a panel in axes of their own below it, where names cover nothing, however many and long."""
    axes.set_axis_off()
    names = axes.legend(*panel.get_legend_handles_labels(), loc="upper left", fontsize=7, borderaxespad=0,
                        labelspacing=0.2, ncols=_columns(drawn))  # fmt: skip
    names.set_in_layout(False)


def _name(curve: Curve) -> str:
    about = ", ".join(filter(None, ["" if curve.derived else "a fixed network", curve.seeds]))
    return plain(f"{curve.label} ({about})" if about else curve.label)


def _columns(drawn: Curves) -> int:
    return 2 if all(len(_name(curve)) <= LETTERS // 2 for curve in drawn.curves) else 1


def _lines(drawn: Curves) -> int:
    """Return the lines of the longer column of the names of curves."""
    return -(-sum(1 + _name(curve).count("\n") for curve in drawn.curves) // _columns(drawn))


def room(table: Table) -> float:
    """Return the inches of the lines of a table's groups, with their labels."""
    return (_places(table) or [0.0])[-1] + ROW / 2


def _places(table: Table) -> list[float]:
    """Return how far from the top the line of each group is, in inches."""
    beside = short(table)
    heights = [ROW if beside else LONG + LINE * (1 + plain(group.label).count("\n")) for group in table.groups]
    return [sum(heights[: number + 1]) - ROW / 2 for number in range(len(heights))]


def short(table: Table) -> bool:
    """Return whether the labels of a table's groups have room beside their lines."""
    return all(len(group.label) <= BESIDE for group in table.groups)


def plain(text: str, letters: int = LETTERS) -> str:
    """Return text in lines of some letters at most, which matplotlib takes for no formula."""
    return "\n".join(textwrap.fill(line, letters) for line in text.splitlines()).replace("$", r"\$")
