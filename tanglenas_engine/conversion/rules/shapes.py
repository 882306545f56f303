"""Rules of operations that move entries: reshapes, concatenations and indexing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from tanglenas_engine.conversion.analysis import Analysis, Call, Dims, Rule, Unknown
from tanglenas_engine.conversion.dimensions import Dim, constant, fix, length, regrouped, resolved, unite
from tanglenas_engine.conversion.rules.shared import aligned, position_of, varies


def _permute(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x = analysis.of(call.args[0])
    return [x[position_of(p, len(x))] for p in call.rest(1, "dims")]


def _transpose(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x = analysis.of(call.args[0])
    a, b = (position_of(p, len(x)) for p in (call.args[1:3] if len(call.args) > 2 else call.kwargs.values()))
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
    pairs = [(position_of(a, len(x)), position_of(b, len(x))) for a, b in pairs]
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
    return aligned([dims, analysis.of(call.get(1, "other"))], reason)


def _unsqueeze(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x, dim = analysis.of(call.args[0]), call.get(1, "dim")
    x.insert(dim if dim >= 0 else dim + len(x) + 1, constant(1))
    return x


def _expand(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x, shape = analysis.of(call.args[0]), node.meta["shapes"]
    x = [constant(1)] * (len(shape) - len(x)) + x
    dims = [dim if length(dim) == n else constant(n) for dim, n in zip(x, shape, strict=True)]
    if call.name == "expand_as":
        return aligned([x, analysis.of(call.args[1])], "its factors do not align in expand_as")
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
    dim = position_of(call.get(1, "dim", 0), len(tensors[0]))
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
    dims = aligned(tensors, "its factors do not align in stack")
    dim = call.get(1, "dim", 0)
    dims.insert(dim if dim >= 0 else dim + len(dims) + 1, constant(len(tensors)))
    return dims


def _chunks(analysis: Analysis, node: fx.Node, call: Call) -> list[Dims]:
    """Cut a dimension into equal parts, which may vary together, or into unequal ones, which may not."""
    x = analysis.of(call.args[0])
    dim = position_of(call.get(2, "dim", 0), len(x))
    lengths = [shape[dim] for shape in node.meta["shapes"]]
    if len(set(lengths)) > 1 or not varies(x[dim]):
        fix(x[dim], "it is cut into parts")
        return [[*x[:dim], constant(n), *x[dim + 1 :]] for n in lengths]
    outer, *inner = regrouped([x[dim]], [len(lengths), lengths[0]], "its factors do not align in a cut into parts")
    fix(outer, "it is the number of parts")
    if call.name == "split":
        analysis.shapes[node] = [inner[0]]
    return [[*x[:dim], inner[0], *x[dim + 1 :]] for _ in lengths]


def _unbind(analysis: Analysis, node: fx.Node, call: Call) -> list[Dims]:
    x = analysis.of(call.args[0])
    dim = position_of(call.get(1, "dim", 0), len(x))
    fix(x[dim], "it is taken apart")
    return [[*x[:dim], *x[dim + 1 :]] for _ in node.meta["shapes"]]


def _select(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    x = analysis.of(call.args[0])
    dim = position_of(call.get(1, "dim"), len(x))
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


RULES: dict[str, Rule] = {
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
}
