"""The contract of a search space: its architectures, corners, costs and gradients, and a search of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import product

import torch
from torch import Tensor, nn

from tanglenas_engine.errors import describe
from tanglenas_engine.plugins import create_optimizer
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.products import count_products
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.testing.optimizers import check_stages

OPTIMIZERS = ("drnas", "spos")
"""An optimizer that learns the architecture, and one that samples it."""


def check_space(make_space: Callable[[], SearchSpace]) -> None:
    """Run all checks of this module.

    Args:
        make_space: Makes the space anew, with the same options each time; small ones are checked faster.
    """
    check_architectures(make_space)
    check_corners(make_space)
    check_costs(make_space)
    check_learning(make_space)
    check_search(make_space)


def check_architectures(make_space: Callable[[], SearchSpace]) -> None:
    """Check that architectures are drawn from a generator alone, and read back from files as they were written."""
    space = make_space()
    assert space.choices, "the space has no choice: declare one with self.choice(...)"
    found = [space.smallest(), space.largest(), *_samples(space, 20)]
    again = [space.smallest(), space.largest(), *_samples(make_space(), 20)]
    assert found == again, "two spaces with the same options, or generators of the same seed, give other architectures"
    for architecture in found:
        read = Architecture.from_json(architecture.to_json())
        assert read == architecture, f"{architecture} is {read} when it is read back"
        whole = space.architecture_of(space.assignment_of(read))
        assert whole == architecture, f"the space takes {architecture} for {whole}"
    distinct = len({architecture.digest for architecture in found})
    assert space.size >= distinct, f"the size is {space.size}, but {distinct} different architectures were drawn"


@torch.no_grad()
def check_corners(make_space: Callable[[], SearchSpace], tolerance: float = 1e-9) -> None:
    """Check that the supernet computes for an architecture what the network extracted from it computes.

    What a forward writes, such as the statistics of batch norms, is compared, too.

    Args:
        tolerance: The largest difference, as a share of the largest output where that is above 1. Networks compute in
            float64 here. One that computes a part of it in float32 all the same, such as its norms, needs 1e-6.
    """
    space = _moved(make_space().double())
    saved = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    for architecture, training in product([space.smallest(), space.largest(), *_samples(space, 3)], (False, True)):
        space.load_state_dict(saved)
        network, inputs = space.train(training).extract(architecture), _inputs(space, 3)
        if training and not _deterministic(network, inputs):
            continue  # dropout draws one number for each unit, so the two networks draw different ones
        mode = "training" if training else "evaluation"
        for path in ("slices", "exact", "gated"):
            space.load_state_dict(saved)
            network = space.extract(architecture)
            if path == "slices":
                space.select(architecture)
            else:
                space.relaxation = path
                space.relax(space.one_hot(architecture))
            try:
                expected, got = network(inputs), space(inputs)
            except Exception as error:
                raise AssertionError(
                    f"{architecture} cannot be computed in {mode} mode ({path}): is every layer of a chosen size "
                    f"elastic? {describe(error)}"
                ) from error
            assert expected.shape == got.shape, f"shapes {tuple(expected.shape)} and {tuple(got.shape)}"
            difference = float((expected - got).abs().max())
            assert difference <= tolerance * max(1.0, float(expected.abs().max())), (
                f"{architecture}: the supernet ({path}) and the extracted network differ by up to {difference:.3g} "
                f"in {mode} mode: a layer of a chosen size is not elastic, or depends on the sizes of others"
            )
            kept = space.inherited(architecture)
            for name, own in network.state_dict().items():
                assert torch.allclose(kept[name], own, rtol=tolerance, atol=tolerance), (
                    f"{architecture}: after a forward in {mode} mode, {name} of the supernet ({path}) is another than "
                    "that of the extracted network: does a forward write its statistics into a copy?"
                )


def check_costs(make_space: Callable[[], SearchSpace]) -> None:
    """Check that an architecture costs what its network counts, and the expected cost at a corner is its cost."""
    space = make_space().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the assertion below says the same
        uncounted = space.cost_model.uncounted
    assert not uncounted, f"not every module's multiply-accumulates are known: {'; '.join(uncounted)}"
    for architecture in (space.smallest(), space.largest(), *_samples(space, 3)):
        cost = space.cost(architecture)
        network = space.extract(architecture)
        counted = sum(parameter.numel() for parameter in network.parameters())
        assert cost.params == counted, f"{architecture} costs {cost.params} parameters, its network has {counted}"
        assert cost.macs > 0, f"{architecture} costs {cost.macs} multiply-accumulates"
        products = count_products(network, _inputs(space, 1))
        assert cost.macs == products, (
            f"{architecture} costs {cost.macs} multiply-accumulates, torch counts {products} in its network: give "
            "elastic layers of your own a method `macs`, and compute products of chosen sizes in elastic layers only"
        )
        expected = space.expected_cost(space.one_hot(architecture))
        for metric in ("params", "macs"):
            exact, soft = getattr(cost, metric), float(getattr(expected, metric))
            assert abs(soft - exact) <= 1e-6 * exact, f"{architecture}: {exact} {metric}, but {soft} expected"


def check_learning(make_space: Callable[[], SearchSpace]) -> None:
    """Check that every weight of the supernet and every architecture parameter gets a finite gradient."""
    space = make_space().train()
    alphas = {name: torch.zeros(choice.shape, requires_grad=True) for name, choice in space.choices.items()}
    space.relax({name: alpha.softmax(-1) for name, alpha in alphas.items()})
    outputs = space(_inputs(space, 4))
    targets = torch.randint(outputs.shape[-1], outputs.shape[:-1])
    torch.autograd.backward(nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten()))
    named: Iterable[tuple[str, Tensor]] = [*space.named_parameters(), *alphas.items()]
    for name, parameter in named:
        what = f"alpha of the choice {name!r}" if name in alphas else f"the weight {name}"
        assert parameter.grad is not None, f"{what} gets no gradient: the output does not depend on it"
        assert bool(parameter.grad.isfinite().all()), f"{what} gets a gradient that is not finite"


def check_search(make_space: Callable[[], SearchSpace]) -> None:
    """Check that a gradient search and a sampling search run through all stages."""
    for name in OPTIMIZERS:
        check_stages(lambda name=name: create_optimizer(name), make_space)  # type: ignore[misc]


def _samples(space: SearchSpace, count: int) -> list[Architecture]:
    generator = torch.Generator().manual_seed(0)
    return [space.sample(generator) for _ in range(count)]


def _moved(space: SearchSpace) -> SearchSpace:
    """Return the space with all parameters moved away from 0 and 1.

    Fresh biases and gains would hide mistakes.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in space.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    return space


def _inputs(space: SearchSpace, batch: int) -> Tensor:
    inputs = space.example_input(batch)
    return inputs.to(next(space.parameters()).dtype) if inputs.is_floating_point() else inputs


def _deterministic(network: nn.Module, inputs: Tensor) -> bool:
    """Return whether a forward pass draws nothing at random."""
    try:
        return bool(network(inputs).equal(network(inputs)))
    except Exception:  # the caller runs the network again and reports the error
        return True
