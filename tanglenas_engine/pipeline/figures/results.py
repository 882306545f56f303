"""Figures of what was measured: candidates, fronts, rankings, classes and latencies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanglenas_engine.pipeline.figures.drawing import (
    BLUE,
    FAINT,
    INK,
    LETTER,
    ORANGE,
    WIDTH,
    drawing_to,
    from_zero,
    note,
    panel,
    unit_of,
    widen,
)
from tanglenas_engine.runtime.tracking import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def candidates(rows: Sequence[Record], path: str | Path) -> None:
    """Draw the candidates of `DiscretizeResult`: loss against parameters, the best marked."""
    if not rows:
        return note("No candidates.", path)
    best = rows[0]  # they come best first
    with _loss_by_cost(rows, "params", path, s=18, c=BLUE, alpha=0.6) as (axes, scale):
        axes.scatter([best["params"] / scale], [best["loss"]], s=70, facecolors="none", edgecolors=ORANGE,
                     linewidths=1.8, label=f"best: {best['loss']:.3f} ({best['accuracy']:.1f} %)")  # fmt: skip


def pareto(rows: Sequence[Record], front: Sequence[Record], cost: str, path: str | Path) -> None:
    """Draw candidates by loss and cost, with the Pareto front as a line.

    Args:
        rows: The rows of `DiscretizeResult.candidates`.
        front: The rows that no other row dominates, cheapest first.
        cost: The key of the cost in the rows.
    """
    if not front:
        return note("No candidates.", path)
    with _loss_by_cost(rows, cost, path, s=14, c=FAINT, alpha=0.5) as (axes, scale):
        axes.step([row[cost] / scale for row in front], [row["loss"] for row in front], where="post",
                  color=ORANGE, marker="o", markersize=4, label=f"front of {len(front)}")  # fmt: skip


@contextmanager
def _loss_by_cost(rows: Sequence[Record], cost: str, path: str | Path, **look: Any) -> Iterator[tuple[Axes, float]]:
    """Draw candidates by loss and cost, and what the block adds with the axes and the unit of the cost."""
    scale, unit = unit_of(max(row[cost] for row in rows))
    names = {"params": "parameters", "macs": "multiply-accumulates"}
    with drawing_to(path, 3.6) as figure:
        axes = panel(figure, 0.55, 0.3, WIDTH - 0.7, 2.8)
        axes.scatter([row[cost] / scale for row in rows], [row["loss"] for row in rows], linewidths=0,
                     label=f"{len(rows)} candidate{'s' * (len(rows) > 1)}", **look)  # fmt: skip
        yield axes, scale
        axes.set_title("loss with the supernet's weights (cross-entropy)")
        axes.set_xlabel(f"{names.get(cost, cost)}{unit}")
        axes.margins(0.06)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        if len(rows) == 1:
            widen(axes)
        from_zero(axes, both=True)


def rank_correlation(rows: Sequence[Record], kendall_tau: float, spearman: float, path: str | Path) -> None:
    """Draw the rows of `RankCorrelation`: the table's value of each architecture against its loss in the supernet.

    Losses that are not finite have no place.
    """
    rows = [row for row in rows if math.isfinite(row["loss"])]
    if not rows:
        return note("No architectures.", path)
    with drawing_to(path, 4.1) as figure:
        axes = panel(figure, 0.65, 0.3, WIDTH - 0.8, 3.3)
        axes.scatter([row["loss"] for row in rows], [row["table_value"] for row in rows], s=14, c=BLUE,
                     alpha=min(0.6, max(0.15, 200 / len(rows))), linewidths=0)  # fmt: skip
        axes.set_title(
            f"table value of {len(rows):,} architectures (Kendall tau {kendall_tau:.2f}, Spearman {spearman:.2f})"
        )
        axes.set_xlabel("loss with the supernet's weights (cross-entropy)")
        axes.margins(0.04)
        axes.ticklabel_format(useOffset=False)
        from_zero(axes, both=True)


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str], path: str | Path) -> None:
    """Draw the confusion matrix of `EvaluateResult`: the share of each class (row) that was taken for each (column)."""
    classes = len(names)
    matrix = [[count / max(1, sum(row)) for count in row[:classes]] for row in counts[:classes]]
    labels = [name if len(name) <= 24 else f"{name[:22]}..." for name in names]
    room = 0.2 + LETTER * max(map(len, labels)) if classes <= 40 else 0.4
    side = min(WIDTH - room - 0.4, max(2.0, 0.32 * classes))
    with drawing_to(path, side + room + 0.7) as figure:
        axes = panel(figure, room + 0.3, 0.3, side, side)
        axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axes.set_title("share of each class (row) that the network took for each (column), in %")
        axes.set_xlabel("class that the network took it for")
        axes.set_ylabel("class")
        if classes <= 40:
            # What a folder is called is no formula, whatever signs it has.
            axes.set_xticks(range(classes), labels, rotation=90, parse_math=False)
            axes.set_yticks(range(classes), labels, parse_math=False)
        if classes <= 16:
            for row, column in ((i, j) for i in range(classes) for j in range(classes) if matrix[i][j] >= 0.005):
                share = matrix[row][column]
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                          color="white" if share > 0.5 else INK)  # fmt: skip


def predictions(predicted: Sequence[float], measured: Sequence[float], path: str | Path) -> None:
    """Draw predicted against measured latencies in milliseconds, with the line on which they agree."""
    if not measured:
        return note("No networks were measured.", path)
    with drawing_to(path, 4.1) as figure:
        axes = panel(figure, 0.65, 0.3, WIDTH - 0.8, 3.3)
        ends = min(*predicted, *measured), max(*predicted, *measured)
        axes.plot(ends, ends, color=FAINT, linewidth=1, zorder=0)
        axes.scatter(measured, predicted, s=18, c=BLUE, alpha=0.7, linewidths=0)
        axes.set_title(f"predicted latency of {len(measured)} networks (ms)")
        axes.set_xlabel("measured latency (ms)")
        axes.margins(0.04)
        from_zero(axes, both=True)
