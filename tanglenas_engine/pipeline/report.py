"""One page about a project: the last run in full, and every run that MLflow knows, compared."""

from __future__ import annotations

import ast
import base64
import io
import json
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tanglenas_engine.errors import TangleNASError, shown
from tanglenas_engine.pipeline import finished_runs
from tanglenas_engine.pipeline.comparison.figure import plain
from tanglenas_engine.pipeline.comparison.groups import compare_rows
from tanglenas_engine.pipeline.comparison.settings import in_order
from tanglenas_engine.pipeline.comparison.tables import MEANING, WORDS, difference_rows, estimate_rows
from tanglenas_engine.pipeline.config.params import parsed, swept
from tanglenas_engine.pipeline.figures.drawing import STYLE, from_zero
from tanglenas_engine.pipeline.files import ARCHITECTURE, FRONT, METRICS, OUT, STAGES
from tanglenas_engine.pipeline.headline import headline, metric_texts
from tanglenas_engine.pipeline.tracking.redaction import reason
from tanglenas_engine.spaces.architecture import Architecture

COMPARED = ("test_accuracy", "test_loss", "test_perplexity", "macs", "search_processor_seconds")
"""The metrics by which the page compares runs. `tanglenas compare` has more."""
TEMPLATE = Path(__file__).with_name("report.html")
BOUND = re.compile(r"^([\w./]+) = (.+)$", re.MULTILINE)
"""A binding of a line in `operative.gin`."""
FIGURES = {
    "Anytime curve": "search/anytime.png",
    "Mixing weights": "search/alphas.png",
    "Candidates": "discretize/candidates.png",
    "Architecture": "evaluate/architecture.png",
    "Training of the final network": "retrain/training.png",
}


def page(root: Path, defaults: Path | None = None) -> tuple[str, int, str]:
    """Return the page about the project in a folder as HTML, the number of runs that it compares, and a warning or "".

    Figures are inside the page, and it loads nothing from elsewhere. A store in trouble costs the comparison alone. A
    project in which only queued experiments ran has no files of its own: then the page compares the runs.

    Args:
        defaults: The params.yaml of a new project. Commands leave out what it has already.

    Raises:
        TangleNASError: Nothing ran yet, or a file of a stage, or params.yaml, is damaged.
    """
    metrics = {name: _json(root / METRICS / f"{name}.json") for name in STAGES}
    derived = _architecture(root / ARCHITECTURE)
    try:
        found, trouble = finished_runs.read(root), ""
    except Exception as error:
        found, trouble = finished_runs.Records(), reason(error)
    runs = found.evaluated
    if derived is None and not runs:
        why = f", and the MLflow store could not be read ({trouble})" if trouble else ""
        raise TangleNASError(f"{root} has no {ARCHITECTURE}{why}: run `dvc repro` first")
    params = _params(root / "params.yaml")
    ran, edited = _ran_with(root, params) if derived else ({}, "")
    picked = _picked(root, metrics["evaluate"])
    mixed = " ".join(filter(None, (_mixed(metrics, derived.digest, bool(picked)), edited))) if derived else ""
    params |= ran
    architecture = picked or derived
    figures = {title: root / OUT / name for title, name in FIGURES.items()} if architecture else {}
    count = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    html = _render(
        mixed=mixed,
        title=shown(f"{params['optimizer']} on {params['space']}") if architecture else f"{count} of {root.name}",
        params={name: shown(value) for name, value in params.items()},
        facts=headline(metrics) if architecture else [],
        metrics=[(stage, key, text) for stage in STAGES for key, text in metric_texts(metrics[stage]).items()],
        architecture=architecture,
        figures=[(title, _image(path.read_bytes())) for title, path in figures.items() if path.is_file()],
        sample=_text(root / OUT / "evaluate" / "sample.txt") if architecture else "",
        compared=_compared(found, root),
        words=WORDS,
        meaning=MEANING,
        runs=list(reversed(runs)),
        trouble=trouble,
        scatter=_image(_scatter(runs), "image/svg+xml") if _points(runs) else "",
        commands=_commands(root, params, runs, architecture.digest, defaults) if architecture else [],
        environment=_versions(root / "environment.json"),
    )
    return html, len(runs), mixed


def _architecture(path: Path) -> Architecture | None:
    return Architecture.from_json(_text(path)) if path.exists() else None


def _picked(root: Path, evaluated: Mapping[str, Any]) -> Architecture | None:
    """Return the architecture of the front that was evaluated: `retrain.pick` takes another one than the best."""
    points = {path.stem: path for path in (root / FRONT).glob("*.json")}
    path = points.get(str(evaluated.get("digest")))
    return _architecture(path) if path else None


def _mixed(metrics: dict[str, dict[str, Any]], digest: str, picked: bool) -> str:
    """Return a sentence if the metrics are about another architecture than the one in out/, else "".

    A person may change the architecture after discretize, and retrain and evaluate it. git brings metrics/ back and not
    out/, so that `git checkout` alone leaves files of two runs.
    """
    about = {stage: shown(metrics[stage].get("digest", digest), 80) for stage in ("discretize", "evaluate")}
    foreign = [stage for stage, other in about.items() if other != digest and (stage != "evaluate" or not picked)]
    if not foreign:
        return ""
    if foreign == ["discretize"] and metrics["evaluate"].get("digest") == digest:
        return (
            f"The architecture {digest} was changed by hand: discretize derived {about['discretize']}, and evaluate is "
            "about the former. `dvc repro` brings the derived one back."
        )
    told = " and ".join(f"metrics/{stage}.json is about architecture {about[stage]}" for stage in foreign)
    return (
        f"This page mixes two runs: {told}, and {ARCHITECTURE} is {digest}. Run `dvc checkout` to have the files of "
        "the commit, or `dvc repro` to have all of them anew."
    )


def _params(path: Path) -> dict[str, Any]:
    try:
        found = swept(path)
    except Exception as error:  # of the file system, of the encoding and of the parser
        raise TangleNASError(f"{path} cannot be read ({shown(error)})") from None
    if missing := [name for name in ("space", "dataset", "optimizer", "seed") if name not in found]:
        raise TangleNASError(
            f"{path} has no value for {' and '.join(missing)}: restore it with `git checkout {path.name}`"
        )
    return found


def _ran_with(root: Path, params: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the settings of the run in out/ that differ from params.yaml, and a sentence about them, or {} and "".

    They are those in `operative.gin` of the stages. Where two stages had different ones, such as another seed, nobody
    knows those of the run, and the sentence says so.

    What is null in params.yaml comes from the recipe, and is not compared. Neither are values that are no literal of
    one line.
    """
    names, ran = finished_runs.names_of_params(root), dict[str, Any]()
    for stage in STAGES:
        for binding, text in BOUND.findall(_text(root / OUT / stage / "operative.gin")):
            if (name := names.get(binding)) and params.get(name) is not None:
                with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                    value = ast.literal_eval(text)
                    # dvc.yaml gives macros, such as SEED, to all stages alike. The rest may be of one stage.
                    if str(ran.setdefault(name, value)) != str(value) and binding.isupper():
                        return {}, (
                            f"This page mixes two runs: the stage {stage} had {shown(f'{name} {value}')}, and one "
                            f"before it {shown(ran[name])}. Title and commands are those of params.yaml. Run "
                            "`dvc repro` to have all stages anew."
                        )
    ran = {name: value for name, value in ran.items() if str(value) != str(params[name])}
    if not ran:
        return {}, ""
    told = shown(", ".join(f"{name} {value}" for name, value in ran.items()), 1000)
    return ran, (
        f"params.yaml differs from the run in {OUT}, which had {told}. Title and commands are those of the run. Run "
        "`dvc repro` to have the results of params.yaml."
    )


def _versions(path: Path) -> dict[str, str]:
    found = _json(path).get("versions")
    return {shown(name, 80): shown(version, 80) for name, version in found.items()} if isinstance(found, dict) else {}


def _render(**content: Any) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**content)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TangleNASError(
            f"{path} cannot be read ({shown(error)}): run `dvc repro` to have it written anew"
        ) from None
    return content if isinstance(content, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace") if path.is_file() else ""
    except OSError as error:
        raise TangleNASError(
            f"{path} cannot be read ({shown(error)}): run `dvc repro` to have it written anew"
        ) from None


def _image(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _points(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if run["params"] is not None and run["accuracy"] is not None]


def _compared(found: finished_runs.Records, root: Path) -> list[tuple[str, list[list[list[str]]], list[str]]]:
    """Return the title, the tables of text and the notes of each part of a comparison of all runs, its notes first."""
    try:
        comparison = compare_rows(found, finished_runs.names_of_params(root))
    except TangleNASError:  # there is no run to compare
        return []
    shown_metrics = [name for name in comparison.metrics if name in COMPARED]
    comparison = replace(comparison, metrics=shown_metrics)
    parts: list[tuple[str, list[list[list[str]]], list[str]]] = [("", [], list(comparison.notes))]
    for table in comparison.tables:
        differences = [one for one in table.differences if one.metric in shown_metrics]
        pairs = [difference_rows(comparison, replace(table, differences=differences))] * bool(differences)
        parts.append((table.title, [estimate_rows(comparison, table), *pairs], list(table.notes)))
    return parts


MARKERS = "osD^vP*X"


def _scatter(runs: Sequence[dict[str, Any]]) -> bytes:
    """Draw test accuracy in % against parameters, as SVG.

    Each space, optimizer and dataset has a colour, and every ten of them another marker.
    """
    from matplotlib import colormaps, style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    groups: dict[str, list[dict[str, Any]]] = {}
    for run in _points(runs):
        label = f"{run['space']}, {run['optimizer']}, {run['dataset']}"
        groups.setdefault(plain(shown(label), 56), []).append(run)
    lines = sum(1 + label.count("\n") for label in groups)
    with style.context(["default", {**STYLE, "svg.hashsalt": "tanglenas", "svg.fonttype": "none"}]):
        figure = Figure(figsize=(5.4, 2.8 + 0.2 * lines), layout="constrained")
        axes = figure.subplots()
        for number, (label, members) in enumerate(sorted(groups.items(), key=lambda group: in_order(group[0]))):
            axes.scatter([run["params"] for run in members], [run["accuracy"] for run in members], s=28,
                         color=colormaps["tab10"](number % 10), marker=MARKERS[number // 10 % len(MARKERS)],
                         alpha=0.8, linewidths=0, label=label)  # fmt: skip
        axes.set_title("test accuracy (%)")
        axes.set_xlabel("parameters")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.margins(0.08)
        from_zero(axes, both=True)
        figure.legend(loc="outside lower left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _commands(
    root: Path, params: Mapping[str, Any], runs: Sequence[dict[str, Any]], digest: str, defaults: Path | None
) -> list[str]:
    """Return the commands that repeat the last run, whose settings are `params`.

    They set what differs from params.yaml in the commit of the run, or in a new project where no commit is known.
    """
    commit = next((run["commit"] for run in reversed(runs) if run["commit"] and run["digest"] == digest), None)
    known = _committed(root, commit) if commit else None
    if known is None:
        commit, known = None, swept(defaults) if defaults else {}
    settings = [
        f"-S {shlex.quote(f'{name}={_setting(value)}')}"
        for name, value in params.items()
        if name not in known or known[name] != value
    ]
    return [*([f"git checkout {commit}"] if commit else []), " ".join(["dvc exp run", *settings])]


def _committed(root: Path, commit: str) -> dict[str, Any] | None:
    """Return the values of params.yaml in a commit, or None if this repository lacks it."""
    if not re.fullmatch("[0-9a-f]{7,64}", commit):
        return None
    try:
        shown_file = subprocess.run(
            ["git", "show", f"{commit}:./params.yaml"], cwd=root, capture_output=True, check=True, timeout=60
        )
        return parsed(shown_file.stdout.decode("utf-8"))
    except Exception:  # of git, of the encoding and of the parser
        return None


def _setting(value: Any) -> Any:
    """Write a value in Hydra's grammar, which `-S` uses. Text that is more than a name or a path is quoted there."""
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_./][\w./:@+-]*", value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value
