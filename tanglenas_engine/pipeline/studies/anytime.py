"""Which method is ahead at any moment? What each finds within a fraction of the time, by a table or by training."""

from __future__ import annotations

from functools import partial

from tanglenas_engine.pipeline.studies.methods import HIGHER, ONE_STAGE, PAPER_SEEDS, SECONDS, SPOS, TEST, worth
from tanglenas_engine.pipeline.studies.run import Run
from tanglenas_engine.pipeline.studies.study import Arm, Claim, Curve, Measured, Panel, Scale, Study

SHARES = {"quarter": 0.25, "half": 0.5, "full": 1.0}
"""The fractions of the time that a method gets, each as a search of its own with a complete schedule."""
METHODS = ("drnas", "spos-random", "spos-evolution", "halving")


def measure(run: Run) -> Measured:
    """Return what the architecture is worth, with the time that it took, as a point of the method's curve."""
    seconds = run.seconds("search", "discretize")
    values = worth(run)
    curves = {name: Curve([seconds], [value]) for name, value in values.items()}
    last = run.history()[-1]
    if "table_value" in values and last.get("table_value"):
        # A single-stage search has an architecture after every epoch. Epochs take equally long.
        each = run.seconds("search") / int(last["epoch"])
        rows = [row for row in run.history() if row["table_value"]]  # a table may lack architectures
        x = [each * int(row["epoch"]) for row in rows]
        curves["within"] = Curve(x, [float(row["table_value"]) for row in rows])
    return Measured({**values, "seconds": seconds}, curves)


def arms() -> dict[str, Arm]:
    """Return an arm for each method and share of the time."""
    found = {}
    for share in SHARES:
        found[f"drnas-{share}"] = Arm(ONE_STAGE, series="drnas")
        found[f"spos-random-{share}"] = Arm({**SPOS, "discretize": {"method": "random"}}, series="spos-random")
        found[f"spos-evolution-{share}"] = Arm(
            {**SPOS, "discretize": {"method": "evolution"}}, supernet=f"spos-random-{share}", series="spos-evolution"
        )
        found[f"halving-{share}"] = Arm(
            {**SPOS, "search": {"seconds": None, "epochs": 1}, "discretize": {"method": "race"}}, series="halving"
        )
    # The arm that others are compared with comes first.
    return {"drnas-full": found.pop("drnas-full"), **found}


def _sizes(seconds: float, derivation: float, entrants: int) -> dict[str, dict[str, object]]:
    """Return the sizes of all arms for a search of so many seconds, of which two stages leave a part to the second."""
    sizes: dict[str, dict[str, object]] = {}
    for share, part in SHARES.items():
        sizes[f"drnas-{share}"] = {"search": {"seconds": seconds * part}}
        sizes[f"spos-random-{share}"] = {
            "search": {"seconds": seconds * part * (1 - derivation)},
            "discretize": {"seconds": seconds * part * derivation},
        }
        sizes[f"spos-evolution-{share}"] = {"discretize": {"seconds": seconds * part * derivation}}
        sizes[f"halving-{share}"] = {
            "discretize": {"candidates": entrants},
            "bindings": [
                f"race.entrants = {entrants}",
                f"race.seconds = {seconds * part}",
                "race.propose = 0",
            ],
        }
    return sizes


STUDY = Study(
    question="Which method is ahead at any moment of a search?",
    paper="TangleNAS, in one stage, is ahead of two stages at any time.",
    arms=arms(),
    stages=("search", "discretize", "retrain", "evaluate"),
    with_table=("search", "discretize"),
    measure=measure,
    metrics={**TEST, "seconds": SECONDS},
    claims=tuple(
        Claim(metric, f"drnas-{share}", f"{other}-{share}", higher, "ahead" if other != "halving" else "")
        for metric, higher in HIGHER.items()
        for share in SHARES
        for other in METHODS[1:]
    ),
    panels=(
        Panel("curves", "within", "time (s)", "table value, within a search"),
        Panel("curves", "table_value", "time (s)", "table value"),
        Panel("curves", "test_accuracy", "time (s)", "test accuracy (%)"),
        Panel("curves", "test_loss", "time (s)", "test loss (nats)"),
    ),
    limits=(
        "Every point is a search of its own with a complete schedule, so a curve says what a method finds in that "
        "time, not what an interrupted search would have. The start of stages and the final training are not counted: "
        "they are the same for all. `halving` trains random networks and needs no supernet; its search is one epoch, "
        "which decides nothing."
    ),
    scales={
        "cpu": Scale(
            {"retrain": {"epochs": 15}},
            seconds=48.0,
            timed=partial(_sizes, derivation=0.4, entrants=9),
            without=(*(f"{method}-half" for method in METHODS), "halving-quarter"),
        ),
        "paper": Scale(seeds=PAPER_SEEDS, seconds=40_000.0, timed=partial(_sizes, derivation=0.5, entrants=27)),
    },
    table="optional",
)
