"""Comparison of a space made of a model with that model, and of its architectures with the networks extracted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine.errors import TangleNASError, describe
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.products import count_products
from tanglenas_engine.spaces.space import SearchSpace

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""The largest difference of outputs that rounding explains, as a share of the largest output.

A model may compute parts of its forward in float32, whatever its weights are.
"""
SAMPLES = 2


def failing_choices(space: SearchSpace, model: nn.Module, output: Callable[[Any], Any]) -> dict[str, str]:
    """Return the choices whose architectures are not the networks extracted for them, with a sentence each.

    All is compared in evaluation and in float64, or in float32 if the model computes in that alone. Noise is added to
    the parameters, because fresh zeros would hide mistakes.

    Raises:
        TangleNASError: The model does not compute in one floating type, the largest network differs from it, or
            architectures differ without a choice that does so alone.
    """
    try:
        with torch.no_grad():
            x = space.example_input(2).to(next(model.parameters()).device)
            output(copy.deepcopy(model).double().eval()(x.double() if x.is_floating_point() else x))
    except Exception:
        return _failing(space, model, output, torch.float32)
    return _failing(space, model, output, torch.float64)


@torch.no_grad()
def _failing(
    space: SearchSpace, model: nn.Module, output: Callable[[Any], Any], precision: torch.dtype
) -> dict[str, str]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        space = copy.deepcopy(space).to(precision).eval()
        x = space.example_input(2).to(next(space.parameters()).device)
        x = x.to(precision) if x.is_floating_point() else x
        for parameter in space.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        reference = copy.deepcopy(model).to(precision).eval()
        own = dict(reference.named_parameters(remove_duplicate=False))
        # Parameters are copied by name: the loading of a model may depend on a version, which spaces do not have.
        for name, parameter in space.named_parameters():
            own[name].copy_(parameter)
        try:
            expected: Tensor = output(_called(reference, x))
        except Exception as error:
            raise TangleNASError(
                f"{type(model).__name__} cannot be computed in one floating type, as spaces are: {describe(error)}. "
                "Take conversions to a fixed type out of its forward, and choose precision by `search.precision`"
            ) from error
        try:
            got = _called(space, x)
        except Exception as error:
            raise TangleNASError(
                f"the recording of {type(model).__name__} cannot be repeated: {describe(error)}"
            ) from error
        if expected.shape != got.shape or not _close(expected, got, precision):
            raise TangleNASError(
                f"the recording of {type(model).__name__} computes something else than the model, so that it cannot "
                "become a space"
            )
        generator = torch.Generator().manual_seed(0)
        found = [space.smallest(), *(space.sample(generator) for _ in range(SAMPLES))]
        if all(_is_extracted(space, architecture, x, precision) is None for architecture in found):
            return {}
        failing: dict[str, str] = {}
        largest = space.largest().choices
        for name, choice in space.choices.items():
            least = min(choice.options)
            one = [least] * len(choice) if choice.layered else least
            architecture = space.architecture(**{**largest, name: one})
            if (reason := _is_extracted(space, architecture, x, precision)) is not None:
                failing[name] = reason
    if not failing:
        raise TangleNASError(
            f"{type(model).__name__} cannot become a space: its architectures differ from the networks extracted for "
            "them"
        )
    return failing


def _is_extracted(space: SearchSpace, architecture: Architecture, x: Tensor, precision: torch.dtype) -> str | None:
    """Return None if the supernet computes an architecture as its network does, at its cost, else the reason."""
    try:
        network = space.extract(architecture).eval()
        if (reason := _miscounted(space, architecture, network)) is not None:
            return reason
        expected = _called(network, x)
        for relaxation in (None, "exact", "gated"):
            if relaxation is None:
                space.select(architecture)
            else:
                space.relaxation = relaxation
                space.relax(space.one_hot(architecture))
            got = _called(space, x)
            if expected.shape != got.shape or not _close(expected, got, precision):
                return "its architectures differ from the networks extracted for them"
    except Exception as error:
        return f"its architectures cannot be computed: {describe(error)}"
    finally:
        space.release()
    return None


def _called(network: nn.Module, x: Tensor) -> Any:
    """Return what a network computes for inputs that it may change, with the same random numbers in every call."""
    torch.manual_seed(0)
    return network(x.clone())


def _miscounted(space: SearchSpace, architecture: Architecture, network: nn.Module) -> str | None:
    """Return None if the cost of an architecture is what its network multiplies, else the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cost of the space itself warns
        counted, cost = count_products(network, space.example_input(1)), space.cost(architecture).macs
    return None if counted == cost else "its multiply-accumulates do not follow from its sizes"


def _close(expected: Tensor, got: Tensor, precision: torch.dtype) -> bool:
    expected, got = expected.double(), got.double()
    return bool((expected - got).abs().max() <= TOLERANCES[precision] * expected.abs().max().clamp_min(1e-3))
