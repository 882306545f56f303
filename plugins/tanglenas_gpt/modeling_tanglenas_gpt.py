"""A GPT-2 whose layers differ in their heads and in the width of their MLP, for transformers.

A folder with this file and a config.json that has `layer_sizes` loads in transformers alone:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D


class TangleNASGPTConfig(GPT2Config):
    """GPT-2's configuration, with an entry `layer_sizes`: lists with one value for each layer.

    The lists are `n_head`, `head_dim` and `n_inner`.
    """

    model_type = "tanglenas_gpt"

    def validate_architecture(self):
        """Accept any number of heads: their dimension is given."""


class TangleNASGPTForCausalLM(GPT2LMHeadModel):
    """GPT-2 with layers of the sizes that its configuration has."""

    config_class = TangleNASGPTConfig

    def __init__(self, config: TangleNASGPTConfig):
        heads = config.n_head
        config.n_head = 1  # GPT-2's own layers, which are replaced, need heads that divide the width
        super().__init__(config)
        config.n_head = heads
        sizes = zip(*(config.layer_sizes[name] for name in ("n_head", "head_dim", "n_inner")), strict=True)
        for block, (heads, head_dim, inner) in zip(self.transformer.h, sizes, strict=True):
            attention, width = block.attn, heads * head_dim
            attention.num_heads, attention.head_dim, attention.split_size = heads, head_dim, width
            attention.scaling = head_dim**-0.5
            attention.c_attn, attention.c_proj = Conv1D(3 * width, config.n_embd), Conv1D(config.n_embd, width)
            block.mlp = GPT2MLP(inner, config)
        self.post_init()
