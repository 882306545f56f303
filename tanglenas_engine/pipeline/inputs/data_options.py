"""The options of a space that the dataset decides, as the reason why weights do not fit it."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import torch

from tanglenas_engine.data import Dataset
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import create_space, manager
from tanglenas_engine.plugins.manager import options_of
from tanglenas_engine.plugins.types import Registration
from tanglenas_engine.spaces.space import SearchSpace

SET_BY = {"vocab_size": "tokenizer"}
"""The options of datasets that set an option of spaces, where these have different names."""


def remedies(
    space: SearchSpace, dataset: Dataset, shapes: Mapping[str, tuple[torch.Size, torch.Size]]
) -> dict[str, str]:
    """Return a remedy for each tensor whose shape differs because of an option that the dataset gives the space.

    The space is made again with each of these options doubled. An option explains a dimension if it then changes. A
    dimension may be a product of several.

    Args:
        space: A space that `create_space` made.
        dataset: The dataset.
        shapes: The shapes of tensors in the file of weights and in the space, by name.
    """
    made = space.created_with or {}
    reasons: dict[str, list[_Reason]] = {}
    for option, value in dataset.space_options().items():
        if not isinstance(value, int) or made.get(option) != value:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                doubled = create_space(space.name, **{**made, option: 2 * value}).state_dict()
        except Exception:  # a space may refuse a number in any way, and then the option explains nothing
            continue
        for name, (there, here) in shapes.items():
            other = doubled[name].shape if name in doubled else here
            if len({len(there), len(here), len(other)}) > 1:
                continue
            for a, b, c in zip(there, here, other, strict=True):
                if a != b and b != c:
                    proportional = c == 2 * b and value * a % b == 0
                    reason = _Reason(option, value, value * a // b if proportional else None)
                    reasons.setdefault(name, []).append(reason)
    return {name: _remedy(dataset, found) for name, found in reasons.items()}


class _Reason(NamedTuple):
    """An option that a dataset gives a space, its value, and that of the weights, or None if it is not known."""

    option: str
    value: int
    wanted: int | None


def _remedy(dataset: Dataset, reasons: Sequence[_Reason]) -> str:
    """Return a sentence with the ways to the weights' options. With several reasons, it is one of them or all."""
    given = " and ".join(f"{reason.option} = {reason.value}" for reason in reasons)
    only = reasons[0].wanted if len(reasons) == 1 else None
    ways = ", or ".join(_way(dataset, reason.option, only) for reason in reasons)
    return (
        f"The dataset {dataset.name!r} gives the space {given}, and the network of the weights has "
        f"{only or ('another one' if len(reasons) == 1 else 'others')}: {ways}, or choose other weights"
    )


def _way(dataset: Dataset, option: str, wanted: int | None) -> str:
    """Return how to have another value of an option, with the datasets that can."""
    name = SET_BY.get(option, option)
    datasets = [it.name for it in manager().registrations("dataset") if name in _options(it)]
    way = f"set create_dataset.{name}" + (f" = {wanted}" if wanted and name == option else " to that of the weights")
    if dataset.name in datasets:
        return way
    return f"choose {' or '.join(datasets)}, and {way}" if datasets else "choose another dataset"


def _options(dataset: Registration) -> Container[str]:
    try:
        return options_of(dataset.load())[0] or ()
    except TangleNASError:  # it cannot be imported
        return ()
