"""Data: a pool of labelled samples, its four disjoint splits, and reproducible batches from them."""

from .dataset import Dataset, Samples, TensorSamples, content_hash
from .splits import SPLITS, DataView, Splits, make_splits, open_splits
from .stream import Batch, Stream, batches

__all__ = [
    "SPLITS",
    "Batch",
    "DataView",
    "Dataset",
    "Samples",
    "Splits",
    "Stream",
    "TensorSamples",
    "batches",
    "content_hash",
    "make_splits",
    "open_splits",
]
