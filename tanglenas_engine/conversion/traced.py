"""A recorded forward over elastic layers, and the torch.fx network of an architecture that follows from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx, nn

from tanglenas_engine import elastic
from tanglenas_engine.conversion.forms import Holder, Number
from tanglenas_engine.conversion.likeness import alike
from tanglenas_engine.elastic.base import Elastic, plain, sliced_state
from tanglenas_engine.elastic.parts import part
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.size import Assignment, Axis, Size


@dataclass(frozen=True)
class Reference:
    """The place in a graph of a number that an architecture decides: its position among a module's numbers."""

    index: int


class Stack(elastic.Depth):
    """An elastic depth in place of the container that held the layers in the given model."""

    def set_depth(self, depth: Size, least: int, placed: bool) -> None:
        """Take the depth.

        Args:
            depth: The depth.
            least: The number of layers that every architecture has.
            placed: True if layers differ by their places: the model uses parts of single layers outside of the stack,
                too, or some layers share parameters that others do not share.
        """
        self.depth, self.least, self.placed = depth, least, placed
        self._depths = sorted({int(value) for value in depth.values})
        self.declare(outputs=(Axis(depth, layout="value", role="value"),))

    def put_in_order(self, order: Sequence[int]) -> None:
        """Keep layers in this order. Those that change the shape of what they read are always there, so come first.

        Raises:
            TangleNASError: The order is not one of all layers, or a layer may go that must be there.
        """
        if not {*range(self.least)} <= {*order[: self.depth.min]}:
            raise TangleNASError(
                f"the first {self.least} layers change the shape of what they read, so that they stay: {list(order)} "
                "lets one of them go"
            )
        super().put_in_order(order)

    @cached_property
    def interchangeable(self) -> bool:  # type: ignore[override]
        """True if networks are the same with and without an order, apart from their weights.

        Layers with the same options are then the same network, none of them is used outside of the stack, and all have
        the same ties. Layers that every architecture has may differ.
        """
        return not self.placed and alike([part(self, str(number)) for number in range(self.least, len(self))])


class Traced(Holder):
    """A module that runs a recorded graph over its own elastic layers.

    The graph has a `Reference` in place of each number that an architecture decides. The `meta` of a node has
    "operation", the position among `_operations` of the module that computes it in the supernet.
    """

    _program: fx.Graph
    _run: Callable[..., Any]

    def set_program(self, graph: fx.Graph, sizes: list[Size], operations: list[nn.Module]) -> None:
        """Take a graph to run.

        Args:
            graph: The graph, with references to sizes and operations.
            sizes: The sizes of the references.
            operations: The modules of nodes that need one in the supernet.
        """
        self._numbers = nn.ModuleList(map(Number, sizes))
        self._operations = nn.ModuleList(operations)
        self._program = graph
        self._compile()

    @property
    def itself(self) -> Traced:
        """The module, under a name that its code can use."""
        return self

    def forward(self, *inputs: Any) -> Any:
        return self._run(self, *inputs)

    def _compile(self) -> None:
        code = self._supernet_graph().python_code("self")
        scope: dict[str, Any] = {}
        exec(compile(code.src, f"<recorded forward of {type(self).__name__}>", "exec"), dict(code.globals), scope)
        self._run = scope["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()

    def _supernet_graph(self) -> fx.Graph:
        """Return the graph that reads numbers, parameters and operations from elastic modules.

        It reads all parts by their names (see `elastic.parts`), as attributes of spaces may have these, too.
        """
        graph, env = fx.Graph(), {}
        inputs = [node for node in self._program.nodes if node.op == "placeholder"]
        for node in inputs:
            env[node] = graph.placeholder(str(node.target))
        itself = graph.create_node("get_attr", "itself")

        def read(name: str) -> fx.Node:
            return graph.call_function(part, (itself, name)) if name else itself

        def called(name: str, args: Any, kwargs: Any) -> fx.Node:
            return graph.call_function(_called, (read(name), *args), kwargs)

        def number(reference: Reference) -> fx.Node:
            return called(f"_numbers.{reference.index}", (), {})

        for node in self._program.nodes:
            args, kwargs = (_mapped(value, env, number) for value in (node.args, node.kwargs))
            name, position = str(node.target), node.meta.get("operation")
            if node.op == "get_attr" and (held := self._holder(name)):
                env[node] = graph.call_method("current", (read(held[0]), held[1]))
            elif node.op == "get_attr":
                env[node] = read(name)
            elif position is not None or node.op == "call_module":
                env[node] = called(name if position is None else f"_operations.{position}", args, kwargs)
            elif node.op != "placeholder":
                env[node] = graph.create_node(node.op, node.target, args, kwargs)
        return graph

    def _holder(self, name: str) -> tuple[str, str] | None:
        """Return the module and the key of a tensor that varies, or None for any other attribute."""
        owner, _, key = name.rpartition(".")
        try:
            module = part(self, owner)
        except AttributeError:
            return None
        return (owner, key) if isinstance(module, Elastic) and key in module.axes else None

    def plain(self, assignment: Assignment) -> fx.GraphModule:
        """Return the network of an architecture: torch layers, and the recorded code with the numbers that it needs."""
        network = fx.GraphModule(nn.Module(), fx.Graph())
        network.__class__.__name__ = "GraphModule"
        called = {part(self, str(node.target)) for node in self._program.nodes if node.op == "call_module"}
        self._fill(network, self, assignment, {self: network}, called)
        graph = fx.Graph()
        env: dict[fx.Node, Any] = {}

        def number(reference: Reference) -> int:
            found: Any = self._numbers[reference.index]
            return found.size.value(assignment)  # type: ignore[no-any-return]

        for node in self._program.nodes:
            args, kwargs = (_mapped(value, env, number) for value in (node.args, node.kwargs))
            if node.op == "call_module" and isinstance(stack := part(self, str(node.target)), Stack):
                x, *context = args
                for place in range(len(stack.kept(assignment))):
                    x = graph.call_module(f"{node.target}.{place}", (x, *context))
                env[node] = x
            else:
                env[node] = graph.create_node(node.op, node.target, args, kwargs)
        network.graph = graph
        return network

    def _fill(
        self,
        target: nn.Module,
        source: nn.Module,
        assignment: Assignment,
        made: dict[nn.Module, nn.Module],
        called: set[nn.Module],
    ) -> None:
        """Give a module the tensors and children that an architecture has of `source`.

        Modules that the graph calls are made plain. Others only hold tensors.
        """
        state = sliced_state(source, assignment)
        for name, parameter in source._parameters.items():
            value = None if parameter is None else nn.Parameter(state[name], parameter.requires_grad)
            target.register_parameter(name, value)
        for name, buffer in source._buffers.items():
            persistent = name not in source._non_persistent_buffers_set
            target.register_buffer(name, None if buffer is None else state[name], persistent=persistent)
        for name, child in source._modules.items():
            if child is None or (source is self and name in ("_numbers", "_operations")):
                continue
            if child not in made:
                if isinstance(child, Stack):
                    made[child] = nn.Module()
                    for place, layer in enumerate(child.kept(assignment).values()):
                        made[child].add_module(str(place), plain(layer, assignment))
                elif child in called:
                    made[child] = plain(child, assignment) if isinstance(child, Elastic) else copy.deepcopy(child)
                else:
                    made[child] = nn.Module()
                    self._fill(made[child], child, assignment, made, called)
            target.add_module(name, made[child])
            if not called.intersection(child.modules()) and not [*made[child].parameters(), *made[child].buffers()]:
                target._modules.pop(name)  # the graph has what it computed


def _called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _mapped(value: Any, env: Mapping[fx.Node, Any], number: Callable[[Reference], Any]) -> Any:
    """Return arguments of a node with nodes and numbers replaced."""
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, Reference):
        return number(value)
    if isinstance(value, tuple | list):
        return (
            type(value)(_mapped(item, env, number) for item in value)
            if type(value) in (tuple, list)
            else tuple(_mapped(item, env, number) for item in value)
        )
    if isinstance(value, Mapping):
        return {key: _mapped(item, env, number) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(item, env, number) for item in (value.start, value.stop, value.step)))
    return value
