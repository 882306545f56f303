"""What does it cost to share weights? Seconds and bytes of a search step, by mode and number of options."""

from __future__ import annotations

import inspect
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tanglenas_engine.optimizers.optimizer import Step
from tanglenas_engine.pipeline.comparison.estimates import Metric
from tanglenas_engine.pipeline.studies.memory_estimate import SAMPLES, STATES, Need
from tanglenas_engine.pipeline.studies.run import Run
from tanglenas_engine.pipeline.studies.study import Arm, Claim, Curve, Measured, Panel, Params, Scale, Study
from tanglenas_engine.plugins import create_optimizer, create_space, manager
from tanglenas_engine.runtime.devices import device_of
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.training.bytes import peak_bytes, saved_bytes
from tanglenas_engine.training.losses import cross_entropy

MIB = 2**20
UNTIMED = 2
"""Steps before the clock starts: the first ones allocate memory."""


def measure(run: Run) -> Measured:
    """Measure a search step of every space of an arm's kind, by the number of options of a choice."""
    options = run.measure
    found = {}
    device = device_of(os.environ.get("TANGLENAS_DEVICE") or None)
    for name in options[_list_of(options)]:
        for number, given in sized(name, options["kind"] == "cells"):
            torch.manual_seed(run.seed)
            space = create_space(name, **given, **_mode(options)).to(device)
            found[name, number] = Cost.of(space, int(options["batch"]), int(options["rounds"]), run.seed)
    kind = options["kind"]
    curves = {}
    for field, unit in (("seconds", 1000.0), ("kept", 1 / MIB), ("peak", 1 / MIB)):
        by_number: dict[int, list[float]] = {}
        for (_, number), cost in found.items():
            by_number.setdefault(number, []).append(unit * getattr(cost, field))
        most = max(map(len, by_number.values()))
        # A number that not every space has would be a mean of other spaces. Each space of cells has one number.
        x = sorted(number for number, each in by_number.items() if kind == "cells" or len(each) == most)
        curves[f"{kind} {field}"] = Curve(x, [_mean(by_number[number]) for number in x])
    values = {field: _mean([getattr(cost, field) for cost in found.values()])
              for field in ("seconds", "kept", "peak", "weights")}  # fmt: skip
    return Measured(values, curves)


def sized(name: str, cells: bool) -> list[tuple[int, dict[str, Any]]]:
    """Return numbers of options with the options of a space that has so many in each choice.

    The operations of a cell cannot be left out. Other choices lose their smallest options, and the largest network
    stays.
    """
    if cells:
        with torch.device("meta"):
            space = create_space(name)
        return [(max(len(row.options) for row in space.rows), {})]
    given = inspect.signature(manager().resolve("space", name).load()).parameters
    with torch.device("meta"):
        choices = {key: choice.options for key, choice in create_space(name).choices.items() if key in given}
    most = max(map(len, choices.values()))
    return [
        (number, {key: tuple(sorted(options)[-number:]) for key, options in choices.items()})
        for number in range(1, most + 1)
    ]


class Cost:
    """What a search step costs: a weight step and an architecture step of DrNAS.

    Attributes:
        seconds: The processor seconds, on a GPU those of the wall, as a median.
        kept: The bytes that the dearer of both keeps for its backward pass.
        peak: The most bytes that it allocates beyond those that live between steps.
        weights: The bytes of the weights.
    """

    def __init__(self, seconds: float, kept: int, peak: int, weights: int):
        self.seconds, self.kept, self.peak, self.weights = seconds, float(kept), float(peak), float(weights)

    @classmethod
    def of(cls, space: SearchSpace, batch: int, rounds: int, seed: int) -> Cost:
        """Measure a step of a space on random inputs."""
        device = next(space.parameters()).device
        parts, known = _step(space, batch, seed)
        taken = []
        for index in range(UNTIMED + rounds):
            start = _now(device)
            for part in parts:
                part(index)
            taken.append(_now(device) - start)
        kept = max(saved_bytes(partial(part, 0), known) for part in parts)
        peak = max(peak_bytes(partial(part, 0), device) for part in parts)
        return cls(statistics.median(taken[UNTIMED:]), kept, peak, sum(weight.nbytes for weight in space.parameters()))


def _step(space: SearchSpace, batch: int, seed: int) -> tuple[Sequence[Callable[[int], None]], set[int]]:
    """Return the parts of a search step on random inputs, and the addresses of what lives between steps."""
    device = next(space.parameters()).device
    inputs = space.example_input(batch).to(device)
    with torch.no_grad():
        outputs = space.release()(inputs)
    targets = torch.randint(outputs.shape[-1], outputs.shape[:-1], device=device)
    weights = torch.optim.SGD(space.parameters(), lr=1e-3)
    optimizer = create_optimizer("drnas")
    optimizer.bind(space, seed)

    def step(index: int) -> Step:
        pair = (inputs, targets)
        return Step(index, space, cross_entropy, pair, pair, weights)

    def weight(index: int) -> None:
        weights.zero_grad()
        for loss in optimizer.weight_losses(step(index)):
            torch.autograd.backward(loss)

    def architecture(index: int) -> None:
        optimizer.architecture_backward(step(index))

    parts: tuple[Callable[[int], None], ...] = (weight, architecture) if space.rows else (weight,)
    tensors = [*space.parameters(), *optimizer.parameters(), inputs, targets]
    return parts, {tensor.untyped_storage().data_ptr() for tensor in tensors}


def needed(params: Params) -> Need:
    """Return the memory of the dearest step that the arms measure, by a step on two samples."""
    found = []
    for arm in params["arms"].values():
        options = {**params["measure"], **arm["measure"]}
        for name in options[_list_of(options)]:
            parts, known = _step(space := create_space(name, **_mode(options)), SAMPLES, 0)
            kept = max(saved_bytes(partial(part, 0), known) for part in parts)
            weights = STATES * sum(weight.nbytes for weight in space.parameters())
            batch = int(options["batch"])
            found.append(Need(weights, kept * batch // SAMPLES, batch, "a smaller measure.batch with -S"))
    return max(found, key=lambda need: need.total)


def _list_of(options: Mapping[str, Any]) -> str:
    """Return which list of spaces an arm measures."""
    return "cells" if options["kind"] == "cells" else "macro"


def _mode(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option of a space that says how its options share weights."""
    return {"sharing" if options["kind"] == "cells" else "relaxation": options["mode"]}


def _now(device: torch.device) -> float:
    """Return the seconds of this process's processors, or of the wall when a GPU has done its work."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _mean(values: list[float]) -> float:
    """Return the geometric mean, in which every space counts alike."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _arm(kind: str, mode: str) -> Arm:
    given: Mapping[str, Any] = {"measure": {"kind": kind, "mode": mode}}
    return Arm(given, table={"cells": "Operations of cells", "macro": "Choices of sizes"}[kind])


def _on(params: Mapping[str, Any]) -> str:
    """Return the spaces that are measured. Nothing is trained, so there is no dataset."""
    measured = params["measure"]
    return f"{', '.join(measured['cells'])} (cells) and {', '.join(measured['macro'])} (sizes) with random inputs"


STUDY = Study(
    question="What do time and memory of a search step owe to how options share weights, and to how many they are?",
    paper="Superposition keeps the memory of a single path, where options with weights of their own need it for each.",
    arms={
        "superposed": _arm("cells", "superposed"),
        "entangled": _arm("cells", "entangled"),
        "separate": _arm("cells", "separate"),
        "macro-exact": _arm("macro", "exact"),
        "macro-gated": _arm("macro", "gated"),
        "macro-paper": _arm("macro", "paper"),
    },
    stages=(),
    measure=measure,
    needed=needed,
    on=_on,
    metrics={
        "seconds": Metric("search step, time", "ms", 1, 1e-3),
        "kept": Metric("kept for the backward pass", "MiB", 2, MIB),
        "peak": Metric("peak of a step", "MiB", 2, MIB),
        "weights": Metric("weights", "MiB", 3, MIB),
    },
    claims=(
        *(
            Claim(metric, "superposed", other, False, "ahead")
            for metric in ("seconds", "kept", "weights")
            for other in ("entangled", "separate")
        ),
        Claim("seconds", "macro-gated", "macro-exact", False),
        Claim("seconds", "macro-paper", "macro-exact", False),
        Claim("kept", "macro-paper", "macro-exact", False),
    ),
    panels=(
        Panel("curves", "cells seconds", "operations of an edge", "search step (ms)"),
        Panel("curves", "cells kept", "operations of an edge", "kept for backward (MiB)"),
        Panel("curves", "cells peak", "operations of an edge", "peak of a step (MiB)"),
        Panel("curves", "macro seconds", "options of a choice", "search step (ms)"),
        Panel("curves", "macro kept", "options of a choice", "kept for backward (MiB)"),
        Panel("curves", "macro peak", "options of a choice", "peak of a step (MiB)"),
    ),
    limits=(
        "Seeds are repeats: bytes hardly differ between them, and times differ by what else the machine does. The "
        "three ways to share weights are for cells, whose operations compete; choices of sizes have one way, in three "
        "relaxations. The spaces of cells differ in more than their number of operations. Numbers of the table are "
        "geometric means over spaces and numbers of options, and hold for the batch size in params.yaml. A curve "
        "ends at the largest number of options that all spaces have."
    ),
    scales={
        "cpu": Scale({
            "measure": {"cells": ["toy_cell_nano", "nb201_nano", "darts_nano"],
                        "macro": ["autoformer_nano", "gpt_nano", "mobilenetv3_nano", "toy_conv_macro_nano",
                                  "convnext_nano", "resnet_nano", "llama_nano"],
                        "batch": 16, "rounds": 6},
        }),
        "paper": Scale({
            "measure": {"cells": ["toy_cell", "nb201", "darts"],
                        "macro": ["autoformer_t", "mobilenetv3", "gpt", "toy_conv_macro"],
                        "batch": 64, "rounds": 12},
        }, seeds=(9001, 9002, 9003, 9004)),
    },
)  # fmt: skip
