"""Figures of a search and of what it found: one PNG each, byte-equal for equal input.

matplotlib is imported when something is drawn, without pyplot, and its global settings stay as they are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanglenas_engine.errors import shown
from tanglenas_engine.pipeline.blocks import Block, blocks
from tanglenas_engine.runtime.files import write_atomic
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.choice import Choice
from tanglenas_engine.superposition.size import Assignment, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

WIDTH = 8.0  # inches: once the figure fills a README's column, 9 points are as large as the text around it
LETTER = 0.085  # inches of a letter
BLOCK = 0.17  # inches of the line of a block
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, told apart by the colour-blind
INK, FAINT, PALE = "#333333", "#8a8a8a", "#e6e6e6"
STYLE: dict[str, Any] = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.dpi": 200,
    "font.size": 9,
    "image.cmap": "PuOr_r",
    "legend.borderaxespad": 0.2,
    "legend.borderpad": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


def alphas(history: Sequence[Record], choices: Mapping[str, Choice | Sequence[Any]], path: str | Path) -> None:
    """Draw the mixture weights of every choice over epochs: lines for a choice made once, else maps of layer by epoch.

    Args:
        history: Rows of `SearchResult.history`; those of a method without mixing weights have no "mixture".
        choices: The choices of the space by name, or only their options, in the order of the weights. Then layers are
            counted without their stages. Choices with one option have nothing to show.
    """
    options = {name: choice.options if isinstance(choice, Choice) else choice for name, choice in choices.items()}
    mixtures = [row["mixture"] for row in history if "mixture" in row]
    open_choices = [name for name in (mixtures[0] if mixtures else ()) if len(options[name]) > 1]
    if not open_choices:
        return _note("No mixing weights: the method has none, or no choice has two options.", path)
    epochs = [row["epoch"] for row in history if "mixture" in row]
    once = [name for name in open_choices if not isinstance(mixtures[0][name][0], list)]
    layered = [name for name in open_choices if name not in once]
    columns, across = min(len(once), 3), {name: min(len(options[name]), 8) for name in layered}
    tall = {name: min(max(0.16 * len(mixtures[0][name]), 0.7), 3.5) for name in layered}  # inches of a map
    lines = -(-len(once) // 3)
    bands = {name: -(-len(options[name]) // across[name]) * (tall[name] + 0.65) + 0.25 for name in layered}
    # One scale for all panels of a kind, so that equal heights and equal colours mean the same.
    top = max([0.0, *(max(_flat(mixture[name])) for mixture in mixtures for name in once)])
    reach = max([0.05, *(_reach([mixture[name] for mixture in mixtures], len(options[name])) for name in layered)])
    with _drawing(path, 1.9 * lines + sum(bands.values())) as figure:
        for place, name in enumerate(once):
            room = LETTER * max(len(str(option)) for option in options[name])  # for names at the ends of the curves
            cell, y = WIDTH / columns, 1.9 * (place // columns)
            axes = _place(figure, cell * (place % columns) + 0.5, y + 0.3, cell - 0.85 - room, 1.15)
            _weight_lines(axes, name, options[name], epochs, [mixture[name] for mixture in mixtures], top)
        y = 1.9 * lines
        for name in layered:
            weights = [mixture[name] for mixture in mixtures]
            labels, used = _layers(choices, name, mixtures[-1])
            image = _weight_maps(
                figure, y, tall[name], across[name], name, options[name], epochs, weights, labels, used, reach
            )
            if name == layered[0]:
                _colour_scale(figure, image, y, tall[name], reach)
            y += bands[name]


def anytime(history: Sequence[Record], path: str | Path) -> None:
    """Draw what the search would have given at any epoch: accuracy in %, cost and how decided the mixture is.

    A sampled search has no architecture before discretize: the accuracy is then that of one fixed network.
    """
    if not history:
        return _note("No epoch was searched.", path)
    epochs = [row["epoch"] for row in history]
    found = "architecture" in history[-1]
    with _drawing(path, 5.1 if found else 3.0) as figure:
        axes = _place(figure, 0.55, 0.3, WIDTH - 0.7, 2.2)
        network = "current architecture" if found else "a fixed network"
        _curve(axes, epochs, [row["validation_accuracy"] for row in history], BLUE, f"validation, {network}")
        _curve(axes, epochs, [row["weight_accuracy"] for row in history], FAINT, "training, supernet")
        if found:
            digests = [row["digest"] for row in history]
            changes = [e for e, old, new in zip(epochs[1:], digests, digests[1:], strict=False) if old != new]
            low = axes.get_xaxis_transform()  # epochs across, a share of the panel upwards
            if changes:
                axes.plot(changes, [0.02] * len(changes), "^", color=ORANGE, markersize=5, transform=low,
                          label="architecture changed")  # fmt: skip
        _frame(axes, epochs, "accuracy (%)")
        from_zero(axes)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
        if not found:
            return
        below = [_place(figure, WIDTH / 3 * i + 0.55, 3.3, WIDTH / 3 - 0.7, 1.3) for i in range(3)]
        for axes, key, title in zip(below, ("params", "macs"), ("parameters", "multiply-accumulates"), strict=False):
            current, expected = [row[key] for row in history], [row[f"expected_{key}"] for row in history]
            scale, unit = _unit(max(current + expected))
            _curve(axes, epochs, [value / scale for value in expected], FAINT, "expected")
            _curve(axes, epochs, [value / scale for value in current], BLUE, "current", drawstyle="steps-post")
            _frame(axes, epochs, f"{title}{unit}")
            _widen(axes)
            from_zero(axes)
        below[0].legend(loc="best", fontsize=8)
        _curve(below[2], epochs, [row["entropy"] for row in history], GREEN, None)
        _frame(below[2], epochs, "entropy (0: decided)")
        below[2].set_ylim(-0.03, 1.03)


def training(history: Sequence[Record], path: str | Path) -> None:
    """Draw the rows of `RetrainResult.history`: the loss, and accuracies in %."""
    if not history:
        return _note("No training: the network has the supernet's weights as they were.", path)
    epochs = [row["epoch"] for row in history]
    with _drawing(path, 2.8) as figure:
        left, right = _place(figure, 0.55, 0.3, 2.4, 2.0), _place(figure, 3.6, 0.3, 2.9, 2.0)
        _curve(left, epochs, [row["loss"] for row in history], FAINT, None)
        _frame(left, epochs, "training loss")
        from_zero(left)
        ends = []
        for key, label, colour in (("accuracy", "training", FAINT), ("validation_accuracy", "validation", BLUE)):
            values = [row[key] for row in history]
            _curve(right, epochs, values, colour, None)
            ends.append((values[-1], f"{label} {values[-1]:.1f} %", colour))
        _frame(right, epochs, "accuracy (%)")
        from_zero(right)
        _label_ends(right, ends)


def architecture(space: SearchSpace, architecture: Architecture, path: str | Path) -> None:
    """Draw the network found: its option of every choice among all of them, layer by layer from the input on.

    Raises:
        TangleNASError: The architecture is not of this space.
    """
    assignment = space.assignment_of(architecture)  # also checks that the architecture is of this space
    cost = space.cost(architecture)
    once = [choice for choice in space.choices.values() if not choice.layered]
    layered = [choice for choice in space.choices.values() if choice.layered]
    widest = 0.07 * max((len(_heading(choice)) for choice in layered), default=0) + 0.3  # inches of a column
    columns = min(4, max(1, int((WIDTH - 0.2) / widest)))
    grid = [layered[i : i + columns] for i in range(0, len(layered), columns)]
    layers = [max(len(choice) for choice in line) for line in grid]
    table: list[Block] = []
    trouble = ""
    try:
        table = blocks(space, architecture)
    except Exception as error:  # of a plugin's network without data; a figure ends no stage
        trouble = _short(f"its blocks cannot be listed: {shown(error)}", 100)
    height = 0.65 + 0.3 * len(once) + 0.24 * sum(layers) + 0.5 * len(grid)
    with _drawing(path, height + (0.45 + BLOCK * len(table) if table or trouble else 0)) as figure:
        _write(figure, 0.1, 0.15, f"{architecture.space}  {architecture.digest}", fontweight="bold")
        _write(figure, 0.1, 0.4, f"{cost.params:,} parameters, {cost.macs:,} multiply-accumulates")
        if table:
            _block_table(figure, height, table)
        elif trouble:
            _write(figure, 0.1, height + 0.2, trouble, fontsize=8, color=FAINT, parse_math=False)
        if layered:
            _write(figure, WIDTH - 0.1, 0.4, _numbering(layered), ha="right", color=FAINT)
        if once:
            axes = _place(figure, 0.1, 0.65, WIDTH - 0.2, 0.3 * len(once))
            _option_table(axes, once, architecture)
        y = 0.65 + 0.3 * len(once)
        for line, most in zip(grid, layers, strict=True):
            cell = (WIDTH - 0.2) / len(grid[0])
            for place, choice in enumerate(line):
                axes = _place(figure, cell * place + 0.4, y + 0.4, cell - 0.4, 0.24 * len(choice))
                _layer_bars(axes, choice, assignment)
            y += 0.24 * most + 0.5


def _numbering(layered: Sequence[Choice]) -> str:
    if any(len(choice.stages) > 1 for choice in layered):
        return "layers are numbered from the input, as stage.block"
    return "layers are numbered from the input"


def candidates(rows: Sequence[Record], path: str | Path) -> None:
    """Draw the candidates of `DiscretizeResult`: loss against parameters, the best marked."""
    if not rows:
        return _note("No candidates.", path)
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
        return _note("No candidates.", path)
    with _loss_by_cost(rows, cost, path, s=14, c=FAINT, alpha=0.5) as (axes, scale):
        axes.step([row[cost] / scale for row in front], [row["loss"] for row in front], where="post",
                  color=ORANGE, marker="o", markersize=4, label=f"front of {len(front)}")  # fmt: skip


@contextmanager
def _loss_by_cost(rows: Sequence[Record], cost: str, path: str | Path, **look: Any) -> Iterator[tuple[Axes, float]]:
    """Draw candidates by loss and cost, and what the block adds with the axes and the unit of the cost."""
    scale, unit = _unit(max(row[cost] for row in rows))
    names = {"params": "parameters", "macs": "multiply-accumulates"}
    with _drawing(path, 3.6) as figure:
        axes = _place(figure, 0.55, 0.3, WIDTH - 0.7, 2.8)
        axes.scatter([row[cost] / scale for row in rows], [row["loss"] for row in rows], linewidths=0,
                     label=f"{len(rows)} candidate{'s' * (len(rows) > 1)}", **look)  # fmt: skip
        yield axes, scale
        axes.set_title("loss with the supernet's weights (cross-entropy)")
        axes.set_xlabel(f"{names.get(cost, cost)}{unit}")
        axes.margins(0.06)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        if len(rows) == 1:
            _widen(axes)
        from_zero(axes, both=True)


def rank_correlation(rows: Sequence[Record], kendall_tau: float, spearman: float, path: str | Path) -> None:
    """Draw the rows of `RankCorrelation`: the table's value of each architecture against its loss in the supernet."""
    if not rows:
        return _note("No architectures.", path)
    with _drawing(path, 4.1) as figure:
        axes = _place(figure, 0.65, 0.3, WIDTH - 0.8, 3.3)
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
    with _drawing(path, side + room + 0.7) as figure:
        axes = _place(figure, room + 0.3, 0.3, side, side)
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
        return _note("No networks were measured.", path)
    with _drawing(path, 4.1) as figure:
        axes = _place(figure, 0.65, 0.3, WIDTH - 0.8, 3.3)
        ends = min(*predicted, *measured), max(*predicted, *measured)
        axes.plot(ends, ends, color=FAINT, linewidth=1, zorder=0)
        axes.scatter(measured, predicted, s=18, c=BLUE, alpha=0.7, linewidths=0)
        axes.set_title(f"predicted latency of {len(measured)} networks (ms)")
        axes.set_xlabel("measured latency (ms)")
        axes.margins(0.04)
        from_zero(axes, both=True)


@contextmanager
def _drawing(path: str | Path, height: float) -> Iterator[Figure]:
    """Open a figure `height` inches high, and write it to `path` when the block ends."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):  # not the user's matplotlibrc: equal input gives equal bytes
        figure = Figure(figsize=(WIDTH, height))
        yield figure
        content = png(figure)
    write_atomic(path, content)


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG, byte-equal for an equal figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    # The file would name matplotlib's release otherwise.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def _place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add a panel, placed in inches from the upper left corner.

    matplotlib's own layouts give up, with a warning, where a space has many or few options or layers.
    """
    full = figure.get_figheight()
    return figure.add_axes((left / WIDTH, 1 - (top + height) / full, width / WIDTH, height / full))


def _write(figure: Figure, left: float, middle: float, text: str, **options: Any) -> None:
    """Add a line of text, placed in inches from the upper left corner."""
    figure.text(left / WIDTH, 1 - middle / figure.get_figheight(), text, va="center", **options)


def _note(text: str, path: str | Path) -> None:
    """Write a figure that says why there is nothing to draw."""
    with _drawing(path, 0.6) as figure:
        _write(figure, WIDTH / 2, 0.3, text, ha="center")


def _weight_lines(
    axes: Axes, name: str, options: Sequence[Any], epochs: list[int], weights: list[list[float]], top: float
) -> None:
    from matplotlib import colormaps

    ends = []
    for rank, i in enumerate(sorted(range(len(options)), key=options.__getitem__)):
        colour = colormaps["viridis"](0.65 * rank / (len(options) - 1))
        values = [row[i] for row in weights]
        _curve(axes, epochs, values, colour, None)
        ends.append((values[-1], str(options[i]), colour))
    axes.set_ylim(0, min(1.05 * top, 1.03))
    _frame(axes, epochs, name)
    axes.axhline(1 / len(options), color=PALE, linewidth=1, zorder=0)
    _label_ends(axes, ends)


def _weight_maps(
    figure: Figure,
    top: float,
    height: float,
    columns: int,
    name: str,
    options: Sequence[Any],
    epochs: list[int],
    weights: list[list[list[float]]],
    labels: list[str],
    used: list[bool],
    reach: float,
) -> Any:
    """Draw a map of layer by epoch for every option, and return one of them. A weight of 1 / options is white.

    Layers beyond the depth that is the most probable in the end are not `used`, and have no dot.
    """
    from matplotlib.colors import CenteredNorm

    count, layers = len(options), len(weights[0])
    norm = CenteredNorm(0, reach)
    winners = [layer.index(max(layer)) for layer in weights[-1]]
    _write(figure, 0.1, top + 0.12, f"{name}: weight of each option (dot: the largest in the end)")
    cell = (WIDTH - 1.2) / columns
    for place, i in enumerate(sorted(range(count), key=options.__getitem__)):
        line, column = divmod(place, columns)
        y = top + 0.4 + line * (height + 0.65)
        axes = _place(figure, 0.45 + cell * column, y, cell - 0.2, height)
        image = axes.imshow(
            [[epoch[layer][i] - 1 / count for epoch in weights] for layer in range(layers)],
            norm=norm, aspect="auto", interpolation="nearest",
            extent=(epochs[0] - 0.5, epochs[-1] + 0.5, layers + 0.5, 0.5),
        )  # fmt: skip
        axes.set_title(str(options[i]), pad=3)
        chosen = [layer for layer, winner in enumerate(winners, 1) if winner == i and used[layer - 1]]
        axes.plot([1.0 + 0.07 / (cell - 0.2)] * len(chosen), chosen, "o", transform=axes.get_yaxis_transform(),
                  color=INK, clip_on=False)  # fmt: skip
        axes.xaxis.set_major_locator(_epoch_ticks(2 if cell < 1.2 else 5))
        _layer_ticks(axes, labels)
        axes.tick_params(left=column == 0, labelleft=column == 0, labelsize=8)
        axes.spines[:].set_visible(False)
        if column == 0:
            axes.set_ylabel("layer")
        axes.set_xlabel("epoch", labelpad=1)
    return image


def _colour_scale(figure: Figure, image: Any, top: float, height: float, reach: float) -> None:
    """Draw the scale of all maps in a figure, beside the first of them."""
    _write(figure, WIDTH - 0.1, top + 0.12, "weight - 1 / options", ha="right", fontsize=8, color=FAINT)
    scale = _place(figure, WIDTH - 0.6, top + 0.4, 0.12, height)
    bar = figure.colorbar(image, cax=scale, ticks=[-reach, 0, reach], format="%+.2f")
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _layers(
    choices: Mapping[str, Choice | Sequence[Any]], name: str, mixture: Mapping[str, Any]
) -> tuple[list[str], list[bool]]:
    """Return the label of each layer of a choice, and whether the most probable depth of a mixture has it."""
    assignment: dict[Row, int] = {}
    for other, choice in choices.items():
        if isinstance(choice, Choice):
            rows = mixture[other] if choice.layered else [mixture[other]]
            picks = (row.index(max(row)) for row in rows)
            assignment.update(zip(choice.layer_rows, picks, strict=True))
    choice = choices[name]
    if isinstance(choice, Choice):
        return [row.label for row in choice.layer_rows], [row.active(assignment) for row in choice.layer_rows]
    count = len(mixture[name])
    return [str(layer) for layer in range(1, count + 1)], [True] * count


def _layer_ticks(axes: Axes, labels: Sequence[str]) -> None:
    """Name the layers on the vertical axis: all of up to 20, else the first of each stage and the last."""
    firsts = [i for i, label in enumerate(labels) if label.endswith(".1")]
    shown = range(len(labels)) if len(labels) <= 20 else sorted({0, *firsts, len(labels) - 1})
    axes.set_yticks([i + 1 for i in shown], [labels[i] for i in shown])


def _reach(weights: Any, count: int) -> float:
    """Return how far nested lists of weights go from 1 / count."""
    return max(abs(weight - 1 / count) for weight in _flat(weights))


def _flat(weights: Any) -> list[float]:
    return [weight for row in weights for weight in _flat(row)] if isinstance(weights, list) else [weights]


def _option_table(axes: Axes, choices: list[Choice], architecture: Architecture) -> None:
    """Draw a line per choice with all its options, the chosen one filled."""
    start = 0.3 + LETTER * max(len(choice.name) for choice in choices)  # inches of the names
    pitch = min(0.75, (WIDTH - start - 0.2) / max(len(choice.options) for choice in choices))
    for y, choice in enumerate(choices):
        axes.text(0, y, choice.name, va="center")
        for x, option in enumerate(sorted(choice.options)):
            chosen = option == architecture.choices[choice.name]
            axes.barh(y, 0.9 * pitch, 0.8, start + x * pitch, color=BLUE if chosen else PALE)
            axes.text(start + (x + 0.45) * pitch, y, str(option), ha="center", va="center_baseline",
                      color="white" if chosen else FAINT)  # fmt: skip
    axes.set(xlim=(0, WIDTH), ylim=(len(choices) - 0.5, -0.5))
    axes.set_axis_off()


def _block_table(figure: Figure, top: float, table: Sequence[Block]) -> None:
    """Draw a line per block: its shape, its stride where it has one, and a bar of its multiply-accumulates."""
    total, largest = sum(block.macs for block in table), max(block.macs for block in table)
    strided = any(block.stride for block in table)
    left, length = (4.3, WIDTH - 6.2) if strided else (3.7, WIDTH - 5.6)
    shape = (
        "channels x H x W" if strided else "tokens x channels" if any(" x " in b.output for b in table) else "channels"
    )
    for x, text in ((0.1, "block"), (2.2, shape), (3.7, "stride" if strided else ""), (left, "MACs, share")):
        _write(figure, x, top + 0.18, text, color=FAINT)
    axes = _place(figure, left, top + 0.32, length + 1.8, BLOCK * len(table))
    for y, block in enumerate(table):
        middle = top + 0.32 + BLOCK * (y + 0.5)
        _write(figure, 0.1, middle, _short(f"{block.name}  {block.kind}", 26), fontsize=8, parse_math=False)
        _write(figure, 2.2, middle, _short(block.output, 18), fontsize=8)
        if block.stride:
            _write(figure, 3.7, middle, str(block.stride), fontsize=8,
                   fontweight="bold" if block.stride > 1 else "normal")  # fmt: skip
        bar = length * block.macs / largest
        axes.barh(y, bar, 0.75, color=BLUE)
        axes.text(bar + 0.06, y, f"{block.macs:,}  {100 * block.macs / total:.0f} %", va="center_baseline", fontsize=8)
    axes.set(xlim=(0, length + 1.8), ylim=(len(table) - 0.5, -0.5))
    axes.set_axis_off()


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 3]}..."


def _heading(choice: Choice) -> str:
    """Return the name of a choice with its options, if they are numbers."""
    options = sorted(choice.options)
    if isinstance(options[0], str):
        return choice.name
    listed = ", ".join(map(str, options)) if len(options) <= 4 else f"{options[0]} to {options[-1]}"
    return f"{choice.name} ({listed})"


def _layer_bars(axes: Axes, choice: Choice, assignment: Assignment) -> None:
    """Draw a bar per layer up to its option, on a ground as long as the largest option. Unused layers are hatched."""
    options = sorted(choice.options)
    if isinstance(options[0], str):
        _layer_names(axes, choice, assignment)
        return
    largest = options[-1]
    inch = largest * axes.figure.dpi / axes.bbox.width
    for layer, row in enumerate(choice.layer_rows, 1):
        if not row.active(assignment):
            axes.barh(layer, largest, 0.8, color="white", edgecolor=PALE, linewidth=0, hatch="////")
            continue
        option = choice.options[assignment[row]]
        axes.barh(layer, largest, 0.8, color=PALE)
        axes.barh(layer, option, 0.8, color=BLUE)
        inside = option > (LETTER * len(str(option)) + 0.1) * inch
        axes.text(0.06 * inch + (0 if inside else option), layer, str(option), va="center_baseline",
                  color="white" if inside else INK)  # fmt: skip
    if min((b - a for a, b in pairwise(options)), default=0) > 0.1 * inch:  # where options can be told apart
        axes.vlines(options[:-1], 0.5, len(choice) + 0.5, color="white", linewidth=0.8)
    axes.set_title(_heading(choice))
    axes.set(xlim=(0, largest), ylim=(len(choice) + 0.5, 0.5), xticks=[])
    axes.set_yticks(range(1, len(choice) + 1), [row.label for row in choice.layer_rows])
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _layer_names(axes: Axes, choice: Choice, assignment: Assignment) -> None:
    """Draw a line per layer in use with a mark for every option, the chosen one filled and named."""
    for layer, row in enumerate(choice.layer_rows, 1):
        if not row.active(assignment):
            continue
        name = choice.options[assignment[row]]
        for x, option in enumerate(choice.options):
            axes.barh(layer, 0.06, 0.8, 0.08 * x, color=BLUE if option == name else PALE)
        axes.text(0.08 * len(choice.options) + 0.02, layer, name, va="center_baseline")
    axes.set_title(_heading(choice))
    axes.set(xlim=(0, 1), ylim=(len(choice) + 0.5, 0.5), xticks=[])
    axes.set_yticks(range(1, len(choice) + 1), [row.label for row in choice.layer_rows])
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _curve(axes: Axes, epochs: list[int], values: list[float], colour: Any, label: str | None, **options: Any) -> None:
    axes.plot(epochs, values, color=colour, label=label, marker="o" if len(epochs) <= 20 else "", **options)


def _frame(axes: Axes, epochs: list[int], title: str) -> None:
    """Set what all panels over epochs share: title, ticks and limits."""
    axes.set_title(title)
    axes.set_xlabel("epoch")
    margin = 0.02 * (epochs[-1] - epochs[0]) or 0.5
    axes.set_xlim(max(epochs[0] - margin, 0.5), epochs[-1] + margin)
    axes.xaxis.set_major_locator(_epoch_ticks(6))
    axes.ticklabel_format(axis="y", useOffset=False)


def _epoch_ticks(number: int) -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(number, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def _widen(axes: Axes) -> None:
    """Let the vertical axis span at least a tenth of its values: the last digits of a constant are no trend."""
    low, high = axes.get_ylim()
    centre, reach = (low + high) / 2, max(high - low, 0.1 * high) / 2
    axes.set_ylim(centre - reach, centre + reach)


def from_zero(axes: Axes, *, both: bool = False) -> None:
    """Let the vertical axis, or both, begin at 0; mark one as broken where 0 would leave the values half of it."""
    for vertical in (True, False) if both else (True,):
        low, high = axes.get_ylim() if vertical else axes.get_xlim()
        least = axes.dataLim.y0 if vertical else axes.dataLim.x0
        if low > high / 2:
            _break(axes, vertical)
        elif least >= 0 and vertical:
            axes.set_ylim(0, high)
        elif least >= 0:
            axes.set_xlim(0, high)


def _break(axes: Axes, vertical: bool) -> None:
    """Mark an axis as broken, by two strokes through its line: it does not begin at 0."""
    along, across = axes.bbox.height, axes.bbox.width
    if not vertical:
        along, across = across, along
    inch, wide = axes.figure.dpi / along, axes.figure.dpi / across
    for place, colour, width in ((0.10, "white", 3.0), (0.08, FAINT, 0.8), (0.12, FAINT, 0.8)):
        low, high = (place - 0.015) * inch, (place + 0.015) * inch
        ends = [-0.05 * wide, 0.05 * wide], [low, high]
        axes.plot(*(ends if vertical else ends[::-1]), transform=axes.transAxes, color=colour, linewidth=width,
                  marker="", clip_on=False, zorder=5)  # fmt: skip


def _label_ends(axes: Axes, ends: list[tuple[float, str, Any]]) -> None:
    """Name curves at their ends, to the right of the panel, moved apart where names would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.15 * axes.figure.dpi / axes.bbox.height
    inch = axes.figure.dpi / axes.bbox.width
    ends = sorted(ends, key=lambda end: end[0])
    places: list[float] = []
    for y, _, _ in ends:
        places.append(max(y, places[-1] + gap) if places else y)
    above = max(0.0, places[-1] - high)
    at_right = axes.get_yaxis_transform()
    for place, (y, text, colour) in zip((place - above for place in places), ends, strict=True):
        axes.text(1 + 0.2 * inch, place, text, transform=at_right, color=colour, va="center_baseline")
        if abs(place - y) > gap / 2:
            axes.plot([1 + 0.02 * inch, 1 + 0.16 * inch], [y, place], transform=at_right, color=colour,
                      linewidth=0.6, marker="", clip_on=False)  # fmt: skip


def _unit(largest: float) -> tuple[float, str]:
    """Return the scale in which numbers up to `largest` are short, and the words for it on an axis."""
    for scale, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= scale:
            return scale, f" ({name})"
    return 1.0, ""
