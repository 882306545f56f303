"""Single-stage against two-stage search at equal time, by networks trained from scratch: the authors' protocol."""

from __future__ import annotations

from tanglenas_engine.pipeline.studies.methods import HIGHER, ONE_STAGE, PAPER_SEEDS, SECONDS, SPOS, TEST, worth
from tanglenas_engine.pipeline.studies.run import Run
from tanglenas_engine.pipeline.studies.study import Arm, Claim, Measured, Panel, Scale, Study


def measure(run: Run) -> Measured:
    """Return what the architecture is worth, and the time that it took to find."""
    return Measured({**worth(run), "seconds": run.seconds("search", "discretize")})


def _sizes(seconds: float) -> dict[str, dict[str, object]]:
    """Return the sizes of the arms for a supernet and a derivation of so many seconds together."""
    judging: dict[str, object] = {"discretize": {"seconds": 0.4 * seconds}}
    return {
        "spos-evolution": {"search": {"seconds": 0.6 * seconds}, **judging},
        "spos-random": judging,
        "drnas-evolution": judging,
    }


STUDY = Study(
    question="Is one stage better than two at equal time?",
    paper=(
        "One stage is better. Its authors give a search in one stage the time that the supernet and the evolution of "
        "two stages take together: 11.6 hours are 5.6 and 6.0 on AutoFormer-T with CIFAR-10."
    ),
    arms={
        "drnas": Arm(ONE_STAGE, as_long_as="spos-evolution"),
        "spos-evolution": Arm({**SPOS, "discretize": {"method": "evolution"}}),
        "spos-random": Arm({**SPOS, "discretize": {"method": "random"}}, supernet="spos-evolution"),
        "drnas-evolution": Arm({"optimizer": "drnas", "discretize": {"method": "evolution"}}, supernet="drnas"),
    },
    stages=("search", "discretize", "retrain", "evaluate"),
    with_table=("search", "discretize"),
    measure=measure,
    metrics={**TEST, "seconds": SECONDS},
    claims=tuple(
        Claim(metric, "drnas", other, higher, "ahead" if other.startswith("spos") else "")
        for metric, higher in HIGHER.items()
        for other in ("spos-evolution", "spos-random", "drnas-evolution")
    ),
    panels=(Panel("means", "table_value"), Panel("means", "test_accuracy"), Panel("means", "test_loss"),
            Panel("means", "seconds")),
    limits=(
        "The search of `drnas` gets the processor seconds that search and derivation of `spos-evolution` took with the "
        "same seed. It ends with a whole epoch, so times differ by some seconds: the table has them. `drnas-evolution` "
        "takes more time than the others. It is there to tell what alpha finds from what the supernet of alpha is "
        "worth. Networks found may differ in cost; set search.target_share for equal ones."
    ),
    scales={
        "cpu": Scale({"retrain": {"epochs": 20}}, seconds=60.0, timed=_sizes),
        "paper": Scale({"discretize": {"candidates": 1050}}, seeds=PAPER_SEEDS),
    },
    table="optional",
)  # fmt: skip
