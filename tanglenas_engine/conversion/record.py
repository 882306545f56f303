"""Recordings of a model's forward as a torch.fx graph.

A tracer with symbolic values stops at the first `if` about a shape. A recording runs the model on an example, so that
all shapes are numbers, and notes every call of a torch function and of a torch layer with parameters. More runs make up
for what one run cannot tell: a batch of another length, in another precision, shows which numbers depend on the batch
and which types on the weights; a run in train mode shows what depends on the mode; a run with gradients and autocast
shows which modules turn these on or off.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tanglenas_engine.errors import TangleNASError

BATCHES = 3, 5
"""The lengths of the batches that are recorded. Primes tell a multiple of the batch from other numbers."""

READS = set(
    "__bool__ __int__ __float__ __complex__ __index__ __contains__ __array__ item tolist numpy is_nonzero equal "
    "allclose".split()
)
"""Functions that turn the numbers of a tensor into numbers of Python."""

VARYING = {"nonzero", "masked_select", "unique", "argwhere", "unique_consecutive"}
"""Functions whose output has a shape that depends on the numbers of a tensor."""

INPLACE = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul".split()}
"""Operators that write into their first argument."""


def _operators(prefix: str = "") -> dict[Any, Callable[..., Any]]:
    """Return the functions of `operator` by the methods of tensors that Python calls for them.

    The name of such a method may be another: that of `Tensor.__pow__` is "pow".

    Args:
        prefix: What the method's name begins with: "r" for the methods of the second operand, as in `2 ** x`.
    """
    names = {f"__{prefix}{name.strip('_')}__": getattr(operator, name) for name in operator.__all__}
    return {getattr(Tensor, name): function for name, function in names.items() if hasattr(Tensor, name)}


OPERATORS, REVERSED = _operators(), _operators("r")
"""The functions that repeat a call of an operator. Those of `REVERSED` take its arguments in reverse."""

BLOCKS = {
    "autocasts": "its forward turns autocast on or off",
    "gradients": "its forward turns gradients off, or has gradients of its own",
}
"""Reasons why a module is called as a unit: its forward has a block, such as `torch.no_grad()`, that a recording loses.

Keys are those of `_Mode`.
"""

UNREAD = {"device", "dtype"}
"""Attributes that are the same for every size of a tensor."""


LIMITS = "min", "max", "eps", "tiny"
"""Attributes of `torch.finfo` that a forward may compute with, such as the smallest number for a mask."""


class DataDependent(Exception):
    """An error for a forward that a recording cannot repeat.

    Attributes:
        owner: The module that made the call.
        reason: The reason, as a clause.
    """

    def __init__(self, owner: str, reason: str):
        super().__init__(reason)
        self.owner, self.reason = owner, reason


class Recorder(TorchFunctionMode):
    """A recording of one forward, with gradients and autocast as they are where the recording is made.

    Args:
        model: The model.
        leaves: The modules whose calls are noted as such, with the names that they get in the graph.

    Attributes:
        graph: The graph. The `meta` of a node has `owner`, the name of the module that made the call, and `shapes`.
            A node that calls a module as a unit also has `evaluates`: True if the module was in evaluation and computes
            something else in training. It may have `read`: the inputs whose numbers or shapes the module uses, not
            only their device and type.
        constants: Tensors of the forward that are neither stored in the model nor computed by torch's functions.
        spans: For each module that is no leaf, its calls: the nodes, the tensors given, and the tensors returned.
        unchanged: The modules that returned their input in a call.
        changed: The modules that returned something else in a call.
    """

    def __init__(self, model: nn.Module, leaves: Mapping[nn.Module, str]):
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.owners: list[str] = [""]
        self.names = {module: name for name, module in model.named_modules()}
        self.spans: dict[str, list[tuple[list[fx.Node], list[fx.Node], list[fx.Node]]]] = {}
        self.unchanged: set[str] = set()
        self.changed: set[str] = set()
        self._leaves = leaves
        self._off = False
        self._modes = [_mode()]  # at the start of the call of each owner
        self._read: set[int] | None = None  # the ids of tensors that a module called as a whole uses
        self._nodes: dict[int, fx.Node] = {}
        self._listed: list[fx.Node] = []  # all nodes in order
        self._alias: dict[int, int] = {}  # the ids of tensors that stand for others, and of those
        self._alive: list[Any] = []  # an id stands for a tensor only as long as that lives
        self._depends: set[fx.Node] = set()
        self._stored = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self._parameters = {id(parameter) for parameter in model.parameters()}

    def input(self, name: str, tensor: Tensor) -> None:
        node = self.graph.placeholder(name)
        self._bind(tensor, node)
        self._depends.add(node)

    def output(self, value: Any) -> None:
        self.graph.output(self._argument(value))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if self._off:
            if self._read is not None and not (name == "__get__" and attribute in UNREAD):
                self._read.update(map(id, tree_leaves((args, kwargs))))
            return func(*args, **kwargs)
        if name == "__iter__":  # what it returns is no tensor, but gives tensors
            return iter(self.__torch_function__(Tensor.unbind, types, (args[0], 0)))
        if name in READS | VARYING or (name == "__getitem__" and _by_mask(args[1])):
            given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            if any(self._nodes.get(id(t)) in self._depends or id(t) in self._parameters for t in given):
                raise DataDependent(
                    self.owners[-1], f"its forward depends on the numbers of a tensor ({name.strip('_')})"
                )
        inplace = name == "__setitem__" or _is_inplace(name)
        written = args[0] if inplace else kwargs.get("out")
        if name == "__set__" or (name == "__get__" and attribute == "data" and id(args[0]) in self._stored):
            raise DataDependent(self.owners[-1], "its forward replaces the numbers of a tensor")
        if isinstance(written, Tensor) and id(written) in self._stored and not self._counts(written):
            raise DataDependent(self.owners[-1], "its forward changes a parameter or a buffer")
        self._off = True
        try:
            result = func(*args, **kwargs)
            if not inplace and isinstance(result, Tensor) and any(result is value for value in args):
                # A conversion to the type that the tensor has returns the tensor. In other types it does not.
                original, result = result, torch.ops.aten.alias(result)
                self._alias[id(result)] = self._alias.get(id(original), id(original))
        finally:
            self._off = False
        if name in ("__setitem__", "backward", "register_hook") or any(
            isinstance(v, Tensor) for v in tree_leaves(result)
        ):
            self._check_blocks((args, kwargs))
            self._note(func, name, args, kwargs, result)
        return result

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module's call, and note it if it is a leaf."""
        name = self.names.get(module)
        if self._off or name is None:
            return forward(module, *args, **kwargs)
        if (target := self._leaves.get(module)) is not None:
            own = [*module._parameters.values(), *module._buffers.values()]
            if any(tensor is not None and id(tensor) not in self._stored for tensor in own):
                raise DataDependent(self.owners[-1], f"its forward calls {target} with other weights than its own")
            self._check_blocks((args, kwargs, list(module.parameters())))
            self._off = True
            read = self._read = None if type(module).__module__.startswith("torch.nn.modules.") else set()
            try:
                result = forward(module, *args, **kwargs)
            finally:
                self._off, self._read = False, None
            node = self._create("call_module", target, args, kwargs)
            node.meta["evaluates"] = not module.training and _has_mode(module)
            if read is not None:
                read.update(map(id, tree_leaves(result)))  # an input may be returned
                tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
                node.meta["read"] = [self._argument(tensor) for tensor in tensors if id(tensor) in read]
            self._bind_results(node, result)
            return result
        self.owners.append(name)
        self._modes.append(_mode())
        given = [self._argument(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        start = len(self._listed)
        try:
            result = forward(module, *args, **kwargs)
        finally:
            self.owners.pop()
            self._modes.pop()
        returned = [self._argument(value) for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.spans.setdefault(name, []).append((self._listed[start:], given, returned))
        same = (
            len(args) == 1
            and not kwargs
            and self._alias.get(id(result), id(result)) == self._alias.get(id(args[0]), id(args[0]))
        )
        (self.unchanged if same else self.changed).add(name)
        return result

    def _check_blocks(self, given: Any) -> None:
        """Raise an error for a call in a block that turns autocast or gradients on or off, where these matter to it."""
        mode, outside = _mode(), self._modes[0]
        if mode == outside:
            return
        tensors = [value for value in tree_leaves(given) if isinstance(value, Tensor) and value.is_floating_point()]
        learning = outside.gradients and any(tensor.requires_grad for tensor in tensors)
        for block, matters in (("autocasts", bool(tensors)), ("gradients", learning)):
            plain = getattr(outside, block)
            if matters and getattr(mode, block) != plain:
                # The innermost module that was called outside of the block has it.
                calls = zip(self.owners, self._modes, strict=True)
                raise DataDependent([owner for owner, at in calls if getattr(at, block) == plain][-1], BLOCKS[block])

    def _counts(self, tensor: Tensor) -> bool:
        """Return True for the number of batches that a batch norm saw."""
        return self._stored[id(tensor)].endswith("num_batches_tracked")

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__get__":
            node = self._create("call_function", getattr, (args[0], attribute), {})
        elif func in OPERATORS:
            node = self._create("call_function", OPERATORS[func], args, kwargs)
        elif func in REVERSED:
            node = self._create("call_function", REVERSED[func], args[::-1], kwargs)
        elif name.startswith("__"):
            raise DataDependent(self.owners[-1], f"its forward calls Tensor.{name}, which a recording cannot repeat")
        elif getattr(Tensor, name, None) is func:
            node = self._create("call_method", name, args, kwargs)
        else:
            node = self._create("call_function", func, args, kwargs)
        if name != "__setitem__":
            self._bind_results(node, result)

    def _create(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        args, kwargs = self._argument(tuple(args)), self._argument(dict(kwargs))
        node = self.graph.create_node(op, target, args, kwargs)
        self._listed.append(node)
        node.meta["owner"] = self.owners[-1]
        if any(argument in self._depends for argument in node.all_input_nodes):
            self._depends.add(node)
        return node

    def _bind_results(self, node: fx.Node, result: Any) -> None:
        node.meta["shapes"] = shapes_of(result)
        if isinstance(result, Tensor):
            self._bind(result, node)
            return
        pairs: Any = result.items() if isinstance(result, Mapping) else enumerate(result)
        for key, value in pairs:
            if isinstance(value, Tensor) or isinstance(value, tuple | list):
                part = self._create("call_function", operator.getitem, (), {})
                part.args = (node, key)
                if node in self._depends:
                    self._depends.add(part)
                self._bind_results(part, value)

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["shapes"], node.meta["floating"] = tuple(tensor.shape), tensor.is_floating_point()
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._nodes:
                if (name := self._stored.get(id(value))) is None:
                    name = f"_constant_{len(self.constants)}"
                    self.constants[name] = value
                node = self.graph.create_node("get_attr", name)
                self._listed.append(node)
                node.meta["owner"] = self.owners[-1]
                self._bind(value, node)
            return self._nodes[id(value)]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            raise DataDependent(self.owners[-1], "its forward passes a named tuple to a function of torch")
        if isinstance(value, tuple | list):
            return (
                type(value)(map(self._argument, value))
                if type(value) in (tuple, list)
                else tuple(map(self._argument, value))
            )
        if isinstance(value, slice):
            return slice(*map(self._argument, (value.start, value.stop, value.step)))
        if isinstance(value, Mapping):
            return {key: self._argument(item) for key, item in value.items()}
        return value


class _Mode(NamedTuple):
    """The state of torch that blocks such as `torch.no_grad()` change.

    Attributes:
        gradients: True if gradients are on.
        autocasts: The type that autocast sets on a CPU and on a GPU; None where it is off.
    """

    gradients: bool
    autocasts: tuple[torch.dtype | None, ...]


def _mode() -> _Mode:
    types = (torch.get_autocast_dtype(at) if torch.is_autocast_enabled(at) else None for at in ("cpu", "cuda"))
    return _Mode(torch.is_grad_enabled(), tuple(types))


def _is_inplace(name: str) -> bool:
    """Return True for the name of a function that writes into its first argument, such as `add_` or `__iadd__`."""
    dunder = name.startswith("__")
    return name in INPLACE if dunder else name.endswith("_")


def _by_mask(index: Any) -> bool:
    return any(isinstance(v, Tensor) and v.dtype in (torch.bool, torch.uint8) for v in tree_leaves(index))


def shapes_of(value: Any) -> Any:
    """Return the shapes of the tensors in a value; None for what is no tensor."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return {key: shapes_of(item) for key, item in value.items()}
    return [shapes_of(item) for item in value] if isinstance(value, tuple | list) else None


@contextmanager
def _calls_of(recorder: Recorder) -> Iterator[None]:
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call(module, original, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        with recorder:
            yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


def run(model: nn.Module, whole: Iterable[str], x: Tensor, output: Callable[[Any], Any]) -> Recorder:
    """Record one forward of a model. Calls of the modules named in `whole` are noted as such, like those of layers."""
    recorder = Recorder(model, _leaves(model, set(whole)))
    recorder.input("x", x)
    with torch.random.fork_rng(devices=[]), _calls_of(recorder):
        result = output(model(x))
    recorder.output(result)
    return recorder


@torch.enable_grad()
def _check_training(model: nn.Module, whole: Iterable[str], x: Tensor, output: Callable[[Any], Any]) -> None:
    """Run a forward as in training, with gradients, and with autocast if the model runs in it.

    Raises:
        DataDependent: A module turns gradients or autocast on or off in it.
    """
    with _without_checkpoints():
        try:
            with torch.autocast(x.device.type, torch.bfloat16):
                run(copy.deepcopy(model).train(), whole, x, output)
        except DataDependent:
            raise
        except Exception:  # a model may insist on its own types
            run(copy.deepcopy(model).train(), whole, x, output)


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Run the blocks of gradient checkpointing as they are: it turns gradients off to compute them again later."""
    function = torch.utils.checkpoint.CheckpointFunction
    original = function.apply
    function.apply = lambda forward, preserve, *inputs: forward(*inputs)
    try:
        yield
    finally:
        function.apply = original


def _leaves(model: nn.Module, whole: set[str]) -> dict[nn.Module, str]:
    """Return the modules whose calls are noted: torch's layers with tensors of their own, and those in `whole`."""
    return {
        module: name
        for name, module in model.named_modules()
        if name in whole or (name and type(module).__module__.startswith("torch.nn.modules.") and _holds(module))
    }


def _has_mode(module: nn.Module) -> bool:
    """Return True for a module that may compute something else in training than in evaluation."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.running_mean is not None
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return not type(module).__module__.startswith("torch.nn.modules.") or bool(getattr(module, "dropout", 0))


def _holds(module: nn.Module) -> bool:
    own = [*module._parameters.values(), *module._buffers.values()]
    return any(tensor is not None for tensor in own)


@torch.no_grad()
def record(model: nn.Module, example: Tensor, output: Callable[[Any], Any], whole: Iterable[str] = ()) -> Recorder:
    """Return the recording of a model's forward, in which numbers that depend on the batch or the mode are nodes.

    A module without tensors that returns its input in evaluation is a regulariser, such as a dropout. Its calls are
    noted as such, and their nodes have "regulariser" in `meta`.

    Args:
        model: The model. Its mode and its numbers stay.
        example: A batch of inputs.
        output: A function that returns a tensor from what the model returns.
        whole: The names of modules whose calls are noted as such.

    Raises:
        TangleNASError: The forward makes other calls in other modes or for other batches.
        DataDependent: A module's forward cannot be repeated from a recording.
    """
    model = copy.deepcopy(model).eval()
    batches = [_batch(example, length) for length in BATCHES]
    first = run(model, whole, batches[0], output)
    _check_training(model, whole, batches[0], output)
    modules = dict(model.named_modules())
    regularisers = {
        name
        for name in first.unchanged - first.changed
        if name and not isinstance(modules[name], nn.Identity | nn.Sequential) and not _tensors(modules[name])
    }
    whole = {*whole, *regularisers}
    evaluated = run(model, whole, batches[0], output)
    trained = run(copy.deepcopy(model).train(), whole, batches[0], output)
    try:
        longer = batches[1].double() if example.is_floating_point() else batches[1]
        again, how = run(copy.deepcopy(model).double(), whole, longer, output), "for a longer batch in float64"
    except RuntimeError:  # a model that makes tensors of one type is recorded in that type alone
        again, how = run(model, whole, batches[1], output), "for a longer batch"
    _merge(evaluated, trained, again, how, model, example)
    for node in evaluated.graph.nodes:
        if node.op == "call_module" and node.target in regularisers:
            node.meta["regulariser"] = True
    return evaluated


def _tensors(module: nn.Module) -> bool:
    return any(True for _ in [*module.parameters(), *module.buffers()])


def _batch(example: Tensor, length: int) -> Tensor:
    rows = [example[i % len(example)] for i in range(length)]
    if example.is_floating_point():  # equal rows would have no variance
        generator = torch.Generator().manual_seed(0)
        rows = [row + 0.1 * torch.randn(row.shape, generator=generator).to(row) for row in rows]
    return torch.stack(rows)


def _steps(recorder: Recorder) -> list[fx.Node]:
    """Return the nodes that compute. Those that only count batches, as batch norms do in train mode, are left out."""
    return [node for node in recorder.graph.nodes if not _counts(node)]


def _counts(node: fx.Node) -> bool:
    """Return True for `num_batches_tracked.add_(1)`, and for the buffer itself."""
    if node.op == "get_attr":
        return str(node.target).endswith("num_batches_tracked")
    first = node.args[0] if node.args else None
    return (
        node.target in ("add_", operator.iadd)
        and isinstance(first, fx.Node)
        and first.op == "get_attr"
        and str(first.target).endswith("num_batches_tracked")
    )


def _merge(
    evaluated: Recorder, trained: Recorder, longer: Recorder, how: str, model: nn.Module, example: Tensor
) -> None:
    """Replace the numbers in a recording that differ in the others by nodes that compute them.

    `how` says in messages how the third recording was made.
    """
    columns = _aligned(evaluated, trained, longer, how, model)
    merging = _Merging(evaluated.graph, columns, how, model, example)
    for node, train, long in zip(*columns, strict=True):
        if train.meta.get("evaluates"):
            raise TangleNASError(
                f"{type(model).__name__} keeps {node.target} in evaluation while it trains, which its space would not: "
                "let it follow the mode of the model, or put a layer without a mode there, such as torchvision's "
                "FrozenBatchNorm2d for a norm, or nn.Identity for a dropout"
            )
        node.meta["batched"] = node.meta.get("shapes") != long.meta.get("shapes")
        args = merging.merged(node, node.args, train.args, long.args)
        kwargs = merging.merged(node, node.kwargs, train.kwargs, long.kwargs)
        node.meta["numbers"] = (node.args, node.kwargs)
        node.args, node.kwargs = args, kwargs
    for name, tensor in evaluated.constants.items():
        same = trained.constants.get(name), longer.constants.get(name)
        if any(other is None or other.shape != tensor.shape for other in same):
            raise TangleNASError(
                f"the forward of {type(model).__name__} makes a tensor outside of torch's functions, which depends on "
                "mode or batch"
            )


def _aligned(
    evaluated: Recorder, trained: Recorder, longer: Recorder, how: str, model: nn.Module
) -> list[list[fx.Node]]:
    """Return the steps of three recordings.

    Raises:
        TangleNASError: They make other calls.
    """
    columns = [_steps(recorder) for recorder in (evaluated, trained, longer)]
    for other, what in zip(columns[1:], ("in train mode", how), strict=True):
        pairs = zip(columns[0], other, strict=False)
        odd = next((a for a, b in pairs if (a.op, _key(a)) != (b.op, _key(b))), None)
        if odd is not None or len(columns[0]) != len(other):
            where = f" (in {odd.meta.get('owner') or 'the model'}, at {_name(odd)})" if odd is not None else ""
            raise TangleNASError(
                f"the forward of {type(model).__name__} makes other calls {what} than in evaluation{where}, so that it "
                "cannot be recorded"
            )
    return columns


class _Merging:
    """The arguments of a recording's steps, where they differ between three recordings, as nodes of its graph."""

    def __init__(
        self, graph: fx.Graph, columns: Sequence[Sequence[fx.Node]], how: str, model: nn.Module, example: Tensor
    ):
        self._graph, self._how, self._model, self._example = graph, how, model, example
        self._number = {node: i for column in columns for i, node in enumerate(column)}
        self._placeholder = columns[0][0]
        self._made: dict[Any, fx.Node] = {}

    @property
    def _forward(self) -> str:
        return f"the forward of {type(self._model).__name__}"

    def _node(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        """Return the node of a key, which is made once, behind those that were made before."""
        if key not in self._made:
            with self._graph.inserting_after(list(self._made.values())[-1] if self._made else self._placeholder):
                self._made[key] = make()
            self._made[key].meta.update(owner="", special=key, shapes=None)
        return self._made[key]

    def _dtype(self) -> tuple[torch.dtype, fx.Node]:
        """Return the floating type of the recording, and its node: of the inputs, or of the weights for token ids."""
        reference = next((item for item in self._model.named_parameters() if item[1].is_floating_point()), None)
        given, source = self._example, self._placeholder
        if reference is not None and not given.is_floating_point():
            name, given = reference
            source = self._node("reference", lambda: self._graph.create_node("get_attr", name))
        return given.dtype, self._node("dtype", lambda: self._graph.call_function(getattr, (source, "dtype")))

    def _limit(self, value: float, long: Any) -> str | None:
        """Return the name of the limit of floating types that a number is, in the recording and in float64."""
        types = [torch.finfo(dtype) for dtype in (self._dtype()[0], torch.float64) if dtype.is_floating_point]
        return next((name for name in LIMITS if [value, long] == [getattr(t, name) for t in types]), None)

    def merged(self, node: fx.Node, value: Any, train: Any, long: Any) -> Any:
        """Return an argument of a node, from its value in evaluation, in train mode and for a longer batch."""
        if isinstance(value, fx.Node):
            if not (self._number.get(value) == self._number.get(train) == self._number.get(long)):
                raise TangleNASError(f"{self._forward} takes other tensors in other modes")
            return value
        if isinstance(value, tuple | list):
            if not len(value) == len(train) == len(long):
                raise TangleNASError(f"{self._forward} makes calls of varying length")
            return type(value)(self.merged(node, *three) for three in zip(value, train, long, strict=True))
        if isinstance(value, dict):
            return {key: self.merged(node, item, train[key], long[key]) for key, item in value.items()}
        if isinstance(value, slice):
            ends = ("start", "stop", "step")
            return slice(*(self.merged(node, *(getattr(v, end) for v in (value, train, long))) for end in ends))
        return self._leaf(node, value, train, long)

    def _leaf(self, node: fx.Node, value: Any, train: Any, long: Any) -> Any:
        """Return an argument that is neither a tensor nor a collection."""
        call = self._graph.call_function
        if isinstance(value, torch.device):
            return self._node("device", lambda: call(getattr, (self._placeholder, "device")))
        if type(value) is type(train) is type(long) and value == train == long:
            return value
        if isinstance(value, torch.dtype) and value == train:
            return self._dtype()[1]
        if isinstance(value, float) and value == train and (limit := self._limit(value, long)) is not None:
            limits = self._node("finfo", lambda: call(torch.finfo, (self._dtype()[1],)))
            return self._node(("finfo", limit), lambda: call(getattr, (limits, limit)))
        one, two = BATCHES
        if type(value) is int and value == train and value * two == long * one and value % one == 0:
            batch = self._node("batch", lambda: self._graph.call_method("size", (self._placeholder, 0)))
            many = value // one
            return batch if many == 1 else self._node(("batch", many), lambda: call(operator.mul, (batch, many)))
        if isinstance(value, bool | float | int) and value == long and not value and train:
            training = self._node("training", lambda: self._graph.create_node("get_attr", "training"))
            if train is True:
                return training
            return self._node(("training", train), lambda: call(operator.mul, (training, train)))
        raise TangleNASError(
            f"{self._forward} computes with a number that depends on mode, batch or precision: "
            f"{_name(node)} in {node.meta.get('owner') or 'the model'} takes {value}, {train} in train mode, and "
            f"{long} {self._how}"
        )


def _key(node: fx.Node) -> Any:
    return node.target if isinstance(node.target, str) else _name(node)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
