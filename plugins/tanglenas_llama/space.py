"""The space of Llamas, on elastic layers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine import Architecture, Axis, Described, SearchSpace, Size, TangleNASError, elastic
from tanglenas_gpt.network import sample_text
from tanglenas_llama import network
from tanglenas_llama.network import code, to_hugging_face


class MLP(nn.Module):
    """A SwiGLU with transformers' names: `(B, T, C) -> (B, T, C)`.

    Hidden units are independent, so a mixture covers them once, at the input of `down_proj`.
    """

    def __init__(self, width: Size, hidden: Size):
        super().__init__()
        units = Axis(hidden, role="unit")
        self.gate_proj = elastic.Linear(width, units, bias=False)
        self.up_proj = elastic.Linear(width, units, bias=False)
        self.down_proj = elastic.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A layer of attention and MLP, each behind an RMSNorm and with a residual: `(B, T, C) -> (B, T, C)`."""

    def __init__(self, width: Size, attention: nn.Module, mlp_width: Size, norm_eps: float):
        super().__init__()
        self.self_attn = attention
        self.mlp = MLP(width, mlp_width)
        self.input_layernorm = elastic.RMSNorm(width, norm_eps)
        self.post_attention_layernorm = elastic.RMSNorm(width, norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """A Llama without its head: tokens `(B, T) -> (B, T, C)`."""

    def __init__(self, embedding: nn.Module, layers: nn.Module, norm: nn.Module):
        super().__init__()
        self.embed_tokens, self.layers, self.norm = embedding, layers, norm

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.layers(self.embed_tokens(ids)))


class Llama(SearchSpace):
    """A space of Llamas: embedding dimension and layers, and per layer the heads of keys and the MLP's width.

    Parameters have the names of transformers' `LlamaForCausalLM`.

    Args:
        num_kv_heads: Numbers of heads of keys and values.
        group: The number of query heads that read one head of keys and values.
        mlp_width: Numbers of hidden units of the MLP.
        vocab_size: The number of tokens.
        block_size: Largest number of tokens in a row.
        head_dim: Dimension of a head; by default the query heads of the largest network partition its embedding.
        per_layer: Choose heads and MLP width for each layer. False chooses once for all layers: transformers' own class
            holds such a network.
        tied: Use the token embedding as the head.
        rope_theta: Base of the rotary positions.
        norm_eps: Number added to the mean square in a norm.
        attention_dropout: Dropout of attention weights.
    """

    def __init__(
        self,
        layers: Sequence[int] = (15, 20, 25, 30),
        embed_dim: Sequence[int] = (288, 384, 480, 576),
        num_kv_heads: Sequence[int] = (1, 2, 3),
        mlp_width: Sequence[int] = (384, 768, 1152, 1536),
        group: int = 3,
        vocab_size: int = 49152,
        block_size: int = 2048,
        head_dim: int | None = None,
        per_layer: bool = True,
        tied: bool = True,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        **options: Any,
    ):
        super().__init__(**options)
        L, E = self.choice("layers", layers), self.choice("embed_dim", embed_dim)
        per = L if per_layer else None
        K, M = self.choice("num_kv_heads", num_kv_heads, per), self.choice("mlp_width", mlp_width, per)
        head_dim = head_dim or E.max // (max(K.values) * group)
        if head_dim % 2 or not head_dim:
            raise TangleNASError(
                f"heads of dimension {head_dim} have no rotary positions, which turn pairs of entries: give an even "
                "head_dim"
            )
        self.settings = dict(
            vocab_size=vocab_size, block_size=block_size, group=group, head_dim=head_dim, rope_theta=rope_theta,
            norm_eps=norm_eps, tied=tied, attention_dropout=attention_dropout,
        )  # fmt: skip
        self.dynamic_axes = {1: ("length", block_size)}

        def layer(i: int) -> Layer:
            heads, hidden = (K[i], M[i]) if per_layer else (K, M)
            attention = elastic.GroupedAttention(
                E, heads * group, heads, head_dim, dropout=attention_dropout, causal=True,
                rotary=elastic.Rotary(rope_theta),
            )  # fmt: skip
            return Layer(E, attention, hidden, norm_eps)

        self.model = Body(
            elastic.Embedding(vocab_size, E),
            elastic.Depth(L, [layer(i) for i in range(L.max)]),
            elastic.RMSNorm(E, norm_eps),
        )
        self.lm_head = elastic.Linear(E, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        network.initialise(self, E.max, L.max)

    def forward(self, ids: Tensor) -> Tensor:
        """Map tokens `(B, T)`, T up to `block_size`, to logits of the next token, `(B, T, vocab_size)`."""
        network.check_length(ids, self.settings["block_size"])
        return self.lm_head(self.model(ids))

    def example_input(self, batch: int) -> Tensor:
        return torch.randint(self.settings["vocab_size"], (batch, self.settings["block_size"]))

    def standalone(self, architecture: Architecture) -> network.Llama:
        choices = dict(architecture.choices)
        layers = choices.pop("layers")
        for name in ("num_kv_heads", "mlp_width"):
            if not isinstance(choices[name], tuple):
                choices[name] = (choices[name],) * layers
        return network.Llama(network.Config(**self.settings, **choices))

    def to_transformers(self, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
        """Return the network as transformers' Llama, or with a class of its own where its layers differ."""
        config = to_hugging_face(network.config)
        return network.saved(), config, code(config)

    def converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the files of transformers' Llama with or without its head, tied or not."""
        try:
            return network.named_as_here(state, self.settings["tied"])
        except ValueError as error:
            raise TangleNASError(f"{error}: set create_space.tied = False") from None

    def source(self, folder: Path) -> nn.Module | None:
        """Load transformers' network, or the Llama of a folder that `export` wrote.

        Networks of other types may have a Llama's names, and compute something else.

        Raises:
            TangleNASError: It has another head dimension, base of positions or epsilon, or a part that the space lacks.
        """
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        kind = settings.get("model_type")
        if kind in (network.STOCK, network.OWN):
            self._check_shape(settings)
        if kind not in (None, network.OWN):
            try:
                from transformers import AutoModelForCausalLM

                return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
            except ImportError:  # an extra
                pass
        return network.Llama.load(folder) if kind in (network.STOCK, network.OWN) else None

    def _check_shape(self, settings: dict[str, Any]) -> None:
        """Refuse weights of another shape, and warn of those of shorter texts."""
        try:
            config = network.from_hugging_face(settings)
        except ValueError as error:
            raise TangleNASError(f"the config.json of the weights says that {error}. Choose another network") from None
        for name in ("head_dim", "rope_theta", "norm_eps"):
            if getattr(config, name) != self.settings[name]:
                raise TangleNASError(
                    f"the config.json of the weights says {name} {getattr(config, name)}, and the space has "
                    f"{self.settings[name]}: set create_space.{name} = {getattr(config, name)}"
                )
        if config.block_size < (length := self.settings["block_size"]):
            warnings.warn(
                f"the config.json of the weights says max_position_embeddings {config.block_size}, and the space takes "
                f"texts of block_size {length}: the weights did not learn the positions behind {config.block_size}. "
                f"Train them, or set create_space.block_size = {config.block_size}",
                stacklevel=2,
            )

    def export(
        self, network: nn.Module, architecture: Architecture, folder: Path, dataset: Described | None = None
    ) -> None:
        """Write a folder that transformers and `tanglenas_llama.network.Llama.load` read.

        The tokenizer of a text lies in it.
        """
        super().export(network, architecture, folder, dataset)
        network.save(folder, json.loads((folder / "config.json").read_text("utf-8")))

    def show(self, network: nn.Module, dataset: Any) -> str:
        """Return a text that the network continues from a line break, always the same for equal weights."""
        return sample_text(network, dataset)
