"""The space that a configuration makes of a function: what the function is given, and what it must return."""

import pytest
from torch import nn

from tanglenas_engine import TangleNASError, create_space


def network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.ReLU(), nn.Linear(32, outputs))


def named(num_classes=1000):
    return network(num_classes)


def passing_on(**options):
    return named(**options)


def passing_on_another_name(**options):
    return another_name(**options)


def another_name(classes=100):
    return network(classes)


def failing(**options):
    raise TypeError("a failure of its own")


@pytest.mark.parametrize("model", [named, passing_on])
def test_a_function_gets_the_number_of_classes(model):
    space = create_space("elasticized", model=model, num_classes=7, image_size=8)
    assert space(space.example_input(2)).shape == (2, 7)


@pytest.mark.parametrize("model", [another_name, passing_on_another_name])
def test_more_outputs_than_asked_for_are_warned_of(model):
    sentence = (
        r"num_classes is 7, but the model returns a tensor of shape \(batch, 100\)\. .* in create_space.arguments, "
        r'such as {"classes": 7}'
    )
    with pytest.warns(UserWarning, match=sentence):
        create_space("elasticized", model=model, num_classes=7, image_size=8)
    space = create_space("elasticized", model=model, num_classes=7, image_size=8, arguments={"classes": 7})
    assert space(space.example_input(2)).shape == (2, 7)


def test_fewer_outputs_than_asked_for_are_refused():
    with pytest.raises(TangleNASError, match="num_classes is 101, but the model returns a tensor of shape"):
        create_space("elasticized", model=another_name, num_classes=101, image_size=8)


def test_weights_of_another_number_of_classes_keep_it():
    def pretrained(**options):
        if options.get("num_classes", 100) != 100:
            raise ValueError("The parameter 'num_classes' expected value 100")
        return network(100)

    with pytest.warns(UserWarning, match="num_classes is 7, but"):
        create_space("elasticized", model=pretrained, num_classes=7, image_size=8)


def test_a_model_has_its_own_number_of_classes_where_none_is_given():
    space = create_space("elasticized", model=another_name, image_size=8)
    assert space(space.example_input(2)).shape == (2, 100) and space.training


def test_what_fails_in_a_function_is_told():
    with pytest.raises(TypeError, match="a failure of its own"):
        create_space("elasticized", model=failing, num_classes=7, image_size=8)


def normed(outputs: int, trained: bool) -> nn.Module:
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, outputs, bias=False)
    )
    nn.init.normal_(net[4].weight, std=0.5)
    if trained:
        nn.init.normal_(net[4].weight, std=7.0)
        nn.init.uniform_(net[2].weight)
        nn.init.uniform_(net[2].bias)
    return net


def as_in_timm(num_classes=1000, pretrained=False):
    return normed(num_classes, pretrained)


def as_in_torchvision(*, weights=None, **options):
    if weights is not None and options.get("num_classes", 100) != 100:
        raise ValueError("The parameter 'num_classes' expected value 100")
    return normed(options.get("num_classes", 100), weights is not None)


def needing_a_file(num_classes, weights):
    return normed(num_classes, bool(weights.strip()))


def taking_an_old_name_too(num_classes, weights="", **old):
    if weights == "":
        weights = old.pop("pretrained", None) or None
    if old:
        raise TypeError(f"unexpected {old}")
    return normed(num_classes, weights is not None)


def with_a_head_more_if_untrained(num_classes, weights):
    net = normed(num_classes, weights is not None)
    if weights is None:
        net.auxiliary = nn.Linear(num_classes, num_classes)
    return net


def with_a_head_less_if_untrained(num_classes, weights):
    net = normed(num_classes, weights is not None)
    return net if weights is not None else net[:4]


def with_nothing_if_untrained(num_classes, weights):
    return normed(num_classes, True) if weights else None


def with_another_switch(num_classes, trained):
    return normed(num_classes, trained)


@pytest.mark.parametrize(
    "model, arguments, deviation",
    [
        (as_in_timm, {"pretrained": True}, 0.5),
        (as_in_torchvision, {"weights": "DEFAULT"}, 0.5),
        (taking_an_old_name_too, {"pretrained": True}, 0.5),
        (with_a_head_more_if_untrained, {"weights": "DEFAULT"}, 0.5),
        (needing_a_file, {"weights": "file"}, 0.102),  # torch's for 32 inputs
        (with_a_head_less_if_untrained, {"weights": "DEFAULT"}, 0.102),
        (with_another_switch, {"trained": True}, 0.102),
    ],
)
def test_networks_from_scratch_do_not_begin_as_trained_ones(model, arguments, deviation):
    space = create_space("elasticized", model=model, arguments=arguments, num_classes=100, image_size=8)
    network = space.standalone(space.largest())
    assert network.get_submodule("2").weight.eq(1).all()
    assert float(network.get_submodule("4").weight.detach().std()) == pytest.approx(deviation, rel=0.1)
    assert bool(space.scratch_warning) == (deviation != 0.5)
    assert float(space.get_submodule("4").weight.detach().std()) == pytest.approx(7, rel=0.1)


@pytest.mark.parametrize(
    "model, sentence",
    [
        (
            needing_a_file,
            "with {'weights': None} it raises AttributeError ('NoneType' object has no attribute 'strip')",
        ),
        (with_a_head_less_if_untrained, "with {'weights': None} it makes no model of these parameters"),
        (with_nothing_if_untrained, "with {'weights': None} it makes no model of these parameters"),
    ],
)
def test_a_call_for_untrained_weights_that_failed_is_told(model, sentence):
    space = create_space("elasticized", model=model, arguments={"weights": "file"}, num_classes=100, image_size=8)
    assert space.scratch_warning.endswith(f". The function was called again: {sentence}")


def test_weights_of_another_number_of_classes_are_left_out_too():
    with pytest.warns(UserWarning, match="num_classes is 7, but"):
        space = create_space(
            "elasticized", model=as_in_torchvision, arguments={"weights": "DEFAULT"}, num_classes=7, image_size=8
        )
    assert not space.scratch_warning
