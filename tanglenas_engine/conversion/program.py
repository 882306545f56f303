"""Programs of a space: the recording with sizes in place of numbers, and with modules for products and norms."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from tanglenas_engine.conversion.analysis import Analysis
from tanglenas_engine.conversion.dimensions import Atom, Dim, length, resolved
from tanglenas_engine.conversion.forms import FixedProduct, Product, WidthMean, WidthNorm, method
from tanglenas_engine.conversion.record import BATCHES
from tanglenas_engine.conversion.stacks import Layers
from tanglenas_engine.conversion.traced import Reference
from tanglenas_engine.superposition.size import Axis, Size

PRODUCTS = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "matmul", "bmm", "mm", "addmm",
    "baddbmm", "einsum", "scaled_dot_product_attention", "bilinear", "mv", "dot", "tensordot", "imatmul",
    "multi_head_attention_forward", "inner", "outer", "addbmm", "chain_matmul", "multi_dot", "vdot", "addmv",
}  # fmt: skip
"""Functions that multiply matrices."""


class Plan:
    """The sizes of the classes of atoms that became choices.

    Attributes:
        analysis: The dimensions of a recording.
        sizes: The size of each class that varies.
    """

    def __init__(self, analysis: Analysis):
        self.analysis = analysis
        self.sizes: dict[Atom, Size] = {}

    def varies(self, dim: Iterable[Atom]) -> bool:
        return any(atom in self.sizes for atom in resolved(dim))

    def axis(self, dim: Dim, role: str) -> Axis | None:
        """Return the axis of a dimension, or None if it never varies."""
        atoms = resolved(dim)
        position = next((i for i, atom in enumerate(atoms) if atom in self.sizes), None)
        if position is None:
            return None
        outer, inner = (math.prod(a.length for a in part) for part in (atoms[:position], atoms[position + 1 :]))
        if role == "write" and atoms[position].independent:
            role = "unit"
        return Axis(self.sizes[atoms[position]] * inner, blocks=outer, role=role, unit=inner)

    def size(self, dim: Iterable[Atom], varying: bool = False) -> Size:
        """Return the size of a dimension, or the product of its factors that vary."""
        total = Size.of(1)
        for atom in resolved(dim):
            total = total * self.sizes.get(atom, 1 if varying else atom.length)
        return total


class Program:
    """A program in the making: nodes of the recording with references to sizes and operations.

    Args:
        plan: The sizes.
        prefix: The start of the names of what is in the module that runs the program. It is cut.
    """

    def __init__(self, plan: Plan, prefix: str = ""):
        self.plan, self.prefix = plan, prefix
        self.program = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._listed: list[Size] = []
        self._operations: list[nn.Module] = []
        self._specials: dict[Any, fx.Node] = {}

    def add_inputs(self, nodes: Sequence[fx.Node]) -> None:
        """Add the inputs of a layer, and the numbers that follow from the first of them."""
        for i, node in enumerate(nodes):
            self.env[node] = self.program.placeholder(f"x{i}" if i else "x")
        self._x, self._times = self.env[nodes[0]], nodes[0].meta["shapes"][0] // BATCHES[0]

    def add(self, node: fx.Node) -> None:
        args: Any = fx.node.map_arg(node.args, self._node)
        kwargs: Any = fx.node.map_arg(node.kwargs, self._node)
        if node in self.plan.analysis.shapes:
            args, kwargs = self._sized(node, args, kwargs)
        target = node.target
        if node.op in ("get_attr", "call_module") and not node.meta.get("special"):
            target = str(target).removeprefix(self.prefix)
        made = self.env[node] = self.program.create_node(node.op, target, args, kwargs)
        if node.op == "placeholder":
            self._guard(made, node.meta["shapes"][1:])
        if (operation := self._operation(node)) is not None:
            made.meta["operation"] = len(self._operations)
            self._operations.append(operation)

    def _guard(self, x: fx.Node, expected: tuple[int, ...]) -> None:
        """Refuse inputs of another shape: numbers of the recording hold for the example's shape alone."""
        shape = self.program.call_function(getattr, (x, "shape"))
        given = self.program.call_function(operator.getitem, (shape, slice(1, None)))
        equal = self.program.call_function(operator.eq, (given, expected))
        sizes = ", ".join(map(str, expected))
        self.program.call_function(torch._assert, (equal, f"expected inputs of shape (batch, {sizes}), as recorded"))

    def add_stack(self, stack: Layers) -> None:
        """Add the call of a stack of layers, in place of the calls that were recorded."""
        given = tuple(self._node(node) for node in (stack.inputs[0], *stack.context))
        self.env[stack.outputs[-1]] = self.program.call_module(stack.path, given)

    def write(self, module: nn.Module) -> None:
        module.set_program(self.program, self._listed, self._operations)  # type: ignore[operator]

    def _node(self, node: fx.Node) -> fx.Node:
        """Return the program's node of a node. Numbers of the whole input are computed from a layer's own."""
        if node in self.env:
            return self.env[node]
        key, program = node.meta["special"], self.program
        if key not in self._specials:
            if key == "batch":
                made = program.call_method("size", (self._x, 0))
                if self._times > 1:
                    made = program.call_function(operator.floordiv, (made, self._times))
            elif key in ("device", "dtype"):
                made = program.call_function(getattr, (self._x, key))
            elif key == "training":
                made = program.create_node("get_attr", "training")
            else:  # it follows from those
                args: Any = fx.node.map_arg(node.args, self._node)
                made = program.create_node(node.op, node.target, args)
            self._specials[key] = made
        return self._specials[key]

    def _number(self, dim: Dim, given: Any) -> Any:
        """Return what stands for the length of a dimension, where the recording has the number or the node `given`."""
        size = self.plan.size(dim)
        if isinstance(given, fx.Node):  # a multiple of the batch
            batch = next(n for n in self.plan.analysis.graph.nodes if n.meta.get("special") == "batch")
            product: Any = self._node(batch), self._reference(size // BATCHES[0])
            return self.program.call_function(operator.mul, product)
        return self._reference(size)

    def _reference(self, size: Size) -> Reference:
        key = (size.rows, size.values)
        if key not in self._sizes:
            self._sizes[key] = len(self._listed)
            self._listed.append(size)
        return Reference(self._sizes[key])

    def _sized(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Put references in place of the numbers of a shape that vary."""
        number, dims = self._number, self.plan.analysis.shapes[node]
        name = self.plan.analysis.name_of(node)
        if not any(map(self.plan.varies, dims)) or name in ("flatten", "squeeze", "expand_as"):
            return args, kwargs
        numbers, keywords = node.meta["numbers"]

        def replaced(given: Any, recorded: Any, wanted: Sequence[Dim]) -> Any:
            return type(given)(
                number(dim, g) if isinstance(n, int) and n == length(dim) and self.plan.varies(dim) else g
                for g, n, dim in zip(given, recorded, wanted, strict=True)
            )

        if name == "split":
            part = next(iter([*numbers[1:2], *(v for k, v in keywords.items() if k.startswith("split_size"))]))
            new = number(dims[0], part) if isinstance(part, int) else [number(dims[0], one) for one in part]
            if len(args) > 1:
                return (args[0], new, *args[2:]), kwargs
            return args, {k: new if k.startswith("split_size") else v for k, v in kwargs.items()}
        if name in ("layer_norm", "rms_norm"):
            new = (number(dims[0], None),)
            return ((args[0], new, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "normalized_shape": new})
        if name == "unflatten":
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            given, recorded = (args[2], numbers[2]) if len(args) > 2 else (kwargs["sizes"], keywords["sizes"])
            start = dim if dim >= 0 else dim + len(dims) - len(given) + 1
            new = replaced(tuple(given), recorded, dims[start : start + len(given)])
            if len(args) > 2:
                return (*args[:2], new), kwargs
            return args, {**kwargs, "sizes": new}
        for key in ("shape", "size"):
            if key in kwargs:
                return args, {**kwargs, key: replaced(tuple(kwargs[key]), keywords[key], dims)}
        if len(args) == 2 and isinstance(args[1], tuple | list):
            return (args[0], replaced(tuple(args[1]), numbers[1], dims)), kwargs
        return (args[0], *replaced(tuple(args[1:]), numbers[1:], dims)), kwargs

    def _operation(self, node: fx.Node) -> nn.Module | None:
        """Return the module that computes a node in the supernet, or None if the call itself does."""
        if node.op not in ("call_function", "call_method"):
            return None
        name = self.plan.analysis.name_of(node)
        function = method(node.target) if isinstance(node.target, str) else node.target
        analysis = self.plan.analysis
        if node in analysis.norms:
            axis = self.plan.axis(analysis.norms[node], "statistics")
            return None if axis is None else WidthNorm(axis, name == "layer_norm")
        if node in analysis.means:
            width, number = analysis.means[node]
            axis = self.plan.axis(width, "statistics")
            return None if axis is None else WidthMean(function, axis, number)
        if name not in PRODUCTS:
            return None
        dims = self.plan.analysis.products.get(node)
        varying = [] if dims is None else [a for dim in dims for a in resolved(dim) if a in self.plan.sizes]
        if dims is None or not varying:
            return FixedProduct(function)
        constant = math.prod(a.length for dim in dims for a in resolved(dim) if a not in self.plan.sizes)
        if any(source.meta.get("batched") for source in (node, *node.all_input_nodes)):
            constant //= BATCHES[0]  # a product of parameters alone is computed once for all inputs
        return Product(function, constant, tuple(self.plan.sizes[a] for a in varying))
