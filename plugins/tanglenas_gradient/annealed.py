"""A temperature of the mixture that falls during a search."""

from __future__ import annotations

from torch import Tensor

from tanglenas_engine import Optimizer, TangleNASError, positive


class Annealed(Optimizer):
    """A base of the gradient optimizers, which read alpha at a temperature.

    The mixture of the logits `alpha / temperature` is sharper at a lower temperature. As the temperature falls, the
    mixture has to decide. What the supernet computes, its expected cost and its most probable architecture then agree.

    Args:
        temperature: Temperature at the start of the search. It falls linearly with the epochs to `final_temperature`.
        final_temperature: Temperature at the end; None keeps the temperature.
    """

    def __init__(self, temperature: float, final_temperature: float | None):
        super().__init__()
        self.start = positive("temperature", temperature)
        self.end = self.start if final_temperature is None else positive("final_temperature", final_temperature)
        if self.end > self.start:
            raise TangleNASError(
                f"the temperature of {self.name or type(self).__name__} would rise from {temperature} to "
                f"{final_temperature}: it has to fall, so that mixtures get sharper. Exchange the two"
            )
        self.temperature = self.start

    def set_progress(self, fraction: float) -> None:
        super().set_progress(fraction)
        self.temperature = self.start + (self.end - self.start) * fraction

    def schedules(self) -> dict[str, float]:
        return {**super().schedules(), "temperature": self.temperature}

    def logits(self) -> dict[int, Tensor]:
        """Return alpha divided by the temperature, `(rows, K)` by the number of options."""
        return {count: alpha / self.temperature for count, alpha in self.alphas.items()}
