"""Rules of reductions, and of products of computed tensors."""

from __future__ import annotations

from typing import Any

from torch import fx

from tanglenas_engine.conversion.analysis import Analysis, Call, Dims, Rule, Unknown
from tanglenas_engine.conversion.dimensions import Dim, constant, fix, length, resolved, unite
from tanglenas_engine.conversion.rules.entries import entrywise
from tanglenas_engine.conversion.rules.shared import aligned, position_of, tensors_in, varies


def _reduce(analysis: Analysis, node: fx.Node, call: Call) -> Any:
    x = analysis.of(call.args[0])
    if call.name in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], fx.Node):
        return entrywise(analysis, node, call)
    dims = call.kwargs.get("dim", call.kwargs.get("axis", call.args[1] if len(call.args) > 1 else None))
    if call.name == "norm":
        dims = call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else None)
    if dims is None:
        dims = range(len(x))
    over = {position_of(d, len(x)) for d in ([dims] if isinstance(dims, int) else dims)}
    varying = [d for d in sorted(over) if varies(x[d])]
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
    tensors = tensors_in((call.args, call.kwargs))
    a, b = (analysis.of(value) for value in tensors[-2:])
    if len(a) < 2 or len(b) < 2:
        raise Unknown("there is no rule for a product with a vector")
    if tensors[-1].op == "get_attr" and len(b) == 2:
        unite(a[-1], b[0], "its factors do not align in a matrix product")
        analysis.read(tensors[-1], b, 0)
    else:
        fix(a[-1], "a matrix product sums over it")
        fix(b[-2], "a matrix product sums over it")
    batch = aligned([a[:-2], b[:-2]], "its factors do not align in a matrix product")
    for dim in batch:
        for atom in resolved(dim):
            atom.count_products()
    analysis.products[node] = [*batch, a[-2], a[-1], b[-1]]
    result = [*batch, a[-2], b[-1]]
    if len(tensors) > 2:
        result = aligned([result, analysis.of(tensors[0])], "its factors do not align in a matrix product")
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
    batch = aligned([q[:-2], k[:-2], v[:-2]], "its factors do not align in attention")
    mask = call.get(3, "attn_mask")
    if isinstance(mask, fx.Node):
        aligned([[*batch, q[-2], k[-2]], analysis.of(mask)], "its factors do not align in the mask of attention")
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


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "mean sum amax max min std var norm logsumexp prod any all argmax std_mean var_mean".split(), _reduce
    ),
    **dict.fromkeys("softmax log_softmax normalize cumsum".split(), _along),
    **dict.fromkeys(("matmul", "addmm"), _matmul),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
}
