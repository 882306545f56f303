"""DrNAS: mixtures drawn from a learned Dirichlet distribution (Chen et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from tanglenas_engine import Mixture, l2, positive, unknown
from tanglenas_gradient.annealed import Annealed

REGULARIZERS = ("l2", "kl", "none")


class DrNAS(Annealed):
    """Mixtures are `Dirichlet(elu(alpha / temperature) + 1)`, with pathwise gradients.

    Args:
        regularizer: "l2" pulls alpha to 0, the uniform Dirichlet, by `scale / 2 * |alpha|^2` (the paper has it
            as weight decay of the architecture optimizer); "kl" adds `scale * KL(Dirichlet || uniform)`; "none".
        scale: The regularizer's weight.
        temperature: At the start of the search; it falls linearly with the epochs to `final_temperature`, if given.
    """

    def __init__(
        self,
        regularizer: str = "l2",
        scale: float = 1e-3,
        temperature: float = 1.0,
        final_temperature: float | None = None,
    ):
        super().__init__(temperature, final_temperature)
        if regularizer not in REGULARIZERS:
            raise unknown("regularizer of drnas", regularizer, REGULARIZERS)
        self._regularizer, self.scale = regularizer, positive("the regularizer's scale", scale)

    def sample(self, step: int, stream: str) -> Mixture:
        devices = {alpha.device for alpha in self.alphas.values() if alpha.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.derive_seed(step, stream))
            draws = {count: Dirichlet(c, validate_args=False).rsample() for count, c in self._concentrations().items()}
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
        # From logits of -17 on float32 gives 0, which is no Dirichlet: neither samples nor gradients are finite then.
        return {n: (torch.nn.functional.elu(logits) + 1).clamp_min(1e-6) for n, logits in self.logits().items()}
