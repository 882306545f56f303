"""Linear CKA between the layers of two networks, from batches (Nguyen, Raghu and Kornblith 2021, arXiv:2010.15327).

The similarity of features X and Y of the same n inputs is that of their Gram matrices, CKA(X, Y) = HSIC(K, L) / sqrt(
HSIC(K, K) HSIC(L, L)) with K = X X^T and L = Y Y^T (Kornblith et al. 2019). HSIC is estimated without bias for each
batch (Song et al. 2012), so its mean over batches does not depend on their size. With the Gram matrices' diagonals set
to 0, it is

    HSIC(K, L) = [tr(K L) + (1^T K 1) (1^T L 1) / ((n - 1) (n - 2)) - 2 (1^T K L 1) / (n - 2)] / (n (n - 3)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tanglenas_engine.errors import TangleNASError

LEAST = 4
"""The least samples of a batch for which the estimator is defined."""


class CKA:
    """The linear CKA of every layer of one network with every layer of another, over all batches that were added."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        """Add the features of a batch.

        Args:
            one, other: The features of each layer, `(B, ...)`, for the same B inputs.

        Raises:
            TangleNASError: The batch has fewer than 4 samples.
        """
        grams, others = _grams(one), _grams(other)
        parts = [_hsic(grams, others), _hsic(grams, grams).diagonal(), _hsic(others, others).diagonal()]
        self._sums = [a + b for a, b in zip(self._sums, parts, strict=True)] if self._sums else parts

    def result(self) -> Tensor:
        """Return the similarities, `(layers of the one, layers of the other)`: 1 for equal up to rotation and scale.

        A layer whose features do not differ between inputs has NaN, and so has one whose own HSIC is estimated below 0.
        The estimate may be slightly below 0 or above 1.

        Raises:
            TangleNASError: No batch was added.
        """
        if not self._sums:
            raise TangleNASError(f"CKA compares features, but no batch was given: give one of {LEAST} samples or more")
        between, one, other = self._sums
        known = (one > 0)[:, None] & (other > 0)[None]
        return torch.where(known, between / (one[:, None] * other[None]).clamp_min(1e-300).sqrt(), torch.nan)


def _grams(features: Sequence[Tensor]) -> Tensor:
    """Return the Gram matrices with a diagonal of 0, `(layers, B, B)`, in float64.

    The estimate does not change with the mean of the features. Large means would leave rounding errors of it.
    """
    flat = [one.flatten(1).double() for one in features]
    flat = [one - one.mean(0) for one in flat]
    count = len(flat[0])
    if count < LEAST:
        raise TangleNASError(f"a batch of {count} samples has no unbiased HSIC: take {LEAST} or more")
    found = torch.stack([one @ one.T for one in flat])
    return found - torch.diag_embed(found.diagonal(dim1=1, dim2=2))


def _hsic(one: Tensor, other: Tensor) -> Tensor:
    """Return the unbiased HSIC of Gram matrices `(layers, B, B)` with a diagonal of 0: `(layers, other layers)`."""
    n = one.shape[-1]
    rows, others = one.sum(2), other.sum(2)  # (layers, B)
    traces = one.flatten(1) @ other.flatten(1).T
    totals = rows.sum(1)[:, None] * others.sum(1)[None]
    return (traces + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ others.T) / (n * (n - 3))


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a network by name: its parts, and those of its outermost lists, if they have parameters."""
    found: dict[str, nn.Module] = {}
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
            found.update({f"{name}.{number}": part for number, part in child.named_children()})
        else:
            found[name] = child
    return {name: part for name, part in found.items() if any(True for _ in part.parameters())}


@contextmanager
def recorded(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the layers of a network until the block ends, those of the last call."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.detach()

        return hook

    handles = [part.register_forward_hook(record(name)) for name, part in layers(network).items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def similarity(one: nn.Module, other: nn.Module, batches: Iterable[Tensor]) -> tuple[list[str], list[str], Tensor]:
    """Return the names of the layers of two networks, and the CKA of every layer of the one with every of the other.

    Args:
        one, other: Networks with the same inputs. They are put into eval mode.
        batches: Inputs, `(B, ...)` with 4 or more samples each.

    Raises:
        TangleNASError: There is no batch, or one has fewer than 4 samples.
    """
    one.eval()
    other.eval()
    found = CKA()
    rows: list[str] = []
    columns: list[str] = []
    with recorded(one) as first, recorded(other) as second:
        for inputs in batches:
            if not rows:
                rows, columns = _of_samples(one, first, inputs), _of_samples(other, second, inputs)
            one(inputs)
            other(inputs)
            found.add([first[name] for name in rows], [second[name] for name in columns])
        return rows, columns, found.result()


def _of_samples(network: nn.Module, outputs: dict[str, Tensor], inputs: Tensor) -> list[str]:
    """Return the layers whose recorded output has a row for each sample: it loses a row with a sample.

    An embedding of positions has an output of a fixed length. A batch may have as many samples.
    """
    network(inputs)
    lengths = {name: len(output) for name, output in outputs.items()}
    network(inputs[1:])
    return [name for name, output in outputs.items() if len(output) == lengths[name] - 1]
