"""What several ranks do together, and one process alone: the cases of test_distributed.py."""

import itertools
import os
import signal
import tempfile
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from spaces import Convolutional, vit
from torch import nn
from trainings import run

from tanglenas_engine import create_optimizer, create_space
from tanglenas_engine.data import IGNORED, SPLITS, DataView, make_splits, open_splits
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.pareto import final_front
from tanglenas_engine.derivation.race import race
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import create_dataset
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.stages.evaluate import evaluate
from tanglenas_engine.stages.retrain import Recipe, retrain
from tanglenas_engine.stages.search import search
from tanglenas_engine.testing import random_data
from tanglenas_engine.testing.optimizers import CutAfter, CutOff
from tanglenas_engine.training.loop import Interrupted
from tanglenas_engine.training.optim import parameter_groups

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)


def masked(samples):
    """The samples, of which three in four have no target: some batches and many pieces of them have none at all."""
    samples.labels[torch.arange(len(samples)) % 4 > 0] = IGNORED
    return samples


def searched(optimizer, space=vit, checkpoints=None, progress=None, masks=False, **options):
    """20 steps at a batch of 8 samples in all, and what they leave."""
    torch.manual_seed(0)
    space, optimizer = space(), create_optimizer(optimizer)
    data = random_data(space, ("weights", "architecture", "validation"), samples=40)
    if masks:
        data = DataView({**{name: masked(getattr(data, name)) for name in SPLITS[:2]}, "validation": data.validation})
    small = dict(epochs=4, batch_size=8, seed=3, weight_optimizer=SGD, scheduler=None)
    result = search(space, optimizer, data, **{**small, **options}, checkpoints=checkpoints, progress=progress)
    return {
        "alphas": optimizer.state_dict()["alphas"],
        "weights": dict(space.state_dict()),
        "architecture": None if result.architecture is None else result.architecture.to_json(),
        "history": result.history,
    }


def drnas():
    return searched("drnas")


def darts2():
    return searched("darts2")


def darts2_autograd():
    space = vit()
    optimizer = create_optimizer("darts2", hypergradient="autograd")
    return _architecture_gradient(space, optimizer)


def gdas():
    return searched("gdas")


def spos():
    return searched("spos")


def simultaneous():
    return searched("drnas", strategy="simultaneous")


def accumulated():
    return searched("drnas", accumulate=2)


def masked_drnas(**options):
    return searched("drnas", masks=True, **options)


def masked_darts2():
    return searched("darts2", masks=True)


def masked_sandwich(**options):
    return searched("sandwich", masks=True, **options)


def bfloat16():
    return searched("drnas", precision="bfloat16")


def paced():
    """A search by seconds. The clocks of the ranks go on with every look at them, by 1 and 2 seconds."""
    ticks = itertools.count(step=1 + distributed.rank())
    with mock.patch("tanglenas_engine.runtime.timer.time.process_time", lambda: float(next(ticks))):
        return searched("drnas", seconds=40.0, warmup_epochs=1)


def batch_norm():
    return searched("drnas", space=Convolutional)


def _digits(drop_path):
    """One epoch of a search as the pipeline would run it, without augmentation."""
    space = create_space("autoformer_nano", weight_init="jax", drop_path=drop_path)
    digits, optimizer = create_dataset("digits", shift=0), create_optimizer("drnas")
    data = open_splits(digits, make_splits(digits, seed=0), ("weights", "architecture", "validation"))
    adamw, adam = partial(torch.optim.AdamW, lr=4e-3, weight_decay=0.05), partial(torch.optim.Adam, lr=0.01)
    result = search(
        space, optimizer, data, epochs=1, batch_size=32, weight_optimizer=adamw, architecture_optimizer=adam
    )
    return {"alphas": optimizer.state_dict()["alphas"], "architecture": result.architecture.to_json()}


def digits():
    return _digits(drop_path=0.0)


def dropped():
    return _digits(drop_path=0.1)


def _architecture_gradient(space, optimizer):
    """Alpha's gradient of one step, as the search would see it."""
    from tanglenas_engine.optimizers.optimizer import Step
    from tanglenas_engine.training.losses import cross_entropy

    optimizer.bind(space.train(), 3)
    data = random_data(space, ("weights", "architecture"), samples=8)
    mine = torch.arange(8).chunk(distributed.world_size())[distributed.rank()]
    batches = data.weights.batch(mine), data.architecture.batch(mine)
    optimizer.architecture_backward(Step(0, space, cross_entropy, *batches, SGD(parameter_groups(space))))
    gradients = [alpha.grad for alpha in optimizer.alphas.values()]
    distributed.average(gradients)
    return gradients


def retrained(masks=False, **options):
    torch.manual_seed(1)
    space = vit()
    data = random_data(space, SPLITS, samples=36)
    if masks:
        masked(data.training)
    architecture = space.sample(torch.Generator().manual_seed(1))
    small = dict(epochs=4, batch_size=12, seed=3, optimizer=SGD, scheduler=None)
    result = retrain(space, architecture, data, **small, **options)
    judged = evaluate(space, architecture, result.network, data, batch_size=5)
    return {
        "weights": dict(result.network.state_dict()),
        "history": result.history,
        "test": (judged.test_accuracy, judged.test_loss, judged.samples),
    }


def masked_retrained(**options):
    return retrained(masks=True, teacher="largest", teacher_hidden=0.1, **options)


def raced():
    """Candidates that ran a race, and their front."""
    torch.manual_seed(0)
    space = Convolutional()
    data = random_data(space, ("weights", "architecture"), samples=40)
    with Candidates(space, data.weights, data.architecture, batch_size=5, device=torch.device("cpu")) as candidates:
        candidates.judge(candidates.fresh(9))
        front = final_front(candidates)
    return [[{**record, "architecture": str(record["architecture"])} for record in found]
            for found in (candidates.records, front)]  # fmt: skip


def trained():
    """A race of real trainings, which the ranks deal out, and the number of results that rank 0 keeps."""
    torch.manual_seed(0)
    space = vit()
    data = random_data(space, ("weights", "architecture", "training", "validation"), samples=24)
    recipe = Recipe(space, data, 3, {"batch_size": 12, "seed": 3, "optimizer": SGD})
    with shared_checkpoints() as checkpoints:
        with Candidates(space, data.weights, data.architecture, limit=12, checkpoints=checkpoints) as candidates:
            found = race(candidates, None, recipe, entrants=8)
        kept = len(checkpoints.load()["kept"]) if checkpoints else None
    return {"records": [{**record, "seconds": 0.0} for record in found.records], "kept": kept}


class Noise(nn.Module):
    """Steps that draw a random number each, and keep all of them apart from the state."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.drawn = []

    def step(self, position):
        self.drawn.append(float(torch.rand(())))
        return {"loss": torch.tensor(self.drawn[-1])}


def walked(checkpoints=None, progress=None):
    module = Noise()
    torch.manual_seed(5)
    history = run(
        name="walk",
        epochs=2,
        steps_per_epoch=4,
        step=module.step,
        end_epoch=lambda epoch, means: {**means, "rank": distributed.rank()},
        describe=str,
        stateful={"module": module},
        parameters=[module.weight],
        checkpoints=checkpoints,
        checkpoint_every=1,
        progress=progress,
    )
    return {"drawn": module.drawn, "history": history}


@contextmanager
def shared_checkpoints(place=None):
    """Those of rank 0, in a folder that all know; None on the others."""
    place = place or distributed.broadcast(tempfile.mkdtemp())
    with CheckpointFolder(Path(place, "checkpoints"), "ranked") if distributed.rank() == 0 else nullcontext() as folder:
        yield folder


def _resumed(do, cut):
    """What is done in one go, and what is done when it is cut off after `cut` steps and run again."""
    with shared_checkpoints() as checkpoints:
        try:
            do(checkpoints=checkpoints, progress=CutAfter(cut))
        except CutOff:
            return {"whole": do(), "resumed": do(checkpoints=checkpoints)}


def resumed():
    return _resumed(walked, 6)


def resumed_search():
    return _resumed(partial(searched, "drnas", space=vit, checkpoint_every=3), 7)


def resumed_batch_norm():
    return _resumed(partial(searched, "drnas", space=Convolutional, checkpoint_every=3), 7)


class SignalAfter(CutAfter):
    """Signals this process after so many steps."""

    def advance(self):
        try:
            super().advance()
        except CutOff:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted():
    """The last rank is asked to stop after 6 steps; the first saves."""
    asked = distributed.rank() == distributed.world_size() - 1
    with shared_checkpoints() as checkpoints:
        try:
            searched("drnas", checkpoints=checkpoints, progress=SignalAfter(6 if asked else None))
        except Interrupted as stop:
            return {"message": str(stop), "position": checkpoints.load()["position"] if checkpoints else None}


def exchanged():
    """What goes through each function."""
    rank = distributed.rank()
    mine = {"text": "é" * (rank + 1), "numbers": [rank, 0.5], "tensor": torch.full((rank + 2,), float(rank))}
    tensors = [torch.full((2, 2), float(rank)), None, torch.arange(3.0) * rank, torch.tensor(rank, dtype=torch.float64)]
    constants = distributed.averaged([t for t in tensors if t is not None])
    copy = [torch.tensor([float(rank)])]
    distributed.synchronize(copy)
    distributed.average(tensors)
    return {
        "gather": distributed.gather(mine),
        "broadcast": distributed.broadcast(mine),
        "total": distributed.sum_over_ranks([rank, 1.0]),
        "anywhere": [distributed.any_rank(rank == 0), distributed.any_rank(False)],
        "shard": list(distributed.shard("abcde")),
        "each": distributed.map_over_ranks(lambda letter: [letter, rank], "abcde"),
        "average": tensors,
        "averaged": constants,
        "synchronize": copy,
    }


def after_the_first():
    """Rank 0 writes, the others find it; when it fails, they hear why."""
    place = Path(distributed.broadcast(tempfile.mkdtemp()))
    with distributed.first_rank_first():
        found = (place / "file").exists()
        (place / "file").touch()
    try:
        with distributed.first_rank_first():
            if distributed.rank() == 0:
                raise TangleNASError("no disk")
    except TangleNASError as error:
        return {"found": found, "error": str(error), "kind": type(error).__name__}


def apart():
    """Ranks that hold different weights."""
    try:
        distributed.check_equal([torch.tensor([1.0, float(distributed.rank())])])
    except TangleNASError as error:
        return str(error)


class DieAfter(CutAfter):
    """Kills this process after so many steps."""

    def advance(self):
        try:
            super().advance()
        except CutOff:
            os.kill(os.getpid(), signal.SIGKILL)


def killed():
    """The last of several ranks dies in step 8; checkpoints are in the folder that PLACE names."""
    dies = 0 < distributed.rank() == distributed.world_size() - 1
    with shared_checkpoints(os.environ["PLACE"]) as checkpoints:
        return searched("drnas", checkpoints=checkpoints, checkpoint_every=3, progress=DieAfter(8 if dies else None))
