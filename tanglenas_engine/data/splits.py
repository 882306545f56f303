"""Four disjoint splits of a dataset, seeded and of one distribution, and views that reach only some of them."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tanglenas_engine.errors import OutOfReachError, TangleNASError, at_least, closest, quoted, unknown
from tanglenas_engine.runtime import strict_json
from tanglenas_engine.runtime.seeding import checked_seed

from .dataset import Dataset, Samples, widened

_LETTERS = {"weights": "w", "architecture": "a", "validation": "v", "test": "t"}
"""The letter of each split in `Splits.assignment`."""

_UNUSED = "-"
"""The letter of samples that `make_splits` was told to leave out."""

SPLITS = (*_LETTERS, "training")
"""The names that `open_splits` accepts. "training" is weights and architecture together, for the final training."""

_VERSION = 1
"""The version of the splits file format."""

PLAIN_SAMPLES = 4096
"""Samples of an augmented split that a view also has without augmentation, at most: evenly spaced in the split.

Stages that measure networks on an augmented split, such as the candidates of discretize, measure them on these.
"""

_STRATUM = 20
"""Blocks of consecutive samples among which every split has its share."""


@dataclass(frozen=True)
class Splits:
    """The assignment of every sample of a dataset to one split.

    It stores one letter per sample of the pool: w(eights), a(rchitecture), v(alidation) or t(est). So the splits are
    disjoint and cover the pool by construction, and a splits file is small. A sample that is in no split has a "-".

    Attributes:
        dataset: The name of the dataset.
        fingerprint: The fingerprint of the dataset.
        seed: The seed of the splits.
        assignment: One letter per sample of the pool.
    """

    dataset: str
    fingerprint: str
    seed: int
    assignment: str

    def indices(self, name: str) -> Tensor:
        """Return the positions in the pool of one of `SPLITS`, ascending, shape (n,), int64."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        letters = "wa" if name == "training" else _LETTERS[name]
        assignment = np.frombuffer(self.assignment.encode("ascii"), np.uint8)
        return torch.from_numpy(np.flatnonzero(np.isin(assignment, np.frombuffer(letters.encode(), np.uint8))))

    @property
    def weights(self) -> Tensor:
        return self.indices("weights")

    @property
    def architecture(self) -> Tensor:
        return self.indices("architecture")

    @property
    def validation(self) -> Tensor:
        return self.indices("validation")

    @property
    def test(self) -> Tensor:
        return self.indices("test")

    @property
    def training(self) -> Tensor:
        return self.indices("training")

    def sizes(self) -> dict[str, int]:
        """Return the number of samples in each of the four splits."""
        count = Counter(self.assignment)
        return {name: count[letter] for name, letter in _LETTERS.items()}

    def to_json(self) -> str:
        """Return the file's text. Equal splits give equal bytes."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a text that `to_json` wrote.

        Raises:
            TangleNASError: The text is not a splits file, or has another version.
        """
        remake = "Make the splits again with make_splits(dataset, seed=...)."
        try:
            fields: Any = strict_json.loads(text)
        except ValueError as error:
            raise TangleNASError(f"this is no splits file: {error}. {remake}") from error
        types = {"version": int, "dataset": str, "fingerprint": str, "seed": int, "assignment": str}
        if not isinstance(fields, dict) or {name: type(value) for name, value in fields.items()} != types:
            raise TangleNASError(f"a splits file is a JSON object with the fields {', '.join(types)}. {remake}")
        if (version := fields.pop("version")) != _VERSION:
            raise TangleNASError(f"splits file of version {version}; this release reads {_VERSION}. {remake}")
        if strange := set(fields["assignment"]) - {*_LETTERS.values(), _UNUSED}:
            raise TangleNASError(f"splits file: strange letters {sorted(strange)} in 'assignment'. {remake}")
        return cls(**fields)

    def check(self, dataset: Dataset) -> None:
        """Check that these splits were made for exactly this dataset.

        Raises:
            TangleNASError: The splits were made for another dataset, or for other content.
        """
        made_for = (self.dataset, self.fingerprint, len(self.assignment))
        given = (dataset.name, dataset.fingerprint, len(dataset))
        if made_for != given:
            text = "{} (fingerprint {:.12}, {} samples)"
            raise TangleNASError(
                f"these splits were made for {text.format(*made_for)} and do not fit {text.format(*given)}. "
                "Put the data back as they were, or search with those that are there now: in a project `dvc repro` "
                "runs the search again, or `dvc repro --force-downstream search` where no option names the data, and "
                "elsewhere make_splits(dataset, seed=...) makes new splits"
            )


def make_splits(
    dataset: Dataset,
    *,
    seed: int,
    train_portion: float = 0.5,
    validation_portion: float = 0.1,
    test_portion: float = 0.2,
    block: int = 8,
    samples: int | None = None,
) -> Splits:
    """Split a dataset into weights, architecture, validation and test, with equal shares of every class.

    The test split is cut first, then validation, then the other two. So `train_portion` does not affect the validation
    split, and only `test_portion` affects the test split.

    A dataset without labels, such as text, is cut into blocks of consecutive samples. The seed deals them to the
    splits, so that every split has its share of every part of the text. With one long segment per split, each split
    would be another text, and alpha and the candidates would be judged on what the weights never saw.

    Args:
        dataset: The dataset.
        seed: Equal seeds and portions give equal splits.
        train_portion: The share of the weights split in weights and architecture together.
        validation_portion: The share of the samples outside test that is held out to compare trained networks.
        test_portion: The share of the pool to test on. It is unused if the dataset has an official test part.
        block: The number of consecutive samples that stay together where there are no labels. With longer blocks, fewer
            samples have a neighbour in another split. Shorter ones spread better. A short text has shorter blocks.
        samples: The number of samples outside test that are used, of every class its share. None takes all.

    Raises:
        TangleNASError: The seed is no whole number from 0 to 2**63 - 1, a portion is not strictly between 0 and 1,
            there are fewer than `samples`, a split would be empty, labels are no classes of the dataset, there is not
            one name for each class, or a class has too few samples to be in both the weights and the architecture
            split. (A rare class may be missing from validation or test.)
    """
    portions = {
        "train_portion": train_portion,
        "validation_portion": validation_portion,
        "test_portion": test_portion,
    }
    for name, portion in portions.items():
        if not isinstance(portion, Real) or not 0 < portion < 1:
            raise TangleNASError(f"{name} is {quoted(portion)}; give a share strictly between 0 and 1, such as 0.1.")

    seed = checked_seed("make_splits.seed", seed)
    at_least("make_splits.block", block, 1)
    generator = np.random.default_rng(seed)
    labels = None if dataset.labels is None else _labels(dataset)
    letters = np.full(len(dataset), b"t", "S1")
    pool = np.arange(len(dataset))
    if dataset.test_indices is not None:
        pool = np.setdiff1d(pool, _official_test(dataset))
    pool = _dealt(pool, block, generator) if labels is None else pool[_spread(labels[pool], generator)]
    if dataset.test_indices is None:
        pool = pool[round(test_portion * len(pool)) :]
    if samples is not None:
        if at_least("make_splits.samples", samples, 3) > len(pool):
            raise TangleNASError(
                f"make_splits.samples is {samples}, but {dataset.name} has {len(pool)} samples outside test. Use at "
                "most so many, or None for all."
            )
        pool, unused = np.split(pool, [samples])
        letters[unused] = _UNUSED
    validation, training = np.split(pool, [round(validation_portion * len(pool))])
    weights, architecture = np.split(training, [round(train_portion * len(training))])
    for letter, members in ((b"v", validation), (b"w", weights), (b"a", architecture)):
        letters[members] = letter

    splits = Splits(dataset.name, dataset.fingerprint, seed, letters.tobytes().decode("ascii"))
    if empty := [name for name, size in splits.sizes().items() if size == 0]:
        raise TangleNASError(
            f"{dataset.name} has {len(dataset)} samples, too few for these portions: {', '.join(empty)} would "
            f"be empty (train {train_portion}, validation {validation_portion}, test {test_portion}). "
            "Use more data or larger shares."
        )
    if labels is None:
        return splits
    for name, members in (("weights", weights), ("architecture", architecture)):
        count = np.bincount(labels[members], minlength=dataset.num_classes)
        if not count.all():
            rare = int(count.argmin())
            raise TangleNASError(
                f"class {dataset.class_names[rare]!r} of {dataset.name} has {(labels[pool] == rare).sum()} "
                f"samples outside test, too few: none would be in the {name} split. Add samples, drop the "
                f"class, or move the portions (train {train_portion}, validation {validation_portion})."
            )
    return splits


def _spread(labels: np.ndarray[Any, Any], generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return an order of `labels` in which every segment has its share of each class, to within about one sample."""
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        # Without the random offset, all classes of the same size would be rounded to the same side of a cut.
        place[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.argsort(place, kind="stable")


def _dealt(pool: np.ndarray[Any, Any], block: int, generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return consecutive samples in an order in which every segment has blocks from every part of the pool."""
    block = min(block, max(1, len(pool) // (2 * _STRATUM)))
    blocks = [pool[start : start + block] for start in range(0, len(pool), block)]
    order = _spread(np.arange(len(blocks)) // _STRATUM, generator)
    return np.concatenate([blocks[number] for number in order])


class DataView:
    """The splits that a stage may see, as attributes: `view.weights.batch(...)`.

    It holds the samples of the opened splits only: neither the dataset nor other indices. Reading another split raises
    an OutOfReachError.
    """

    def __init__(self, samples: dict[str, Samples], plain: dict[str, Samples] | None = None) -> None:
        self._samples, self._plain = dict(samples), dict(plain or {})

    def plain(self, name: str) -> Samples:
        """Return up to `PLAIN_SAMPLES` samples of an opened split without augmentation, to measure networks on."""
        return self._plain.get(name) or getattr(self, name)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the opened splits."""
        return tuple(self._samples)

    def __getattr__(self, name: str) -> Samples:
        if name not in SPLITS:
            raise AttributeError(f"a data view has no attribute {name!r}.{closest(name, SPLITS)}")
        if name not in self._samples:
            raise OutOfReachError(
                f"the {name} split is out of reach: this stage sees {', '.join(self._samples) or 'no split'} "
                "only, so that its result can be judged on data that had no part in it. A stage that may "
                f"read it opens it by name: open_splits(dataset, splits, [..., {name!r}])."
            )
        return self._samples[name]


def open_splits(dataset: Dataset, splits: Splits, names: Iterable[str], *, augment: bool = True) -> DataView:
    """Return a view of the named splits only.

    Args:
        dataset: The dataset.
        splits: The splits of this dataset.
        names: Names from `SPLITS`.
        augment: True applies the dataset's augmentation to weights, architecture and training. Validation and test are
            never augmented.

    Raises:
        TangleNASError: A name is unknown, or the splits are of another dataset.
    """
    splits.check(dataset)
    indices = {name: splits.indices(name) for name in names}
    augmented = {name for name in indices if augment and name not in ("validation", "test")}
    return DataView(
        {name: dataset.subset(chosen, train=name in augmented) for name, chosen in indices.items()},
        {name: dataset.subset(_evenly(indices[name], PLAIN_SAMPLES), train=False) for name in augmented},
    )


def _labels(dataset: Dataset) -> Any:
    """Return the labels of the whole pool.

    Raises:
        TangleNASError: They are not one class for each sample, or there is not one name for each class.
    """
    found: Any = dataset.labels  # of somebody's plugin
    found = widened(found) if isinstance(found, Tensor) else found
    if not (isinstance(found, Tensor) and found.dtype == torch.int64 and found.dim() == 1):
        raise TangleNASError(
            f"labels of {dataset.name} is {_kind(found)}, expected a tensor of integers of shape (N,), with the class "
            "of each sample"
        )
    if len(strange := ((found < 0) | (found >= dataset.num_classes)).nonzero()):
        position = int(strange[0])
        raise TangleNASError(
            f"labels of {dataset.name} has {int(found[position])} at position {position}, expected a class from 0 to "
            f"{dataset.num_classes - 1}: number the classes from 0 on, or correct num_classes"
        )
    if (named := len(dataset.class_names)) not in (0, dataset.num_classes):
        raise TangleNASError(
            f"class_names of {dataset.name} has {named} names for {dataset.num_classes} classes, expected one for each "
            "class: correct it, or leave it out, and the classes are called by their numbers"
        )
    return found.numpy()


def _official_test(dataset: Dataset) -> Any:
    """Return the positions of the official test samples.

    Raises:
        TangleNASError: They are no distinct positions in the pool.
    """
    found: Any = dataset.test_indices  # of somebody's plugin
    if isinstance(found, Tensor) and found.dtype == torch.int64 and found.dim() == 1:
        if len(np.unique(found)) == len(found) and bool(((found >= 0) & (found < len(dataset))).all()):
            return found.numpy()
    raise TangleNASError(
        f"test_indices of {dataset.name} is {_kind(found)}, expected a tensor of int64 with distinct positions from 0 "
        f"to {len(dataset) - 1}"
    )


def _kind(value: object) -> str:
    """Return what kind of value it is, for a message."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _evenly(indices: Tensor, count: int) -> Tensor:
    """Return up to `count` of the indices, evenly spaced."""
    return indices if len(indices) <= count else indices[torch.arange(count) * (len(indices) - 1) // (count - 1)]
