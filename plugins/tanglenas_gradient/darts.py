"""DARTS: softmax mixtures, first order (Liu et al. 2019).

Differs from the paper's code, which uses sparsemax where weights are entangled.
"""

from torch import Tensor

from tanglenas_engine import Optimizer
from tanglenas_engine.mixture import Mixture
from tanglenas_engine.optimizer import l2


class DARTS(Optimizer):
    """The mixture is `softmax(alpha)`; nothing is sampled.

    Args:
        weight_decay: Pulls alpha to 0, the uniform mixture, by `weight_decay / 2 * |alpha|^2` in the loss, as
            Adam's option of that name does.
    """

    def __init__(self, weight_decay: float = 1e-3):
        super().__init__()
        self.weight_decay = weight_decay

    def sample(self, step: int, stream: str) -> Mixture:
        return self.expected()

    def expected(self) -> Mixture:
        return self._space.mixture({count: alpha.softmax(1) for count, alpha in self.alphas.items()})

    def regularizer(self) -> Tensor:
        return self.weight_decay * l2(self.parameters())
