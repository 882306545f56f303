"""GDAS: hard Gumbel-softmax samples with straight-through gradients (Dong and Yang 2019, arXiv:1910.04465)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tanglenas_engine import Mixture, l2, within
from tanglenas_gradient.annealed import Annealed


class GDAS(Annealed):
    """An optimizer that samples one option of every row in each step, and computes that architecture alone.

    The sample is `argmax(log softmax(alpha) + Gumbel noise)`. Its gradient is that of
    `softmax((log softmax(alpha) + noise) / temperature)`, and reaches alpha through the masks of the sampled options.
    Entries of a weight that the sampled option shares with another give both a gradient. An operation of a cell gets
    its gradient behind its BatchNorm. So alpha learns there; the paper's code scales the kernel in front of the
    BatchNorm, and its alpha gets no gradient. The smallest of nested options gives larger ones no gradient until one of
    them is sampled.

    In a search with a target, samples are drawn from `softmax(alpha)` under the condition that they are in its band.
    The noise is then that of the Gumbel distribution under the condition that the sample is what it is.

    Args:
        temperature: Temperature of the samples at the start of the search. The mixture that alpha stands for has no
            temperature.
        final_temperature: Temperature of the samples at the end, reached linearly with the epochs.
        weight_decay: See `darts`.
    """

    draws_in_band = True

    def __init__(self, temperature: float = 10.0, final_temperature: float = 0.1, weight_decay: float = 0.0):
        super().__init__(temperature, final_temperature)
        self.weight_decay = within("weight_decay", weight_decay, 0)

    def sample(self, step: int, stream: str) -> Mixture:
        generator = torch.Generator().manual_seed(self.derive_seed(step, stream))
        if self.source is self.space:
            noise = {count: _gumbel(alpha, generator) for count, alpha in self.alphas.items()}
            return self.space.mixture({count: self._hard(alpha, noise[count]) for count, alpha in self.alphas.items()})
        corner = self.space.one_hot(self.source.sample(generator, self.space.scores(self.expected()))).stacks
        noise = {count: gumbel_given(alpha, corner[count], generator) for count, alpha in self.alphas.items()}
        return self.space.mixture({
            count: self._hard(alpha, noise[count], corner[count]) for count, alpha in self.alphas.items()
        })  # fmt: skip

    def enter(self, sampled: Mixture) -> None:
        self.space.select(sampled)

    def expected(self) -> Mixture:
        return self.space.mixture({count: alpha.softmax(1) for count, alpha in self.alphas.items()})

    def regularizer(self) -> Tensor:
        return self.weight_decay * l2(self.parameters())

    def _hard(self, alpha: Tensor, noise: Tensor, hard: Tensor | None = None) -> Tensor:
        """Return one-hot rows with the gradient of the soft sample; by default, those of its argmax."""
        soft = ((alpha.log_softmax(1) + noise) / self.temperature).softmax(1)
        if hard is None:
            hard = torch.nn.functional.one_hot(soft.argmax(1), alpha.shape[1]).to(soft)
        return hard + (soft - soft.detach())


def _exponential(alpha: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty(alpha.shape, dtype=alpha.dtype).exponential_(generator=generator)


def _gumbel(alpha: Tensor, generator: torch.Generator) -> Tensor:
    return -_exponential(alpha, generator).log().to(alpha.device)


def gumbel_given(alpha: Tensor, hard: Tensor, generator: torch.Generator) -> Tensor:
    """Return Gumbel noise `(rows, K)` under the condition that it samples given options.

    With probabilities p and exponential variables E, the largest sum of log-probability and noise is `-log E_a`, of the
    option a that was sampled. Each other sum is less by construction, `-log(E_k / p_k + E_a)`. All is computed by
    logarithms, because probabilities underflow.

    Args:
        alpha: The architecture parameters, `(rows, K)`.
        hard: The sampled options, one-hot, `(rows, K)`.
    """
    exponential = _exponential(alpha, generator).log().to(alpha.device)
    chances = alpha.detach().log_softmax(1)
    top = exponential.masked_fill(hard == 0, -math.inf).amax(1, keepdim=True)
    return -torch.where(hard > 0, top, torch.logaddexp(exponential - chances, top)) - chances
