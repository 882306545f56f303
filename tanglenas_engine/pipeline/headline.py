"""What a person wants to know of a run first: how good the network is, what it costs, and whether alpha decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tanglenas_engine.errors import shown
from tanglenas_engine.optimizers.optimizer import DECIDED, UNDECIDED

LARGEST = 1e18
"""The size from which a metric counts as none. An axis has no room for it."""
COSTS = {"params": ("parameters", ""), "macs": ("MACs", "multiply-accumulates for one input")}
"""The costs of the headline: the key of the metrics, the unit, and what the unit is."""
UNITS = {
    **{"accuracy": " %", "params": " parameters", "macs": " multiply-accumulates", "entropy": " of 1"},
    **dict.fromkeys(("validation_loss", "test_loss", "split_loss", "race_loss", "race_lead"), " nats"),
}
"""The units of metrics, by the end of their names. Losses of training have that of the loss that was configured."""


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
    return [*_quality(evaluated), *_costs(evaluated), *_decision(metrics)]


def metric_text(key: str, value: object) -> str:
    """Return a metric as a person reads it, with its unit. A penalty has none: it is a share of a cost."""
    unit = "" if key.startswith("penalty_") else next((unit for end, unit in UNITS.items() if key.endswith(end)), "")
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


def _costs(evaluated: Mapping[str, Any]) -> list[Fact]:
    """Return the costs of the network, against the largest and the smallest network of the space."""
    facts = []
    for key, (unit, meaning) in COSTS.items():
        cost, largest, smallest = (_number(evaluated, prefix + key) for prefix in ("", "largest_", "smallest_"))
        if cost is None:
            continue
        details, share = [meaning] if meaning else [], None
        if largest and smallest is not None:
            details += [
                f"{100 * cost / largest:.0f} % of the space's largest network ({largest:,.0f})",
                f"its smallest has {smallest:,.0f}",
            ]
            share = (cost - smallest) / (largest - smallest) if largest > smallest else None
        facts.append(Fact(unit, f"{cost:,.0f} {unit}", "; ".join(details), share))
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
    else:
        source = "the architecture has each choice's heaviest option"
    if entropy is None:
        return [Fact("alpha", "none", f"a sampled search: {source}")] if source else []
    state = "undecided" if entropy > UNDECIDED else "decided" if entropy <= DECIDED else "partly decided"
    if state == "undecided" and candidates == 1 and source.endswith("option"):
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
