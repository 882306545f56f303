"""Layers in order of importance: an architecture of a smaller depth drops those without which the loss rises least.

Layers do not commute. So they keep their places, and the order says only which of them a depth keeps: the largest
network stays the same (see `elastic.Depth`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.depth import Depth
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.space import SearchSpace


def order_layers(
    space: SearchSpace, loss: Callable[[Tensor, Tensor], Tensor], batches: Sequence[tuple[Tensor, Tensor]]
) -> list[str]:
    """Put the layers of every depth in order by the largest network's loss without them.

    Layers are dropped one by one, each time the one without which the mean loss over the batches is lowest, until the
    smallest depth is reached. The layers that then remain stay in front, in their own order. A layer whose output has
    another shape than its input is never dropped. Other depths keep all their layers meanwhile. Depths whose layers
    differ by more than their weights stay as they are, where networks are built by the places of layers.

    Args:
        space: The space, with trained weights.
        loss: A function of outputs and targets.
        batches: The inputs and targets on which the loss is measured.

    Returns:
        A sentence for each depth.

    Raises:
        TangleNASError: There is no batch.
    """
    if not batches:
        raise TangleNASError("the order of layers needs a batch of data, but there is none")
    stacks: dict[tuple[object, ...], list[tuple[str, Depth]]] = {}
    told = []
    for name, module in space.named_modules():
        if not (isinstance(module, Depth) and module.depth.min < module.depth.max):
            continue
        if module.interchangeable:
            stacks.setdefault((*module.depth.rows, *module.depth.values), []).append((name, module))
        else:
            told.append(f"layers of {name} differ, so they keep their order")
    if not stacks and not told:
        return [f"no depth of {space.label} is chosen, so there are no layers to order"]

    def measured() -> float:
        with torch.no_grad():
            return sum(float(loss(space(inputs), targets)) for inputs, targets in batches) / len(batches)

    with space.as_largest():
        whole = measured()
        for stack in stacks.values():
            depths = [module for _, module in stack]
            fixed = _reshaping(space, depths, batches[0][0])
            kept, now = list(range(depths[0].depth.max)), whole
            dropped: list[int] = []
            while len(kept) > depths[0].depth.min and (able := [layer for layer in kept if layer not in fixed]):
                losses = {}
                for layer in able:
                    with _without(depths, [*dropped, layer]):
                        losses[layer] = measured()
                least = min(able, key=losses.__getitem__)
                kept.remove(least)
                dropped.append(least)
                now = losses[least]
            order = [*kept, *reversed(dropped)]
            for module in depths:
                module.put_in_order(order)
            numbers = ", ".join(str(layer + 1) for layer in dropped) or "none"
            told.append(
                f"layers of {' and '.join(name for name, _ in stack)} are dropped in the order {numbers}: the loss is "
                f"{whole:.4g} with all of them and {now:.4g} without these"
            )
    return told


class _Passing(nn.Module):
    """A layer that returns its input, whatever context comes with it."""

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return x


@contextmanager
def _without(depths: Sequence[Depth], layers: Sequence[int]) -> Iterator[None]:
    """Leave layers out inside the block."""
    taken = [(depth, layer, depth[layer]) for depth in depths for layer in layers]
    for depth, layer, _ in taken:
        depth[layer] = _Passing()
    try:
        yield
    finally:
        for depth, layer, module in taken:
            depth[layer] = module


def _reshaping(space: SearchSpace, depths: Sequence[Depth], inputs: Tensor) -> set[int]:
    """Return the numbers of the layers whose output has another shape than their input."""
    found: set[int] = set()

    def look(number: int, _: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        if given[0].shape != output.shape:
            found.add(number)

    handles = [layer.register_forward_hook(partial(look, i)) for depth in depths for i, layer in enumerate(depth)]
    try:
        with torch.no_grad():
            space(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
