"""Causal language models in the shape of Llama (Touvron et al., 2023, arXiv:2302.13971)."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    llama = "tanglenas_llama.space:Llama"
    register(
        "llama_nano",
        llama,
        summary="Llamas small enough for a CPU, 32 to 64 channels, 2 to 4 layers",
        layers=(2, 3, 4),
        embed_dim=(32, 48, 64),
        num_kv_heads=(1, 2),
        group=2,
        mlp_width=(64, 128, 192),
        vocab_size=66,
        block_size=64,
    )
    register(
        "smollm_135m",
        llama,
        summary="Inside SmolLM-135M: 288 to 576 channels, 15 to 30 layers",
        layers=(15, 20, 25, 30),
        embed_dim=(288, 384, 480, 576),
        num_kv_heads=(1, 2, 3),
        group=3,
        mlp_width=(384, 768, 1152, 1536),
        vocab_size=49152,
        block_size=2048,
    )
