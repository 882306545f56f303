"""The loss of a batch in pieces is a mean over all of its targets."""

import pytest
import torch
import torch.nn.functional as F

from tanglenas_engine.data import SampleSubset, TensorSamples, TokenSamples
from tanglenas_engine.training.losses import IGNORED, batch_accuracy
from tanglenas_engine.training.pieces import PieceLoss, may_ignore

TOKENS = TokenSamples(torch.zeros(4, 3, dtype=torch.long), torch.arange(4))


class Own:
    """Samples of somebody's plugin, whose targets are made with each batch."""

    labels = None


def labelled(*labels):
    return TensorSamples(torch.zeros(len(labels), 1), torch.tensor(labels))


@pytest.mark.parametrize(
    "samples, expected",
    [
        (labelled(0, 1), False),
        (labelled(0, IGNORED), True),
        (SampleSubset(labelled(0, IGNORED), torch.tensor([0])), False),
        (TOKENS, False),
        (Own(), True),
    ],
)
def test_targets_are_counted_only_where_some_may_be_ignored(samples, expected):
    assert may_ignore(samples) is expected


def test_the_mean_over_pieces_is_the_mean_over_targets():
    outputs = torch.randn(8, 4, requires_grad=True)
    whole = torch.tensor([0, 1, 2, IGNORED, IGNORED, IGNORED, 3, IGNORED])
    pieces, none = whole.chunk(4), torch.full((8,), IGNORED).chunk(4)
    loss = PieceLoss(F.cross_entropy, [pieces, none])
    parts = outputs.chunk(4)
    mean = torch.stack([loss(*pair) for pair in zip(parts, pieces, strict=True)]).mean()
    torch.testing.assert_close(mean, F.cross_entropy(outputs, whole))
    torch.testing.assert_close(
        torch.autograd.grad(mean, outputs), torch.autograd.grad(F.cross_entropy(outputs, whole), outputs)
    )
    accuracies = torch.stack([loss.accuracy(*pair) for pair in zip(parts, pieces, strict=True)])
    torch.testing.assert_close(accuracies.mean(), batch_accuracy(outputs, whole))
    empty = torch.stack([loss(*pair) for pair in zip(outputs.chunk(4), none, strict=True)])
    assert not empty.any() and not torch.autograd.grad(empty.sum(), outputs)[0].any()


@pytest.mark.parametrize("ignoring", [False, True])
def test_a_batch_without_ignored_targets_keeps_its_loss_to_the_bit(ignoring):
    outputs, targets = torch.randn(6, 3, 5), torch.randint(5, (6, 3))
    pieces = targets.chunk(3)
    loss = PieceLoss(lambda given, wanted: F.cross_entropy(given.flatten(0, 1), wanted.flatten()), [pieces], ignoring)
    for given, wanted in zip(outputs.chunk(3), pieces, strict=True):
        assert loss(given, wanted).equal(F.cross_entropy(given.flatten(0, 1), wanted.flatten()))
        assert loss.accuracy(given, wanted).equal(batch_accuracy(given, wanted))


def test_no_number_is_read_on_the_host():
    pieces = torch.zeros(4, dtype=torch.long, device="meta").chunk(2)  # tensors without values: reading one fails
    loss = PieceLoss(F.cross_entropy, [pieces])
    assert loss(torch.zeros(2, 3, device="meta"), pieces[0]).is_meta
    assert loss.accuracy(torch.zeros(2, 3, device="meta"), pieces[1]).is_meta
