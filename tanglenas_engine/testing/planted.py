"""Planted truths: small searches whose best architecture is known by construction.

A truth is a search space of up to 64 architectures, with data made for it. The data decide which options are best: a
signal that only a kernel of 5 sees, features beyond the first that are noise, a depth at which the signal arrives. So
one space has its best architecture at the small end or at the large end, and a budget moves it in between. Every
search takes about half a second on one core.

`check_finds` says which truths an optimizer finds. An optimizer that misses some is not wrong: the documentation has a
table of which of ours finds what. A method that finds none has a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine import elastic
from tanglenas_engine.data import DataView, TensorSamples
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.errors import unknown
from tanglenas_engine.optimizers.optimizer import Optimizer
from tanglenas_engine.plugins import create_objective
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.stages.discretize import discretize
from tanglenas_engine.stages.search import search
from tanglenas_engine.superposition.size import Size

DECIDED = 0.5
"""The entropy of a mixture, from 1 to 0, up to which its most probable architecture counts as its decision."""
BATCH = 32
DATA_SEED = 1_000_000
SAMPLES = {"weights": 256, "architecture": 256, "validation": 64}

Pair = tuple[Tensor, Tensor]
"""Inputs and targets."""


class Part(elastic.Elastic):
    """The first `size` of the features in the last dimension: `(*, size.max) -> (*, size)`."""

    ones: Tensor

    def __init__(self, size: Size):
        super().__init__()
        self.register_buffer("ones", torch.ones(size.max), persistent=False)
        self.declare(ones=(size,))

    def forward(self, x: Tensor) -> Tensor:
        ones = self.current("ones")
        assert ones is not None
        return x[..., : len(ones)] * ones


class Kernel(SearchSpace):
    """A space of one kernel size. The network sees what the kernel sees of the pixels around the centre."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.convolution = elastic.Conv2d(2, 8, self.choice("kernel", (1, 3, 5)))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, 2, 5, 5)` to logits `(B, 2)`."""
        y: Tensor = self.head(self.convolution(x)[..., 2, 2].relu())
        return y

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, 2, 5, 5)


class Width(SearchSpace):
    """A space of one width: the number of input features that a linear classifier reads."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        width = self.choice("width", (4, 16, 64))
        self.part = Part(width)
        self.head = elastic.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map features `(B, 64)` to logits `(B, 2)`."""
        y: Tensor = self.head(self.part(x))
        return y

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, 64)


class Hidden(SearchSpace):
    """A space of a bottleneck and of a width without effect: the bottleneck has to pass 4 independent bits."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        width, idle = (self.choice(name, (1, 2, 3, 4)) for name in ("width", "idle"))
        self.down, self.up = elastic.Linear(4, width), elastic.Linear(width, 8)
        self.idle = nn.Sequential(elastic.Linear(4, idle), nn.ReLU(), elastic.Linear(idle, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Map features `(B, 4)` to logits `(B, 4, 2)`."""
        y: Tensor = self.up(self.down(x)) + 0 * self.idle(x)
        return y.view(len(x), 4, 2)

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, 4)


class Step(nn.Module):
    """A layer that moves the features of a position to the next one: `(B, P, F) -> (B, P, F)`."""

    def __init__(self, hidden: Size):
        super().__init__()
        self.up, self.down = elastic.Linear(4, hidden), elastic.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.roll(1, 1)
        y: Tensor = x + self.down(self.up(x).relu())
        return y


class Steps(SearchSpace):
    """A space of a depth and of a width that matters little.

    The signal is read at one position. It is there after as many layers as it was positions away.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        depth, hidden = self.choice("depth", (1, 2, 3)), self.choice("hidden", (2, 3, 6))
        self.steps = elastic.Depth(depth, [Step(hidden) for _ in range(depth.max)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map features by position `(B, 4, 4)` to logits `(B, 2)`."""
        y: Tensor = self.head(self.steps(x)[:, 0])
        return y

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, 4, 4)


class Noise(nn.Module):
    """An operation that adds noise as large as its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.detach().square().mean().sqrt() * torch.randn_like(x)


class Operations(SearchSpace):
    """A space of an operation in each of two layers."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        operation = self.choice("operation", ("noise", "keep"), per=2)
        self.layers = nn.Sequential(*(self._mixed(operation[i]) for i in range(2)))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map features `(B, 4)` to logits `(B, 2)`."""
        y: Tensor = self.head(self.layers(x))
        return y

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, 4)

    @staticmethod
    def _mixed(operation: Size) -> elastic.MixedOperation:
        return elastic.MixedOperation.of(
            operation,
            {
                "noise": elastic.Family({"noise": 1}, lambda kernel: Noise()),
                "keep": elastic.Family({"keep": 1}, lambda kernel: nn.Identity()),
            },
        )


class Together(SearchSpace):
    """A space of two widths.

    The network reads the product of two sums, of the first features of each side. Squashing keeps noise from dominating
    the product.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.left, self.right = (Part(self.choice(name, (1, 2))) for name in ("left", "right"))
        self.head = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map features `(B, 2, 2)` to logits `(B, 2)`."""
        y: Tensor = self.head((self.left(x[:, 0]).sum(-1).tanh() * self.right(x[:, 1]).sum(-1).tanh())[:, None])
        return y

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, 2, 2)


# Data.


def _by_sign(signal: Tensor) -> Tensor:
    return (signal > 0).long()


def pixels(count: int, generator: torch.Generator, away: int) -> Pair:
    """Return images `(count, 2, 5, 5)` of noise, and whether two pixels `away` from the centre are positive."""
    x = torch.randn(count, 2, 5, 5, generator=generator)
    return x, _by_sign(x[:, 0, 2, 2 - away] + x[:, 1, 2, 2 + away])


def features(count: int, generator: torch.Generator, first: int, last: int) -> Pair:
    """Return features `(count, 64)` of noise, and whether the sum of some of them is positive."""
    x = torch.randn(count, 64, generator=generator)
    return x, _by_sign(x[:, first:last].sum(1))


def bits(count: int, generator: torch.Generator) -> Pair:
    """Return features `(count, 4)` and the sign of each: 4 labels."""
    x = torch.randn(count, 4, generator=generator)
    return x, _by_sign(x)


def positions(count: int, generator: torch.Generator, away: int) -> Pair:
    """Return features by position `(count, 4, 4)`, and whether those `away` from the one that is read are positive."""
    x = torch.randn(count, 4, 4, generator=generator)
    return x, _by_sign(x[:, -away].sum(1))


def products(count: int, generator: torch.Generator, whole: bool) -> Pair:
    """Return features `(count, 2, 2)` and the sign of the product of two signals.

    A signal is the first feature of a side, or the sum of both if `whole` is True. The second feature is noise, three
    times as large.
    """
    signal, noise = torch.randn(2, count, 2, generator=generator)
    x = torch.stack([signal + 3 * noise, -3 * noise] if whole else [signal, 3 * noise], -1)
    return x, _by_sign(signal.prod(1))


def plain(count: int, generator: torch.Generator) -> Pair:
    """Return features `(count, 4)`, and whether their sum is positive."""
    x = torch.randn(count, 4, generator=generator)
    return x, _by_sign(x.sum(1))


@dataclass(frozen=True)
class Truth:
    """A search whose best architecture is known.

    Attributes:
        summary: What is planted, in a clause.
        make_space: Makes the search space.
        make_data: Makes inputs and targets, of a number of samples and a generator.
        best: The best option of each choice that matters, in every layer.
        budget: The most multiply-accumulates of an architecture, or None.
        samples: The number of samples of each split.
        epochs: The number of epochs of a search.
    """

    summary: str
    make_space: Callable[[], SearchSpace]
    make_data: Callable[[int, torch.Generator], Pair]
    best: Mapping[str, Any]
    budget: int | None = None
    samples: Mapping[str, int] = field(default_factory=lambda: SAMPLES)
    epochs: int = 6

    def data(self, seed: int) -> DataView:
        """Return the splits of a seed."""
        # With the seed itself, the data would be the numbers that the search draws as noise.
        generator = torch.Generator().manual_seed(DATA_SEED + seed)
        return DataView({
            name: TensorSamples(*self.make_data(count, generator)) for name, count in self.samples.items()
        })  # fmt: skip

    def fits(self, space: SearchSpace, architecture: Architecture) -> bool:
        """Return whether an architecture is within the budget."""
        return self.budget is None or space.cost(architecture).macs <= self.budget

    def is_best(self, architecture: Architecture) -> bool:
        """Return whether an architecture has the best option of every choice that matters."""
        chosen = {name: architecture.choices[name] for name in self.best}
        return all(
            set(chosen[name] if isinstance(chosen[name], tuple) else (chosen[name],)) == {best}
            for name, best in self.best.items()
        )


FEW = {"weights": 96, "architecture": 256, "validation": 64}
"""So few samples to learn from that noise costs: larger networks learn it by heart."""

TRUTHS: Mapping[str, Truth] = {
    "kernel_small": Truth(
        "only the centre has a signal, and there are few samples", Kernel, partial(pixels, away=0), {"kernel": 1},
        samples=FEW, epochs=16,
    ),
    "kernel_large": Truth("only a kernel of 5 sees the signal", Kernel, partial(pixels, away=2), {"kernel": 5}),
    "width_small": Truth(
        "features beyond the first 4 are noise, and there are few samples", Width, partial(features, first=0, last=4),
        {"width": 4}, samples=FEW, epochs=16,
    ),
    "width_large": Truth(
        "only the widest reads the features of the signal", Width, partial(features, first=16, last=32), {"width": 64}
    ),
    "bottleneck": Truth("four labels need four units, and another width does nothing", Hidden, bits, {"width": 4}),
    "bottleneck_in_budget": Truth(
        "four units fit only if the width that does nothing is small", Hidden, bits, {"width": 4, "idle": 1}, budget=60
    ),
    "depth_small": Truth("the signal passes after one layer", Steps, partial(positions, away=1), {"depth": 1}),
    "depth_large": Truth("the signal arrives after three layers", Steps, partial(positions, away=3), {"depth": 3}),
    "depth_in_budget": Truth(
        "three layers fit only if they are narrow", Steps, partial(positions, away=3), {"depth": 3, "hidden": 2},
        budget=200,
    ),
    "noise": Truth("an operation only adds noise", Operations, plain, {"operation": "keep"}),
    "together_small": Truth(
        "both sides have to be narrow", Together, partial(products, whole=False), {"left": 1, "right": 1}
    ),
    "together_large": Truth(
        "both sides have to be wide", Together, partial(products, whole=True), {"left": 2, "right": 2}
    ),
}  # fmt: skip
"""The truths by name."""


@dataclass(frozen=True)
class Finding:
    """What a search found.

    Attributes:
        architecture: The architecture.
        found: Whether it has the best option of every choice that matters.
        method: What decided: "argmax" of alpha, or the method by which candidates were judged.
        entropy: The entropy of alpha's mixture, from 1 (undecided) to 0; None without alpha.
    """

    architecture: Architecture
    found: bool
    method: str
    entropy: float | None


def find(optimizer: Optimizer, truth: Truth | str, seed: int = 0, **options: Any) -> Finding:
    """Search for a planted truth.

    An optimizer with architecture parameters finds by alpha alone ("argmax"), if alpha is decided. If the entropy of
    its mixture is above `DECIDED`, all architectures are judged with the supernet's weights, as for other methods.

    Args:
        optimizer: A new optimizer.
        truth: The truth, or its name in `TRUTHS`.
        seed: The seed of data, weights and search.
        options: Options of `search`; they override those of this kit.
    """
    if isinstance(truth, str):
        if truth not in TRUTHS:
            raise unknown("planted truth", truth, TRUTHS)
        truth = TRUTHS[truth]
    torch.manual_seed(seed)
    space, data = truth.make_space(), truth.data(seed)
    budget = {} if truth.budget is None else {"macs": truth.budget}
    recipe: dict[str, Any] = dict(
        epochs=truth.epochs,
        batch_size=BATCH,
        warmup_epochs=1,
        weight_optimizer=partial(torch.optim.AdamW, lr=3e-2, weight_decay=0.0),
        architecture_optimizer=partial(torch.optim.Adam, lr=0.1, betas=(0.5, 0.999)),
        targets=[Target(create_objective(name), most) for name, most in budget.items()],
        seed=seed,
    )
    result = search(space, optimizer, data, **{**recipe, **options})
    entropy = None if result.mixture is None else result.mixture.entropy()
    method = "argmax" if entropy is not None and entropy <= DECIDED else "random"
    found = discretize(
        space, data, result.mixture, method=method, candidates=space.size, limits=budget, seed=seed
    ).architecture
    return Finding(found, truth.is_best(found), method, entropy)


def check_finds(
    make_optimizer: Callable[[], Optimizer], truths: Collection[str] = tuple(TRUTHS), seed: int = 0, **options: Any
) -> dict[str, Finding]:
    """Check that an optimizer finds planted truths, and return what it found.

    Args:
        make_optimizer: Makes the optimizer anew, with the same options each time.
        truths: Names of `TRUTHS`. Leave out those that the method does not promise.
        seed: The seed of data, weights and search.
        options: Options of `search`; they override those of this kit.
    """
    found = {name: find(make_optimizer(), name, seed, **options) for name in truths}
    missed = [
        f"{name} ({TRUTHS[name].summary}): best is {dict(TRUTHS[name].best)}, {finding.method} took "
        f"{finding.architecture}"
        for name, finding in found.items()
        if not finding.found
    ]
    assert not missed, f"{len(missed)} of {len(found)} planted truths were not found: {'; '.join(missed)}"
    return found
