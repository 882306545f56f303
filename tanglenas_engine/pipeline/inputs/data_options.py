"""The options of a space that the dataset decides, as the reason why weights do not fit it."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping

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

    The space is made again with each of these options doubled. An option explains a dimension if it then changes.

    Args:
        space: A space that `create_space` made.
        dataset: The dataset.
        shapes: The shapes of tensors in the file of weights and in the space, by name.
    """
    made = space.created_with or {}
    found: dict[str, str] = {}
    for option, value in dataset.space_options().items():
        if not isinstance(value, int) or made.get(option) != value or found.keys() >= shapes.keys():
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
                    found.setdefault(name, _remedy(dataset, option, value, value * a // b if proportional else None))
    return found


def _remedy(dataset: Dataset, option: str, value: int, wanted: int | None) -> str:
    """Return a sentence with the datasets that can have another value of an option.

    Args:
        dataset: The dataset.
        option: The option of spaces.
        value: Its value for the dataset.
        wanted: Its value for the weights, or None if it is not known.
    """
    name = SET_BY.get(option, option)
    datasets = [it.name for it in manager().registrations("dataset") if name in _options(it)]
    remedy = f"set create_dataset.{name}" + (f" = {wanted}" if wanted and name == option else " to that of the weights")
    if dataset.name not in datasets:
        remedy = f"choose {' or '.join(datasets)}, and {remedy}" if datasets else "choose another dataset"
    return (
        f"The dataset {dataset.name!r} gives the space {option} = {value}, and the network of the weights has "
        f"{wanted or 'another one'}: {remedy}, or choose other weights"
    )


def _options(dataset: Registration) -> Container[str]:
    try:
        return options_of(dataset.load())[0] or ()
    except TangleNASError:  # it cannot be imported
        return ()
