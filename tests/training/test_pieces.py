"""The loss of a batch in pieces is a mean over all of its targets."""

from functools import partial, wraps

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tanglenas_engine.data import IGNORED, SampleSubset, TensorSamples, TokenSamples
from tanglenas_engine.training.losses import (
    auxiliary,
    averages_targets,
    batch_accuracy,
    cross_entropy,
    is_cross_entropy,
)
from tanglenas_engine.training.pieces import PieceLoss, may_ignore

TOKENS = TokenSamples(torch.zeros(4, 3, dtype=torch.long), torch.arange(4))


class Own:
    """Samples of somebody's plugin, whose targets are made with each batch."""

    labels = None


class Masked(TokenSamples):
    """Windows of a text, of which some tokens are no targets."""


def labelled(*labels):
    return TensorSamples(torch.zeros(len(labels), 1), torch.tensor(labels))


@pytest.mark.parametrize(
    "samples, expected",
    [
        (labelled(0, 1), False),
        (labelled(0, IGNORED), True),
        (SampleSubset(labelled(0, IGNORED), torch.tensor([0])), False),
        (TOKENS, False),
        (Masked(torch.zeros(4, 3, dtype=torch.long), torch.arange(4)), True),
        (Own(), True),
    ],
)
def test_targets_are_counted_only_where_some_may_be_ignored(samples, expected):
    assert may_ignore(samples) is expected


def test_the_mean_over_pieces_is_the_mean_over_targets():
    outputs = torch.randn(8, 4, requires_grad=True)
    whole = torch.tensor([0, 1, 2, IGNORED, IGNORED, IGNORED, 3, IGNORED])
    pieces, none = whole.chunk(4), torch.full((8,), IGNORED).chunk(4)
    loss = PieceLoss(F.cross_entropy, [pieces, none], averages=True)
    parts = outputs.chunk(4)
    mean = torch.stack([loss(*pair) for pair in zip(parts, pieces, strict=True)]).mean()
    torch.testing.assert_close(mean, F.cross_entropy(outputs, whole))
    torch.testing.assert_close(
        torch.autograd.grad(mean, outputs), torch.autograd.grad(F.cross_entropy(outputs, whole), outputs)
    )
    accuracies = torch.stack([loss.accuracy(*pair) for pair in zip(parts, pieces, strict=True)])
    torch.testing.assert_close(accuracies.mean(), batch_accuracy(outputs, whole))
    values = torch.randn(8, requires_grad=True)
    means = [loss.mean(*pair) for pair in zip(values.chunk(4), pieces, strict=True)]
    torch.testing.assert_close(torch.stack(means).mean(), values[whole != IGNORED].mean())
    for function, given in ((loss, outputs), (loss.mean, values)):
        empty = torch.stack([function(*pair) for pair in zip(given.chunk(4), none, strict=True)])
        assert not empty.any() and not torch.autograd.grad(empty.sum(), given)[0].any()


@pytest.mark.parametrize("ignoring", [False, True])
def test_a_batch_without_ignored_targets_keeps_its_loss_to_the_bit(ignoring):
    outputs, targets = torch.randn(6, 3, 5), torch.randint(5, (6, 3))
    pieces = targets.chunk(3)
    loss = PieceLoss(cross_entropy, [pieces], averages=True, ignoring=ignoring)
    for given, wanted in zip(outputs.chunk(3), pieces, strict=True):
        assert loss(given, wanted).equal(F.cross_entropy(given.flatten(0, 1), wanted.flatten()))
        assert loss.accuracy(given, wanted).equal(batch_accuracy(given, wanted))
        assert loss.mean(given[..., 0], wanted).equal(given[..., 0].mean())


def test_no_number_is_read_on_the_host():
    pieces = torch.zeros(4, dtype=torch.long, device="meta").chunk(2)  # tensors without values: reading one fails
    loss = PieceLoss(F.cross_entropy, [pieces], averages=True)
    assert loss(torch.zeros(2, 3, device="meta"), pieces[0]).is_meta
    assert loss.accuracy(torch.zeros(2, 3, device="meta"), pieces[1]).is_meta
    assert loss.mean(torch.zeros(2, device="meta"), pieces[1]).is_meta
    assert loss.weigh({"loss": torch.zeros((), device="meta")})["loss"][1].is_meta


def focal(outputs, targets):
    """The focal loss of Lin et al. (2017), a mean over all positions."""
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def entropy(outputs, targets):
    """A loss of what has no target: the entropy of the outputs."""
    logs = outputs[targets == IGNORED].log_softmax(-1)
    return -(logs.exp() * logs).sum() / len(targets)


class Focal(nn.CrossEntropyLoss):
    forward = staticmethod(focal)


def hiding(function):
    """A wrapper like gin's, which may bind options that nobody sees."""
    return wraps(function)(lambda *given: function(*given))


@pytest.mark.parametrize("loss", [focal, entropy])
def test_a_loss_of_ones_own_is_averaged_over_pieces_as_it_is(loss):
    outputs, whole = torch.randn(8, 4), torch.tensor([0, 1, 2, IGNORED, IGNORED, IGNORED, 3, IGNORED])
    pieces = whole.chunk(4)
    cut = PieceLoss(loss, [pieces], averages=averages_targets(loss))
    mean = torch.stack([cut(*pair) for pair in zip(outputs.chunk(4), pieces, strict=True)]).mean()
    assert loss(outputs, whole) > 0.1
    torch.testing.assert_close(mean, loss(outputs, whole))
    one, other = torch.tensor(1.0), torch.tensor(2.0)
    weighed = cut.weigh({"loss": one, "accuracy": other})
    assert weighed["loss"] is one and weighed["accuracy"] == (other, 0.5)


@pytest.mark.parametrize("loss, plain, averages", [
    (cross_entropy, True, True),
    (hiding(cross_entropy), True, True),
    (partial(hiding(cross_entropy), label_smoothing=0.1), True, True),
    (F.cross_entropy, True, True),
    (partial(F.cross_entropy, label_smoothing=0.1, reduction="mean"), True, True),
    (nn.CrossEntropyLoss(label_smoothing=0.1), True, True),
    (auxiliary, False, True),
    (partial(auxiliary, weight=0.2, loss=partial(cross_entropy, label_smoothing=0.1)), False, True),
    (partial(auxiliary, loss=focal), False, False),
    (hiding(auxiliary), False, False),
    (hiding(F.cross_entropy), False, False),
    (partial(F.cross_entropy, weight=torch.ones(4)), False, False),
    (partial(F.cross_entropy, ignore_index=0), False, False),
    (partial(F.cross_entropy, size_average=False), False, False),
    (nn.CrossEntropyLoss(torch.ones(4)), False, False),
    (nn.CrossEntropyLoss(ignore_index=0), False, False),
    (Focal(), False, False),
    (focal, False, False),
])  # fmt: skip
def test_a_mean_over_targets_is_known(loss, plain, averages):
    assert is_cross_entropy(loss) is plain and averages_targets(loss) is averages
