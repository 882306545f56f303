"""Causal language models: the paper's GPT search spaces (arXiv:2312.10440, section 4.2)."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    gpt = "tanglenas_gpt.space:GPT"
    register(
        "gpt",
        gpt,
        summary="GPT-2 style language models, 384 to 768 channels, 5 to 7 layers (TinyStories)",
        layers=(5, 6, 7),
        embed_dim=(384, 576, 768),
        num_heads=(6, 8, 12),
        mlp_ratio=(2, 3, 4),
        vocab_size=50304,
        block_size=224,
    )
    register(
        "gpt2",
        gpt,
        summary="Inside the published GPT-2 of 124 million parameters: 384 to 768 channels, 6 to 12 layers",
        layers=(6, 8, 10, 12),
        embed_dim=(384, 512, 640, 768),
        num_heads=(3, 6, 9, 12),
        mlp_ratio=(1, 2, 3, 4),
        vocab_size=50257,
        block_size=1024,
        bias=True,
        gelu="tanh",
    )
    register(
        "gpt_char",
        gpt,
        summary="GPTs for text by characters, 96 to 384 channels, 4 to 6 layers",
        layers=(4, 5, 6),
        embed_dim=(96, 192, 384),
        num_heads=(2, 4, 6),
        mlp_ratio=(2, 3, 4),
        vocab_size=66,
        block_size=256,
    )
    register(
        "gpt_nano",
        gpt,
        summary="GPTs small enough for a CPU, 32 to 64 channels, 2 to 4 layers",
        layers=(2, 3, 4),
        embed_dim=(32, 48, 64),
        num_heads=(1, 2, 4),
        mlp_ratio=(1, 2, 4),
        vocab_size=66,
        block_size=64,
    )
