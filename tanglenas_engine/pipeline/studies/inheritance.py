"""Are inherited weights worth anything? Inherit, fine-tune or train from scratch, and how alike the networks are."""

from __future__ import annotations

import os
from contextlib import chdir

import torch
from torch import Tensor

from tanglenas_engine.data import Samples
from tanglenas_engine.pipeline.comparison.estimates import Metric
from tanglenas_engine.pipeline.config.configurables import read_architecture
from tanglenas_engine.pipeline.files import WEIGHTS, load_into
from tanglenas_engine.pipeline.studies.methods import ONE_STAGE, PAPER_SEEDS, SPOS, TEST
from tanglenas_engine.pipeline.studies.run import Run
from tanglenas_engine.pipeline.studies.study import Arm, Claim, Matrix, Measured, Panel, Scale, Study
from tanglenas_engine.runtime.devices import device_of
from tanglenas_engine.training.cka import similarity
from tanglenas_engine.training.measure import recalibrate, statistics_inputs

BATCH, BATCHES = 128, 8
"""The samples of a batch, and the most batches, that networks are compared on. They are of the validation split."""
MODES = ("scratch", "finetune", "inherit")


def measure(run: Run) -> Measured:
    """Compare the final network with that of the inherited weights, layer by layer, and return its test result.

    A fine-tuned network is also compared with the one that was trained from scratch.
    """
    with run.opened("retrain") as bench:
        architecture = read_architecture(bench.space)
        inherited = bench.space.extract(architecture)
        view = bench.data("weights", "validation")
        device = device_of(os.environ.get("TANGLENAS_DEVICE") or None)
        inherited.to(device)
        recalibrate(inherited, statistics_inputs(inherited, view.plain("weights"), BATCHES, 0, device))
        final = bench.space.standalone(architecture)
        load_into(final, WEIGHTS)
        inputs = [batch.to(device) for batch in _batches(view.validation)]
        rows, columns, found = similarity(inherited, final.to(device), inputs)
        values = {"cka": _mean(rows, columns, found), "cka_last": float(found[-1, -1]), **run.tested()}
        matrices = {"cka": Matrix(rows, columns, found.tolist())}
        if run.beside is not None:
            with chdir(run.beside):
                retrained = bench.space.standalone(read_architecture(bench.space))
                load_into(retrained, WEIGHTS)
            rows, columns, found = similarity(retrained.to(device), final, inputs)
            values["cka_retrained"] = _mean(rows, columns, found)
            matrices["cka_retrained"] = Matrix(rows, columns, found.tolist())
    return Measured(values, matrices=matrices, choices=run.architecture())


def _mean(rows: list[str], columns: list[str], found: Tensor) -> float:
    """Return the mean similarity of layers with equal names, without those that have none."""
    same = [found[rows.index(name), columns.index(name)] for name in rows if name in columns]
    return float(torch.tensor(same, dtype=found.dtype).nanmean())


def _batches(samples: Samples) -> list[Tensor]:
    """Return the inputs of batches of equal size; of few samples, one batch of all."""
    count = min(BATCH, len(samples))
    starts = range(0, len(samples) - count + 1, count)
    return [samples.batch(torch.arange(start, start + count))[0] for start in list(starts)[:BATCHES]]


def _arms() -> dict[str, Arm]:
    found = {}
    for method, given in (("drnas", ONE_STAGE), ("spos", {**SPOS, "discretize": {"method": "evolution"}})):
        for mode in MODES:
            found[f"{method}-{mode}"] = Arm(
                {**given, "retrain": {"mode": mode}},
                supernet=f"{method}-scratch" if mode != "scratch" else "",
                beside=f"{method}-scratch" if mode == "finetune" else "",
            )
    return found


STUDY = Study(
    question="Are the weights that a network inherits worth anything: used as they are, fine-tuned, or not at all?",
    paper=(
        "Fine-tuning helps, and inherited and retrained weights are more alike, by CKA, after a gradient search than "
        "in two stages."
    ),
    arms=_arms(),
    stages=("search", "discretize", "retrain", "evaluate"),
    measure=measure,
    metrics={
        "test_accuracy": TEST["test_accuracy"],
        "test_loss": TEST["test_loss"],
        "cka": Metric("CKA of inherited and final layers, mean", "", 3),
        "cka_last": Metric("CKA of the last layer", "", 3),
        "cka_retrained": Metric("CKA of fine-tuned and retrained layers, mean", "", 3),
    },
    claims=(
        Claim("cka", "drnas-scratch", "spos-scratch", paper="ahead"),
        Claim("cka", "drnas-finetune", "spos-finetune", paper="ahead"),
        Claim("cka_retrained", "drnas-finetune", "spos-finetune"),
        *(
            Claim(metric, f"{method}-{mode}", f"{method}-scratch", metric == "test_accuracy",
                  "ahead" if mode == "finetune" else "")
            for metric in ("test_accuracy", "test_loss")
            for method in ("drnas", "spos")
            for mode in MODES[1:]
        ),
    ),
    panels=(
        Panel("means", "test_accuracy"),
        Panel("means", "test_loss"),
        Panel("matrices", "cka", "layer, final", "layer, inherited"),
        Panel("matrices", "cka_retrained", "layer, fine-tuned", "layer, retrained"),
    ),
    limits=(
        "CKA compares what layers compute, not what they are worth: two bad networks can be alike. The networks of the "
        "two methods differ, so a difference of their CKA is that of method and architecture together. Fine-tuning "
        "takes as many epochs as training from scratch, by the same recipe; `inherit` takes none. Means are of "
        "layers with equal names; the matrix has all pairs."
    ),
    scales={
        "cpu": Scale(
            {"search": {"epochs": 12, "warmup_epochs": 2}, "discretize": {"candidates": 60}, "retrain": {"epochs": 15}}
        ),
        "paper": Scale({"discretize": {"candidates": 1000}}, seeds=PAPER_SEEDS),
    },
)  # fmt: skip
