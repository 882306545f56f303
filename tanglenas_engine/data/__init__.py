"""Data: a pool of samples, its four disjoint splits, and reproducible batches from them."""

from .dataset import Dataset, Described, Samples, SampleSubset, TensorSamples, TokenSamples, content_hash, data_path
from .splits import SPLITS, DataView, Splits, make_splits, open_splits
from .stream import Batch, Stream, batches, held

__all__ = [
    "SPLITS",
    "Batch",
    "DataView",
    "Dataset",
    "Described",
    "SampleSubset",
    "Samples",
    "Splits",
    "Stream",
    "TensorSamples",
    "TokenSamples",
    "batches",
    "content_hash",
    "data_path",
    "held",
    "make_splits",
    "open_splits",
]
