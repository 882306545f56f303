"""The contract of a search space: its architectures, corners, costs and gradients, and a search of it."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tanglenas_engine.elastic.parts import reference
from tanglenas_engine.errors import describe, unknown
from tanglenas_engine.plugins import create_optimizer
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.products import count_products
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.testing.optimizers import check_resume, check_stages

M = TypeVar("M", bound=nn.Module)
ENUMERATED = 1000
"""The largest number of combinations of decisions that are gone through."""
PLANTED = 7.0
"""A value that no new weight has."""
OPTIMIZERS = ("drnas", "spos")
"""An optimizer that learns the architecture, and one that samples it."""


def check_space(make_space: Callable[[], SearchSpace], idle: Collection[str] = ()) -> None:
    """Run all checks of this module.

    Args:
        make_space: Makes the space anew, with the same options each time; small ones are checked faster.
        idle: Choices that do nothing, on purpose.
    """
    check_architectures(make_space)
    check_corners(make_space)
    check_standalone(make_space)
    check_costs(make_space)
    check_learning(make_space, idle)
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
        for what, whole in (
            ("assignment_of", space.architecture_of(space.assignment_of(read))),
            ("from_string(to_string)", space.from_string(space.to_string(architecture))),
            ("most_probable(one_hot)", space.most_probable(space.one_hot(architecture))),
        ):
            assert whole == architecture, f"the space takes {architecture} for {whole} by {what}"
    if math.prod(map(len, space.decisions())) <= ENUMERATED:
        every = sum(1 for _ in space.all_architectures())
        assert space.size == every, f"the size is {space.size}, but the decisions make {every} architectures"
    distinct = len({architecture.digest for architecture in found})
    assert space.size >= distinct, f"the size is {space.size}, but {distinct} different architectures were drawn"
    assignment = space.assignment_of(space.largest())
    moved = [space.architecture_of({**assignment, **move}) for move in space.moves(assignment)]
    for architecture in moved:
        space.assignment_of(architecture)
    assert space.size == 1 or any(one != space.largest() for one in moved), "moves() leads to no other architecture"


@torch.no_grad()
def check_corners(make_space: Callable[[], SearchSpace], tolerance: float = 1e-9) -> None:
    """Check that the supernet computes for an architecture what the network extracted from it computes.

    What a forward writes, such as the statistics of batch norms, is compared, too.

    Args:
        tolerance: The largest difference, as a share of the largest output where that is above 1. Networks compute in
            float64 here. One that computes a part of it in float32 all the same, such as its norms, needs 1e-6.
    """
    space = _without_dropout(_moved(make_space().double()))
    saved = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    for architecture, training in product([space.smallest(), space.largest(), *_samples(space, 3)], (False, True)):
        space.load_state_dict(saved)
        network, inputs = _without_dropout(space.train(training).extract(architecture)), _inputs(space, 3)
        if training and not _deterministic(network, inputs):
            continue  # what draws numbers all the same draws others in a network of another size
        assert training or _deterministic(network, inputs), (
            f"two forwards of the network of {architecture} in evaluation mode differ: is there dropout that does not "
            "ask for self.training?"
        )
        mode = "training" if training else "evaluation"
        for path in ("slices", "exact", "gated"):
            space.load_state_dict(saved)
            network = _without_dropout(space.extract(architecture))
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
            if not training:
                assert space(inputs).equal(got), (
                    f"{architecture}: two forwards of the supernet ({path}) in evaluation mode differ: it keeps "
                    "something from one to the next"
                )
                alone = float((space(inputs[:1]) - got[:1]).abs().max())
                assert alone <= tolerance * max(1.0, float(got.abs().max())), (
                    f"{architecture}: in evaluation mode, the output of a sample depends on others of its batch"
                )
            kept = space.inherited(architecture)
            for name, own in network.state_dict().items():
                assert torch.allclose(kept[name], own, rtol=tolerance, atol=tolerance), (
                    f"{architecture}: after a forward in {mode} mode, {name} of the supernet ({path}) is another than "
                    "that of the extracted network: does a forward write its statistics into a copy?"
                )


def check_standalone(make_space: Callable[[], SearchSpace]) -> None:
    """Check that a standalone network is a new one, and `export` writes the network that it is given."""
    space = make_space()
    for parameter in space.parameters():
        parameter.data.fill_(PLANTED)
    own = {parameter.untyped_storage().data_ptr() for parameter in space.parameters()}
    learning = {name for name, parameter in space.named_parameters() if parameter.requires_grad}
    for architecture in (space.smallest(), space.largest(), *_samples(space, 1)):
        network = space.standalone(architecture)
        for name, parameter in network.named_parameters():
            assert parameter.untyped_storage().data_ptr() not in own, (
                f"{name} of a standalone network is that of the supernet"
            )
            assert not bool((parameter == PLANTED).all()), (
                f"{name} of a standalone network has the supernet's values: initialise it anew, by reset_parameters() "
                "of its layer"
            )
            assert parameter.requires_grad or name not in learning, f"{name} of a standalone network is frozen"
    _moved(network)
    with tempfile.TemporaryDirectory() as folder:
        space.export(network, architecture, Path(folder))
        written: dict[str, Tensor] = {}
        for path in Path(folder).rglob("*.safetensors"):
            written |= load_file(path)
    state = network.state_dict()
    known = {name for name in written if name in state}
    assert known or space.to_transformers(network) is not None, "export() writes no weights of the network"
    for name in known:
        assert written[name].equal(state[name]), f"export() writes another {name} than that of the network"


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
        try:
            products = count_products(network, _inputs(space, 1))
        except Exception as error:
            raise AssertionError(
                f"the products of {architecture} cannot be counted on tensors without values: make other tensors that "
                "a forward uses buffers, on the device of its inputs, and read no value from a tensor. "
                f"{describe(error)}"
            ) from error
        assert cost.macs == products, (
            f"{architecture} costs {cost.macs} multiply-accumulates, torch counts {products} in its network: give "
            "elastic layers of your own a method `macs`, and compute products of chosen sizes in elastic layers only"
        )
        expected = space.expected_cost(space.one_hot(architecture))
        for metric in ("params", "macs"):
            exact, soft = getattr(cost, metric), float(getattr(expected, metric))
            assert abs(soft - exact) <= 1e-6 * exact, f"{architecture}: {exact} {metric}, but {soft} expected"


def check_learning(make_space: Callable[[], SearchSpace], idle: Collection[str] = ()) -> None:
    """Check that every weight of the supernet gets a finite gradient, and every architecture parameter one that counts.

    Args:
        idle: Choices that do nothing, on purpose.
    """
    space = _moved(make_space()).train()
    for name in idle:
        if name not in space.choices:
            raise unknown(f"idle choice of {space.label}", name, space.choices)
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
    for name, alpha in alphas.items():
        choice = space.choices[name]
        if name not in idle and len(choice.options) > 1:
            assert alpha.grad is not None
            for row, gradient in zip(choice.rows, alpha.grad.reshape(-1, len(choice.options)), strict=True):
                assert bool(gradient.any()), (
                    f"alpha of {row!r} gets a gradient of zeros only: the output does not depend on this choice. One "
                    "that is meant to do nothing is named in `idle`, or with --idle"
                )


def check_search(make_space: Callable[[], SearchSpace]) -> None:
    """Check that a gradient search and a sampling search run through all stages, and a search resumes."""
    for name in OPTIMIZERS:
        check_stages(lambda name=name: create_optimizer(name), make_space)  # type: ignore[misc]
    check_resume(lambda: create_optimizer(OPTIMIZERS[0]), make_space)


def _samples(space: SearchSpace, count: int) -> list[Architecture]:
    generator = torch.Generator().manual_seed(0)
    return [space.sample(generator) for _ in range(count)]


def _moved(space: M) -> M:
    """Return a module with all parameters moved away from 0 and 1.

    Fresh biases and gains would hide mistakes.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in space.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    return space


def _without_dropout(module: M) -> M:
    """Return a module whose dropout and stochastic depth drop nothing."""
    for part in module.modules():
        for name in ("p", "drop_prob"):
            if "Drop" in type(part).__name__ and hasattr(part, name):
                setattr(part, name, 0.0)
    return module


def _inputs(space: SearchSpace, batch: int) -> Tensor:
    inputs = space.example_input(batch)
    return inputs.to(reference(space).dtype) if inputs.is_floating_point() else inputs


def _deterministic(network: nn.Module, inputs: Tensor) -> bool:
    """Return whether a forward pass draws nothing at random."""
    try:
        return bool(network(inputs).equal(network(inputs)))
    except Exception:  # the caller runs the network again and reports the error
        return True
