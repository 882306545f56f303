"""The sandwich rule (Yu and Huang 2019, arXiv:1903.05134) with in-place distillation.

The distillation is that of BigNAS (Yu et al. 2020, arXiv:2003.11142): the largest network teaches the others.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tanglenas_engine import Architecture, Optimizer, Source, Step, at_least, within


class Sandwich(Optimizer):
    """An optimizer that trains the largest network, the smallest and a few random ones in every step, on one batch.

    The largest network learns from the labels. The others learn from labels and from its predictions: a share of their
    loss is the cross-entropy to its softmax, without a gradient to it. Gradients add up, as in the papers, and
    `search.clip` clips their sum. The search reports the loss and the accuracy of the largest network.

    In a search within a band, the largest network of the whole space teaches, because it has the most weights in common
    with the others, and one more network of the band is drawn in place of the smallest.

    Args:
        random: Random architectures in a step.
        distillation: The share of the largest network's predictions in the loss of the others, from 0 to 1. In the
            papers it is 1. A largest network that knows nothing yet is then held back by the others, which share its
            weights, and a short search may not get beyond the frequencies of the classes.
    """

    learns_architecture = False
    derivation = "random"

    def __init__(self, random: int = 2, distillation: float = 0.5):
        super().__init__()
        self.random, self.distillation = at_least("random", random, 0), within("distillation", distillation, 0, 1)

    def draw_from(self, source: Source) -> None:
        super().draw_from(source)
        space = self.space
        self._largest = space.largest()
        self._smallest = space.smallest() if source is space else None

    def sample(self, step: int, stream: str) -> Architecture:
        return self.draw(step, f"{stream}/0")

    def weight_losses(self, step: Step) -> Iterator[Tensor]:
        inputs, targets = step.weight_batch
        self.enter(self._largest)
        outputs = step.space(inputs)
        loss = step.loss(outputs, targets)
        step.outputs, step.reported = (teacher := outputs.detach()), loss.detach()
        yield loss
        drawn = (self.draw(step.index, f"weight/{i}") for i in range(self.random))
        for architecture in (self._smallest or self.draw(step.index, "weight/smallest"), *drawn):
            self.enter(architecture)
            outputs = step.space(inputs)
            yield self._taught(step, outputs, targets, teacher)

    def _taught(self, step: Step, outputs: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of a smaller network, by the labels and by the largest network's predictions."""
        if self.distillation == 0:
            return step.loss(outputs, targets)
        taught = step.mean(_distilled(outputs, teacher), targets)
        if self.distillation == 1:
            return taught
        return (1 - self.distillation) * step.loss(outputs, targets) + self.distillation * taught


def _distilled(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropies to the teacher's probabilities, `(B,)` or `(B, T)`: one for each target."""
    return -(teacher.softmax(-1) * outputs.log_softmax(-1)).sum(-1)
