"""Distillation: a network also learns from a larger one, from its outputs (Hinton et al. 2015, arXiv:1503.02531).

Hidden states can be learned, too. A network has the first channels of the largest one, and some of its layers. So no
projection between the two is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.data import Mean, mean_over_targets
from tanglenas_engine.elastic.depth import Depth
from tanglenas_engine.errors import TangleNASError, positive, within
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace


def check_teaching(weight: float, temperature: float, hidden: float) -> None:
    """Check the options of a teacher.

    Raises:
        TangleNASError: The weight is not from 0 to 1, the temperature is not positive, or `hidden` is negative.
    """
    within("retrain.teacher_weight", weight, 0, 1)
    positive("retrain.temperature", temperature)
    within("retrain.teacher_hidden", hidden, 0)


class Distillation:
    """A loss that draws the logits of a network to a teacher's.

    It is `(1 - weight) * loss + weight * T^2 * KL(teacher || network)`, with both distributions at temperature T. The
    factor T^2 keeps the size of the gradient. Hidden states add `hidden * mean(|x - t|^2 / |t|^2)` over the pairs of
    layers, with the network's outputs x and the first channels t of the teacher's.

    Both are means over the targets that are not `IGNORED`: over samples, or over positions where these have targets.
    A hidden state without a vector for each target counts as a whole.

    Args:
        teacher: The teacher, which is put into eval mode and never trained.
        weight: The share of the teacher, from 0 to 1.
        temperature: The divisor of both networks' logits.
        hidden: The weight of the hidden states.
        pairs: The names of the layers that are compared: the network's and the teacher's.

    Raises:
        TangleNASError: The weight is not from 0 to 1, the temperature is not positive, or `hidden` is negative.
    """

    def __init__(
        self,
        teacher: nn.Module,
        weight: float,
        temperature: float,
        hidden: float = 0.0,
        pairs: Sequence[tuple[str, str]] = (),
    ):
        check_teaching(weight, temperature, hidden)
        self.weight, self.temperature, self.hidden, self.pairs = weight, temperature, hidden, list(pairs)
        self.teacher = teacher.eval().requires_grad_(False)

    @property
    def watched(self) -> list[str]:
        """The names of the network's layers whose outputs are compared."""
        return [ours for ours, _ in self.pairs]

    def __call__(
        self,
        loss: Tensor,
        logits: Tensor,
        inputs: Tensor,
        targets: Tensor,
        states: Mapping[str, Tensor] = MappingProxyType({}),
        autocast: AbstractContextManager[Any] | None = None,
        mean: Mean = mean_over_targets,
    ) -> Tensor:
        """Return the mixed loss of a batch.

        Args:
            loss: The loss of the targets.
            logits: The network's logits, `(B, classes)` or `(B, T, tokens)`.
            inputs: The inputs of the batch.
            targets: The targets of the batch, `(B,)` or `(B, T)`.
            states: The outputs of the network's layers in `watched`, by name.
            autocast: The precision of the teacher's forward; None is that of its weights.
            mean: The mean over targets. That of a `PieceLoss` weighs the pieces of a batch.

        Raises:
            TangleNASError: The teacher has another number of classes.
        """
        with (
            torch.no_grad(),
            autocast or nullcontext(),
            recorded(self.teacher, [theirs for _, theirs in self.pairs]) as shown,
        ):
            taught = self.teacher(inputs)
        if taught.shape != logits.shape:
            raise TangleNASError(
                f"the teacher's logits have the shape {tuple(taught.shape)}, the network's {tuple(logits.shape)}: a "
                "teacher needs the same classes"
            )
        ours, theirs = ((it.float() / self.temperature).log_softmax(-1) for it in (logits, taught))
        divergences = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)  # (B,) or (B, T)
        mixed = (1 - self.weight) * loss + self.weight * self.temperature**2 * mean(divergences, targets)
        if not self.pairs:
            return mixed
        errors = [_relative_errors(states[ours], shown[theirs], targets) for ours, theirs in self.pairs]
        return mixed + self.hidden * mean(torch.stack(errors).mean(0), targets)


def _relative_errors(x: Tensor, whole: Tensor, targets: Tensor) -> Tensor:
    """Return `|x - t|^2 / |t|^2` for each target, with the teacher's state cut to the network's size as t."""
    t = whole[tuple(slice(size) for size in x.shape)].float()
    leading = targets.dim() if x.dim() > targets.dim() and x.shape[: targets.dim()] == targets.shape else 1
    errors, sizes = ((it * it).flatten(leading).mean(-1) for it in (x.float() - t, t))
    relative = errors / sizes.clamp_min(1e-12)
    return relative if relative.shape == targets.shape else relative.mean().expand_as(targets)


def hidden_pairs(space: SearchSpace, architecture: Architecture, network: nn.Module) -> list[tuple[str, str]]:
    """Return the names of the layers to compare: those of an architecture's network, and of the largest network.

    The output of a layer stands for what the next layer of the architecture gets in the largest network, and that of
    the last layer for the output of all layers.

    Raises:
        TangleNASError: The network has no layers by the names of the space's depths.
    """
    assignment = space.assignment_of(architecture)
    pairs: list[tuple[str, str]] = []
    for name, module in space.named_modules():
        if isinstance(module, Depth):
            kept = [*map(int, module.kept(assignment))]
            ends = [layer - 1 for layer in [*kept[1:], len(module)]] if kept else []
            pairs += [(f"{name}.{place}", f"{name}.{end}") for place, end in enumerate(ends)]
    if not pairs or not {ours for ours, _ in pairs} <= dict(network.named_modules()).keys():
        raise TangleNASError(
            f"retrain.teacher_hidden compares the outputs of layers, but the networks of {space.label} have none by "
            "the names of its depths: set it to 0"
        )
    return pairs


@contextmanager
def recorded(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a mapping that gets the outputs of these modules by name, in a forward inside the block."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        found[name] = output

    handles = [network.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
