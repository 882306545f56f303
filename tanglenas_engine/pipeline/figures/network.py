"""The figure of an architecture: its options, and the blocks of its network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tanglenas_engine.errors import shown
from tanglenas_engine.pipeline.blocks import Block, blocks
from tanglenas_engine.pipeline.figures.drawing import (
    BLOCK,
    BLUE,
    FAINT,
    INK,
    LETTER,
    PALE,
    WIDTH,
    drawing_to,
    panel,
    short,
    write,
)
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.choice import Choice
from tanglenas_engine.superposition.size import Assignment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        trouble = short(f"its blocks cannot be listed: {shown(error)}", 100)
    height = 0.65 + 0.3 * len(once) + 0.24 * sum(layers) + 0.5 * len(grid)
    with drawing_to(path, height + (0.45 + BLOCK * len(table) if table or trouble else 0)) as figure:
        write(figure, 0.1, 0.15, f"{architecture.space}  {architecture.digest}", fontweight="bold")
        write(figure, 0.1, 0.4, f"{cost.params:,} parameters, {cost.macs:,} multiply-accumulates")
        if table:
            _block_table(figure, height, table)
        elif trouble:
            write(figure, 0.1, height + 0.2, trouble, fontsize=8, color=FAINT, parse_math=False)
        if layered:
            write(figure, WIDTH - 0.1, 0.4, _numbering(layered), ha="right", color=FAINT)
        if once:
            axes = panel(figure, 0.1, 0.65, WIDTH - 0.2, 0.3 * len(once))
            _option_table(axes, once, architecture)
        y = 0.65 + 0.3 * len(once)
        for line, most in zip(grid, layers, strict=True):
            cell = (WIDTH - 0.2) / len(grid[0])
            for place, choice in enumerate(line):
                axes = panel(figure, cell * place + 0.4, y + 0.4, cell - 0.4, 0.24 * len(choice))
                _layer_bars(axes, choice, assignment)
            y += 0.24 * most + 0.5


def _numbering(layered: Sequence[Choice]) -> str:
    if any(len(choice.stages) > 1 for choice in layered):
        return "layers are numbered from the input, as stage.block"
    return "layers are numbered from the input"


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
        write(figure, x, top + 0.18, text, color=FAINT)
    axes = panel(figure, left, top + 0.32, length + 1.8, BLOCK * len(table))
    for y, block in enumerate(table):
        middle = top + 0.32 + BLOCK * (y + 0.5)
        write(figure, 0.1, middle, short(f"{block.name}  {block.kind}", 26), fontsize=8, parse_math=False)
        write(figure, 2.2, middle, short(block.output, 18), fontsize=8)
        if block.stride:
            write(figure, 3.7, middle, str(block.stride), fontsize=8,
                   fontweight="bold" if block.stride > 1 else "normal")  # fmt: skip
        bar = length * block.macs / largest
        axes.barh(y, bar, 0.75, color=BLUE)
        axes.text(bar + 0.06, y, f"{block.macs:,}  {100 * block.macs / total:.0f} %", va="center_baseline", fontsize=8)
    axes.set(xlim=(0, length + 1.8), ylim=(len(table) - 0.5, -0.5))
    axes.set_axis_off()


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
    for layer, row in enumerate(choice.rows, 1):
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
    axes.set_yticks(range(1, len(choice) + 1), [row.label for row in choice.rows])
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _layer_names(axes: Axes, choice: Choice, assignment: Assignment) -> None:
    """Draw a line per layer in use with a mark for every option, the chosen one filled and named."""
    for layer, row in enumerate(choice.rows, 1):
        if not row.active(assignment):
            continue
        name = choice.options[assignment[row]]
        for x, option in enumerate(choice.options):
            axes.barh(layer, 0.06, 0.8, 0.08 * x, color=BLUE if option == name else PALE)
        axes.text(0.08 * len(choice.options) + 0.02, layer, name, va="center_baseline")
    axes.set_title(_heading(choice))
    axes.set(xlim=(0, 1), ylim=(len(choice) + 0.5, 0.5), xticks=[])
    axes.set_yticks(range(1, len(choice) + 1), [row.label for row in choice.rows])
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", length=0)
