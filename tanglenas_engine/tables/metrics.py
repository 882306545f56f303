"""The metrics of a table by their names: which direction is better, and which values are possible."""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import Literal

Kind = Literal["accuracy", "more", "less"]
"""An accuracy in %, another number of which more is better, or a cost."""

ACCURACIES = frozenset({"acc", "accs", "accuracy", "accuracies", "top"})
MORE = frozenset(
    {"precision", "recall", "f", "auc", "auroc", "auprc", "map", "miou", "iou", "dice", "bleu", "rouge", "psnr", "ssim",
     "score", "scores", "throughput", "fps", "reward", "rewards", "return", "correlation"}
)  # fmt: skip
GAINS = frozenset({"efficiency", "gain", "gains", "improvement", "speedup"})
"""Words with which more is better, and which turn a cost before them around: `energy_efficiency` is no energy."""
LESS = frozenset(
    {"loss", "losses", "err", "errs", "error", "errors", "nll", "ce", "crossentropy", "perplexity", "perplexities",
     "ppl", "bpc", "bpb", "mse", "rmse", "mae", "mape", "wer", "cer", "fid", "kl", "regret", "drop", "misclassified",
     "params", "param", "parameters", "parameter", "weights", "flops", "flop", "mflops", "gflops", "macs", "mac",
     "mmacs", "gmacs", "madds", "multadds", "ops", "latency", "latencies", "time", "times", "duration", "runtime",
     "seconds", "second", "secs", "sec", "ms", "milliseconds", "us", "minutes", "hours", "days", "cycle", "cycles",
     "energy", "energies", "power", "joules", "joule", "mj", "watts", "watt", "edp", "cost", "costs", "price", "memory",
     "mem", "byte", "bytes", "kb", "kib", "mb", "mib", "gb", "gib", "size", "footprint", "area", "co", "carbon",
     "emissions"}
)  # fmt: skip
LOST = frozenset({"loss", "losses", "err", "errs", "error", "errors", "drop", "regret", "misclassified"})
"""Costs that an accuracy turns into: `top1_err`. Beside another cost nobody knows which of both a name is of."""
DEVIATIONS = frozenset({"std", "stdev", "stddev", "deviation", "sigma"})
ABOUT = DEVIATIONS | frozenset(
    {"variance", "var", "gap", "epoch", "epochs", "step", "steps",
     "rank", "ranks", "seed", "seeds", "count", "trials", "compression", "reduction", "saved", "saving", "savings"}
)  # fmt: skip
"""Words of what is known of a metric and is not the metric: `test_acc_std` and `acc_reduction` are no accuracies."""
TURNED = frozenset({"inverse", "inverted", "inv", "reciprocal", "neg", "negative", "negated", "minus"})
"""Words that turn something around, and do not say how much of the name: `inverse_latency` is no latency."""
ZERO_COST = (("zero", "cost"), ("zero", "costs"))
"""Words of a score that takes no training: `zero_cost_score` is no cost."""
MEASURES = frozenset({"ms", "us", "mj"})
"""Words that say at the end of a name how all of it is measured, such as `latency_per_image_ms`."""
PARTS = frozenset({"test", "valid", "val", "validation", "train", "eval"})
"""Names that end with a part of the data are accuracies, as NAS-Bench-201's `c10_test200`."""

COUNTS = frozenset({"n", "num", "nr", "number", "total"})
"""Words before a part of the data that make it a count of samples: `n_train` is no accuracy."""

TOLD = re.compile(r"(.*\S) \((more|less) is better\)")
"""A column's name in a file, with the direction that someone gave for it."""


def words(metric: str) -> list[str]:
    """Return the words of a name in lower case. Anything but a letter ends a word, and so does `testLoss`'s capital."""
    metric = re.sub(r"(?<![A-Za-z])(?:mAP|m?IoU)(?![a-z])", lambda name: name[0].lower(), metric)
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", metric)
    return [word.lower() for word in re.findall(r"[^\W\d_]+", parted)]


@functools.cache
def kind_of(metric: str) -> Kind | None:
    """Return the kind of a metric by the words of its name, or None if they do not tell.

    A word for a cost decides before those for gains: `top1_err` is an error, `accuracy_drop` a loss. An accuracy and
    another cost are unknown: `acc_at_size_224`. What follows "per" is a unit: `images_per_second` is no time, and
    `gflops_per_watt`, of two costs, is unknown.
    """
    named = words(metric)
    if "per" in named[:-2] and named[-1] in MEASURES:
        named.pop()
    unit = named[named.index("per") :] if "per" in named else []
    named = named[: len(named) - len(unit)]
    if not (ABOUT | TURNED).isdisjoint(named):
        return None
    costs = not LESS.isdisjoint(named)
    if not (LESS - LOST).isdisjoint(named) and not ACCURACIES.isdisjoint(named) and LOST.isdisjoint(named):
        return None
    if any(pair in ZERO_COST for pair in itertools.pairwise(named)):
        return None
    if not GAINS.isdisjoint(named):
        return None if costs else "more"
    if costs:
        return "less" if LESS.isdisjoint(unit) else None
    if not ACCURACIES.isdisjoint(named):
        return "accuracy"
    if not MORE.isdisjoint(named):
        return "more"
    return "accuracy" if named and named[-1] in PARTS and COUNTS.isdisjoint(named) else None


def is_deviation_of_accuracy(metric: str) -> bool:
    """Return whether a metric is the standard deviation of an accuracy, in its unit."""
    named = words(metric)
    return not DEVIATIONS.isdisjoint(named) and not ACCURACIES.isdisjoint(named)


def possible(kind: Kind | None, value: float) -> bool:
    """Return whether a metric of a kind can have a value."""
    if kind is None or kind == "more":
        return math.isfinite(value)
    return 0 <= value <= (100 if kind == "accuracy" else math.inf) and math.isfinite(value)


def expected(kind: Kind | None) -> str:
    """Return the words of an error for the values that a metric of a kind can have."""
    if kind == "accuracy":
        return "an accuracy in %, from 0 to 100"
    return "a finite number, 0 or more" if kind == "less" else "a finite number"
