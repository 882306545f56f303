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
