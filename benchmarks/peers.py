"""Other people's tools that make a trained network smaller: Torch-Pruning and NVIDIA's Model-Optimizer.

Each function takes a trained network and the most that it may cost, and returns a smaller one with inherited weights.
The cost is a function of a network, the same for all. The libraries are imported here only, and only when asked for:

    pip install torch-pruning nvidia-modelopt torchprofile==0.0.4
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from tanglenas_engine import TangleNASError

Cost = Callable[[nn.Module], float]
Batches = Sequence[tuple[Tensor, Tensor]]
HALVINGS = 9
"""Halvings of the range of Torch-Pruning's ratio, and of FastNAS's limit, until the budget is met from below."""
DIVISOR = 4
"""FastNAS's multiple for numbers of channels. Its own, 32, leaves a network of 8 to 96 channels as it is."""


class MissingError(TangleNASError):
    """A peer is not installed."""


def library(name: str, package: str) -> Any:
    """Return a peer's module.

    Raises:
        MissingError: The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(
            f"{name} cannot be imported ({error}): run `pip install {package}` in an environment of its own, or leave "
            "the method out with --methods"
        ) from error


def torch_pruning(
    network: nn.Module, example: Tensor, cost: Cost, most: float, batches: Batches, importance: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network pruned by Torch-Pruning's dependency graph, and the ratio that it took.

    The ratio is the smallest that meets the limit, to 1/500. Heads keep their number and lose dimensions, the library's
    default. Groups of one kind are ranked together (isomorphic pruning, Fang et al. 2024). The output layer is ignored,
    and so are the layers that write to residual streams: with those widths kept, the validation loss after fine-tuning
    was 0.581 on average over six networks of a seed outside of the study, and 0.587 with them pruned.

    Args:
        batches: The batches of the loss whose gradients "taylor" takes.
        importance: "magnitude" or "taylor", the library's group importances.
    """
    tp = library("torch_pruning", "torch-pruning")
    measures = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    network.eval()
    network.zero_grad()
    if importance == "taylor":
        for inputs, targets in batches:
            outputs = network(inputs)
            F.cross_entropy(outputs.flatten(0, -2), targets.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}

    def pruned(ratio: float) -> nn.Module:
        found = copy.deepcopy(network)
        for name, parameter in found.named_parameters():
            parameter.grad = None if gradients[name] is None else gradients[name].clone()
        tied = getattr(found, "lm_head", None) is not None and found.lm_head.weight is found.wte.weight
        attentions = [module for module in found.modules() if hasattr(module, "qkv")]
        pruner = tp.pruner.BasePruner(
            found,
            example,
            importance=measures[importance](),
            global_pruning=True,
            isomorphic=True,
            pruning_ratio=ratio,
            ignored_layers=[_output(found), *_writers(found)],
            num_heads={module.qkv: module.num_heads for module in attentions},
            in_channel_groups={},  # the library's defaults are shared between pruners, and pruners write into them
            out_channel_groups={},
        )
        pruner.step()
        for module in attentions:  # what the library's examples for timm set, and what timm has added since
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.head_dim * module.num_heads
            module.scale = module.head_dim**-0.5
        if tied:  # each lost the same channels
            found.lm_head.weight = found.wte.weight
        found.zero_grad()
        return found

    low, high = 0.0, 1.0
    best: nn.Module | None = None
    ratio = 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = pruned(middle)
        if cost(found) <= most:
            best, ratio, high = found, middle, middle
        else:
            low = middle
    if best is None:
        raise TangleNASError(f"Torch-Pruning found no ratio below {high} within {most:,}")
    return best, {"ratio": ratio}


def fastnas(
    network: nn.Module,
    example: Tensor,
    cost: Cost,
    most: float,
    constraint: str,
    score: Callable[[nn.Module], float],
    statistics: Sequence[Tensor],
    sensitivities: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network that Model-Optimizer's FastNAS finds, and what it searched.

    The library counts multiply-accumulates in its own way. So its limit is lowered until the budget is met by `cost`;
    the sensitivities, which take nearly all of the time, are measured once.

    Args:
        constraint: The library's name of the cost: "flops" or "params".
        score: A function that returns what is to be as large as possible.
        statistics: Batches of inputs that set the statistics of batch norms.
        sensitivities: A file for the sensitivities. If it is there, nothing is scored.
    """
    mtp = library("modelopt.torch.prune", "nvidia-modelopt torchprofile==0.0.4")
    mode = importlib.import_module("modelopt.torch.prune.fastnas")
    rules = {
        kind: {"*": {**rule, **{key: DIVISOR for key in ("channel_divisor", "feature_divisor") if key in rule}}}
        for kind, rule in mode._get_fastnas_default_rules().items()
    }
    told = io.StringIO()

    def searched(share: float) -> nn.Module:
        found = copy.deepcopy(network).eval()
        separate_activations(found)
        options: dict[str, Any] = {"score_func": score, "checkpoint": sensitivities, "verbose": True}
        if statistics:
            options |= {"data_loader": statistics, "collect_func": lambda batch: batch}
            options["max_iter_data_loader"] = len(statistics)
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            limits = {constraint: f"{100 * share}%"}
            found, _ = mtp.prune(found, [("fastnas", rules)], limits, example, config=options)
        return found

    whole = cost(network)
    share = most / whole
    for _ in range(HALVINGS):
        found = searched(share)
        used = cost(found.eval())
        if used <= most:
            break
        share *= 0.98 * most / used
    else:
        raise TangleNASError(f"FastNAS found no network within {most:,}: the last one costs {used:,}")
    lines = {line for line in told.getvalue().splitlines() if line.startswith("*")}
    return found, {"asked": round(share, 4), "choices": len(lines)}


def separate_activations(network: nn.Module) -> None:
    """Replace timm's batch norms that include an activation, which FastNAS does not know, by a norm and an activation.

    The network computes the same. Without this, FastNAS finds nothing to search beside the squeeze-excite layers.
    """
    for name, child in list(network.named_children()):
        if isinstance(child, BatchNormAct2d):
            norm = nn.BatchNorm2d(child.num_features, eps=child.eps, momentum=child.momentum)
            norm.load_state_dict(child.state_dict())
            setattr(network, name, nn.Sequential(norm.train(child.training), child.drop, child.act))
        else:
            separate_activations(child)


def _output(network: nn.Module) -> nn.Module:
    """Return the layer that computes the logits."""
    for name in ("head", "classifier", "lm_head"):
        if isinstance(layer := getattr(network, name, None), nn.Module):
            return layer
    raise TangleNASError(f"{type(network).__name__} has no output layer named head, classifier or lm_head")


def _writers(network: nn.Module) -> list[nn.Module]:
    """Return the layers that write to residual streams, in the networks of this benchmark."""
    names = ("conv_stem", "conv_pwl", "patch_embed.proj", "attn.proj", "fc2", "wte", "wpe")
    return [module for name, module in network.named_modules() if name.endswith(names)]
