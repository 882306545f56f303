"""A run of a study: an arm with a seed, in a folder of its own, which is laid out as a project.

Stages read params.yaml, dvc.yaml and gin/ of the current folder, and write out/ and metrics/ there. So a run's folder
gets the params.yaml of its arm, the stages with the arm's bindings, and a copy of gin/ before each stage. DVC tracks
only what stages write there.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from tanglenas_engine.errors import TangleNASError, shown, unknown
from tanglenas_engine.pipeline.files import METRICS, OUT
from tanglenas_engine.pipeline.project import environment
from tanglenas_engine.pipeline.studies.run import STAGES_FILE, Run, clock_of, work_seconds
from tanglenas_engine.pipeline.studies.study import Curve, Matrix, Measured
from tanglenas_engine.pipeline.studies.yaml_text import yaml_text
from tanglenas_engine.runtime import distributed, strict_json
from tanglenas_engine.runtime.files import write_atomic

RUNS = Path("runs")
MEASURED = Path("measured")
GROUPS = ("search", "discretize", "retrain")
OWN = ("optimizer", "bindings", "measure", "as_long_as", "beside", *GROUPS)
"""The keys that an arm in params.yaml may have. Stages of dvc.yaml depend on them."""
OF_STAGE = re.compile(r"(search|discretize|retrain|evaluate): (.*)")
"""A binding for one stage: not every stage knows what another one refers to."""


def read_params(root: Path) -> dict[str, Any]:
    """Read the params.yaml of a study.

    Raises:
        TangleNASError: The folder is no study, or the file is damaged.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        params = YAML(typ="safe").load((root / "params.yaml").read_text("utf-8"))
        params["study"], params["arms"], params["seeds"]
    except (OSError, ValueError, YAMLError, KeyError, TypeError) as error:
        raise TangleNASError(
            f"{root} is not the folder of a study ({shown(error)}): run `tanglenas study NAME`"
        ) from None
    found: dict[str, Any] = params
    return found


@contextmanager
def in_run_folder(arm: str, seed: str, aside: Path | None = None) -> Iterator[Run]:
    """Lay out the folder of a run, and make it the current one until the block ends. Begin in the study's folder.

    Args:
        arm: The name of an arm; "pool" stands for what the arms have in common.
        seed: The seed.
        aside: A folder of the study to lay out instead, for a look at the settings of the run, which may be under way.

    Raises:
        TangleNASError: There is no such arm, or the folder is no study.
    """
    root = Path.cwd()
    params = read_params(root)
    arms = {**params["arms"], "pool": {}}
    if arm not in arms:
        raise unknown("arm of the study", arm, params["arms"])
    if foreign := [name for name in arms[arm] if name not in OWN]:
        raise TangleNASError(
            f"the arm {arm!r} in params.yaml has {foreign[0]!r}, which is the same for all arms of a study. An arm may "
            f"have {', '.join(OWN)}"
        )
    own: dict[str, Any] = {group: {**params[group], **(arms[arm].get(group) or {})} for group in GROUPS}
    own |= {name: params.get(name) for name in ("space", "dataset", "recipe")}
    own["optimizer"] = arms[arm].get("optimizer")
    own["seed"] = int(seed)
    clock: list[str] = []
    if (other := arms[arm].get("as_long_as")) and aside is None:
        own["search"]["seconds"] = _time(root / RUNS / f"{other}-{seed}")
        clock = [f'search.clock = "{_clock(root / RUNS / f"{other}-{seed}")}"']
    table = params.get("table")
    bindings = [*(params.get("bindings") or ()), *(arms[arm].get("bindings") or ()), *clock]
    if table:
        bindings += [f'benchmark.path = "../../{table}"', f'benchmark.metric = "{params["metric"]}"']
    folder = root / (aside or RUNS / f"{arm}-{seed}")
    with distributed.first_rank_first():
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / "gin", ignore_errors=True)
            shutil.copytree(root / "gin", folder / "gin")
            write_atomic(folder / "params.yaml", yaml_text(own))
            write_atomic(folder / "dvc.yaml", yaml_text(_stages(root, bindings)))
    # Runs of one supernet share the id of their pipeline. MLflow tells them apart by the name of their experiment.
    variables = {
        "DVC_EXP_NAME": "-".join(filter(None, [os.environ.get("DVC_EXP_NAME"), folder.name])),
        "DVC_ROOT": os.environ.get("DVC_ROOT") or str(root),
        # Several processes of a stage, and the workers of a race, find the scripts and the functions of the project.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
    }
    pool = Path("pool", "pool.csv")
    known = table or (str(pool) if (root / pool).exists() else None)
    beside = arms[arm].get("beside")
    with chdir(folder), environment(variables):
        yield Run(
            params["study"], root, arm, int(seed), own,
            {**(params.get("measure") or {}), **(arms[arm].get("measure") or {})},
            Path("..", "..", known) if known else None, params.get("metric") or "test_acc",
            root / RUNS / f"{beside}-{seed}" if beside else None,
        )  # fmt: skip


def take_supernet(other: str, seed: str) -> None:
    """Copy what the search of another arm with the same seed wrote into the run in the current folder."""
    source = Path("..", f"{other}-{seed}")
    shutil.rmtree(OUT / "search", ignore_errors=True)
    shutil.copytree(source / OUT / "search", OUT / "search")
    shutil.copy(source / OUT / "search.run.json", OUT)
    METRICS.mkdir(exist_ok=True)
    shutil.copy(source / METRICS / "search.json", METRICS)


def write_measured(run: Run, measured: Measured) -> None:
    """Write what a run was measured by, for the page. Numbers that are not finite are null."""
    content = {
        "arm": run.arm,
        "seed": run.seed,
        "values": {name: float(value) for name, value in measured.values.items()},
        "curves": {name: vars(curve) for name, curve in measured.curves.items()},
        "matrices": {name: vars(matrix) for name, matrix in measured.matrices.items()},
        "choices": dict(measured.choices),
    }
    text = json.dumps(_finite(content), indent=1)
    write_atomic(run.root / MEASURED / f"{run.arm}-{run.seed}.json", text + "\n")


def read_measured(path: Path) -> Measured:
    """Read what `write_measured` wrote.

    Raises:
        TangleNASError: The file is damaged.
    """
    try:
        content = strict_json.loads(path.read_text("utf-8"))
        return Measured(
            {name: value for name, value in content["values"].items() if value is not None},
            {name: Curve(**curve) for name, curve in content["curves"].items()},
            {name: Matrix(**matrix) for name, matrix in content["matrices"].items()},
            content.get("choices", {}),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TangleNASError(
            f"{path} is not what a run of a study writes ({shown(error)}): `dvc repro` mends it"
        ) from None


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not abs(content) < float("inf") else content


def _time(folder: Path) -> float | None:
    """Return the seconds of the work of a run's search and derivation, or None before they are known.

    Raises:
        TangleNASError: A stage did not log its costs.
    """
    stages = ("search", "discretize")
    if not all((folder / OUT / f"{stage}.run.json").exists() for stage in stages):
        return None
    seconds = work_seconds(folder, stages)
    if math.isnan(seconds):
        raise TangleNASError(f"{folder} has no times, as its stages ran with TANGLENAS_TRACKING=off: run it without")
    return seconds


def _clock(folder: Path) -> str:
    """Return the clock by which a run's search is measured."""
    path = folder / OUT / "search.run.json"
    costs = json.loads(path.read_text("utf-8")).get("used", {}) if path.exists() else {}
    return "processor" if clock_of(costs) else "wall"


def _stages(root: Path, bindings: Sequence[str]) -> dict[str, Any]:
    """Return the main pipeline with bindings added to each stage that takes some."""
    from ruamel.yaml import YAML

    pipeline: dict[str, Any] = YAML(typ="safe").load((root / STAGES_FILE).read_text("utf-8"))
    for binding in bindings:
        only = OF_STAGE.fullmatch(binding)
        for name, stage in pipeline["stages"].items():
            if name != "environment" and (only is None or only[1] == name):
                stage["cmd"] += f" {shlex.quote(only[2] if only else binding)}"
    return pipeline
