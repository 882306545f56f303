"""The tables of a comparison, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence

from tanglenas_engine.pipeline.comparison.estimates import LEVEL, MOST_SEEDS, POWER, ROUNDING, Estimate, Metric
from tanglenas_engine.pipeline.comparison.groups import Comparison, Table

INTERVAL = f"{100 * LEVEL:.0f} % interval"
WORDS = ("metric", "group", "minus", "arm", "what it changes")
"""The columns of tables that hold no numbers."""
MEANING = (
    f"Intervals are {100 * LEVEL:.0f} % percentile bootstraps of the mean over seeds. For few seeds they are too "
    "short: for normal values, 2 seeds cover the true mean in 50 %, 3 in 75 %, 5 in 83 % and 10 in 90 % of cases. That "
    "of 2 or 3 seeds is from the lowest to the highest value."
)
DIFFERENCES = (
    "A difference is the mean over common seeds of the group minus the other. Seeds for a claim: the least n with "
    f"which a two-sided paired t-test at {100 * (1 - LEVEL):.0f} % shows a mean difference d of standard deviation s "
    f"with probability {POWER} (noncentral t, n - 1 degrees of freedom, noncentrality d sqrt(n) / s; about "
    "7.85 (s / d)^2 + 2). It assumes independent normal differences, and takes the measured d and s for the true ones, "
    "which few seeds know only roughly. Where nothing differs, one comparison in twenty still shows a difference at "
    "5 %: name the metric of your claim before you look."
)


def markdown(comparison: Comparison) -> str:
    """Return the tables and notes as Markdown, aligned for a terminal."""
    parts = ["# Comparison", *comparison.notes]
    for table in comparison.tables:
        parts += [f"## {table.title}"] * bool(table.title)
        parts.append(lines(estimate_rows(comparison, table)))
        if table.differences:
            parts.append(lines(difference_rows(comparison, table)))
        parts += [_list(table.notes)] * bool(table.notes)
    parts.append(MEANING)
    parts += [DIFFERENCES] * any(table.differences for table in comparison.tables)
    return "\n\n".join(parts) + "\n"


def estimate_rows(comparison: Comparison, table: Table) -> list[list[str]]:
    """Return the means of a table as rows of text, the names of the columns first."""
    rows = [["metric", "group", "seeds", "mean", "std", INTERVAL]]
    for metric in comparison.metrics:
        shown = comparison.metric(metric)
        for group in table.groups:
            if estimate := table.estimates.get((metric, group.label)):
                rows.append([shown.heading, group.label, *format_estimate(shown, estimate)])
    return rows


def difference_rows(comparison: Comparison, table: Table) -> list[list[str]]:
    """Return the differences of a table as rows of text, the names of the columns first."""
    rows = [["metric", "group", "minus", "common seeds", "difference", "std", INTERVAL, "seeds for a claim"]]
    for one in table.differences:
        needed = "-" if one.seeds_needed is None else str(one.seeds_needed)
        if one.seeds_needed is not None and one.seeds_needed > MOST_SEEDS:
            needed = f"> {MOST_SEEDS:,}"
        shown = comparison.metric(one.metric)
        numbers = format_estimate(shown, one.estimate, signed=True)
        rows.append([shown.heading, one.group, one.against, *numbers, needed])
    return rows


def table_csv(comparison: Comparison) -> str:
    """Return all numbers, unrounded and in their own units, one row for each mean and each difference."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "metric", "group", "minus", "seeds", "mean", "standard_deviation", "low", "high",
                     "seeds_for_a_claim"])  # fmt: skip
    for table in comparison.tables:
        for metric in comparison.metrics:
            for group in table.groups:
                if estimate := table.estimates.get((metric, group.label)):
                    writer.writerow([table.title, metric, group.label, "", *_numbers(estimate), ""])
            for one in table.differences:
                if one.metric == metric:
                    needed = "" if one.seeds_needed is None else one.seeds_needed
                    writer.writerow([table.title, metric, one.group, one.against, *_numbers(one.estimate), needed])
    return text.getvalue()


def latex(comparison: Comparison) -> str:
    """Return tables for each set of conditions, as booktabs sets them: a row for each group, a column for each metric.

    A cell has the mean, plus or minus the standard deviation. A second table has the differences with their intervals.
    A cell of fewer seeds than its row has their number, n. Captions are left to the paper.
    """
    parts = ["% Needs \\usepackage{booktabs}."]
    for table in comparison.tables:
        title = f" {_one_line(table.title)}:" * bool(table.title)
        shown = {
            metric: comparison.metric(metric)
            for metric in comparison.metrics
            if any(key[0] == metric for key in table.estimates)
        }
        means = [
            [
                group.label,
                str(len(group.runs)),
                *(
                    _latex_mean(look, table.estimates.get((metric, group.label)), len(group.runs))
                    for metric, look in shown.items()
                ),
            ]
            for group in table.groups
        ]
        looks = list(shown.values())
        parts.append(f"%{title} means over seeds, plus or minus the standard deviation.\n{_tabular(looks, means)}")
        if table.differences:
            found = {(one.metric, one.group): one.estimate for one in table.differences}
            pairs = dict.fromkeys((one.group, one.against) for one in table.differences)
            counts = {
                group: max(estimate.count for (_, other), estimate in found.items() if other == group)
                for group, _ in pairs
            }
            rows = [
                [
                    f"{group} minus {against}",
                    str(counts[group]),
                    *(
                        _latex_difference(look, found.get((metric, group)), counts[group])
                        for metric, look in shown.items()
                    ),
                ]
                for group, against in pairs
            ]
            what = f"differences over common seeds, with {100 * LEVEL:.0f} % bootstrap intervals"
            parts.append(f"%{title} {what}.\n{_tabular(looks, rows)}")
    return "\n\n".join(parts) + "\n"


def _tabular(metrics: Sequence[Metric], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose rows begin with a label and a number of seeds. Only the label is text, all else is LaTeX."""
    units = [metric.unit for metric in metrics]
    lines = [
        f"\\begin{{tabular}}{{l{'r' * (len(metrics) + 1)}}}\n\\toprule",
        _latex_row(["", "seeds", *(_escape(metric.title) for metric in metrics)]),
        _latex_row(["", "", *(f"({_escape(unit)})" if unit else "" for unit in units)]),
        "\\midrule",
        *(_latex_row([_escape(label), *cells]) for label, *cells in rows),
        "\\bottomrule\n\\end{tabular}",
    ]
    return "\n".join(lines)


def format_estimate(metric: Metric, estimate: Estimate, signed: bool = False) -> list[str]:
    """Return the number of seeds, the mean, the deviation and the interval of an estimate as text."""

    decimals = _decimals(metric, estimate)

    def number(value: float, sign: str = "+" if signed else "") -> str:
        rounded = round(value / metric.scale, decimals) + 0.0  # no -0.0
        return f"{rounded:{sign if rounded else ''},.{decimals}f}"

    if estimate.deviation is None or estimate.interval is None:
        return [str(estimate.count), number(estimate.mean), "-", "one seed"]
    low, high = estimate.interval
    return [
        str(estimate.count),
        number(estimate.mean),
        number(estimate.deviation, ""),
        f"{number(low)} to {number(high)}",
    ]


def _decimals(metric: Metric, estimate: Estimate) -> int:
    """Return the decimals of a mean: those of its metric, or two digits of its deviation where these are more.

    A metric without a unit may be of any size, as the values of a benchmark table are. Without a deviation, the digits
    are those of the mean.
    """
    size = estimate.deviation or abs(estimate.mean)
    if metric.unit or size <= ROUNDING:
        return metric.decimals
    return max(metric.decimals, 1 - math.floor(math.log10(size / metric.scale)))


def _numbers(estimate: Estimate) -> list[object]:
    low, high = estimate.interval or ("", "")
    return [estimate.count, estimate.mean, "" if estimate.deviation is None else estimate.deviation, low, high]


def lines(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table with columns of equal width. Numbers are at the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [name not in WORDS for name in rows[0]]

    def line(cells: Sequence[str]) -> str:
        placed = zip(cells, widths, right, strict=True)
        return f"| {' | '.join(c.rjust(width) if number else c.ljust(width) for c, width, number in placed)} |"

    rule = ["-" * (width - number) + ":" * number for width, number in zip(widths, right, strict=True)]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _latex_row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _latex_mean(metric: Metric, estimate: Estimate | None, seeds: int) -> str:
    if estimate is None:
        return "--"
    _, mean, deviation, _ = format_estimate(metric, estimate)
    return _math(mean if estimate.deviation is None else f"{mean} \\pm {deviation}") + _fewer(estimate, seeds)


def _latex_difference(metric: Metric, estimate: Estimate | None, seeds: int) -> str:
    if estimate is None:
        return "--"
    _, mean, _, interval = format_estimate(metric, estimate, signed=True)
    ends = interval.replace(" to ", ";\\ ")
    return _math(mean if estimate.interval is None else f"{mean}\\ [{ends}]") + _fewer(estimate, seeds)


def _fewer(estimate: Estimate, seeds: int) -> str:
    """Return the number of seeds of a cell, if it is not that of its row."""
    return f" ($n={estimate.count}$)" if estimate.count != seeds else ""


def _math(text: str) -> str:
    return f"${text.replace(',', '{,}')}$"  # a comma of its own would have a space after it


def _escape(text: str) -> str:
    """Return text as LaTeX sets it, whatever signs it has."""
    words = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda sign: words.get(sign[0], f"\\{sign[0]}"), _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())
