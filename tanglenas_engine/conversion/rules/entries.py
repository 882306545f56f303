"""Rules of operations on single entries, such as a sum, and of new tensors."""

from __future__ import annotations

from torch import fx

from tanglenas_engine.conversion.analysis import Analysis, Call, Dims, Rule, Unknown
from tanglenas_engine.conversion.dimensions import constant, length, resolved
from tanglenas_engine.conversion.rules.shared import aligned, tensors_in


def entrywise(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    tensors = [value for value in tensors_in((call.args, call.kwargs))]
    return aligned([analysis.of(value) for value in tensors], f"its factors do not align in {call.name}")


def _sum(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    """Make a residual stream of tensors that different layers wrote, which the two of `x + x ** 3` are not."""
    computed = [value for value in tensors_in(call.args) if value.op != "get_attr"]
    dims = entrywise(analysis, node, call)
    if len({analysis.writers[value] for value in computed[:2]}) > 1 and dims:
        first, second = (analysis.of(value) for value in computed[:2])
        for a, b in zip(reversed(first), reversed(second), strict=False):
            if length(a) > 1 and length(b) > 1:
                for atom in resolved(a):
                    atom.join()
    return dims


def _same(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    return analysis.of(call.args[0])


def _factory(analysis: Analysis, node: fx.Node, call: Call) -> Dims:
    if not call.name.startswith("new_") and tensors_in((call.args, call.kwargs)):
        raise Unknown(f"there is no rule for {call.name} of a tensor")
    return [constant(n) for n in node.meta["shapes"]]


ENTRYWISE = """
    sub rsub mul div truediv floordiv mod pow maximum minimum where lerp addcdiv clamp clip relu gelu silu sigmoid
    tanh hardswish hardsigmoid hardtanh relu6 softplus softsign mish elu selu celu leaky_relu logsigmoid exp expm1 log
    log1p sqrt rsqrt abs neg square reciprocal dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d
    to float double half bfloat16 type type_as contiguous clone detach masked_fill logical_not logical_and logical_or
    bitwise_and bitwise_or and_ or_ invert eq ne lt le gt ge sin cos erf floor ceil round sign nan_to_num threshold
    zeros_like ones_like full_like rand_like randn_like empty_like bernoulli div hardshrink softshrink tanhshrink
    copy cpu cuda pos xor lshift rshift isnan isinf bool long int log2 log10 fill atan2 atan
""".split()


RULES: dict[str, Rule] = {
    **dict.fromkeys(ENTRYWISE, entrywise),
    "add": _sum,
    "addcmul": _sum,
    "nn.regulariser": _same,
    **dict.fromkeys(
        "arange zeros ones full empty linspace rand randn new_zeros new_ones new_full new_empty tensor eye".split(),
        _factory,
    ),
}
