"""The initialisation of a model, as rules that hold for its networks of other widths."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.parts import matrices, part

CONSTANT, BOTH, INPUTS, OUTPUTS = FANS = range(4)
"""The fans with whose root a deviation may go: none, the mean of both (Xavier), and Kaiming's fan_in and fan_out."""
DEFAULT = 1 / math.sqrt(3)
"""The deviation of torch's layers, times the root of their inputs."""
RELU = math.sqrt(2)
KNOWN = ((CONSTANT, 0.02), (BOTH, 1.0), (INPUTS, DEFAULT), (INPUTS, RELU), (INPUTS, 1.0), (OUTPUTS, RELU))
"""The fans and constants of GPT-2, Xavier, torch's layers, Kaiming for ReLU, LeCun, and Kaiming for ReLU by outputs."""
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""torch's norms, whose gains begin as 1. Those of others may begin as 0, as they add 1, or as a small number."""


class Initial(NamedTuple):
    """The normal distribution of a new parameter.

    Attributes:
        mean: The mean.
        constant: The deviation times the root of the fan.
        fan: One of `FANS`.
        weight: The name in its module of the matrix whose fan it is: the parameter, or the layer's matrix for a bias.
    """

    mean: float
    constant: float
    fan: int
    weight: str

    def draw(self, parameter: Tensor, module: nn.Module) -> None:
        """Draw a parameter of a module by the module's own sizes."""
        deviation = self.constant / math.sqrt(_fan(self.fan, part(module, self.weight)))
        nn.init.normal_(parameter, self.mean, deviation) if deviation else nn.init.constant_(parameter, self.mean)


def is_trained(model: nn.Module) -> bool:
    """Return True if the gains of a norm differ from one another, and its biases as well, where it has some.

    In a new model they are equal, or the gains alone are drawn.
    """
    norms = [_vectors(module) for module in model.modules()]
    return any(
        "weight" in norm and not any(torch.equal(v, v[:1].expand_as(v)) for v in norm.values()) for norm in norms
    )


def initials(model: nn.Module, trained: bool) -> dict[str, Initial]:
    """Return the distributions of the parameters of new networks, by name.

    The deviations of a new model's matrices follow rules, such as a constant divided by the root of the inputs. One
    matrix does not tell the rule, but matrices of several shapes do (see `_rules`). The bias of a layer follows the
    rule of its matrix. All other parameters keep their mean and deviation.

    The deviations of a trained model follow no rule. Its matrices, the gains of torch's norms and the slopes of PReLU
    begin as torch's do, biases are 0, and all other parameters keep their mean and deviation.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = {name: p.detach() for name, p in named.items() if p.is_floating_point()}
    weights = matrices(model)
    multiplied = {name for name in parameters if named[name] in weights}
    rules = dict.fromkeys(multiplied, INPUTS) if trained else _rules(parameters, multiplied)
    fans = {named[name]: fan for name, fan in rules.items()}
    gains = {norm.weight: 1.0 for norm in model.modules() if isinstance(norm, NORMS)}
    gains |= {prelu.weight: prelu.init for prelu in model.modules() if isinstance(prelu, nn.PReLU)}
    found: dict[str, Initial] = {}
    for name, tensor in parameters.items():
        owner, dot, key = name.rpartition(".")
        matrix = key.replace("bias", "weight")
        weight = f"{owner}{dot}{matrix}"
        fan = fans.get(named[weight], CONSTANT) if weight in named else CONSTANT
        if trained and name in multiplied:
            found[name] = Initial(0.0, DEFAULT, fan, key)
        elif trained and tensor.dim() == 1 and "bias" in key.split("_"):
            found[name] = Initial(0.0, 0.0, CONSTANT, key)
        elif trained and named[name] in gains:
            found[name] = Initial(gains[named[name]], 0.0, CONSTANT, key)
        else:
            constant = float(tensor.std(correction=0)) * math.sqrt(_fan(fan, named.get(weight, tensor)))
            found[name] = Initial(float(tensor.mean()), constant, fan, matrix if fan else key)
    return found


def _vectors(module: nn.Module) -> dict[str, Tensor]:
    """Return the gains and the biases of a module, by their names in torch's norms."""
    own = {name: module._parameters.get(name) for name in ("weight", "bias")}
    return {name: p.detach() for name, p in own.items() if p is not None and p.dim() == 1 and p.is_floating_point()}


def _fan(fan: int, weight: Tensor) -> float:
    """Return a fan of a matrix, whose inputs and outputs are counted as torch counts them."""
    if fan == CONSTANT:
        return 1.0
    positions = math.prod(weight.shape[2:])
    inputs, outputs = weight.shape[1] * positions, weight.shape[0] * positions
    return {BOTH: (inputs + outputs) / 2, INPUTS: inputs, OUTPUTS: outputs}[fan]


def _rules(parameters: Mapping[str, Tensor], multiplied: Container[str]) -> dict[str, int]:
    """Return the fan with whose root the deviation of each matrix goes: one of `FANS`.

    A rule is a fan and a constant. The rule that matrices of most shapes follow is taken first, then the one that most
    of the others follow, and so on. A rule of `KNOWN` has one shape more, because matrices of one shape do not tell
    rules apart. Among equals a rule of `KNOWN` is taken, and then a constant deviation, as tables may follow no other.
    """
    deviations = {name: float(p.float().std(correction=0)) for name, p in parameters.items() if p.dim() > 1}
    left = {name: deviation for name, deviation in deviations.items() if 0 < deviation < math.inf}
    # Three standard errors of a deviation, and 1 % for distributions whose tails are cut off.
    errors = {name: 3 / math.sqrt(2 * parameters[name].numel()) + 0.01 for name in left}
    rules: list[tuple[int, int, set[str]]] = []
    for fan in FANS:
        logs = {
            name: math.log(deviation * math.sqrt(_fan(fan, parameters[name])))
            for name, deviation in left.items()
            if fan == CONSTANT or name in multiplied
        }
        known = [(math.log(constant), 1) for one, constant in KNOWN if one == fan]
        for value, more in [*known, *((log, 0) for log in dict.fromkeys(logs.values()))]:
            rules.append((fan, more, {name for name, log in logs.items() if abs(log - value) <= errors[name]}))

    def shapes(rule: tuple[int, int, set[str]]) -> tuple[int, int]:
        _, more, names = rule
        found = len({parameters[name].shape for name in names & left.keys()})
        return (found + more, more) if found else (0, 0)

    found = dict.fromkeys(deviations, CONSTANT)
    while left:
        fan, _, names = max(rules, key=shapes)
        for name in names & left.keys():
            found[name] = fan
            del left[name]
    return found
