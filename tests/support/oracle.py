"""Algorithm 1 of the paper to the letter, in plain torch: the independent judge of masks and elastic layers.

For every architecture: cut its slice out of the weight, pad it with zeros to the full shape, weigh it by the
probability of the architecture, and sum. Nothing here calls the engine. What a dimension means is written down
in `DIMENSIONS` as ordinary arithmetic, which the engine evaluates on Sizes and the oracle on numbers.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def make_divisible(number: float, divisor: int) -> int:
    """MobileNet's rule, for numbers."""
    nearest = max(divisor, divisor * int((number + divisor / 2) / divisor))
    return nearest + divisor if nearest < 0.9 * number else nearest


@dataclass(frozen=True)
class Dimension:
    """A dimension as arithmetic over the choices `names`, called with an object that has them as attributes."""

    names: str
    of: Callable[[Any], Any]


DIMENSIONS = {
    "3": Dimension("", lambda v: 3),
    "E": Dimension("E", lambda v: v.E),
    "F": Dimension("F", lambda v: v.F),
    "E*R": Dimension("ER", lambda v: v.E * v.R),
    "F*R": Dimension("FR", lambda v: v.F * v.R),
    "E*R*S": Dimension("ERS", lambda v: v.E * v.R * v.S),
    "divisible(E*R)": Dimension("ER", lambda v: v.make_divisible(v.E * v.R, 4)),
    "E+F": Dimension("EF", lambda v: v.E + v.F),
    "2*E": Dimension("E", lambda v: 2 * v.E),
}


@dataclass
class Oracle:
    """A mixture over named choices: `options` and, for each, the `probabilities` of its options."""

    options: Mapping[str, Sequence[float]]
    probabilities: Mapping[str, Tensor]
    padded: int = field(default=0, init=False)

    def architectures(self, names: str) -> Iterator[tuple[SimpleNamespace, Tensor]]:
        """Every combination of the options of `names`, with the product of their probabilities."""
        names = "".join(sorted(set(names)))
        for picks in itertools.product(*(range(len(self.options[name])) for name in names)):
            probability = torch.ones((), dtype=torch.float64)
            for name, pick in zip(names, picks, strict=True):
                probability = probability * self.probabilities[name][pick]
            chosen = {name: self.options[name][pick] for name, pick in zip(names, picks, strict=True)}
            yield SimpleNamespace(make_divisible=make_divisible, **chosen), probability

    def numbers(self, dimension: Dimension) -> list[int]:
        """All values that a dimension can take."""
        return [int(dimension.of(chosen)) for chosen, _ in self.architectures(dimension.names)]

    def superposed(self, weight: Tensor, *used: "Used | None") -> Tensor:
        """The sum over architectures of probability times padded slice; None keeps a dimension whole."""
        total = torch.zeros_like(weight)
        for chosen, probability in self.architectures("".join(u.dimension.names for u in used if u)):
            places = [
                u.places(int(u.dimension.of(chosen)), length) if u else list(range(length))
                for u, length in zip(used, weight.shape, strict=True)
            ]
            grid = tuple(
                torch.tensor(p).reshape([-1 if i == d else 1 for i in range(weight.dim())])
                for d, p in enumerate(places)
            )
            total = total + probability * torch.zeros_like(weight).index_put(grid, weight[grid])
            self.padded += 1
        return total

    def coverage(self, dimension: Dimension) -> Tensor:
        """P(size > i) for every entry of a dimension."""
        ones = torch.ones(max(self.numbers(dimension)), dtype=torch.float64)
        return self.superposed(ones, Used(dimension))


@dataclass(frozen=True)
class Used:
    """How an architecture uses a dimension: the first entries of each of `parts`, or the central window."""

    dimension: Dimension
    parts: int = 1
    window: bool = False

    def places(self, size: int, length: int) -> list[int]:
        if self.window:
            margin = (length - size) // 2
            return list(range(margin, length - margin))
        block = length // self.parts
        return [part * block + i for part in range(self.parts) for i in range(size)]


def layer_norm(x: Tensor, coverage: Tensor, eps: float) -> Tensor:
    """Normalised by statistics in which entry i counts `coverage[i]` times, one position at a time."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        mean = torch.dot(row, coverage) / coverage.sum()
        variance = torch.dot((row - mean) ** 2, coverage) / coverage.sum()
        rows.append((row - mean) / torch.sqrt(variance + eps))
    return torch.stack(rows).reshape(x.shape)


def rms_norm(x: Tensor, coverage: Tensor, eps: float) -> Tensor:
    """Divided by a root mean square in which entry i counts `coverage[i]` times, one position at a time."""
    rows = [row / torch.sqrt(torch.dot(row**2, coverage) / coverage.sum() + eps) for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).reshape(x.shape)


def heads(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention of `(B, H, N, D)`, with the softmax written out."""
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    if causal:
        later = torch.arange(q.shape[2])[None, :] > torch.arange(q.shape[2])[:, None]
        logits = logits.masked_fill(later, -torch.inf)
    return torch.einsum("bhij,bhjd->bhid", F.softmax(logits, -1), v)


def turned(x: Tensor, base: float) -> Tensor:
    """Rotary positions of `(B, H, N, D)` as products of complex numbers: entries i and i + D/2 are one."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half], x[..., half:])
    for position in range(x.shape[2]):
        for i in range(half):
            angle = torch.tensor(position / base ** (i / half), dtype=torch.float64)
            numbers[:, :, position, i] = numbers[:, :, position, i] * torch.exp(1j * angle)
    return torch.cat([numbers.real, numbers.imag], -1)
