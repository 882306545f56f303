"""Trainings of single networks by the project's own recipe, in any process: those of pools and of races."""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gin

import tanglenas_engine
from tanglenas_engine.data import Dataset, DataView, Splits, open_splits
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.jobs import Trained
from tanglenas_engine.derivation.race import Raced
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config import configurables
from tanglenas_engine.pipeline.config.configurables import create, packages, race, retrain
from tanglenas_engine.pipeline.config.params import stage_arguments
from tanglenas_engine.pipeline.config.reader import configured
from tanglenas_engine.pipeline.config.values import macro_value
from tanglenas_engine.pipeline.files import SPLITS, SUPERNET, inherits, load_inherited
from tanglenas_engine.pipeline.inputs.own_code import own_code
from tanglenas_engine.pipeline.inputs.same_inputs import check_same_inputs
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.fingerprint import code_version, file_digest, fingerprint
from tanglenas_engine.runtime.progress import SilentProgress
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.stages.retrain import Kept, RetrainResult, trained
from tanglenas_engine.superposition.mixture import Mixture


def code_behind() -> dict[str, str]:
    """Return digests of the code that the config's trainings run: of its packages, and of files of the project."""
    return {package.__name__: code_version(package) for package in packages()} | own_code()


@dataclass(frozen=True)
class Recipe:
    """The recipe of the retrain stage, which a worker gets as text.

    Attributes:
        arguments: The gin files and bindings of the stage.
        folder: The root of the project, to which paths are relative.
        splits: The text of the splits' file.
    """

    arguments: tuple[str, ...]
    folder: str
    splits: str

    @contextlib.contextmanager
    def open(self, seed: int | None = None) -> Iterator[Bench]:
        """Configure gin by the recipe until the block ends, and make what trainings need.

        Args:
            seed: The seed of the trainings; None takes that of the recipe.
        """
        own = () if seed is None else (f"SEED = {seed}",)
        with contextlib.chdir(self.folder), configured((*self.arguments, *own)):
            found, space, dataset = create()
            yield Bench(found, space, dataset, Splits.from_json(self.splits))


@dataclass(frozen=True)
class Bench:
    """A place to train networks, under the config of the retrain stage."""

    seed: int
    space: SearchSpace
    dataset: Dataset
    splits: Splits

    def data(self, *names: str) -> DataView:
        """Open splits of the dataset."""
        return open_splits(self.dataset, self.splits, names)

    def train(self, architecture: Architecture, **options: Any) -> RetrainResult:
        """Train a network as the retrain stage does.

        Raises:
            TangleNASError: The training failed.
        """
        device = os.environ.get("TANGLENAS_DEVICE") or None
        found: RetrainResult = retrain(
            self.space, architecture, self.data("training", "validation"), seed=self.seed, device=device, **options
        )
        return found


def project_arguments(*bindings: str) -> tuple[str, ...] | None:
    """Return the arguments of the project's retrain stage, from scratch and without a teacher.

    They are None if this folder is no project.
    """
    arguments = stage_arguments("retrain")
    alone = ('retrain.mode = "scratch"', "retrain.teacher = None", "retrain.teacher_hidden = 0.0")
    return None if arguments is None else (*arguments, *alone, *bindings)


def refuse_race() -> None:
    """Refuse a race under the config of a retrain stage that trains nothing.

    Raises:
        TangleNASError: `retrain.mode` is "inherit".
    """
    if gin.get_bindings("retrain").get("mode") == "inherit":
        raise TangleNASError(
            "retrain.mode is 'inherit', which trains nothing, so a race of trainings says nothing about it: "
            "set retrain.mode to 'finetune' or 'scratch', or discretize.method to 'both'"
        )


TRAININGS = Path(".tanglenas", "trainings")
"""The folder for checkpoints of trainings that a race may go on with."""


@dataclass(frozen=True)
class ProjectTraining:
    """A function that a race trains by: the recipe, the epochs of a complete training, and a digest of both."""

    recipe: Recipe
    epochs: int
    identity: str

    @classmethod
    def here(cls) -> ProjectTraining:
        """Return the training of this project's retrain stage, for the space, dataset and seed of this stage.

        Raises:
            TangleNASError: This folder is no project, its retrain stage trains nothing, or it fine-tunes the supernet
                with a space of another size.
        """
        macros = [f"{name} = {macro_value(name)!r}" for name in ("SPACE", "DATASET", "SEED")]
        arguments = stage_arguments("retrain")
        if arguments is None:
            raise TangleNASError(
                "discretize.method 'race' trains by the recipe of the retrain stage, and this folder has none: it "
                "lacks params.yaml, dvc.yaml with a stage 'retrain', or a gin file of that stage. Use another method"
            )
        recipe = Recipe((*arguments, *macros), str(Path.cwd()), SPLITS.read_text("utf-8", errors="replace"))
        with configured(recipe.arguments):
            refuse_race()
            if inherits():
                _, space, dataset = create()  # refused here, before anything is judged, if they do not fit
                check_same_inputs("retrain", dataset, (SUPERNET,), SilentProgress())
                load_inherited(space)
            default = inspect.signature(tanglenas_engine.retrain).parameters["epochs"].default
            code = code_behind()
            weights = file_digest(SUPERNET) if inherits() else ""
            identity = fingerprint(config=gin.config_str(), splits=recipe.splits, code=code, weights=weights)
            epochs = gin.get_bindings("retrain").get("epochs", default)
        return cls(recipe, epochs, identity)

    @property
    def folder(self) -> Path:
        """The folder for checkpoints, one folder for each network, until the race is over."""
        return Path(self.recipe.folder, TRAININGS, self.identity[:16])

    def __call__(self, architecture: Architecture, epochs: int) -> Trained:
        """Train the network of an architecture until so many epochs of its training are finished.

        Raises:
            DivergedError: The training diverged.
            TangleNASError: An option is out of its range, or a file cannot be written.
        """
        with self.recipe.open() as bench:
            load_inherited(bench.space)
            # The network of the recipe may be larger than that of the search.
            own = bench.space.architecture_of(bench.space.assignment_of(architecture))
            kept = Kept(self.folder, self.identity)
            return trained(partial(bench.train, own, epochs=self.epochs, until=epochs), own, kept)


def _race(candidates: Candidates, mixture: Mixture | None) -> Raced | None:
    """Run a race by the project's own recipe."""
    training = ProjectTraining.here()
    raced: Raced | None = race(candidates, mixture, training)
    if distributed.rank() == 0:
        shutil.rmtree(training.folder, ignore_errors=True)
    return raced


methods = {**configurables.methods, "race": _race}
"""Ways to derive an architecture. Their options are bound by their names: `evolution.population = 50`."""
