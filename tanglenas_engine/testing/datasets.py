"""The contract of a dataset: its properties, its pool and the batches of its subsets."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable

import torch
from torch import Tensor

from tanglenas_engine.data import Dataset, Samples, make_splits, open_splits
from tanglenas_engine.errors import describe
from tanglenas_engine.runtime.seeding import seeded

CHECKED = 64
"""The samples of a split that are looked at, evenly spaced."""


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
    assert isinstance(dataset.edition(), str), f"edition() is {dataset.edition()!r}, expected a text"
    assert isinstance(dataset.describe(), str), f"describe() is {dataset.describe()!r}, expected a text"
    assert dataset.space_options(), "space_options() names no option by which a space fits the data"
    if dataset.labels is not None:
        assert dataset.labels.dtype == torch.int64 and dataset.labels.shape == (len(dataset),), (
            f"labels are {dataset.labels.dtype} of shape {tuple(dataset.labels.shape)}, expected int64 of shape (N,)"
        )
        low, high = int(dataset.labels.min()), int(dataset.labels.max())
        assert 0 <= low and high < dataset.num_classes, (
            f"labels go from {low} to {high}, expected 0 to {dataset.num_classes - 1}"
        )
        assert len({*dataset.class_names}) == len(dataset.class_names) == dataset.num_classes, (
            "class_names does not name every class once"
        )
        assert again.labels is not None and again.labels.equal(dataset.labels), (
            "two datasets of one fingerprint have other labels"
        )
    try:
        json.dumps([dataset.input_config(), dataset.files()])
    except TypeError as error:
        raise AssertionError(
            f"input_config() and files(), which are stored beside weights, have no form in JSON: {error}"
        ) from None


def check_batches(make_dataset: Callable[[], Dataset]) -> None:
    """Check that batches hold the samples of their split, have the right shapes, and follow from the seed."""
    dataset = make_dataset()
    splits = make_splits(dataset, seed=0)
    view, other = (open_splits(one, splits, ("weights", "validation")) for one in (dataset, make_dataset()))
    for name in ("weights", "validation"):
        samples, indices = getattr(view, name), splits.indices(name)
        assert len(samples) == len(indices), (
            f"subset() gives {len(samples)} samples for the {len(indices)} of the {name} split: does it ignore them?"
        )
        places = torch.arange(min(CHECKED, len(samples))) * len(samples) // min(CHECKED, len(samples))
        inputs, targets = _batch(samples, places)
        assert len(inputs) == len(targets) == len(places), f"a batch of {len(places)} has {len(inputs)} inputs"
        assert targets.dtype == torch.int64, f"targets are {targets.dtype}, expected int64"
        assert bool(inputs.isfinite().all()), f"inputs of the {name} split are not finite"
        _check_images(dataset, inputs)
        if dataset.labels is not None:
            right = dataset.labels[indices]
            assert samples.labels is not None and samples.labels.equal(right) and targets.equal(right[places]), (
                f"labels or targets of the {name} split are not those of its indices in the pool"
            )
        else:
            _check_tokens(dataset, inputs, targets)
        for again in (samples, getattr(other, name)):
            repeated = _batch(again, places)
            assert all(map(torch.equal, repeated, (inputs, targets))), (
                f"a batch of the {name} split differs when it is drawn again with one seed: augmentation must draw "
                "from the global generators of torch, random and numpy"
            )
        try:
            pickle.dumps(samples)
        except Exception as error:
            raise AssertionError(
                f"samples of the {name} split cannot be pickled, as spawned workers need: {describe(error)}"
            ) from None
    torch.manual_seed(1)
    again, _ = view.validation.batch(places)
    assert again.equal(inputs), "the validation split is augmented: subset(indices, train=False) must not draw anything"
    _check_rows(dataset, splits.indices("validation")[places], inputs, targets)
    _check_alone(dataset)


def _check_rows(dataset: Dataset, indices: Tensor, inputs: Tensor, targets: Tensor) -> None:
    """Check that a batch of samples without augmentation has the rows that each sample has alone."""
    for row, index in enumerate(indices):
        alone = _batch(dataset.subset(index[None], train=False), torch.zeros(1, dtype=torch.long))
        for what, own, found in zip(("input", "target"), alone, (inputs[row], targets[row]), strict=True):
            assert own[0].shape == found.shape and torch.allclose(own[0], found, rtol=1e-3, atol=1e-3), (
                f"the {what} of sample {int(index)} of the pool is another one in a batch of the validation split than "
                "alone: subset(indices, train) must give the samples at indices, and batch(indices) in their order"
            )


def _check_alone(dataset: Dataset) -> None:
    """Check that a subset holds no other samples than its own, by the bytes in which workers get it."""
    everything = torch.arange(len(dataset))
    few, whole = (len(pickle.dumps(dataset.subset(it, train=False))) for it in (everything[:2], everything))
    inputs, _ = _batch(dataset.subset(everything[:1], train=False), torch.zeros(1, dtype=torch.long))
    # Samples that are held have a byte for each number at least. What has fewer bytes may be a tokenizer, say.
    assert few < whole / 2 or few < len(everything) * inputs[0].numel(), (
        f"subset() of 2 samples takes {few:,} bytes and that of all {len(everything):,} takes {whole:,}: it holds the "
        "samples of other splits. Copy the rows at indices, and no more"
    )


def _batch(samples: Samples, places: Tensor) -> tuple[Tensor, Tensor]:
    with seeded(0):
        return samples.batch(places)


def _check_images(dataset: Dataset, inputs: Tensor) -> None:
    options = dataset.space_options()
    if not {"in_channels", "image_size"} <= {*options}:
        return
    shape = (len(inputs), options["in_channels"], options["image_size"], options["image_size"])
    assert inputs.shape == shape, f"inputs have shape {tuple(inputs.shape)}, expected {shape}"
    assert inputs.dtype == torch.float32, f"inputs are {inputs.dtype}, expected float32"


def _check_tokens(dataset: Dataset, inputs: Tensor, targets: Tensor) -> None:
    options = dataset.space_options()
    if not {"vocab_size", "block_size"} <= {*options}:
        return
    shape, most = (len(inputs), options["block_size"]), options["vocab_size"]
    for what, tokens in (("inputs", inputs), ("targets", targets)):
        assert tokens.dtype == torch.int64 and tokens.shape == shape, (
            f"{what} are {tokens.dtype} of shape {tuple(tokens.shape)}, expected int64 of shape {shape}"
        )
        assert 0 <= int(tokens.min()) and int(tokens.max()) < most, (
            f"{what} have tokens from {int(tokens.min())} to {int(tokens.max())}, expected 0 to {most - 1}"
        )
    assert targets[:, :-1].equal(inputs[:, 1:]), "targets are not the tokens that follow those of the inputs"
