"""How much does a search depend on the split of data between weights and architecture?"""

from __future__ import annotations

from collections.abc import Mapping

from tanglenas_engine.pipeline.comparison.estimates import Metric
from tanglenas_engine.pipeline.studies.methods import HIGHER, ONE_STAGE, PAPER_SEEDS, SPOS, TEST, moved, worth
from tanglenas_engine.pipeline.studies.run import Run
from tanglenas_engine.pipeline.studies.study import Arm, Claim, Measured, Panel, Runs, Scale, Study

PORTIONS = ("50", "80", "20")
"""The shares of the weights in %. The first is what the others are compared with."""
METHODS = ("drnas", "spos")


def measure(run: Run) -> Measured:
    """Return what the architecture is worth, and the architecture."""
    return Measured(worth(run), choices=run.architecture())


def across(runs: Runs) -> Mapping[str, Mapping[int, Mapping[str, float]]]:
    """Return how far result and architecture of each run are from those of the same method and seed at 50 %."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for arm, seeds in runs.items():
        method, _, portion = arm.rpartition("-")
        base = runs.get(f"{method}-{PORTIONS[0]}", {})
        for seed, one in seeds.items():
            if portion == PORTIONS[0] or seed not in base:
                continue
            own = {"moved": moved(dict(base[seed].choices), dict(one.choices))}
            for name, value in one.values.items():
                if name in base[seed].values:
                    own["shift"] = abs(value - base[seed].values[name])
            found.setdefault(arm, {})[seed] = own
    return found


def _spos() -> dict[str, object]:
    return {**SPOS, "discretize": {"method": "evolution"}}


STUDY = Study(
    question="How much does a search depend on the split of the data between weights and architecture?",
    paper="TangleNAS is more robust to the split than two stages. Its authors search with 0.5 and 0.8.",
    arms={
        f"{method}-{portion}": Arm(
            ONE_STAGE if method == "drnas" else _spos(), (f"make_splits.train_portion = 0.{portion[0]}",)
        )
        for method in METHODS
        for portion in PORTIONS
    },
    stages=("search", "discretize", "retrain", "evaluate"),
    with_table=("search", "discretize"),
    measure=measure,
    across=across,
    metrics={
        **TEST,
        "moved": Metric("decisions that differ from those at 50 %", "%", 1),
        "shift": Metric("distance of the result from that at 50 %", "", 3),
    },
    claims=(
        *(
            Claim(metric, f"{method}-{portion}", f"{method}-{PORTIONS[0]}", higher)
            for metric, higher in HIGHER.items()
            for method in METHODS
            for portion in PORTIONS[1:]
        ),
        *(
            Claim(name, f"drnas-{portion}", f"spos-{portion}", False, "ahead")
            for name in ("shift", "moved")
            for portion in PORTIONS[1:]
        ),
    ),
    panels=(Panel("means", "table_value"), Panel("means", "test_accuracy"), Panel("means", "test_loss"),
            Panel("means", "moved")),
    limits=(
        "Two searches of one method with other seeds differ, too. So the distances from 50 % are no measure of the "
        "split alone: compare them between methods. The final training has both parts of the data, whatever the split."
    ),
    scales={
        "cpu": Scale(
            {"search": {"epochs": 12, "warmup_epochs": 2}, "discretize": {"candidates": 60}, "retrain": {"epochs": 12}},
        ),
        "paper": Scale({"discretize": {"candidates": 1000}}, seeds=PAPER_SEEDS),
    },
    table="optional",
)  # fmt: skip
