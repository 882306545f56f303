"""A run of a study as it is measured: an arm with a seed, in the folder in which its stages ran."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config.configurables import create
from tanglenas_engine.pipeline.config.params import stage_arguments
from tanglenas_engine.pipeline.config.reader import configured
from tanglenas_engine.pipeline.files import ARCHITECTURE, METRICS, OUT, SUPERNET, load_into, read_splits
from tanglenas_engine.pipeline.trainings import Bench

STAGES_FILE = Path("pipelines", "stages.yaml")
"""The stages of the main pipeline, which every run goes through. It is no dvc.yaml: DVC would run it."""


@dataclass(frozen=True)
class Run:
    """An arm of a study with a seed. Its folder is the current one.

    Attributes:
        study: The name of the study.
        root: The folder of the study.
        arm: The name of the arm.
        seed: The seed.
        params: The values of the run's params.yaml.
        measure: The options of the measurement.
        table: The file with networks of known worth, or None.
        metric: The metric of that table.
        beside: The folder of the run that this one is compared with, or None.
    """

    study: str
    root: Path
    arm: str
    seed: int
    params: Mapping[str, Any]
    measure: Mapping[str, Any]
    table: Path | None
    metric: str
    beside: Path | None = None

    @contextmanager
    def opened(self, stage: str = "search", searched: bool = True) -> Iterator[Bench]:
        """Configure gin as for a stage until the block ends, and make the space with the weights of the search.

        Args:
            searched: False leaves the space the weights that it has before the search.
        """
        with configured(arguments_of(stage)):
            seed, space, dataset = create()
            if searched:
                load_into(space, SUPERNET)
            yield Bench(seed, space, dataset, read_splits())

    def metrics(self, stage: str) -> dict[str, Any]:
        """Return the metrics that a stage wrote."""
        found: dict[str, Any] = json.loads((METRICS / f"{stage}.json").read_text("utf-8"))
        return found

    def history(self) -> list[dict[str, str]]:
        """Return the rows of the search by epoch, as text."""
        with (OUT / "search" / "history.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def mixtures(self) -> list[dict[str, str]]:
        """Return the rows of the mixture weights by epoch, as text."""
        with (OUT / "search" / "mixture.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def architecture(self) -> dict[str, Any]:
        """Return the choices of the architecture that discretize found."""
        found: dict[str, Any] = json.loads(ARCHITECTURE.read_text("utf-8"))["choices"]
        return found

    def tested(self) -> dict[str, float]:
        """Return what the final network measures on the test split: its accuracy in %, or its loss for a text."""
        found = self.metrics("evaluate")
        return {"test_loss": found["test_loss"]} if self.text else {"test_accuracy": found["test_accuracy"]}

    @property
    def text(self) -> bool:
        """True if the data are a text, whose networks have a perplexity."""
        return (METRICS / "evaluate.json").exists() and not (OUT / "evaluate" / "classes.csv").exists()

    def seconds(self, *stages: str) -> float:
        """Return the seconds of the work of stages; see `work_seconds`."""
        return work_seconds(Path(), stages)


def arguments_of(stage: str) -> list[str]:
    """Return the arguments of a stage of the run in the current folder.

    Raises:
        TangleNASError: There is no such stage, or one of its gin files is missing.
    """
    arguments = stage_arguments(stage)
    if arguments is None:
        raise TangleNASError(f"{STAGES_FILE} has no stage {stage!r}, or a gin file of it is missing")
    return arguments


def work_seconds(folder: Path, stages: Sequence[str]) -> float:
    """Return the seconds of the work of stages, without their start; NaN if one did not log its costs.

    They are those of processors, or of the wall where a GPU worked.

    Args:
        folder: The folder of the run.
        stages: The names of stages that have ended.
    """
    used = [json.loads((folder / OUT / f"{stage}.run.json").read_text("utf-8")).get("used", {}) for stage in stages]
    return round(float(sum(costs.get(f"work_{clock_of(costs)}seconds", math.nan) for costs in used)), 1)


def clock_of(costs: Mapping[str, float]) -> str:
    """Return the start of the name of the seconds that count: those of the wall have none."""
    return "" if "peak_gpu_memory_MiB" in costs else "processor_"
