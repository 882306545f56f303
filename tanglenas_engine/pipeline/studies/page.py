"""The page of a study: the question, what the data say, the table, the figure, and the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tanglenas_engine.pipeline.comparison.estimates import LEVEL
from tanglenas_engine.pipeline.comparison.groups import Comparison, Group, Table, absent, table_of
from tanglenas_engine.pipeline.comparison.tables import (
    DIFFERENCES,
    INTERVAL,
    MEANING,
    difference_rows,
    estimate_rows,
    latex,
    lines,
    table_csv,
)
from tanglenas_engine.pipeline.studies import load
from tanglenas_engine.pipeline.studies.figure import draw
from tanglenas_engine.pipeline.studies.run_folder import MEASURED, read_measured, read_params
from tanglenas_engine.pipeline.studies.sentences import sentences
from tanglenas_engine.pipeline.studies.study import Measured, Study
from tanglenas_engine.runtime.files import write_atomic
from tanglenas_engine.tables.metrics import kind_of

PAGE = Path("page")


@dataclass(frozen=True)
class Results:
    """The measurements of a study.

    Attributes:
        params: Its params.yaml.
        runs: What each run was measured by, by arm and seed.
        missing: The names of runs that are not measured yet.
    """

    params: Mapping[str, Any]
    runs: Mapping[str, Mapping[int, Measured]]
    missing: Sequence[str]

    @classmethod
    def read(cls, root: Path) -> Results:
        """Read the measurements of the arms and seeds in params.yaml; other files are left alone."""
        params = read_params(root)
        runs: dict[str, dict[int, Measured]] = {}
        missing = []
        for arm in params["arms"]:
            for seed in params["seeds"]:
                path = root / MEASURED / f"{arm}-{seed}.json"
                if path.exists():
                    runs.setdefault(arm, {})[seed] = read_measured(path)
                else:
                    missing.append(f"{arm}-{seed}")
        return cls(params, runs, missing)


def write_page(root: Path) -> str:
    """Write page/ of the study in a folder, and return a sentence that says where it is.

    Raises:
        TangleNASError: The folder is no study, or a measurement is damaged.
    """
    results = Results.read(root)
    name = results.params["study"]
    study = with_metric(load(name), results.params)
    comparison = compared(study, results)
    out = root / PAGE
    write_atomic(out / f"{name}.md", text(study, results, comparison))
    write_atomic(out / f"{name}.csv", table_csv(comparison))
    write_atomic(out / f"{name}.tex", latex(comparison))
    write_atomic(out / f"{name}.png", draw(study, results.runs, comparison))
    return f"page: {PAGE / name}.md, .csv, .tex and .png"


def with_metric(study: Study, params: Mapping[str, Any]) -> Study:
    """Return a study whose table values are named by their metric in the table, with the direction that is better."""
    if not params["table"]:
        return study
    kind = kind_of(params["metric"])
    better = f", {'less' if kind == 'less' else 'more'} is better" * (kind is not None)
    told = f"table value ({params['metric']}{better})"
    return replace(
        study,
        metrics={
            name: replace(metric, title=metric.title.replace("table value", told))
            for name, metric in study.metrics.items()
        },
        panels=tuple(replace(panel, y=panel.y.replace("table value", told)) for panel in study.panels),
    )


def compared(study: Study, results: Results) -> Comparison:
    """Return the comparison of the arms of each table, each with the first one."""
    added = study.across(results.runs) if study.across else {}
    groups = [
        Group(
            arm,
            {
                str(seed): {
                    "name": f"{arm}-{seed}",
                    "metrics": {**one.values, **added.get(arm, {}).get(seed, {})},
                }
                for seed, one in runs.items()
            },
        )
        for arm, runs in results.runs.items()
    ]
    measured = {name for group in groups for run in group.runs.values() for name in run["metrics"]}
    metrics = [name for name in study.metrics if name in measured]
    firsts: dict[str, str] = {}
    for arm in results.params["arms"]:
        firsts.setdefault(_title(study, arm), arm)
    tables = []
    for title, first in firsts.items():
        here = [group for group in groups if _title(study, group.label) == title]
        if here:
            # An arm that others are compared with may have no value of a metric by its meaning.
            having = {metric: [group for group in here if group.values(metric)] for metric in metrics}
            notes = [note for metric, some in having.items() for note in absent(some, [metric])]
            tables.append(table_of(title, here, notes, metrics, first if first in results.runs else None))
    tables = tables or [Table("", [], {}, [], [])]
    return Comparison(["arm"], metrics, tables, [], shown=study.metrics)


def _title(study: Study, arm: str) -> str:
    """Return the title of the table of an arm, which may be one that a person added to params.yaml."""
    return study.arms[arm].table if arm in study.arms else ""


def text(study: Study, results: Results, comparison: Comparison) -> str:
    """Return the page as Markdown."""
    params, tables = results.params, comparison.tables
    name, seeds = params["study"], params["seeds"]
    on = study.on(params) if study.on else f"{params['space']} with {params['dataset']}"
    parts = [
        f"# {study.question}",
        f"The study `{name}` on {on}, {len(seeds)} "
        f"seed{'s' * (len(seeds) != 1)} ({', '.join(map(str, seeds))}), recipe `{params['recipe']}`"
        + (f", table `{params['table']}` ({params['metric']})" if params["table"] else "")
        + ".",
    ]
    if results.missing:
        shown = ", ".join(results.missing[:6]) + (" and more" if len(results.missing) > 6 else "")
        parts.append(f"**Incomplete**: {len(results.missing)} runs are not measured yet: {shown}. Run `dvc repro`.")
    said = [one for table in tables for one in sentences(study.claims, comparison, table)]
    nothing = "The study has no statement about these arms alone." if results.runs else "Nothing was measured yet."
    parts += ["## What the data say", "\n".join(f"- {one}" for one in said) or nothing]
    if (count := sum(INTERVAL in one for one in said)) > 1:
        parts.append(
            f"{count} statements are by a {100 * LEVEL:.0f} % interval of Student's t over seeds. "
            "Where nothing differs, one in twenty misses 0 by chance: a single one that stands out is weak evidence."
        )
    parts += study.notes(results.runs) if study.notes else []
    if study.paper:
        parts.append(f"In the paper: {study.paper}")
    if any(table.groups for table in tables):
        parts += ["## Numbers"]
        for table in tables:
            parts += [f"### {table.title}"] * bool(table.title)
            parts.append(lines(estimate_rows(comparison, table)))
            if table.differences:
                parts.append(lines(difference_rows(comparison, table)))
            parts += ["\n".join(f"- {note}" for note in table.notes)] * bool(table.notes)
        parts += [f"![{_described(study, results, comparison)}]({name}.png)"]
    parts += ["## What this does not show", study.limits, f"In the tables: {MEANING[0].lower()}{MEANING[1:]}"]
    parts += [DIFFERENCES] * any(table.differences for table in tables)
    parts += ["## The arms", lines([["arm", "what it changes"], *_arms(params["arms"])])]
    parts += ["## Run it again", _commands(params)]
    return "\n\n".join(parts) + "\n"


def _described(study: Study, results: Results, comparison: Comparison) -> str:
    """Return what the panels of the figure show, for people who do not see it."""
    runs = [one for seeds in results.runs.values() for one in seeds.values()]
    there = {name for one in runs for name in (*one.curves, *one.matrices)} | {*comparison.metrics}
    names = [
        study.metrics[panel.name].title if panel.kind == "means" else panel.y
        for panel in study.panels
        if panel.name in there
    ]
    return f"By arm: {', '.join(names)}"


def _arms(arms: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for arm, own in arms.items():
        told = [f"{key}={value}" for key, value in own.items() if not isinstance(value, Mapping | list)]
        told += [
            f"{group}.{key}={value}"
            for group, values in own.items()
            if isinstance(values, Mapping)
            for key, value in values.items()
        ]
        rows.append([arm, ", ".join(f"`{one}`" for one in [*told, *own["bindings"]])])
    return rows


def _commands(params: Mapping[str, Any]) -> str:
    return (
        f"    {params['command']}\n\n"
        "laid this study out. Its params.yaml and gin/ have all settings, those that were changed later too. In its "
        "folder, `dvc repro` runs what is missing, and `python -m pipelines.page` writes this page from what is there."
    )
