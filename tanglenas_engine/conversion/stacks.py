"""Stacks of layers in a recording, whose depth may vary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from tanglenas_engine.conversion.analysis import Analysis
from tanglenas_engine.conversion.dimensions import unite
from tanglenas_engine.conversion.record import BATCHES

Span = tuple[list[fx.Node], list[fx.Node], list[fx.Node]]
"""The nodes of a module's call, its tensors and the tensors that it returns."""


@dataclass
class Layers:
    """A container whose modules run one after the other, each on the output of the one before it.

    Attributes:
        path: The container.
        names: The modules in it.
        nodes: The nodes of each module.
        inputs: The node that each module reads.
        outputs: The node that each module returns.
        context: The nodes that all modules read besides.
        changing: The number of modules up to the last one that changes the shape of its input.
        least: The smallest depth. From there on, modules return what has the shape of their input.
    """

    path: str
    names: list[str]
    nodes: list[list[fx.Node]]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    context: list[fx.Node]
    least: int
    changing: int = 0

    def prefix(self, position: int) -> str:
        """Return the start of the names of what is in a module."""
        return f"{self.path}.{self.names[position]}."


def find_stacks(model: nn.Module, spans: Mapping[str, list[Span]], analysis: Analysis) -> list[Layers]:
    """Return the stacks of a recording in the order of the modules. Of nested ones, the inner ones are taken."""
    found: list[Layers] = []
    for path, module in reversed(list(model.named_modules())):
        if path and isinstance(module, nn.Sequential | nn.ModuleList):
            inside = any(stack.path.startswith(f"{path}.") for stack in found)
            if not inside and (stack := _stack(path, module, spans, analysis)) is not None:
                found.append(stack)
    return found[::-1]


def _stack(path: str, module: nn.Module, spans: Mapping[str, list[Span]], analysis: Analysis) -> Layers | None:
    names = list(module._modules)
    calls = [spans.get(f"{path}.{name}", []) for name in names]
    if names != [str(i) for i in range(len(names))]:
        return None
    if len(names) < 2 or any(len(call) != 1 or not call[0][1] or len(call[0][2]) != 1 for call in calls):
        return None
    nodes = [[node for node in call[0][0] if not node.meta.get("special")] for call in calls]
    inputs, outputs = [call[0][1] for call in calls], [call[0][2][0] for call in calls]
    stack = Layers(path, names, nodes, [given[0] for given in inputs], outputs, inputs[0][1:], 0)
    if any(given[1:] != stack.context for given in inputs) or stack.inputs[1:] != stack.outputs[:-1]:
        return None
    shapes = [(x.meta["shapes"], y.meta["shapes"]) for x, y in zip(stack.inputs, outputs, strict=True)]
    batched = all(x.meta["floating"] and x.meta["shapes"][0] % BATCHES[0] == 0 for x in stack.inputs)
    stack.changing = max([0, *(i + 1 for i, (before, after) in enumerate(shapes) if before != after)])
    stack.least = max(1, stack.changing)
    if stack.least == len(names) or not batched or not all(_closed(stack, i) for i in range(len(names))):
        return None
    for output in outputs[stack.least :]:
        for first, second in zip(analysis.of(outputs[stack.least - 1]), analysis.of(output), strict=True):
            unite(first, second, "its factors do not align over the depth")
    return stack


def _closed(stack: Layers, position: int) -> bool:
    """Return True if a module of a stack reads and writes nothing but its tensors, its inputs and its output."""
    nodes, returned = set(stack.nodes[position]), stack.outputs[position]
    given = {stack.inputs[position], *stack.context}
    for node in nodes:
        if node.op in ("get_attr", "call_module") and not str(node.target).startswith(stack.prefix(position)):
            return False
        sources = {source for source in node.all_input_nodes if not source.meta.get("special")}
        if sources - nodes - given or (node is not returned and set(node.users) - nodes):
            return False
    # A module that is left out leaves no output for others than the next module.
    after = set(stack.nodes[position + 1]) if position + 1 < len(stack.nodes) else set(returned.users)
    return returned in nodes and not set(returned.users) - after
