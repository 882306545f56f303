"""Architectures as values and as files."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spaces import SPACES, make

from tanglenas_engine import Architecture
from tanglenas_engine.errors import TangleNASError

GOOD = {"width": 8, "layers": 2, "heads": [3, 1], "ratio": [0.5, 1.5], "multiple": 2}


@pytest.fixture(scope="module")
def space():
    return make("language")


@pytest.mark.parametrize("name", SPACES)
def test_files_are_read_as_they_were_written(name):
    space = make(name)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        architecture = space.sample(generator)
        again = Architecture.from_json(architecture.to_json())
        assert again == architecture
        assert hash(again) == hash(architecture)
        assert again.to_json() == architecture.to_json()
        assert space.architecture_of(space.assignment_of(again)) == architecture


def test_a_file_has_one_line_per_choice(space):
    text = space.architecture(**GOOD).to_json()
    assert '\n    "heads": [3, 1],\n    "ratio": [0.5, 1.5],\n' in text
    assert text.endswith("}\n")
    assert json.loads(text)["choices"] == GOOD


def test_layers_beyond_the_depth_do_not_count(space):
    one = space.architecture(**{**GOOD, "layers": 1})
    assert one.choices["heads"] == (3,)
    assert one == space.architecture(**{**GOOD, "layers": 1, "heads": [3, 2], "ratio": [0.5]})
    assert one.digest == space.architecture(**{**GOOD, "layers": 1, "heads": (3,)}).digest
    assert one.digest != space.architecture(**GOOD).digest


def test_the_digest_is_of_the_space_and_the_choices_whatever_their_order_or_type(space):
    architecture = space.architecture(**GOOD)
    turned = space.architecture(**dict(reversed(GOOD.items())))
    assert turned.digest == architecture.digest
    assert Architecture("language", dict(reversed(architecture.choices.items()))) == architecture
    assert Architecture("language", dict(reversed(architecture.choices.items()))).digest == architecture.digest
    assert space.architecture(**{**GOOD, "width": 8.0}).digest == architecture.digest
    assert Architecture("elsewhere", architecture.choices).digest != architecture.digest
    assert len({space.sample(torch.Generator().manual_seed(i)).digest for i in range(40)}) > 30


def test_an_architecture_is_a_value(space):
    architecture = space.architecture(**GOOD)
    with pytest.raises(TypeError):
        architecture.choices["width"] = 4
    assert copy.deepcopy(architecture) == architecture
    assert pickle.loads(pickle.dumps(architecture)) == architecture
    assert len({architecture, copy.copy(architecture), space.smallest()}) == 2
    assert str(architecture) == "width=8 layers=2 heads=3,1 ratio=0.5,1.5 multiple=2"


def edited(space, changes):
    content = json.loads(space.architecture(**GOOD).to_json())
    return json.dumps({key: value for key, value in {**content, **changes}.items() if value != "gone"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": {**GOOD, "width": 4}}, "Remove the line 'digest' if the choices were changed on purpose"),
        ({"digest": "0" * 16}, "its digest is '0000000000000000', but its choices give"),
        ({"format": 2}, "architecture file of format 2, but this version reads format 1: run discretize again"),
        ({"format": "gone"}, "architecture file of format None"),
        ({"choices": "gone"}, "not an architecture file: expected an object with 'format', 'space' and 'choices'"),
        ({"choices": [1]}, "not an architecture file: expected an object"),
        ({"space": "gone", "digest": "gone"}, "not an architecture file: expected an object"),
        ({"space": 3, "digest": "gone"}, "not an architecture file: expected an object"),
        ({"choices": {"width": None}}, "choice 'width' is None, expected options"),
        ({"choices": {"width": [[8]]}}, r"choice 'width' is \[\[8\]\], expected options"),
        ({"choices": {"width": True}}, "choice 'width' is True, expected options"),
        ({"choices": {"width": float("inf")}}, "Infinity is no number in JSON"),
    ],
)
def test_a_file_that_does_not_fit_says_why(space, changes, message):
    with pytest.raises(TangleNASError, match=message):
        Architecture.from_json(edited(space, changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "[" * 10**5, '{"a": ' + "1" * 5000 + "}"])
def test_what_is_no_architecture_file_is_refused(text):
    with pytest.raises(TangleNASError, match="not an architecture file"):
        Architecture.from_json(text)


def test_a_file_edited_on_purpose_is_read_without_its_digest(space):
    text = edited(space, {"choices": {**GOOD, "width": 4}, "digest": "gone"})
    assert space.assignment_of(Architecture.from_json(text))
    assert Architecture.from_json(text).choices["width"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 6}, "choice width of 'language' is 6, expected one of 4, 8, 5"),
        ({"heads": [3, 4]}, r"choice heads\[1\] of 'language' is 4, expected one of 3, 1, 2"),
        ({"heads": [3]}, r"choice 'heads' of 'language' is \[3\], expected a list of 2 options"),
        ({"heads": [3, 1, 1]}, "choice 'heads' has 2 layers, but 3 were given"),
        ({"heads": 3}, "choice 'heads' of 'language' is 3, expected a list of 2 options"),
        ({"width": [8]}, r"choice 'width' of 'language' is \[8\], expected one option"),
        ({"width": "8"}, "choice width of 'language' is '8', expected one of 4, 8, 5"),
        ({"width": None}, "choice width of 'language' is None, expected one of 4, 8, 5"),
        ({"widht": 8}, "unknown choice of 'language' 'widht'. Did you mean 'width'?"),
    ],
)
def test_choices_that_a_space_lacks_are_refused(space, changes, message):
    with pytest.raises(TangleNASError, match=message):
        space.architecture(**{**GOOD, **changes})


def test_a_choice_that_is_missing_is_named(space):
    with pytest.raises(TangleNASError, match="an architecture of 'language' also needs: width, heads"):
        space.architecture(**{k: v for k, v in GOOD.items() if k not in ("width", "heads")})


@pytest.mark.parametrize("use", ["cost", "select", "one_hot", "extract", "inherited", "standalone"])
def test_an_architecture_of_another_space_is_refused(space, use):
    other = Architecture("languages", space.smallest().choices)
    with pytest.raises(
        TangleNASError, match=r"of the space 'languages', not of 'language': .* Did you mean 'language'"
    ):
        getattr(space, use)(other)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3))
options = st.integers() | st.floats() | st.text()


def check(text, space):
    """Whatever the text is: an architecture that can be written and read again, or an error for people."""
    try:
        architecture = Architecture.from_json(text)
    except TangleNASError as error:
        assert str(error)
        return
    again = Architecture.from_json(architecture.to_json())
    assert again == architecture
    assert again.digest == architecture.digest
    try:
        space.assignment_of(architecture)
    except TangleNASError as error:
        assert str(error)


fuzzed = settings(max_examples=2 * settings().max_examples)


@fuzzed
@given(text=st.text() | values.map(json.dumps))
def test_any_text_is_read_or_refused(text, space):
    check(text, space)


@fuzzed
@given(
    content=st.fixed_dictionaries(
        {
            "format": st.just(1) | leaves,
            "space": st.just("language") | st.text() | leaves,
            "choices": st.dictionaries(
                st.sampled_from(sorted(GOOD)) | st.text(), options | st.lists(options, max_size=3) | values
            )
            | values,
        },
        optional={"digest": leaves},
    )
)
def test_anything_shaped_like_a_file_is_read_or_refused(content, space):
    check(json.dumps(content), space)


@fuzzed
@example(name="width", value=float("nan"))
@example(name="heads", value=[1e999, 3])
@given(name=st.sampled_from(sorted(GOOD)), value=values)
def test_any_value_of_a_choice_is_taken_or_refused(name, value, space):
    check(json.dumps({"format": 1, "space": "language", "choices": {**GOOD, name: value}}), space)
