"""What a dataset plugin provides: a pool of samples, labelled or of text, and subsets of it that hold nothing else."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Samples(Protocol):
    """Some samples of a dataset, numbered from 0. `DataView` and `Stream` hand these to a stage."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor | None:
        """The targets of all samples, shape (N,), int64; None where a sample has many, as in text."""
        ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, C, H, W), float32 and normalised, and targets (B,) of the samples at `indices` (B,).

        Of text: tokens (B, T), int64, and the token that follows each, (B, T), int64.

        Augmentation draws from the global generators of torch, random and numpy: `Stream` seeds those for
        each batch. Samples must be picklable: workers may be spawned.
        """
        ...


class Dataset(ABC):
    """A pool of N samples, the official test part included. Subclass it to write a dataset plugin.

    A dataset of images has the attributes below. One whose samples follow each other, such as text, has no labels:
    its splits are made of blocks of consecutive samples. It says its own `__len__` and `space_options`.

    Attributes:
        name: The name it is registered under.
        num_classes: Number of classes.
        image_size: Height and width of the inputs, in pixels.
        in_channels: Channels of the inputs.
        class_names: One name per class, in the order of the labels.
        mean, std: With which inputs are normalised, one per channel, of pixels from 0 to 1; None if they are not.
        crop_pct: Share of an image's shorter side that the centre crop of validation and test keeps.
        labels: Targets of the whole pool, shape (N,), int64, values below `num_classes`; None if it has none.
        test_indices: Positions of the official test samples in the pool, None where there are none.
        fingerprint: Identifies which samples the pool holds and in which order (`content_hash`). Two copies
            of the same data agree on it, wherever they lie; options of augmentation or resolution leave it
            alone, so that splits made once serve every stage.
    """

    name: str
    num_classes: int
    image_size: int
    in_channels: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float = 1.0
    labels: Tensor | None
    test_indices: Tensor | None = None
    fingerprint: str

    def __len__(self) -> int:
        if self.labels is None:
            raise NotImplementedError(f"{type(self).__name__} has no labels: it must say its own length")
        return len(self.labels)

    def space_options(self) -> dict[str, Any]:
        """The options with which a search space fits these data."""
        return {name: getattr(self, name) for name in ("num_classes", "image_size", "in_channels")}

    @abstractmethod
    def subset(self, indices: Tensor, *, train: bool) -> Samples:
        """The samples at `indices` of the pool, shape (n,), int64; `train` asks for augmentation.

        The result holds these rows (or paths) only, as a copy: a stage must not be able to reach the rest of
        the pool through it.
        """


class TensorSamples:
    """Samples in memory: raw rows (N, ...) and labels (N,), both its own.

    Args:
        rows: Raw inputs, shape (N, ...), any dtype.
        labels: Targets, shape (N,), int64.
        transform: Takes a batch of rows to float32 inputs (B, C, H, W); None takes the rows as they are.
            A module's function or a `functools.partial` of one, so that workers can receive it.
    """

    def __init__(self, rows: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self._rows = rows
        self._transform = transform
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows[indices]
        return (rows if self._transform is None else self._transform(rows)), self.labels[indices]


class TokenSamples:
    """Windows of a text: of each sample, T tokens and the T that follow them by one.

    Args:
        rows: Tokens, shape (N, T + 1), integers; its own.
        indices: Where in the text the rows lie, shape (N,), ascending; neighbours follow on each other.
        shift: Whether a window starts up to T tokens late, at random, as far as the next row follows on.
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

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        start = indices * self._length
        if self._shift:
            start = start + torch.randint(self._length, indices.shape) * self._followed[indices]
        window = self._tokens[start[:, None] + torch.arange(self._length)].long()  # (B, T + 1)
        return window[:, :-1], window[:, 1:]


def content_hash(*parts: str | bytes | Tensor) -> str:
    """A digest (hex, 64 characters) of texts, bytes and CPU tensors, each with its type and shape."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            kind, content = f"{part.dtype} {tuple(part.shape)}", part.contiguous().numpy().data
        else:
            kind, content = type(part).__name__, memoryview(part.encode() if isinstance(part, str) else part)
        digest.update(f"{kind} {content.nbytes}\n".encode())
        digest.update(content)
    return digest.hexdigest()
