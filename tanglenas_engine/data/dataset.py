"""The interface of a dataset plugin: a pool of labelled samples or of text, and subsets that hold no other samples."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tanglenas_engine.errors import TangleNASError, quoted
from tanglenas_engine.runtime.progress import Progress


class Samples(Protocol):
    """Some samples of a dataset, numbered from 0. `DataView` and `Stream` give these to a stage."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor | None:
        """The targets of all samples, shape (N,), int64; None if a sample has many targets, as in text."""
        ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of the samples at `indices`, shape (B,).

        Images: inputs (B, C, H, W), float32 and normalised, and targets (B,), int64. Text: tokens (B, T), int64, and
        the token that follows each, (B, T), int64.

        Augmentation must draw from the global generators of torch, random and numpy. `Stream` seeds these for each
        batch. Samples must be picklable, because workers may be spawned.
        """
        ...


class Described(Protocol):
    """A description of inputs and outputs, stored beside exported weights. Every `Dataset` is one."""

    def input_config(self) -> dict[str, Any]:
        """Return how inputs are made and what outputs mean: see `Dataset.input_config`."""
        ...

    def files(self) -> dict[str, str]:
        """Return the files that inputs are made with: see `Dataset.files`."""
        ...


class Dataset(ABC):
    """A pool of N samples, including the official test part. Subclass it to write a dataset plugin.

    A dataset of images has the attributes below. In a dataset such as text, each sample follows on from the one before.
    Such a dataset has no labels, its splits are made of blocks of consecutive samples, and it overrides `__len__` and
    `space_options`.

    Attributes:
        name: The name under which the dataset is registered.
        num_classes: The number of classes.
        image_size: The height and width of the inputs, in pixels.
        in_channels: The number of channels of the inputs.
        class_names: One name per class, in the order of the labels. By default, these are the numbers of the classes.
        mean, std: The values that normalise the inputs, one per channel, for pixels from 0 to 1; None if inputs are not
            normalised.
        crop_pct: The share of an image's shorter side that the centre crop of validation and test keeps, from 0 to 1.
        labels: The targets of the whole pool, shape (N,), int64, values below `num_classes`; None if there are none.
        test_indices: The positions of the official test samples in the pool; None if there are none.
        fingerprint: A digest of which samples the pool holds, in which order, and which of them are in `test_indices`
            (`content_hash`). Two copies of the same data have the same fingerprint, wherever they are stored. Options
            of augmentation or resolution must not change it, so that splits made once serve every stage.
    """

    name: str
    num_classes: int
    image_size: int
    in_channels: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float = 1.0
    labels: Tensor | None
    test_indices: Tensor | None = None
    fingerprint: str

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.num_classes)))

    def __len__(self) -> int:
        if self.labels is None:
            raise NotImplementedError(f"{type(self).__name__} has no labels: it must say its own length")
        return len(self.labels)

    def space_options(self) -> dict[str, Any]:
        """Return the options with which a search space fits these data."""
        return {name: getattr(self, name) for name in ("num_classes", "image_size", "in_channels")}

    def input_config(self) -> dict[str, Any]:
        """Return how inputs are made and what outputs mean, as JSON can hold it. It is stored beside weights.

        For images these are `label_names`, `num_classes`, `input_size` (C, H, W), `mean`, `std`, `crop_pct` and
        `interpolation`, as timm's `pretrained_cfg` names them. A dataset whose inputs a function of the user makes has
        a description of the function as `eval_transform`, and none of the last four. For other data these are the
        options of the space, and the `label_names` of data with labels.
        """
        options = self.space_options()
        if self.labels is None:
            return options
        names = list(map(str, getattr(self, "class_names", ())))
        if not {"num_classes", "image_size", "in_channels"} <= set(options):
            return {**options, "label_names": names} if names else options
        return {
            "num_classes": self.num_classes,
            "label_names": names,
            "input_size": [self.in_channels, self.image_size, self.image_size],
            "mean": list(map(float, self.mean or (0,) * self.in_channels)),
            "std": list(map(float, self.std or (1,) * self.in_channels)),
            "crop_pct": self.crop_pct,
            "interpolation": "bilinear",
        }

    def files(self) -> dict[str, str]:
        """Return the contents, by file name, of the files that inputs are made with. They are stored beside weights."""
        return {}

    def describe(self) -> str:
        """Return lines for a person about what the data hold, printed at the start of a search; "" prints none."""
        return ""

    @classmethod
    def edition(cls) -> str:
        """Return a text that changes when data change that no option names, such as the version of their package.

        `dvc repro` runs the stages again where it does. "" is for data that never change, and for files and folders
        that options of the dataset name, as their contents count.
        """
        return ""

    def verify(self, progress: Progress, folder: Path) -> None:
        """Read all the data once. Search calls this before it trains: what cannot be read is told before it costs.

        Args:
            progress: The progress output for a person.
            folder: A folder in which the dataset may remember what it has read.

        Raises:
            TangleNASError: Some of the data cannot be read; the message names all of them.
        """
        return

    @abstractmethod
    def subset(self, indices: Tensor, *, train: bool) -> Samples:
        """Return the samples at `indices` of the pool, shape (n,), int64.

        The result must copy these rows (or paths) and hold no others, so that a stage cannot reach the rest of the
        pool.

        Args:
            indices: Positions in the pool.
            train: True asks for augmentation.
        """


class TensorSamples:
    """Samples in memory: raw rows (N, ...) and labels (N,), neither shared with the dataset.

    Args:
        rows: The raw inputs, shape (N, ...), any dtype.
        labels: The targets, shape (N,). Those of another integer type become int64.
        transform: The function from a batch of rows to float32 inputs (B, C, H, W); None uses the rows unchanged. It is
            a module-level function or a `functools.partial` of one, so that it can be sent to workers.
    """

    def __init__(self, rows: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self._rows = rows
        self._transform = transform
        self.labels = widened(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows[indices]
        return (rows if self._transform is None else self._transform(rows)), self.labels[indices]


class TokenSamples:
    """Windows of a text. A sample is T tokens, and the T tokens one position later.

    Args:
        rows: The tokens, shape (N, T + 1), integers, not shared with the dataset.
        indices: The positions of the rows in the text, shape (N,), ascending. A difference of 1 means that a row
            continues the one before.
        shift: True lets a window start up to T tokens later, at random, if the next row continues this one.
    """

    labels: Tensor | None = None

    def __init__(self, rows: Tensor, indices: Tensor, shift: bool = False) -> None:
        self._tokens = rows.flatten()
        self._length = rows.shape[1]
        self._shift = shift
        self._followed = torch.zeros(len(rows), dtype=torch.bool)
        self._followed[:-1] = indices.diff() == 1

    def __len__(self) -> int:
        return len(self._followed)

    @property
    def largest(self) -> int:
        """The largest token of all rows."""
        parts = torch.split(self._tokens, 2**20)
        return max(int(part.long().max()) for part in parts)  # torch has no maximum of uint16

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        start = indices * self._length
        if self._shift:
            start = start + torch.randint(self._length, indices.shape) * self._followed[indices]
        window = self._tokens[start[:, None] + torch.arange(self._length)].long()  # (B, T + 1)
        return window[:, :-1], window[:, 1:]


class SampleSubset:
    """A subset of samples, by their indices.

    Args:
        samples: The samples of which it is a subset.
        indices: The indices of the subset, shape `(n,)`.
    """

    def __init__(self, samples: Samples, indices: Tensor):
        self._samples, self._indices = samples, indices
        self.labels = None if samples.labels is None else samples.labels[indices.to(samples.labels.device)]

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._samples.batch(self._indices[indices])


def widened(whole: Tensor) -> Tensor:
    """Return whole numbers of any type as int64, which torch's losses take, and other tensors as they are."""
    other = whole.is_floating_point() or whole.is_complex() or whole.dtype == torch.bool
    return whole if other else whole.long()


def content_hash(*parts: str | bytes | Tensor) -> str:
    """Return a digest (64 hexadecimal digits) of texts, bytes and CPU tensors, including their types and shapes.

    A text may be the name of a file that is not UTF-8, as Python has it.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            kind = f"{part.dtype} {tuple(part.shape)}"
            # Of bytes, as NumPy has no bfloat16. torch cuts elements into bytes along a dimension of stride 1.
            content = part.detach().contiguous().unsqueeze(-1).view(torch.uint8).flatten().numpy().data
        else:
            content = memoryview(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
            kind = type(part).__name__
        digest.update(f"{kind} {content.nbytes}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def data_path(path: str | os.PathLike[str]) -> Path:
    """Return where data lie that a person named: a relative path is one under the current folder or the project's root.

    `dvc exp run --queue` and `--temp` run stages in a copy of the project without the files that git ignores. DVC tells
    the root of the project itself in `$DVC_ROOT`.

    Raises:
        TangleNASError: It is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TangleNASError(f"the path of data is {quoted(path)}, expected a text such as 'data/images'")
    path = Path(path)
    return path if path.is_absolute() or path.exists() else Path(os.environ.get("DVC_ROOT", ""), path)
