"""Rules of layers: products with weights, norms, embeddings and pooling."""

from __future__ import annotations

from typing import Any

from torch import fx

from tanglenas_engine.conversion.analysis import Analysis, Call, Dims, Rule, Unknown
from tanglenas_engine.conversion.dimensions import DATA, Atom, constant, fix, length, unite
from tanglenas_engine.conversion.forms import equal_padding


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


RULES: dict[str, Rule] = {
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
    # Images. `boolean_dispatch` is max pooling, which may return indices.
    **dict.fromkeys(
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d lp_pool2d interpolate upsample "
        "boolean_dispatch".split(),
        _spatial,
    ),
}
