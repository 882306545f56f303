"""How steady is alpha over epochs? With and without warm-up, shrinking, temperature and regularizers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.comparison.estimates import Metric
from tanglenas_engine.pipeline.studies.run import Run
from tanglenas_engine.pipeline.studies.study import Arm, Claim, Curve, Measured, Panel, Scale, Study

Epochs = dict[int, dict[tuple[str, str], list[float]]]
"""The mixture weights by epoch, and by choice and layer."""


def measure(run: Run) -> Measured:
    """Compare the mixtures of consecutive epochs, and those of a time of the search with each other.

    That time is the second half of as many epochs as alpha learns for in the arm that warms up longest, so alpha has
    learned for as long in every arm. `warmup_epochs` of the options is the length of that warm-up.
    """
    epochs: Epochs = {}
    options, history = run.params.get("search", {}), run.history()
    first = 1 + (options.get("warmup_epochs") or 0)
    end = int(history[-1]["epoch"]) - (options.get("path_epochs") or 0)  # alpha rests in the path epochs
    for row in run.mixtures():
        if first <= int(row["epoch"]) <= end:
            rows = epochs.setdefault(int(row["epoch"]), {})
            rows.setdefault((row["choice"], row["layer"]), []).append(float(row["weight"]))
    last = history[-1]
    found = {"entropy": float(last["entropy"])}
    if last.get("table_value"):
        found["table_value"] = float(last["table_value"])
    ordered = [epochs[epoch] for epoch in sorted(epochs)]
    if len(ordered) < 2:
        return Measured(found)
    turnover = [changed(*pair) for pair in itertools.pairwise(ordered)]
    moved = [movement(*pair) for pair in itertools.pairwise(ordered)]
    shared = max(2, max(epochs) - (longest := int(run.measure.get("warmup_epochs", 0))))
    if shared > len(ordered):
        raise TangleNASError(
            f"alpha learns for {len(ordered)} epochs in the arm {run.arm!r}, but measure.warmup_epochs, {longest}, "
            f"leaves {shared}, and is to be the longest warm-up of all arms. Set it to {max(epochs) - len(ordered)} in "
            "params.yaml: the searches are kept"
        )
    late = [pair for pair in range((shared - 1) // 2, shared - 1) if not dropped(ordered[pair], ordered[pair + 1])]
    if late:
        found["turnover"] = float(np.mean([turnover[pair] for pair in late]))
        found["movement"] = float(np.mean([moved[pair] for pair in late]))
    if (varied := variance(ordered[shared // 2 : shared])) is not None:
        found["variance"] = varied
    x = sorted(epochs)[1:]
    return Measured(found, {"turnover": Curve(x, turnover), "movement": Curve(x, moved)})


def changed(before: dict[tuple[str, str], list[float]], after: dict[tuple[str, str], list[float]]) -> float:
    """Return the share of rows, in %, whose most probable option is another one."""
    return 100 * float(np.mean([np.argmax(before[row]) != np.argmax(after[row]) for row in after]))


def movement(before: dict[tuple[str, str], list[float]], after: dict[tuple[str, str], list[float]]) -> float:
    """Return the mean total variation distance of rows, in % of a whole mixture."""
    return 50 * float(np.mean([np.abs(np.subtract(before[row], after[row])).sum() for row in after]))


def dropped(before: dict[tuple[str, str], list[float]], after: dict[tuple[str, str], list[float]]) -> bool:
    """Return whether an option was dropped between two epochs: what is left then jumps, whatever alpha does."""
    return any(b > 0 and a == 0 for row in after for b, a in zip(before[row], after[row], strict=True))


def variance(epochs: Sequence[dict[tuple[str, str], list[float]]]) -> float | None:
    """Return the variance of a mixture weight over epochs, as a mean over all weights; None of single epochs.

    Where options were dropped, the variance is that around the means before and after.
    """
    parts: list[list[dict[tuple[str, str], list[float]]]] = [[]]
    for epoch in epochs:
        if parts[-1] and dropped(parts[-1][-1], epoch):
            parts.append([])
        parts[-1].append(epoch)
    parts = [part for part in parts if len(part) > 1]
    if not parts:
        return None
    variances = [
        np.mean(np.concatenate([np.var([one[row] for one in part], axis=0) for row in part[0]])) for part in parts
    ]
    return float(np.average(variances, weights=[*map(len, parts)]))


def _drnas(**search: object) -> dict[str, object]:
    return {"optimizer": "drnas", "search": search}


PLAIN = 'create_optimizer.regularizer = "none"'
NO_DECAY = "search: architecture/torch.optim.Adam.weight_decay = 0.0"
"""The paper's recipes let alpha decay. Here each arm says itself what pulls alpha, and the others have nothing."""
STUDY = Study(
    question="How steady is alpha over the epochs of a search?",
    paper="It names warm-up and progressive shrinking as means against a high variance of alpha in macro spaces.",
    arms={
        "plain": Arm(_drnas(), (PLAIN, NO_DECAY)),
        "warm-up": Arm(_drnas(), (PLAIN, NO_DECAY)),
        "l2": Arm(_drnas(), ('create_optimizer.regularizer = "l2"', "create_optimizer.scale = 0.01", NO_DECAY)),
        "kl": Arm(_drnas(), ('create_optimizer.regularizer = "kl"', "create_optimizer.scale = 0.01", NO_DECAY)),
        "temperature": Arm(
            _drnas(),
            ("create_optimizer.temperature = 2.0", "create_optimizer.final_temperature = 0.5", PLAIN, NO_DECAY),
        ),
        "shrinking": Arm(
            {"optimizer": "pc_drnas"},
            ("create_optimizer.channels = (1, 1)", "create_optimizer.keep = (1.0, 0.5)",
             "create_optimizer.edge_normalization = False", PLAIN, NO_DECAY),
        ),
    },
    stages=("search",),
    measure=measure,
    metrics={
        "turnover": Metric("decisions that change per epoch, late", "%", 2),
        "movement": Metric("mixture that moves per epoch, late", "%", 3),
        "variance": Metric("variance of a mixture weight, late", "1e-4", 3, 1e-4),
        "entropy": Metric("entropy at the end", "of 1", 3),
        "table_value": Metric("table value at the end", "", 2),
    },
    claims=(
        Claim("turnover", "warm-up", "plain", higher=False, paper="ahead"),
        Claim("turnover", "shrinking", "plain", higher=False, paper="ahead"),
        Claim("turnover", "l2", "plain", higher=False),
        Claim("turnover", "kl", "plain", higher=False),
        Claim("turnover", "temperature", "plain", higher=False),
        Claim("variance", "warm-up", "plain", higher=False, paper="ahead"),
        Claim("variance", "shrinking", "plain", higher=False, paper="ahead"),
    ),
    panels=(
        Panel("means", "turnover"),
        Panel("curves", "turnover", "epoch", "decisions that change (%)"),
        Panel("curves", "movement", "epoch", "mixture that moves (%)"),
    ),
    limits=(
        "A steady alpha need not be a good one: one that never learns is the steadiest. Look at the entropy, and at "
        "the table's value where there is a table. During a warm-up alpha does not move. Shrinking moves the mixture "
        "once, when options are dropped; that jump is left out. The numbers above are of a part of the search in which "
        "alpha has learned for as many epochs in all arms: the second half of those that a warm-up leaves, from the "
        "first one of alpha on."
    ),
    scales={
        "cpu": Scale(
            {"search": {"epochs": 16, "warmup_epochs": 0}, "measure": {"warmup_epochs": 4}},
            arms={"warm-up": {"search": {"warmup_epochs": 4}}},
        ),
        "paper": Scale(
            {"search": {"warmup_epochs": 0}, "measure": {"warmup_epochs": 10}},
            seeds=(9001, 9002, 9003, 9004),
            arms={"warm-up": {"search": {"warmup_epochs": 10}}},
        ),
    },
    table="optional",
)  # fmt: skip
