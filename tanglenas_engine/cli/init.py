"""`tanglenas init`: a project of one's own, from the pipeline that comes with this version."""

import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from tanglenas_engine.errors import TangleNASError

from ..plugins import PluginManager, Registration
from ..plugins.manager import options_of
from ._shipped import TEMPLATE, pipeline


@click.command(short_help="Start a project of your own.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--space", metavar="NAME", help="What to search; `tanglenas plugins` lists the names.")
@click.option("--dataset", metavar="NAME", help="What to train on.")
@click.option("--optimizer", metavar="NAME", help="How to search.")
def command(folder: Path, **named: str | None) -> None:
    """Lay out a project in DIR, a new or an empty folder: dvc.yaml, params.yaml, gin/ and pipelines/.

    Nothing in it depends on this command afterwards: every file is yours to change.
    """
    if folder.exists() and (not folder.is_dir() or any(entry.name != ".git" for entry in folder.iterdir())):
        raise TangleNASError(f"{folder} is not an empty folder. Name one that is, or one that does not exist yet")
    source = pipeline()
    params = (source / "params.yaml").read_text()
    manager = PluginManager()
    chosen = {}
    for kind in ("space", "dataset", "optimizer"):
        key = re.compile(rf"^{kind}: (.+)$", re.MULTILINE)
        chosen[kind] = manager.resolve(kind, named[kind] or key.findall(params)[0])
        params = key.sub(f"{kind}: {chosen[kind].name}", params)
    _check_fit(manager, chosen["space"], chosen["dataset"])

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("gin", "pipelines"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".dvcignore", "dvc.yaml"):
        shutil.copy(source / name, folder)
    (folder / "params.yaml").write_text(params)
    shutil.copy(TEMPLATE / "project" / "gitignore", folder / ".gitignore")
    shutil.copy(TEMPLATE / "project" / "README.md", folder)

    click.echo(f"{folder}: {', '.join(f'{kind} {it.name}' for kind, it in chosen.items())}.")
    data = folder / "gin" / "datasets" / f"{chosen['dataset'].name}.gin"
    if data.exists():
        click.echo(f"{data} says where the data are and how they are prepared.")
    click.echo(f"\nNext:\n    cd {folder}\n    git init && dvc init && dvc repro")


def _check_fit(manager: PluginManager, space: Registration, dataset: Registration) -> None:
    """Raise a TangleNASError for a space that lacks an option by which the data fit it; the data need not be there."""
    needed = _fitted_options(dataset.load())
    if not _takes(space, needed):
        spaces = [it.name for it in manager.registrations("space") if _takes(it, needed)]
        datasets = [it.name for it in manager.registrations("dataset") if _takes(space, _fitted_options(it.load()))]
        raise TangleNASError(
            f"the space {space.name!r} is not for data such as {dataset.name!r}, which need a space with "
            f"{', '.join(sorted(needed))}. For these data there are: --space {' or '.join(spaces) or '(none)'}; "
            f"for this space: --dataset {' or '.join(datasets) or '(none)'}"
        )


def _takes(space: Registration, needed: set[str]) -> bool:
    try:
        known, _ = options_of(space.load())
    except TangleNASError:  # it cannot be imported
        return False
    return known is None or needed <= known


class _Anything:
    """Stands for a dataset whose files nobody looks for."""

    def __getattr__(self, name: str) -> Any:
        return None


def _fitted_options(dataset: Any) -> set[str]:
    """The names in a dataset's `space_options`; none where they cannot be told without the data."""
    with suppress(Exception):
        return set(dataset.space_options(_Anything()))
    return set()
