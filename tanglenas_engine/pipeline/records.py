"""Reads what finished stages left, for the commands `tanglenas show`, `export` and `report`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gin

from tanglenas_engine.data import Dataset
from tanglenas_engine.errors import TangleNASError, shown
from tanglenas_engine.pipeline.config import required
from tanglenas_engine.pipeline.configurables import create_dataset
from tanglenas_engine.pipeline.files import STAGES
from tanglenas_engine.pipeline.store import PARENT, Store

LARGEST = 1e18
"""The size from which a number of a run counts as none. An axis has no room for it."""


def made_with(config: Path) -> tuple[dict[str, Any], Dataset]:
    """Return the options with which a stage made its space, and its dataset, from the `operative.gin` that it wrote.

    Raises:
        TangleNASError: The config is damaged, or its dataset is missing.
    """
    gin.clear_config()
    try:
        # This is a record, not a configuration: bindings of the stage's own functions may be unknown here.
        gin.parse_config(config.read_text("utf-8"), skip_unknown=True)
    except Exception as error:  # the tokenizer, the parser and the registry raise errors of their own
        reason = shown(error)
        raise TangleNASError(f"{config} cannot be read ({reason}). Give the space's options instead") from None
    bound = {name: value for name, value in gin.get_bindings("create_space").items() if name != "name"}
    dataset: Dataset = create_dataset(name=required("DATASET", str))
    return {**dataset.space_options(), **bound}, dataset


def evaluated(root: Path) -> list[dict[str, Any]]:
    """Return one row for each finished evaluation of a project, oldest first.

    A row has `run_id`, `date`, `space`, `dataset`, `optimizer`, `seed`, `digest`, `commit`, `params`, `macs`,
    `accuracy` in % and, for a text, `perplexity`, each None where the run lacks it. `settings` has the parameters of
    all stages of its pipeline but the seed.

    Raises:
        Exception: The store does not answer.
    """
    store = Store.of(root)
    if store.own and not (root / "mlflow.db").exists():
        return []
    client = store.connect()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs: list[Any] = []
    page = None
    while True:
        query = "attributes.status = 'FINISHED' AND tags.`tanglenas.stage` != ''"
        found = client.search_runs(experiments, query, order_by=["attributes.start_time"], page_token=page)
        runs += found
        if not (page := found.token):
            break
    # A stage that DVC skipped is nested in the pipeline that ran it, which had the same search.
    siblings: dict[tuple[Any, str], Any] = {}
    for run in runs:
        for pipeline in (run.data.tags.get("tanglenas.pipeline_id"), run.data.tags.get(PARENT)):
            siblings[pipeline, run.data.tags["tanglenas.stage"]] = run
    # The optimizer is a parameter of the search, not of the evaluation.
    optimizers = {
        run.data.tags.get("tanglenas.pipeline_id"): run.data.params.get("OPTIMIZER")
        for run in runs
        if run.data.tags["tanglenas.stage"] == "search"
    }
    rows = []
    for run in runs:
        tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
        if tags["tanglenas.stage"] == "evaluate":
            rows.append(
                {
                    "run_id": run.info.run_id,
                    "date": _date(run.info.start_time),
                    "space": _told(tags.get("space")),
                    "dataset": _told(tags.get("dataset")),
                    "optimizer": _told(optimizers.get(tags.get("tanglenas.pipeline_id"))),
                    "seed": _told(params.get("SEED")),
                    "digest": _told(tags.get("architecture.digest")),
                    "commit": _told(tags.get("git.sha")),
                    "params": _finite(metrics.get("final/params")),
                    "macs": _finite(metrics.get("final/macs", metrics.get("final/flops"))),  # flops: an older run
                    "accuracy": _finite(metrics.get("final/test_accuracy")),
                    "perplexity": _finite(metrics.get("final/test_perplexity")),
                    "settings": _settings(run, siblings),
                }
            )
    return rows


def _settings(evaluation: Any, siblings: Mapping[tuple[Any, str], Any]) -> dict[str, str]:
    """Return the parameters of the pipeline that led to an evaluation, without the seed."""
    tags, found = evaluation.data.tags, {}
    for stage in STAGES[:-1]:
        nested = siblings.get((tags.get(PARENT, ""), stage))
        if run := nested or siblings.get((tags.get("tanglenas.pipeline_id", ""), stage)):
            found.update(run.data.params)
    found.update(evaluation.data.params)
    return {shown(name, 80): shown(value, 80) for name, value in found.items() if name != "SEED"}


def _date(milliseconds: Any) -> datetime:
    """Return a time of the store, or the start of 1970 for one that no calendar has."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC)


def _told(text: str | None) -> str | None:
    """Return a tag or parameter of the store for a page or a figure. Anyone who reaches the store can write them."""
    return None if text is None else shown(text, 80)


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < LARGEST else None
