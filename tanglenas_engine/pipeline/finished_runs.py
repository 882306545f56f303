"""The reader of what finished stages left, for the commands `tanglenas show`, `export`, `report` and `compare`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gin

from tanglenas_engine.data import Dataset
from tanglenas_engine.errors import TangleNASError, shown
from tanglenas_engine.pipeline.config.configurables import create_dataset
from tanglenas_engine.pipeline.config.reader import register_references, required, without_call_stack
from tanglenas_engine.pipeline.config.values import macro_value
from tanglenas_engine.pipeline.files import STAGES
from tanglenas_engine.pipeline.headline import plausible
from tanglenas_engine.pipeline.project import in_project_of
from tanglenas_engine.pipeline.tracking.store import PARENT, Store, experiment_name
from tanglenas_engine.pipeline.tracking.tracker import AFTER

if TYPE_CHECKING:
    from mlflow import MlflowClient

SIZES = ({"num_classes", "image_size", "in_channels"}, {"vocab_size", "block_size"})
"""The options of a space that say what images hold, and what a text holds. `operative.gin` has all of one set. Those of
earlier versions have only what a person bound."""
OTHERWISE = "Copy ARCH into another folder, and give the space's options with -o"
STAGE, PIPELINE_ID = "tanglenas.stage", "tanglenas.pipeline_id"
BINDING = re.compile(r"""'([\w./]+) = "?\$\{([\w.]+)\}"?'""")
"""A binding in dvc.yaml whose value is one of params.yaml, such as `'target.share = ${search.target_share}'`."""


@dataclass(frozen=True)
class Records:
    """The evaluations of a project, and its runs that did not get there.

    Attributes:
        evaluated: One row for each finished evaluation, oldest first. A row has `run_id`, `search_id` (the run of its
            search), `name`, `date`, `space`, `dataset`, `optimizer`, `seed`, `digest`, `commit`, `params`, `macs`,
            `accuracy` in % and, for a text, `perplexity`, each None where the run lacks it. `by_hand` is True if
            someone changed the architecture after discretize. `settings` has the parameters of all stages of its
            pipeline but the seed; where the stages of some row have other values of one, its name has the stage behind
            it, such as "cosine.final (search)". `metrics` has the numbers of the evaluation, and what the stages cost:
            `search_seconds`, `search_processor_seconds`, `seconds`, `processor_seconds` and `peak_memory_MiB`. A number
            that is not finite is NaN.
        unfinished: The names of pipelines without a finished evaluation, with the stage and the status of each.
        origin: A sentence about the experiment that was read, or "" for a store that is the project's own.
    """

    evaluated: list[dict[str, Any]] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    origin: str = ""


def space_of(config: Path) -> str | None:
    """Return the name of the space of a stage, from the `operative.gin` that it wrote, or None if it names no space.

    Raises:
        TangleNASError: The config is damaged.
    """
    with _opened(config):
        name: str | None = macro_value("SPACE")
    return name


def made_with(config: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with which a stage made its space, from the `operative.gin` that it wrote.

    Args:
        given: Options in place of those of the stage.

    Raises:
        TangleNASError: The config is damaged. Or the sizes of the data are neither in it nor given, and the dataset is
            missing.
    """
    with _opened(config):
        bound_there = gin.get_bindings("create_space")
    stage = {name: value for name, value in bound_there.items() if name != "name"}
    bound = {**stage, **given}
    if any(sizes <= bound.keys() for sizes in SIZES):
        return bound
    try:
        return {**dataset_of(config).space_options(), **bound}
    except TangleNASError as error:
        raise TangleNASError(f"{str(error).rstrip('.')}. {OTHERWISE}") from None


def dataset_of(config: Path) -> Dataset:
    """Return the dataset of a stage, from the `operative.gin` that it wrote. Read samples `in_project_of(config)`.

    Raises:
        TangleNASError: The config is damaged, or the dataset is missing.
    """
    with _opened(config):
        try:
            dataset: Dataset = create_dataset(name=required("DATASET", str))
        except TangleNASError as error:
            raise TangleNASError(without_call_stack(error)) from None
    return dataset


@contextmanager
def _opened(config: Path) -> Iterator[None]:
    """Read a config, and stand in its project until the block ends."""
    gin.clear_config()
    file = config.absolute()
    with in_project_of(file):
        try:
            text = file.read_text("utf-8")
            register_references(text)
            # This is a record, not a configuration: bindings of the stage's own functions may be unknown here.
            gin.parse_config(text, skip_unknown=True)
            gin.get_bindings("create_space")  # resolves what it refers to
        except Exception as error:  # the tokenizer, the parser and the registry raise errors of their own
            raise TangleNASError(f"{config} cannot be read ({shown(error)}). {OTHERWISE}") from None
        yield


def read(root: Path) -> Records:
    """Return the runs of a project's MLflow store: those of its own, or of the experiment that its stages write to.

    An evaluation is left out if someone deleted the run of its pipeline.

    Raises:
        Exception: The store does not answer.
    """
    store = Store.of(root)
    if store.own and not (root / "mlflow.db").exists():
        return Records()
    client = store.connect()
    found = _runs(client, None if store.own else experiment_name())
    pipelines = {run.info.run_id: run for run in found if run.data.tags[STAGE] == "pipeline"}
    stages = [run for run in found if run.data.tags[STAGE] in STAGES]
    # A stage that DVC skipped is nested in the pipeline that ran it. The runs after it know its id, or, those of older
    # versions, only the id of the pipeline, which is that of the search.
    finished = {run.info.run_id: run for run in stages if run.info.status == "FINISHED"}
    siblings: dict[tuple[str | None, str], list[Any]] = {}
    for run in finished.values():
        for pipeline in {run.data.tags.get(PIPELINE_ID), run.data.tags.get(PARENT)}:
            siblings.setdefault((pipeline, run.data.tags[STAGE]), []).append(run)
    evaluations = [
        run
        for run in finished.values()
        if run.data.tags[STAGE] == "evaluate" and run.data.tags.get(PARENT) in {*pipelines, None}
    ]
    after = {run_id for run in evaluations for tag, run_id in run.data.tags.items() if tag.startswith(AFTER)}
    others = {run_id: _of_any_experiment(client, run_id) for run_id in after - {run.info.run_id for run in found}}
    reached, rows = {**others, **finished}, []
    for run in evaluations:
        known = {name: reached.get(run.data.tags.get(f"{AFTER}{name}", "")) for name in STAGES[:-1]}
        parts = {name: part for name in known if (part := known[name] or _before(run, name, siblings))}
        parts["evaluate"] = run
        changed = _changed_by_hand(run, known["discretize"])
        rows.append({**_row(parts, pipelines.get(run.data.tags.get(PARENT))), "by_hand": changed})
    done = {run.data.tags.get(PARENT) for (_, stage), runs in siblings.items() if stage == "evaluate" for run in runs}
    unfinished = [
        f"{_name(pipeline)} ({_last(stages, run_id)})" for run_id, pipeline in pipelines.items() if run_id not in done
    ]
    for row, settings in zip(rows, _flat([row["settings"] for row in rows]), strict=True):
        row["settings"] = settings
    origin = (
        f"The runs are all of the experiment {shown(experiment_name(), 80)!r} in {store.name}, whichever project they "
        "are of. MLFLOW_EXPERIMENT_NAME, set for the stages and for this command, gives a project its own experiment."
    )
    return Records(rows, unfinished, "" if store.own else origin)


def _flat(runs: Sequence[Mapping[str, Mapping[str, str]]]) -> list[dict[str, str]]:
    """Return the settings of runs without the stages that have them, but where stages of a run disagree.

    Functions that several stages use, such as a learning-rate schedule, have a binding in each.

    Args:
        runs: The settings of each run by stage.
    """

    def disagree(stages: Mapping[str, Mapping[str, str]]) -> set[str]:
        seen: dict[str, set[str]] = {}
        for name, value in (item for settings in stages.values() for item in settings.items()):
            seen.setdefault(name, set()).add(value)
        return {name for name, values in seen.items() if len(values) > 1}

    apart = set().union(*map(disagree, runs))
    return [
        {
            f"{name} ({stage})" if name in apart else name: value
            for stage, settings in stages.items()
            for name, value in settings.items()
        }
        for stages in runs
    ]


def _runs(client: MlflowClient, experiment: str | None) -> list[Any]:
    """Return all runs of pipelines and of stages, the oldest first, of one experiment or of all."""
    known = client.search_experiments() if experiment is None else [client.get_experiment_by_name(experiment)]
    experiments = [one.experiment_id for one in known if one is not None]
    if not experiments:
        return []
    found: list[Any] = []
    page = None
    while True:
        query = f"tags.`{STAGE}` != ''"
        batch = client.search_runs(experiments, query, order_by=["attributes.start_time"], page_token=page)
        found += batch
        if not (page := batch.token):
            return found


def _of_any_experiment(client: MlflowClient, run_id: str) -> Any:
    """Return a finished run of whatever experiment, also one that someone deleted, or None if it is out of reach.

    DVC takes a cached stage from where it ran, which may have been under another MLFLOW_EXPERIMENT_NAME.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"}:
            raise
        return None
    return run if run.info.status == "FINISHED" else None


def _before(evaluation: Any, stage: str, siblings: Mapping[tuple[str | None, str], Sequence[Any]]) -> Any:
    """Return the run of a stage that an evaluation followed: the last one before it, or else the first; or None."""
    tags = evaluation.data.tags
    runs = siblings.get((tags.get(PARENT, ""), stage)) or siblings.get((tags.get(PIPELINE_ID, ""), stage)) or []
    earlier = [run for run in runs if run.info.start_time <= evaluation.info.start_time]
    return earlier[-1] if earlier else next(iter(runs), None)


def _changed_by_hand(evaluation: Any, discretize: Any) -> bool:
    """Return whether an evaluation is about another architecture than the run of discretize derived that it followed.

    `read_architecture.pick` takes another point of the front, which discretize derived too.
    """
    if discretize is None or evaluation.data.params.get("read_architecture.pick", "best") != "best":
        return False
    found, derived = (run.data.tags.get("architecture.digest") for run in (evaluation, discretize))
    return None not in (found, derived) and found != derived


def _row(parts: Mapping[str, Any], pipeline: Any) -> dict[str, Any]:
    """Return the row of an evaluation.

    Args:
        parts: The run of each stage of its pipeline that is known.
        pipeline: The run in which it is nested, or None.
    """
    run, search = parts["evaluate"], parts.get("search")
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    # The evaluation has the optimizer of its search as a tag, but for older runs.
    optimizer = search.data.params.get("OPTIMIZER") if search else tags.get("optimizer")
    return {
        "run_id": run.info.run_id,
        "search_id": search.info.run_id if search else None,
        "name": _name(pipeline or run),
        "date": _date(run.info.start_time),
        "space": _told(tags.get("space")),
        "dataset": _told(tags.get("dataset")),
        "optimizer": _told(optimizer),
        "seed": _told(params.get("SEED")),
        "digest": _told(tags.get("architecture.digest")),
        "commit": _told(tags.get("git.sha")),
        "params": plausible(metrics.get("final/params")),
        "macs": plausible(metrics.get("final/macs", metrics.get("final/flops"))),  # flops: an older run
        "accuracy": plausible(metrics.get("final/test_accuracy")),
        "perplexity": plausible(metrics.get("final/test_perplexity")),
        "settings": {
            stage: {shown(name, 80): shown(value, 80) for name, value in part.data.params.items() if name != "SEED"}
            for stage, part in parts.items()
        },
        "metrics": _metrics(parts),
    }


def _metrics(parts: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation and the costs of its stages. One that is not finite is NaN."""
    found = {
        shown(name.removeprefix("final/"), 80): value
        for name, value in parts["evaluate"].data.metrics.items()
        if name.startswith("final/")
    }
    used = {
        stage: {name.removeprefix("stage/"): value for name, value in run.data.metrics.items()}
        for stage, run in parts.items()
    }
    for name in ("seconds", "processor_seconds"):
        if name in used.get("search", {}):
            found[f"search_{name}"] = used["search"][name]
        if all(name in used.get(stage, {}) for stage in STAGES):
            found[name] = sum(numbers[name] for numbers in used.values())
    for name in ("peak_memory_MiB", "peak_gpu_memory_MiB"):
        if peaks := [numbers[name] for numbers in used.values() if name in numbers]:
            found[name] = max(peaks)
    return {name: math.nan if plausible(value) is None else value for name, value in found.items()}


def histories(root: Path, run_ids: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, dict[int, float]]]:
    """Return metrics of runs by step. A metric that a run lacks is empty, and numbers that are not finite are left out.

    Raises:
        Exception: The store does not answer.
    """
    client = Store.of(root).connect()
    return {
        run_id: {
            name: {
                metric.step: metric.value
                for metric in client.get_metric_history(run_id, name)
                if plausible(metric.value) is not None
            }
            for name in names
        }
        for run_id in run_ids
    }


def names_of_params(root: Path) -> dict[str, str]:
    """Return the names in params.yaml of bindings, such as `search.target` for `target.value`, as dvc.yaml says."""
    try:
        text = (root / "dvc.yaml").read_text("utf-8")
    except (OSError, ValueError):
        text = ""
    macros = {name: name.lower() for name in ("OPTIMIZER", "SPACE", "DATASET", "RECIPE")}
    return {**macros, **dict(BINDING.findall(text))}


def _name(run: Any) -> str:
    """Return the name of a run, with that of its DVC experiment where there is one, or else the start of its id."""
    told = run.data.tags.get("dvc.exp_name") or run.info.run_id[:8]
    return f"{shown(run.info.run_name, 80)} [{shown(told, 80)}]"


def _last(stages: Sequence[Any], pipeline: str) -> str:
    """Return the last stage of a pipeline and its status."""
    runs = [run for run in stages if run.data.tags.get(PARENT) == pipeline]
    return f"{runs[-1].data.tags[STAGE]}: {runs[-1].info.status.lower()}" if runs else "no stage"


def _date(milliseconds: Any) -> datetime:
    """Return a time of the store, or the start of 1970 for one that no calendar has."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC)


def _told(text: str | None) -> str | None:
    """Return a tag or parameter of the store for a page or a figure. Anyone who reaches the store can write them."""
    return None if text is None else shown(text, 80)
