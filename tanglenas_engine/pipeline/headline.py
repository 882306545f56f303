"""What a person wants to know of a run first: how good the network is, what it costs, and whether alpha decided."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tanglenas_engine.derivation.budget import amount
from tanglenas_engine.errors import shown

LARGEST = 1e18
"""The size from which a metric counts as none. An axis has no room for it."""
COSTS = {"params": ("parameters", ""), "macs": ("MACs", "multiply-accumulates for one input")}
"""The costs of the headline: the key of the metrics, the unit, and what the unit is."""
UNITS = {
    **{"accuracy": " %", "params": " parameters", "macs": " multiply-accumulates", "entropy": " of 1"},
    **dict.fromkeys(("validation_loss", "test_loss", "split_loss", "race_loss", "race_lead"), " nats"),
}
"""The units of metrics, by the end of their names. Losses of training have that of the loss that was configured."""
DECIDED, UNDECIDED = 0.5, 0.9
"""The entropies up to which alpha is decided, and from which it is undecided.

Between two options, the heavier one has a weight of 0.89 at the first entropy, and of 0.68 at the second.
"""


@dataclass(frozen=True)
class Fact:
    """One fact about a run, as text for a person.

    Attributes:
        name: The name of what is measured, such as "test accuracy".
        value: The value with its unit, such as "97.22 %".
        detail: What the value is to be compared with, or "".
        share: The place of a cost between the smallest network of the space, 0, and the largest, 1. None for other
            facts, and where all networks cost the same.
    """

    name: str
    value: str
    detail: str = ""
    share: float | None = None


def headline(metrics: Mapping[str, Mapping[str, Any]]) -> list[Fact]:
    """Return the facts about a run with which its report begins: quality, costs, and how alpha ended.

    Metrics that are missing or no finite numbers give no fact.

    Args:
        metrics: The content of `metrics/STAGE.json` by stage, {} for a stage that has not run.
    """
    evaluated = metrics.get("evaluate", {})
    derived = metrics.get("discretize", {})
    return [*_quality(evaluated), *_costs(evaluated, derived), *_further_costs(metrics), *_decision(metrics)]


def excesses(derived: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, str]:
    """Return by cost how a network exceeds a limit of discretize, as a part of a sentence; {} within all limits.

    Retrain may build larger networks than the space of the search counts.

    Args:
        derived: The metrics of discretize.
        network: The costs of the network, and its `digest` where it is known.
    """
    told = {}
    for key in COSTS:
        cost, limit, searched = _number(network, key), _number(derived, f"limit_{key}"), _number(derived, key)
        if cost is not None and limit is not None and cost > limit:
            same = network.get("digest") == derived.get("digest", "") and searched is not None and searched <= limit
            kept = f", which the architecture keeps at the sizes of the search, with {searched:,.0f}" if same else ""
            told[key] = f"exceeds the limit of {math.floor(limit):,}{kept}"  # a cost is a whole number
    return told


def metric_texts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the metrics of a stage as a person reads them, by name: with their units, and costs with their limits."""

    def text(key: str) -> str:
        return _cost_text(metrics, key) or _metric_text(key, metrics[key])

    limits = {key: f"limit_{key}" for key in metrics if f"limit_{key}" in metrics}
    told = [key for key in metrics if not key.startswith("unit_") and key not in limits.values()]
    return {key: text(key) + (f" (limit {text(limits[key])})" if key in limits else "") for key in told}


def _cost_text(metrics: Mapping[str, Any], key: str) -> str:
    """Return a cost by an objective as a person reads it, or "" for other metrics."""
    value, unit = _number(metrics, key), metrics.get("unit_" + re.sub("^(expected|limit)_", "", key))
    return "" if value is None or unit is None else f"{amount(value, 3)} {shown(unit)}".rstrip()


def _metric_text(key: str, value: object) -> str:
    """Return a metric as a person reads it, with its unit. A penalty has that of the loss that was configured."""
    if key.startswith("penalty_"):
        unit = " in alpha's loss"
    else:
        unit = next((unit for end, unit in UNITS.items() if key.endswith(end)), "")
    if isinstance(value, float):
        digits = 4 if key.endswith(("loss", "lead")) else 0 if abs(value) >= 1e4 else 2
        return f"{value:,.{digits}f}{unit}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
        return f"{value:,}{unit}"
    return shown(value)


def _quality(evaluated: Mapping[str, Any]) -> list[Fact]:
    """Return the test metric that people compare: the perplexity of a text, or else the accuracy."""
    accuracy, loss, perplexity = (_number(evaluated, f"test_{key}") for key in ("accuracy", "loss", "perplexity"))
    samples = _number(evaluated, "test_samples")
    about = [] if samples is None else [f"of {samples:,.0f} test {'samples' if perplexity is None else 'windows'}"]
    mean = [] if loss is None else [f"mean cross-entropy {loss:.3f} nats"]
    if perplexity is not None:
        right = [] if accuracy is None else [f"{accuracy:.2f} % of the next tokens are right"]
        return [Fact("test perplexity", f"{perplexity:,.3f}", ", ".join([*about, *mean, *right]))]
    return [] if accuracy is None else [Fact("test accuracy", f"{accuracy:.2f} %", ", ".join([*about, *mean]))]


def _costs(evaluated: Mapping[str, Any], derived: Mapping[str, Any]) -> list[Fact]:
    """Return the costs of the network, against its limits, and the largest and the smallest network of the space."""
    facts, beyond = [], excesses(derived, evaluated)
    for key, (unit, meaning) in COSTS.items():
        cost, largest, smallest = (_number(evaluated, prefix + key) for prefix in ("", "largest_", "smallest_"))
        if cost is None:
            continue
        details, share = [it for it in (beyond.get(key), meaning) if it], None
        if largest and smallest is not None:
            details += [
                f"{100 * cost / largest:.0f} % of the space's largest network ({largest:,.0f})",
                f"its smallest has {smallest:,.0f}",
            ]
            share = (cost - smallest) / (largest - smallest) if largest > smallest else None
        facts.append(Fact(unit, f"{cost:,.0f} {unit}", "; ".join(details), share))
    return facts


def _further_costs(metrics: Mapping[str, Mapping[str, Any]]) -> list[Fact]:
    """Return the costs by objectives that discretize told of the network, with their limits."""
    derived, evaluated = metrics.get("discretize", {}), metrics.get("evaluate", {})
    if not evaluated or derived.get("digest") != evaluated.get("digest"):
        return []
    facts = []
    for name in (key.removeprefix("unit_") for key in derived if key.startswith("unit_")):
        if text := _cost_text(derived, name):
            limit = _cost_text(derived, f"limit_{name}")
            facts.append(Fact(name, text, f"limit {limit}" if limit else ""))
    return facts


def _decision(metrics: Mapping[str, Mapping[str, Any]]) -> list[Fact]:
    """Return whether alpha decided, and where the architecture comes from."""
    entropy = _number(metrics.get("search", {}), "entropy")
    derived, evaluated = metrics.get("discretize", {}), metrics.get("evaluate", {})
    candidates = _number(derived, "candidates")
    if candidates is None:
        source = ""
    elif derived.get("digest") != evaluated.get("digest", derived.get("digest")):
        source = "the architecture is another one than discretize took: picked from its front, or changed by hand"
    elif candidates > 1:
        source = f"the architecture comes from judging {candidates:,.0f} candidates"
        if (raced := _number(derived, "race_networks")) is not None:
            source += f", and from training {raced:,.0f} of them"
    elif derived.get("most_probable") is True:
        source = "the architecture has each choice's heaviest option"
    elif "exact" in derived:
        found = "" if derived["exact"] is True else " that a local search found"
        source = f"the architecture is the most probable one within the budget{found}"
    else:
        source = "the architecture is the one candidate that was judged"
    if entropy is None:
        return [Fact("alpha", "none", f"a sampled search: {source}")] if source else []
    state = "undecided" if entropy > UNDECIDED else "decided" if entropy <= DECIDED else "partly decided"
    if state == "undecided" and source.endswith("option"):
        source += ", which weighs little more than the others"
    return [Fact("alpha", f"{state} (entropy {entropy:.2f} of 1)", source)]


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    """Return a metric, or None if it is missing or no finite number."""
    return plausible(metrics.get(key))


def plausible(value: object) -> float | None:
    """Return a number that a page and an axis have room for; None for any other value."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST:
        return value
    return None
