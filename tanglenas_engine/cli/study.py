"""`tanglenas study`: an analysis of the paper as a pipeline of its own, which ends in a page."""

from __future__ import annotations

import filecmp
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tanglenas_engine.errors import TangleNASError

from ._shipped import TEMPLATE, pipeline
from .init import DVC_FILES, check_fit

if TYPE_CHECKING:
    from tanglenas_engine.pipeline.studies.plan import Plan


@click.command(short_help="Run an analysis of the paper, which ends in a page.")
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--space", metavar="NAME", help="What to search; by default what the scale says.")
@click.option("--dataset", metavar="NAME", help="What to train on.")
@click.option("--seeds", metavar="NUMBERS", help="Such as 0,1,2; by default three, and the paper's four.")
@click.option("--arms", metavar="NAMES", help="Only these arms of the study, such as drnas,spos.")
@click.option("--seconds", type=float, metavar="N", help="Time of the longest search with its derivation, in studies "
              "by time: anytime, stages.")  # fmt: skip
@click.option("--scale", default="cpu", show_default=True, help="cpu, at most half an hour on two cores, or paper.")
@click.option("--table", type=click.Path(path_type=Path), help="Networks of known worth: "
              "a benchmark table, or a pool.")  # fmt: skip
@click.option("--metric", help="The metric of the table; test_acc by default, and test_loss of a pool that the study "
              "trains.")  # fmt: skip
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="The folder; by default study-NAME.")
@click.option("--set", "-S", "changes", metavar="KEY=VALUE", multiple=True, help="A value of the study's params.yaml, "
              "such as search.epochs=5; may be repeated.")  # fmt: skip
@click.option(
    "--bind", "bindings", metavar="BINDING", multiple=True, help="A gin binding for all runs; may be repeated."
)
@click.option("--run/--no-run", default=True, show_default=True, help="Run it, or lay it out only.")
def command(
    name: str | None,
    space: str | None,
    dataset: str | None,
    seeds: str | None,
    arms: str | None,
    seconds: float | None,
    scale: str,
    table: Path | None,
    metric: str | None,
    out: Path | None,
    changes: tuple[str, ...],
    bindings: tuple[str, ...],
    run: bool,
) -> None:
    """Lay out and run the study NAME in a folder of its own; without NAME, list the studies.

    The folder is a DVC pipeline: a stage for each arm of the study and each seed. The same command, or `dvc repro` in
    the folder, goes on where it was cut off. The last stage writes page/NAME.md with a table, a figure, the sentences
    that the data support, and the commands.
    """
    from ..pipeline import studies
    from ..pipeline.config.params import parsed
    from ..pipeline.pools import record_of
    from ..pipeline.studies import study_folder
    from ..pipeline.studies.plan import plan as planned
    from ..plugins import PluginManager

    if name is None:
        for known in studies.NAMES:
            click.echo(f"{known:12} {studies.load(known).question}")
        return
    studies.load(name)
    if table is not None and not table.is_file():
        raise TangleNASError(f"--table {table}: there is no such file. Name a benchmark table, or a pool")
    source, manager = pipeline(), PluginManager()
    typed = (
        shlex.join(["tanglenas", "study", *sys.argv[2:]]) if sys.argv[1:2] == ["study"] else f"tanglenas study {name}"
    )
    template = _nested(parsed((source / "params.yaml").read_text("utf-8")))
    plan = planned(
        name, template, command=typed, scale=scale, space=space, dataset=dataset, seeds=_numbers(seeds),
        arms=[arm.strip() for arm in arms.split(",")] if arms else None, seconds=seconds,
        table=table.name if table else None, metric=metric, changes=dict(map(_change, changes)), bindings=bindings,
    )  # fmt: skip
    check_fit(manager, *(manager.resolve(kind, plan.params[kind]) for kind in ("space", "dataset")))
    folder = out or Path(f"study-{name}")
    rules = study_folder.gitignore(plan, (TEMPLATE / "project" / "gitignore").read_text("utf-8"))
    files = {f".dvc/{file}": text for file, text in DVC_FILES.items()} | {".gitignore": rules}
    try:
        new = study_folder.lay_out(plan, folder, source, TEMPLATE / "study", files)
    except OSError as problem:
        raise TangleNASError(f"--out {folder}: {problem.strerror or problem}. Name a folder that can be made") from None
    for note in plan.notes:
        click.echo(note)
    # A pool may have grown since. Its record says how far its trainings agree.
    for file in (table, record_of(table)) if table else ():
        if file.exists() and not ((copy := folder / file.name).exists() and filecmp.cmp(file, copy, shallow=False)):
            shutil.copy(file, copy)
    count = len(plan.params["arms"]) * len(plan.params["seeds"])
    click.echo(f"{folder}: {name}, {count} runs ({', '.join(plan.params['arms'])}; seeds {plan.params['seeds']})")
    try:
        (_check_memory if run else _check_config)(folder, plan)
    except TangleNASError:
        if new:  # so that other settings can be tried in its place
            study_folder.take_back(folder)
        raise
    if not run:
        click.echo(f"\nNext:\n    cd {folder}\n    git init && git add . && git commit -m study && dvc repro")
        return
    if not new:
        click.echo("It is there already, and goes on.")
    _repro(folder)
    click.echo(f"\n{folder / 'page' / f'{name}.md'}")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise TangleNASError(f"--seeds {text}: expected whole numbers with commas, such as 0,1,2") from None


def _change(text: str) -> tuple[str, Any]:
    from ruamel.yaml.error import YAMLError

    from ..pipeline.config.params import parsed

    key, equals, value = text.partition("=")
    if not (key and equals):
        raise TangleNASError(f"-S {text}: expected KEY=VALUE, such as search.epochs=5")
    try:
        return key, parsed(f"value: {value}").get("value")
    except YAMLError:
        raise TangleNASError(f"-S {text}: {value!r} is no value of YAML, such as 5, [1, 2] or a word") from None


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a params.yaml in their groups."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        (found.setdefault(group, {}) if group else found)[name] = value
    return found


def _check_config(folder: Path, plan: Plan) -> None:
    """Read the config of a search, unless the study has none.

    Raises:
        TangleNASError: The config is wrong.
    """
    from ..pipeline.config.reader import configured
    from ..pipeline.studies.run import arguments_of
    from ..pipeline.studies.run_folder import in_run_folder

    if plan.study.needed is None:
        arm, seed = next(iter(plan.params["arms"])), plan.params["seeds"][0]
        with chdir(folder), in_run_folder(arm, str(seed)), configured(arguments_of("search")):
            pass


def _check_memory(folder: Path, plan: Plan) -> None:
    """Print what a search needs.

    Raises:
        TangleNASError: The machine has less, the table does not fit the study, or the config is wrong.
    """
    from ..pipeline.studies import memory_estimate
    from ..pipeline.studies.methods import check_table
    from ..pipeline.studies.run_folder import in_run_folder

    if plan.study.needed is not None:
        need = plan.study.needed(plan.params)
    else:
        arm, seed = next(iter(plan.params["arms"])), plan.params["seeds"][0]
        with chdir(folder), in_run_folder(arm, str(seed)) as run:
            if plan.study.with_table:
                check_table(run)
            need = memory_estimate.estimate()
    click.echo(memory_estimate.check(need))


def _repro(folder: Path) -> None:
    """Run `dvc repro` in a folder, which becomes a git repository if it is in none.

    Raises:
        TangleNASError: A stage failed.
    """
    inside = subprocess.run(["git", "rev-parse", "--git-dir"], cwd=folder, capture_output=True).returncode == 0
    if not inside:
        subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=folder)
    if done.returncode:
        raise TangleNASError(
            f"a stage of {folder} did not end well; what it said is above. Run the same command again to go on"
        )
