"""Elastic layers: torch layers whose dimensions are Sizes.

They keep torch's parameter names and have the largest shapes. So a supernet's `state_dict` is that of its largest
network. To write your own elastic layer, subclass `Elastic`.
"""

from tanglenas_engine.elastic.attention import Attention
from tanglenas_engine.elastic.base import Elastic, copied, plain
from tanglenas_engine.elastic.conv import Conv1d, Conv2d, ConvTranspose2d
from tanglenas_engine.elastic.depth import Depth, walk
from tanglenas_engine.elastic.grouped_attention import GroupedAttention, Rotary
from tanglenas_engine.elastic.linear import Embedding, Linear
from tanglenas_engine.elastic.mlp import GatedMLP
from tanglenas_engine.elastic.multihead_attention import MultiheadAttention
from tanglenas_engine.elastic.norm import BatchNorm1d, BatchNorm2d, GroupNorm, LayerNorm, LayerNorm2d, RMSNorm
from tanglenas_engine.elastic.operations import Family, MixedOperation
from tanglenas_engine.elastic.parameter import Parameter
from tanglenas_engine.superposition.mixture import Factor

__all__ = [
    "Attention",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv1d",
    "Conv2d",
    "ConvTranspose2d",
    "Depth",
    "Elastic",
    "Embedding",
    "Factor",
    "Family",
    "GatedMLP",
    "GroupNorm",
    "GroupedAttention",
    "LayerNorm",
    "LayerNorm2d",
    "Linear",
    "MixedOperation",
    "MultiheadAttention",
    "Parameter",
    "RMSNorm",
    "Rotary",
    "copied",
    "plain",
    "walk",
]
