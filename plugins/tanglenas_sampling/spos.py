"""SPOS: one uniformly drawn path in each step; the architecture is derived afterwards (Guo et al. 2020)."""

from tanglenas_engine import Architecture, Optimizer


class SPOS(Optimizer):
    """An optimizer that trains the weights of a random architecture in every step, with real slices."""

    learns_architecture = False
    derivation = "random"

    def sample(self, step: int, stream: str) -> Architecture:
        return self.draw(step, stream)
