"""Comparison of a space made of a model with that model, and of its architectures with the networks extracted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine.errors import TangleNASError, describe
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace

TOLERANCE = 1e-6
"""The largest difference of outputs in float64 that rounding explains, as a share of the largest output.

A model may compute parts of its forward in float32, whatever its weights are.
"""
SAMPLES = 2


@torch.no_grad()
def failing_choices(space: SearchSpace, model: nn.Module, output: Callable[[Any], Any]) -> dict[str, str]:
    """Return the choices whose architectures are not the networks extracted for them, with a sentence each.

    All is compared in float64 and in evaluation, with noise added to the parameters: fresh zeros would hide mistakes.

    Raises:
        TangleNASError: The largest network differs from the model, or architectures differ without a choice that does
            so alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        space = copy.deepcopy(space).double().eval()
        x = space.example_input(2).to(next(space.parameters()).device)
        x = x.double() if x.is_floating_point() else x
        for parameter in space.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        reference = copy.deepcopy(model).double().eval()
        reference.load_state_dict(space.state_dict(), strict=False)
        expected, got = output(reference(x)), space(x)
        if expected.shape != got.shape or not _close(expected, got):
            raise TangleNASError(
                f"the recording of {type(model).__name__} computes something else than the model, so that it cannot "
                "become a space"
            )
        generator = torch.Generator().manual_seed(0)
        found = [space.smallest(), *(space.sample(generator) for _ in range(SAMPLES))]
        if all(_is_extracted(space, architecture, x) is None for architecture in found):
            return {}
        failing: dict[str, str] = {}
        largest = space.largest().choices
        for name, choice in space.choices.items():
            least = min(choice.options)
            one = [least] * len(choice) if choice.layered else least
            architecture = space.architecture(**{**largest, name: one})
            if (reason := _is_extracted(space, architecture, x)) is not None:
                failing[name] = reason
    if not failing:
        raise TangleNASError(
            f"{type(model).__name__} cannot become a space: its architectures differ from the networks extracted for them"
        )
    return failing


def _is_extracted(space: SearchSpace, architecture: Architecture, x: Tensor) -> str | None:
    """Return None if the supernet computes an architecture as its network does, else the reason."""
    try:
        expected = space.extract(architecture)(x)
        for relaxation in (None, "exact", "gated"):
            if relaxation is None:
                space.select(architecture)
            else:
                space.relaxation = relaxation
                space.relax(space.one_hot(architecture))
            got = space(x)
            if expected.shape != got.shape or not _close(expected, got):
                return "its architectures differ from the networks extracted for them"
    except Exception as error:
        return f"its architectures cannot be computed: {describe(error)}"
    finally:
        space.release()
    return None


def _close(expected: Tensor, got: Tensor) -> bool:
    expected, got = expected.double(), got.double()
    return bool((expected - got).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1e-3))
