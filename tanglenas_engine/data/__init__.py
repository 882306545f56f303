"""Data: a pool of samples, its four disjoint splits, and reproducible batches from them."""

from .dataset import Dataset, Described, Samples, SampleSubset, TensorSamples, TokenSamples, content_hash, data_path
from .splits import SPLITS, DataView, Splits, make_splits, open_splits
from .stream import Batch, Stream, batches, held
from .targets import IGNORED, Mean, mean_over_targets

__all__ = [
    "IGNORED",
    "SPLITS",
    "Batch",
    "DataView",
    "Dataset",
    "Described",
    "Mean",
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
    "mean_over_targets",
    "open_splits",
]
