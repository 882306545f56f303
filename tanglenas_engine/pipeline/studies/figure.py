"""The figure of a study, in panels: means with intervals, curves with bands, and matrices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tanglenas_engine.pipeline.comparison.estimates import LEVEL, bootstrap
from tanglenas_engine.pipeline.comparison.figure import COLUMN, WIDTH, looks, means, plain, room
from tanglenas_engine.pipeline.comparison.groups import Comparison, Table
from tanglenas_engine.pipeline.figures.drawing import FAINT, png
from tanglenas_engine.pipeline.studies.study import Arm, Matrix, Panel, Runs, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = 2.2  # inches of a panel with curves
AROUND = 0.7  # inches of title and labels of a panel
LABEL = 34  # letters of a line beside the y axis of a panel with curves
CELL = 0.11  # inches of a cell of a matrix, at least
RESAMPLES = 999
POINTS = 200
FEW = 12
"""Points up to which a curve has a mark and an interval for each, and a line between them."""


def draw(study: Study, runs: Runs, comparison: Comparison) -> bytes:
    """Draw the panels of a study below each other, as PNG.

    Args:
        study: The study.
        runs: The measurements by arm and seed.
        comparison: The comparison of its arms.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    colours = looks(list(dict.fromkeys([*(series(study.arms, arm) for arm in runs), *runs])))
    drawn: list[tuple[float, Callable[[Any], None]]] = []
    for panel in study.panels:
        for table in comparison.tables if panel.kind == "means" else ():
            if not any(metric == panel.name for metric, _ in table.estimates):
                continue
            height = room(measured(table, panel.name))

            def by_arm(place: Any, table: Table = table, name: str = panel.name) -> None:
                axes, look = place.subplots(), comparison.metric(name)
                means(axes, measured(table, name), name, look, colours)
                axes.set_title(f"seeds, mean, {100 * LEVEL:.0f} % interval", loc="right")
                axes.set_xlabel(None)
                place.supxlabel(look.heading, fontsize=axes.xaxis.label.get_fontsize())  # it may be wider than the axes

            drawn.append((height, by_arm))
        if panel.kind == "curves" and (found := curves(study.arms, runs, panel.name, timed(panel))):

            def by_x(place: Any, panel: Panel = panel, found: Mapping[str, Any] = found) -> None:
                _curves(place.subplots(), panel, found, colours)

            drawn.append((CURVES, by_x))
        if panel.kind == "matrices" and (grids := matrices(runs, panel.name)):
            tall = max(CELL * max(len(grid[0]) for grid in grids.values()), 0.9) + 0.6
            columns = min(2, len(grids))

            def by_cell(
                place: Any, panel: Panel = panel, grids: Mapping[str, Any] = grids, columns: int = columns
            ) -> None:
                _matrices(place, panel, grids, columns)

            drawn.append((tall * -(-len(grids) // columns), by_cell))
    with style.context(["default", COLUMN]):
        heights = [tall + AROUND for tall, _ in drawn]
        figure = Figure(figsize=(WIDTH, sum(heights) or AROUND), layout="constrained")
        if not drawn:
            figure.text(0.5, 0.5, "Nothing was measured yet.", ha="center", va="center")
        else:
            places = np.atleast_1d(np.asarray(figure.subfigures(len(drawn), 1, height_ratios=heights)))
            for place, (_, action) in zip(places.ravel(), drawn, strict=True):
                action(place)
        return png(figure)


def measured(table: Table, metric: str) -> Table:
    """Return a table of the groups that have a metric. An arm that others are compared with may have none."""
    return replace(table, groups=[group for group in table.groups if group.values(metric)])


def series(arms: Mapping[str, Arm], arm: str) -> str:
    """Return the name of the curve that an arm is a part of."""
    return arms[arm].series or arm if arm in arms else arm


def timed(panel: Panel) -> bool:
    """Return whether a panel is over time, so that a value holds until there is a next one."""
    return panel.x.startswith("time")


def curves(arms: Mapping[str, Arm], runs: Runs, name: str, holding: bool = False) -> dict[str, tuple[Any, Any, Any]]:
    """Return a curve for each arm that has one: x and the mean, `(points,)`, and the ends of the band or None.

    Arms of one series that have one point each are one curve of each seed. A few points are averaged one by one, in
    both directions. Longer curves are averaged where all seeds have a value; where that is one moment, the curve is a
    point.

    Args:
        holding: Whether the last value of a seed holds as long as another seed has values.
    """
    parts: dict[str, dict[int, dict[tuple[str, int], tuple[float, float]]]] = {}  # points by arm and place
    lines = {
        series(arms, arm)
        for arm, seeds in runs.items()
        for one in seeds.values()
        if name in one.curves and len(one.curves[name].x) > 1
    }
    for arm, seeds in runs.items():
        label = arm if series(arms, arm) in lines else series(arms, arm)
        for seed, one in seeds.items():
            if name in one.curves:
                points = parts.setdefault(label, {}).setdefault(seed, {})
                found_here = enumerate(zip(one.curves[name].x, one.curves[name].y, strict=True))
                points |= {(arm, place): point for place, point in found_here if None not in point}
    found = {}
    for label, by_seed in parts.items():
        several = [sorted(points.items(), key=lambda item: item[1]) for points in by_seed.values() if points]
        if not several:
            continue
        paths = [np.array([point for _, point in points]).T for points in several]
        first, end = max(path[0][0] for path in paths), (max if holding else min)(path[0][-1] for path in paths)
        alike = all([key for key, _ in points] == [key for key, _ in several[0]] for points in several)
        if alike and (len(several[0]) <= FEW or all(np.allclose(path[0], paths[0][0]) for path in paths)):
            x, each = np.mean([path[0] for path in paths], 0), np.stack([path[1] for path in paths])
        else:
            x = np.linspace(first, end, POINTS) if first < end else np.array([max(first, end)])
            each = np.stack([path[1][np.searchsorted(path[0], x, side="right") - 1] for path in paths])
        found[label] = x, each.mean(0), bootstrap(each, RESAMPLES) if len(each) > 1 else None
    return found


def matrices(runs: Runs, name: str) -> dict[str, tuple[list[str], list[str], Any, str]]:
    """Return the mean over seeds of the matrix of each arm that has one: rows, columns, values and a title.

    Matrices with other rows or columns have no mean. Those of the largest number of seeds with equal names count, of
    several such sets that of the first seed. The title then says how many of the seeds these are. What a seed does not
    have, such as a layer, does not count in the mean.
    """
    found = {}
    for arm, seeds in runs.items():
        alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Matrix]] = {}
        for one in (one.matrices[name] for one in seeds.values() if name in one.matrices):
            alike.setdefault((tuple(one.rows), tuple(one.columns)), []).append(one)
        if not alike:
            continue
        (rows, columns), most = max(alike.items(), key=lambda item: len(item[1]))
        values = np.array([[[math.nan if v is None else v for v in row] for row in one.values] for one in most], float)
        count = sum(map(len, alike.values()))
        title = arm if len(most) == count else f"{arm}\n({len(most)} of {count} seeds)"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mean of empty slice")  # of a layer that no seed has
            found[arm] = list(rows), list(columns), np.nanmean(values, 0), title
    return found


def _curves(axes: Axes, panel: Panel, found: Mapping[str, Any], colours: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for label, (x, mean, band) in found.items():
        look, few = colours[label], len(x) <= FEW
        steps = timed(panel) and not few
        style, marker = "steps-post" if steps else "default", "o" if few else ""
        axes.plot(x, mean, label=plain(label), drawstyle=style, marker=marker, **look)
        if band is not None and few:
            ends = np.abs(np.stack(band) - mean)
            axes.errorbar(x, mean, ends, fmt="none", color=look["color"], capsize=2, linewidth=1)
        elif band is not None:
            low, high = band
            axes.fill_between(
                x, low, high, step="post" if steps else None, color=look["color"], alpha=0.18, linewidth=0
            )
    axes.set_title(f"mean, {100 * LEVEL:.0f} % interval over seeds")
    if timed(panel):
        axes.set_xlim(left=0)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(plain(panel.y, LABEL))
    axes.ticklabel_format(axis="y", useOffset=False)
    if all(float(value).is_integer() for x, _, _ in found.values() for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.5)
    axes.legend(loc="best", fontsize=6, ncols=1 + (len(found) > 4))


def _matrices(place: Any, panel: Panel, grids: Mapping[str, Any], columns: int) -> None:
    panels = place.subplots(-(-len(grids) // columns), columns, squeeze=False).ravel()
    image = None
    least = min(0.0, *(float(np.nanmin(values)) for _, _, values, _ in grids.values()))
    most = max(1.0, *(float(np.nanmax(values)) for _, _, values, _ in grids.values()))
    for axes, (rows, names, values, title) in zip(panels, grids.values(), strict=False):
        image = axes.imshow(values, vmin=least, vmax=most, cmap="viridis", aspect="auto")
        axes.set_title(plain(title), fontsize=7)  # a long one would reach into the next column
        _ticks(axes.set_yticks, rows)
        _ticks(axes.set_xticks, names, rotation=90)
        axes.tick_params(labelsize=5)
        axes.set_xlabel(panel.x, fontsize=6)
        axes.set_ylabel(panel.y, fontsize=6)
    for axes in panels[len(grids) :]:
        axes.set_axis_off()
    if image is not None:
        place.colorbar(image, ax=list(panels), shrink=0.6).ax.tick_params(labelsize=6)


def _ticks(action: Callable[..., Any], names: Sequence[str], **options: Any) -> None:
    """Name at most a dozen of the rows or columns of a matrix."""
    step = -(-len(names) // 12)
    action(range(0, len(names), step), [plain(name) for name in names[::step]], **options)
