"""The number of candidates judged per second, by the engine and by a loop that builds every network.

    python -m benchmarks.candidates --space autoformer_nano --dataset digits --threads 1 --clock processor
    python -m benchmarks.candidates --space mobilenetv3_nano --image-size 28 --repeats 1 --json

Both judge the same architectures with the weights of the same supernet, on the same samples. Batch norms get the
statistics of each network from the same number of batches. The loop extracts a network, goes through the dataset for
its batches, and keeps nothing. Evolution asks for some networks again; `--repeats` does the same.
"""

from __future__ import annotations

import statistics
from typing import Any

import click
import torch

from benchmarks.search_step import CLOCKS, show
from tanglenas_engine import Architecture, SearchSpace, create_space
from tanglenas_engine.data import Dataset, DataView, make_splits, open_splits
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.plugins import create_dataset
from tanglenas_engine.training.measure import measure, recalibrate, statistics_inputs


def fitting(space: str, dataset: Dataset) -> SearchSpace:
    """Return a space for the images of a dataset."""
    return create_space(
        space, num_classes=dataset.num_classes, image_size=dataset.image_size, in_channels=dataset.in_channels
    )


def one_by_one(space: SearchSpace, data: DataView, architecture: Architecture, batch_size: int, batches: int) -> float:
    """Return the accuracy in % of an architecture as a network of its own."""
    network = space.extract(architecture)
    device = next(network.parameters()).device
    if batches:
        recalibrate(network, statistics_inputs(network, data.weights, batches, 0, device))
    return measure(network, data.architecture, batch_size).accuracy


def compared(
    space: SearchSpace,
    data: DataView,
    count: int = 20,
    repeats: float = 0.0,
    batch_size: int = 256,
    recalibration_batches: int = 8,
    clock: str = "wall",
) -> dict[str, Any]:
    """Measure the candidates per second of both ways, in turns, and the largest difference of their accuracies in %."""
    device, now = next(space.parameters()).device, CLOCKS[clock]
    options = {"batch_size": batch_size, "recalibration_batches": recalibration_batches, "device": device}
    taken: dict[str, list[float]] = {"engine": [], "naive": []}
    apart: list[float] = []
    space.eval()
    # The engine's rows hold the cost too. Its tables are made here, once for a space; the loop needs none.
    space.cost(space.largest())
    before = now()
    with Candidates(space, data.weights, data.architecture, limit=count, **options) as candidates:  # type: ignore[arg-type]
        start = now() - before
        asked = candidates.fresh(count)
        asked += [asked[i % len(asked)] for i in range(round(repeats * len(asked)))]
        for architecture in asked:
            before = now()
            (row,) = candidates.judge([architecture])
            taken["engine"].append(now() - before)
            before = now()
            accuracy = one_by_one(space.release(), data, architecture, batch_size, recalibration_batches)
            taken["naive"].append(now() - before)
            apart.append(abs(accuracy - row["accuracy"]))
    engine, naive = start + sum(taken["engine"]), sum(taken["naive"])
    return {
        "candidates": len(asked),
        "distinct": len({architecture.digest for architecture in asked}),
        "samples": len(data.architecture),
        "seconds_before_the_first": start,
        "median_engine": statistics.median(taken["engine"]),
        "median_naive": statistics.median(taken["naive"]),
        "engine": len(asked) / engine,
        "naive": len(asked) / naive,
        "engine_over_naive": naive / engine,
        "largest_difference": torch.tensor(apart).max().item(),
    }


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--space", default="autoformer_nano", help="Name of a search space for images.")
@click.option("--dataset", default="digits", help="Name of a dataset of images.")
@click.option("--image-size", type=int, help="Pixels; by default the dataset's.")
@click.option("--count", type=click.IntRange(1), default=20, help="Different architectures.")
@click.option("--repeats", type=click.FloatRange(0), default=0.0, help="The share of them that is asked for again.")
@click.option("--batch", "batch_size", type=click.IntRange(1), default=256)
@click.option("--recalibration-batches", type=click.IntRange(0), default=8)
@click.option("--threads", type=click.IntRange(1), help="Threads of torch; by default its own choice.")
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall")
@click.option("--device", default="cpu")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    space: str,
    dataset: str,
    image_size: int | None,
    count: int,
    repeats: float,
    batch_size: int,
    recalibration_batches: int,
    threads: int | None,
    clock: str,
    device: str,
    as_json: bool,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    samples = create_dataset(dataset, **({} if image_size is None else {"image_size": image_size}))
    made = fitting(space, samples).to(device)
    data = open_splits(samples, make_splits(samples, seed=0), ("weights", "architecture"))
    found: dict[str, Any] = {"space": space, "dataset": dataset, "image_size": samples.image_size, "device": device}
    found |= {"clock": clock, "threads": torch.get_num_threads()}
    found |= compared(made, data, count, repeats, batch_size, recalibration_batches, clock)
    show(found, as_json)


if __name__ == "__main__":
    main()
