"""The sentences that the data of a study support. An interval chooses each of them.

It is the interval of Student's t, which covers the mean of normal values as often as it says, for two seeds as for
twenty. The bootstrap of the tables is too short for few seeds: of two it is the range between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from tanglenas_engine.pipeline.comparison.estimates import LEVEL, MOST_SEEDS, ROUNDING, Estimate, Metric
from tanglenas_engine.pipeline.comparison.groups import Comparison, Difference, Table, differences_to
from tanglenas_engine.pipeline.comparison.tables import INTERVAL, format_estimate
from tanglenas_engine.pipeline.studies.study import Claim

Verdict = Literal["ahead", "behind", "not told apart", "constant", "one seed"]


def verdict(estimate: Estimate, value: float = 0.0, higher: bool = True) -> Verdict:
    """Return on which side of a number a mean is, as far as its interval shows it.

    Equal values have no interval: of few seeds, they say nothing of other seeds.

    Args:
        estimate: The mean of one or more seeds.
        value: The number.
        higher: True if more is better.
    """
    ends = interval(estimate)
    if ends is None:
        return "one seed"
    low, high = ends
    if low == high:
        return "constant"
    if low > value:
        return "ahead" if higher else "behind"
    if high < value:
        return "behind" if higher else "ahead"
    return "not told apart"


def interval(estimate: Estimate) -> tuple[float, float] | None:
    """Return the ends of the interval of a mean by Student's t, or None for one seed."""
    if estimate.deviation is None:
        return None
    from scipy import stats  # type: ignore[import-untyped]

    quantile = float(stats.t.ppf((1 + LEVEL) / 2, estimate.count - 1))
    half = quantile * estimate.deviation / math.sqrt(estimate.count)
    return estimate.mean - half, estimate.mean + half


def sentences(claims: Sequence[Claim], comparison: Comparison, table: Table) -> list[str]:
    """Return a sentence for each arm that a claim is about. What was not measured has none."""
    found = []
    for claim in claims:
        look = comparison.metric(claim.metric)
        for group in table.groups:
            if claim.arm not in ("", group.label) or group.label == claim.against:
                continue
            estimate = table.estimates.get((claim.metric, group.label))
            if estimate is None:
                continue
            if isinstance(claim.against, float | int):
                found.append(_against_number(claim, group.label, look, estimate, float(claim.against)))
                continue
            base = next((other for other in table.groups if other.label == claim.against), None)
            if base is not None:
                compared, _ = differences_to([group], base, [claim.metric])
                found += [_against_arm(claim, one, look) for one in compared]
    return found


def _against_number(claim: Claim, arm: str, look: Metric, estimate: Estimate, value: float) -> str:
    mean, ends = _numbers(look, estimate)
    title = look.title
    reached = verdict(estimate, value)
    if reached == "one seed":
        return f"{arm}: {title} is {mean} with one seed, which shows nothing of chance."
    shown = f"{value:g}"
    if reached in ("ahead", "behind"):
        side = "above" if reached == "ahead" else "below"
        return f"**{arm}: {title} is {side} {shown}**: {mean} ({ends}).{_paper(claim, reached)}"
    if reached == "constant":
        return f"{arm}: {title} is {mean} with every seed, which has no interval."
    return f"{arm}: {title} is **not told apart from {shown}**: {mean} ({ends}).{_paper(claim, reached)}"


def _against_arm(claim: Claim, one: Difference, look: Metric) -> str:
    reached, title = verdict(one.estimate, 0.0, claim.higher), look.title
    difference, ends = _numbers(look, one.estimate, signed=True)
    if reached == "one seed":
        return (
            f"{one.group} against {one.against}: {title} differs by {difference} with the one seed that both have, so "
            "nothing follows."
        )
    if reached == "constant":
        differs = f"differs by {difference}" if abs(one.estimate.mean) > ROUNDING else "is equal"
        return f"{one.group} against {one.against}: {title} {differs} with every seed, which has no interval."
    if reached == "not told apart":
        need = ""
        if one.seeds_needed is not None:
            count = f"{one.seeds_needed:,}" if one.seeds_needed <= MOST_SEEDS else f"more than {MOST_SEEDS:,}"
            need = f" If the difference is what was measured, {count} seeds would show it."
        return (
            f"{one.group} and {one.against} are **not told apart** in {title}: the difference is {difference} "
            f"({ends}).{need}{_paper(claim, reached)}"
        )
    side = "ahead of" if reached == "ahead" else "behind"
    return (
        f"**{one.group} is {side} {one.against}** in {title}: the difference is {difference} ({ends})."
        f"{_paper(claim, reached)}"
    )


def _paper(claim: Claim, reached: Verdict) -> str:
    """Return how an outcome relates to the paper's, or "" where the paper says nothing."""
    if not claim.paper:
        return ""
    if reached == claim.paper:
        return f" The paper sees it {claim.paper}, too."
    if reached in ("ahead", "behind"):
        return f" This contradicts the paper, which sees it {claim.paper}."
    return f" The paper sees it {claim.paper}: these data do not decide that."


def _numbers(look: Metric, estimate: Estimate, signed: bool = False) -> tuple[str, str]:
    """Return a mean with its unit, and its interval with the number of seeds. A difference of percentages is points."""
    count, mean, _, ends = format_estimate(look, replace(estimate, interval=interval(estimate)), signed)
    unit = "points" if signed and look.unit == "%" else look.unit
    return f"{mean} {unit}".rstrip(), f"{INTERVAL} {ends}, {count} seeds"
