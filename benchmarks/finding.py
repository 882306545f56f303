"""Does a search find? Methods against a pool of random networks of equal cost, each trained by itself.

    python -m benchmarks.finding run gpt_nano
    python -m benchmarks.finding run autoformer_nano --data FOLDER_OF_FASHION_MNIST
    python -m benchmarks.finding run toy_cell --data FOLDER_OF_FASHION_MNIST --table TABLE
    python -m benchmarks.finding run nb201 --data FOLDER_OF_CIFAR10 --table TABLE
    python -m benchmarks.finding table benchmarks/results/gpt_nano.jsonl
    python -m benchmarks.finding front gpt_nano
    python -m benchmarks.finding paths gpt_nano
    python -m benchmarks.finding ablate gpt_nano
    python -m benchmarks.finding lengths gpt_nano
    python -m benchmarks.finding alone toy_cell_small --data FOLDER_OF_FASHION_MNIST --table TABLE

`run` trains the pool, and then searches, derives and trains with every method and seed. Each result is a line of the
file, so a study that is cut off goes on where it was. All times are of the processor. Nothing is chosen by the test
split: it only says in the end what a network is worth. `table` prints the comparison, with intervals. `front` searches
the whole space once a seed, derives a network for each of several budgets, and compares fronts of loss and cost.
`paths` goes on from a supernet that learned in mixtures by epochs of random architectures, and ranks the pool after
each. `ablate` changes one thing of a search at a time. `lengths` trains networks of the pool for longer, and from the
weights of a search. `alone` trains networks that a table knows, to see what short
trainings say.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import click
import numpy as np
import torch
from pymoo.indicators.hv import HV
from scipy import stats

from tanglenas_engine import (
    Architecture,
    SearchSpace,
    cosine,
    create_dataset,
    create_objective,
    create_optimizer,
    create_space,
    discretize,
    evaluate,
    make_splits,
    open_splits,
    retrain,
    search,
)
from tanglenas_engine.data import DataView, Splits, held
from tanglenas_engine.derivation.band import Band
from tanglenas_engine.derivation.budget import Budget, whole
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.jobs import Trained
from tanglenas_engine.derivation.levels import front as at_levels
from tanglenas_engine.derivation.race import Rung, plan, race, work
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.stages.discretize import METHODS as DERIVATION_METHODS
from tanglenas_engine.stages.retrain import RetrainResult
from tanglenas_engine.tables import load_table, rank_correlations

RESULTS = Path(__file__).parent / "results"
FILLED = 0.95
"""The share of the budget that every network of the pool uses at least."""
SEEDS = 2
"""Trainings of each network that was found, and of those that cost most."""
REPEATED, REPEATS = 5, 3
"""The networks of the pool, and their seeds, that say how far trainings of one network differ."""


OPTIMIZER = partial(torch.optim.AdamW, lr=0.004, weight_decay=0.05)
SCHEDULER = partial(cosine, warmup=0.2)
"""The schedule of trainings. With a warm-up over 5 %, seeds differ as much as networks do."""
PATHS = {1: 0.5, 2: 1.0}
"""Epochs of random architectures after a search by mixtures, with the share of its learning rate."""
HALVINGS = (4, 6)
"""The budgets, in trainings, of races between random networks of the pool in the table."""
FRONT = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""The budgets of a front, as shares of the largest network's cost."""


@dataclass(frozen=True)
class Task:
    """A space with data and a budget, and how its networks are trained.

    Attributes:
        data: The options of the dataset, and `options` those of the space.
        place: The option of the dataset that says where its files are, or None for data that need no files.
        budget: The share of the largest network's multiply-accumulates.
        images: The number of images outside the test split, which are held in memory; None for all samples.
        validation: The share of these that compares trained networks.
        epochs: The passes of a training over `training`.
        search_epochs: The passes of a search over `weights`; None takes as many as a training has.
        pool: The number of random networks.
        metric: The accuracy of a table that stands for the test of all trainings; None trains.
        validation_metric: The accuracy that stands for their validation; None takes the same.
        search: Options of the search that differ from those of the study.
    """

    space: str
    dataset: str
    data: dict[str, Any]
    options: dict[str, Any]
    budget: float | None = 0.6
    place: str | None = None
    images: int | None = None
    validation: float = 0.1
    epochs: int = 12
    search_epochs: int | None = None
    pool: int = 24
    metric: str | None = None
    validation_metric: str | None = None
    search: dict[str, Any] = field(default_factory=dict)


SGD = partial(torch.optim.SGD, lr=0.025, momentum=0.9, nesterov=True, weight_decay=5e-4)
VIT = {"relative_position": True, "drop_path": 0.1}
TASKS = {
    "gpt_nano": Task(
        "gpt_nano", "stdlib_text", {"characters": 400_000}, {"bias": True},
        epochs=12,
    ),
    # 12 epochs do not train these networks to their end: validation losses rest from about the nineteenth on.
    "gpt_nano_24": Task(
        "gpt_nano", "stdlib_text", {"characters": 400_000}, {"bias": True},
        epochs=24, search_epochs=12,
    ),
    "gpt_nano_shakespeare": Task(
        "gpt_nano", "text", {}, {"bias": True}, place="root",
        epochs=5,
    ),
    # Patches of 7 pixels train in a third of the time of patches of 4.
    "autoformer_nano": Task(
        "autoformer_nano", "fashion_mnist", {}, VIT | {"patch_size": 7}, place="root", images=6000, epochs=12,
    ),
    # With 12 epochs on as many images, the validation loss rises from the fifth on. 300 images for validation differ
    # more between seeds than the networks do.
    "mobilenetv3_nano": Task(
        "mobilenetv3_nano", "fashion_mnist", {}, {"drop": 0.1}, place="root", images=6000, validation=0.5,
        epochs=6,
    ),
    "mobilenetv3_nano_10000": Task(
        "mobilenetv3_nano", "fashion_mnist", {}, {"drop": 0.1}, place="root", images=13_000, validation=3 / 13,
        epochs=4,
    ),
    "toy_cell": Task(
        "toy_cell", "fashion_mnist", {}, {"channels": 16, "dropout": 0.2}, budget=None, place="root", images=6000,
        epochs=12, pool=60, metric="test_acc",
        search={"weight_optimizer": SGD},
    ),
    "toy_cell_small": Task(
        "toy_cell", "fashion_mnist", {}, {"channels": 8, "dropout": 0.2}, budget=None, place="root", images=3000,
        epochs=8, pool=60, metric="test_acc",
        search={"weight_optimizer": SGD},
    ),
    # The table's networks have 16 channels and 5 cells a stage.
    "nb201": Task(
        "nb201", "image_folder", {"image_size": 16}, {"channels": 8, "cells": 1, "affine": False}, budget=None,
        place="root", images=4000, epochs=20, pool=100, metric="c10_test200", validation_metric="c10_val200",
        search={"weight_optimizer": SGD, "batch_size": 64},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A search, and the ways in which an architecture is derived from it.

    Attributes:
        band: Whether a target is set: samples are then drawn within the band, and mixtures are drawn to it.
        derivations: Names of `DERIVATIONS`. A race gives two results: what it finds, and the candidate that it judged
            best before any training, which is what `random` or `both` finds.
        short: Whether the search takes a quarter of the epochs.
        recipe: Whether the search has the weight optimizer and the schedule of the trainings.
        paths: The epochs at the end in which the weights learn by random architectures.
        relaxation: How the supernet computes a mixture.
        segments: Whether the architecture split is the second half of the training samples, and not dealt.
        portion: The share of the training samples that the weights learn from. The others judge.
        decay: The weight decay of alpha. 0.001 is the paper's.
        trained: Whether there is a search at all. Without one, the weights that rank candidates are random.
    """

    optimizer: str
    derivations: tuple[str, ...]
    band: bool = True
    short: bool = False
    recipe: bool = False
    paths: int = 0
    relaxation: str = "exact"
    segments: bool = False
    portion: float = 0.5
    decay: float = 0.001
    trained: bool = True


METHODS = {
    "spos band": Method("spos", ("best race",)),
    "drnas target": Method("drnas", ("argmax", "best race")),
    "drnas target, then paths": Method("drnas", ("argmax", "both"), paths=2),
    "hard_concrete target": Method("hard_concrete", ("argmax", "best race")),
    "tunas band": Method("tunas", ("argmax", "both"), decay=0.0),
    "gdas target": Method("gdas", ("argmax", "both")),
    "short spos band": Method("spos", ("best race", "proposing race"), short=True, recipe=True),
    "no search": Method("spos", ("proposing race",), trained=False),
    "spos whole space": Method("spos", ("random",), band=False),
    "spos whole space, recipe of trainings": Method("spos", ("best race",), band=False, recipe=True),
    "spos whole space, recipe of trainings, most data": Method(
        "spos", ("best race",), band=False, recipe=True, portion=0.8
    ),
    "sandwich band": Method("sandwich", ("random",)),
    "sandwich whole space": Method("sandwich", ("random",), band=False),
}
ABLATIONS = {
    "spos": Method("spos", ("judged",)),
    "spos, whole space": Method("spos", ("judged",), band=False),
    "spos, whole space, recipe of trainings": Method("spos", ("judged",), band=False, recipe=True),
    "spos, whole space, recipe of trainings, most data": Method(
        "spos", ("judged",), band=False, recipe=True, portion=0.8
    ),
    "spos, architecture split from elsewhere": Method("spos", ("judged",), segments=True),
    "sandwich": Method("sandwich", ("judged",)),
    "gdas": Method("gdas", ("argmax", "judged")),
    "tunas": Method("tunas", ("argmax", "judged"), decay=0.0),
    "drnas": Method("drnas", ("argmax", "judged")),
    "drnas, architecture split from elsewhere": Method("drnas", ("argmax", "judged"), segments=True),
    "drnas, no decay of alpha": Method("drnas", ("argmax", "judged"), decay=0.0),
    "drnas, gated": Method("drnas", ("argmax", "judged"), relaxation="gated"),
    "drnas, paper": Method("drnas", ("argmax", "judged"), relaxation="paper"),
}
"""Searches that differ from `spos` within the band, or from `drnas` with a target, in one thing."""
DERIVATIONS: dict[str, dict[str, Any]] = {
    "argmax": {"method": "argmax"},
    "random": {"method": "random", "candidates": 300},
    "both": {"method": "both", "candidates": 300},
    "judged": {"method": "both", "candidates": 100},
    "race": {"method": "race", "candidates": 300},
    "best race": {"method": "race", "candidates": 100},
    "proposing race": {"method": "race", "candidates": 100},
}
RACES: dict[str, dict[str, Any]] = {
    "race": {"entrants": 3, "trainings": 3},
    "best race": {"entrants": 8, "propose": 0.0},
    "proposing race": {},
}
"""The options of races: three complete trainings of the supernet's best, its best 8, the defaults."""


class Study(contextlib.AbstractContextManager["Study"]):
    """A task in progress: its data, its budget, and the file of results.

    Checkpoints of trainings that pause go away at the end of a `with` block.
    """

    def __init__(self, name: str, path: Path, data: str | None = None, threads: int = 1, table: str | None = None):
        torch.set_num_threads(threads)
        self.task, self.path = TASKS[name], path
        place = {self.task.place: data} if self.task.place and data else {}
        self.dataset = create_dataset(self.task.dataset, **self.task.data, **place)
        self.splits = self._dealt(0.5)
        space = self.space()
        self.limits: dict[str, float] = {}
        if self.task.budget is not None:
            self.limits = self.budget(self.task.budget)
        self.table = load_table(table, space) if table else None
        if self.task.metric is not None and self.table is None:
            raise click.UsageError(f"{name} needs --table: its networks are not trained")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.done: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}
        self.paused: dict[str, float] = {}  # seconds of trainings so far
        self._folder = tempfile.TemporaryDirectory()
        self.checkpoints = Path(self._folder.name)

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def space(self, seed: int = 0, relaxation: str = "exact") -> SearchSpace:
        torch.manual_seed(seed)
        options = {**self.dataset.space_options(), **self.task.options, "relaxation": relaxation}
        return create_space(self.task.space, **options)

    def _dealt(self, portion: float) -> Splits:
        """Return splits whose weights have a portion of the training samples. Validation and test are the same."""
        return make_splits(
            self.dataset,
            seed=0,
            train_portion=portion,
            samples=self.task.images,
            validation_portion=self.task.validation,
        )

    def split_for(self, method: Method) -> Self:
        """Return the study with the training samples shared between weights and architecture as a method has it."""
        splits = self._segments() if method.segments else self._dealt(method.portion)
        if splits == self.splits:
            return self  # with the images that it holds
        study = copy.copy(self)
        study.splits = splits
        vars(study).pop("_images", None)
        return study

    def _segments(self) -> Splits:
        """Return splits whose training samples are cut in two, not dealt: the second half judges."""
        training = self.splits.training
        letters = np.array([*self.splits.assignment])
        letters[training[: len(training) // 2]], letters[training[len(training) // 2 :]] = "w", "a"
        return replace(self.splits, assignment="".join(letters))

    @cached_property
    def _images(self) -> DataView:
        """All splits but the test's, decoded once: no method pays for it."""
        cpu = torch.device("cpu")
        names = ("weights", "architecture", "training", "validation")
        return DataView(
            {name: held(self.dataset.subset(self.splits.indices(name), train=False), 256, cpu) for name in names}
        )

    def data(self, *names: str) -> DataView:
        if self.task.images is None or "test" in names:
            return open_splits(self.dataset, self.splits, names, augment=False)
        return self._images

    def once(self, key: str, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a job, which is run if the file lacks it."""
        if key not in self.done:
            start = time.process_time()
            row = {"key": key, **job()}
            row["seconds"] = row.get("seconds", round(time.process_time() - start, 2))
            self.done[key] = row
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            click.echo(f"{key}: {json.dumps({k: v for k, v in row.items() if k not in ('curve', 'key')})[:180]}")
        return self.done[key]

    def budget(self, share: float) -> dict[str, float]:
        """Return the limits at a share of the largest network's multiply-accumulates."""
        space = self.space()
        return {"macs": whole(share * space.cost(space.largest()).macs)}

    def retrained(
        self,
        architecture: Architecture,
        seed: int,
        until: int | None = None,
        epochs: int | None = None,
        supernet: SearchSpace | None = None,
    ) -> tuple[RetrainResult, float]:
        """Train a network by itself, to the end or until so many epochs, and return its seconds so far, too.

        A training that paused goes on.

        Args:
            epochs: The epochs of the whole schedule; None takes those of the task.
            supernet: The supernet whose weights are fine-tuned; None trains from scratch.
        """
        start, name = time.process_time(), f"{architecture.digest}-{seed}"
        with CheckpointFolder(self.checkpoints / name, "study") as checkpoints:
            found = retrain(
                self.space() if supernet is None else supernet,
                architecture,
                self.data("training", "validation"),
                mode="scratch" if supernet is None else "finetune",
                epochs=epochs or self.task.epochs,
                until=until,
                batch_size=64,
                optimizer=OPTIMIZER,
                scheduler=SCHEDULER,
                clip=5.0,
                seed=seed,
                device="cpu",
                checkpoints=checkpoints,
            )
            self.paused[name] = seconds = self.paused.get(name, 0.0) + time.process_time() - start
            if until is None:
                checkpoints.discard()
                del self.paused[name]
            return found, round(seconds, 2)

    def begun(self, architecture: Architecture, epochs: int) -> dict[str, Any]:
        """Train a network by itself until so many epochs, or look that up where it was trained to the end."""
        if (whole := self.done.get(f"trained/{architecture.digest}/0")) is not None:
            share = epochs / self.task.epochs
            return {"validation_loss": whole["curve"][epochs - 1], "seconds": round(share * whole["seconds"], 2)}
        found, seconds = self.retrained(architecture, 0, epochs)
        return {"validation_loss": found.history[-1]["validation_loss"], "seconds": seconds}

    def trained(
        self,
        architecture: Architecture,
        seed: int,
        alone: bool = False,
        epochs: int | None = None,
        supernet: SearchSpace | None = None,
    ) -> dict[str, Any]:
        """Train a network by itself, and measure it on validation and test; or look up its error in a table, in %.

        With `alone` it is trained in any case. `epochs` and `supernet` are those of `retrained`.
        """
        space = self.space()
        if self.table is not None and self.task.metric is not None and not alone:
            judged = self.task.validation_metric or self.task.metric
            return {
                "architecture": dict(architecture.choices),
                "digest": architecture.digest,
                "rank": self.table.rank(architecture, self.task.metric),
                "validation_loss": 100 - self.table.value(architecture, judged),
                "test_loss": 100 - self.table.value(architecture, self.task.metric),
                "seconds": 0.0,
            }
        found, seconds = self.retrained(architecture, seed, epochs=epochs, supernet=supernet)
        tested = evaluate(space, architecture, found.network, self.data("test"), device="cpu")
        return {
            "architecture": dict(architecture.choices),
            "digest": architecture.digest,
            "seed": seed,
            "params": tested.cost.params,
            "macs": tested.cost.macs,
            "validation_loss": found.history[-1]["validation_loss"],
            "test_loss": tested.test_loss,
            "test_accuracy": tested.test_accuracy,
            "curve": [row["validation_loss"] for row in found.history],
            "seconds": seconds,
        }

    def tuned(self, name: str, seed: int, numbers: Sequence[int], epochs: int) -> None:
        """Fine-tune networks of the pool from the weights of a search."""
        keys = {number: f"lengths/{name}/{epochs}/{number}" for number in numbers}
        if all(key in self.done for key in keys.values()):
            return
        space, _, searched = self.split_for(METHODS[name]).searched(METHODS[name], seed)
        search = {"seconds": searched["search_seconds"], "pool_losses": searched["pool_losses"]}
        self.once(f"lengths/{name}/search", lambda: search)
        pool = self.pool()
        self.fine_tuned(space, {key: pool[number] for number, key in keys.items()}, 0, epochs)

    def fine_tuned(
        self, supernet: SearchSpace, networks: dict[str, Architecture], seed: int, epochs: int | None = None
    ) -> None:
        """Fine-tune networks from a supernet's weights; each is a result under its key."""
        weights = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
        for key, one in networks.items():
            supernet.load_state_dict(weights)
            self.once(key, partial(self.trained, one, seed, epochs=epochs, supernet=supernet))

    def pool(self) -> list[Architecture]:
        """Return the architectures of the pool, all different."""
        space, generator = self.space(), torch.Generator().manual_seed(12345)
        source = Band(Budget(space, self.limits), FILLED) if self.limits else space
        found: dict[str, Architecture] = {}
        while len(found) < self.task.pool:
            one = source.sample(generator)
            found.setdefault(one.digest, one)
        return list(found.values())

    def search(self, name: str, seed: int) -> None:
        """Search with a method and derive by each of its derivations, unless the file has it all."""
        method = METHODS[name]
        if self.table is not None:  # A race would look its trainings up, which takes no time.
            judged = "both" if create_optimizer(method.optimizer).learns_architecture else "random"
            taken = dict.fromkeys(judged if one in RACES else one for one in method.derivations)
            method = replace(method, derivations=tuple(taken))
        keys = {derivation: f"found/{name}, {derivation}/{seed}" for derivation in method.derivations}
        if all(key in self.done for key in keys.values()):
            return
        study = self.split_for(method)
        space, mixture, searched = study.searched(method, seed)
        for derivation, key in keys.items():
            row = self.once(key, partial(study.derived, space, mixture, derivation, seed, searched, self.limits))
            if "judged" in row and method.trained:
                judged = f"found/{name}, {'both' if mixture else 'random'}/{seed}"
                self.once(judged, lambda first=row["judged"]: {**first, **searched})

    def front(self, name: str, seed: int) -> None:
        """Search once, derive a network for each budget of the front by judging candidates, and train it."""
        keys = {share: f"front/{name}/{share}/{seed}" for share in FRONT}
        if not all(key in self.done for key in keys.values()):
            study = self.split_for(METHODS[name])
            space, mixture, searched = study.searched(METHODS[name], seed)
            for share, key in keys.items():
                self.once(key, partial(study.derived, space, mixture, "judged", seed, searched, self.budget(share)))
        for key in keys.values():
            architecture = self.found(key)
            self.once(f"trained/{architecture.digest}/{seed}", partial(self.trained, architecture, seed))

    def front_at_once(self, name: str, seed: int) -> None:
        """Search once, judge candidates for all budgets of the front together, and fine-tune the best for each.

        The random networks that compete are fine-tuned from the same weights, too: the search's choice against theirs.
        """
        found, drawn = (
            {share: f"front/{name}, {what}, fine-tuned/{share}/{seed}" for share in FRONT}
            for what in ("judged once", "random")
        )
        if all(key in self.done for key in (*found.values(), *drawn.values())):
            return
        study = self.split_for(METHODS[name])
        space, _, searched = study.searched(METHODS[name], seed)
        judged = self.once(f"judged once/{name}/{seed}", lambda: study.judged_once(space, seed) | searched)
        best, random = judged["architectures"], self.random(seed)
        networks = {key: space.from_string(best[str(share)]) for share, key in found.items()}
        self.fine_tuned(space, networks | {key: random[share] for share, key in drawn.items()}, seed)

    def judged_once(self, space: SearchSpace, seed: int) -> dict[str, Any]:
        """Return the architecture that the method `front` finds best for each budget of the front."""
        start = time.process_time()
        most = {share: self.budget(share)["macs"] for share in FRONT}
        found = discretize(
            space,
            self.data("weights", "architecture", "validation"),
            None,
            method="front",
            cost="macs",
            candidates=100,
            methods={"front": partial(at_levels, levels=[*most.values()], rounds=4)},
            seed=seed,
            device="cpu",
        )
        costs = [(space.cost(one).macs, one) for one in found.front]  # the dearer, the better
        best = {share: [one for cost, one in costs if cost <= most[share]][-1] for share in FRONT}
        return {
            "architectures": {str(share): str(one) for share, one in best.items()},
            "derive_seconds": round(time.process_time() - start, 2),
        }

    def random(self, seed: int, start: int = 0) -> dict[float, Architecture]:
        """Return a random network for each budget of the front, from the draws that begin at `start`."""
        space, found = self.space(), {}
        for number, share in enumerate(FRONT):
            generator = torch.Generator().manual_seed(start + 1000 * seed + number)
            found[share] = Band(Budget(space, self.budget(share)), FILLED).sample(generator)
        return found

    def random_front(self, name: str, seed: int, start: int = 0, epochs: int | None = None) -> None:
        """Train a random network for each budget of the front. `epochs` are those of `retrained`."""
        for share, one in self.random(seed, start).items():
            self.once(f"front/{name}/{share}/{seed}", partial(self.trained, one, seed, epochs=epochs))

    def paths(self, optimizer: str, seed: int) -> None:
        """Search by mixtures, and rank the pool before and after epochs of random architectures that follow."""
        keys = {epochs: f"paths/{optimizer}/{epochs}/{seed}" for epochs in (0, *PATHS)}
        if all(key in self.done for key in keys.values()):
            return
        space, _, searched = self.searched(Method(optimizer, ()), seed)
        self.once(keys[0], lambda: {"seconds": searched["search_seconds"], "pool_losses": searched["pool_losses"]})
        weights = {name: tensor.clone() for name, tensor in space.state_dict().items()}
        for epochs, share in PATHS.items():
            space.load_state_dict(weights)
            self.once(keys[epochs], partial(self._on_paths, space, epochs, share, seed))

    def _on_paths(self, space: SearchSpace, epochs: int, share: float, seed: int) -> dict[str, Any]:
        """Train a supernet by random architectures, at a share of the learning rate of the search."""
        usual = partial(torch.optim.AdamW, lr=0.002, weight_decay=0.05)
        factory = self.task.search.get("weight_optimizer", usual)
        start = time.process_time()
        search(
            space,
            create_optimizer("spos"),
            self.data("weights", "architecture", "validation"),
            epochs=epochs,
            batch_size=self.task.search.get("batch_size", 32),
            weight_optimizer=partial(factory, lr=share * factory.keywords["lr"]),
            targets=[Target(create_objective("macs"), value=most) for most in self.limits.values()],
            clip=5.0,
            seed=seed,
            device="cpu",
        )
        return {"seconds": round(time.process_time() - start, 2), **self.ranked(space, seed)}

    def ablation(self, name: str, seed: int) -> None:
        """Search in one of the ways of `ABLATIONS`, and derive, unless the file has it all."""
        method = ABLATIONS[name]
        keys = {derivation: f"ablation/{name}/{derivation}/{seed}" for derivation in method.derivations}
        if all(key in self.done for key in keys.values()):
            return
        study = self.split_for(method)
        space, mixture, searched = study.searched(method, seed)
        for derivation, key in keys.items():
            self.once(key, partial(study.derived, space, mixture, derivation, seed, searched, self.limits))

    def found(self, key: str) -> Architecture:
        """Return the architecture of a result."""
        choices = self.done[key]["architecture"]
        return Architecture(
            self.space().largest().space, {k: tuple(v) if isinstance(v, list) else v for k, v in choices.items()}
        )

    def searched(self, method: Method, seed: int) -> tuple[SearchSpace, dict[str, torch.Tensor] | None, dict[str, Any]]:
        """Search with a method, and return the supernet, the mixture and what is known of the search."""
        space, optimizer = self.space(seed, method.relaxation), create_optimizer(method.optimizer)
        if not method.trained:
            return space, None, {"search_seconds": 0.0, **self.ranked(space, seed)}
        epochs = self.task.search_epochs or self.task.epochs
        recipe: dict[str, Any] = dict(
            epochs=max(1, epochs // 4) if method.short else epochs,
            batch_size=32,
            weight_optimizer=partial(torch.optim.AdamW, lr=0.002, weight_decay=0.05),
            architecture_optimizer=partial(torch.optim.Adam, lr=0.03, betas=(0.5, 0.999), weight_decay=method.decay),
            warmup_epochs=max(1, epochs // 5) if optimizer.learns_architecture else 0,
            path_epochs=method.paths,
            targets=[Target(create_objective("macs"), value=most) for most in self.limits.values() if method.band],
            clip=5.0,
            seed=seed,
            device="cpu",
        )
        view = self.data("weights", "architecture", "validation")
        start = time.process_time()
        trainings = {"weight_optimizer": OPTIMIZER, "scheduler": SCHEDULER} if method.recipe else {}
        result = search(space, optimizer, view, **{**recipe, **self.task.search, **trainings})
        searched = {
            "search_seconds": round(time.process_time() - start, 2),
            "entropy": result.history[-1].get("entropy"),
            "split_losses": result.split_losses,
            **self.ranked(space, seed),
        }
        return space, result.mixture.tensors() if result.mixture else None, searched

    def derived(
        self,
        space: SearchSpace,
        mixture: dict[str, torch.Tensor] | None,
        derivation: str,
        seed: int,
        searched: dict[str, Any],
        limits: dict[str, float],
    ) -> dict[str, Any]:
        """Derive an architecture from a supernet. The trainings of a race are results of their own."""
        training = Training(self)
        start = time.process_time()
        found = discretize(
            space,
            self.data("weights", "architecture", "validation"),
            mixture,
            **DERIVATIONS[derivation],
            limits=limits,
            seed=seed,
            device="cpu",
            methods={**DERIVATION_METHODS, "race": partial(race, train=training, **RACES.get(derivation, {}))},
        )
        seconds = round(time.process_time() - start - training.now, 2)
        row = {
            "architecture": dict(found.architecture.choices),
            "digest": found.architecture.digest,
            "macs": found.cost.macs,
            "params": found.cost.params,
            "supernet_loss": found.validation_loss,
            "derive_seconds": round(seconds + training.seconds, 2),
            "trainings": training.seconds,
            **searched,
        }
        if found.raced:
            first = found.candidates[0]
            row["judged"] = {
                "architecture": dict(space.from_string(first["architecture"]).choices),
                "digest": first["digest"],
                "macs": first["macs"],
                "params": first["params"],
                "derive_seconds": seconds,
            }
        return row

    def halved(self, seed: int, trainings: float) -> dict[str, Any]:
        """Return the winner of random networks by successive halving: what a person would do without a search."""
        space, generator = self.space(), torch.Generator().manual_seed(777 + seed)
        source = Band(Budget(space, self.limits), FILLED) if self.limits else space
        rungs = plan(16, self.task.epochs, trainings=trainings)
        running = [source.sample(generator) for _ in range(rungs[0].networks)]
        training = Training(self)
        for rung in rungs:
            results = [training(one, rung.epochs).loss for one in running[: rung.networks]]
            running = [one for _loss, one in sorted(zip(results, running, strict=False), key=lambda pair: pair[0])]
        return {
            "architecture": dict(running[0].choices),
            "digest": running[0].digest,
            "macs": space.cost(running[0]).macs,
            "params": space.cost(running[0]).params,
            "search_seconds": 0.0,
            "derive_seconds": training.seconds,
        }

    def ranked(self, space: SearchSpace, seed: int) -> dict[str, Any]:
        """Return loss and accuracy of each network of the pool with a supernet's weights, in the pool's order."""
        view = self.data("weights", "architecture")
        with Candidates(space, view.weights, view.architecture, limit=self.task.pool, seed=seed) as judged:
            rows = judged.judge(self.pool(), on="all samples")
        return {"pool_losses": [row["loss"] for row in rows], "pool_accuracies": [row["accuracy"] for row in rows]}


class Training:
    """A function that a race trains by, with the results of the study.

    Attributes:
        epochs: The number of epochs of a complete training.
        seconds: The processor seconds of all trainings that were asked for, whether they ran now or before.
        now: The processor seconds of those that ran now.
        paid: The part of the seconds that each of them took, by digest.
    """

    identity = "study"

    def __init__(self, study: Study):
        self.study, self.epochs, self.seconds, self.now = study, study.task.epochs, 0.0, 0.0
        self.paid: dict[str, float] = {}

    def __call__(self, architecture: Architecture, epochs: int) -> Trained:
        study, digest, start = self.study, architecture.digest, time.process_time()
        if epochs == self.epochs:
            row = study.once(f"trained/{digest}/0", lambda: study.trained(architecture, 0))
        else:
            row = study.once(f"begun/{digest}/{epochs}", lambda: study.begun(architecture, epochs))
        self.now += time.process_time() - start
        self.seconds += row["seconds"] - self.paid.get(digest, 0.0)
        self.paid[digest] = row["seconds"]
        return Trained(row["validation_loss"], math.nan, row["seconds"])


@click.group()
def main() -> None:
    """Compare what searches find with a pool of random networks of equal cost."""


@main.command()
@click.argument("task", type=click.Choice(list(TASKS)))
@click.option("--data", help="The file or folder of the data, where a task needs one.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="The folder of results.")
@click.option(
    "--methods",
    default=";".join(name for name in METHODS if name != "sandwich whole space"),
    help="Methods, with ; between them.",
)
@click.option("--seeds", default="0,1,2,3,4", help="The seeds of the searches, with commas between them.")
@click.option("--pool", "size", default=0, help="Networks of the pool to train before the methods; 0 for all.")
@click.option("--halving", default="6", help="Budgets of successive halving of random networks, in trainings.")
@click.option("--table", help="The table of a task that trains nothing.")
@click.option("--threads", default=1)
def run(
    task: str,
    data: str | None,
    out: Path,
    methods: str,
    seeds: str,
    size: int,
    halving: str,
    table: str | None,
    threads: int,
) -> None:
    """Train the pool, then search, derive and train with each method and seed."""
    study = click.get_current_context().with_resource(Study(task, out / f"{task}.jsonl", data, threads, table))
    pool = study.pool()
    for number, architecture in enumerate(pool[: size or None]):
        study.once(f"pool/{number}/0", partial(study.trained, architecture, 0))
    budget = Budget(study.space(), study.limits)
    for cost in ("params", "macs") if study.limits and not size else ():
        for again in range(SEEDS):
            study.once(f"most {cost}/{again}", partial(study.trained, budget.dearest(cost), again))
    for seed in map(int, seeds.split(",")):
        for name in filter(None, methods.split(";")):
            study.search(name, seed)
        for trainings in () if study.table else map(float, filter(None, halving.split(","))):
            key = f"found/random, successive halving of {trainings:g} trainings/{seed}"
            study.once(key, partial(study.halved, seed, trainings))
        for key in [key for key in study.done if key.startswith("found/") and key.endswith(f"/{seed}")]:
            architecture = study.found(key)
            for again in range(1 if study.table else SEEDS):
                study.once(f"trained/{architecture.digest}/{again}", partial(study.trained, architecture, again))
    for seed in () if study.table else range(1, REPEATS):
        for number, architecture in enumerate(pool[:REPEATED]):
            study.once(f"pool/{number}/{seed}", partial(study.trained, architecture, seed))


@main.command()
@click.argument("task", type=click.Choice([name for name, task in TASKS.items() if task.budget is not None]))
@click.option("--data", help="The file or folder of the data, where a task needs one.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="The folder of results.")
@click.option("--methods", default="spos whole space", help="Methods, with ; between them.")
@click.option("--seeds", default="0,1,2,3,4", help="The seeds of searches and of random fronts, with commas.")
@click.option(
    "--longer",
    default=0,
    help="Epochs of random networks that take as long as a search and the fine-tuning of what it found for all "
    "budgets; these two are then compared, in place of networks that are all trained from scratch for as long.",
)
def front(task: str, data: str | None, out: Path, methods: str, seeds: str, longer: int) -> None:
    """Compare fronts over budgets: what one search gives for each, and random networks, one or two for each."""
    study = click.get_current_context().with_resource(Study(task, out / f"{task}_front.jsonl", data))
    names = [*filter(None, methods.split(";"))]
    for seed in map(int, seeds.split(",")):
        for name in names:
            (study.front_at_once if longer else study.front)(name, seed)
        study.random_front(f"random, {longer} epochs" if longer else "random", seed, epochs=longer or None)
    for seed in () if longer else map(int, seeds.split(",")):
        study.random_front("another random", seed, 500)
    for share in () if longer else FRONT:
        most = Budget(study.space(), study.budget(share)).dearest("params")
        study.once(f"front/most params/{share}/0", partial(study.trained, most, 0))
    _print_fronts(study.done)


@main.command()
@click.argument("task", type=click.Choice(list(TASKS)))
@click.option("--data", help="The file or folder of the data, where a task needs one.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="The folder of results.")
@click.option("--optimizer", default="drnas", help="A method whose weights learn in mixtures.")
@click.option("--seeds", default="0,1,2", help="The seeds of the searches, with commas between them.")
@click.option("--table", help="The table of a task that trains nothing.")
def paths(task: str, data: str | None, out: Path, optimizer: str, seeds: str, table: str | None) -> None:
    """Rank the pool by a supernet of mixtures, before and after epochs of random architectures."""
    study = click.get_current_context().with_resource(Study(task, out / f"{task}.jsonl", data, table=table))
    pool = [study.once(f"pool/{i}/0", partial(study.trained, one, 0)) for i, one in enumerate(study.pool())]
    for seed in map(int, seeds.split(",")):
        study.paths(optimizer, seed)
    click.echo("| epochs of random architectures | rank correlation, each seed | mean loss of the pool | seconds |")
    click.echo("| --- | --- | --- | --- |")
    for epochs in (0, *PATHS):
        rows = [study.done[f"paths/{optimizer}/{epochs}/{seed}"] for seed in seeds.split(",")]
        truth = [row["test_loss"] for row in pool]
        ranks = ", ".join(f"{stats.spearmanr(row['pool_losses'], truth).statistic:.2f}" for row in rows)
        means = ", ".join(f"{np.mean(row['pool_losses']):.3f}" for row in rows)
        click.echo(f"| {epochs} | {ranks} | {means} | {np.mean([row['seconds'] for row in rows]):.0f} |")


@main.command()
@click.argument("task", type=click.Choice([name for name, task in TASKS.items() if task.metric is None]))
@click.option("--data", help="The file or folder of the data, where a task needs one.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="The folder of results.")
@click.option("--seeds", default="0,1,2", help="The seeds of the searches, with commas between them.")
@click.option("--train/--no-train", default=True, help="Whether networks that were found are trained.")
def ablate(task: str, data: str | None, out: Path, seeds: str, train: bool) -> None:
    """Change one thing of a search at a time, and say how its supernet ranks the pool and what it finds."""
    study = click.get_current_context().with_resource(Study(task, out / f"{task}.jsonl", data))
    pool = [study.once(f"pool/{i}/0", partial(study.trained, one, 0)) for i, one in enumerate(study.pool())]
    for seed in map(int, seeds.split(",")):
        for name in ABLATIONS:
            study.ablation(name, seed)
    for key in [key for key in study.done if key.startswith("ablation/") and train]:
        architecture = study.found(key)
        study.once(f"trained/{architecture.digest}/0", partial(study.trained, architecture, 0))
    _print_ablations(study.done, [row["test_loss"] for row in pool])


def _print_ablations(rows: dict[str, dict[str, Any]], truth: Sequence[float]) -> None:
    """Print how each search ranks the pool, by loss and by accuracy, and the test losses of what it found."""
    click.echo("| search | ranks by loss | by accuracy | derived by | test loss, 95 % interval | each seed | seconds |")
    click.echo("| --- | --- | --- | --- | --- | --- | ---: |")
    good = [-loss for loss in truth]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, row in rows.items():
        if key.startswith("ablation/"):
            _, name, derivation, _ = key.split("/")
            groups.setdefault((name, derivation), []).append(row)
    for (name, derivation), results in groups.items():
        losses, right = (
            [rank_correlations([sign * value for value in row[key]], good)["spearman"] for row in results]
            for key, sign in (("pool_losses", -1), ("pool_accuracies", 1))
        )
        worth = np.array([rows[key]["test_loss"] for row in results if (key := f"trained/{row['digest']}/0") in rows])
        seconds = np.mean([row["search_seconds"] + row["derive_seconds"] for row in results])
        click.echo(
            f"| {name} | {_listed(losses, 2)} | {_listed(right, 2)} | {derivation} | "
            f"{_told(worth)} | {_listed(worth, 3)} | {seconds:.0f} |"
        )


def _listed(values: Sequence[float] | np.ndarray[Any, Any], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


@main.command()
@click.argument("task", type=click.Choice([name for name, task in TASKS.items() if task.metric is None]))
@click.option("--data", help="The file or folder of the data, where a task needs one.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="The folder of results.")
@click.option("--networks", default="0,5,10", help="Networks of the pool, with commas between them.")
@click.option("--epochs", "longer", default="24", help="Epochs from scratch, with commas between them.")
@click.option("--methods", default="short spos band;spos band", help="Searches to fine-tune from, with ; between them.")
@click.option(
    "--tuned", default="", help="Epochs of fine-tuning, with commas between them; by default those of the task."
)
def lengths(task: str, data: str | None, out: Path, networks: str, longer: str, methods: str, tuned: str) -> None:
    """Train networks of the pool for longer, and from the weights of a search: what time is worth without a choice."""
    study = click.get_current_context().with_resource(Study(task, out / f"{task}.jsonl", data))
    numbers, pool = [int(number) for number in networks.split(",")], study.pool()
    for epochs in map(int, filter(None, longer.split(","))):
        for number in numbers:
            study.once(f"lengths/scratch/{epochs}/{number}", partial(study.trained, pool[number], 0, epochs=epochs))
    for name in filter(None, methods.split(";")):
        for epochs in map(int, filter(None, tuned.split(","))) if tuned else [study.task.epochs]:
            study.tuned(name, 0, numbers, epochs)
    click.echo("| from | epochs | networks | test loss, each | the same from scratch, as long as the task | seconds |")
    click.echo("| --- | ---: | --- | --- | --- | ---: |")
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for key, row in study.done.items():
        if key.startswith("lengths/") and key.count("/") == 3:
            _, name, epochs, number = key.split("/")
            groups.setdefault((name, epochs), {})[number] = row
    for (name, epochs), rows in groups.items():
        first = study.done.get(f"lengths/{name}/search", {"seconds": 0.0})["seconds"]
        alone = [study.done[f"pool/{number}/0"]["test_loss"] for number in rows]
        click.echo(
            f"| {name} | {epochs} | {', '.join(rows)} | {_listed([row['test_loss'] for row in rows.values()], 3)} | "
            f"{_listed(alone, 3)} | {first + np.mean([row['seconds'] for row in rows.values()]):.0f} |"
        )


@main.command()
@click.argument("task", type=click.Choice([name for name, task in TASKS.items() if task.metric is not None]))
@click.option("--data", required=True, help="The file or folder of the data.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="The folder of results.")
@click.option("--count", default=24, help="Networks of the pool.")
@click.option("--table", required=True, help="The table.")
def alone(task: str, data: str, out: Path, count: int, table: str) -> None:
    """Train networks of the pool by themselves, as short as the task has it, and rank them as the table does."""
    study = click.get_current_context().with_resource(Study(task, out / f"{task}.jsonl", data, table=table))
    pool = study.pool()[:count]
    errors = [study.trained(one, 0)["test_loss"] for one in pool]
    rows = [study.once(f"alone/{i}/0", partial(study.trained, one, 0, alone=True)) for i, one in enumerate(pool)]
    for name, sign in (("test_accuracy", -1), ("test_loss", 1)):
        click.echo(f"{name}: {_spearman([sign * row[name] for row in rows], errors)} with the table")


def _print_fronts(rows: dict[str, dict[str, Any]]) -> None:
    """Print the hypervolume of each front below the worst network of all, which costs 1.1 times the dearest."""
    fronts: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}  # by method, seed and budget
    for key, row in rows.items():
        if key.startswith("front/"):
            _, name, share, seed = key.split("/")
            trained = row if "test_loss" in row else {**row, **rows.get(f"trained/{row['digest']}/{seed}", {})}
            if "test_loss" not in trained:
                continue
            fronts.setdefault(name, {}).setdefault(seed, {})[share] = trained
    for name, runs in [*fronts.items()]:  # a front that was cut off counts when it is complete
        fronts[name] = {seed: points for seed, points in runs.items() if len(points) == len(FRONT)}
    random, another = fronts.get("random", {}), fronts.get("another random", {})
    fronts["the better random one by validation"] = {
        seed: {
            share: min(one, another[seed][share], key=lambda row: row["validation_loss"])
            for share, one in points.items()
        }
        for seed, points in random.items()
        if seed in another
    }
    fronts = {name: runs for name, runs in fronts.items() if runs}
    if not fronts:
        raise click.UsageError(f"there is no whole front, of the budgets {FRONT}: run `benchmarks.finding front`")
    every = [row for runs in fronts.values() for points in runs.values() for row in points.values()]
    dearest, worst = max(row["macs"] for row in every), max(row["test_loss"] for row in every)
    volume = HV(ref_point=np.array([1.1, worst]))
    volumes = {
        name: {
            seed: volume(np.array([(row["macs"] / dearest, row["test_loss"]) for row in points.values()]))
            for seed, points in runs.items()
        }
        for name, runs in fronts.items()
    }
    click.echo("| method | hypervolume, 95 % interval | ahead of random by | each seed | mean test loss by budget |")
    click.echo("| --- | --- | --- | --- | --- |")
    for name, by_seed in volumes.items():
        values = np.array([*by_seed.values()])
        means = np.mean([[points[str(share)]["test_loss"] for share in FRONT] for points in fronts[name].values()], 0)
        ahead = np.array([value - volumes["random"][seed] for seed, value in by_seed.items() if seed in random])
        click.echo(
            f"| {name} | {_told(values)} | {_told(ahead)} | {', '.join(f'{v:.4f}' for v in values)} "
            f"| {', '.join(f'{mean:.3f}' for mean in means)} |"
        )


def _told(values: np.ndarray[Any, Any]) -> str:
    """Return a mean, with its 95 % interval if there are several values; "" for none."""
    if len(values) < 2:
        return f"{values[0]:.4f}" if len(values) else ""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.4f} +- {half:.4f}"


@main.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
def table(path: Path) -> None:
    """Print what the results in the file PATH say, as far as they are there."""
    rows = {row["key"]: row for row in map(json.loads, path.read_text("utf-8").splitlines())}
    if any(key.startswith("front/") for key in rows):
        _print_fronts(rows)
        return
    pool = [row for key, row in rows.items() if key.startswith("pool/") and key.endswith("/0")]
    if not pool:
        raise click.UsageError(f"{path} has no training of the pool: give a file that `benchmarks.finding run` wrote")
    trainings = _trainings(rows)
    # A network is worth what it is over its seeds: one training of many goes wrong.
    worth = {digest: float(np.mean([*by_seed.values()])) for digest, by_seed in trainings.items()}
    losses = np.array([worth[row["digest"]] for row in pool])
    repeated = [np.var([*by_seed.values()], ddof=1) for by_seed in trainings.values() if len(by_seed) > 1]
    deviation = f"{np.mean(repeated) ** 0.5:.4f} ({len(repeated)} networks)" if repeated else "unknown"
    click.echo(
        f"pool of {len(pool)}: test loss {losses.min():.4f} best, {np.median(losses):.4f} median, {losses.max():.4f} "
        f"worst, deviation {losses.std(ddof=1):.4f}; between seeds {deviation}; "
        f"{np.mean([row['seconds'] for row in pool]):.0f} s a training"
    )
    click.echo(
        "the validation loss ranks the test loss: "
        + _spearman([r["validation_loss"] for r in pool], [r["test_loss"] for r in pool])
    )
    seconds = ((row, rows.get(_repeated(key))) for key, row in rows.items())
    twice = [(row["test_loss"], other["test_loss"]) for row, other in seconds if other]
    if len(twice) > 2:
        click.echo(
            f"a second training ranks {len(twice)} networks as the first: " + _spearman(*zip(*twice, strict=True))
        )
    reliable = 1 - np.mean(repeated) / losses.var(ddof=1) if repeated else math.nan
    click.echo(f"no ranking can agree with one training of each network by more than {math.sqrt(max(reliable, 0)):.2f}")
    # A race, and a person who trains several networks, keep the weights of the best training: its luck stays.
    click.echo(
        "| method | test loss, 95 % interval | as first trained | each seed | worse in the pool, % | ranks the pool "
        "| seconds |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- | --- |")
    first = {digest: by_seed[0] for digest, by_seed in trainings.items() if 0 in by_seed}
    single = np.mean([row["test_loss"] for row in pool])
    each = np.mean([row["seconds"] for row in pool])
    click.echo(f"| one random network | {losses.mean():.4f} | {single:.4f} | | 50 | | {each:.0f} |")
    epochs = len(_curve(pool[0]))
    for count in (count for count in (3, 10) if count <= len(pool)):
        again, once = (_raced(pool, values, [Rung(count, epochs)]) for values in (worth, first))
        click.echo(f"| best of {count} by validation loss | {again:.4f} | {once:.4f} | | | | {count * each:.0f} |")
    for trainings in HALVINGS if epochs > 1 else ():
        rungs = plan(min(16, len(pool)), epochs, trainings=trainings)
        again, once = (_raced(pool, values, rungs) for values in (worth, first))
        name = f"successive halving of {rungs[0].networks} random networks"
        click.echo(f"| {name} | {again:.4f} | {once:.4f} | | | | {work(rungs) / epochs * each:.0f} |")
    for cost in ("params", "macs"):
        if f"most {cost}/0" in rows:
            loss = worth[rows[f"most {cost}/0"]["digest"]]
            once = first[rows[f"most {cost}/0"]["digest"]]
            click.echo(
                f"| most {cost} | {loss:.4f} | {once:.4f} | | {100 * np.mean(losses > loss):.0f} | | {each:.0f} |"
            )
    listed = {row["digest"]: row["rank"] for row in rows.values() if "rank" in row}
    found: dict[str, list[dict[str, Any]]] = {}
    for key, row in rows.items():
        if key.startswith("found/") and row["digest"] in worth:
            found.setdefault(key.split("/")[1], []).append(row)
    for name, results in found.items():
        values = np.array([worth[row["digest"]] for row in results])
        numbers = [int(row["key"].split("/")[1]) for row in pool]
        ranks = [
            stats.spearmanr([row["pool_losses"][i] for i in numbers], losses).statistic
            for row in results
            if "pool_losses" in row
        ]
        once = np.mean([first[row["digest"]] for row in results])
        click.echo(
            f"| {name} | {_told(values)} | {once:.4f} "
            f"| {', '.join(f'{value:.3f}' for value in values)} "
            f"| {100 * np.mean(losses[None] > values[:, None]):.0f} | {', '.join(f'{rank:.2f}' for rank in ranks)} "
            f"| {np.mean([row['search_seconds'] + row['derive_seconds'] for row in results]):.0f} |"
            + (f" ranks {[listed[row['digest']] for row in results]}" if listed else "")
        )


def _trainings(rows: dict[str, dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Return the test loss of each network by digest and seed.

    A network of the pool that was found, too, has one training for a seed under two keys. Other recipes, such as those
    of `alone`, do not count.
    """
    found: dict[str, dict[int, float]] = {}
    for key, row in rows.items():
        kind, *_, seed = key.split("/")
        if kind in ("pool", "trained", "most params", "most macs"):
            found.setdefault(row["digest"], {})[int(seed)] = row["test_loss"]
    return found


def _repeated(key: str) -> str:
    """Return the key of the second training of a network of the pool; "" for other keys."""
    return key.removesuffix("/0") + "/1" if key.startswith("pool/") and key.endswith("/0") else ""


def _spearman(one: Sequence[float], other: Sequence[float] | np.ndarray[Any, Any]) -> str:
    """Return Spearman's correlation with its standard error under independence."""
    return f"{stats.spearmanr(one, other).statistic:.2f} +- {1 / math.sqrt(len(one) - 1):.2f}"


def _raced(pool: Sequence[dict[str, Any]], worth: dict[str, float], rungs: Sequence[Rung]) -> float:
    """Return the mean worth of the winners of many races between random networks of the pool, by their trainings."""
    generator, found = np.random.default_rng(0), []
    curves = [_curve(row) for row in pool]
    for _ in range(10_000):
        running = generator.choice(len(pool), rungs[0].networks, replace=False).tolist()
        for rung in rungs:
            running = sorted(running[: rung.networks], key=lambda number: curves[number][rung.epochs - 1])
        found.append(worth[pool[running[0]]["digest"]])
    return float(np.mean(found))


def _curve(row: dict[str, Any]) -> list[float]:
    """Return the validation losses of a training; a single one if a table stands for it."""
    return row.get("curve") or [row["validation_loss"]]


if __name__ == "__main__":
    main()
