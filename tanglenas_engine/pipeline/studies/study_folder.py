"""The folder of a study: its params.yaml, its dvc.yaml, and what a project has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config.params import cached_outputs
from tanglenas_engine.pipeline.studies.plan import Plan
from tanglenas_engine.pipeline.studies.study import Stage
from tanglenas_engine.pipeline.studies.yaml_text import yaml_text

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
RUN_FOLDERS = ("/runs/*/out/", "/runs/*/gin/", "/runs/*/params.yaml", "/runs/*/dvc.yaml")
"""The rules for git about the folder of a run, whose metrics/ it keeps."""


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
            "cmd": "python -m pipelines.pool ${measure.pool} ${measure.budget} ${measure.pool_seeds}",
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
    known = [*_table(plan), *(["pool"] if "pool" in stages else [])]
    alone = [arm for arm in arms if not study.arms[arm].beside]
    stages["measure"] = {
        "desc": "Measure the run",
        "matrix": {"arm": alone if len(alone) < len(arms) else everyone, "seed": "${seeds}"},
        **_measure("${item.arm}", plan, known),
    }
    for arm in arms:
        if other := study.arms[arm].beside:
            stages[f"measure-of-{arm}"] = {
                "desc": f"Measure the run, and compare it with that of {other}",
                "matrix": {"seed": "${seeds}"},
                **_measure(arm, plan, known, other),
            }
    stages["page"] = {
        "desc": "Compare the runs on a page",
        "cmd": "python -m pipelines.page",
        "params": ["study", "scale", "seeds", "arms", *SHARED],
        "deps": ["environment.json", "measured", "pipelines/page.py"],
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
    if stage == "discretize":  # which may be a race
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


def _measure(arm: str, plan: Plan, known: Sequence[str], beside: str = "") -> dict[str, Any]:
    """Return the rest of a stage that measures a run.

    Args:
        arm: The name of the arm, or how DVC fills it in.
        known: The files with networks of known worth.
        beside: The arm whose run of the same seed is read, too, or "".
    """
    stages = plan.study.stages_of(plan.params)
    files = [f"out/{output}" for stage in stages for output in OUTPUTS[stage]]
    files += [path for stage in stages for path in (f"out/{stage}.run.json", f"metrics/{stage}.json")]
    folders = [f"runs/{one}-${{item.seed}}" for one in (arm, beside) if one]
    return {
        "cmd": f"python -m pipelines.measure {arm} ${{item.seed}}",
        "params": [*SHARED, "measure", f"arms.{arm}", *(group for stage in stages for group in PARAMS[stage])],
        "deps": [
            "environment.json", *(f"{folder}/{path}" for folder in folders for path in files), *known,
            "pipelines/measure.py",
        ],
        "outs": [{f"measured/{arm}-${{item.seed}}.json": {"cache": False}}],
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


def gitignore(plan: Plan, project: str) -> str:
    """Return the rules for git of a study: those of a project, and for what the study computes.

    Args:
        project: The .gitignore of a project.
    """
    computed = [f"/{out}" for out in cached_outputs(dvc_yaml(plan)) if not out.startswith("runs/")]
    return project + "\n".join([*computed, *RUN_FOLDERS, ""])


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
to `params.yaml`, then `dvc repro`. Other sizes, once all is committed: `dvc exp run --queue -S search.epochs=20`.
Compare the runs that were evaluated, by any setting: `tanglenas compare`.
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

    from tanglenas_engine.pipeline.config.params import parsed

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


def take_back(folder: Path) -> None:
    """Delete what `lay_out` wrote into a folder, and the folder unless it is a git repository."""
    import shutil

    for entry in folder.iterdir():
        if entry.is_dir() and entry.name != ".git":
            shutil.rmtree(entry)
        elif entry.name != ".git":
            entry.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
