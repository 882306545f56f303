"""Rules that say for each operation which dimensions of its inputs and outputs belong together.

A rule unites dimensions, makes new ones, or fixes those that must keep their length. An operation without a rule fixes
every dimension that it touches. So a missing rule costs freedom, never correctness.

Each file has the rules of one kind of operation, and ends with a table of them by name.
"""

from tanglenas_engine.conversion.analysis import Rule

from . import entries, layers, products, shapes

RULES: dict[str, Rule] = {**entries.RULES, **layers.RULES, **shapes.RULES, **products.RULES}
"""The rules by name."""

REFUSED: dict[str, str] = {
    **dict.fromkeys(("nn.LSTM", "nn.GRU", "nn.RNN"), "recurrent layers have no elastic form"),
    "nn.MultiheadAttention": "attention of torch's own layer is not taken apart",
}
"""The reasons for operations that have no rule, where there is more to say."""
