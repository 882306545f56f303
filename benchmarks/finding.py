"""Does a search find? Methods against a pool of random networks of equal cost, each trained by itself.

    python -m benchmarks.finding run gpt_nano
    python -m benchmarks.finding run autoformer_nano --data FOLDER_OF_FASHION_MNIST
    python -m benchmarks.finding table benchmarks/results/gpt_nano.jsonl

`run` trains the pool, and then searches, derives and trains with every method and seed. Each result is a line of the
file, so a study that is cut off goes on where it was. All times are of the processor. Nothing is chosen by the test
split: it only says in the end what a network is worth. `table` prints the comparison, with intervals.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy import stats

from tanglenas_engine import (
    Architecture,
    SearchSpace,
    cosine,
    create_dataset,
    create_objective,
    create_optimizer,
    create_space,
    discretize,
    evaluate,
    make_splits,
    open_splits,
    retrain,
    search,
)
from tanglenas_engine.data import DataView
from tanglenas_engine.derivation.band import Band
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.targets import Target

RESULTS = Path(__file__).parent / "results"
FILLED = 0.95
"""The share of the budget that every network of the pool uses at least."""
SEEDS = 2
"""Trainings of each network of the pool: one may go wrong, as that of seed 0 of network 9 of gpt_nano did by 0.16."""


@dataclass(frozen=True)
class Task:
    """A space with data and a budget, and how its networks are trained.

    Attributes:
        data: The options of the dataset, and `options` those of the space.
        place: The option of the dataset that says where its files are, or None for data that need no files.
        budget: The share of the largest network's multiply-accumulates.
        images: The number of images to train and validate on; None for all samples.
        epochs: The passes of a training over `training`, and of a search over `weights`.
        pool: The number of random networks.
    """

    space: str
    dataset: str
    data: dict[str, Any]
    options: dict[str, Any]
    budget: float = 0.6
    place: str | None = None
    images: int | None = None
    epochs: int = 12
    pool: int = 24


VIT = {"relative_position": True, "weight_init": "jax", "drop_path": 0.1}
TASKS = {
    "gpt_nano": Task(
        "gpt_nano", "stdlib_text", {"characters": 400_000}, {"bias": True},
        epochs=12,
    ),
    "gpt_nano_shakespeare": Task(
        "gpt_nano", "text", {}, {"bias": True}, place="path",
        epochs=5,
    ),
    "autoformer_nano": Task(
        "autoformer_nano", "fashion_mnist", {}, VIT, place="root", images=6000, epochs=15,
    ),
    "mobilenetv3_nano": Task(
        "mobilenetv3_nano", "fashion_mnist", {}, {"drop": 0.1}, place="root", images=6000,
        epochs=12,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A way to find: an optimizer, what its search is drawn to, and how an architecture is derived."""

    optimizer: str
    band: bool = True
    derive: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "spos band": Method("spos", derive={"method": "random", "candidates": 300}),
    "spos whole space": Method("spos", band=False, derive={"method": "random", "candidates": 300}),
    "sandwich band": Method("sandwich", derive={"method": "random", "candidates": 300}),
    "drnas target, argmax": Method("drnas", derive={"method": "argmax"}),
    "drnas target, judged": Method("drnas", derive={"method": "random", "candidates": 300}),
    "gdas target, argmax": Method("gdas", derive={"method": "argmax"}),
}


class Study:
    """A task in progress: its data, its budget, and the file of results."""

    def __init__(self, name: str, path: Path, data: str | None = None, threads: int = 1):
        torch.set_num_threads(threads)
        self.task, self.path = TASKS[name], path
        place = {self.task.place: data} if self.task.place and data else {}
        self.dataset = create_dataset(self.task.dataset, **self.task.data, **place)
        self.splits = make_splits(self.dataset, seed=0)
        budget = self.task.budget * self.space().cost(self.space().largest()).macs
        self.limits = {"macs": int(budget)}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.done: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def space(self, seed: int = 0) -> SearchSpace:
        torch.manual_seed(seed)
        return create_space(self.task.space, **{**self.dataset.space_options(), **self.task.options})

    def data(self, *names: str) -> DataView:
        """Open splits; of images, as many as the task takes, and as many again for the test."""
        images = self.task.images
        if images is None:
            return open_splits(self.dataset, self.splits, names, augment=False)
        shares = {"weights": 0.45, "architecture": 0.45, "validation": 0.1, "test": 1.0}
        chosen = {name: self.splits.indices(name)[: round(share * images)] for name, share in shares.items()}
        chosen["training"] = torch.cat([chosen["weights"], chosen["architecture"]])
        return DataView({name: self.dataset.subset(chosen[name], train=False) for name in names})

    def once(self, key: str, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a job, which is run if the file lacks it."""
        if key not in self.done:
            start = time.process_time()
            row = {"key": key, **job()}
            row["seconds"] = row.get("seconds", round(time.process_time() - start, 2))
            self.done[key] = row
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            click.echo(f"{key}: {json.dumps({k: v for k, v in row.items() if k not in ('curve', 'key')})[:180]}")
        return self.done[key]

    def trained(self, architecture: Architecture, seed: int) -> dict[str, Any]:
        """Train a network by itself, and measure it on validation and test."""
        space = self.space()
        start = time.process_time()
        found = retrain(
            space,
            architecture,
            self.data("training", "validation"),
            epochs=self.task.epochs,
            batch_size=64,
            optimizer=partial(torch.optim.AdamW, lr=0.004, weight_decay=0.05),
            scheduler=partial(cosine, warmup=0.2),  # With 5 %, seeds differ as much as networks do.
            clip=5.0,
            seed=seed,
            device="cpu",
        )
        seconds = time.process_time() - start
        tested = evaluate(space, architecture, found.network, self.data("test"), device="cpu")
        return {
            "architecture": dict(architecture.choices),
            "digest": architecture.digest,
            "seed": seed,
            "params": tested.cost.params,
            "macs": tested.cost.macs,
            "validation_loss": found.history[-1]["validation_loss"],
            "test_loss": tested.test_loss,
            "test_accuracy": tested.test_accuracy,
            "curve": [row["validation_loss"] for row in found.history],
            "seconds": round(seconds, 2),
        }

    def pool(self) -> list[Architecture]:
        """Return the architectures of the pool, all different."""
        space, generator = self.space(), torch.Generator().manual_seed(12345)
        band = Band(Budget(space, self.limits), FILLED)
        found: dict[str, Architecture] = {}
        while len(found) < self.task.pool:
            one = band.sample(generator)
            found.setdefault(one.digest, one)
        return list(found.values())

    def found_by(self, name: str, seed: int) -> dict[str, Any]:
        """Search and derive with a method, and say how its supernet ranks the pool."""
        method, space = METHODS[name], self.space(seed)
        optimizer = create_optimizer(method.optimizer)
        view = self.data("weights", "architecture", "validation")
        target = Target(create_objective("macs"), value=self.limits["macs"])
        start = time.process_time()
        result = search(
            space,
            optimizer,
            view,
            epochs=self.task.epochs,
            batch_size=32,
            weight_optimizer=partial(torch.optim.AdamW, lr=0.002, weight_decay=0.05),
            architecture_optimizer=partial(torch.optim.Adam, lr=0.03, betas=(0.5, 0.999)),
            warmup_epochs=max(1, self.task.epochs // 5) if optimizer.learns_architecture else 0,
            targets=[target] if method.band else [],
            clip=5.0,
            seed=seed,
            device="cpu",
        )
        searched = time.process_time()
        plain = self.data("weights", "architecture", "validation")
        mixture = result.mixture.tensors() if result.mixture else None
        derived = discretize(
            space, plain, mixture, max_macs=self.limits["macs"], seed=seed, device="cpu", **method.derive
        )
        done = time.process_time()
        return {
            "architecture": dict(derived.architecture.choices),
            "digest": derived.architecture.digest,
            "macs": derived.cost.macs,
            "params": derived.cost.params,
            "supernet_loss": derived.validation_loss,
            "search_seconds": round(searched - start, 2),
            "derive_seconds": round(done - searched, 2),
            "seconds": round(done - start, 2),
            "entropy": result.history[-1].get("entropy"),
            "split_losses": result.split_losses,
            **self.ranked(space, seed),
        }

    def ranked(self, space: SearchSpace, seed: int) -> dict[str, Any]:
        """Return the loss of each network of the pool with a supernet's weights, in the pool's order."""
        view = self.data("weights", "architecture")
        with Candidates(space, view.weights, view.architecture, limit=self.task.pool, seed=seed) as judged:
            rows = judged.judge(self.pool(), race=False)
        return {"pool_losses": [row["loss"] for row in rows]}


@click.group()
def main() -> None:
    """Compare what searches find with a pool of random networks of equal cost."""


@main.command()
@click.argument("task", type=click.Choice(list(TASKS)))
@click.option("--data", help="The file or folder of the data, where a task needs one.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="The folder of results.")
@click.option("--methods", default=";".join(METHODS), help="Methods, with ; between them.")
@click.option("--seeds", default=5, help="Searches with each method.")
@click.option("--pool", "size", default=0, help="Networks of the pool to train before the methods; 0 for all.")
@click.option("--threads", default=1)
def run(task: str, data: str | None, out: Path, methods: str, seeds: int, size: int, threads: int) -> None:
    """Train the pool, then search, derive and train with each method and seed."""
    study = Study(task, out / f"{task}.jsonl", data, threads)
    pool = study.pool()
    for seed in range(SEEDS):
        for number, architecture in enumerate(pool[: size or None]):
            study.once(f"pool/{number}/{seed}", partial(study.trained, architecture, seed))
    budget = Budget(study.space(), study.limits)
    for cost in () if size else ("params", "macs"):
        study.once(f"most {cost}", partial(study.trained, budget.dearest(cost), 0))
    for name in methods.split(";"):
        for seed in range(seeds):
            found = study.once(f"found/{name}/{seed}", partial(study.found_by, name, seed))
            architecture = Architecture(
                pool[0].space, {k: tuple(v) if isinstance(v, list) else v for k, v in found["architecture"].items()}
            )
            for again in (0, 1):
                study.once(f"trained/{architecture.digest}/{again}", partial(study.trained, architecture, again))


@main.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
def table(path: Path) -> None:
    """Print what the results in the file PATH say, as far as they are there."""
    rows = {row["key"]: row for row in map(json.loads, path.read_text("utf-8").splitlines())}
    pool = [row for key, row in rows.items() if key.startswith("pool/") and key.endswith("/0")]
    again: dict[str, list[float]] = {}
    for row in rows.values():
        if "test_loss" in row:
            again.setdefault(row["digest"], []).append(row["test_loss"])
    # A network is worth what it is over its seeds: one training of many goes wrong.
    losses = np.array([np.mean(again[row["digest"]]) for row in pool])
    repeated = [np.var(values, ddof=1) for values in again.values() if len(values) > 1]
    deviation = f"{np.mean(repeated) ** 0.5:.4f} ({len(repeated)} networks)" if repeated else "unknown"
    click.echo(
        f"pool of {len(pool)}: test loss {losses.min():.4f} best, {np.median(losses):.4f} median, {losses.max():.4f} "
        f"worst, deviation {losses.std(ddof=1):.4f}; between seeds {deviation}; "
        f"{np.mean([row['seconds'] for row in pool]):.0f} s a training"
    )
    click.echo(
        "the validation loss ranks the test loss: "
        + _spearman([r["validation_loss"] for r in pool], [r["test_loss"] for r in pool])
    )
    seconds = ((row, rows.get(_repeated(key))) for key, row in rows.items())
    twice = [(row["test_loss"], other["test_loss"]) for row, other in seconds if other]
    if len(twice) > 2:
        click.echo(
            f"a second training ranks {len(twice)} networks as the first: " + _spearman(*zip(*twice, strict=True))
        )
    click.echo(f"best of ten by validation loss: {_best_of(pool, 10):.4f} on average")
    for cost in ("params", "macs"):
        if f"most {cost}" in rows:
            click.echo(f"most {cost}: {rows[f'most {cost}']['test_loss']:.4f}")
    click.echo(
        "| method, seed | test loss | worse in the pool, % | supernet ranks the pool | search, s | derivation, s |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- |")
    for key, row in rows.items():
        kind, _, rest = key.partition("/")
        if kind != "found":
            continue
        trained = again.get(row["digest"], [])
        mean = float(np.mean(trained)) if trained else math.nan
        ranks = _spearman([row["pool_losses"][int(one["key"].split("/")[1])] for one in pool], losses)
        click.echo(
            f"| {rest} | {mean:.4f} ({len(trained)}) | {100 * np.mean(losses > mean):.0f} | {ranks} "
            f"| {row['search_seconds']:.0f} | {row['derive_seconds']:.0f} |"
        )


def _repeated(key: str) -> str:
    """Return the key of the second training of a network of the pool; "" for other keys."""
    return key.removesuffix("/0") + "/1" if key.startswith("pool/") and key.endswith("/0") else ""


def _spearman(one: Sequence[float], other: Sequence[float] | np.ndarray[Any, Any]) -> str:
    """Return Spearman's correlation with its standard error under independence."""
    return f"{stats.spearmanr(one, other).statistic:.2f} +- {1 / math.sqrt(len(one) - 1):.2f}"


def _best_of(pool: Sequence[dict[str, Any]], count: int) -> float:
    """Return the mean test loss of the network of best validation loss among `count` of the pool."""
    generator = np.random.default_rng(0)
    chosen = (generator.choice(len(pool), min(count, len(pool)), replace=False) for _ in range(10_000))
    return float(np.mean([pool[min(some, key=lambda i: pool[i]["validation_loss"])]["test_loss"] for some in chosen]))


if __name__ == "__main__":
    main()
