"""Do data and space fit: types are compared, and tokens and labels are checked in all samples."""

import pytest
import torch
from spaces import Language, vit

from tanglenas_engine.data import TensorSamples, TokenSamples
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.fit import check_fit


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("place", [0, 5, 999])
def test_a_token_that_the_space_lacks_is_found_wherever_it_is(place, shift):
    space = Language(vocab_size=7, block_size=5)
    rows = torch.arange(1000 * 6).reshape(1000, 6) % 7
    check_fit(space, TokenSamples(rows.clone(), torch.arange(1000), shift))
    rows[place, 0] = 9
    with pytest.raises(TangleNASError, match=r"have a token 9, .* has 7 outputs.*vocab_size, which is at least 10"):
        check_fit(space, TokenSamples(rows, torch.arange(1000), shift))


def test_all_splits_that_are_given_are_looked_at():
    space, rows = Language(vocab_size=7, block_size=5), torch.zeros(3, 6, dtype=torch.uint16)
    other = torch.full((3, 6), 9, dtype=torch.uint16)
    good, bad = (TokenSamples(tokens, torch.arange(3)) for tokens in (rows, other))
    check_fit(space, good, good)
    with pytest.raises(TangleNASError, match="have a token 9"):
        check_fit(space, good, bad)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float64, torch.bfloat16])
def test_inputs_of_another_type_are_named_with_the_type_that_fits(kind):
    space = vit()
    inputs = space.example_input(6)
    labels = torch.zeros(6, dtype=torch.int64)
    check_fit(space, TensorSamples(inputs, labels))
    with pytest.raises(TangleNASError, match=rf"the data are {kind}, .* takes torch.float32: .* convert and normalise"):
        check_fit(space, TensorSamples(inputs.to(kind), labels))
    if kind.is_floating_point:  # a space of another precision takes what its parameters are
        check_fit(space.to(kind), TensorSamples(inputs.to(kind), labels))


def test_targets_that_are_no_classes_or_tokens_are_refused():
    space = vit()
    samples = TensorSamples(space.example_input(6), torch.rand(6))
    with pytest.raises(TangleNASError, match=r"targets of the data are torch.float32, expected torch.int64"):
        check_fit(space, samples)


@pytest.mark.parametrize("shape", [(6, 1), (6, 8, 8)], ids=str)
def test_targets_of_another_shape_than_the_outputs_are_refused(shape):
    """Compared with predictions, (B, 1) would become (B, B): the accuracy would be wrong."""
    space = vit()
    samples = TensorSamples(space.example_input(6), torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(TangleNASError, match=r"targets of a sample are of shape \(.*\), .* outputs for \(\): expected"):
        check_fit(space, samples)


def test_tokens_have_32_or_64_bits():
    space, rows = Language(vocab_size=7, block_size=5), torch.zeros(3, 6, dtype=torch.int64)

    def tokens(kind):
        samples = TokenSamples(rows, torch.arange(3))
        samples.batch = lambda indices: (rows[indices, :5].to(kind), rows[indices, 1:])
        return samples

    check_fit(space, tokens(torch.int64))
    check_fit(space, tokens(torch.int32))
    for kind in (torch.uint8, torch.float32):
        with pytest.raises(TangleNASError, match=rf"the data are {kind}, .* torch.int64: .*transform convert them"):
            check_fit(space, tokens(kind))
