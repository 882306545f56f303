"""When in their trainings are networks ranked as a search ranks them?

    python -m benchmarks.moments benchmarks/results/gpt_nano.jsonl --output ranks.png

The file has results of `benchmarks.finding`: a pool of networks with the validation loss after each epoch, and searches
with the loss of each network of the pool by the weights of the supernet. Each row of the table is a ranking, and each
column its Spearman correlation with the ranking after so many epochs of the networks' own trainings. Below are the same
networks fine-tuned from the weights of a search, if `benchmarks.finding lengths` did that.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy import stats

Rows = dict[str, dict[str, Any]]
Lines = dict[str, list[float]]
END = "their own test loss at the end"


def correlations(rankings: Sequence[Sequence[float]], curves: np.ndarray[Any, Any]) -> list[float]:
    """Return the mean correlation of some rankings with the losses after each epoch.

    Args:
        rankings: A value for each network, in each.
        curves: The validation losses, `(networks, epochs)`.
    """
    return [float(np.mean([stats.spearmanr(one, losses).statistic for one in rankings])) for losses in curves.T]


def from_scratch(rows: Rows) -> Lines:
    """Return the lines of the pool: its own end, and each kind of search, as a mean over its seeds."""
    pool = [row for key, row in rows.items() if key.startswith("pool/") and key.endswith("/0")]
    rankings: dict[str, dict[tuple[float, ...], None]] = {END: {tuple(row["test_loss"] for row in pool): None}}
    for key, row in rows.items():
        kind, name = key.split("/")[:2]
        if kind in ("ablation", "found") and len(losses := row.get("pool_losses", ())) == len(pool):
            # A search has a row for each derivation. What was found is named by both.
            search = name.rpartition(", ")[0] if kind == "found" else name
            rankings.setdefault(search.replace("spos whole", "spos, whole"), {})[tuple(losses)] = None
    curves = np.array([row["curve"] for row in pool])
    return {
        name if name == END else f"{name}, {len(found)} seeds".replace("1 seeds", "1 seed"): correlations(
            [*found], curves
        )
        for name, found in rankings.items()
    }


def fine_tuned(rows: Rows) -> dict[str, Lines]:
    """Return the lines of the networks that were fine-tuned from a search: their own end, and that search."""
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for key, row in rows.items():
        if key.startswith("lengths/") and key.count("/") == 3:
            _, name, epochs, number = key.split("/")
            groups.setdefault((name, epochs), {})[int(number)] = row
    found = {}
    for (name, epochs), tuned in groups.items():
        losses = rows.get(f"lengths/{name}/search", {}).get("pool_losses")
        if losses and len(tuned) > 2:
            curves = np.array([row["curve"] for row in tuned.values()])
            found[f"{name}, for {epochs} epochs, {len(tuned)} networks"] = {
                END: correlations([[row["test_loss"] for row in tuned.values()]], curves),
                "the search they start from": correlations([[losses[number] for number in tuned]], curves),
            }
    return found


def draw(panels: dict[str, Lines], path: Path) -> None:
    """Draw a panel for each set of lines. Searches of one seed are in the table alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, values in ((name, values) for name, values in lines.items() if not name.endswith(", 1 seed")):
            color = {"color": "0.6"} if name == END else {}
            place.plot(range(1, len(values) + 1), values, "o-", markersize=3, label=name, **color)
        place.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        place.set_title("\n".join(textwrap.wrap(title, 52)), loc="left", fontsize=10)
        place.set_xlabel("Epochs of the networks' own training")
        place.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.15))
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Spearman correlation with the\nvalidation losses after these epochs")
    figure.savefig(path, dpi=150)


@click.command(help=__doc__)
@click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="The figure to write.")
def main(path: Path, output: Path | None) -> None:
    rows = {row["key"]: row for row in map(json.loads, path.read_text("utf-8").splitlines())}
    if not any("curve" in row for key, row in rows.items() if key.startswith("pool/")):
        raise click.UsageError(f"{path} has no pool whose trainings have a loss after each epoch")
    panels = {"Trained from scratch": from_scratch(rows)}
    panels |= {f"Fine-tuned from {name}": lines for name, lines in fine_tuned(rows).items()}
    for title, lines in panels.items():
        epochs = len(next(iter(lines.values())))
        click.echo(f"\n| {title} | {' | '.join(str(epoch + 1) for epoch in range(epochs))} |")
        click.echo(f"| --- |{' ---: |' * epochs}")
        for name, values in lines.items():
            click.echo(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")
    if output is not None:
        draw({title: lines for title, lines in panels.items() if len(lines[END]) > 3}, output)


if __name__ == "__main__":
    main()
