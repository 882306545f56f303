"""The contract of a dataset: its properties, its pool and the batches of its subsets."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from tanglenas_engine.data import Dataset, make_splits, open_splits


def check_dataset(make_dataset: Callable[[], Dataset]) -> None:
    """Run all checks of this module.

    Args:
        make_dataset: Makes the dataset anew, with the same options each time.
    """
    check_pool(make_dataset)
    check_batches(make_dataset)


def check_pool(make_dataset: Callable[[], Dataset]) -> None:
    """Check that the pool has samples, labels that fit its classes, and a fingerprint that identifies the data."""
    dataset, again = make_dataset(), make_dataset()
    assert len(dataset) > 0, "the dataset is empty"
    assert isinstance(dataset.fingerprint, str) and dataset.fingerprint, "the fingerprint must be a string"
    assert dataset.fingerprint == again.fingerprint, "the fingerprint of the same data differs from time to time"
    assert dataset.space_options(), "space_options() names no option by which a space fits the data"
    if dataset.labels is not None:
        assert dataset.labels.dtype == torch.int64 and dataset.labels.shape == (len(dataset),), (
            f"labels are {dataset.labels.dtype} of shape {tuple(dataset.labels.shape)}, expected int64 of shape (N,)"
        )
        low, high = int(dataset.labels.min()), int(dataset.labels.max())
        assert 0 <= low and high < dataset.num_classes, (
            f"labels go from {low} to {high}, expected 0 to {dataset.num_classes - 1}"
        )
        assert len(dataset.class_names) == dataset.num_classes, "class_names does not name every class once"
    try:
        json.dumps([dataset.input_config(), dataset.files()])
    except TypeError as error:
        raise AssertionError(
            f"input_config() and files(), which are stored beside weights, have no form in JSON: {error}"
        ) from None


def check_batches(make_dataset: Callable[[], Dataset]) -> None:
    """Check that batches have the right shapes and, without augmentation, never change."""
    dataset = make_dataset()
    splits = make_splits(dataset, seed=0)
    view = open_splits(dataset, splits, ("weights", "validation"))
    for name in ("weights", "validation"):
        samples = getattr(view, name)
        count = min(4, len(samples))
        torch.manual_seed(0)
        inputs, targets = samples.batch(torch.arange(count))
        assert len(inputs) == len(targets) == count, f"a batch of {count} has {len(inputs)} inputs"
        assert targets.dtype == torch.int64, f"targets are {targets.dtype}, expected int64"
        if dataset.labels is not None:
            shape = (count, dataset.in_channels, dataset.image_size, dataset.image_size)
            assert inputs.shape == shape, f"inputs have shape {tuple(inputs.shape)}, expected {shape}"
            assert inputs.dtype == torch.float32, f"inputs are {inputs.dtype}, expected float32"
    torch.manual_seed(1)
    again, _ = view.validation.batch(torch.arange(count))
    assert again.equal(inputs), "the validation split is augmented: subset(indices, train=False) must not draw anything"
