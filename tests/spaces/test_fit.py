"""Do data and space fit: tokens and labels are checked in all samples."""

import pytest
import torch
from spaces import Language

from tanglenas_engine.data import TokenSamples
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
