"""MLflow stores with runs as the stages leave them, made without running a stage."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tanglenas_engine.pipeline.tracking.store import PARENT, Store, experiment_name

_moments = itertools.count(1_700_000_000_000, 1000)


def add_pipeline(
    root: Path,
    optimizer: str,
    seed: int,
    *,
    status: str = "FINISHED",
    settings: Mapping[str, Any] | None = None,
    curve: Mapping[str, list[float]] | None = None,
    used: float = 40.0,
    **metrics: float,
) -> str:
    """Add a pipeline with its four stages to a project's store, and return the id of its run.

    Args:
        status: The status of evaluate. Other stages are finished.
        settings: Parameters of the search and of retrain, by the names of bindings.
        curve: Metrics of the search by epoch.
        used: The processor seconds of the search; the other stages take one each.
        metrics: The metrics of evaluate.
    """
    store = Store.of(root)
    client = store.connect()
    experiment = store.experiment(client, experiment_name())

    def add(stage: str, params: Mapping[str, Any], numbers: Mapping[str, float], parent: str | None = None) -> str:
        tags = {
            "tanglenas.stage": stage,
            "space": "toy_cell",
            "dataset": "digits",
            **({PARENT: parent} if parent else {}),
        }
        name = f"{optimizer} toy_cell s{seed}" if stage == "pipeline" else stage
        run = client.create_run(experiment, next(_moments), tags=tags, run_name=name).info.run_id
        for key, value in {"SEED": seed, "SPACE": "toy_cell", "DATASET": "digits", **params}.items():
            client.log_param(run, key, value)
        for key, value in numbers.items():
            client.log_metric(run, key, value)
        return str(run)

    settings = settings or {}
    pipeline = add("pipeline", {}, {})
    for stage in ("search", "discretize", "retrain", "evaluate"):
        own = {key: value for key, value in settings.items() if key.partition(".")[0] in (stage, "target")}
        seconds = used if stage == "search" else 1.0
        numbers = {"stage/seconds": seconds / 2, "stage/processor_seconds": seconds, "stage/peak_memory_MiB": 500.0}
        if stage == "evaluate":
            numbers |= {f"final/{key}": value for key, value in metrics.items()}
        run = add(stage, {**own, **({"OPTIMIZER": optimizer} if stage == "search" else {})}, numbers, pipeline)
        if stage == "search":
            for key, values in (curve or {}).items():
                for epoch, value in enumerate(values, 1):
                    client.log_metric(run, f"search/{key}", value, step=epoch)
        client.set_terminated(run, status if stage == "evaluate" else "FINISHED")
    client.set_terminated(pipeline, status)
    return pipeline
