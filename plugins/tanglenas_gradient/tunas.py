"""TuNAS: REINFORCE on sampled architectures that share weights (Bender et al. 2020, arXiv:2008.06120).

Within the band of a target, the correction is that of TabNAS (Yang et al. 2022, arXiv:2204.07615).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tanglenas_engine import Architecture, Mixture, Optimizer, Row, Step, TangleNASError, at_least

NARROWER = -1000.0
"""The log-probability of each step down from the widest option in the warm-up. It is finite, as a space may not have
the architecture of all widest options."""


class TuNAS(Optimizer):
    """An optimizer that draws architectures from `softmax(alpha)`, and makes those of smaller loss more probable.

    An architecture step draws `samples` architectures a_i and computes their losses L_i on one batch, forward only.
    Each is compared with the mean of the others, so that what the batch adds to all of them cancels:

        gradient of alpha = 1/n sum_i (L_i - mean of L_j, j != i) * d log p(a_i) / d alpha

    A weight step trains one drawn architecture. At the start of the search it is rather the widest of the space, with
    random operations, so that all weights learn (the paper's warm-up of filters). In the history, `widest` is the
    probability of that in the last step of an epoch. The paper's warm-up of alpha, which does not learn in the first
    quarter of a search, is `search.warmup_epochs`. A search with a target has no warm-up of filters, as wide
    architectures are beyond its band. Nor has a simultaneous search, whose weights learn from the samples of alpha.

    In a search with a target, architectures are drawn from `softmax(alpha)` under the condition that they are in the
    band. The condition divides their probability by that of the whole band. The logarithm of the latter is the same for
    all samples of a step, and the factors in front of it add up to 0. So the gradient above needs no correction, where
    TabNAS estimates one.

    Differs from the papers in three points. The reward is the loss instead of the accuracy, which is coarser. The
    baseline is the mean of the other samples instead of a moving mean over earlier steps, so there is no state to save.
    A target is a condition on the samples instead of a term `|cost / target - 1|` of the reward. Without a band, the
    search charges the expected cost, as for every optimizer with architecture parameters.

    Args:
        samples: The number of architectures in an architecture step, at least 2.
        warmup: The share of the search's steps in which the weights of the widest architectures are trained, with a
            probability that falls linearly from 1 to 0; 0 leaves the warm-up out.
    """

    draws_in_band = True

    def __init__(self, samples: int = 4, warmup: float = 0.25):
        super().__init__()
        self.samples = at_least("samples", samples, 2)
        if isinstance(warmup, bool) or not isinstance(warmup, int | float) or not 0 <= warmup < 1:
            raise TangleNASError(f"the warmup of tunas is {warmup!r}, expected a share of the search from 0 to below 1")
        self.warmup = warmup
        self._widest = 0.0

    def schedules(self) -> dict[str, float]:
        return {**super().schedules(), "widest": self._widest}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "widest": self._widest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._widest = state["widest"]

    def sample(self, step: int, stream: str) -> Architecture:
        return self._draw(step, f"{stream}/0")

    def expected(self) -> Mixture:
        return self.space.mixture({count: alpha.softmax(1) for count, alpha in self.alphas.items()})

    def weight_losses(self, step: Step) -> Iterator[Tensor]:
        if step.architecture_batch is not None:
            self.enter(self.trained(step))
            yield self._loss(step, step.weight_batch)
            return
        # In a simultaneous search, the weights learn from all samples, and alpha from the same forwards.
        drawn, losses = self._samples(step), []
        for architecture in drawn:
            self.enter(architecture)
            loss = self._loss(step, step.weight_batch) / self.samples
            losses.append(loss.detach() * self.samples)
            yield loss
        objective = self._objective(drawn, losses)
        yield objective - objective.detach()

    def architecture_backward(self, step: Step) -> Tensor:
        assert step.architecture_batch is not None
        drawn, losses = self._samples(step), []
        with torch.no_grad():
            for architecture in drawn:
                self.enter(architecture)
                losses.append(self._loss(step, step.architecture_batch))
        parameters = self.parameters()
        gradients = torch.autograd.grad(self._objective(drawn, losses) * step.scale, parameters)
        for alpha, gradient in zip(parameters, gradients, strict=True):
            alpha.grad = gradient
        return torch.stack(losses).mean()

    def trained(self, step: Step) -> Architecture:
        """Return the architecture that a weight step trains."""
        warms_up = self.warmup and self.source is self.space
        self._widest = max(0.0, 1 - step.progress / self.warmup) if warms_up else 0.0
        generator = torch.Generator().manual_seed(self.derive_seed(step.index, "warm-up"))
        if float(torch.rand((), generator=generator)) < self._widest:
            return self.space.sample(generator, self._width())
        return self.sample(step.index, "weight")

    def _samples(self, step: Step) -> list[Architecture]:
        return [self._draw(step.index, f"architecture/{i}") for i in range(self.samples)]

    def _draw(self, step: int, stream: str) -> Architecture:
        """Return an architecture of the source, drawn from `softmax(alpha)`."""
        generator = torch.Generator().manual_seed(self.derive_seed(step, stream))
        return self.source.sample(generator, self.space.scores(self.expected()))

    def _width(self) -> dict[Row, list[float]]:
        """Return scores with which samples have the largest number of every choice, and random options between names.

        A drawn depth is then the largest, so that the options of every layer are drawn, too.
        """
        return {
            row: [
                0.0 if isinstance(option, str) else NARROWER * sum(other > option for other in row.options)
                for option in row.options
            ]
            for row in self.space.rows
        }

    def _objective(self, drawn: Sequence[Architecture], losses: Sequence[Tensor]) -> Tensor:
        """Return a term whose gradient is alpha's. It leaves out what the probabilities of all samples share."""
        gathered = torch.stack(losses)
        advantages = (gathered - gathered.mean()) / (self.samples - 1)  # 1/n (L_i - the mean of the others)
        assignments = [self.space.assignment_of(architecture) for architecture in drawn]
        total = advantages.new_zeros(())
        for count, alpha in self.alphas.items():
            rows = [row for row in self.space.rows if len(row.options) == count]
            picks = torch.tensor([[picks[row] for row in rows] for picks in assignments], device=alpha.device)
            # A row beyond the depth is no part of an architecture, and an absent edge no part of its probability.
            active = torch.tensor(
                [
                    [row.active(picks) and self.space.has_score(row, picks[row]) for row in rows]
                    for picks in assignments
                ],
                device=alpha.device,
            )
            chosen = alpha.log_softmax(1).expand(len(drawn), -1, -1).gather(2, picks[..., None])[..., 0]
            total = total + (advantages[:, None] * chosen * active).sum()
        return total
