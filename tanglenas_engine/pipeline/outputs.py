"""What the stages write for each other and for people, and the metrics that they report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gin
from torch import nn

from tanglenas_engine.data import Splits, data_path
from tanglenas_engine.derivation.race import Raced, lead_of
from tanglenas_engine.errors import describe
from tanglenas_engine.runtime.files import write_atomic
from tanglenas_engine.runtime.weights import save_weights
from tanglenas_engine.spaces.architecture import Architecture

if TYPE_CHECKING:
    from tanglenas_engine.optimizers.optimizer import Optimizer
    from tanglenas_engine.pipeline.stage import Stage
    from tanglenas_engine.stages.discretize import DiscretizeResult
    from tanglenas_engine.stages.evaluate import EvaluateResult, RankCorrelation
    from tanglenas_engine.stages.search import SearchResult
    from tanglenas_engine.tables import Benchmark

from tanglenas_engine.pipeline.files import (
    ARCHITECTURE,
    CHANNEL_DIVISOR,
    FRONT,
    METRICS,
    MIXTURE,
    OUT,
    SPLITS,
    STAGES,
    SUPERNET,
    read_splits,
)
from tanglenas_engine.pipeline.headline import COSTS, headline, metric_texts
from tanglenas_engine.pipeline.inputs.same_inputs import inputs_metadata
from tanglenas_engine.pipeline.pools import agreement, incomparable, other_code, single_trainings

LARGEST_LOSS = 700
"""The loss in nats from which a perplexity exceeds what a float holds."""


def write_search(stage: Stage, optimizer: Optimizer, splits: Splits, result: SearchResult) -> None:
    """Write the splits, the supernet, the mixture, and the history of the losses and of the mixture weights."""
    space = stage.space
    stage.write(SPLITS.name, splits.to_json())
    save_weights(
        SUPERNET,
        space.state_dict(),
        {
            "space": space.name,
            "optimizer": optimizer.name,
            "pipeline_id": stage.pipeline_id,
            **({"weights_sha256": stage.weights} if stage.weights else {}),
            **({CHANNEL_DIVISOR: str(divisor)} if (divisor := space.superposition.trained_divisor) > 1 else {}),
            **inputs_metadata(stage.dataset),
        },
    )
    save_weights(
        MIXTURE,
        result.mixture.tensors() if result.mixture else {},
        {"derivation": optimizer.derivation, "targets": json.dumps(result.targets)},
    )
    stage.table("history.csv", result.history)
    stage.table(
        "mixture.csv",
        [
            {"epoch": row["epoch"], "choice": name, "layer": layer, "option": option, "weight": weight}
            for row in result.history
            for name, rows in row.get("mixture", {}).items()
            for layer, weights in enumerate(rows if space.choices[name].layered else [rows])
            for option, weight in zip(space.choices[name].options, weights, strict=True)
        ],
    )


def search_metrics(result: SearchResult) -> dict[str, Any]:
    """Return the numbers of the last epoch that metrics/search.json has."""
    last = result.history[-1]
    keep = ("weight_loss", "weight_accuracy", "architecture_loss", "validation_accuracy", "validation_loss",
            "table_value", "table_rank", "table_regret", "entropy", "params", "macs", *result.units)  # fmt: skip
    costs = [key for key in last if key.startswith(("expected_", "penalty_"))]
    losses = {f"{name}_split_loss": loss for name, loss in result.split_losses.items()}
    return {**{key: last[key] for key in (*keep, *costs, "stopped") if key in last}, **_units(result.units), **losses}


def _units(units: Mapping[str, str]) -> dict[str, str]:
    """Return what metrics have of the units of objectives, "" for none. Those of parameters and MACs are known.

    A unit tells a cost from other metrics, so that every objective has one.
    """
    return {f"unit_{name}": unit for name, unit in units.items() if name not in COSTS}


def write_discretize(stage: Stage, result: DiscretizeResult) -> list[dict[str, Any]]:
    """Write the architecture found, the candidates, and the Pareto front of several; return the rows of the front.

    The networks of a race have a table of their own, without their seconds, which differ from run to run.
    """
    stage.write(ARCHITECTURE.name, result.architecture.to_json())
    stage.table("candidates.csv", result.candidates)
    if result.raced is not None:
        stage.table("race.csv", [{k: v for k, v in row.items() if k != "seconds"} for row in result.raced.records])
        stage.times |= {f"race_seconds_{row['place']}": row["seconds"] for row in result.raced.records}
    if len(result.candidates) <= 1:
        return []
    rows = {row["digest"]: row for row in result.candidates}
    front = [rows[architecture.digest] for architecture in result.front]
    stage.table("pareto.csv", front)
    for architecture in result.front:
        write_atomic(FRONT / f"{architecture.digest}.json", architecture.to_json())
    return front


def discretize_metrics(result: DiscretizeResult) -> dict[str, Any]:
    """Return what metrics/discretize.json has. Own numbers take precedence over costs of the same name."""
    own = {
        "validation_accuracy": result.validation_accuracy,
        "validation_loss": result.validation_loss,
        "candidates": len(result.candidates),
        "params": result.cost.params,
        "macs": result.cost.macs,
        **({} if result.most_probable is None else {"most_probable": result.most_probable}),
        **({} if result.exact is None else {"exact": result.exact}),
        **({} if result.raced is None else race_metrics(result.raced)),
        "digest": result.architecture.digest,
    }
    limits = {f"limit_{name}": most for name, most in result.limits.items()}
    return {**own, **result.costs, **limits, **_units(result.units), **own}


def race_metrics(raced: Raced) -> dict[str, Any]:
    """Return what metrics/discretize.json has of a race; its losses are on the validation split."""
    winner, lead = raced.records[0], lead_of(raced.records)
    return {
        "race_networks": len(raced.records),
        "race_trainings": raced.trainings,
        "race_loss": winner["loss"],
        **({} if lead is None else {"race_lead": lead}),
        "race_supernet_rank": winner["supernet_rank"],
    }


def looked_up(
    stage: Stage, table: Benchmark | None, architecture: Architecture, result: EvaluateResult
) -> dict[str, float]:
    """Return what a benchmark table says of the network found: its values, or its percentile in a pool.

    A pool of other data, of another recipe or of smaller networks says nothing, and a person is told.
    """
    if table is None:
        return {}
    ceiling, trainings = {}, []
    if table.listed is not None:
        path = data_path(gin.query_parameter("benchmark.path"))
        if alike := agreement(path, table.metric, table.table.keys):
            ceiling = {"spearman_ceiling": alike.ceiling}
        if reason := incomparable(path, stage.space, stage.dataset, read_splits(), result.cost):
            stage.progress.note(f"evaluate: no percentile in a pool: {reason}")
            return ceiling
        if told := other_code(path):
            stage.progress.note(f"evaluate: {told}")
        trainings = single_trainings(path, table.metric, table.table.keys)
    measured = {"test_accuracy": result.test_accuracy, "test_loss": result.test_loss}
    return {**table.judged(architecture, measured, trainings), **ceiling}


def evaluate_metrics(
    result: EvaluateResult,
    architecture: Architecture,
    found_in_table: Mapping[str, float],
    ranking: RankCorrelation | None,
) -> dict[str, Any]:
    """Return what metrics/evaluate.json has: of the network, of its benchmark table, and of the supernet's ranking."""
    agreement: dict[str, float] = {}
    if ranking is not None:
        baselines = {f"spearman_{name}": value for name, value in ranking.baselines.items()}
        found = {"kendall_tau": ranking.kendall_tau, "spearman": ranking.spearman, **baselines}
        # JSON has no nan, which a coefficient is where all architectures have equal ranks.
        agreement = {name: value for name, value in found.items() if not math.isnan(value)}
        agreement["ranked_architectures"] = len(ranking.rows)
    # Targets that follow from one another, such as the tokens of a text, have no confusion matrix.
    has_perplexity = result.confusion is None and result.test_loss < LARGEST_LOSS
    return {
        "test_accuracy": result.test_accuracy,
        "test_loss": result.test_loss,
        **({"test_perplexity": math.exp(result.test_loss)} if has_perplexity else {}),
        "test_samples": result.samples,
        "params": result.cost.params,
        "macs": result.cost.macs,
        "largest_params": result.largest.params,
        "largest_macs": result.largest.macs,
        "smallest_params": result.smallest.params,
        "smallest_macs": result.smallest.macs,
        "digest": architecture.digest,
        **found_in_table,
        **agreement,
    }


def write_classes(stage: Stage, result: EvaluateResult) -> None:
    """Write the accuracy of each class and the confusion matrix, and say which classes are worst; nothing for text."""
    if result.confusion is None:
        return
    names = stage.dataset.class_names
    rows = class_rows(result.confusion, names)
    stage.table("classes.csv", rows)
    # A network may have more outputs than there are classes.
    outputs = [*names, *(f"output {i}" for i in range(len(names), len(result.confusion)))]
    stage.table(
        "confusion.csv",
        [
            {"class": name, **{f"as {output}": count for output, count in zip(outputs, counts, strict=True)}}
            for name, counts in zip(names, result.confusion, strict=False)
        ],
    )
    tested = sorted((row for row in rows if row["samples"]), key=lambda row: row["accuracy"])
    worst = ", ".join(f"{ascii(row['class'])[1:-1][:60]} {row['accuracy']:.2f} %" for row in tested[:3])
    stage.progress.note(f"evaluate: lowest test accuracy by class: {worst} (all in {stage.folder / 'classes.csv'})")


def class_rows(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each class its test samples, how many were right, the accuracy in %, and the most frequent mistake."""
    rows = []
    for label, (name, counts) in enumerate(zip(names, confusion, strict=False)):
        samples = sum(counts)
        wrong = [count if output != label else 0 for output, count in enumerate(counts)]
        most = max(range(len(wrong)), key=wrong.__getitem__)
        rows.append(
            {
                "class": name,
                "samples": samples,
                "right": counts[label],
                "accuracy": 100 * counts[label] / samples if samples else "",
                "taken_most_for": (names[most] if most < len(names) else f"output {most}") if wrong[most] else "",
            }
        )
    return rows


def write_sample(stage: Stage, network: nn.Module) -> str:
    """Write what the space shows of a network, such as text that it generates, and return it; "" for most spaces.

    No result depends on it: a person is told where it fails.
    """
    try:
        shown = stage.space.show(network.cpu(), stage.dataset)
        if shown is None:
            return ""
        stage.write("sample.txt", shown + "\n")
    except Exception as error:
        stage.progress.note(f"evaluate: no sample, as `show` of {stage.space.name!r} failed: {describe(error)}")
        return ""
    return shown


def print_summary(architecture: Architecture, title: str, sample: str = "") -> None:
    """Print the sample, the facts that a person wants first, and a table of what each stage found, with its folder."""
    from rich.console import Console
    from rich.table import Table

    if sample:
        print(sample)
    metrics = {name: _numbers(name) for name in STAGES}
    table = Table("stage", "result", "files")
    derived = metrics["discretize"].get("digest", architecture.digest) == architecture.digest  # else it was picked
    for name, numbers in metrics.items():
        lines = [
            f"{key.replace('_', ' ')} {text}"
            for key, text in metric_texts(numbers).items()
            if not key.startswith(("largest_", "smallest_"))
        ]  # the facts have these
        if name == ("discretize" if derived else "retrain"):
            lines = [*str(architecture).split(), *lines]
        table.add_row(name, "\n".join(lines), str(OUT / name))
    facts = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left")
    for fact in headline(metrics):
        facts.add_row(fact.name, f"[bold]{fact.value}[/bold]\n{fact.detail}" if fact.detail else fact.value)
    console = Console(highlight=False)
    console.print(facts)
    console.print(table)


def _numbers(stage: str) -> dict[str, Any]:
    path = METRICS / f"{stage}.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found
