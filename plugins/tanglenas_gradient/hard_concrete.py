"""Hard-concrete gates: mixtures whose masks are often at 0 and 1 (Louizos et al. 2018, arXiv:1712.01312).

CoFi (Xia et al. 2022, arXiv:2204.00408) and Sheared LLaMA (Xia et al. 2023, arXiv:2310.06694) prune trained networks by
such gates, one for each unit or layer. Here a row of K nested options has K - 1 gates, one for each step to the next
option, so a gate opens all units that this step adds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tanglenas_engine import Mixture, TangleNASError, l2, within
from tanglenas_gradient.annealed import Annealed


class HardConcrete(Annealed):
    """An optimizer that samples a gate for each step from an option to the next, often exactly 0 or 1.

    The gate behind option k stands for the question whether the option is larger than k, given that it is at least k.
    Its log-odds are those of `softmax(alpha)`. The sample is `clamp(s (high - low) + low, 0, 1)` with
    `s = sigmoid((log u - log(1 - u) + log-odds) / temperature)` and uniform u. An entry of a mask is the product of the
    gates up to it. A gate of even odds is 0 or 1 in a third of its samples, a decided one nearly always. So as alpha
    decides, masks have few entries between 0 and 1, and trained weights keep their scale.

    A row of options that are not nested has gates too, in the order of its options.

    Args:
        temperature: Temperature of the gates at the start of the search.
        final_temperature: Temperature of the gates at the end, reached linearly with the epochs; None keeps it.
        low, high: The ends of the interval that is clamped, below 0 and above 1.
        weight_decay: See `darts`.
    """

    def __init__(
        self,
        temperature: float = 2 / 3,
        final_temperature: float | None = None,
        low: float = -0.1,
        high: float = 1.1,
        weight_decay: float = 0.0,
    ):
        super().__init__(temperature, final_temperature)
        if not -math.inf < low < 0 or not 1 < high < math.inf:
            raise TangleNASError(
                f"the gates of {self.name or type(self).__name__} are clamped from {low!r} to {high!r}: expected a low "
                "below 0 and a high above 1, both finite, as other gates are never exactly 0 or 1"
            )
        self.low, self.high, self.weight_decay = low, high, within("weight_decay", weight_decay, 0)

    def sample(self, step: int, stream: str) -> Mixture:
        generator = torch.Generator().manual_seed(self.derive_seed(step, stream))
        return self.space.mixture({count: self._rows(alpha, generator) for count, alpha in self.alphas.items()})

    def expected(self) -> Mixture:
        return self.space.mixture({count: alpha.softmax(1) for count, alpha in self.alphas.items()})

    def regularizer(self) -> Tensor:
        return self.weight_decay * l2(self.parameters())

    def _rows(self, alpha: Tensor, generator: torch.Generator) -> Tensor:
        """Return sampled rows, which are not negative and sum to 1, `(rows, K)`."""
        beyond = alpha.flip(1).logcumsumexp(1).flip(1)[:, 1:]
        odds = beyond - alpha[:, :-1]
        # Uniform numbers of float32 may be 0 or round to 1.
        uniform = torch.rand(odds.shape, generator=generator, dtype=odds.dtype).clamp(1e-6, 1 - 1e-6).to(odds.device)
        soft = ((uniform.logit() + odds) / self.temperature).sigmoid()
        gates = (soft * (self.high - self.low) + self.low).clamp(0, 1)
        reached = torch.cat([torch.ones_like(alpha[:, :1]), gates.cumprod(1), torch.zeros_like(alpha[:, :1])], 1)
        return reached[:, :-1] - reached[:, 1:]
