"""Optimizers: search methods that sample from the supernet and move the architecture parameters.

An optimizer answers four questions of the search loop: what a step samples, which losses train the weights, how alpha
gets its gradient, and which architecture is the result. Every random draw is a pure function of (seed, step). So a
resumed run, or a run on several ranks, samples the same.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tanglenas_engine.data import Mean, mean_over_targets
from tanglenas_engine.elastic.parts import reference
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.superposition.size import Row

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Step:
    """The data and state of one iteration of the search.

    Attributes:
        index: The number of the step, counted from 0.
        space: The supernet.
        loss: The loss of outputs and targets. One that is known to be a mean over targets (see
            `losses.averages_targets`) weighs those of the two batches below, given as they are: so the mean over the
            pieces of a batch and over the ranks is a mean over all targets that are not -100.
        weight_batch: The inputs and targets that train the weights.
        architecture_batch: The inputs and targets that train alpha. It is None in a simultaneous search, where one
            backward pass serves weights and alpha.
        weight_optimizer: The torch optimizer of the supernet's weights.
        outputs: The supernet's last outputs for the weight batch, from which the loop computes the training accuracy.
        reported: The loss of `outputs`, where the terms that train the weights add up to another one; else None.
        scale: The factor of the loss in alpha's gradient. It exceeds 1 in half precision.
        mean: The mean of other values than the loss, such as what a teacher teaches: a function of one value for each
            target, and the targets. It leaves out targets of -100, and weighs the two batches as the loss does.
        progress: The share of the search's steps that come before this one, from 0 to below 1; 1 in path epochs.
    """

    index: int
    space: SearchSpace
    loss: Loss
    weight_batch: Batch
    architecture_batch: Batch | None
    weight_optimizer: torch.optim.Optimizer
    outputs: Tensor | None = None
    reported: Tensor | None = None
    scale: Tensor | float = 1.0
    mean: Mean = mean_over_targets
    progress: float = 0.0


class Source(Protocol):
    """A set of architectures to draw from: a space, or the part of it within a range of costs."""

    def sample(
        self, generator: torch.Generator | None = None, scores: Mapping[Row, Sequence[float]] | None = None
    ) -> Architecture: ...


class Optimizer(abc.ABC):
    """A search method. A subclass writes `sample`. The other methods have the usual first-order form as default.

    Attributes:
        name: The name under which the method is registered.
        alphas: The architecture parameters: for each K, one `(rows, K)` parameter for all rows of choices with K
            options.
        seed: The seed of all random draws.
        source: What `draw` draws from: the space, or its architectures within the band of the search.
        learns_architecture: True if the method has architecture parameters. Methods that sample paths have none.
        derivation: The default method of the discretize stage.
        draws_in_band: True if a method with architecture parameters draws from `source` too. In a search with a target,
            its samples are then within the band, and no expected cost is charged.
        accumulates: True if alpha's gradient over a batch is the mean of its gradients over parts of the batch.
        final_divisor: The `channel_divisor` of cell spaces in the last steps of a search that reaches its last stage; 1
            stands for all channels. A search refuses before it starts what needs all of them later.
    """

    name: str = ""
    final_divisor: int = 1
    learns_architecture: ClassVar[bool] = True
    derivation: ClassVar[str] = "both"
    draws_in_band: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True

    def __init__(self) -> None:
        self.alphas: dict[int, nn.Parameter] = {}
        self.seed = 0
        self.source: Source

    def bind(self, space: SearchSpace, seed: int) -> None:
        """Bind the method to a space: create alpha as `1e-3 * randn`, on the space's device and with its data type."""
        self.space, self.seed = space, seed
        self.draw_from(space)
        place = reference(space)
        if self.learns_architecture:
            generator = torch.Generator().manual_seed(self.derive_seed(-1, "alpha"))
            self.alphas = {
                count: nn.Parameter((1e-3 * torch.randn(rows, count, generator=generator)).to(place))
                for count, rows in space.stacks.items()
            }

    @property
    def label(self) -> str:
        """The name in messages."""
        return self.name or type(self).__name__

    @property
    def simultaneous(self) -> bool:
        """True if the backward pass of the weight losses gives alpha's gradient, too, for a simultaneous search.

        A method with its own `architecture_backward` has an equivalent in such a search only if it also has its own
        `weight_losses`.
        """
        own, usual = type(self), Optimizer
        return own.architecture_backward is usual.architecture_backward or own.weight_losses is not usual.weight_losses

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the architecture optimizer: alpha, and other tensors that the method learns."""
        return list(self.alphas.values())

    def draw_from(self, source: Source) -> None:
        """Let `draw` return architectures of a part of the space only. The search calls this after `bind`."""
        self.source = source

    def draw(self, step: int, stream: str) -> Architecture:
        """Return a random architecture of the source, uniform over the options of each decision."""
        return self.source.sample(torch.Generator().manual_seed(self.derive_seed(step, stream)))

    # Methods to override.

    @abc.abstractmethod
    def sample(self, step: int, stream: str) -> Mixture | Architecture:
        """Return what the supernet computes in a step: a mixture (differentiable in alpha) or one architecture.

        Args:
            step: The number of the step, counted from 0.
            stream: "weight" or "architecture". The two halves of a step draw independently.
        """

    def expected(self) -> Mixture | None:
        """Return the mixture that alpha represents, or None for a method without architecture parameters."""
        return None

    def regularizer(self) -> Tensor | None:
        """Return a term to add to the architecture loss, or None."""
        return None

    def set_progress(self, fraction: float) -> None:
        """Receive how far the search is, before each epoch: from 0 in the first to 1 in the last.

        Temperatures and schedules depend on it. A search of one epoch is at 0. What changes with each step follows
        `Step.progress`.
        """
        return None

    def schedules(self) -> dict[str, float]:
        """Return the current values of the method's schedules by name, such as a temperature, for the history."""
        return {}

    def weight_losses(self, step: Step) -> Iterator[Tensor]:
        """Yield the losses that train the weights. Each is back-propagated before the next; their gradients add up."""
        sampled = self.sample(step.index, "weight")
        # In an alternating search the weight step needs no gradient of alpha, so the mixing weights are constants.
        self.enter(sampled.detach() if isinstance(sampled, Mixture) and step.architecture_batch else sampled)
        yield self._loss(step, step.weight_batch)

    def architecture_backward(self, step: Step) -> Tensor:
        """Set alpha's gradient from the architecture batch (first order), and return the loss."""
        assert step.architecture_batch is not None
        self.enter(self.sample(step.index, "architecture"))
        with frozen(step.space):
            loss = self._loss(step, step.architecture_batch)
            penalty = self.regularizer()
            total = loss if penalty is None else loss + penalty
            parameters = self.parameters()
            for alpha, gradient in zip(parameters, torch.autograd.grad(total * step.scale, parameters), strict=True):
                alpha.grad = gradient
        return loss.detach()

    # Shared by all methods.

    def path_losses(self, step: Step) -> Iterator[Tensor]:
        """Yield the loss of a random architecture of the source, for epochs in which the weights learn by these."""
        self.enter(self.draw(step.index, "path"))
        yield self._loss(step, step.weight_batch)

    def enter(self, sampled: Mixture | Architecture) -> None:
        """Make the next forwards of the space compute the sampled mixture or architecture."""
        self.space.select(sampled) if isinstance(sampled, Architecture) else self.space.relax(sampled)

    def current(self) -> Architecture | None:
        """Return the architecture that alpha represents, or None for a method that derives one after the search."""
        mixture = self.expected()
        return None if mixture is None else self.space.most_probable(mixture)

    def derive_seed(self, step: int, stream: str) -> int:
        """Return a seed that is a pure function of (seed, step, stream)."""
        text = f"{self.seed}/{step}/{stream}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint needs beside (seed, step).

        Its names, types and lengths, and the shapes and dtypes of its tensors, are the same at every step: a checkpoint
        is compared with the state at the start.
        """
        return {"alphas": {count: alpha.detach().clone() for count, alpha in self.alphas.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        with torch.no_grad():
            for count, alpha in self.alphas.items():
                alpha.copy_(state["alphas"][count])

    def _loss(self, step: Step, batch: Batch) -> Tensor:
        outputs = step.space(batch[0])
        if batch is step.weight_batch:
            step.outputs = outputs.detach()
        return step.loss(outputs, batch[1])


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Switch off the gradients of a module's parameters inside the block."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def l2(alphas: Iterable[Tensor]) -> Tensor:
    """Return `|alpha|^2 / 2`, whose gradient is alpha: weight decay as a term of the loss."""
    return torch.stack([alpha.square().sum() for alpha in alphas]).sum() / 2
