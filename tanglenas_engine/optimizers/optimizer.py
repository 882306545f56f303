"""Optimizers: how a search samples, and how it moves the architecture parameters.

An optimizer answers a few questions, and the search loop asks them: what is sampled in a step, which losses
train the weights, how alpha gets its gradient, what the architecture is at the end. Everything random is a pure
function of (seed, step), so a run that resumes, or runs on several ranks, samples the same.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Step:
    """What one iteration of the search works on.

    `architecture_batch` is None in a simultaneous search, where one backward pass serves weights and alpha.
    `outputs` is set to what the supernet last gave for the weight batch, for the accuracy that people see. The
    gradient that an optimizer sets for alpha is that of the loss times `scale`: more than 1 in half precision.
    """

    index: int
    space: SearchSpace
    loss: Loss
    weight_batch: Batch
    architecture_batch: Batch | None
    weight_optimizer: torch.optim.Optimizer
    outputs: Tensor | None = None
    scale: Tensor | float = 1.0


class Optimizer(abc.ABC):
    """A search method. A subclass writes `sample`; the rest has the usual first-order form.

    Attributes:
        alphas: Architecture parameters, one `(rows, K)` parameter for all rows of choices with K options.
        learns_architecture: Whether the method has architecture parameters; sampled supernets have none.
        derivation: How discretize derives the architecture unless told otherwise.
        accumulates: Whether alpha's gradient over a batch is the mean of those over parts of it.
    """

    name: str = ""
    learns_architecture: ClassVar[bool] = True
    derivation: ClassVar[str] = "argmax"
    accumulates: ClassVar[bool] = True

    def __init__(self) -> None:
        self.alphas: dict[int, nn.Parameter] = {}
        self.seed = 0

    def bind(self, space: SearchSpace, seed: int) -> None:
        """Take up a space: create alpha as `1e-3 * randn`, on the space's device and in its type."""
        self.space, self.seed = space, seed
        reference = next(space.parameters())
        if self.learns_architecture:
            generator = torch.Generator().manual_seed(self.derive_seed(-1, "alpha"))
            self.alphas = {
                count: nn.Parameter((1e-3 * torch.randn(rows, count, generator=generator)).to(reference))
                for count, rows in space.stacks.items()
            }

    @property
    def label(self) -> str:
        """The name in messages."""
        return self.name or type(self).__name__

    def parameters(self) -> list[nn.Parameter]:
        """What the architecture optimizer moves: alpha, and whatever a method learns beside it."""
        return list(self.alphas.values())

    # What a method decides.

    @abc.abstractmethod
    def sample(self, step: int, stream: str) -> Mixture | Architecture:
        """What the supernet computes in a step: a mixture (differentiable in alpha) or one architecture.

        `stream` is "weight" or "architecture": the two halves of a step draw independently.
        """

    def expected(self) -> Mixture | None:
        """The mixture that alpha stands for, or None for a method without architecture parameters."""
        return None

    def regularizer(self) -> Tensor | None:
        """A term added to the architecture loss."""
        return None

    def set_progress(self, fraction: float) -> None:
        """Told before each epoch how much of the search is done, from 0 to 1: for temperatures and schedules."""
        return None

    def schedules(self) -> dict[str, float]:
        """What the method's own schedules stand at, by name, such as a temperature: for the history."""
        return {}

    def weight_losses(self, step: Step) -> Iterator[Tensor]:
        """The losses that train the weights; each is back-propagated as it comes, gradients add up."""
        sampled = self.sample(step.index, "weight")
        # In an alternating search the mixing weights are constants here: nothing is kept or computed for alpha.
        self.enter(sampled.detach() if isinstance(sampled, Mixture) and step.architecture_batch else sampled)
        yield self._loss(step, step.weight_batch)

    def architecture_backward(self, step: Step) -> Tensor:
        """Set alpha's gradient from the architecture batch (first order), and return the loss."""
        assert step.architecture_batch is not None
        self.enter(self.sample(step.index, "architecture"))
        with constant(step.space):
            loss = self._loss(step, step.architecture_batch)
            penalty = self.regularizer()
            total = loss if penalty is None else loss + penalty
            parameters = self.parameters()
            for alpha, gradient in zip(parameters, torch.autograd.grad(total * step.scale, parameters), strict=True):
                alpha.grad = gradient
        return loss.detach()

    # What methods share.

    def enter(self, sampled: Mixture | Architecture) -> None:
        """Make the next forwards of the space compute what was sampled."""
        self.space.select(sampled) if isinstance(sampled, Architecture) else self.space.relax(sampled)

    def current(self) -> Architecture | None:
        """The most probable option of every row, or None for a method that derives after the search."""
        mixture = self.expected()
        return None if mixture is None else argmax(self.space, mixture)

    def derive_seed(self, step: int, stream: str) -> int:
        """A seed that is a pure function of (seed, step, stream)."""
        text = f"{self.seed}/{step}/{stream}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside (seed, step)."""
        return {"alphas": {count: alpha.detach().clone() for count, alpha in self.alphas.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for count, alpha in self.alphas.items():
                alpha.copy_(state["alphas"][count])

    def _loss(self, step: Step, batch: Batch) -> Tensor:
        outputs = step.space(batch[0])
        if batch is step.weight_batch:
            step.outputs = outputs.detach()
        return step.loss(outputs, batch[1])


@contextmanager
def constant(module: nn.Module) -> Iterator[None]:
    """Within, nothing is kept or computed for the gradients of the module's parameters."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def argmax(space: SearchSpace, mixture: Mixture) -> Architecture:
    """The most probable architecture, as the space has it: by default, the most probable option of every row."""
    return space.most_probable(mixture)


def normalized_entropy(mixture: Mixture) -> float:
    """Mean entropy of the rows relative to the uniform distribution: 1 undecided, 0 decided."""
    rows = [
        -(stack * stack.clamp_min(1e-12).log()).sum(1) / torch.tensor(float(count)).log()
        for count, stack in mixture.detach().stacks.items()
        if count > 1
    ]
    return float(torch.cat(rows).mean()) if rows else 0.0


def l2(alphas: Iterable[Tensor]) -> Tensor:
    """`|alpha|^2 / 2`, whose gradient is alpha: weight decay as a term of the loss."""
    return torch.stack([alpha.square().sum() for alpha in alphas]).sum() / 2
