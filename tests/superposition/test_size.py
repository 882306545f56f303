"""Sizes are arithmetic over choices, and axes say which entries of a dimension are in use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import DIMENSIONS, make_divisible

from tanglenas_engine import SearchSpace
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition import size as sizes
from tanglenas_engine.superposition.size import Axis, Size, combinations, stacked


class Chosen:
    """Options by choice, as an assignment has them, with `make_divisible` for the arithmetic."""

    def __init__(self, assignment):
        self.__dict__.update({row.choice: row.options[pick] for row, pick in assignment.items()})

    make_divisible = staticmethod(make_divisible)


def choices(**options):
    space = SearchSpace()
    for name, listed in options.items():
        space.choice(name, listed)
    return space


@pytest.mark.parametrize("name", DIMENSIONS)
def test_arithmetic_on_sizes_is_arithmetic_on_the_chosen_options(name):
    space = choices(E=(5, 2, 3), F=(4, 1), R=(2.25, 0.5), S=(1, 3, 2))
    symbols = Chosen({})
    symbols.__dict__.update(space.choices, make_divisible=sizes.make_divisible)
    size = Size.of(DIMENSIONS[name].of(symbols))
    assert {row.choice for row in size.rows} == set(DIMENSIONS[name].names)
    values = []
    for assignment in combinations(space.rows):
        number = DIMENSIONS[name].of(Chosen(assignment))
        assert size.number(assignment) == number
        assert size.value(assignment) == int(number)
        values.append(int(number))
    assert (size.max, size.min) == (max(values), min(values))


def test_fractions_are_cut_unless_rounded():
    space = choices(E=(3, 5), R=(1.5, 0.9))
    E, R = space.choices.values()
    product = E * R
    assert [product.value(a) for a in combinations(space.rows)] == [4, 2, 7, 4]
    assert [product.round().value(a) for a in combinations(space.rows)] == [4, 3, 8, 4]
    assert product.max == 7


def test_constants_on_either_side_and_differences():
    (E,) = choices(E=(3, 5)).choices.values()
    for size, expected in [(E + 1, (4, 6)), (1 + E, (4, 6)), (2 * E, (6, 10)), (E - 1, (2, 4)), (E // 2, (1, 2))]:
        assert size.values == expected
        assert size.rows == E.rows


@given(st.floats(1, 300), st.integers(1, 16), st.none() | st.integers(1, 4))
def test_make_divisible_gives_the_nearest_multiple_and_loses_at_most_a_tenth(number, divisor, multiple):
    least = multiple and multiple * divisor
    size = sizes.make_divisible(number, divisor, least).number({})
    assert size % divisor == 0
    assert size >= max(0.9 * number, least or divisor)
    assert size - number <= divisor or size == (least or divisor)
    if least is None:
        assert size == make_divisible(number, divisor)


@pytest.mark.parametrize(
    ("axis", "used"),
    [
        (lambda e: Axis(e), {5: "11111", 1: "10000", 3: "11100"}),
        (lambda e: Axis(e, "window"), {5: "11111", 1: "00100", 3: "01110"}),
        (lambda e: stacked(e, 3), {5: "11111" * 3, 1: "10000" * 3, 3: "11100" * 3}),
        (lambda e: Axis(e, "value"), {5: "001", 1: "100", 3: "010"}),
        (lambda e: Axis(e - 1, "value"), {5: "001", 1: "100", 3: "010"}),
    ],
    ids=["prefix", "window", "stacked", "value", "value with 0"],
)
def test_an_axis_says_which_entries_are_used(axis, used):
    space = choices(E=(5, 1, 3))
    (E,) = space.choices.values()
    axis = axis(E)
    assert axis.length == len(used[5])
    for assignment in combinations(space.rows):
        e = E.value(assignment)
        assert "".join(str(int(u)) for u in axis.used(assignment)) == used[e]
        if axis.layout != "value":
            assert axis.entries(assignment) == used[e].count("1")


def test_a_choice_per_layer_has_a_row_for_each_layer_that_counts_up_to_the_depth():
    space = SearchSpace()
    depth = space.choice("depth", (2, 4, 1))
    heads = space.choice("heads", (3, 5), per=depth)
    assert (depth.shape, heads.shape, len(heads)) == ((3,), (4, 2), 4)
    assert [repr(row) for row in space.rows] == ["depth", "heads[0]", "heads[1]", "heads[2]", "heads[3]"]
    for option, d in enumerate(depth.options):
        active = [row.active({depth.rows[0]: option}) for row in heads.rows]
        assert active == [layer < d for layer in range(4)]
    assert [size.rows for size in heads] == [(row,) for row in heads.rows]
    assert heads[2].value({heads.rows[2]: 1}) == 5


def test_a_choice_made_a_number_of_times_always_counts():
    heads = SearchSpace().choice("heads", (3, 5), per=2)
    assert heads.shape == (2, 2)
    assert all(row.active({}) for row in heads.rows)


@pytest.mark.parametrize("use", [lambda h: h * 2, lambda h: 1 + h, lambda h: sizes.make_divisible(h)])
def test_arithmetic_with_a_choice_per_layer_wants_an_index(use):
    heads = SearchSpace().choice("heads", (3, 5), per=2)
    with pytest.raises(TangleNASError, match=r"'heads' is made per layer: index it, as in heads\[0\]"):
        use(heads)


def test_sizes_and_choices_show_what_they_are():
    space = SearchSpace()
    width = space.choice("width", (8, 4))
    ratio = space.choice("ratio", (1, 2), per=3)
    assert repr(width) == "Choice('width', (8, 4))"
    assert repr(ratio) == "Choice('ratio', (1, 2), layers=3)"
    assert repr(width * ratio[1]) == "Size(width, ratio[1]: [4, 8, 16])"
    assert repr(Size.of(3)) == "3"
