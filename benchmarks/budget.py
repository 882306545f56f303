"""A search, under a budget or not, against random architectures of the same cost, all retrained in the same way.

    python -m benchmarks.budget --seeds 0 1
    python -m benchmarks.budget --space gpt_nano --final-temperature 0.1
    python -m benchmarks.budget --space gpt_nano --share 1 --random 0 --relaxation gated

The task is the vision transformer of the demo on handwritten digits, or a language model on Python's standard library.
The search has a target in multiply-accumulates. The most probable architecture within it is compared with random
architectures whose cost is within 2 % of its own, by test accuracy and loss after training from scratch. The script
prints a line for each network, and writes JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tanglenas_engine import create_dataset, create_objective, create_optimizer, create_space
from tanglenas_engine.data import make_splits, open_splits
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.stages.discretize import discretize
from tanglenas_engine.stages.evaluate import evaluate
from tanglenas_engine.stages.retrain import retrain
from tanglenas_engine.stages.search import search
from tanglenas_engine.training.losses import cross_entropy

ADAMW = partial(torch.optim.AdamW, lr=0.004, weight_decay=0.05)


@dataclass(frozen=True)
class Study:
    """A dataset, the options of its space (those of gin/spaces), and the length of search and retraining."""

    dataset: tuple[str, dict[str, Any]]
    options: dict[str, Any]
    batch_size: int
    epochs: int
    retrain_epochs: int
    label_smoothing: float


STUDIES = {
    "autoformer_nano": Study(
        dataset=("digits", {}),
        options={"relative_position": True, "weight_init": "jax", "drop_path": 0.1},
        batch_size=32,
        epochs=30,
        retrain_epochs=50,
        label_smoothing=0.1,
    ),
    "gpt_nano": Study(
        dataset=("stdlib_text", {"characters": 400_000, "block_size": 64}),
        options={"bias": True},
        batch_size=32,
        epochs=12,
        retrain_epochs=6,
        label_smoothing=0.0,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--space", choices=STUDIES, default="autoformer_nano")
    parser.add_argument("--relaxation", default="exact")
    parser.add_argument("--optimizer", default="drnas")
    parser.add_argument("--method", default="auto", help="of discretize: argmax, random, evolution")
    parser.add_argument("--candidates", type=int, default=300)
    parser.add_argument("--alpha-lr", type=float, default=0.01)
    parser.add_argument("--final-temperature", type=float, help="to which that of alpha falls from 1")
    parser.add_argument("--share", type=float, default=0.6, help="of the largest architecture's MACs; 1: no budget")
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--penalty", default="log")
    parser.add_argument("--epochs", type=int, help="of the search")
    parser.add_argument("--retrain-epochs", type=int)
    parser.add_argument("--random", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = STUDIES[options.space]
    epochs, retrain_epochs = options.epochs or study.epochs, options.retrain_epochs or study.retrain_epochs
    name, data_options = study.dataset
    dataset = create_dataset(name, **data_options)
    annealing = {} if options.final_temperature is None else {"final_temperature": options.final_temperature}
    results = []

    def report(**row: object) -> None:
        results.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if options.json:
            with open(options.json, "w") as file:
                json.dump(results, file, indent=1)

    for seed in options.seeds:
        splits = make_splits(dataset, seed=seed)
        data = open_splits(dataset, splits, ("weights", "architecture", "validation", "training"))
        test = open_splits(dataset, splits, ("test",))
        torch.manual_seed(seed)
        space = create_space(options.space, **dataset.space_options(), **study.options, relaxation=options.relaxation)
        budgeted = options.share < 1
        share = {"share": options.share} if budgeted else {}
        optimizer = create_optimizer(options.optimizer, **annealing)
        learns = optimizer.learns_architecture
        target = Target(create_objective("macs"), **share, weight=options.weight, penalty=options.penalty)
        largest = space.cost(space.largest()).macs
        started = time.perf_counter()
        result = search(
            space,
            optimizer,
            data,
            epochs=epochs,
            batch_size=study.batch_size,
            warmup_epochs=epochs // 6,
            weight_optimizer=ADAMW,
            architecture_optimizer=partial(torch.optim.Adam, lr=options.alpha_lr, betas=(0.5, 0.999)),
            targets=[target] if learns else [],
            seed=seed,
        )
        budget = int(options.share * largest)
        found = discretize(
            space,
            data,
            result.mixture,
            method=options.method,
            derivation=optimizer.derivation,
            candidates=options.candidates,
            prior="mixture" if learns else "uniform",
            max_macs=budget if budgeted else None,
            seed=seed,
        ).architecture
        cost = space.cost(found).macs
        report(
            seed=seed,
            what="search",
            **(_alpha(result.history[-1], budget) if learns else {}),
            found_over_target=round(cost / budget, 4),
            seconds=round(time.perf_counter() - started),
        )
        generator = torch.Generator().manual_seed(seed)
        networks = {"found": found}
        while len(networks) <= options.random:
            other = space.sample(generator)
            if abs(space.cost(other).macs / cost - 1) <= 0.02 and other not in networks.values():
                networks[f"random {len(networks)}"] = other
        for name, architecture in networks.items():
            trained = retrain(
                space,
                architecture,
                data,
                epochs=retrain_epochs,
                batch_size=study.batch_size,
                optimizer=ADAMW,
                loss=partial(cross_entropy, label_smoothing=study.label_smoothing),
                seed=seed,
            )
            judged = evaluate(space, architecture, trained.network, test)
            report(
                seed=seed,
                what=name,
                test_loss=round(judged.test_loss, 4),
                test_accuracy=round(judged.test_accuracy, 2),
                validation_loss=round(trained.history[-1]["validation_loss"], 4),
                validation_accuracy=round(trained.validation_accuracy, 2),
                macs=judged.cost.macs,
                params=judged.cost.params,
                architecture=str(architecture),
            )


def _alpha(row: Record, budget: int) -> Record:
    """Return the costs that alpha stands for at the end of a search, over the budget, and its entropy."""
    return {
        "expected_over_target": round(row["expected_macs"] / budget, 4),
        "argmax_over_target": round(row["macs"] / budget, 4),
        "entropy": round(row["entropy"], 3),
    }


if __name__ == "__main__":
    main()
