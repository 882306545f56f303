"""An optimizer with a softmax over alpha that is soft at first and decided in the end."""

from tanglenas_engine import Optimizer


class ExampleOptimizer(Optimizer):
    """An optimizer with the mixture `softmax(alpha / temperature)`, whose temperature falls from `start` to `end`."""

    def __init__(self, start: float = 1.0, end: float = 0.1):
        super().__init__()
        self.start, self.end = start, end
        self.temperature = start

    def set_progress(self, fraction: float) -> None:
        self.temperature = self.start * (self.end / self.start) ** fraction

    def expected(self):
        return self.space.mixture({k: (alpha / self.temperature).softmax(1) for k, alpha in self.alphas.items()})

    def sample(self, step: int, stream: str):
        return self.expected()
