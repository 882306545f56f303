"""A Llama whose layers differ in their heads and in the width of their MLP, for transformers.

A folder with this file and a config.json that has `layer_sizes` loads in transformers alone:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

import copy

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class TangleNASLlamaConfig(LlamaConfig):
    """Llama's configuration, with an entry `layer_sizes`: lists with one value for each layer.

    The lists are `num_attention_heads`, `num_key_value_heads` and `intermediate_size`.
    """

    model_type = "tanglenas_llama"

    def validate_architecture(self):
        """Accept any number of heads: their dimension is given."""

    def of_layer(self, layer: int) -> LlamaConfig:
        """Return the configuration of one layer."""
        config = copy.copy(self)
        for name, values in self.layer_sizes.items():
            setattr(config, name, values[layer])
        return config


class TangleNASLlamaForCausalLM(LlamaForCausalLM):
    """Llama with layers of the sizes that its configuration has."""

    config_class = TangleNASLlamaConfig

    def __init__(self, config: TangleNASLlamaConfig):
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.model.layers = nn.ModuleList(LlamaDecoderLayer(config.of_layer(layer), layer) for layer in layers)
        self.post_init()
