"""The contract of an optimizer: its samples, its gradients, resumption, and a run of all stages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tanglenas_engine.data import SPLITS, DataView, TensorSamples
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.optimizers.optimizer import Optimizer, Step
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.progress import SilentProgress
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.stages.discretize import discretize
from tanglenas_engine.stages.evaluate import evaluate
from tanglenas_engine.stages.search import search
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.superposition.size import Row
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_engine.training.optim import parameter_groups

SCALE = 1024.0
"""A factor of the loss, as half precision has it."""
SEED = 3
SAMPLES = 8
BATCH = 4
DRAWS = 8
"""The number of samples to draw. At least one of them must give alpha a gradient that depends on the batch.

A sample whose gates are all 0 or 1 gives no such gradient, and neither does a cell whose operations cut the input off.
So one draw is not enough. In a space of two architectures, so many draws have both.
"""


def check_optimizer(make_optimizer: Callable[[], Optimizer], make_space: Callable[[], SearchSpace]) -> None:
    """Run all checks of this module on one space.

    Args:
        make_optimizer: Makes the optimizer anew, with the same options each time.
        make_space: Makes the space; a small one is enough.
    """
    check_sampling(make_optimizer, make_space)
    check_gradients(make_optimizer, make_space)
    check_resume(make_optimizer, make_space)
    check_stages(make_optimizer, make_space)


def check_sampling(make_optimizer: Callable[[], Optimizer], make_space: Callable[[], SearchSpace]) -> None:
    """Check that samples fit the space and are a pure function of (seed, step, stream)."""
    space = make_space()
    optimizer = _bound(make_optimizer, space)
    learns, expected = optimizer.learns_architecture, optimizer.expected()
    assert bool(optimizer.alphas) == learns, f"learns_architecture is {learns}, but alphas has {len(optimizer.alphas)}"
    assert (expected is not None) == learns, f"learns_architecture is {learns}, but expected() is {expected}"
    if expected is not None:
        _check_simplex(expected, "expected()")

    before = torch.get_rng_state()
    first = [optimizer.sample(step, stream) for step in range(DRAWS) for stream in ("weight", "architecture")]
    assert before.equal(torch.get_rng_state()), "sample() draws from torch's global generator, or seeds it"
    for sample in first:
        if isinstance(sample, Mixture):
            _check_simplex(sample, "sample()")
            grown = any(stack.requires_grad for stack in sample.stacks.values())
            assert grown or not learns, "the mixture that sample() gives does not depend on alpha"
        else:
            assert isinstance(sample, Architecture), f"sample() gives {type(sample).__name__}"
            space.assignment_of(sample)

    torch.rand(7)
    again = _bound(make_optimizer, space)
    second = [again.sample(step, stream) for step in reversed(range(DRAWS)) for stream in ("architecture", "weight")]
    for one, other in zip(first, reversed(second), strict=True):
        same(_plain(one), _plain(other), "sample() in another order and with another state of the global generator")
    weight, architecture = first[::2], first[1::2]
    if any(_plain(sample) != _plain(weight[0]) for sample in weight):
        pairs = zip(weight, architecture, strict=True)
        assert any(_plain(w) != _plain(a) for w, a in pairs), "the streams 'weight' and 'architecture' draw the same"
    draws = any(_plain(sample) != _plain(weight[0]) for sample in weight)
    if space.size > 1 and not learns:
        assert draws, "sample() gives the same architecture in each step: every step would train one network"
    if draws:
        reseeded = make_optimizer()
        reseeded.bind(space, SEED + 1)
        third = [reseeded.sample(step, "weight") for step in range(DRAWS)]
        assert any(_plain(a) != _plain(b) for a, b in zip(weight, third, strict=True)), (
            "sample() gives the same for another seed of the search: draw by self.derive_seed(step, stream)"
        )
    if (not learns or optimizer.draws_in_band) and all(_is_corner(sample) for sample in first):
        _check_source(_bound(make_optimizer, space), space)
    again.set_progress(1.0)
    for what, last in (("expected()", again.expected()), ("sample()", again.sample(0, "weight"))):
        if isinstance(last, Mixture):
            _check_simplex(last, f"at the end of the search, {what}")


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [torch.zeros_like(a) if a.grad is None else a.grad.clone() for a in optimizer.alphas.values()]


def _is_corner(sample: object) -> bool:
    """Return True for an architecture, and for a mixture whose rows are one-hot."""
    if not isinstance(sample, Mixture):
        return isinstance(sample, Architecture)
    return all(bool(((it > 1 - 1e-4) | (it.abs() < 1e-4)).all()) for it in sample.stacks.values())


class _Single:
    """A source of one architecture."""

    def __init__(self, architecture: Architecture):
        self._architecture = architecture

    def sample(
        self, generator: torch.Generator | None = None, scores: Mapping[Row, Sequence[float]] | None = None
    ) -> Architecture:
        return self._architecture


def _check_source(optimizer: Optimizer, space: SearchSpace) -> None:
    """Check that an optimizer draws architectures, or mixtures of one each, from the source that a search gives it.

    Its weight steps may train the largest network of the space, too, which can teach the others.
    One that refuses another source than the space, by a `TangleNASError`, refuses searches with a target.
    """
    step = _step(space.train(), random_data(space, ("weights",)))
    for architecture in (space.smallest(), space.largest()):
        try:
            optimizer.draw_from(_Single(architecture))
        except TangleNASError:
            return
        drawn = [optimizer.sample(number, "weight") for number in range(3)]
        samples = {space.most_probable(it) if isinstance(it, Mixture) else it for it in drawn}
        trained = [space.superposition.assignment for _ in optimizer.weight_losses(step)]
        paths = {space.architecture_of(assignment) for assignment in trained if assignment is not None}
        for method, given in (("sample()", samples), ("weight_losses()", paths - {space.largest()})):
            assert given <= {architecture}, (
                f"{method} gives architectures that draw_from() left out, so a search with a target is not within its "
                "band: take them from self.draw(step, stream), or let draw_from() refuse other sources than self.space"
            )
    space.release()


def check_gradients(make_optimizer: Callable[[], Optimizer], make_space: Callable[[], SearchSpace]) -> None:
    """Check that an architecture step moves alpha only, and a weight step of an alternating search the weights only."""
    space = make_space()
    optimizer = _bound(make_optimizer, space)
    optimizer.set_progress(0.0)
    data = random_data(space, ("weights", "architecture"))
    step = _step(space.train(), data)
    if optimizer.learns_architecture:
        step.architecture_batch = data.architecture.batch(torch.arange(SAMPLES))
    if optimizer.learns_architecture:
        before = [(parameter.detach().clone(), parameter.requires_grad) for parameter in space.parameters()]
        for step.index in range(DRAWS):
            optimizer.architecture_backward(replace(step, architecture_batch=step.weight_batch))
            other = _gradients(optimizer)
            loss = optimizer.architecture_backward(step)
            if depends := not all(map(torch.equal, _gradients(optimizer), other)):
                break
        assert loss.isfinite(), f"architecture_backward gives the loss {float(loss)}"
        assert not loss.requires_grad, "architecture_backward must give a detached loss: it would keep the graph alive"
        _check_gradient(optimizer.alphas.values(), "alpha, after architecture_backward,")
        for (name, parameter), (value, learning) in zip(space.named_parameters(), before, strict=True):
            assert parameter.grad is None, f"architecture_backward leaves a gradient in {name}"
            assert parameter.equal(value), f"architecture_backward changes {name}"
            assert parameter.requires_grad == learning, f"architecture_backward leaves {name} frozen, or thawed"
        first = _gradients(optimizer)
        optimizer.architecture_backward(replace(step, scale=torch.tensor(SCALE)))
        for own, scaled in zip(first, _gradients(optimizer), strict=True):
            assert torch.allclose(SCALE * own, scaled, rtol=1e-2, atol=SCALE * 1e-6), (
                "alpha's gradient does not grow with step.scale: multiply the loss by it before a backward pass, as "
                "half precision needs"
            )
        assert depends, "alpha's gradient does not depend on the architecture batch"
        for alpha in optimizer.alphas.values():
            alpha.grad = None

    for term in optimizer.weight_losses(step):
        torch.autograd.backward(term)
    _check_gradient([p for p in space.parameters() if p.grad is not None], "the weights, after weight_losses,")
    for alpha in optimizer.alphas.values():
        assert alpha.grad is None or not alpha.grad.any(), "weight_losses of an alternating search reach alpha"

    if optimizer.learns_architecture and optimizer.simultaneous:
        step.architecture_batch = None
        for step.index in range(DRAWS):
            for term in optimizer.weight_losses(step):
                torch.autograd.backward(term)
            if any(bool(alpha.grad is not None and alpha.grad.any()) for alpha in optimizer.alphas.values()):
                break
        _check_gradient(optimizer.alphas.values(), "alpha, after weight_losses of a simultaneous search,")
    space.release()


def check_resume(
    make_optimizer: Callable[[], Optimizer],
    make_space: Callable[[], SearchSpace],
    cuts: Sequence[int] = (3, 6),
    **options: Any,
) -> None:
    """Check that a search that is cut off and resumed ends in the same state, bit for bit, as one that is not.

    Args:
        cuts: The steps at which the search is cut off, one after another, before they are saved: it goes on from the
            step before. It has 6 steps in 3 epochs, so it goes on at an epoch's start and within one.
        options: Options of `search`; they override the small ones of this check.
    """
    ends = []
    for stops in ((), cuts):
        with tempfile.TemporaryDirectory() as folder:
            for stop in (*stops, None):
                with CheckpointFolder(Path(folder, "checkpoints"), "check_resume") as checkpoints:
                    torch.manual_seed(SEED)
                    space, optimizer = make_space(), make_optimizer()
                    data = random_data(space, ("weights", "architecture", "validation"))
                    try:
                        small = dict(epochs=3, batch_size=BATCH, seed=SEED, checkpoint_every=1)
                        search(
                            space,
                            optimizer,
                            data,
                            **{**small, **options},
                            checkpoints=checkpoints,
                            progress=CutAfter(stop),
                        )
                    except CutOff:
                        assert stop is not None
                    else:
                        assert stop is None, f"the search ended before step {stop}"
                        ends.append(checkpoints.load())
    same(ends[0], ends[1], "the search that was resumed")


def check_stages(make_optimizer: Callable[[], Optimizer], make_space: Callable[[], SearchSpace]) -> None:
    """Check that a search of two steps, the derivation, the extraction and the evaluation run."""
    space, optimizer = make_space(), make_optimizer()
    data = random_data(space, SPLITS)
    result = search(space, optimizer, data, epochs=1, batch_size=BATCH, seed=SEED)
    assert len(result.history) == 1
    has_one = result.architecture is not None
    assert has_one or optimizer.derivation != "argmax", "the derivation is 'argmax', but expected() gives no mixture"
    found = discretize(space, data, result.mixture, derivation=optimizer.derivation, candidates=2, batch_size=BATCH)
    if optimizer.derivation == "argmax":
        assert found.architecture == result.architecture, "argmax gives another architecture than the search's last row"
    network = space.extract(found.architecture)
    judged = evaluate(space, found.architecture, network, data, batch_size=BATCH)
    assert judged.cost == space.cost(found.architecture)
    assert 0 <= judged.test_accuracy <= 100


class CutOff(Exception):
    """An exception that stands for a kill."""


class CutAfter(SilentProgress):
    """A progress report that ends a stage by an exception after `steps` steps; None lets it finish."""

    def __init__(self, steps: int | None):
        self.left = steps

    def stage(self, name: str, total: int, done: int) -> Any:
        if self.left is not None:
            self.left -= done
        return super().stage(name, total, done)

    def advance(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise CutOff


def random_data(space: SearchSpace, names: Iterable[str], samples: int = SAMPLES, seed: int = 0) -> DataView:
    """Return a view of splits with random inputs and targets that fit a space; equal seeds give equal data."""
    reference = next(space.parameters())
    training = space.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = {}
        for name in SPLITS:
            inputs = space.example_input(samples)
            inputs = inputs.to(reference.dtype) if inputs.is_floating_point() else inputs
            outputs = space.release().eval()(inputs.to(reference.device))
            made[name] = TensorSamples(inputs, torch.randint(outputs.shape[-1], outputs.shape[:-1]))
    space.train(training)
    return DataView({name: made[name] for name in names})


def same(one: Any, other: Any, what: str) -> None:
    """Check that two states (tensors, numbers, strings, nested in lists and mappings) are equal, bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, f"{what} differs in type or shape"
        assert one.equal(other), f"{what} differs by up to {float((one.double() - other.double()).abs().max()):.3g}"
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        assert list(one) == list(other), f"{what} differs in its keys: {list(one)}, {list(other)}"
        for key in one:
            same(one[key], other[key], f"{what}: {key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        assert len(one) == len(other), f"{what} differs in its length: {len(one)}, {len(other)}"
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{what}[{i}]")
    else:
        assert one == other, f"{what} differs: {one}, {other}"


def _bound(make_optimizer: Callable[[], Optimizer], space: SearchSpace) -> Optimizer:
    optimizer = make_optimizer()
    optimizer.bind(space, SEED)
    for count, alpha in optimizer.alphas.items():
        shape = (space.stacks[count], count)
        assert alpha.shape == shape, f"alphas[{count}] has shape {tuple(alpha.shape)}, expected {shape}"
    return optimizer


def _step(space: SearchSpace, data: DataView) -> Step:
    """Return the first step of a search, without an architecture batch."""
    batch = data.weights.batch(torch.arange(SAMPLES))
    return Step(0, space, cross_entropy, batch, None, torch.optim.SGD(parameter_groups(space), lr=0.1))


def _check_simplex(mixture: Mixture, what: str) -> None:
    for name, weights in mixture.detach().items():
        sums = weights.sum(-1)
        right = bool((weights >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
        assert right, f"{what} is not on the simplex for the choice {name!r}: {weights.tolist()}"


def _check_gradient(parameters: Iterable[Tensor], what: str) -> None:
    gradients = [parameter.grad for parameter in parameters]
    assert gradients and all(g is not None for g in gradients), f"{what} has no gradient"
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None), (
        f"{what} has a gradient that is not finite"
    )
    assert any(bool(g.any()) for g in gradients if g is not None), f"{what} has a gradient of zeros only"


def _plain(sample: Mixture | Architecture) -> Any:
    """Return the sample as text or lists, for comparison."""
    if isinstance(sample, Architecture):
        return sample.to_json()
    return {name: weights.tolist() for name, weights in sample.items()}
