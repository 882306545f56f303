"""Search spaces made of ordinary torch modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine.conversion.builder import Builder
from tanglenas_engine.conversion.check import failing_choices
from tanglenas_engine.conversion.initial import Initial, initials, is_trained
from tanglenas_engine.conversion.record import DataDependent, Recorder, record
from tanglenas_engine.conversion.report import Part, Report
from tanglenas_engine.conversion.traced import Traced
from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.elastic.parts import part
from tanglenas_engine.errors import TangleNASError, at_least, describe, quoted, unknown
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace

SHARES: Mapping[str, tuple[float, ...]] = {
    "hidden": (0.25, 0.5, 0.75, 1),
    "heads": (0.25, 0.5, 0.75, 1),
    "residual": (0.5, 0.75, 1),
    "depth": (0.5, 0.75, 1),
}
"""The options of each kind of choice, as shares of the given model's number."""


def tensor_of(output: Any) -> Any:
    """Return the tensor of an output: itself, its `logits`, or its first element."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TangleNASError(f"the model returns a {type(output).__name__}: give `output`, which returns a tensor from it")


class Elasticized(Traced, SearchSpace):
    """A space made of a torch module. `elasticize` makes it.

    Attributes:
        report: What became a choice, what did not, and why.
    """

    report = Report()
    _initial: Mapping[str, Initial] = MappingProxyType({})

    def __init__(self, model: nn.Module, example: Tensor, **options: Any):
        super().__init__(**options)
        self.register_buffer("_example", example.detach().clone(), persistent=False)
        # A name may be that of an attribute of spaces, which torch would refuse to register.
        self._parameters.update(model._parameters)
        self._buffers.update(model._buffers)
        self._non_persistent_buffers_set.update(model._non_persistent_buffers_set)
        self._modules.update(model._modules)

    def set_initial(self, model: nn.Module, trained: bool) -> None:
        """Take the rules by which a model's parameters are drawn for the initialisation of networks."""
        self._initial = initials(model, trained)
        if trained:
            self.scratch_warning = (
                f"the weights of {type(model).__name__} are trained, as gains and biases of its norms differ: networks "
                "from scratch begin with torch's defaults for matrices, torch's norms and PReLU, and biases of 0. How "
                "gains of other norms, layer scales and embeddings begin is not known: they keep their trained mean "
                "and deviation. To begin as the model does, give elasticize the untrained model as `initial`, or the "
                "configuration a function with an argument `pretrained`, which is called with False for it"
            )

    def standalone(self, architecture: Architecture) -> nn.Module:
        """Return the newly initialised network of an architecture, a `torch.fx.GraphModule` over plain layers.

        Each parameter is drawn by the rule that it has in the given model, with the network's own sizes (see
        `initials`). What needs no gradient keeps the values that it has here.
        """
        assignment = self.assignment_of(architecture)
        network = self.plain(assignment)
        del network._example
        self._tie(network, assignment)
        own = {theirs: ours for ours, theirs in self._names(assignment).items()}
        for name, parameter in network.named_parameters():
            owner, dot, key = name.rpartition(".")
            initial = self._initial.get(f"{own[owner]}{dot}{key}")
            if parameter.requires_grad and initial is not None:
                initial.draw(parameter, part(network, owner))
        inherited = self.inherited(architecture)
        for path, module in network.named_modules():
            _complete(module, {key: inherited.get(f"{path}.{key}".lstrip(".")) for key in _tensors(module)})
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if name in inherited:  # new layers have torch's default type
                tensor.data = tensor.to(inherited[name].dtype)
        return network

    def example_input(self, batch: int) -> Tensor:
        """Return random inputs of the example's shape and type; whole numbers are drawn from the example's."""
        example: Tensor = self._example  # type: ignore[assignment]
        if example.is_floating_point():
            return torch.randn(batch, *example.shape[1:]).to(example.dtype)
        picks = torch.randint(example.numel(), (batch, *example.shape[1:]))
        return example.flatten().cpu()[picks]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name, without those of its children."""
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


@torch.no_grad()
def _complete(module: nn.Module, inherited: Mapping[str, Tensor | None]) -> None:
    """Give frozen parameters of a new layer their values, and let other layers begin with what torch begins with."""
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
    for name, tensor in _tensors(module).items():
        kept = not tensor.requires_grad if isinstance(tensor, nn.Parameter) else frozen
        if kept and (value := inherited[name]) is not None:
            tensor.copy_(value)
    if isinstance(module, nn.modules.batchnorm._NormBase) and not frozen:
        module.reset_running_stats()
    if isinstance(module, nn.Embedding) and module.padding_idx is not None and not frozen:
        module.weight[module.padding_idx].zero_()


def elasticize(
    model: nn.Module,
    example: Tensor,
    *,
    hidden: Sequence[float] = SHARES["hidden"],
    residual: Sequence[float] = SHARES["residual"],
    heads: Sequence[float] = SHARES["heads"],
    depth: Sequence[float] = SHARES["depth"],
    divisor: int = 8,
    fixed: Sequence[str] = (),
    output: Callable[[Any], Any] = tensor_of,
    initial: nn.Module | None = None,
    **options: Any,
) -> Elasticized:
    """Return a search space inside a torch module. Its largest network is the module with its weights.

    The model is run on the example, and every call of a torch function is recorded. Dimensions that must have one size
    become one choice: the hidden units of an MLP, the channels of a residual stream with all that reads and writes it,
    the heads of an attention, the groups of a convolution, the depth of repeated layers. What the recording or the
    rules do not cover stays as it is, and the space's `report` says why. The module itself is not changed.

    Before the space is returned, its largest network is compared with the model, and some of its architectures with the
    networks extracted for them. A choice that fails becomes fixed.

    Inputs have the example's shape, apart from the batch. A convolutional network for other images is another space.

    Args:
        model: The module: one tensor in, one tensor out.
        example: A batch of inputs, such as `torch.randn(2, 3, 224, 224)`, or token ids.
        hidden: The options of sizes inside a block, as shares of the model's sizes. `(1,)` keeps these sizes.
        residual: The same for the widths of residual streams.
        heads: The same for numbers of heads.
        depth: The same for numbers of repeated layers.
        divisor: Sizes are multiples of this number, or of a smaller power of two where there are few entries.
        fixed: Names of choices that stay as they are, as the report has them. The name of a layer in a stack keeps that
            layer alone.
        output: A function that returns a tensor from what the model returns. By default it is the tensor itself, its
            `logits`, or the first element.
        initial: A module of the same kind whose weights say how a network is initialised, such as the model before it
            was trained. Matrices are drawn by the rule that their deviations follow there, such as a constant divided
            by the root of the inputs, with the network's own sizes; other parameters with the mean and the deviation
            that they have there. It may have more parameters than the module, and counts as untrained. By default it
            is the module. If that has trained norms, matrices and the gains of torch's norms begin as torch's, and
            biases as 0.
        options: Options of every space, such as `relaxation`.

    Raises:
        TangleNASError: The module cannot be recorded, does not take the example, or has nothing that can vary; or an
            option is not one that the module has.
    """
    _check_model(model, example)
    shares = {
        kind: _shares(kind, given)
        for kind, given in {"hidden": hidden, "residual": residual, "heads": heads, "depth": depth}.items()
    }
    at_least("divisor", divisor, 1)
    fixed = _names(fixed)
    if not callable(output):
        raise TangleNASError(f"output is {quoted(output)}: expected a function of what the model returns")
    if initial is not None and not (isinstance(initial, nn.Module) and _shapes(initial) >= _shapes(model)):
        raise TangleNASError(
            f"`initial` ({type(initial).__name__}) does not have the parameters of {type(model).__name__}: give a "
            "module of the same kind, such as the model before it was trained"
        )
    example = example.detach().to(next(model.parameters(), example).device)
    recorder, whole = _record(model, example, output)
    refused = dict.fromkeys(fixed, "it is named in `fixed`")
    for _ in range(4):
        builder = Builder(copy.deepcopy(model), recorder, shares, divisor, refused)
        space = Elasticized(builder.model, example, **options)
        space.report = builder.build(space)
        space.output_layer = builder.output_layer()
        for name in fixed:
            if name not in builder.names | builder.still:
                raise unknown("choice in fixed", name, builder.names)
        space.report.parts[:0] = [Part(name, "fixed", 0, (), reason) for name, reason in whole.items()]
        failing = failing_choices(space, model, output)
        if not failing:
            trained = is_trained(model)
            space.set_initial(*(model, trained) if initial is None else (initial, False))
            if trained and isinstance(config := getattr(model, "pretrained_cfg", None), Mapping):
                space.trained_on = dict(config)  # timm gives one to untrained models, too
            return space.train(model.training)
        refused.update(failing)
    raise TangleNASError(
        f"{type(model).__name__} cannot become a space: its architectures differ from the networks extracted for them"
    )


def _shares(kind: str, given: Any) -> tuple[float, ...]:
    """Return the shares that an option lists."""
    shares = () if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if not shares or not all(isinstance(s, int | float) and not isinstance(s, bool) and 0 < s <= 1 for s in shares):
        raise TangleNASError(f"{kind} is {quoted(given)}: expected shares of the model's size, such as (0.5, 1)")
    return shares


def _shapes(model: nn.Module) -> set[tuple[str, torch.Size]]:
    return {(name, parameter.shape) for name, parameter in model.named_parameters()}


def _names(given: Any) -> tuple[str, ...]:
    """Return the names that the option `fixed` lists."""
    names = None if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if names is None or not all(isinstance(name, str) for name in names):
        example = [given] if isinstance(given, str) else ["blocks.depth"]
        raise TangleNASError(f"fixed is {quoted(given)}: expected a list of names of choices, such as {example!r}")
    return names


def _check_model(model: nn.Module, example: Tensor) -> None:
    """Refuse modules that a recording would not repeat, and examples that are no batch."""
    if not isinstance(model, nn.Module):
        raise TangleNASError(f"elasticize takes a torch module, got {type(model).__name__}")
    name = type(model).__name__
    if not isinstance(example, Tensor) or example.dim() < 2 or not len(example):
        shape = f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else f"type {type(example).__name__}"
        raise TangleNASError(
            f"the example is of {shape}, expected a batch of inputs, such as torch.randn(2, 3, 224, 224)"
        )
    if example.is_meta:
        raise TangleNASError("the example is on the meta device, which has no numbers: give one on the model's device")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TangleNASError(f"{name} is a wrapper for several devices: give its `module`")
    for path, module in model.named_modules():
        where = f"{path} ({type(module).__name__})" if path else name
        if isinstance(module, Elastic):
            raise TangleNASError(f"{where} is elastic already: elasticize takes modules of torch alone")
        if type(module).__module__.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic", "torchao.")):
            raise TangleNASError(f"{where} is quantized: search in floating point, and quantize the network found")
        if nn.utils.parametrize.is_parametrized(module):
            raise TangleNASError(
                f"{where} computes a weight from others: remove its parametrization first, with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        for key, tensor in module._parameters.items():
            if isinstance(tensor, nn.parameter.UninitializedParameter) or (tensor is not None and tensor.is_meta):
                raise TangleNASError(f"{where} has no numbers in {key} yet: run the model once, or load its weights")
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise TangleNASError(f"{where} is compiled: give the module that was compiled (its `_orig_mod`)")
        if any(
            getattr(module, hooks, None)
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ):
            raise TangleNASError(
                f"{where} has hooks, which a recording leaves out: remove them first, those of weight norm, spectral "
                "norm and pruning with torch.nn.utils.remove_weight_norm, remove_spectral_norm and prune.remove"
            )


def _without_cache(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which those of transformers keep no keys and values for the next token.

    A recording would put them behind an empty cache in every network, and heads and depths would stay for it.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
    return model


def _record(model: nn.Module, example: Tensor, output: Callable[[Any], Any]) -> tuple[Recorder, dict[str, str]]:
    """Return the recording of a model, and the modules in it that are called as a whole, with the reasons."""
    name = type(model).__name__
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = copy.deepcopy(model).eval()(example.clone())
    except Exception as error:
        raise TangleNASError(
            f"{name} does not take the example of shape {tuple(example.shape)} and type {example.dtype}: "
            f"{describe(error)}"
        ) from error
    try:
        got = output(result)
    except TangleNASError:
        raise
    except Exception as error:
        raise TangleNASError(f"`output` does not take what {name} returns: {describe(error)}") from error
    if not isinstance(got, Tensor):
        raise TangleNASError(f"`output` returns a {type(got).__name__} for what {name} returns, expected a tensor")
    model = _without_cache(model)
    whole: dict[str, str] = {}
    while True:
        try:
            return record(model, example, output, whole), whole
        except DataDependent as error:
            if not error.owner or error.owner in whole:
                advice = "put the part that does so into a module of its own, which is then called as a whole"
                raise TangleNASError(
                    f"{name} cannot become a space: {error.reason}{'' if error.owner else f'; {advice}'}"
                ) from None
            whole[error.owner] = error.reason
        except TangleNASError:
            raise
        except Exception as error:
            raise TangleNASError(f"{name} cannot be recorded: {describe(error)}") from error
