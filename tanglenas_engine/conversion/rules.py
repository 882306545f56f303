"""Rules that say for each operation which dimensions of its inputs and outputs belong together.

A rule unites dimensions, makes new ones, or fixes those that must keep their length. An operation without a rule fixes
every dimension that it touches. So a missing rule costs freedom, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from tanglenas_engine.conversion.dimensions import (
    DATA,
    Atom,
    Dim,
    constant,
    fix,
    fresh,
    length,
    regrouped,
    resolved,
    unite,
)
from tanglenas_engine.conversion.forms import equal_padding

Dims = list[Dim]
"""The dimensions of a tensor."""

Rule = Callable[["Analysis", fx.Node, "Call"], Any]


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


class Analysis:
    """The dimensions of all tensors of a recording.

    Args:
        graph: The recording.
        model: The recorded model.

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
    """

    def __init__(self, graph: fx.Graph, model: nn.Module):
        self.graph, self.model = graph, model
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
        self._by_tensor: dict[int, Dims] = {}
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            self._by_tensor.setdefault(id(tensor), [fresh(n) if n > 1 else constant(n) for n in tensor.shape])
            self.stored[name] = self._by_tensor[id(tensor)]
        for node in graph.nodes:
            self._visit(node)

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
            rule = RULES.get(name)
            if rule is None:
                self.refuse(node, REFUSED.get(name, f"there is no rule for {name}"))
                return
            try:
                self.dims[node] = rule(self, node, Call(node, name))
            except (Unknown, IndexError, TypeError, ValueError, KeyError) as error:
                self.refuse(node, str(error) if isinstance(error, Unknown) else f"{name} is called in an unknown way")
                return
            if _lengths(self.dims[node]) != _listed(shapes):
                self.refuse(node, f"the rule for {name} does not fit its output")

    def name_of(self, node: fx.Node) -> str:
        """Return the name under which `RULES` has the rule of a node."""
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


class Unknown(Exception):
    """An error for a call that a rule does not cover."""


def _flat(dims: Any) -> Iterable[Dim]:
    for item in dims or ():
        if isinstance(item, list):
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


# Operations on entries.


def _aligned(tensors: Sequence[Dims], reason: str) -> Dims:
    """Unite the dimensions of tensors that are broadcast against each other, from the last one on."""
    rank = max(map(len, tensors), default=0)
    result: Dims = []
    for position in range(-rank, 0):
        found = [dims[position] for dims in tensors if len(dims) >= -position]
        wide = [dim for dim in found if length(dim) > 1]
        for dim in wide[1:]:
            unite(wide[0], dim, reason)
        result.append((wide or found)[0])
    return result


def _entrywise(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    tensors = [value for value in _tensors_in((call.args, call.kwargs))]
    return _aligned([analysis.of(value) for value in tensors], f"its factors do not align in {call.name}")


def _sum(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    computed = [value for value in _tensors_in(call.args) if value.op != "get_attr"]
    dims = _entrywise(analysis, node, call)
    if len(computed) > 1 and dims:
        first, second = (analysis.of(value) for value in computed[:2])
        for a, b in zip(reversed(first), reversed(second), strict=False):
            if length(a) > 1 and length(b) > 1:
                for atom in resolved(a):
                    atom.join()
    return dims


def _tensors_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []

    def visit(item: Any) -> None:
        if isinstance(item, fx.Node):
            if not item.meta.get("special"):
                found.append(item)
        elif isinstance(item, tuple | list):
            for part in item:
                visit(part)
        elif isinstance(item, Mapping):
            for part in item.values():
                visit(part)

    visit(value)
    return found


def _same(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    return analysis.of(call.args[0])


# Layers.


def _linear(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x = analysis.input(call)
    weight, bias = analysis.parameter(call, 1, "weight"), analysis.parameter(call, 2, "bias")
    if call.of_module:
        analysis.positions[node] = x[:-1]
    else:
        analysis.read(call.get(1, "weight"), weight, 1)
        analysis.products[node] = [*x, weight[0]]
    unite(x[-1], weight[1], "its factors do not align in a linear layer")
    if bias:
        unite(bias[-1], weight[0], "its factors do not align in a linear layer")
    return [*x[:-1], weight[0]]


def _convolution(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x, weight = analysis.of(call.get(0, "input")), analysis.of(call.get(1, "weight"))
    groups = call.get(6, "groups", 1)
    if groups > 1:
        # The number of groups is an argument, which a mixture's supernet and an architecture have in common.
        fix(x[1 - len(weight)], "there is no elastic form of a grouped convolution as a function")
    analysis.read(call.get(1, "weight"), weight, 1)
    dims = _convolved(analysis, node, x, weight, analysis.of(call.get(2, "bias")), groups)
    analysis.products[node] = [*dims[: 1 - len(weight)], *dims[2 - len(weight) :], *weight]
    return dims


def _convolution_module(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    module: Any = analysis.modules[str(node.target)]
    x = analysis.input(call)
    if module.padding_mode != "zeros":
        raise Unknown("its padding is not of zeros")
    if equal_padding(module) is None:
        raise Unknown("its padding is not equal on both sides")
    weight, bias = analysis.parameter(call, 1, "weight"), analysis.parameter(call, 2, "bias")
    return _convolved(analysis, node, x, weight, bias, module.groups, module.transposed)


def _convolved(
    analysis: Analysis, node: fx.Node, x: Dims, weight: Dims, bias: Dims, groups: int, transposed: bool = False
) -> Dims:
    """Tie the channels of a convolution: the first groups of the input make the first groups of the output."""
    reason = "its channels do not divide into the groups of a convolution"
    for dim in weight[2:]:
        fix(dim, "it is the size of a kernel")
    channels = x[-len(weight) + 1]
    first, second = (1, 0) if transposed else (0, 1)
    out, outputs = weight[first], length(weight[first]) * (groups if transposed else 1)
    if groups > 1:
        count = Atom(groups)
        analysis.groups[node] = (count,)
        per_group = (Atom(length(channels) // groups, "it is the width of a group of a convolution"),)
        made = (Atom(outputs // groups, "it is the width of a group of a convolution"),)
        unite(channels, (count, *per_group), reason)
        if transposed:
            unite(weight[0], (count, *per_group), reason)
            unite(weight[1], made, reason)
            out = (count, *made)
        else:
            unite(weight[0], (count, *made), reason)
            unite(weight[1], per_group, reason)
    else:
        unite(channels, weight[second], "its factors do not align in a convolution")
    if bias:
        unite(bias[0], out, reason)
    shapes = node.meta["shapes"]
    leading = list(x[: -len(weight) + 1])
    for dim in leading:
        fix(dim, "it is a batch of a convolution")
    return [*leading, out, *[constant(n) for n in shapes[len(leading) + 1 :]]]


def _batch_norm(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x = analysis.input(call)
    for position, key in enumerate(("running_mean", "running_var", "weight", "bias"), start=1):
        for dim in analysis.parameter(call, position, key):
            unite(x[1], dim, "its factors do not align in a batch norm")
    if call.of_module:
        analysis.norms[node] = x[1]
    elif not analysis.parameter(call, 3, "weight"):
        fix(x[1], "there is no elastic form of batch_norm as a function without a gain")
    return x


def _width_norm(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x, shape = analysis.input(call), analysis.option(call, 1, "normalized_shape")
    tensors = [analysis.parameter(call, 2, "weight")]
    if call.name != "rms_norm":  # its fourth argument is eps
        tensors.append(analysis.parameter(call, 3, "bias"))
    if not call.of_module:
        analysis.shapes[node] = x[-1:]
    rank = len(shape)
    for dims in tensors:
        for a, b in zip(x[-rank:], dims, strict=False):
            unite(a, b, "its factors do not align in a norm")
    if rank > 1:
        for dim in x[-rank:]:
            fix(dim, "a norm goes over several dimensions")
    analysis.norms[node] = x[-1]
    return x


def _group_norm(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x, groups = analysis.input(call), analysis.option(call, 1, "num_groups")
    tensors = [analysis.parameter(call, 2, "weight"), analysis.parameter(call, 3, "bias")]
    reason = "its channels do not divide into the groups of a norm"
    if groups > 1:
        count, inner = Atom(groups), Atom(length(x[1]) // groups, "it is the width of a group of a norm")
        analysis.groups[node] = (count,)
        unite(x[1], (count, inner), reason)
    for dims in tensors:
        if dims:
            unite(x[1], dims[0], reason)
    if not call.of_module:
        fix(x[1], "there is no elastic form of group_norm as a function")
    return x


def _embedding(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    if call.of_module:
        module: Any = analysis.modules[str(node.target)]
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise Unknown("there is no elastic form of nn.Embedding with max_norm, scale_grad_by_freq or sparse")
    indices, table = analysis.input(call), analysis.parameter(call, 1, "weight")
    fix(table[0], "it is the number of rows of a table")
    return [*indices, table[1]]


def _prelu_module(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x, weight = analysis.of(call.args[0]), analysis.stored[f"{node.target}.weight"]
    if length(weight[0]) > 1:
        raise Unknown("there is no elastic form of nn.PReLU with a slope for each channel")
    return x


# Shapes.


def _position(position: int, rank: int) -> int:
    return position + rank if position < 0 else position


def _permute(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x = analysis.of(call.args[0])
    return [x[_position(p, len(x))] for p in call.rest(1, "dims")]


def _transpose(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x = analysis.of(call.args[0])
    a, b = (_position(p, len(x)) for p in (call.args[1:3] if len(call.args) > 2 else call.kwargs.values()))
    x[a], x[b] = x[b], x[a]
    return x


def _attribute(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x = analysis.of(call.args[0])
    if call.args[1] in ("T", "mT") and len(x) >= 2 and (call.args[1] == "mT" or len(x) == 2):
        return [*x[:-2], x[-1], x[-2]]
    if call.args[1] == "data":
        return x
    raise Unknown(f"there is no rule for Tensor.{call.args[1]}")


def _t(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    return analysis.of(call.args[0])[::-1]


def _movedim(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x = analysis.of(call.args[0])
    dims: Dims = [constant(1)] * len(x)
    source, target = call.get(1, "source"), call.get(2, "destination")
    pairs = [(source, target)] if isinstance(source, int) else list(zip(source, target, strict=True))
    pairs = [(_position(a, len(x)), _position(b, len(x))) for a, b in pairs]
    moved = {b: x[a] for a, b in pairs}
    rest = iter([dim for i, dim in enumerate(x) if i not in {a for a, _ in pairs}])
    return [moved[i] if i in moved else next(rest) for i in range(len(dims))]


def _reshape(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    dims = regrouped(analysis.of(call.args[0]), node.meta["shapes"], f"its factors do not align in {call.name}")
    analysis.shapes[node] = dims
    return dims


def _reshape_as(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    reason = f"its factors do not align in {call.name}"
    dims = regrouped(analysis.of(call.args[0]), node.meta["shapes"], reason)
    return _aligned([dims, analysis.of(call.get(1, "other"))], reason)


def _unsqueeze(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x, dim = analysis.of(call.args[0]), call.get(1, "dim")
    x.insert(dim if dim >= 0 else dim + len(x) + 1, constant(1))
    return x


def _expand(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x, shape = analysis.of(call.args[0]), node.meta["shapes"]
    x = [constant(1)] * (len(shape) - len(x)) + x
    dims = [dim if length(dim) == n else constant(n) for dim, n in zip(x, shape, strict=True)]
    if call.name == "expand_as":
        return _aligned([x, analysis.of(call.args[1])], "its factors do not align in expand_as")
    analysis.shapes[node] = dims
    return dims


def _repeat(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x, shape = analysis.of(call.args[0]), node.meta["shapes"]
    x = [constant(1)] * (len(shape) - len(x)) + x
    dims: Dims = []
    for dim, n in zip(x, shape, strict=True):
        times = n // length(dim)
        dims.append(dim if times == 1 else (*constant(times), *dim))
    return dims


def _cat(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    tensors = [analysis.of(value) for value in call.get(0, "tensors")]
    tensors = [dims for dims in tensors if dims]
    dim = _position(call.get(1, "dim", 0), len(tensors[0]))
    reason = "its factors do not align in cat"
    result: Dims = []
    for position in range(len(tensors[0])):
        parts = [dims[position] for dims in tensors]
        if position != dim:
            for other in parts[1:]:
                unite(parts[0], other, reason)
            result.append(parts[0])
            continue
        first = resolved(parts[0])
        if len(parts) > 1 and all(resolved(part) == first for part in parts):
            result.append((*constant(len(parts)), *parts[0]))
            continue
        for part in parts:
            fix(part, "it is a part of a concatenation")
        result.append(constant(sum(map(length, parts))))
    return result


def _stack(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    tensors = [analysis.of(value) for value in call.get(0, "tensors")]
    dims = _aligned(tensors, "its factors do not align in stack")
    dim = call.get(1, "dim", 0)
    dims.insert(dim if dim >= 0 else dim + len(dims) + 1, constant(len(tensors)))
    return dims


def _chunks(analysis: Analysis, node: fx.Node, call: Call) -> list[Dims]:
    """Cut a dimension into equal parts, which may vary together, or into unequal ones, which may not."""
    x = analysis.of(call.args[0])
    dim = _position(call.get(2, "dim", 0), len(x))
    lengths = [shape[dim] for shape in node.meta["shapes"]]
    if len(set(lengths)) > 1 or not _varies(x[dim]):
        fix(x[dim], "it is cut into parts")
        return [[*x[:dim], constant(n), *x[dim + 1 :]] for n in lengths]
    outer, *inner = regrouped([x[dim]], [len(lengths), lengths[0]], "its factors do not align in a cut into parts")
    fix(outer, "it is the number of parts")
    if call.name == "split":
        analysis.shapes[node] = [inner[0]]
    return [[*x[:dim], inner[0], *x[dim + 1 :]] for _ in lengths]


def _varies(dim: Dim) -> bool:
    return any(atom.fixed is None for atom in resolved(dim))


def _unbind(analysis: Analysis, node: fx.Node, call: Call) -> list[Dims]:
    x = analysis.of(call.args[0])
    dim = _position(call.get(1, "dim", 0), len(x))
    fix(x[dim], "it is taken apart")
    return [[*x[:dim], *x[dim + 1 :]] for _ in node.meta["shapes"]]


def _select(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x = analysis.of(call.args[0])
    dim = _position(call.get(1, "dim"), len(x))
    fix(x[dim], "one entry of it is taken")
    return [*x[:dim], *x[dim + 1 :]]


def _getitem(analysis: Analysis, node: fx.Node, call: Call) -> Any:
    source, index = call.args
    dims = analysis.dims[source]
    if isinstance(dims, Mapping) or (dims and isinstance(dims[0], list)):
        return dims[index]
    x, result = analysis.of(source), []
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis in [item for item in items if not isinstance(item, fx.Node)]:
        place = [item is Ellipsis for item in items].index(True)
        items[place : place + 1] = [slice(None)] * (len(x) - taken)
    shape = list(node.meta["shapes"])
    if any(isinstance(item, fx.Node | list) for item in items):
        raise Unknown("there is no rule for an index of a tensor")
    for item in items:
        if item is None:
            result.append(constant(1))
        elif isinstance(item, slice):
            dim, x = x[0], x[1:]
            wanted = shape[len(result)]
            if wanted == length(dim) and item.step in (None, 1):
                # A stop that is the length itself would be the largest network's.
                if item.stop is not None and not (isinstance(item.stop, int) and item.stop < 0):
                    fix(dim, "a part of it is taken")
                result.append(dim)
            else:
                fix(dim, "a part of it is taken")
                result.append(constant(wanted))
        else:
            fix(x[0], "one entry of it is taken")
            x = x[1:]
    return [*result, *x]


def _narrowed(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x = analysis.of(call.args[0])
    return [_kept(dim, n) for dim, n in zip(x, node.meta["shapes"], strict=True)]


def _kept(dim: Dim, n: int) -> Dim:
    if length(dim) == n:
        return dim
    fix(dim, "its length changes")
    return constant(n)


def _pad(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x, pad = analysis.of(call.args[0]), call.get(1, "pad")
    for position, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), start=1):
        if before or after:
            fix(x[-position], "it is padded")
    return [_kept(dim, n) for dim, n in zip(x, node.meta["shapes"], strict=True)]


def _roll(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x, dims = analysis.of(call.args[0]), call.get(2, "dims") if call.name == "roll" else call.rest(1, "dims")
    for dim in [dims] if isinstance(dims, int) else dims if dims is not None else range(len(x)):
        fix(x[dim], "its entries are moved")
    return x


# Reductions and products.


def _reduce(analysis: Analysis, node: fx.Node, call: Call) -> Any:
    x = analysis.of(call.args[0])
    if call.name in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], fx.Node):
        return _entrywise(analysis, node, call)
    dims = call.kwargs.get("dim", call.kwargs.get("axis", call.args[1] if len(call.args) > 1 else None))
    if call.name == "norm":
        dims = call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else None)
    if dims is None:
        dims = range(len(x))
    over = {_position(d, len(x)) for d in ([dims] if isinstance(dims, int) else dims)}
    varying = [d for d in sorted(over) if _varies(x[d])]
    if call.name == "mean" and len(varying) == 1 and "dtype" not in call.kwargs:
        analysis.means[node] = (x[varying[0]], varying[0] - len(x))
        varying = []
    for d in varying:
        fix(x[d], f"{call.name} goes over it")
    shapes = node.meta["shapes"]
    one = [constant(1) if i in over else dim for i, dim in enumerate(x)]
    several = isinstance(shapes, list)
    if len(shapes[0] if several else shapes) < len(x):
        one = [dim for i, dim in enumerate(one) if i not in over]
    return [list(one) for _ in shapes] if several else one


def _along(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    """Fix the dimension that a softmax, a sort or a normalisation goes over."""
    x = analysis.of(call.args[0])
    default = 1 if call.name == "normalize" else -1
    dim = call.get(2 if call.name == "normalize" else 1, "dim", default)
    fix(x[dim], f"{call.name} goes over it")
    return x


def _matmul(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    tensors = _tensors_in((call.args, call.kwargs))
    a, b = (analysis.of(value) for value in tensors[-2:])
    if len(a) < 2 or len(b) < 2:
        raise Unknown("there is no rule for a product with a vector")
    if tensors[-1].op == "get_attr" and len(b) == 2:
        unite(a[-1], b[0], "its factors do not align in a matrix product")
        analysis.read(tensors[-1], b, 0)
    else:
        fix(a[-1], "a matrix product sums over it")
        fix(b[-2], "a matrix product sums over it")
    batch = _aligned([a[:-2], b[:-2]], "its factors do not align in a matrix product")
    for dim in batch:
        for atom in resolved(dim):
            atom.count_products()
    analysis.products[node] = [*batch, a[-2], a[-1], b[-1]]
    result = [*batch, a[-2], b[-1]]
    if len(tensors) > 2:
        result = _aligned([result, analysis.of(tensors[0])], "its factors do not align in a matrix product")
    return result


def _attention(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    q, k, v = (analysis.of(call.get(i, key)) for i, key in enumerate(("query", "key", "value")))
    for dims in (q, k, v):
        fix(dims[-1], "it is the dimension of a head")
        fix(dims[-2], "it is a number of tokens")
    if call.kwargs.get("enable_gqa"):
        # Query head i reads head i // group of keys and values.
        group = constant(length(q[-3]) // length(k[-3]))
        k, v = ([*dims[:-3], (*dims[-3], *group), *dims[-2:]] for dims in (k, v))
    batch = _aligned([q[:-2], k[:-2], v[:-2]], "its factors do not align in attention")
    mask = call.get(3, "attn_mask")
    if isinstance(mask, fx.Node):
        _aligned([[*batch, q[-2], k[-2]], analysis.of(mask)], "its factors do not align in the mask of attention")
    for dim in batch:
        for atom in resolved(dim):
            atom.count_products()
    keys = constant(length(k[-2]) * (length(q[-1]) + length(v[-1])))
    analysis.products[node] = [*batch, q[-2], keys]
    return [*batch, q[-2], v[-1]]


def _einsum(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    equation, *operands = call.args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands
    if "." in equation or "->" not in equation or len(operands) > 2:
        raise Unknown("there is no rule for this einsum")
    inputs, output = equation.replace(" ", "").split("->")
    letters: dict[str, Dim] = {}
    for term, value in zip(inputs.split(","), operands, strict=True):
        for letter, dim in zip(term, analysis.of(value), strict=True):
            if letter in letters and length(dim) > 1:
                unite(letters[letter], dim, "its factors do not align in einsum")
            letters.setdefault(letter, dim)
    for letter, dim in letters.items():
        if letter not in output:
            fix(dim, "einsum sums over it")
    if len(operands) == 2:
        analysis.products[node] = list(letters.values())
    return [letters[letter] for letter in output]


def _factory(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    if not call.name.startswith("new_") and _tensors_in((call.args, call.kwargs)):
        raise Unknown(f"there is no rule for {call.name} of a tensor")
    return [constant(n) for n in node.meta["shapes"]]


def _spatial(analysis: Analysis, node: fx.Node, call: Call) -> Any:
    """Keep batch and channels, and fix what is behind them."""
    x = analysis.of(call.get(0, "input"))
    shapes = node.meta["shapes"]
    if isinstance(shapes, list):
        raise Unknown("there is no rule for a pooling that returns indices")
    rank = 1 if "1d" in call.name else 3 if "3d" in call.name else len(x) - 2 if call.name == "interpolate" else 2
    for dim in x[-rank:]:
        fix(dim, DATA)
    return [*x[:-rank], *[constant(n) for n in shapes[-rank:]]]


ENTRYWISE = """
    sub rsub mul div truediv floordiv mod pow maximum minimum where lerp addcdiv clamp clip relu gelu silu sigmoid
    tanh hardswish hardsigmoid hardtanh relu6 softplus softsign mish elu selu celu leaky_relu logsigmoid exp expm1 log
    log1p sqrt rsqrt abs neg square reciprocal dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d
    to float double half bfloat16 type type_as contiguous clone detach masked_fill logical_not logical_and logical_or
    bitwise_and bitwise_or and_ or_ invert eq ne lt le gt ge sin cos erf floor ceil round sign nan_to_num threshold
    zeros_like ones_like full_like rand_like randn_like empty_like bernoulli div hardshrink softshrink tanhshrink
    copy cpu cuda pos xor isnan isinf bool long int log2 log10 fill atan2 atan
""".split()
ALIASES = {
    "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "truediv", "negative": "neg",
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv", "ifloordiv": "floordiv", "imod": "mod",
    "ipow": "pow", "iand": "and_", "ior": "or_", "ixor": "xor", "imatmul": "matmul",
    "concat": "cat", "concatenate": "cat", "absolute": "abs", "swapaxes": "transpose", "swapdims": "transpose",
    "moveaxis": "movedim", "tensor_split": "chunk", "remainder": "mod",
    "amin": "amax", "bmm": "matmul", "mm": "matmul", "baddbmm": "addmm", "bitwise_not": "invert",
}  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(ENTRYWISE, _entrywise),
    "add": _sum,
    "addcmul": _sum,
    # Layers.
    "nn.regulariser": _same,
    "nn.Linear": _linear,
    "nn.NonDynamicallyQuantizableLinear": _linear,
    **dict.fromkeys(("nn.Conv1d", "nn.Conv2d", "nn.ConvTranspose2d"), _convolution_module),
    **dict.fromkeys(("nn.BatchNorm1d", "nn.BatchNorm2d"), _batch_norm),
    **dict.fromkeys(("nn.LayerNorm", "nn.RMSNorm"), _width_norm),
    "nn.GroupNorm": _group_norm,
    "nn.Embedding": _embedding,
    "nn.PReLU": _prelu_module,
    # Layers as functions.
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d"), _convolution),
    "batch_norm": _batch_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _width_norm),
    "group_norm": _group_norm,
    "embedding": _embedding,
    # Shapes.
    "permute": _permute,
    "transpose": _transpose,
    "t": _t,
    "movedim": _movedim,
    "getattr": _attribute,
    **dict.fromkeys("reshape view flatten unflatten squeeze".split(), _reshape),
    **dict.fromkeys(("reshape_as", "view_as"), _reshape_as),
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("expand", "expand_as"), _expand),
    "repeat": _repeat,
    "cat": _cat,
    "stack": _stack,
    **dict.fromkeys(("chunk", "split"), _chunks),
    "unbind": _unbind,
    "select": _select,
    "getitem": _getitem,
    "narrow": _narrowed,
    "pad": _pad,
    **dict.fromkeys(("roll", "flip"), _roll),
    # Reductions and products.
    **dict.fromkeys(
        "mean sum amax max min std var norm logsumexp prod any all argmax std_mean var_mean".split(), _reduce
    ),
    **dict.fromkeys("softmax log_softmax normalize cumsum".split(), _along),
    **dict.fromkeys(("matmul", "addmm"), _matmul),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    # New tensors.
    **dict.fromkeys(
        "arange zeros ones full empty linspace rand randn new_zeros new_ones new_full new_empty tensor eye".split(),
        _factory,
    ),
    # Images. `boolean_dispatch` is max pooling, which may return indices.
    **dict.fromkeys(
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d lp_pool2d interpolate upsample "
        "boolean_dispatch".split(),
        _spatial,
    ),
}
"""The rules by name. In-place operations and methods have the names of their functions."""

REFUSED: dict[str, str] = {
    **dict.fromkeys(("nn.LSTM", "nn.GRU", "nn.RNN"), "recurrent layers have no elastic form"),
    "nn.MultiheadAttention": "attention of torch's own layer is not taken apart",
}
"""The reasons for operations that have no rule, where there is more to say."""
