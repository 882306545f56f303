"""New networks of an elasticized model begin as the model's own initialisation would begin at their width."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tanglenas_engine import elasticize
from tanglenas_engine.conversion.initial import BOTH, CONSTANT, INPUTS, OUTPUTS, initials

Rule = Callable[[nn.Module], None]


def by(weights: Callable[[Tensor], Tensor], linear: Callable[[Tensor], Tensor] | None = None) -> Rule:
    """Return a rule for the weights of convolutions, and of linear layers, whose biases are 0."""

    def apply(layer: nn.Module) -> None:
        (linear if linear and isinstance(layer, nn.Linear) else weights)(layer.weight)
        nn.init.zeros_(layer.bias)

    return apply


BY_OUTPUTS = by(
    partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"), partial(nn.init.normal_, std=0.01)
)
RULES: dict[str, Rule] = {
    "torch": lambda layer: layer.reset_parameters(),
    "kaiming": by(partial(nn.init.kaiming_uniform_, nonlinearity="relu")),
    "kaiming by outputs": BY_OUTPUTS,
    "xavier": by(nn.init.xavier_uniform_),
    "fixed": by(partial(nn.init.normal_, std=0.02)),
}


def layers(network: nn.Module) -> list[nn.Module]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def plain(rule: Rule, widths: tuple[int, ...]) -> nn.Sequential:
    """Return convolutions of some widths and a linear layer, initialised by a rule."""
    network = nn.Sequential()
    for inputs, outputs in zip((3, *widths), widths, strict=False):
        network.extend([nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()])
    network.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 60)])
    for layer in layers(network):
        rule(layer)
    return network


@torch.no_grad()
def spreads(network: nn.Module, x: Tensor) -> Tensor:
    """Return the logarithms of the deviations of each layer's outputs over a batch."""
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: found.append(output.std(0).mean().log()))
        for layer in layers(network)
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


@pytest.mark.parametrize("widths", [(64, 96, 128, 128), (64, 64, 64, 64)], ids=["widening", "of one width"])
@pytest.mark.parametrize("name", RULES)
def test_the_smallest_network_begins_as_the_same_rule_begins_at_its_width(name, widths):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    space = elasticize(plain(RULES[name], widths), x)
    differences = []
    for _ in range(12):
        network = space.standalone(space.smallest())
        assert layers(network)[-1].in_features == widths[-1] // 4
        own = copy.deepcopy(network)
        for layer in layers(own):
            RULES[name](layer)
        differences.append(spreads(network, x) - spreads(own, x))
    assert torch.stack(differences).mean(0).abs().max() < math.log(1.3)


def test_biases_of_torch_go_with_the_inputs_of_their_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 400), nn.ReLU(), nn.Linear(400, 4))
    space = elasticize(model, torch.randn(4, 16), hidden=(0.25, 1))
    network = space.standalone(space.smallest())
    for name, inputs in (("0", 16), ("2", 128)):
        bias = network.get_submodule(name).bias
        assert float(bias.detach().std()) == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.25)


def test_a_rule_is_told_by_matrices_of_several_shapes():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    found = initials(model, trained=False)
    layer = "layers.1."
    fans = {name.removeprefix(layer): initial.fan for name, initial in found.items() if name.startswith(layer)}
    assert {name for name, fan in fans.items() if fan == BOTH} == {"self_attn.in_proj_weight", "self_attn.in_proj_bias"}
    assert {name for name, fan in fans.items() if fan == INPUTS} == {
        f"{name}.{key}" for name in ("self_attn.out_proj", "linear1", "linear2") for key in ("weight", "bias")
    }
    assert found["layers.0.norm1.weight"] == (1.0, 0.0, CONSTANT, "weight")


def test_a_model_may_follow_several_rules():
    torch.manual_seed(0)
    found = initials(plain(BY_OUTPUTS, (32, 32, 32)), trained=False)
    assert [found[f"{i}.weight"].fan for i in (0, 2, 4, 8)] == [OUTPUTS, OUTPUTS, OUTPUTS, CONSTANT]
    model = nn.ModuleList([nn.Embedding(50, 64), nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 64)])
    for one, deviation in zip(model, (0.02, 0.02, 0.01, 0.02), strict=True):
        nn.init.normal_(one.weight, std=deviation)  # as in GPT-2, which makes the ends of its blocks smaller
    found = initials(model, trained=False)
    assert {found[f"{i}.weight"].fan for i in range(4)} == {CONSTANT}


def test_a_known_constant_is_taken_before_one_that_happens_to_fit_as_many_shapes():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(192, 576), nn.Linear(192, 768), nn.Linear(768, 192)])
    for one, deviation in zip(model, (0.02, 0.02, 0.01), strict=True):  # 0.01 * sqrt(768) is 0.02 * sqrt(192)
        nn.init.normal_(one.weight, std=deviation)
    found = initials(model, trained=False)
    assert {found[f"{i}.weight"].fan for i in range(3)} == {CONSTANT}
    model = nn.ModuleList([nn.Linear(768, 256), nn.Linear(256, 256)])
    nn.init.normal_(model[0].weight, std=1 / math.sqrt(768))  # LeCun's, which is torch's for a third of the inputs
    found = initials(model, trained=False)
    assert [found[f"{i}.weight"].fan for i in range(2)] == [INPUTS, INPUTS]


def test_a_tied_parameter_has_an_entry_for_each_name():
    """A network may lack the module of the first one, as a layer that an order leaves out."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    nn.init.normal_(model[0].weight, std=0.005)
    found = initials(model, trained=False)
    assert found["1.weight"] == found["0.weight"]


def test_weights_without_a_deviation_keep_their_values():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    nn.init.zeros_(model[2].weight)
    nn.init.constant_(model[0].weight, math.nan)
    found = initials(model, trained=False)
    assert found["2.weight"] == (0.0, 0.0, CONSTANT, "weight") and math.isnan(found["0.weight"].mean)


class Scaled(nn.Module):
    """A norm of one's own whose gains add 1, and then a layer scale."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.std(-1, keepdim=True) * (1 + self.weight) * self.scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 1, 16, 16))
        self.first, self.norm, self.prelu = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.PReLU()
        self.second, self.last, self.scaled = nn.Conv2d(32, 64, 3, padding=1), nn.Linear(64, 40), Scaled(40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.prelu(self.norm(self.first(x + self.table)))).relu()
        return self.scaled(self.last(x.mean((2, 3))))


def trained() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(-0.2, 1.2, 32))
        model.norm.bias.copy_(torch.randn(32))
        model.prelu.weight.fill_(0.7)
        model.scaled.weight.copy_(0.1 * torch.randn(40))
        model.scaled.scale.copy_(0.3 + 0.1 * torch.randn(40))
        model.last.weight.mul_(20)
        model.second.bias.fill_(3)
    return model


def test_fresh_weights_of_a_trained_model_are_those_of_new_layers():
    space = elasticize(trained(), torch.randn(2, 1, 16, 16))
    assert "the weights of Net are trained" in space.scratch_warning
    network = space.standalone(space.smallest())
    assert network.norm.weight.eq(1).all() and not network.norm.bias.any() and not network.second.bias.any()
    assert network.prelu.weight.eq(0.25).all()
    assert float(network.last.weight.detach().std()) == pytest.approx(1 / math.sqrt(3 * 16), rel=0.2)


def test_a_trained_model_keeps_the_distributions_of_which_no_layer_says_how_they_begin():
    model = trained()
    space = elasticize(model, torch.randn(2, 1, 16, 16))
    network = space.standalone(space.largest())
    for name in ("table", "scaled.weight", "scaled.scale"):
        old, new = model.get_parameter(name).detach(), network.get_parameter(name).detach()
        error = float(old.std()) / math.sqrt(old.numel())
        assert float(new.mean()) == pytest.approx(float(old.mean()), abs=4 * error)
        assert float(new.std()) == pytest.approx(float(old.std()), abs=4 * error)


def test_fresh_weights_of_a_trained_model_follow_an_untrained_one():
    fresh = Net()
    nn.init.normal_(fresh.last.weight, std=0.5)
    fresh.auxiliary = nn.Linear(10, 10)
    for parameter in fresh.norm.parameters():
        nn.init.normal_(parameter, std=0.1)  # what is given as `initial` is untrained, whatever it looks like
    space = elasticize(trained(), torch.randn(2, 1, 16, 16), initial=fresh)
    network = space.standalone(space.largest())
    assert float(network.norm.weight.detach().std()) == pytest.approx(0.1, rel=0.5) and not space.scratch_warning
    assert float(network.last.weight.detach().std()) == pytest.approx(0.5, rel=0.2)


def test_a_new_model_may_draw_its_gains():
    model = Net()
    nn.init.normal_(model.norm.weight, 1, 0.1)
    assert not elasticize(model, torch.randn(2, 1, 16, 16)).scratch_warning
