"""`tanglenas init`: a project of one's own, from the pipeline that comes with this version."""

import re
import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from tanglenas_engine.errors import LINE_CHARACTERS, TangleNASError, shown

from ..plugins import PluginManager, Registration
from ..plugins.manager import options_of
from ._shipped import EARLIER, TEMPLATE, pipeline

DVC_FILES = {
    "config": "[core]\n    analytics = false\n    check_update = false\n",
    ".gitignore": "/config.local\n/tmp\n/cache\n",
}
"""What `dvc init` would write into `.dvc`, with a configuration that tells nobody about the use of DVC."""
START = 'git init && git add . && git commit -m "A new project"'
"""The commands that make a folder a repository. `dvc exp run` needs a commit to go out from."""


@click.command(short_help="Start a project of your own.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--space", metavar="NAME", help="What to search; `tanglenas plugins` lists the names.")
@click.option("--dataset", metavar="NAME", help="What to train on.")
@click.option("--optimizer", metavar="NAME", help="How to search.")
@click.option("--upgrade", is_flag=True, help="Replace the scripts and dvc.yaml of the project in DIR by today's.")
def command(folder: Path, upgrade: bool, **named: str | None) -> None:
    """Lay out a project in DIR, a new or an empty folder: dvc.yaml, params.yaml, gin/, pipelines/ and .dvc/.

    Every file is yours to change. What the scripts in pipelines/ call comes with the package, and is upgraded with it.

    With --upgrade, a project of an earlier version gets the scripts and the dvc.yaml of this one. gin/, params.yaml,
    .gitignore and .dvcignore stay as they are, but for files, keys and rules that are new. What is replaced is kept
    under .tanglenas/replaced.
    """
    if upgrade:
        if any(named.values()):
            raise TangleNASError("--upgrade leaves params.yaml as it is: set the space, dataset and optimizer there")
        _upgrade(folder)
        return
    if folder.exists() and (not folder.is_dir() or any(entry.name != ".git" for entry in folder.iterdir())):
        is_project = (folder / "dvc.yaml").exists() and (folder / "pipelines").is_dir() and not _is_study(folder)
        advice = f". To bring the project in it up to this version: tanglenas init --upgrade {folder}" * is_project
        raise TangleNASError(
            f"{folder} is not an empty folder. Name one that is, or one that does not exist yet{advice}"
        )
    source = pipeline()
    params = (source / "params.yaml").read_text("utf-8")
    manager = PluginManager()
    chosen = {}
    for kind in ("space", "dataset", "optimizer"):
        key = re.compile(rf"^{kind}: (.+)$", re.MULTILINE)
        chosen[kind] = manager.resolve(kind, named[kind] or key.findall(params)[0])
        params = key.sub(f"{kind}: {chosen[kind].name}", params)
    check_fit(manager, chosen["space"], chosen["dataset"])

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("gin", "pipelines"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".dvcignore", "dvc.yaml"):
        shutil.copy(source / name, folder)
    for name, text in DVC_FILES.items():
        (folder / ".dvc").mkdir(exist_ok=True)
        (folder / ".dvc" / name).write_text(text, "utf-8")
    (folder / "params.yaml").write_text(params, "utf-8")
    shutil.copy(TEMPLATE / "project" / "gitignore", folder / ".gitignore")
    shutil.copy(TEMPLATE / "project" / "README.md", folder)

    click.echo(f"{folder}: {', '.join(f'{kind} {it.name}' for kind, it in chosen.items())}.")
    data = folder / "gin" / "datasets" / f"{chosen['dataset'].name}.gin"
    if data.exists():
        click.echo(f"{data} says where the data are and how they are prepared.")
    click.echo(f"\nNext:\n    cd {folder}\n    {START} && dvc repro")


def _upgrade(folder: Path) -> None:
    """Replace the scripts and dvc.yaml of a project, keep what was there, and add files, keys and rules it lacks."""
    from ..pipeline.config.params import is_study, read_params

    scripts = folder / "pipelines"
    if not ((folder / "dvc.yaml").is_file() and scripts.is_dir()):
        raise TangleNASError(f"{folder} has no dvc.yaml and pipelines/ to upgrade: lay out a project with `init` alone")
    params = read_params(folder / "params.yaml")
    if is_study(params):
        raise TangleNASError(
            f"{folder} is a study, which has a dvc.yaml of its own. For a study of this version, run its command with "
            f"another --out: {shown(params.get('command'), LINE_CHARACTERS)}"
        )
    source = pipeline()
    # Lines that cannot be added are refused before anything is replaced.
    text, keys = _with_keys(_text(folder / "params.yaml"), _text(source / "params.yaml"))
    today = {Path("dvc.yaml"), *(path.relative_to(source) for path in (source / "pipelines").glob("*.py"))}
    differing = [path for path in sorted(today) if not _same(source / path, folder / path)]
    replaced = [path for path in differing if (folder / path).exists()]
    outdated = [path.relative_to(folder) for name in EARLIER if (path := scripts / name).exists()]
    kept = folder / ".tanglenas" / "replaced" / f"{datetime.now():%Y%m%d-%H%M%S}"
    for path in (*replaced, *outdated):
        (kept / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / path, kept / path)
    if keys:
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "params.yaml", kept)
        (folder / "params.yaml").write_bytes(text.encode("utf-8"))
    recipes = [path.relative_to(source) for path in sorted((source / "gin").rglob("*.gin"))]
    added = [path for path in (*differing, *recipes) if not (folder / path).exists() and path not in replaced]
    for path in (*replaced, *added):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, folder / path)
    ignored = {
        ".gitignore": _add_rules(folder / ".gitignore", TEMPLATE / "project" / "gitignore"),
        ".dvcignore": _add_rules(folder / ".dvcignore", source / ".dvcignore"),
    }
    for verb, paths in (("replaced", replaced), ("removed", outdated), ("added", added)):
        if paths:
            click.echo(f"{verb}: {', '.join(path.as_posix() for path in paths)}")
    for file, lines in (("params.yaml", keys), *ignored.items()):
        if lines:
            click.echo(f"added to {file}: {', '.join(lines)}")
    if kept.exists():
        click.echo(f"What was there is in {kept}.")
    if not (replaced or outdated or added or keys or any(ignored.values())):
        click.echo(f"{folder} is of this version already.")


def _is_study(folder: Path) -> bool:
    from ..pipeline.config.params import is_study, read_params

    with suppress(TangleNASError):
        return is_study(read_params(folder / "params.yaml"))
    return False


def _with_keys(theirs: str, ours: str) -> tuple[str, list[str]]:
    """Return a params.yaml whose groups have all keys of ours, and the names of those that it lacked.

    Today's dvc.yaml needs them. Our lines, with their comments, follow the last line of a group. All other lines stay
    as a person wrote them.

    Raises:
        TangleNASError: A group has another form than a key and a value in every line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap
    from ruamel.yaml.error import YAMLError

    yaml, plain = YAML(), YAML(typ="safe")
    params, expected = yaml.load(theirs), plain.load(theirs)
    end = "\r" if "\r\n" in theirs else ""
    whole = theirs if theirs.endswith("\n") else f"{theirs}{end}\n"
    lines, source = whole.split("\n"), ours.split("\n")
    after: dict[int, list[str]] = {}
    added = []
    for name, values in yaml.load(ours).items():
        group: Any = params.get(name) if isinstance(params, dict) else None
        if not (isinstance(values, CommentedMap) and isinstance(group, CommentedMap)):
            continue
        lacking = [key for key in values if key not in group]
        indent = min((place[1] for place in (group.lc.data or {}).values()), default=0) * " "
        last = first = params.lc.key(name)[0]
        for number in range(first + 1, len(lines)):
            if lines[number].strip() and not lines[number].startswith((" ", "#")):
                break
            last = number if lines[number].startswith(" ") and lines[number].strip() else last
        after[last] = [f"{indent}{source[values.lc.key(key)[0]].strip()}{end}" for key in lacking]
        added += [f"{name}.{key}" for key in lacking]
        expected[name] |= {key: values[key] for key in lacking}
    if not added:
        return theirs, []
    text = "\n".join(line for number, own in enumerate(lines) for line in (own, *after.get(number, ())))
    text = text if whole == theirs else text.removesuffix(f"{end}\n")
    try:
        fits = plain.load(text) == expected
    except YAMLError:
        fits = False
    if not fits:
        raise TangleNASError(
            f"params.yaml lacks {', '.join(added)}, which today's dvc.yaml needs, and the lines cannot be added where "
            "a group is not written with a key and a value in every line. Write it so, and run this again"
        )
    return text, added


def _add_rules(theirs: Path, ours: Path) -> list[str]:
    """Add to a file of a project the rules that it lacks. One that a person wrote otherwise or put out stays so."""
    text = theirs.read_text("utf-8", "surrogateescape") if theirs.exists() else ""
    there = {line.strip("# /") for line in text.splitlines()}
    rules = [line for line in ours.read_text("utf-8").splitlines() if not line.startswith("#")]
    if lacking := [rule for rule in rules if rule.strip("/") not in there]:
        start = text if text.endswith("\n") or not text else text + "\n"
        theirs.write_text(start + "\n".join(lacking) + "\n", "utf-8", "surrogateescape")
    return lacking


def _same(ours: Path, theirs: Path) -> bool:
    return theirs.is_file() and theirs.read_bytes() == ours.read_bytes()


def _text(path: Path) -> str:
    """Return a text with the ends of lines that it has."""
    return path.read_bytes().decode("utf-8")


def check_fit(manager: PluginManager, space: Registration, dataset: Registration) -> None:
    """Raise a TangleNASError for a space that lacks an option which the data need. The data may be missing."""
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
    except TangleNASError:  # the space cannot be imported
        return False
    return known is None or needed <= known


class _Anything:
    """A stand-in for a dataset: `space_options` may look at any attribute, and no file is opened."""

    def __getattr__(self, name: str) -> Any:
        return None


def _fitted_options(dataset: Any) -> set[str]:
    """Return the names in a dataset's `space_options`, or the empty set where they depend on its files."""
    with suppress(Exception):
        return set(dataset.space_options(_Anything()))
    return set()
