"""Second-order DARTS: alpha's gradient after a step of the weights (Liu et al. 2019, arXiv:1806.09055, section 2.3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tanglenas_engine import Batch, Mixture, Step, averaged, call_with, positive, unknown
from tanglenas_gradient.darts import DARTS

HYPERGRADIENTS = ("finite_differences", "autograd")
Weights = Mapping[str, Tensor]


class SecondOrderDARTS(DARTS):
    """An optimizer that differentiates `L_val(w', alpha)` by alpha, both directly and through w'.

    Here `w'` are the weights after a step of SGD with the weight optimizer's present learning rate, weight decay,
    momentum, dampening and Nesterov's form. An optimizer of another kind lends its learning rate and weight decay only.
    The step is undone: weights, running statistics and random generators are the same afterwards. Weights that need no
    gradient stay.

    Args:
        weight_decay: See `darts`.
        hypergradient: "finite_differences" computes the mixed second derivative times a vector v from the gradients at
            `w +- radius / |v| * v` (the paper's equation 8). "autograd" computes it exactly, by a second backward pass
            through the first one, whose memory it keeps.
        radius: The radius of the finite differences; 0.01 in the paper.
        temperature, final_temperature: See `darts`.
    """

    accumulates = False  # the step to w' takes the whole batch

    def __init__(
        self,
        weight_decay: float = 0.0,
        hypergradient: str = "finite_differences",
        radius: float = 1e-2,
        temperature: float = 1.0,
        final_temperature: float | None = None,
    ):
        super().__init__(weight_decay, temperature, final_temperature)
        if hypergradient not in HYPERGRADIENTS:
            raise unknown("hypergradient of darts2", hypergradient, HYPERGRADIENTS)
        self.hypergradient, self.radius = hypergradient, positive("radius", radius)

    def architecture_backward(self, step: Step) -> Tensor:
        assert step.architecture_batch is not None
        exact = self.hypergradient == "autograd"
        alphas, mixture = list(self.alphas.values()), self.expected()
        weights = {name: weight for name, weight in step.space.named_parameters() if weight.requires_grad}
        # Fused attention has no second derivative.
        with _left_alone(step.space), sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
            trained = self._loss_at(step, step.weight_batch, mixture if exact else mixture.detach(), weights)
            # A weight that the forward leaves out has a gradient of 0.
            scaled = torch.autograd.grad(trained, [*weights.values()], create_graph=exact, materialize_grads=True)
            slopes = [slope.detach() / step.scale for slope in scaled]
            rates = {name: _rates(step.weight_optimizer, weight)[0] for name, weight in weights.items()}
            moved = _moved(step.weight_optimizer, weights, averaged(slopes))
            loss = self._loss_at(step, step.architecture_batch, mixture, moved)
            gradients = torch.autograd.grad(
                loss, [*alphas, *moved.values()], retain_graph=exact, materialize_grads=True
            )
            direct, through = gradients[: len(alphas)], averaged(gradients[len(alphas) :])
            vector = {name: rates[name] * v / step.scale for name, v in zip(weights, through, strict=True)}
            if exact:
                used = [(slope, v) for slope, v in zip(scaled, vector.values(), strict=True) if slope.requires_grad]
                mixed = torch.autograd.grad([slope for slope, _ in used], alphas, [v for _, v in used])
            else:
                mixed = self._differences(step, weights, vector)
        penalties = torch.autograd.grad(self.regularizer(), alphas)
        for alpha, own, via, penalty in zip(alphas, direct, mixed, penalties, strict=True):
            alpha.grad = own - via + penalty * step.scale
        return loss.detach() / step.scale

    def _differences(self, step: Step, weights: Weights, vector: Weights) -> list[Tensor]:
        """Return `d/dalpha of (dL_train/dw . vector)` times the scale, computed from two gradients."""
        length = torch.stack([v.norm() for v in vector.values()]).norm()
        radius = self.radius / length.clamp_min(torch.finfo(length.dtype).tiny)
        alphas = list(self.alphas.values())
        ends = []
        for sign in (1, -1):
            there = {name: weight.detach() + sign * radius * vector[name] for name, weight in weights.items()}
            loss = self._loss_at(step, step.weight_batch, self.expected(), there)
            ends.append(torch.autograd.grad(loss, alphas))
        return [(plus - minus) / (2 * radius) for plus, minus in zip(*ends, strict=True)]

    def _loss_at(self, step: Step, batch: Batch, mixture: Mixture, weights: Weights) -> Tensor:
        """Return the loss at other weights, scaled for a backward pass in float16.

        All calls in a step draw the same dropout, so that it adds nothing to the differences.
        """
        torch.manual_seed(self.derive_seed(step.index, "hypergradient"))
        self.enter(mixture)
        outputs = call_with(step.space, weights, batch[0])
        return step.loss(outputs, batch[1]) * step.scale


def _moved(optimizer: torch.optim.Optimizer, weights: Weights, slopes: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the weights after a step of SGD, as leaves."""
    moved = {}
    for (name, weight), slope in zip(weights.items(), slopes, strict=True):
        rate, before = _rates(optimizer, weight)
        step = rate * (slope + _of(optimizer, weight, "weight_decay") * weight.detach())
        if before:
            step = step + before * _velocity(optimizer, weight)
        moved[name] = (weight.detach() - step).requires_grad_()
    return moved


def _rates(optimizer: torch.optim.Optimizer, weight: Tensor) -> tuple[float, float]:
    """Return by how much a step of SGD moves a weight against its slope, and against the velocity that it has."""
    rate, momentum = _of(optimizer, weight, "lr"), _of(optimizer, weight, "momentum")
    first = _velocity(optimizer, weight) is None  # its velocity becomes the slope itself
    slope, velocity = (1.0, 0.0) if first else (1 - _of(optimizer, weight, "dampening"), momentum)
    if _of(optimizer, weight, "nesterov"):
        slope, velocity = 1 + momentum * slope, momentum * velocity
    return rate * slope, rate * velocity


def _velocity(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor | None:
    return optimizer.state.get(weight, {}).get("momentum_buffer")


def _of(optimizer: torch.optim.Optimizer, weight: Tensor, option: str) -> float:
    """Return an option of the parameter group of a weight, or 0 if the optimizer lacks the option or the weight."""
    groups = (group for group in optimizer.param_groups if any(weight is other for other in group["params"]))
    return float(next(groups, {}).get(option, 0.0))


@contextmanager
def _left_alone(space: nn.Module) -> Iterator[None]:
    """Restore running statistics and random generators afterwards."""
    before = [(buffer, buffer.clone()) for buffer in space.buffers()]
    devices = {p.device for p in space.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        yield
    for buffer, value in before:
        buffer.copy_(value)
