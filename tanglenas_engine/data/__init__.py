"""Data: a pool of samples, its four disjoint splits, and reproducible batches from them."""

from .dataset import Dataset, Described, Samples, TensorSamples, TokenSamples, content_hash, data_path
from .splits import SPLITS, DataView, Splits, make_splits, open_splits
from .stream import Batch, Stream, batches

__all__ = [
    "SPLITS",
    "Batch",
    "DataView",
    "Dataset",
    "Described",
    "Samples",
    "Splits",
    "Stream",
    "TensorSamples",
    "TokenSamples",
    "batches",
    "content_hash",
    "data_path",
    "make_splits",
    "open_splits",
]
