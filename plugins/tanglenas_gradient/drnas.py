"""DrNAS: mixtures drawn from a learned Dirichlet distribution (Chen et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from tanglenas_engine import Mixture, l2, positive, unknown
from tanglenas_gradient.annealed import Annealed

REGULARIZERS = ("l2", "kl", "none")


class DrNAS(Annealed):
    """An optimizer that draws mixtures from `Dirichlet(elu(alpha / temperature) + 1)`, with pathwise gradients.

    Args:
        regularizer: "none" adds nothing. "l2" pulls alpha to 0, the uniform Dirichlet, by `scale / 2 * |alpha|^2`; in
            the paper, this is the weight decay of the architecture optimizer (see `darts`). "kl" adds
            `scale * KL(Dirichlet || uniform)`.
        scale: Weight of the regularizer.
        temperature: Temperature at the start of the search.
        final_temperature: Temperature at the end, reached linearly with the epochs; None keeps the temperature.
    """

    def __init__(
        self,
        regularizer: str = "none",
        scale: float = 1e-3,
        temperature: float = 1.0,
        final_temperature: float | None = None,
    ):
        super().__init__(temperature, final_temperature)
        if regularizer not in REGULARIZERS:
            raise unknown("regularizer of drnas", regularizer, REGULARIZERS)
        self._regularizer, self.scale = regularizer, positive("the regularizer's scale", scale)

    def sample(self, step: int, stream: str) -> Mixture:
        # torch.manual_seed would seed the generators of all kinds of devices, which takes longer than the draws.
        device = next(iter(self.alphas.values())).device
        generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        before = generator.get_state()
        generator.manual_seed(self.derive_seed(step, stream))
        draws = {count: Dirichlet(c, validate_args=False).rsample() for count, c in self._concentrations().items()}
        generator.set_state(before)
        return self.space.mixture(draws)

    def expected(self) -> Mixture:
        return self.space.mixture({n: c / c.sum(1, keepdim=True) for n, c in self._concentrations().items()})

    def regularizer(self) -> Tensor | None:
        if self._regularizer == "none":
            return None
        if self._regularizer == "l2":
            return self.scale * l2(self.parameters())
        pairs = [
            (Dirichlet(c, validate_args=False), Dirichlet(torch.ones_like(c))) for c in self._concentrations().values()
        ]
        return self.scale * sum(kl_divergence(learned, uniform).sum() for learned, uniform in pairs)

    def _concentrations(self) -> dict[int, Tensor]:
        # In float32, logits from -17 down give 0. At this concentration, samples and gradients are not finite.
        return {n: (torch.nn.functional.elu(logits) + 1).clamp_min(1e-6) for n, logits in self.logits().items()}
