"""The dimensions of all tensors of a recording, by the rules of the operations (see `rules`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx, nn

from tanglenas_engine.conversion.dimensions import Atom, Dim, constant, fix, fresh, length, resolved

ALIASES = {
    "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "truediv", "negative": "neg",
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv", "ifloordiv": "floordiv", "imod": "mod",
    "ipow": "pow", "iand": "and_", "ior": "or_", "ixor": "xor", "ilshift": "lshift", "irshift": "rshift",
    "imatmul": "matmul", "floor_divide": "floordiv", "bitwise_xor": "xor",
    "concat": "cat", "concatenate": "cat", "absolute": "abs", "swapaxes": "transpose", "swapdims": "transpose",
    "moveaxis": "movedim", "tensor_split": "chunk", "remainder": "mod",
    "amin": "amax", "bmm": "matmul", "mm": "matmul", "baddbmm": "addmm", "bitwise_not": "invert",
}  # fmt: skip
"""Other names of operations. In-place operations and methods have the names of their functions."""

Dims = list[Dim]
"""The dimensions of a tensor."""

Rule = Callable[["Analysis", fx.Node, "Call"], Any]
"""A function that returns the dimensions of a node's output, and unites, makes or fixes dimensions."""


class Call:
    """The arguments of a node with the numbers of the recorded batch in place of nodes for numbers."""

    def __init__(self, node: fx.Node, name: str):
        self.node, self.name = node, name
        self.args, self.kwargs = node.meta.get("numbers", (node.args, node.kwargs))

    def get(self, position: int, key: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(key, default)

    @property
    def of_module(self) -> bool:
        """True for a call of a module, which has its parameters and options itself."""
        return self.node.op == "call_module"

    def rest(self, position: int, *keys: str) -> Any:
        """Return arguments that are given as one sequence or one by one: `view(2, 3)` or `view((2, 3))`."""
        for key in keys:
            if key in self.kwargs:
                return self.kwargs[key]
        given = self.args[position:]
        return given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given


class Unknown(Exception):
    """An error for a call that a rule does not cover."""


class Analysis:
    """The dimensions of all tensors of a recording.

    Args:
        graph: The recording.
        model: The recorded model.
        rules: The rules by name.
        refused: The reasons for operations that have no rule, where there is more to say.

    Attributes:
        dims: The dimensions of each node's output: a list for a tensor, a list of lists for several.
        stored: The dimensions of parameters and buffers by name. Tied ones have one entry per name.
        shapes: For each node, the dimensions that its numbers stand for: the shape that a reshape is given.
        products: For each node that multiplies, its number of multiply-accumulates as (dimensions, constant).
        means: For each mean over a dimension that varies, the dimension and its number, counted from the last one.
        norms: For each call of a norm over a width, the dimension.
        groups: For each convolution and norm with groups, their number.
        sums: The dimensions of tensors, by name and number, that a function sums over.
        positions: For each call of a linear layer, the dimensions of its input that it does not read.
        writers: For each node, the nodes that wrote the channels of its output. What keeps the channels of its inputs,
            such as an activation, a norm or a depthwise convolution, wrote none.
    """

    def __init__(self, graph: fx.Graph, model: nn.Module, rules: Mapping[str, Rule], refused: Mapping[str, str]):
        self.graph, self.model, self._rules, self._refused = graph, model, rules, refused
        self.modules = dict(model.named_modules())
        self.dims: dict[fx.Node, Any] = {}
        self.stored: dict[str, Dims] = {}
        self.shapes: dict[fx.Node, Dims] = {}
        self.products: dict[fx.Node, Dims] = {}
        self.means: dict[fx.Node, tuple[Dim, int]] = {}
        self.norms: dict[fx.Node, Dim] = {}
        self.groups: dict[fx.Node, Dim] = {}
        self.positions: dict[fx.Node, Dims] = {}
        self.sums: set[tuple[str, int]] = set()
        self.writers: dict[fx.Node, frozenset[fx.Node]] = {}
        self._by_tensor: dict[int, Dims] = {}
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            self._by_tensor.setdefault(id(tensor), [fresh(n) if n > 1 else constant(n) for n in tensor.shape])
            self.stored[name] = self._by_tensor[id(tensor)]
        for node in graph.nodes:
            self._visit(node)
            self.writers[node] = self._writers(node)

    def _visit(self, node: fx.Node) -> None:
        shapes: Any = node.meta.get("shapes")
        if node.op == "output":
            for source in node.all_input_nodes:
                self.fix(source, "it is a dimension of the output")
            return
        if node.meta.get("special"):
            return
        if node.op == "placeholder":
            self.dims[node] = [constant(n) for n in shapes]
        elif node.op == "get_attr":
            self.dims[node] = self.stored.get(str(node.target)) or [constant(n) for n in shapes]
        else:
            name = self.name_of(node)
            rule = self._rules.get(name)
            if rule is None:
                self.refuse(node, self._refused.get(name, f"there is no rule for {name}"))
                return
            try:
                self.dims[node] = rule(self, node, Call(node, name))
            except (Unknown, IndexError, TypeError, ValueError, KeyError) as error:
                self.refuse(node, str(error) if isinstance(error, Unknown) else f"{name} is called in an unknown way")
                return
            if _lengths(self.dims[node]) != _listed(shapes):
                self.refuse(node, f"the rule for {name} does not fit its output")

    def _writers(self, node: fx.Node) -> frozenset[fx.Node]:
        """Return `writers` of a node. Later nodes may unite what a layer reads with what it writes."""
        made = self._varying(node)
        kept = [n for n in node.all_input_nodes if n.op != "get_attr" and made & self._varying(n)]
        return frozenset[fx.Node]().union(*(self.writers[n] for n in kept)) if kept else frozenset({node})

    def _varying(self, node: fx.Node) -> set[Atom]:
        return {atom for dim in _flat(self.dims.get(node)) for atom in resolved(dim) if atom.fixed is None}

    def name_of(self, node: fx.Node) -> str:
        """Return the name of a node's operation, by which rules are known."""
        if node.op == "call_module":
            if node.meta.get("regulariser"):
                return "nn.regulariser"
            kind = type(self.modules[str(node.target)])
            return f"{'nn' if kind.__module__.startswith('torch.nn.modules.') else 'module'}.{kind.__name__}"
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        name = name.rstrip("_") if not name.startswith("_") and name not in ("and_", "or_") else name
        return ALIASES.get(name, name)

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Fix every dimension that a node touches. A module called as a whole touches what it reads."""
        for source in node.meta.get("read", node.all_input_nodes):
            self.fix(source, reason)
        if node.op == "call_module":
            for name, _ in self.modules[str(node.target)].named_parameters():
                for dim in self.stored[f"{node.target}.{name}"]:
                    fix(dim, reason)
        self.dims[node] = _constants(node.meta.get("shapes"), reason)

    def read(self, source: Any, weight: Dims, position: int) -> None:
        """Note that a function sums over a dimension of a weight, whose tail a mixture must cover."""
        if isinstance(source, fx.Node) and source.op == "get_attr":
            self.sums.add((str(source.target), position))
        else:
            fix(weight[position], "it is summed over with a weight that is computed")

    def fix(self, node: fx.Node, reason: str) -> None:
        for dim in _flat(self.dims.get(node)):
            fix(dim, reason)

    def of(self, value: Any) -> Dims:
        """Return the dimensions of an argument. A number has none."""
        if not isinstance(value, fx.Node):
            return []
        dims = self.dims.get(value)
        if value.meta.get("special") or dims is None:
            return []
        if dims and isinstance(dims[0], list):
            raise Unknown("several tensors are given where one is expected")
        return list(dims)

    def input(self, call: Call) -> Dims:
        """Return the dimensions of what a layer is called with."""
        return self.of(call.args[0] if call.of_module else call.get(0, "input"))

    def parameter(self, call: Call, position: int, key: str) -> Dims:
        """Return the dimensions of a parameter or buffer: of a module its own, of a function an argument."""
        return self.stored.get(f"{call.node.target}.{key}", []) if call.of_module else self.of(call.get(position, key))

    def option(self, call: Call, position: int, key: str) -> Any:
        """Return an option of a layer: of a module its attribute, of a function an argument."""
        return getattr(self.modules[str(call.node.target)], key) if call.of_module else call.get(position, key)


def _flat(dims: Any) -> Iterable[Dim]:
    for item in dims.values() if isinstance(dims, Mapping) else dims or ():
        if isinstance(item, list | Mapping):
            yield from _flat(item)
        elif item is not None:
            yield item


def _constants(shapes: Any, reason: str) -> Any:
    if isinstance(shapes, tuple):
        return [(Atom(n, reason),) for n in shapes]
    if isinstance(shapes, Mapping):
        return {key: _constants(value, reason) for key, value in shapes.items()}
    return [_constants(shape, reason) for shape in shapes] if shapes else []


def _lengths(dims: Any) -> Any:
    if isinstance(dims, Mapping):
        return {key: _lengths(value) for key, value in dims.items()}
    if dims and isinstance(dims[0], list):
        return [_lengths(item) for item in dims]
    return [length(dim) for dim in dims or ()]


def _listed(shapes: Any) -> Any:
    if isinstance(shapes, Mapping):
        return {key: _listed(value) for key, value in shapes.items()}
    return [_listed(shape) if isinstance(shape, tuple | list) else shape for shape in shapes or ()]
