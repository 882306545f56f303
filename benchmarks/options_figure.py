"""The cost of a step against the number of options in a choice, for masks and for pad-and-sum.

    python -m benchmarks.options_figure --output options.png

The space is a GPT of 384 channels. Its width, heads and MLP ratio have 2, 3, 6 and 12 options between the same
extremes. Every number is a search step (weights and architecture) over a training step of the largest network, which is
the same for all. Pad-and-sum adds up a slice for every combination of the options that shape a weight, so its cost
grows with their product.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.search_step import CLOCKS, PRESETS, measure
from tanglenas_engine import create_space
from tanglenas_engine.superposition.mixture import COVERED


def options(count: int) -> dict[str, Any]:
    """Return options of `gpt` with `count` widths, numbers of heads and MLP ratios, and the same largest network."""
    return PRESETS["gpt"].options | {
        "embed_dim": _between(192, 384, count, 16),
        "num_heads": _between(1, 12, count, 1),
        "mlp_ratio": tuple(2 + 2 * i / (count - 1) for i in range(count)),
        "head_dim": 32,
    }


def _between(low: int, high: int, count: int, multiple: int) -> tuple[int, ...]:
    """Return `count` multiples of a number from `low` to `high`, as evenly spaced as multiples can be."""
    return tuple(round((low + (high - low) * i / (count - 1)) / multiple) * multiple for i in range(count))


def _points(
    counts: tuple[int, ...], relaxation: str, rounds: int, naive_up_to: int, clock: str
) -> list[dict[str, Any]]:
    points = []
    for count in counts:
        space = create_space("gpt", **options(count), relaxation=relaxation)
        naive = count <= naive_up_to
        found = measure(space, PRESETS["gpt"].batch, rounds, memory=False, naive=naive, sampled=False, clock=clock)
        points.append({"options": count, **found})
        click.echo(json.dumps(points[-1]))
    return points


def _draw(points: list[dict[str, Any]], relaxation: str, path: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(5, 3.5), layout="constrained")).subplots()
    naive = [point for point in points if "naive" in point]
    axes.plot(
        [p["options"] for p in naive], [p["naive"] / p["plain"] for p in naive], "o-", label="pad and sum (Algorithm 1)"
    )
    axes.plot(
        [p["options"] for p in points], [p["search_over_plain"] for p in points], "o-", label=f"masks ({relaxation})"
    )
    axes.axhline(1, color="grey", linestyle=":", label="training the largest network")
    axes.set(xlabel="Options a choice", ylabel="Search step / training step", xticks=[p["options"] for p in points])
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The figure to write.")
@click.option("--relaxation", type=click.Choice(list(COVERED)), default="exact")
@click.option("--counts", type=int, multiple=True, default=(2, 3, 6, 12), help="Numbers of options.")
@click.option("--rounds", type=click.IntRange(1), default=7)
@click.option("--naive-up-to", default=12, help="Measure pad-and-sum up to so many options.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch; by default its own choice.")
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall")
def main(
    output: Path,
    relaxation: str,
    counts: tuple[int, ...],
    rounds: int,
    naive_up_to: int,
    threads: int | None,
    clock: str,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    _draw(_points(counts, relaxation, rounds, naive_up_to, clock), relaxation, output)


if __name__ == "__main__":
    main()
