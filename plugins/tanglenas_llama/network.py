"""The standalone Llama: the module, its files, and its form in transformers. It needs torch and safetensors only.

Names and shapes of the parameters are those of transformers' `LlamaForCausalLM`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STOCK, OWN = "llama", "tanglenas_llama"
"""The `model_type` of a network that transformers' own class holds, and of one whose layers differ."""
CODE = "modeling_tanglenas_llama"
"""The module beside this one that a folder of the type `OWN` brings along. transformers alone then runs it."""


@dataclass(frozen=True)
class Config:
    """The shape of a Llama, with the heads and the MLP width of each layer.

    A head of keys and values is read by `group` heads of queries. `tied` says that the head is the token embedding.
    """

    vocab_size: int
    block_size: int
    embed_dim: int
    num_kv_heads: tuple[int, ...]
    mlp_width: tuple[int, ...]
    group: int
    head_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True
    attention_dropout: float = 0.0


class Attention(nn.Module):
    """A causal grouped-query attention with rotary positions: `(B, T, C) -> (B, T, C)`."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.head_dim, self.group, self.dropout = config.head_dim, config.group, config.attention_dropout
        keys = config.num_kv_heads[layer] * config.head_dim
        self.q_proj = nn.Linear(config.embed_dim, keys * config.group, bias=False)
        self.k_proj = nn.Linear(config.embed_dim, keys, bias=False)
        self.v_proj = nn.Linear(config.embed_dim, keys, bias=False)
        self.o_proj = nn.Linear(keys * config.group, config.embed_dim, bias=False)
        self.base = config.rope_theta

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, self.base), rotated(k, self.base)
        k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """A SwiGLU: `(B, T, C) -> (B, T, C)`."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.embed_dim, config.mlp_width[layer], bias=False)
        self.up_proj = nn.Linear(config.embed_dim, config.mlp_width[layer], bias=False)
        self.down_proj = nn.Linear(config.mlp_width[layer], config.embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A layer of attention and MLP, each behind an RMSNorm and with a residual: `(B, T, C) -> (B, T, C)`."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config, layer)
        self.input_layernorm = nn.RMSNorm(config.embed_dim, config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.embed_dim, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """A Llama without its head: tokens `(B, T) -> (B, T, C)`."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.layers = nn.Sequential(*(Layer(config, layer) for layer in range(len(config.mlp_width))))
        self.norm = nn.RMSNorm(config.embed_dim, config.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.layers(self.embed_tokens(ids)))


class Llama(nn.Module):
    """A decoder with rotary positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        initialise(self, config.embed_dim, layers=len(config.mlp_width))

    def forward(self, ids: Tensor) -> Tensor:
        """Map tokens `(B, T)`, T up to `block_size`, to logits of the next token, `(B, T, vocab_size)`."""
        check_length(ids, self.config.block_size)
        return self.lm_head(self.model(ids))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as usual; a weight that head and embedding share may be given once, as in saved files."""
        embedding = state_dict.get("model.embed_tokens.weight")
        tied = {"lm_head.weight": embedding} if self.config.tied and embedding is not None else {}
        return super().load_state_dict({**tied, **state_dict}, strict, assign)

    def save(self, folder: Path, about: Mapping[str, Any] | None = None) -> None:
        """Write `config.json` in transformers' form, with what else is to be said, and `model.safetensors`.

        Where layers differ, the folder also gets the module with which transformers loads it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        settings = {**to_hugging_face(self.config), **(about or {})}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        save_file(self.saved(), folder / "model.safetensors", {"format": "pt"})
        for name, text in code(settings).items():
            (folder / name).write_text(text, "utf-8")

    def saved(self) -> dict[str, Tensor]:
        """Return the weights as files hold them: without a head that is the embedding."""
        shared = {"lm_head.weight"} if self.config.tied else set()
        return {name: tensor.contiguous() for name, tensor in self.state_dict().items() if name not in shared}

    @classmethod
    def load(cls, folder: Path) -> Llama:
        """Read what `save` or transformers wrote in one file, and return the network in evaluation mode.

        Raises:
            ValueError: The network has a part that this module has not.
        """
        network = cls(from_hugging_face(json.loads((Path(folder) / "config.json").read_text("utf-8"))))
        network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return network.eval()


def rotated(x: Tensor, base: float) -> Tensor:
    """Turn entries i and i + D/2 of each head by the angle `n * base ** (-2 i / D)` at position n: `(B, H, T, D)`."""
    width = x.shape[-1]
    precision = x.dtype if x.dtype == torch.float64 else torch.float32  # angles of long texts need it
    index = torch.arange(0, width, 2, dtype=precision, device=x.device)
    positions = torch.arange(x.shape[-2], dtype=precision, device=x.device)
    angles = positions[:, None] * (1.0 / base ** (index / width))  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(precision).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def check_length(ids: Tensor, block_size: int) -> None:
    """Refuse more tokens `(B, T)` in a row than the model is made for."""
    if ids.shape[1] > block_size:
        raise ValueError(
            f"{ids.shape[1]} tokens in a row, but the model sees block_size={block_size}: give it the last {block_size}"
        )


@torch.no_grad()
def initialise(network: nn.Module, width: int, layers: int) -> None:
    """Initialise normally, with standard deviation sqrt(2 / (5 * width)): "small init" (arXiv:1910.05895).

    At a width of 1,000 this is the 0.02 of the published Llamas. In narrow networks 0.02 is too little: attention is
    uniform at first, and the network is late to learn to attend. The deviation is divided by sqrt(2 * layers) in the
    projections that add to the residual stream.
    """
    std = math.sqrt(2 / (5 * width))
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            residual = name.endswith((".o_proj", ".down_proj"))
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * layers) if residual else std)


def to_hugging_face(config: Config) -> dict[str, Any]:
    """Return the content of transformers' `config.json`.

    transformers' Llama has layers that are all alike, and a width that its number of query heads divides. Other
    networks get the type `OWN`, and an entry `layer_sizes` with the sizes of every layer.
    """
    sizes = {
        "num_attention_heads": [heads * config.group for heads in config.num_kv_heads],
        "num_key_value_heads": list(config.num_kv_heads),
        "intermediate_size": list(config.mlp_width),
    }
    largest = {name: max(values) for name, values in sizes.items()}
    alike = all(len(set(values)) == 1 for values in sizes.values())
    stock = alike and config.embed_dim % largest["num_attention_heads"] == 0
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    settings: dict[str, Any] = dict(
        model_type=STOCK, architectures=["LlamaForCausalLM"], vocab_size=config.vocab_size,
        hidden_size=config.embed_dim, num_hidden_layers=len(config.mlp_width), **largest, head_dim=config.head_dim,
        max_position_embeddings=config.block_size, rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta,
        rope_parameters=rope, tie_word_embeddings=config.tied, attention_dropout=config.attention_dropout,
        hidden_act="silu", attention_bias=False, mlp_bias=False, bos_token_id=None, eos_token_id=None,
        dtype="float32",
    )  # fmt: skip
    if stock:
        return settings
    classes = {"AutoConfig": "TangleNASLlamaConfig", "AutoModelForCausalLM": "TangleNASLlamaForCausalLM"}
    return {
        **settings,
        "model_type": OWN,
        "architectures": [classes["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{CODE}.{name}" for auto, name in classes.items()},
        "layer_sizes": sizes,
    }


def code(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the text of the modules, by file name, that a network with this `config.json` needs in transformers."""
    path = Path(__file__).with_name(f"{CODE}.py")
    return {path.name: path.read_text("utf-8")} if settings["model_type"] == OWN else {}


def from_hugging_face(settings: Mapping[str, Any]) -> Config:
    """Return the shape that transformers' `config.json` describes.

    Raises:
        ValueError: The network is no Llama, or has a part that this module has not.
    """
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    fixed = {
        "model_type": (settings.get("model_type"), (STOCK, OWN)),
        "hidden_act": (settings.get("hidden_act", "silu"), ("silu", "swish")),
        "attention_bias": (settings.get("attention_bias", False), (False,)),
        "mlp_bias": (settings.get("mlp_bias", False), (False,)),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), ("default",)),
    }
    for name, (value, known) in fixed.items():
        if value not in known:
            raise ValueError(f"{name} is {value!r}, and a Llama here has {' or '.join(map(repr, known))}")
    heads, layers = settings["num_attention_heads"], settings["num_hidden_layers"]
    alike = {
        "num_key_value_heads": [settings.get("num_key_value_heads") or heads] * layers,
        "intermediate_size": [settings["intermediate_size"]] * layers,
    }
    sizes = settings.get("layer_sizes") or alike
    return Config(
        vocab_size=settings["vocab_size"],
        block_size=settings.get("max_position_embeddings", 2048),
        embed_dim=settings["hidden_size"],
        num_kv_heads=tuple(sizes["num_key_value_heads"]),
        mlp_width=tuple(sizes["intermediate_size"]),
        group=heads // max(sizes["num_key_value_heads"]),
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta") or settings.get("rope_theta") or 10000.0),
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        tied=settings.get("tie_word_embeddings", False),
        attention_dropout=settings.get("attention_dropout") or 0.0,
    )


def named_as_here(state: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Return the weights of a Llama of transformers, with or without its head, under this module's names.

    Old files also hold the frequencies of the positions, which are left out. An untied head starts as a copy of the
    embedding where the file has none.

    Raises:
        ValueError: The head is not the embedding, but is to be tied to it.
    """
    found = {name: tensor for name, tensor in state.items() if not name.endswith(".rotary_emb.inv_freq")}
    if "embed_tokens.weight" in found:
        found = {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in found.items()}
    embedding, head = (found.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if embedding is not None and head is None and not tied:
        found["lm_head.weight"] = embedding.clone()
    if embedding is not None and head is not None and tied and not torch.equal(embedding, head):
        raise ValueError("the head is another one than the embedding, but they are to be tied")
    return found
