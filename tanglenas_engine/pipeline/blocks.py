"""The blocks of a network as people count them: what each puts out, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tanglenas_engine.elastic import Depth
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.products import ProductCounter, Run, counted, in_plain_products
from tanglenas_engine.spaces.space import SearchSpace


@dataclass(frozen=True)
class Block:
    """A block of a network.

    Attributes:
        name: Its number as layers are numbered, or its name in the network.
        kind: The name of its class.
        output: The shape that it puts out for one input: channels x height x width, or tokens x channels.
        stride: The height that comes in by the height that goes out; None where it has no image.
        macs: Its multiply-accumulates for one input.
    """

    name: str
    kind: str
    output: str
    stride: int | None
    macs: int


def blocks(space: SearchSpace, architecture: Architecture) -> list[Block]:
    """Return the blocks of a found network that multiply, in the order in which they run.

    Lists of modules are opened; what is in them is a block. The layers of a recorded network are blocks, and what its
    functions multiply is one more.
    """
    with torch.random.fork_rng(devices=[]):  # looking at a network changes no number of a run
        network, example = space.standalone(architecture).float(), space.example_input(1)
    return counted(partial(_counted, network.eval(), example, _numbers(space)))


def _counted(network: nn.Module, example: Tensor, numbers: Mapping[str, str], run: Run) -> list[Block]:
    """Return the blocks of a network, which are called by the given numbers, as a run shows them."""
    found: list[Block] = []
    counter = ProductCounter()
    whole: list[int] = []
    hooks: list[Any] = []

    def watch(module: nn.Module, name: str | None) -> None:
        before: list[int] = []

        def enter(_: nn.Module, inputs: Any) -> None:
            counter.enter(module)
            before.append(counter.own.total())

        def leave(_: nn.Module, inputs: Any, output: Any) -> None:
            counter.leave()
            macs = counter.own.total() - before.pop()
            if name is None:
                whole.append(macs)
            elif macs:
                came, went = (_first(value) for value in (inputs, output))
                kind = type(module).__name__
                found.append(Block(numbers.get(name, name), kind, _shape(went), _stride(came, went), macs))

        hooks.extend((module.register_forward_pre_hook(enter), module.register_forward_hook(leave)))

    watch(network, None)
    for name, module in _units(network):
        watch(module, name)
    try:
        with in_plain_products(), counter:
            run(network, example)
    finally:
        for hook in hooks:
            hook.remove()
    if left := sum(whole) - sum(block.macs for block in found):
        found.append(Block("others", "functions", "", None, left))
    return found


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, GraphModule):
        called = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "call_module")
        yield from ((name, module.get_submodule(name)) for name in called)
        return
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from _units(child, f"{name}.")
        else:
            yield name, child


def _numbers(space: SearchSpace) -> dict[str, str]:
    """Return the number of each layer in a list of a chosen depth by its name, as `tanglenas show` counts them."""
    staged = any(len(choice.stages) > 1 for choice in space.choices.values())
    lists = [(name, module) for name, module in space.named_modules() if isinstance(module, Depth)]
    return {
        f"{name}.{i}": f"{stage}.{i + 1}" if staged else str(i + 1)
        for stage, (name, module) in enumerate(lists, 1)
        if staged or len(lists) == 1
        for i in range(len(module))
    }


def _first(value: Any) -> Tensor | None:
    """Return the first tensor of what goes into a module, or comes out of it."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def _shape(tensor: Tensor | None) -> str:
    return "" if tensor is None else " x ".join(map(str, tensor.shape[1:]))


def _stride(came: Tensor | None, went: Tensor | None) -> int | None:
    if came is None or went is None or came.dim() != 4 or went.dim() != 4 or not went.shape[-1]:
        return None
    return round(came.shape[-1] / went.shape[-1])
