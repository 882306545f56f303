"""Does a supernet rank architectures as trainings of their own do? By sampler, relaxation, band and length."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from tanglenas_engine.data import open_splits
from tanglenas_engine.derivation.band import Band
from tanglenas_engine.derivation.budget import Budget, whole
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.comparison.estimates import Metric
from tanglenas_engine.pipeline.files import SUPERNET, load_into, state_before_search
from tanglenas_engine.pipeline.pools import agreement
from tanglenas_engine.pipeline.studies.run import Run
from tanglenas_engine.pipeline.studies.study import BUDGET, Arm, Claim, Measured, Panel, Runs, Scale, Study
from tanglenas_engine.runtime.progress import ConsoleProgress
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.stages.evaluate import rank_correlation
from tanglenas_engine.tables import Benchmark, load_table

LEAST = 0.95
"""The share of the budget that every compared architecture uses at least."""


def measure(run: Run) -> Measured:
    """Compare the supernet's losses with the table or the pool, for the same architectures in every run."""
    if run.table is None:
        raise TangleNASError("ranking needs networks of known worth: give --table, or keep the stage `pool`")
    with run.opened(searched=False) as bench:
        before = state_before_search(bench.space)
        load_into(bench.space, SUPERNET)
        benchmark = Benchmark(load_table(run.table, bench.space), run.metric)
        listed = benchmark.listed or compared(bench.space, run.measure)
        found = rank_correlation(
            bench.space,
            open_splits(bench.dataset, bench.splits, ("weights", "architecture"), augment=False),
            benchmark.row,
            listed=listed,
            before=before,
            seed=run.seed,
            device=os.environ.get("TANGLENAS_DEVICE") or None,
            progress=ConsoleProgress(),
        )
    assert found is not None
    values = {"spearman": found.spearman, "kendall_tau": found.kendall_tau}
    first = found.baselines.get("before_search", math.nan)
    if not math.isnan(first):  # a head of zeros gives all networks one loss
        values |= {"before": first, "gain": found.spearman - first}
    if found_alike := agreement(run.table, run.metric, benchmark.table.keys):
        values |= {"agreement": found_alike.correlation, "ceiling": found_alike.ceiling}
    return Measured(values)


def reliable(runs: Runs) -> list[str]:
    """Return how far trainings of the pool agree among themselves, which is the same in all runs."""
    known = [
        one.values for seeds in runs.values() for one in seeds.values() if {"agreement", "ceiling"} <= {*one.values}
    ]
    if not known:
        return []
    return [
        "Trainings of the pool's networks with two seeds rank them alike with a Spearman correlation of "
        f"{known[0]['agreement']:.2f}. So a perfect ranking would have about {known[0]['ceiling']:.2f} with this pool."
    ]


def compared(space: SearchSpace, options: Any) -> list[Architecture]:
    """Return random architectures of a table, all different, whose multiply-accumulates are within the budget's band.

    Args:
        space: The space.
        options: `architectures`, their number, and `budget`, a share of the largest one's cost or None.
    """
    budget, count = options.get("budget"), int(options.get("architectures", 100))
    source: Any = space
    if budget is not None:
        source = Band(Budget(space, {"macs": whole(budget * space.cost(space.largest()).macs)}), LEAST)
    generator, found = torch.Generator().manual_seed(0), dict[str, Architecture]()
    for _ in range(100 * count):
        one = source.sample(generator)
        found.setdefault(one.digest, one)
        if len(found) == count:
            break
    return list(found.values())


STUDY = Study(
    question="Does the supernet rank architectures as their own trainings do?",
    paper="The authors' own logs have Spearman 0.44 for SPOS and 0.26 for DrNAS, on ten language models.",
    arms={
        "spos": Arm({"optimizer": "spos"}),
        "spos-band": Arm({"optimizer": "spos", "search": {"target_share": BUDGET}}),
        "sandwich": Arm({"optimizer": "sandwich"}),
        "drnas": Arm({"optimizer": "drnas"}),
        "drnas-paths": Arm({"optimizer": "drnas", "search": {"path_epochs": 2}}),
        "drnas-gated": Arm({"optimizer": "drnas", "search": {"relaxation": "gated"}}),
        "drnas-paper": Arm({"optimizer": "drnas", "search": {"relaxation": "paper"}}),
        "spos-short": Arm({"optimizer": "spos"}),
        "spos-long": Arm({"optimizer": "spos"}),
    },
    stages=("search",),
    measure=measure,
    notes=reliable,
    metrics={
        "spearman": Metric("Spearman's correlation", "", 3),
        "before": Metric("the same before the search", "", 3),
        "gain": Metric("what the search adds to it", "", 3),
        "kendall_tau": Metric("Kendall's tau", "", 3),
    },
    claims=(
        Claim("spearman", against=0.0),
        Claim("gain", against=0.0),
        Claim("spearman", against="spos"),
        Claim("spearman", "drnas-paths", "drnas"),
    ),
    panels=(Panel("means", "spearman"),),
    limits=(
        "All runs rank the same architectures, so an interval says how supernets of other seeds would rank these, not "
        "how they would rank others. Networks of a pool or a table have noise of their own: even a perfect supernet "
        "would not reach 1."
    ),
    scales={
        "cpu": Scale(
            {
                "search": {"epochs": 10, "warmup_epochs": 0},
                "retrain": {"epochs": 10},
                "measure": {"pool": 24, "pool_seeds": 3, "budget": 0.6, "architectures": 100},
            },
            arms={"spos-short": {"search": {"epochs": 3}}, "spos-long": {"search": {"epochs": 30}}},
        ),
        "paper": Scale(
            {"measure": {"pool": 24, "pool_seeds": 3, "budget": 0.6, "architectures": 1000}},
            seeds=(9001, 9002, 9003, 9004),
            arms={"spos-short": {"search": {"epochs": 80}}, "spos-long": {"search": {"epochs": 750}}},
        ),
    },
    table="pool",
)
