"""Figures of a search: the mixture weights, the current architecture's worth, and the course of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanglenas_engine.pipeline.figures.drawing import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    LETTER,
    ORANGE,
    PALE,
    WIDTH,
    curve,
    drawing_to,
    epoch_ticks,
    frame,
    from_zero,
    label_ends,
    note,
    panel,
    unit_of,
    widen,
    write,
)
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.superposition.choice import Choice
from tanglenas_engine.superposition.size import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        return note("No mixing weights: the method has none, or no choice has two options.", path)
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
    with drawing_to(path, 1.9 * lines + sum(bands.values())) as figure:
        for place, name in enumerate(once):
            room = LETTER * max(len(str(option)) for option in options[name])  # for names at the ends of the curves
            cell, y = WIDTH / columns, 1.9 * (place // columns)
            axes = panel(figure, cell * (place % columns) + 0.5, y + 0.3, cell - 0.85 - room, 1.15)
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
        return note("No epoch was searched.", path)
    epochs = [row["epoch"] for row in history]
    found = "architecture" in history[-1]
    with drawing_to(path, 5.1 if found else 3.0) as figure:
        axes = panel(figure, 0.55, 0.3, WIDTH - 0.7, 2.2)
        network = "current architecture" if found else "a fixed network"
        curve(axes, epochs, [row["validation_accuracy"] for row in history], BLUE, f"validation, {network}")
        curve(axes, epochs, [row["weight_accuracy"] for row in history], FAINT, "training, supernet")
        if found:
            digests = [row["digest"] for row in history]
            changes = [e for e, old, new in zip(epochs[1:], digests, digests[1:], strict=False) if old != new]
            low = axes.get_xaxis_transform()  # epochs across, a share of the panel upwards
            if changes:
                axes.plot(changes, [0.02] * len(changes), "^", color=ORANGE, markersize=5, transform=low,
                          label="architecture changed")  # fmt: skip
        frame(axes, epochs, "accuracy (%)")
        from_zero(axes)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
        if not found:
            return
        below = [panel(figure, WIDTH / 3 * i + 0.55, 3.3, WIDTH / 3 - 0.7, 1.3) for i in range(3)]
        for axes, key, title in zip(below, ("params", "macs"), ("parameters", "multiply-accumulates"), strict=False):
            current, expected = [row[key] for row in history], [row[f"expected_{key}"] for row in history]
            scale, unit = unit_of(max(current + expected))
            curve(axes, epochs, [value / scale for value in expected], FAINT, "expected")
            curve(axes, epochs, [value / scale for value in current], BLUE, "current", drawstyle="steps-post")
            frame(axes, epochs, f"{title}{unit}")
            widen(axes)
            from_zero(axes)
        below[0].legend(loc="best", fontsize=8)
        curve(below[2], epochs, [row["entropy"] for row in history], GREEN, None)
        frame(below[2], epochs, "entropy (0: decided)")
        below[2].set_ylim(-0.03, 1.03)


def training(history: Sequence[Record], path: str | Path) -> None:
    """Draw the rows of `RetrainResult.history`: the loss, and accuracies in %."""
    if not history:
        return note("No training: the network has the supernet's weights as they were.", path)
    epochs = [row["epoch"] for row in history]
    with drawing_to(path, 2.8) as figure:
        left, right = panel(figure, 0.55, 0.3, 2.4, 2.0), panel(figure, 3.6, 0.3, 2.9, 2.0)
        curve(left, epochs, [row["loss"] for row in history], FAINT, None)
        frame(left, epochs, "training loss")
        from_zero(left)
        ends = []
        for key, label, colour in (("accuracy", "training", FAINT), ("validation_accuracy", "validation", BLUE)):
            values = [row[key] for row in history]
            curve(right, epochs, values, colour, None)
            ends.append((values[-1], f"{label} {values[-1]:.1f} %", colour))
        frame(right, epochs, "accuracy (%)")
        from_zero(right)
        label_ends(right, ends)


def _weight_lines(
    axes: Axes, name: str, options: Sequence[Any], epochs: list[int], weights: list[list[float]], top: float
) -> None:
    from matplotlib import colormaps

    ends = []
    for rank, i in enumerate(sorted(range(len(options)), key=options.__getitem__)):
        colour = colormaps["viridis"](0.65 * rank / (len(options) - 1))
        values = [row[i] for row in weights]
        curve(axes, epochs, values, colour, None)
        ends.append((values[-1], str(options[i]), colour))
    axes.set_ylim(0, min(1.05 * top, 1.03))
    frame(axes, epochs, name)
    axes.axhline(1 / len(options), color=PALE, linewidth=1, zorder=0)
    label_ends(axes, ends)


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
    write(figure, 0.1, top + 0.12, f"{name}: weight of each option (dot: the largest in the end)")
    cell = (WIDTH - 1.2) / columns
    for place, i in enumerate(sorted(range(count), key=options.__getitem__)):
        line, column = divmod(place, columns)
        y = top + 0.4 + line * (height + 0.65)
        axes = panel(figure, 0.45 + cell * column, y, cell - 0.2, height)
        image = axes.imshow(
            [[epoch[layer][i] - 1 / count for epoch in weights] for layer in range(layers)],
            norm=norm, aspect="auto", interpolation="nearest",
            extent=(epochs[0] - 0.5, epochs[-1] + 0.5, layers + 0.5, 0.5),
        )  # fmt: skip
        axes.set_title(str(options[i]), pad=3)
        chosen = [layer for layer, winner in enumerate(winners, 1) if winner == i and used[layer - 1]]
        axes.plot([1.0 + 0.07 / (cell - 0.2)] * len(chosen), chosen, "o", transform=axes.get_yaxis_transform(),
                  color=INK, clip_on=False)  # fmt: skip
        axes.xaxis.set_major_locator(epoch_ticks(2 if cell < 1.2 else 5))
        _layer_ticks(axes, labels)
        axes.tick_params(left=column == 0, labelleft=column == 0, labelsize=8)
        axes.spines[:].set_visible(False)
        if column == 0:
            axes.set_ylabel("layer")
        axes.set_xlabel("epoch", labelpad=1)
    return image


def _colour_scale(figure: Figure, image: Any, top: float, height: float, reach: float) -> None:
    """Draw the scale of all maps in a figure, beside the first of them."""
    write(figure, WIDTH - 0.1, top + 0.12, "weight - 1 / options", ha="right", fontsize=8, color=FAINT)
    scale = panel(figure, WIDTH - 0.6, top + 0.4, 0.12, height)
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
            assignment.update(zip(choice.rows, picks, strict=True))
    choice = choices[name]
    if isinstance(choice, Choice):
        return [row.label for row in choice.rows], [row.active(assignment) for row in choice.rows]
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
