"""A search says that its supernet went past its best."""

import math
import random
from functools import partial

import pytest
import torch
from spaces import vit

from tanglenas_engine import create_optimizer, search
from tanglenas_engine.runtime.progress import SilentProgress
from tanglenas_engine.stages.overfitting import overfitted
from tanglenas_engine.testing import random_data


def history(held_out, training, split="validation"):
    return [{f"{split}_loss": v, "weight_loss": t} for v, t in zip(held_out, training, strict=True)]


FALLING = [1 / (1 + epoch) for epoch in range(20)]
RISING = [1.0, 0.8, 0.6, 0.5, 0.42, 0.4, 0.41, 0.4, *(0.42 + 0.01 * i for i in range(12))]


@pytest.mark.parametrize("split", ["validation", "architecture"])
def test_a_loss_that_rises_is_told_with_the_epoch_of_its_lowest(split):
    warning = overfitted(history(RISING, FALLING, split), alpha=split == "architecture")
    assert f"the loss on the {split} split was lowest around epoch 7 (0.403) and rose to 0.520" in warning
    assert "fell from 0.145 to 0.053 (means of 3 epochs)" in warning and "about 7 epochs" in warning


@pytest.mark.parametrize(
    "validation, training",
    [
        (FALLING, FALLING),
        (RISING, [2 - loss for loss in FALLING]),  # it diverged, or a target took the capacity away
        (RISING[2:7], FALLING[2:7]),  # too few epochs to tell
        ([0.4 + 0.02 * random.Random(epoch).random() for epoch in range(90)], [1 / (1 + e) for e in range(90)]),
        ([], []),
    ],
)
def test_a_search_that_did_not_go_past_its_best_is_told_nothing(validation, training):
    assert overfitted(history(validation, training), alpha=False) == ""


def test_the_loss_of_an_architecture_that_changes_is_not_looked_at():
    """Alpha may go over to a smaller network, whose loss is larger from one epoch to the next."""
    assert overfitted(history(RISING, FALLING), alpha=True) == ""
    both = [
        {**one, **other}
        for one, other in zip(history(RISING, FALLING), history(FALLING, FALLING, "architecture"), strict=True)
    ]
    assert overfitted(both, alpha=True) == ""


def test_epochs_without_a_loss_are_left_out():
    found = history([math.nan, *RISING], [1.0, *FALLING])
    del found[15]["validation_loss"]
    assert "lowest around epoch 8 (0.403)" in overfitted(found, alpha=False)


@pytest.mark.parametrize("optimizer, split", [("spos", "validation"), ("drnas", "architecture")])
def test_a_search_on_labels_by_chance_learns_them_by_heart_and_says_so(optimizer, split):
    class Notes(SilentProgress):
        def note(self, text):
            notes.append(text)

    notes: list[str] = []
    space = vit()
    data = random_data(space, ("weights", "architecture", "validation"))
    adam = partial(torch.optim.Adam, lr=1e-2)
    search(space, create_optimizer(optimizer), data, epochs=30, batch_size=8, weight_optimizer=adam, progress=Notes())
    (warning,) = [note for note in notes if "by heart" in note]
    assert warning.startswith(f"search: warning: the loss on the {split} split was lowest around epoch ")
