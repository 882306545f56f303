"""The GPT search space of the paper (arXiv:2312.10440, section 4.2), on elastic layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine import Architecture, Described, SearchSpace, Size, TangleNASError, elastic, unknown
from tanglenas_gpt import network
from tanglenas_gpt.network import CODE, sample_text, to_hugging_face
from tanglenas_gpt.partition import PartitionedAttention


class Block(nn.Module):
    """A layer of attention and MLP, each behind a LayerNorm and with a residual: `(B, T, C) -> (B, T, C)`."""

    def __init__(self, width: Size, attention: nn.Module, mlp_ratio: Size, bias: bool, dropout: float, gelu: str):
        super().__init__()
        self.norm1 = elastic.LayerNorm(width, bias=bias)
        self.attn = attention
        self.norm2 = elastic.LayerNorm(width, bias=bias)
        self.fc1 = elastic.Linear(width, width * mlp_ratio, bias)
        self.fc2 = elastic.Linear(width * mlp_ratio, width, bias)
        self.act = nn.GELU(gelu)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.drop(self.fc2(self.act(self.fc1(self.norm2(x)))))


class GPT(SearchSpace):
    """A space of GPTs: embedding dimension and layers, and per layer the number of heads and the MLP ratio.

    Args:
        vocab_size: The number of tokens; the head is the token embedding.
        block_size: Largest number of tokens in a row.
        heads: "slices" gives each head `head_dim` dimensions, so that more heads make attention wider. "partition"
            divides the embedding dimension among the heads of a layer, as in the paper and in GPT-2.
        head_dim: Dimension of a head under "slices"; by default the largest network is a GPT-2.
        per_layer: Choose heads and MLP ratio for each layer. False chooses once for all layers. With heads that
            partition the embedding, transformers' own GPT-2 holds such a network.
        dropout: Dropout of embeddings, attention and residuals.
        bias: Give linear layers and norms a bias.
        gelu: "none" for the exact activation, or "tanh" for its approximation in the published GPT-2.
        weight_init: The standard deviation of fresh weights: "small" for sqrt(2 / (5 * width)), "gpt2" for 0.02, as in
            the paper. With 0.02, narrow networks learn late.
    """

    def __init__(
        self,
        layers: Sequence[int] = (5, 6, 7),
        embed_dim: Sequence[int] = (384, 576, 768),
        num_heads: Sequence[int] = (6, 8, 12),
        mlp_ratio: Sequence[float] = (2, 3, 4),
        vocab_size: int = 50304,
        block_size: int = 224,
        heads: str = "slices",
        head_dim: int | None = None,
        per_layer: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
        gelu: str = "none",
        weight_init: str = "small",
        **options: Any,
    ):
        super().__init__(**options)
        L, E = self.choice("layers", layers), self.choice("embed_dim", embed_dim)
        per = L if per_layer else None
        H, R = self.choice("num_heads", num_heads, per), self.choice("mlp_ratio", mlp_ratio, per)
        if heads not in ("slices", "partition"):
            raise unknown("heads", heads, ("slices", "partition"))
        if heads == "slices" and not head_dim and E.max < max(H.values):
            raise TangleNASError(
                f"{max(H.values)} heads share {E.max} dimensions, so that a head has none: give fewer num_heads, a "
                "larger embed_dim, or head_dim"
            )
        head_dim = None if heads == "partition" else head_dim or E.max // max(H.values)
        if gelu not in ("none", "tanh"):
            raise unknown("gelu", gelu, ("none", "tanh"))
        if weight_init not in network.SCHEMES:
            raise unknown("weight_init", weight_init, network.SCHEMES)
        self.settings = dict(
            vocab_size=vocab_size,
            block_size=block_size,
            head_dim=head_dim,
            dropout=dropout,
            bias=bias,
            gelu=gelu,
            weight_init=weight_init,
        )

        self.dynamic_axes = {1: ("length", block_size)}

        def attention(num_heads: Size) -> nn.Module:
            if head_dim is None:
                return PartitionedAttention(E, num_heads, bias, dropout)
            return elastic.Attention(E, num_heads, head_dim, bias, bias, dropout, dropout, causal=True)

        def block(i: int) -> Block:
            heads, ratio = (H[i], R[i]) if per_layer else (H, R)
            return Block(E, attention(heads), ratio, bias, dropout, gelu)

        self.wte = elastic.Embedding(vocab_size, E)
        self.wpe = elastic.Embedding(block_size, E)
        self.drop = nn.Dropout(dropout)
        self.blocks = elastic.Depth(L, [block(i) for i in range(L.max)])
        self.norm = elastic.LayerNorm(E, bias=bias)
        self.lm_head = elastic.Linear(E, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        network.initialise(self, weight_init, E.max, L.max)

    def forward(self, ids: Tensor) -> Tensor:
        """Map tokens `(B, T)`, T up to `block_size`, to logits of the next token, `(B, T, vocab_size)`."""
        x = self.drop(self.wte(ids) + self.wpe(network.positions(ids, self.settings["block_size"])))
        return self.lm_head(self.norm(self.blocks(x)))

    def example_input(self, batch: int) -> Tensor:
        return torch.randint(self.settings["vocab_size"], (batch, self.settings["block_size"]))

    def standalone(self, architecture: Architecture) -> network.GPT:
        choices = dict(architecture.choices)
        layers = choices.pop("layers")
        for name in ("num_heads", "mlp_ratio"):
            if not isinstance(choices[name], tuple):
                choices[name] = (choices[name],) * layers
        return network.GPT(network.Config(**self.settings, **choices))

    def to_transformers(self, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
        """Return the network as transformers' GPT-2, or with a class of its own where its layers differ."""
        weights, config = to_hugging_face(network.state_dict(), network.config)
        code = Path(__file__).with_name(f"{CODE}.py")
        return weights, config, {code.name: code.read_text("utf-8")} if "auto_map" in config else {}

    def converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the names of transformers' GPT-2, and the first positions of a longer context.

        A space without biases leaves out those of a file that are all 0, as `to_transformers` writes them.
        """
        state = network.from_hugging_face(state)
        if not self.settings["bias"]:
            state = {name: tensor for name, tensor in state.items() if name[-5:] != ".bias" or bool(tensor.any())}
        if "wpe.weight" in state:
            state["wpe.weight"] = state["wpe.weight"][: self.settings["block_size"]]
        return state

    def source(self, folder: Path) -> nn.Module | None:
        """Load the GPT of a folder that `export` wrote, or transformers' network.

        Raises:
            TangleNASError: It is a GPT-2 with another activation or number of heads, or with what no option sets here.
        """
        config = json.loads((folder / "config.json").read_text("utf-8"))
        kind = config.get("model_type")
        if kind in (None, network.OWN):
            return network.GPT.load(folder) if "embed_dim" in config else None
        heads = max(self.choices["num_heads"].options)
        gelu = {"gelu": "none", "gelu_new": "tanh"}.get(config.get("activation_function"), self.settings["gelu"])
        if gelu != self.settings["gelu"]:
            raise TangleNASError(
                f"the config.json of the weights says activation_function {config['activation_function']!r}, and the "
                f"space has gelu {self.settings['gelu']!r}: set create_space.gelu = {gelu!r}"
            )
        if config.get("n_head", heads) != heads:
            raise TangleNASError(
                f"the config.json of the weights says n_head {config['n_head']}, and the largest num_heads of the "
                f"space is {heads}: give create_space.num_heads the option {config['n_head']} as the largest"
            )
        for name, ours in network.FIXED.items():
            if (theirs := config.get(name, ours)) != ours:
                raise TangleNASError(
                    f"the config.json of the weights says {name} {theirs!r}, and this space always has {ours!r}: "
                    "choose other weights"
                )
        # An extra, and slow to import.
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)

    def export(
        self, network: nn.Module, architecture: Architecture, folder: Path, dataset: Described | None = None
    ) -> None:
        """Write a folder that `tanglenas_gpt.network.GPT.load` reads. The tokenizer of a text lies in it."""
        super().export(network, architecture, folder, dataset)
        network.save(folder, json.loads((folder / "config.json").read_text("utf-8")))

    def show(self, network: nn.Module, dataset: Any) -> str:
        """Return a text that the network continues from a line break, always the same for equal weights."""
        return sample_text(network, dataset)
