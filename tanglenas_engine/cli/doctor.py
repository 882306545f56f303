"""`tanglenas doctor`: what is wrong here, and what to do about each thing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click

from tanglenas_engine.errors import LINE_CHARACTERS, TangleNASError, closest, shown
from tanglenas_engine.runtime.files import holder, read_note

from ..pipeline.tracking.redaction import reason
from ..plugins import PluginManager, PluginWarning
from ._shipped import EARLIER, TEMPLATE

LIBRARIES = ("tanglenas", "torch", "torchvision", "timm", "gin-config", "dvc", "mlflow")
GIB = 2**30
LATEST_SECONDS = 32_503_680_000
"""A time, the year 3000, up to which Python has dates on every platform."""
LOW_DISK_BYTES = 2 * GIB
"""Free bytes below which a training may fail: it writes each checkpoint beside the old one."""


@dataclass(frozen=True)
class Finding:
    """The result of a check. `remedy` says what to do, and is empty where there is nothing to do or `what` says it."""

    state: str  # "ok", "note" (worth knowing) or "problem"
    what: str
    remedy: str = ""


def ok(what: str) -> Finding:
    return Finding("ok", what)


@click.command(short_help="Say what is wrong here, and what to do about it.")
@click.option(
    "--fix",
    is_flag=True,
    help="Mark dead runs as KILLED, send the MLflow store what it has missed, mend a moved project.",
)
def command(fix: bool) -> None:
    """Look at versions, plugins, the project in this folder, its MLflow runs, the disk and the devices.

    The exit status is 1 where a problem is left.
    """
    from ..pipeline.project import project_root

    root = project_root()
    sections = {
        "versions": _versions(),
        "plugins": _plugins(),
        f"project {root}": _project(root),
        "stages": _stages(root),
        "MLflow": _runs(root, fix),
        "disk": _disk(root),
        "devices": _devices(),
    }
    styles: dict[str, dict[str, Any]] = {"ok": {"fg": "green"}, "note": {"fg": "yellow"}, "problem": {"fg": "red"}}
    problems = 0
    for title, findings in sections.items():
        click.secho(title, bold=True)
        for found in _looked_at(title, findings):
            problems += found.state == "problem"
            click.echo(
                f"  {click.style(f'{found.state:8}', **styles[found.state])}{shown(found.what, LINE_CHARACTERS)}"
            )
            if found.remedy:
                click.echo(f"          -> {shown(found.remedy, LINE_CHARACTERS)}")
    if problems:
        click.echo(f"\n{problems} problem{'s' * (problems > 1)}.", err=True)
        raise SystemExit(1)


def _looked_at(title: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield what a check finds. What it stumbles over is a finding, too: the other checks go on."""
    try:
        yield from findings
    except Exception as error:
        yield Finding("problem", f"{title} cannot be looked at further ({reason(error)})")


def _versions() -> Iterator[Finding]:
    yield ok(f"Python {sys.version.split()[0]} in {sys.prefix}")
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("problem", f"{name} is not installed", "pip install tanglenas")
    yield ok(", ".join(f"{name} {version}" for name, version in found.items()))
    # dvc.yaml calls `python`, which the shell may find elsewhere.
    try:
        run = [shutil.which("python") or "", "-c", "import sys; print(sys.prefix)"]
        prefix = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        yield Finding("problem", "there is no `python` on PATH, which stages run with", _ACTIVATE)
        return
    if Path(prefix).resolve() != Path(sys.prefix).resolve():
        yield Finding("problem", f"stages run with another Python than this one: that of {prefix}", _ACTIVATE)


_ACTIVATE = f"activate the environment in which tanglenas is: source {Path(sys.prefix) / 'bin' / 'activate'}"


def _plugins() -> Iterator[Finding]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PluginWarning)
            manager = PluginManager()
    except TangleNASError as error:
        yield Finding("problem", str(error), "correct or unset TANGLENAS_PLUGINS, or unset TANGLENAS_STRICT_PLUGINS")
        return
    registered = manager.registrations()
    plugins = {it.plugin for it in registered}
    others = sorted({f"{it.distribution} {it.version}" for it in registered if it.distribution != "tanglenas"})
    yield ok(f"{len(registered)} names of {len(plugins)} plugins{', with ' * bool(others)}{', '.join(others)}")
    for fault in manager.faults:
        yield Finding("problem", f"{fault.plugin} {fault.problem}", fault.remedy)
    for conflict in dict.fromkeys(manager.conflict(it.kind, it.name) for it in registered):
        if conflict:
            yield Finding("problem", conflict)
    if manager.blocked:
        names = ", ".join(plugin.entry_point for plugin in manager.blocked)
        yield Finding("note", f"TANGLENAS_PLUGINS keeps out {names}", "unset it, or add what you need")


def _project(root: Path) -> Iterator[Finding]:
    from ..pipeline.config.params import check_params, is_study, read_params

    if not (root / "dvc.yaml").exists():
        yield Finding("note", "there is no dvc.yaml: this is no project", "tanglenas init DIR")
        return
    for folder, tool in ((".git", "git"), (".dvc", "dvc")):
        if not (root / folder).exists():
            yield Finding("problem", f"{tool} does not know this folder", f"{tool} init")
    if _has_no_commit(root):
        yield Finding(
            "problem",
            "the repository has no commit, which `dvc exp run` needs",
            'git add . && git commit -m "A new project"',
        )
    missing = [name for name in ("params.yaml", "gin", "pipelines") if not (root / name).exists()]
    if missing:
        yield Finding(
            "problem", f"{' and '.join(missing)} are missing", "restore them, or compare with `tanglenas init DIR`"
        )
    if any((root / "pipelines" / name).exists() for name in EARLIER):
        upgrade = f"tanglenas init --upgrade {shlex.quote(str(root))}"
        yield Finding("problem", "pipelines/ is of an earlier version of tanglenas", upgrade)
    if (root / "gin" / "__init__.py").exists():
        yield Finding("problem", "gin/__init__.py hides the package gin-config", "delete the file")
    ignored = root / ".dvcignore"
    if b"__pycache__" not in _content(ignored):
        yield Finding("note", "compiled files count as changes of code", "write the line __pycache__/ into .dvcignore")
    if (root / "params.yaml").exists() and not missing:
        try:
            if not is_study(read_params(root / "params.yaml")):
                check_params(root / "params.yaml", root / "dvc.yaml")
        except TangleNASError as error:
            yield Finding("problem", str(error))
            return
        yield ok("dvc.yaml, params.yaml, gin/ and pipelines/ are there")
        yield from _outputs_in_git(root)


def _has_no_commit(root: Path) -> bool:
    """Return whether a folder is in a git repository that has no commit yet."""
    return _git(root, "rev-parse", "--git-dir") is not None and (
        _git(root, "rev-parse", "--verify", "--quiet", "HEAD") is None
    )


def _outputs_in_git(root: Path) -> Iterator[Finding]:
    """Yield a problem where git tracks outputs that DVC keeps, and a note where the next `git add .` may begin to."""
    from ..pipeline.config.params import cached_outputs

    kept = _below(root, cached_outputs(read_note(root / "dvc.yaml").decode("utf-8")))
    if not kept or (files := _git(root, "ls-files", "-z", "--", *kept)) is None:
        return
    tracked = [out for out in kept if any(fnmatch(f, out) or fnmatch(f, f"{out}/*") for f in files.split("\0"))]
    if tracked:
        yield Finding(
            "problem",
            f"git tracks {', '.join(tracked)}, so that `dvc repro` refuses to run: DVC keeps them",
            f'git rm -r --quiet --cached {shlex.join(tracked)} && git commit -m "DVC keeps the outputs"',
        )
    ignored = (_git(root, "-c", "core.quotePath=false", "check-ignore", "--no-index", *kept) or "").splitlines()
    if in_danger := [out for out in kept if out not in ignored]:
        yield Finding(
            "note",
            f"git does not ignore {', '.join(in_danger)}, which DVC keeps: `git add .` may add them",
            # The empty line ends a last rule that has no end of line.
            f"printf '%s\\n' '' {shlex.join(_rules(in_danger))} >> {shlex.quote(str(root / '.gitignore'))}",
        )


def _below(root: Path, outputs: list[str]) -> list[str]:
    """Return outputs as git names them, without those outside the folder, also by a link: git refuses their paths."""
    root = root.resolve()
    places = [(root / out).parent.resolve() / Path(out).name for out in outputs]
    return [place.relative_to(root).as_posix() for place in places if place.is_relative_to(root)]


def _rules(outputs: list[str]) -> list[str]:
    """Return rules with which git ignores outputs: that of a new project, such as /out/, or else the path itself."""
    new = (TEMPLATE / "project" / "gitignore").read_text("utf-8").splitlines()
    rules = (next((rule for rule in new if f"/{out}".startswith(rule)), f"/{out}") for out in outputs)
    return list(dict.fromkeys(rules))


def _git(root: Path, *arguments: str) -> str | None:
    """Return what git prints about a folder, or None if it fails or is not installed."""
    try:
        run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.decode("utf-8", "replace") if run.returncode == 0 else None


def _content(path: Path) -> bytes:
    """Return what a small file holds, or nothing if it cannot be read."""
    try:
        return read_note(path)
    except (OSError, ValueError):
        return b""


def _saved(folder: Path) -> list[float]:
    """Return when the checkpoints in a folder were written, as far as dates reach."""
    times = [path.lstat().st_mtime for path in folder.glob("state-*")]
    return [time for time in times if 0 <= time < LATEST_SECONDS]


def _stages(root: Path) -> Iterator[Finding]:
    state = root / ".tanglenas"
    running = [(folder, by) for folder in sorted(state.glob("locks/*")) if (by := holder(folder))]
    for folder, by in running:
        process = f", as process {by.pid}{f' on {by.host}' * bool(by.host)}" if by.pid else ""
        # A number that is not known to be the stage's own may be that of a stranger.
        end = f", or end it{' there' * bool(by.host)}: kill {by.pid}" if by.pid else ""
        yield Finding(
            "note",
            f"{shown(folder.name.rpartition('-')[0])} is running{process}",
            f"wait for it{end}. Nobody else can run the stage until then",
        )
    for folder in sorted(state.glob("resume/*/")):
        if not holder(folder) and _saved(folder):
            yield _cut_off(folder, root)
    if not running:
        yield ok("nothing is running")


def _cut_off(folder: Path, root: Path) -> Finding:
    """Return whether the stage of a checkpoint can go on, and what to do about it."""
    stage = folder.name.rpartition("-")[0]
    saved = max(_saved(folder))
    finished = root / "out" / f"{stage}.run.json"  # the last thing that a stage writes
    delete = f"rm -r {shlex.quote(str(folder))}"
    if changed := _changed_since(folder, root):
        what, remedy = f"cannot go on: {changed}", f"delete it, unless you go back to that code: {delete}"
    elif finished.exists() and finished.stat().st_mtime > saved:
        what, remedy = "has run with other settings since", f"run the command that was cut off again; or {delete}"
    else:
        what, remedy = "can go on", f"run the same command again; or, if you never will, {delete}"
    when = datetime.fromtimestamp(saved)
    where = f"{folder.relative_to(root)}, {_bytes(_size(folder))}, saved {when:%Y-%m-%d %H:%M}"
    return Finding("note", f"{stage} was cut off, and {what} ({where})", remedy)


def _changed_since(folder: Path, root: Path) -> str:
    """Return which code has changed since a checkpoint was made, or "". A stage goes on with the same code only."""
    import torch

    from ..pipeline.stage import MADE_BY

    try:
        made = json.loads(read_note(folder / MADE_BY))
        changed = [name for name, version in made["code"].items() if _version_of(str(name), root) != version]
        if made["torch"] != torch.__version__:
            changed.append("torch")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError):
        return ""
    return f"{shown(' and '.join(changed))} {'have' if len(changed) > 1 else 'has'} changed" if changed else ""


def _version_of(package: str, root: Path) -> str | None:
    """Return the version of the sources of a package, or of a file of the project, without importing it."""
    from tanglenas_engine.runtime.fingerprint import code_version, file_digest

    if package.endswith(".py"):
        file = root / package
        return file_digest(file)[:16] if file.exists() else None
    sys.path.insert(0, str(root))  # as `python -m` does for a stage
    try:
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    finally:
        sys.path.remove(str(root))
    return code_version(importlib.util.module_from_spec(spec)) if spec else None


def _runs(root: Path, fix: bool) -> Iterator[Finding]:
    if os.environ.get("TANGLENAS_TRACKING", "").lower() == "off":
        yield Finding("note", "runs are not tracked: TANGLENAS_TRACKING=off", "unset it to have them in MLflow")
        return
    from ..pipeline.tracking import spool
    from ..pipeline.tracking.moved_project import mend, moved_experiments
    from ..pipeline.tracking.store import Store

    try:
        moved = moved_experiments(root) if Store.of(root).own else []
        if moved and fix:
            count = mend(root)
            yield ok(f"artifacts go into this project again; {count} run{'s' * (count != 1)} have a new address")
        elif moved:
            names = ", ".join(f"{name} in {old}" for name, old in moved)
            yield Finding(
                "problem", f"artifacts go to the place of another project ({names})", "tanglenas doctor --fix"
            )
    except TangleNASError as error:
        yield Finding("problem", str(error))
        return
    waiting = spool.spooled_runs(root)
    if fix and waiting:
        for upload in spool.upload_spool(root):
            if upload.problem:
                yield Finding("problem", f"{upload.spooled.stage} was not sent: {upload.problem}", "try again later")
            else:
                yield ok(f"{upload.spooled.stage}: sent as run {upload.run_id}")
    else:
        for spooled in waiting:
            yield Finding(
                "note",
                f"the store lacks {spooled.records} records of {spooled.stage} since {spooled.since:%Y-%m-%d %H:%M}",
                "its process sends them" if spooled.busy else "tanglenas doctor --fix",
            )
    try:
        stale = spool.stale_runs(root)
        killed = spool.mark_killed([run.run_id for run in stale], root) if fix and stale else []
    except TangleNASError as error:
        yield Finding("problem", str(error))
        return
    for run in stale:
        what = f"run {run.run_id} ({run.name}, since {run.since:%Y-%m-%d %H:%M}) is RUNNING, but its process is gone"
        if fix:
            done = "is marked KILLED" if run.run_id in killed else "goes on again, in a process of its own"
            yield ok(f"run {run.run_id} ({run.name}) {done}")
        elif run.resumable:
            yield Finding("note", what, "run the same command again to go on with it; or tanglenas doctor --fix")
        else:
            yield Finding("problem", what, "tanglenas doctor --fix marks it KILLED")
    if not stale and not waiting:
        yield ok("every run has ended, or its process lives")


def _disk(root: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(root).free
    used = {name: _size(root / name) for name in (".dvc/cache", "out", "mlartifacts", ".tanglenas", "data")}
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in used.items() if size)
    what = f"{_bytes(free)} free{'; used: ' * bool(parts)}{parts}"
    if free < LOW_DISK_BYTES:
        yield Finding("problem", what, "make room: `dvc gc --workspace` drops results that no commit has")
    else:
        yield ok(what)
    if not os.access(root, os.W_OK):
        yield Finding("problem", f"{root} cannot be written to", "change its permissions, or work in a copy")


def _size(folder: Path) -> int:
    files = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in files if path.is_file() and not path.is_symlink())


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"


def _devices() -> Iterator[Finding]:
    import torch

    names = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        names[f"cuda:{i}"] = f"{properties.name}, {_bytes(properties.total_memory)}"
    if torch.backends.mps.is_available():
        names["mps"] = "Apple's GPU"
    yield ok("; ".join(f"{device} ({described})" for device, described in names.items()))
    wanted = os.environ.get("TANGLENAS_DEVICE")
    if wanted:
        known = {*names, *(name.partition(":")[0] for name in names)}
        if wanted in known:
            yield ok(f"TANGLENAS_DEVICE={wanted}")
        else:
            remedy = f"unset it, or set one of: {', '.join(names)}.{closest(wanted, known)}"
            yield Finding("problem", f"TANGLENAS_DEVICE={wanted} is not here", remedy)
    elif torch.version.cuda and not torch.cuda.is_available():
        yield ok(f"torch is built for CUDA {torch.version.cuda} and finds no GPU: stages run on the CPU")
