"""What stages leave behind, read again: for the commands `tanglenas show`, `export`, `report` and `doctor`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gin

from pipelines._config import required
from pipelines._stage import create_dataset_
from pipelines._store import Store
from tanglenas_engine.errors import TangleNASError


def space_options(config: Path) -> dict[str, Any]:
    """The options of the space that a stage made, from the `operative.gin` that it wrote.

    Raises:
        TangleNASError: The config cannot be read, or its dataset is not there.
    """
    gin.clear_config()
    try:
        # A record, not a configuration: what it says of the stage's own function is of no interest here.
        gin.parse_config(config.read_text(), skip_unknown=True)
    except Exception as error:  # tokenizer, parser and registry each have their own
        reason = " ".join(str(error).split())
        raise TangleNASError(f"{config} cannot be read ({reason}). Give the space's options instead") from None
    bound = {name: value for name, value in gin.get_bindings("create_space").items() if name != "name"}
    fitted: dict[str, Any] = create_dataset_(name=required("DATASET", str)).space_options()
    return {**fitted, **bound}


def swept(params: Path) -> dict[str, Any]:
    """The values of params.yaml by the names that `dvc exp run -S` takes, such as `search.epochs`."""
    from ruamel.yaml import YAML

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
        return found

    return flat(YAML(typ="safe").load(params.read_text()) or {})


def evaluated(root: Path) -> list[dict[str, Any]]:
    """What every finished evaluation of a project came to, oldest first.

    Each with its `run_id`, `date`, `space`, `dataset`, `optimizer`, `seed`, `digest`, `commit`, `params`, `flops` and
    `accuracy` in %; what a run does not say is None.

    Raises:
        Exception: The store does not answer.
    """
    store = Store.of(root)
    if store.uri == store.default(root) and not (root / "mlflow.db").exists():
        return []
    client = store.connect()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs, page = [], None
    while True:
        query = "attributes.status = 'FINISHED' AND tags.`tanglenas.stage` != ''"
        found = client.search_runs(experiments, query, order_by=["attributes.start_time"], page_token=page)
        runs += found
        if not (page := found.token):
            break
    # The search says which optimizer led to what is evaluated.
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
                    "date": datetime.fromtimestamp(run.info.start_time / 1000, UTC),
                    "space": tags.get("space"),
                    "dataset": tags.get("dataset"),
                    "optimizer": optimizers.get(tags.get("tanglenas.pipeline_id")),
                    "seed": params.get("SEED"),
                    "digest": tags.get("architecture.digest"),
                    "commit": tags.get("git.sha"),
                    "params": metrics.get("final/params"),
                    "flops": metrics.get("final/flops"),
                    "accuracy": metrics.get("final/test_accuracy"),
                }
            )
    return rows
