"""A check that a space fits a dataset."""

from __future__ import annotations

import torch
from torch import Tensor

from tanglenas_engine.data import Samples, TokenSamples, batches
from tanglenas_engine.elastic.parts import reference
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.space import SearchSpace

REMEDY = "correct the dataset's transform, its mean and std, or the files"
"""What to do about inputs that are not finite."""


def check_fit(space: SearchSpace, *splits: Samples) -> None:
    """Check that a space accepts a dataset's inputs and has an output for every class or token.

    Shapes and numbers are those of the first batch of the first split, so that no data are read twice. Labels and
    `TokenSamples` are in memory, and all of them are checked. Other samples of tokens are checked in the first 256
    windows.

    Args:
        space: The space.
        splits: The splits that a stage reads.

    Raises:
        TangleNASError: The shapes or the types of inputs or targets differ (the message has both), targets are no
            classes or tokens, inputs are not finite, or outputs are missing.
    """
    labels = splits[0].labels
    inputs, targets = next(batches(splits[0], 1))
    with torch.random.fork_rng(devices=[]):  # this check must not change the random numbers of a run
        wanted = space.example_input(1)
    if inputs.shape[1:] != wanted.shape[1:]:
        raise TangleNASError(
            f"the data are of shape {_shape(inputs)}, but the space {space.label} takes {_shape(wanted)}: create the "
            "space with what fits the dataset (image_size and in_channels, or block_size), or change the dataset's"
        )
    parameters = reference(space)
    kinds = _kinds(wanted.dtype, parameters.dtype)
    if inputs.dtype not in kinds:
        raise TangleNASError(
            f"the data are {inputs.dtype}, but the space {space.label} takes {kinds[0]}: let the dataset's transform "
            f"convert {'and normalise ' * wanted.is_floating_point()}them"
        )
    if targets.dtype != torch.int64:
        raise TangleNASError(
            f"the targets of the data are {targets.dtype}, expected torch.int64: a class for each sample, or a token "
            "for each position. Other targets, such as those of a regression, are not supported"
        )
    if told := not_finite(inputs):
        raise TangleNASError(f"{told} in the first batch of the data are not finite: {REMEDY}")
    wanted = wanted.to(parameters.device, parameters.dtype if wanted.is_floating_point() else None)
    with torch.no_grad(), space.as_largest():
        *positions, classes = space(wanted).shape
    if [*targets.shape] != positions:
        raise TangleNASError(
            f"the targets of a sample are of shape {tuple(targets.shape[1:])}, but the space {space.label} has outputs "
            f"for {tuple(positions[1:])}: expected targets (B,), a class for each sample, or (B, T), a token for each "
            "position"
        )
    largest = max(map(_largest, splits))
    if largest >= classes:
        kind, option = ("token", "vocab_size") if labels is None else ("class", "num_classes")
        raise TangleNASError(
            f"the data have a {kind} {largest}, but the space {space.label} has {classes} outputs: create it with "
            f"the dataset's {option}, which is at least {largest + 1}"
        )


def not_finite(inputs: Tensor) -> str:
    """Return how many numbers of a batch are not finite, such as "3 of 128 numbers", or ""."""
    count = inputs.numel() - int(inputs.isfinite().sum())
    return f"{count:,} of {inputs.numel():,} numbers" if count else ""


def _kinds(example: torch.dtype, parameters: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the types of inputs that a space takes: that of its example and, of floating-point ones, its parameters'.

    Tokens may have 32 or 64 bits.
    """
    if example.is_floating_point:
        return parameters, example
    return (torch.int64, torch.int32) if example in (torch.int64, torch.int32) else (example,)


def _largest(samples: Samples) -> int:
    """Return the largest label or token of a split, as far as it is in memory."""
    if samples.labels is not None:
        return int(samples.labels.max())
    if isinstance(samples, TokenSamples):
        return samples.largest
    return max(int(tokens.max()) for tokens in next(batches(samples, 256)))


def _shape(inputs: Tensor) -> str:
    kind = "" if inputs.is_floating_point() else " tokens"
    return " x ".join(str(n) for n in inputs.shape[1:]) + (" (C x H x W)" if inputs.dim() == 4 else kind)
