"""Lays out the folder of a study: its params.yaml, its dvc.yaml, and what a project has."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tanglenas_engine.errors import TangleNASError, closest, unknown
from tanglenas_engine.pipeline.studies import load
from tanglenas_engine.pipeline.studies.runs import GROUPS
from tanglenas_engine.pipeline.studies.study import SCALES, Arm, Scale, Stage, Study
from tanglenas_engine.pipeline.studies.text import yaml_text

PAPER = {
    "toy_cell": "paper/toy_cell", "toy_conv_macro": "paper/toy_conv_macro", "nb201": "paper/nb201",
    "darts": "paper/darts", "autoformer_t": "paper/autoformer", "autoformer_s": "paper/autoformer",
    "autoformer_b": "paper/autoformer", "mobilenetv3": "paper/mobilenetv3", "gpt": "paper/gpt_tinystories",
}  # fmt: skip
"""The recipes of the paper by space."""
PAPER_DATASETS = {
    "toy_cell": "fashion_mnist", "toy_conv_macro": "cifar10", "nb201": "cifar10", "darts": "cifar10",
    "mobilenetv3": "imagenet", "gpt": "text",
}  # fmt: skip
"""The dataset of the paper by space; the others have CIFAR-10."""
PAPER_EPOCHS = {
    "toy_cell": {"darts": 50, "drnas": 100, "gdas": 250, "spos": 250},
    "toy_conv_macro": {"darts": 50, "drnas": 100, "gdas": 250, "spos": 250},
    "nb201": {"darts": 50, "drnas": 100, "gdas": 250, "spos": 250},
    "darts": {"darts": 50, "drnas": 50, "gdas": 250, "spos": 250},
}
"""The epochs of a search that the paper gives a method on a space."""
OUTPUTS = {
    "search": ("search",),
    "discretize": ("discretize",),
    "retrain": ("retrain/model",),
    "evaluate": ("evaluate",),
}
INPUTS: dict[str, tuple[str, ...]] = {
    "search": (),
    "discretize": ("search/mixture.safetensors", "search/splits.json", "search/supernet.safetensors"),
    "retrain": ("discretize/architecture.json", "search/splits.json", "search/supernet.safetensors"),
    "evaluate": (
        "discretize/architecture.json", "retrain/model", "search/splits.json", "search/supernet.safetensors",
    ),
}  # fmt: skip
"""The files below out/ that a stage of the main pipeline starts from."""
PARAMS: dict[str, tuple[str, ...]] = {
    "search": ("search",), "discretize": ("discretize",), "retrain": ("retrain",), "evaluate": (),
}  # fmt: skip
"""The groups of params.yaml that a stage depends on. Discretize can train by the recipe of retrain."""
SHARED = ("space", "dataset", "recipe", "table", "metric", "bindings")
RUN = "runs/${item.arm}-${item.seed}"


@dataclass(frozen=True)
class Plan:
    """A study with its settings.

    Attributes:
        name: The name of the study.
        params: The content of params.yaml.
    """

    name: str
    params: Mapping[str, Any]

    @property
    def study(self) -> Study:
        return load(self.name)


def plan(
    name: str,
    template: Mapping[str, Any],
    *,
    command: str,
    scale: str = "cpu",
    space: str | None = None,
    dataset: str | None = None,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    table: str | None = None,
    metric: str = "test_acc",
    changes: Mapping[str, Any] | None = None,
    bindings: Sequence[str] = (),
) -> Plan:
    """Return the settings of a study at a scale.

    Args:
        name: The name of the study.
        template: The values of the params.yaml that the package ships.
        command: The command that a person typed.
        scale: One of SCALES.
        space, dataset: Names of plugins; None takes those of the scale.
        seeds: The seeds; None takes those of the scale.
        arms: Names of arms; None takes all. One whose supernet another arm trains brings that arm.
        table: A file with networks of known worth, below the folder of the study.
        metric: The metric of the table.
        changes: Values by their names in the study's params.yaml, such as `search.epochs`.
        bindings: gin bindings for all runs.

    Raises:
        TangleNASError: A name is unknown, the scale does not fit the space, or a seed is there twice.
    """
    study = load(name)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    sizes = study.scales[scale]
    params: dict[str, Any] = {
        "study": name, "command": command, "scale": scale,
        "space": space or sizes.params.get("space") or ("toy_cell" if scale == "paper" else template["space"]),
        "dataset": "", "recipe": "cpu",
    }  # fmt: skip
    params["dataset"] = dataset or sizes.params.get("dataset") or template["dataset"]
    if scale == "paper":
        if params["space"] not in PAPER:
            raise TangleNASError(
                f"--scale paper has no recipe for the space {params['space']!r}. The paper's spaces are "
                f"{', '.join(PAPER)}; for another one, use --scale cpu and change its sizes in params.yaml"
            )
        params["recipe"] = PAPER[params["space"]]
        params["dataset"] = dataset or PAPER_DATASETS.get(params["space"], "cifar10")
    params["seeds"] = _seeds(seeds if seeds is not None else sizes.seeds)
    params |= {"table": table, "metric": metric, "bindings": [*sizes.bindings, *bindings]}
    for group in GROUPS:
        params[group] = {**template[group], **sizes.params.get(group, {})}
    params["measure"] = dict(sizes.params.get("measure", {}))
    chosen = _chosen(study, arms, sizes.without)
    params["arms"] = {arm: _arm(arm, study.arms[arm], sizes, params, scale) for arm in chosen}
    for key, value in (changes or {}).items():
        _change(params, key, value)
    return Plan(name, params)


def _chosen(study: Study, arms: Sequence[str] | None, without: Sequence[str]) -> list[str]:
    """Return the names of the arms that were asked for, in the order of the study, and of those that they need.

    Raises:
        TangleNASError: There is no such arm.
    """
    if arms is None:
        return [arm for arm in study.arms if arm not in without]
    for arm in arms:
        if arm not in study.arms:
            raise unknown("arm of the study", arm, study.arms)
    wanted = {*arms}
    for _ in study.arms:
        wanted |= {
            needed for arm in wanted for needed in (study.arms[arm].supernet, study.arms[arm].as_long_as) if needed
        }
    return [arm for arm in study.arms if arm in wanted]


def _seeds(seeds: Sequence[int]) -> list[int]:
    if not seeds:
        raise TangleNASError("--seeds is empty, expected numbers such as 0,1,2")
    if len(set(seeds)) < len(seeds):
        raise TangleNASError(f"--seeds has a number twice: {', '.join(map(str, seeds))}")
    if bad := [seed for seed in seeds if not 0 <= seed < 2**63]:
        raise TangleNASError(f"--seeds has {bad[0]}, expected whole numbers from 0 to 2**63 - 1")
    return list(seeds)


def _arm(name: str, arm: Arm, sizes: Scale, params: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """Return the values of an arm: all groups, though they may be empty, as DVC tracks each by itself."""
    own: dict[str, Any] = {"optimizer": "drnas", **copy.deepcopy(dict(arm.params))}
    for group in GROUPS:
        own[group] = dict(own.get(group, {}))
    epochs = PAPER_EPOCHS.get(params["space"], {}).get(own["optimizer"]) if scale == "paper" else None
    if epochs is not None and params["search"].get("seconds") is None:
        own["search"].setdefault("epochs", epochs)
    for group, values in sizes.arms.get(name, {}).items():
        own[group] = {**own[group], **values} if isinstance(values, Mapping) else values
    if arm.as_long_as:
        own["as_long_as"] = arm.as_long_as
    own["bindings"] = [*arm.bindings, *sizes.arms.get(name, {}).get("bindings", ())]
    return own


def _change(params: dict[str, Any], key: str, value: Any) -> None:
    """Change a value by its dotted name.

    Raises:
        TangleNASError: There is no such value.
    """
    *path, last = key.split(".")
    group: Any = params
    for name in path:
        group = group.get(name) if isinstance(group, dict) else None
    known = isinstance(group, dict) and (last in group or path[:1] == ["measure"] or path[:1] == ["arms"])
    if not known:
        names = [f"{outer}.{inner}" for outer in (*GROUPS, "measure") for inner in params[outer]]
        raise TangleNASError(f"-S {key}: a study has no such value.{closest(key, names)} Look at its params.yaml")
    group[last] = value


def dvc_yaml(plan: Plan) -> str:
    """Return the pipeline of a study: a stage for each of its parts, with an arm and a seed each."""
    study, arms = plan.study, list(plan.params["arms"])
    used_stages = study.stages_of(plan.params)
    owners = [arm for arm in arms if not (study.arms[arm].supernet or study.arms[arm].as_long_as)]
    optimizers = ",".join(sorted({plan.params["arms"][arm]["optimizer"] for arm in arms}))
    stages: dict[str, Any] = {
        "environment": {
            "desc": "Write down the code and the versions that results depend on",
            "cmd": f"python -m pipelines.environment '${{space}}' '{optimizers}' '${{dataset}}' '${{search.weights}}'",
            "always_changed": True,
            "deps": ["pipelines/environment.py"],
            "outs": [{"environment.json": {"cache": False}}],
        }
    }
    if study.table == "pool" and not plan.params["table"]:
        stages["pool"] = {
            "desc": "Train random networks, which say what an architecture is worth",
            "cmd": "python -m pipelines.pool ${measure.pool} ${measure.budget}",
            "params": [*SHARED, "retrain"],
            "deps": ["environment.json", *_gin("retrain"), "pipelines/pool.py"],
            "outs": ["pool"],
        }
    everyone = "${arms}" if len(owners) == len(arms) else arms
    for stage in used_stages:
        searches = stage == "search"
        stages[stage] = {
            "desc": DESCRIPTIONS[stage],
            "matrix": {
                "arm": "${arms}" if len(owners) == len(arms) else owners if searches else arms,
                "seed": "${seeds}",
            },
            **_stage(stage, plan, "${item.arm}"),
        }
        if searches:
            for arm in arms:
                if study.arms[arm].supernet:
                    stages[f"search-of-{arm}"] = _taken(arm, study.arms[arm].supernet)
                elif study.arms[arm].as_long_as:
                    stages[f"search-of-{arm}"] = _as_long(arm, study.arms[arm].as_long_as, plan)
    used = [f"{RUN}/out/{output}" for stage in used_stages for output in OUTPUTS[stage]]
    used += [f"{RUN}/{path}" for stage in used_stages for path in (f"out/{stage}.run.json", f"metrics/{stage}.json")]
    stages["measure"] = {
        "desc": "Measure the run",
        "matrix": {"arm": everyone, "seed": "${seeds}"},
        "cmd": "python -m pipelines.measure ${item.arm} ${item.seed}",
        "params": [*SHARED, "measure", "arms.${item.arm}", *(group for s in used_stages for group in PARAMS[s])],
        "deps": [
            "environment.json", *used, *_table(plan), *(["pool"] if "pool" in stages else []), "pipelines/measure.py",
        ],
        "outs": [{"measured/${item.arm}-${item.seed}.json": {"cache": False}}],
    }  # fmt: skip
    stages["page"] = {
        "desc": "Compare the runs on a page",
        "cmd": "python -m pipelines.page",
        "params": ["study", "scale", "seeds", "arms", *SHARED],
        "deps": ["measured", "pipelines/page.py"],
        "outs": ["page"],
    }
    note = (
        f"# The study `{plan.name}`: an arm of params.yaml with a seed is a run, which goes through these stages.\n"
        "# pipelines/stages.yaml has the commands of the main pipeline, with which pipelines/run.py runs them.\n"
    )
    return note + yaml_text({"vars": ["params.yaml"], "stages": stages})


DESCRIPTIONS: dict[Stage, str] = {
    "search": "Train the supernet and its architecture parameters",
    "discretize": "Derive one architecture",
    "retrain": "Give the architecture found its final weights",
    "evaluate": "Judge the final network on the test split",
}


def _stage(stage: Stage, plan: Plan, arm: str) -> dict[str, Any]:
    params = [*SHARED, *PARAMS[stage], "arms.${item.arm}.optimizer", "arms.${item.arm}.bindings"]
    params += [f"arms.${{item.arm}}.{group}" for group in PARAMS[stage]]
    gin = _gin(stage)
    races = any((own["discretize"].get("method") == "race") for own in plan.params["arms"].values())
    if stage == "discretize" and races:
        params += ["retrain", "arms.${item.arm}.retrain"]
        gin += _gin("retrain")[:2]
    return {
        "cmd": f"python -m pipelines.run {arm} ${{item.seed}} {stage}",
        "params": params,
        "deps": [
            "environment.json", *dict.fromkeys(gin), *(f"{RUN}/out/{path}" for path in INPUTS[stage]),
            *(_table(plan) if stage in ("search", "evaluate") else ()),
            "pipelines/run.py", "pipelines/stages.yaml", f"pipelines/{stage}.py",
        ],
        "outs": [f"{RUN}/out/{stage}", f"{RUN}/out/{stage}.run.json"],
        "metrics": [{f"{RUN}/metrics/{stage}.json": {"cache": False}}],
    }  # fmt: skip


def _taken(arm: str, other: str) -> dict[str, Any]:
    """Return the stage that gives an arm the supernet of another one."""
    theirs, own = (f"runs/{one}-${{item.seed}}" for one in (other, arm))
    return {
        "desc": f"Take the supernet of {other}",
        "matrix": {"seed": "${seeds}"},
        "cmd": f"python -m pipelines.run {arm} ${{item.seed}} search {other}",
        "deps": [f"{theirs}/out/search", f"{theirs}/out/search.run.json", f"{theirs}/metrics/search.json",
                 "pipelines/run.py"],
        "outs": [f"{own}/out/search", f"{own}/out/search.run.json"],
        "metrics": [{f"{own}/metrics/search.json": {"cache": False}}],
    }  # fmt: skip


def _as_long(arm: str, other: str, plan: Plan) -> dict[str, Any]:
    """Return the stage of a search that takes as long as the search and the derivation of another arm did."""
    stage = _stage("search", plan, arm)
    text = {
        name: [str(part).replace("${item.arm}", arm) for part in stage[name]] for name in ("params", "deps", "outs")
    }
    times = [f"runs/{other}-${{item.seed}}/out/{name}.run.json" for name in ("search", "discretize")]
    return {
        "desc": f"Train the supernet for as long as {other} took",
        "matrix": {"seed": "${seeds}"},
        "cmd": f"python -m pipelines.run {arm} ${{item.seed}} search",
        **text,
        "deps": [*text["deps"], *times],
        "metrics": [{f"runs/{arm}-${{item.seed}}/metrics/search.json": {"cache": False}}],
    }


def _gin(stage: str) -> list[str]:
    files = [f"gin/${{recipe}}/{stage}.gin", f"gin/stages/{stage}.gin"]
    return [*files, "gin/spaces", "gin/datasets", *(["gin/optimizers"] if stage == "search" else [])]


def _table(plan: Plan) -> list[str]:
    return [plan.params["table"]] if plan.params["table"] else []


def params_yaml(plan: Plan) -> str:
    """Return the params.yaml of a study."""
    note = (
        f"# {plan.study.question}\n"
        "# `arms` has what each arm changes. The rest is the same for all. Where a value is null, the recipe decides.\n"
    )
    return note + yaml_text(plan.params)


def readme(plan: Plan) -> str:
    """Return the README of a study's folder."""
    study = plan.study
    return f"""# The study `{plan.name}`

{study.question}

    {plan.params["command"]}

wrote this folder. `dvc repro` runs what is missing, and goes on where it was cut off. The result is
`page/{plan.name}.md`.

| file | what |
| --- | --- |
| `params.yaml` | the arms, the seeds and the sizes |
| `dvc.yaml` | the stages, each with an arm and a seed |
| `gin/` | the recipes, as in any project |
| `pipelines/` | a script for each stage |
| `runs/ARM-SEED/` | a run: a project of its own, with `out/` and `metrics/` |
| `measured/` | what each run was measured by |
| `page/` | the page with its table and figure |

One run by itself: `dvc repro measure@{next(iter(plan.params["arms"]))}-{plan.params["seeds"][0]}`. More seeds: add them
to `params.yaml`, and `dvc repro`. Other sizes, once all is committed: `dvc exp run --queue -S search.epochs=20`. Compare
the runs that were evaluated, by any setting: `tanglenas compare`.
"""


def lay_out(plan: Plan, folder: Path, source: Path, template: Path, files: Mapping[str, str]) -> bool:
    """Write the folder of a study, unless it holds the same study already.

    Args:
        plan: The study.
        folder: The folder to write.
        source: The folder of the shipped project.
        template: The folder of the scripts of a study.
        files: Further files by their paths, such as `.gitignore`.

    Returns:
        False if the folder has the same study.

    Raises:
        TangleNASError: The folder has something else.
    """
    import shutil

    from tanglenas_engine.pipeline.params import parsed

    if folder.exists() and (not folder.is_dir() or any(entry.name != ".git" for entry in folder.iterdir())):
        try:
            there = parsed((folder / "params.yaml").read_text("utf-8"))
        except Exception:  # a file of somebody else, or none
            there = {}
        if "study" not in there:
            raise TangleNASError(f"{folder} is not an empty folder: name another with --out")
        if {**there, "command": ""} != {**parsed(yaml_text(plan.params)), "command": ""}:
            raise TangleNASError(
                f"{folder} holds the study {there['study']!r} with other settings. Run `dvc repro` there to go on with "
                "it, or name another folder with --out"
            )
        return False
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("gin", "pipelines"):
        shutil.copytree(source / name, folder / name, ignore=ignored)
    for script in sorted(template.glob("*.py")):
        shutil.copy(script, folder / "pipelines")
    shutil.copy(source / "dvc.yaml", folder / "pipelines" / "stages.yaml")
    written = {
        **files, "params.yaml": params_yaml(plan), "dvc.yaml": dvc_yaml(plan), "README.md": readme(plan),
        ".dvcignore": "__pycache__/\n*.pyc\n/runs/*/dvc.yaml\n",
    }  # fmt: skip
    for name, text in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return True
