"""A search says what one network's loss is on each split, and measures inherited weights as discretize does."""

import copy
from functools import partial

import pytest
import torch
from ranked import masked
from spaces import vit
from tiny import tiny

from tanglenas_engine import create_dataset, create_optimizer, create_space, make_splits, open_splits, search
from tanglenas_engine.data import DataView, TensorSamples
from tanglenas_engine.data.splits import PLAIN_SAMPLES, _evenly
from tanglenas_engine.errors import DivergedError, TangleNASError
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.progress import SilentProgress
from tanglenas_engine.stages.discretize import discretize
from tanglenas_engine.stages.retrain import retrain
from tanglenas_engine.stages.split_losses import largest_loss, split_losses
from tanglenas_engine.testing import random_data
from tanglenas_engine.testing.optimizers import same
from tanglenas_engine.training.losses import batch_accuracy
from tanglenas_engine.training.measure import estimate_loss, measure, measure_inherited, statistics_inputs

SPLITS = ("weights", "architecture", "validation")


class Notes(SilentProgress):
    """Keeps what a person is told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def learnable(count, seed, shift=0):
    """Images whose class is the position of a bright row; `shift` gives them other labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = 0.1 * torch.randn(count, 3, 8, 8, generator=generator)
    images[torch.arange(count), :, 2 * labels] += 2
    return TensorSamples(images, (labels + shift) % 3)


def searched(data, notes, rate=2e-2):
    space = create_space("nb201", channels=4, cells=1, image_size=8, num_classes=3)
    adam = partial(torch.optim.Adam, lr=rate)
    return search(
        space, create_optimizer("drnas"), data, epochs=3, batch_size=32, weight_optimizer=adam, progress=notes
    )


def broken(samples, sample=7):
    samples._rows[sample, 0, 3, 3] = float("nan")
    return samples


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS[1:])
def test_a_split_loss_that_is_not_finite_says_why(split):
    data = {name: learnable(64, seed) for seed, name in enumerate(SPLITS)}
    broken(data[split])
    space, notes = create_space("nb201", channels=4, cells=1, image_size=8, num_classes=3), Notes()
    search(space, create_optimizer("spos"), DataView(data), epochs=1, batch_size=32, progress=notes)
    (warning,) = [note for note in notes.notes if "warning" in note and "guessing" not in note]  # it is one short epoch
    assert f"the loss on the {split} split is nan" in warning
    assert "1 of 12,288 numbers in a batch of it are not finite. Correct the dataset's transform" in warning


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("split", SPLITS[:2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_an_input_that_is_not_finite_is_no_divergence(split, num_workers):
    data = {name: learnable(64, seed) for seed, name in enumerate(SPLITS)}
    broken(data[split])
    space = create_space("nb201", channels=4, cells=1, image_size=8, num_classes=3)
    message = r"search: 1 of 6,144 numbers in a batch of step [12] of 2 are not finite, and so \w+_loss is not: correct"
    with pytest.raises(TangleNASError, match=message) as caught:
        search(space, create_optimizer("drnas"), DataView(data), epochs=1, batch_size=32, num_workers=num_workers)
    assert not isinstance(caught.value, DivergedError)  # a race would go on


def test_a_retraining_names_inputs_that_are_not_finite():
    space = vit()
    data = random_data(space, ("training", "validation"), samples=40)
    broken(data.training)
    with pytest.raises(TangleNASError, match=r"retrain: 1 of .* numbers in a batch of step \d+ of 10 are not finite"):
        retrain(space, space.smallest(), data, epochs=2, batch_size=8)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_warns_where_the_architecture_split_is_of_other_data():
    weights, validation, notes = learnable(192, 0), learnable(192, 2), Notes()
    alike = searched(DataView({"weights": weights, "architecture": learnable(192, 1), "validation": validation}), notes)
    assert set(alike.split_losses) == set(SPLITS) and not [note for note in notes.notes if "warning" in note]
    assert any("loss of one network on the splits: weights " in note for note in notes.notes)
    other = DataView({"weights": weights, "architecture": learnable(192, 1, shift=1), "validation": validation})
    differ = searched(other, notes)
    (warning,) = [note for note in notes.notes if "warning" in note]
    assert "they differ by more than chance allows" in warning and "make the splits anew" in warning
    assert differ.split_losses["architecture"] > 1.5 * differ.split_losses["validation"]


@pytest.mark.parametrize("name", ["nb201", "mobilenetv3_nano", "toy_cell"])
def test_validation_in_a_search_is_what_discretize_measures(name):
    space = tiny(name)
    data = random_data(space, SPLITS, samples=24)
    result = search(space, create_optimizer("drnas"), data, epochs=2, batch_size=8)
    derived = discretize(space, data, result.mixture, method="argmax", batch_size=12)
    assert derived.architecture == result.architecture
    assert result.history[-1]["validation_accuracy"] == derived.validation_accuracy
    assert result.history[-1]["validation_loss"] == pytest.approx(derived.validation_loss, rel=1e-5)


@pytest.mark.parametrize("name", ["nb201", "mobilenetv3_nano"])
def test_a_measurement_recalibrates_and_leaves_the_supernet_as_it_was(name):
    space = tiny(name).train()
    data = random_data(space, SPLITS, samples=32)
    inputs = statistics_inputs(space, data.weights, 4, 0, torch.device("cpu"))
    before = {key: value.clone() for key, value in space.state_dict().items()}
    architecture = space.sample(torch.Generator().manual_seed(0))
    found = measure_inherited(space, architecture, data.validation, inputs)
    same(dict(space.state_dict()), before, "the supernet")
    assert space.training
    stale = measure(space.select(architecture), data.validation)
    assert found.loss != stale.loss  # the statistics of a new supernet are those of no data
    assert measure_inherited(space, architecture, data.validation, []) == stale


def test_a_space_without_batch_norms_needs_no_statistics():
    space = vit()
    data = random_data(space, SPLITS, samples=8)
    assert statistics_inputs(space, data.weights, 4, 0, torch.device("cpu")) == []


def test_an_estimate_is_the_mean_loss_and_its_standard_error():
    space = vit()
    data = random_data(space, SPLITS, samples=40)
    estimate, found = estimate_loss(space, data.validation, batch_size=16), measure(space, data.validation)
    assert estimate.mean == pytest.approx(found.loss, rel=1e-5)
    assert 0 < estimate.error < 1
    counts = torch.bincount(data.validation.batch(torch.arange(40))[1])
    assert estimate.guessing == pytest.approx(torch.distributions.Categorical(counts / 40).entropy().item(), rel=1e-5)


def test_an_estimate_counts_targets_where_samples_have_unequally_many():
    space = tiny("gpt_nano")
    tokens, targets = random_data(space, SPLITS, samples=40).validation.batch(torch.arange(40))
    targets[::2, 1:] = targets[1, :] = -100
    samples = TensorSamples(tokens, targets)
    estimate, found = estimate_loss(space, samples, batch_size=16), measure(space, samples)
    assert estimate.mean == pytest.approx(found.loss, rel=1e-5)
    # The jackknife's standard error of a ratio, from the losses without one sample each.
    every = torch.arange(40)
    without = torch.tensor([measure(space, TensorSamples(tokens[kept], targets[kept])).loss
                            for kept in (every[every != one] for one in every)])  # fmt: skip
    assert estimate.error == pytest.approx(((without - found.loss).square().sum() * 39 / 40).sqrt().item(), rel=0.1)


@pytest.mark.parametrize("measured", [estimate_loss, partial(measure, batch_size=10)])
def test_ignored_targets_do_not_count(measured):
    space = vit()
    images, labels = random_data(space, SPLITS, samples=40).validation.batch(torch.arange(40))
    with torch.no_grad():
        labels[:15] = space.eval()(images[:15]).argmax(-1)  # an accuracy above chance
    whole = measured(space, TensorSamples(images[:30], labels[:30]))
    labels[30:] = -100
    assert measured(space, TensorSamples(images, labels)) == pytest.approx(whole, rel=1e-5)


def test_ignored_targets_do_not_count_in_the_accuracy_of_a_batch():
    outputs, targets = torch.eye(4), torch.tensor([0, 1, 0, -100])
    assert batch_accuracy(outputs, targets).item() == pytest.approx(200 / 3)
    assert batch_accuracy(outputs[3:], targets[3:]).item() == 0


def test_samples_without_any_target_are_refused():
    images, labels = random_data(vit(), SPLITS, samples=8).validation.batch(torch.arange(8))
    with pytest.raises(TangleNASError, match=r"none of the 8 samples .* has a target: all are -100"):
        measure(vit(), TensorSamples(images, torch.full_like(labels, -100)))


@pytest.mark.slow
def test_a_mixture_that_learned_and_other_losses_are_no_alarm():
    data, notes = DataView({name: learnable(96, seed) for seed, name in enumerate(SPLITS)}), Notes()
    space = create_space("nb201", channels=4, cells=1, image_size=8, num_classes=3)
    split_losses(space, space.largest(), data, [], notes.note, trained=0.1)
    assert not [note for note in notes.notes if "guessing" in note]
    split_losses(space, space.largest(), data, [], notes.note, trained=1.1)
    assert [note for note in notes.notes if "guessing" in note]
    weighted = partial(torch.nn.functional.cross_entropy, weight=torch.tensor([1.0, 9.0, 9.0]))
    search(space, create_optimizer("spos"), data, epochs=1, batch_size=32, loss=weighted, progress=(quiet := Notes()))
    assert not [note for note in quiet.notes if "guessing" in note]


@pytest.mark.slow
@pytest.mark.parametrize("rate, learned", [(2e-2, True), (1e-7, False)])
def test_a_search_warns_where_the_supernet_guesses(rate, learned):
    data, notes = DataView({name: learnable(192, seed) for seed, name in enumerate(SPLITS)}), Notes()
    searched(data, notes, rate)
    warnings = [note for note in notes.notes if "warning" in note]
    assert len(warnings) == (not learned)
    assert learned or "guessing by the frequencies of targets has 1.086" in warnings[0]


@pytest.mark.parametrize("loss", [torch.nn.functional.cross_entropy, torch.nn.CrossEntropyLoss()])
def test_batches_without_targets_do_not_hide_that_a_supernet_guesses(loss):
    data, notes = DataView({name: masked(learnable(96, 0)) for name in SPLITS}), Notes()
    space = vit(image_size=8, in_channels=3)
    still = partial(torch.optim.SGD, lr=0.0)
    result = search(space, create_optimizer("spos"), data, epochs=1, batch_size=2, weight_optimizer=still, loss=loss,
                    progress=notes)  # fmt: skip
    assert result.history[0]["weight_loss"] > 0.95 * result.split_losses["weights"]
    assert [note for note in notes.notes if "guessing" in note]


@pytest.fixture(scope="module")
def trained():
    """A space whose weights have learned, and the data."""
    torch.manual_seed(0)
    data = DataView({name: learnable(192, seed) for seed, name in enumerate(SPLITS)})
    space, notes = vit(image_size=8, in_channels=3), Notes()
    assert not spoilt_by_a_search(space, data, 1e-2, 16, notes)  # fresh weights know nothing that could be lost
    return space, data


def spoilt_by_a_search(space, data, rate, epochs, notes, checkpoints=None):
    search(
        space, create_optimizer("sandwich"), data, epochs=epochs, batch_size=32, checkpoints=checkpoints,
        weight_optimizer=partial(torch.optim.Adam, lr=rate), progress=notes,
    )  # fmt: skip
    return [note for note in notes.notes if "spoilt the weights" in note]


@pytest.mark.parametrize("rate, spoilt", [(1e-3, False), (0.1, True)])
def test_a_search_warns_where_it_spoils_the_weights_that_it_started_from(trained, rate, spoilt, tmp_path):
    start, data = trained
    before = measure_inherited(start, start.largest(), data.validation, []).loss
    assert before < 0.1
    for _ in range(2):  # the second search goes on after the last step of the first
        with CheckpointFolder(tmp_path, "x") as checkpoints:
            found = spoilt_by_a_search(copy.deepcopy(start), data, rate, 2, Notes(), checkpoints)
        assert len(found) == spoilt
        assert not spoilt or f"the largest network had a loss of {before:.3f} on validation. Now it has" in found[0]


def test_a_search_may_leave_the_largest_network_behind(trained):
    start, data = trained
    space, before = copy.deepcopy(start), largest_loss(start, data, [])
    shallow = space.architecture(depth=2, embed_dim=12, num_heads=(3, 3), mlp_ratio=(2, 2))
    torch.nn.init.normal_(space.blocks[2].mlp.fc2.weight, std=100)  # the third block is the largest's alone
    for network, spoilt in ((shallow, False), (space.largest(), True)):
        split_losses(space, network, data, [], (notes := Notes()).note, before=before)
        assert any("spoilt the weights" in note for note in notes.notes) == spoilt


def test_a_view_has_some_samples_without_augmentation():
    digits = create_dataset("digits", shift=2)
    view = open_splits(digits, make_splits(digits, seed=0), SPLITS)
    for name in SPLITS:
        plain = view.plain(name)
        assert len(plain) == min(len(getattr(view, name)), PLAIN_SAMPLES)
        first, second = (plain.batch(torch.arange(4))[0] for _ in range(2))
        assert first.equal(second)
    moved = [view.weights.batch(torch.arange(4))[0] for _ in range(2)]
    assert not moved[0].equal(moved[1])


@pytest.mark.parametrize("samples", [1000, 2**24 + 4])
def test_plain_samples_are_even_places_from_the_first_to_the_last(samples):
    chosen = _evenly(torch.arange(samples, dtype=torch.int32), 256)
    steps = chosen.diff()
    assert (chosen[0], chosen[-1], len(chosen)) == (0, samples - 1, 256) and int(steps.max() - steps.min()) <= 1
