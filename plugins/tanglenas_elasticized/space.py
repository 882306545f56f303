"""The space made of a model that a configuration names."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from tanglenas_engine import SearchSpace, TangleNASError, elasticize

SHARES = (0.5, 0.75, 1)
NAMES = {"image_size": ("img_size", "image_size"), "in_channels": ("in_chans", "in_channels")}
"""The names that a function of a model may have for the options of a space, beside the option's own."""
OUTPUTS = ("num_classes", "vocab_size")
"""The options that set the number of outputs. A function with `**kwargs` gets them, too."""
UNTRAINED = {"pretrained": False, "weights": None, "checkpoint_path": ""}
"""The arguments with which functions of models load no trained weights: those of timm and of torchvision."""

_Made = tuple[nn.Module, partial[Any]]


def elasticized(
    model: str | Callable[..., nn.Module] = "resnet18",
    arguments: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    in_channels: int = 3,
    vocab_size: int | None = None,
    block_size: int | None = None,
    hidden: Sequence[float] = (0.25, *SHARES),
    residual: Sequence[float] = SHARES,
    heads: Sequence[float] = (0.25, *SHARES),
    depth: Sequence[float] = SHARES,
    divisor: int = 8,
    fixed: Sequence[str] = (),
    relaxation: str = "exact",
    sharing: str = "superposed",
) -> SearchSpace:
    """Return the search space inside a model, whose weights are those that the model has. It is made on the CPU.

    Args:
        model: The name of a model of timm, or a function that makes one, such as `@timm.create_model` in a gin file.
        arguments: More arguments of the model, such as `{"embed_dim": 96}`.
        num_classes: The number of classes; None is the number that the model has by itself. The function gets it, and
            the next ones, if it takes them.
        image_size: The height and width of images, in pixels; None is 224.
        in_channels: The number of channels of images.
        vocab_size: The number of tokens, for a model of texts.
        block_size: The length of a text, in tokens.
        hidden: Options of sizes inside a block, as shares of the model's. See `elasticize` for these options.
        residual: Options of the widths of residual streams.
        heads: Options of numbers of heads.
        depth: Options of numbers of repeated layers.
        divisor: A number of which sizes are multiples.
        fixed: Names of choices that stay as they are.

    Raises:
        TangleNASError: The model is unknown to timm or takes no such arguments, has too few outputs, or cannot
            become a space.
    """
    texts = vocab_size is not None
    given: dict[str, Any] = {"vocab_size": vocab_size, "block_size": block_size}
    if not texts:
        given = {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    given = {name: value for name, value in given.items() if value is not None}
    size = image_size or 224
    with torch.device("cpu"):
        network, make = _made(model, given, dict(arguments or {}))
        initial, failures = _untrained(make, network)
        example = torch.randint(vocab_size, (2, block_size or 64)) if texts else torch.randn(2, in_channels, size, size)
        space = elasticize(
            network, example, hidden=hidden, residual=residual, heads=heads, depth=depth, divisor=divisor, fixed=fixed,
            initial=initial, relaxation=relaxation, sharing=sharing,
        )  # fmt: skip
        if space.scratch_warning and failures:
            space.scratch_warning += f". The function was called again: {failures}"
        elif initial is None and not space.scratch_warning:
            space.set_initial(_again(make), trained=False)
        _check_outputs(space, *("vocab_size", vocab_size) if texts else ("num_classes", num_classes))
    return space


def _check_outputs(space: SearchSpace, option: str, wanted: int | None) -> None:
    """Refuse a space with fewer outputs than asked for, and warn of more: these are costs of each network, too."""
    mode = space.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        shape = tuple(space.eval()(space.example_input(2)).shape)
    space.train(mode)
    outputs = shape[-1] if option == "vocab_size" or len(shape) < 3 else shape[1]
    if not wanted or outputs == wanted or outputs == 0:  # timm has networks of 0 classes
        return
    advice = (
        f"{option} is {wanted}, but the model returns a tensor of shape (batch, {', '.join(map(str, shape[1:]))}). If "
        "its function has another name for the number, give it in create_space.arguments, such as "
        f'{{"classes": {wanted}}}'
    )
    if outputs < wanted:
        raise TangleNASError(advice)
    warnings.warn(advice, stacklevel=2)


def _untrained(make: partial[Any], network: nn.Module) -> tuple[nn.Module | None, str]:
    """Make a network again, without trained weights. Return None and what failed where its function cannot do so."""
    takes = inspect.signature(make.func).parameters
    every = tuple(name for name in UNTRAINED if name in takes or name in make.keywords)
    given = tuple(name for name in every if name in make.keywords)  # some functions take one name instead of another
    failures = []
    for names in filter(None, dict.fromkeys((every, given))):
        options = {name: UNTRAINED[name] for name in names}
        try:
            untrained = _again(make, **options)
        except Exception as error:  # a function of one's own may need weights, or mean something else by the name
            failures.append(f"with {options} it raises {type(error).__name__} ({error})")
            continue
        if isinstance(untrained, nn.Module) and _shapes(untrained) >= _shapes(network):
            return untrained, ""
        failures.append(f"with {options} it makes no model of these parameters")
    return None, ", and ".join(failures)


def _again(make: partial[Any], **options: Any) -> Any:
    """Make a network by a seed of its own, so that a network trained from scratch depends on that training's alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(**options)


def _shapes(network: nn.Module) -> set[tuple[str, torch.Size]]:
    return {(name, parameter.shape) for name, parameter in network.named_parameters()}


def _made(model: str | Callable[..., nn.Module], given: dict[str, Any], arguments: dict[str, Any]) -> _Made:
    """Make a model with those of the given options that it takes, and return the call that made it, too."""
    if isinstance(model, str):
        if not timm.is_model(model):
            close = timm.list_models(f"*{model}*")[:3]
            raise TangleNASError(
                f"timm has no model {model!r}{': did you mean ' + ', '.join(close) + '?' if close else ''}. "
                "timm.list_models() has the names; a function that makes a model does, too"
            )
        return _timm(partial(timm.create_model, model), given, arguments)
    if not callable(model):
        raise TangleNASError(
            f"create_space.model is {model!r}, expected a name of timm or a function that makes a model"
        )
    parameters = inspect.signature(model).parameters
    if "model_name" in parameters:  # timm.create_model itself
        return _timm(model, given, arguments)
    named = {}
    for option, value in given.items():
        if (name := next((n for n in (option, *NAMES.get(option, ())) if n in parameters), None)) is not None:
            named[name] = value
    passed_on = {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        passed_on = {name: value for name, value in given.items() if name in OUTPUTS and name not in named}
    make = partial(model, **{**named, **passed_on, **arguments})
    try:
        network = make()
    except (TypeError, ValueError) as error:
        # What `**kwargs` go to may have another name for it, which `arguments` may hold, or weights of another number.
        if not any(name in str(error) for name in passed_on):
            raise
        make = partial(model, **{**named, **arguments})
        network = make()
    if not isinstance(network, nn.Module):
        raise TangleNASError(f"create_space.model makes a {type(network).__name__}, expected a torch module")
    return network, make


def _timm(create: Callable[..., nn.Module], given: dict[str, Any], arguments: dict[str, Any]) -> _Made:
    """Make a model of timm. Only some of them take the size of images."""
    named = {NAMES.get(option, (option,))[0]: value for option, value in given.items()}
    make = partial(create, **{**named, **arguments})
    try:
        return make(), make
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        named.pop("img_size", None)
        make = partial(create, **{**named, **arguments})
        return make(), make
