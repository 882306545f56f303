"""The standalone GPT: the module, its text generation, its files, and its conversion to Hugging Face's GPT-2.

It needs torch and safetensors only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SCHEMES = ("small", "gpt2")
"""How fresh weights may be drawn."""
OWN = "tanglenas_gpt"
"""The `model_type` in transformers of a network that GPT-2 cannot hold."""
CODE = "modeling_tanglenas_gpt"
"""The module beside this one with the class of networks that GPT-2 cannot hold. A folder brings it to transformers."""
FIXED = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
"""The settings of transformers' GPT-2 that have one value here."""


@dataclass(frozen=True)
class Config:
    """The shape of a GPT, with a number of heads and an MLP ratio for each layer.

    A head has `head_dim` dimensions. Where that is None, the heads of a layer partition `embed_dim`. `gelu` is "none"
    for the exact activation, or "tanh" for its approximation in the published GPT-2. `weight_init` is "small", whose
    deviation follows the width, or "gpt2", which is 0.02.
    """

    vocab_size: int
    block_size: int
    embed_dim: int
    num_heads: tuple[int, ...]
    mlp_ratio: tuple[float, ...]
    head_dim: int | None = None
    dropout: float = 0.0
    bias: bool = False
    gelu: str = "none"
    weight_init: str = "small"

    def hidden(self, layer: int) -> int:
        """Return the width of the MLP of one layer."""
        return int(self.embed_dim * self.mlp_ratio[layer])


class Attention(nn.Module):
    """A causal multi-head self-attention: `(B, T, C) -> (B, T, C)`."""

    def __init__(self, config: Config, num_heads: int):
        super().__init__()
        self.num_heads, self.dropout = num_heads, config.dropout
        width = num_heads * (config.head_dim or config.embed_dim // num_heads)
        self.qkv = nn.Linear(config.embed_dim, 3 * width, config.bias)
        self.proj = nn.Linear(width, config.embed_dim, config.bias)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """A layer of attention and MLP, each behind a LayerNorm and with a residual: `(B, T, C) -> (B, T, C)`."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, bias=config.bias)
        self.attn = Attention(config, config.num_heads[layer])
        self.norm2 = nn.LayerNorm(config.embed_dim, bias=config.bias)
        self.fc1 = nn.Linear(config.embed_dim, config.hidden(layer), config.bias)
        self.fc2 = nn.Linear(config.hidden(layer), config.embed_dim, config.bias)
        self.act = nn.GELU(config.gelu)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.drop(self.fc2(self.act(self.fc1(self.norm2(x)))))


class GPT(nn.Module):
    """A GPT-2 style decoder with learned positions, whose head is its token embedding."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.embed_dim)
        self.wpe = nn.Embedding(config.block_size, config.embed_dim)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.Sequential(*(Block(config, layer) for layer in range(len(config.num_heads))))
        self.norm = nn.LayerNorm(config.embed_dim, bias=config.bias)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        initialise(self, config.weight_init, config.embed_dim, layers=len(config.num_heads))

    def forward(self, ids: Tensor) -> Tensor:
        """Map tokens `(B, T)`, T up to `block_size`, to logits of the next token, `(B, T, vocab_size)`."""
        x = self.drop(self.wte(ids) + self.wpe(positions(ids, self.config.block_size)))
        return self.lm_head(self.norm(self.blocks(x)))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as usual; the weight that head and embedding share may be given once, as in saved files."""
        tied = {"lm_head.weight": state_dict["wte.weight"]} if "wte.weight" in state_dict else {}
        return super().load_state_dict({**tied, **state_dict}, strict, assign)

    def save(self, folder: Path, about: Mapping[str, Any] | None = None) -> None:
        """Write `config.json`, with what else is to be said about the network, and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {**asdict(self.config), **(about or {})}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        state = {k: v.contiguous() for k, v in self.state_dict().items() if k != "lm_head.weight"}
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> GPT:
        """Read what `save` wrote, and return the network in evaluation mode."""
        settings = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        own = {field.name: settings[field.name] for field in fields(Config) if field.name in settings}
        network = cls(Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}))
        network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return network.eval()


def positions(ids: Tensor, block_size: int) -> Tensor:
    """Return the places `(T,)` of tokens `(B, T)`."""
    if ids.shape[1] > block_size:
        raise ValueError(
            f"{ids.shape[1]} tokens in a row, but the model sees block_size={block_size}: give it the last {block_size}"
        )
    return torch.arange(ids.shape[1], device=ids.device)


@torch.no_grad()
def initialise(network: nn.Module, scheme: str, width: int, layers: int) -> None:
    """Initialise normally, by one of `SCHEMES`.

    "small" has the standard deviation sqrt(2 / (5 * width)) (arXiv:1910.05895), and "gpt2" 0.02, which is the same at a
    width of 1,000. In narrow networks 0.02 is too little: attention is uniform at first, and the network is late to
    learn to attend. As in GPT-2, the deviation is divided by sqrt(2 * layers) in the projections that add to the
    residual stream.
    """
    std = math.sqrt(2 / (5 * width)) if scheme == "small" else 0.02
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            residual = name.endswith((".attn.proj", ".fc2"))
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * layers) if residual else std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def generate(
    network: GPT,
    ids: Tensor,
    n: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row of tokens `(B, T)` by `n` tokens: `(B, T + n)`.

    Args:
        temperature: Values below 1 favour likely tokens, values above 1 unlikely ones; 0 takes the most likely token.
        top_k: Draw from this many of the likeliest tokens only.
        generator: The source of randomness; its device may differ from the network's.
    """
    if not temperature >= 0 or (top_k is not None and top_k < 1) or ids.shape[1] < 1:
        raise ValueError(
            f"temperature {temperature}, top_k {top_k} and {ids.shape[1]} tokens to go on from: expected a "
            "temperature of at least 0, a top_k of at least 1 or None, and at least one token"
        )
    training = network.training
    network.eval()
    for _ in range(n):
        logits = network(ids[:, -network.config.block_size :])[:, -1]  # (B, vocab_size)
        if top_k is not None:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if temperature == 0:
            drawn = logits.argmax(-1, keepdim=True)
        else:
            chances = (logits.float() / temperature).softmax(-1)
            chances = chances if generator is None else chances.to(generator.device)
            drawn = torch.multinomial(chances, 1, generator=generator)
        ids = torch.cat([ids, drawn.to(ids.device)], 1)
    network.train(training)
    return ids


def sample_text(network: GPT, dataset: Any) -> str:
    """Return a text that a network continues from a line break, always the same for equal weights.

    It goes on from the first token of the vocabulary where the tokenizer has no token for a line break, as those that
    split at white space.

    Args:
        network: The network; or another one that has its `config.block_size`.
        dataset: A text with `encode` and `decode`.
    """
    start = dataset.encode("\n")
    start = start if len(start) else torch.zeros(1, dtype=torch.long)
    text: str = dataset.decode(generate(network, start[None], 300, 0.8, generator=torch.Generator().manual_seed(0))[0])
    return text


_GPT2 = {
    "blocks": "h", "norm1": "ln_1", "norm2": "ln_2", "norm": "ln_f",
    "qkv": "c_attn", "proj": "c_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj",
}  # fmt: skip


def to_hugging_face(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and the content of `config.json` of the network in transformers.

    GPT-2 has layers that are all alike, and heads that partition the width. Other networks get the type
    `OWN`, which the module `CODE` defines, and an entry `layer_sizes` with the sizes of every layer. Biases
    that the network lacks become zeros. The head is the embedding, and is left out.
    """
    width, layers = config.embed_dim, range(len(config.num_heads))
    sizes = {
        "n_head": list(config.num_heads),
        "head_dim": [config.head_dim or width // heads for heads in config.num_heads],
        "n_inner": [config.hidden(layer) for layer in layers],
    }
    weights = {}
    for key, tensor in state.items():
        if key == "lm_head.weight":
            continue
        module, kind = key.rsplit(".", 1)
        name = "transformer." + ".".join(_GPT2.get(part, part) for part in module.split("."))
        # transformers' Conv1D holds (inputs, outputs).
        weights[f"{name}.{kind}"] = tensor.T.contiguous() if kind == "weight" and ".c_" in name else tensor
        if kind == "weight" and not name.endswith(("wte", "wpe")) and f"{module}.bias" not in state:
            weights[f"{name}.bias"] = tensor.new_zeros(len(tensor))
    settings: dict[str, Any] = dict(
        model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=config.vocab_size,
        n_positions=config.block_size, n_embd=width, n_layer=len(layers), n_head=max(sizes["n_head"]),
        n_inner=max(sizes["n_inner"]), tie_word_embeddings=True,
        activation_function={"none": "gelu", "tanh": "gelu_new"}[config.gelu],
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        bos_token_id=None, eos_token_id=None, dtype="float32",
    )  # fmt: skip
    alike = all(len(set(values)) == 1 for values in sizes.values())
    if alike and config.num_heads[0] * sizes["head_dim"][0] == width:
        return weights, settings
    classes = {"AutoConfig": "TangleNASGPTConfig", "AutoModelForCausalLM": "TangleNASGPTForCausalLM"}
    own = dict(
        model_type=OWN, architectures=[classes["AutoModelForCausalLM"]],
        auto_map={auto: f"{CODE}.{name}" for auto, name in classes.items()}, layer_sizes=sizes,
    )  # fmt: skip
    return weights, {**settings, **own}


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of transformers' `GPT2LMHeadModel` or `GPT2Model` under this module's names.

    Other weights stay as they are. Files of the first versions also hold causal masks, which are left out.
    """
    if not any(name.endswith("attn.c_attn.weight") for name in state):
        return dict(state)
    parts = sorted(((theirs, ours) for ours, theirs in _GPT2.items()), key=lambda pair: -len(pair[0]))
    weights = {}
    for key, tensor in state.items():
        if key.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        name = f".{key.removeprefix('transformer.')}"
        transposed = ".c_" in name and name.endswith(".weight")  # transformers' Conv1D holds (inputs, outputs)
        for theirs, ours in parts:
            name = name.replace(f".{theirs}.", f".{ours}.")
        weights[name[1:]] = tensor.T.contiguous() if transposed else tensor
    return weights
