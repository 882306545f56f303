"""DARTS: softmax mixtures, first order (Liu et al. 2019).

It differs from the code of the TangleNAS paper, which uses sparsemax where weights are entangled.
"""

from torch import Tensor

from tanglenas_engine import Mixture, l2, within
from tanglenas_gradient.annealed import Annealed


class DARTS(Annealed):
    """An optimizer whose mixture is `softmax(alpha / temperature)`; it samples nothing.

    Args:
        weight_decay: Pulls alpha to 0, the uniform mixture, by `weight_decay / 2 * |alpha|^2` in the loss, as Adam's
            option of that name does. Alpha then comes to rest at its mean gradient divided by `weight_decay`: a row
            whose gradient is smaller never decides, however long the search is.
        temperature: Temperature at the start of the search.
        final_temperature: Temperature at the end, reached linearly with the epochs; None keeps the temperature.
    """

    def __init__(self, weight_decay: float = 0.0, temperature: float = 1.0, final_temperature: float | None = None):
        super().__init__(temperature, final_temperature)
        self.weight_decay = within("weight_decay", weight_decay, 0)

    def sample(self, step: int, stream: str) -> Mixture:
        return self.expected()

    def expected(self) -> Mixture:
        return self.space.mixture({count: logits.softmax(1) for count, logits in self.logits().items()})

    def regularizer(self) -> Tensor:
        return self.weight_decay * l2(self.parameters())
