"""The anytime curve of every optimizer on the toy cell space, in ranks of its published table.

    python -m benchmarks.toy_cell TABLE FASHION_MNIST_FOLDER --seeds 0 1 --steps 240

All optimizers get the same number of steps, data and options. Optimizers without architecture parameters derive theirs
by random search on the trained supernet. The script prints a line for each run, and writes JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial

import torch

from tanglenas_engine import create_dataset, create_optimizer, create_space
from tanglenas_engine.data import DataView
from tanglenas_engine.stages.discretize import discretize
from tanglenas_engine.stages.search import search
from tanglenas_engine.tables import load_table

GRADIENT = ("darts", "darts2", "drnas", "gdas")
SAMPLED = ("spos", "sandwich")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table")
    parser.add_argument("data")
    parser.add_argument("--optimizers", nargs="+", default=[*GRADIENT, *SAMPLED])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--epochs", type=int, default=6, help="how often the current architecture is looked up")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--relaxation", default="exact")
    parser.add_argument("--sharing", default="superposed")
    parser.add_argument("--alpha-lr", type=float, default=1e-2)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = create_dataset("fashion_mnist", root=options.data)
    count = options.steps // options.epochs * options.batch_size
    parts = {"weights": (0, count), "architecture": (count, count), "validation": (2 * count, 1000)}
    data = DataView(
        {name: dataset.subset(torch.arange(first, first + n), train=False) for name, (first, n) in parts.items()}
    )
    results = []
    for seed in options.seeds:
        for name in options.optimizers:
            torch.manual_seed(seed)
            space = create_space(
                "toy_cell",
                channels=options.channels,
                relaxation=options.relaxation,
                sharing=options.sharing,
                dropout=0.2,
            )
            table = load_table(options.table, space)
            look_up = partial(table.row, metric="test_acc")
            started = time.perf_counter()
            optimizer = create_optimizer(name)
            result = search(
                space,
                optimizer,
                data,
                epochs=options.epochs,
                batch_size=options.batch_size,
                weight_optimizer=partial(torch.optim.SGD, lr=0.025, momentum=0.9, nesterov=True, weight_decay=5e-4),
                architecture_optimizer=partial(torch.optim.Adam, lr=options.alpha_lr, betas=(0.5, 0.999)),
                table=look_up,
                seed=seed,
            )
            seconds = time.perf_counter() - started
            if optimizer.learns_architecture:
                ranks = [row["table_rank"] for row in result.history]
                final, accuracy = ranks[-1], result.history[-1]["table_value"]
                entropy = result.history[-1]["entropy"]
            else:
                found = discretize(space, data, None, method="random", candidates=options.candidates, seed=seed)
                row = look_up(found.architecture)
                ranks, final, accuracy, entropy = [row["table_rank"]], row["table_rank"], row["table_value"], None
            results.append(
                dict(optimizer=name, seed=seed, ranks=ranks, rank=final, accuracy=accuracy, entropy=entropy,
                     seconds=seconds, relaxation=options.relaxation, sharing=options.sharing)
            )  # fmt: skip
            print(
                f"{name:9} seed {seed}  rank {final:5}  {accuracy:.2f} %  on the way {ranks}  {seconds:.0f} s",
                flush=True,
            )
            if options.json:
                with open(options.json, "w") as file:
                    json.dump(results, file, indent=1)
    print("random choice: rank 2048.5 in expectation, accuracy "
          f"{statistics.fmean(table.columns['test_acc']):.2f} %", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    main()
