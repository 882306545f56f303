"""The numbers by which people compare pipelines, from what the stages have written so far."""

from __future__ import annotations

import math

from tanglenas_engine.pipeline.files import METRICS, OUT, STAGES, read_json_or_empty

COMPARED = {
    "search": {"validation_accuracy": "search_validation_accuracy", "validation_loss": "search_validation_loss"},
    "discretize": {"params": "params", "macs": "macs"},
    "retrain": {"validation_accuracy": "validation_accuracy"},
    "evaluate": {
        name: name for name in ("test_accuracy", "test_loss", "test_perplexity", "params", "macs", "table_regret")
    },
}
"""The metrics of each stage that compare pipelines, and their names in the run of the pipeline."""


def pipeline_metrics(stage: str) -> dict[str, float]:
    """Return the numbers that compare pipelines, as far as `stage` and the stages before it have written them.

    DVC may have skipped the stages before, or fetched their files from its cache.
    """
    found: dict[str, float] = {}
    used: dict[str, dict[str, float]] = {}
    for name in STAGES[: STAGES.index(stage) + 1]:
        metrics, run = (read_json_or_empty(path) for path in (METRICS / f"{name}.json", OUT / f"{name}.run.json"))
        found |= {shared: metrics[key] for key, shared in COMPARED[name].items() if _is_number(metrics.get(key))}
        costs = run.get("used")
        used[name] = (
            {key: value for key, value in costs.items() if _is_number(value)} if isinstance(costs, dict) else {}
        )
    for key in ("seconds", "processor_seconds"):
        by_stage = {f"{name}_{key}": costs[key] for name, costs in used.items() if key in costs}
        found |= {**by_stage, **({key: round(sum(by_stage.values()), 1)} if by_stage else {})}
    memory = [costs["peak_memory_MiB"] for costs in used.values() if "peak_memory_MiB" in costs]
    return {**found, **({"peak_memory_MiB": max(memory)} if memory else {})}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
