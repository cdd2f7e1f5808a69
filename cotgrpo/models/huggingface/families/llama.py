"""Llama, Mistral and Ministral."""

from __future__ import annotations

from cotgrpo.models.huggingface.families.fields import all_windows, llama_biases, write_llama_biases, write_windows
from cotgrpo.models.huggingface.family import Family

LLAMA: dict[str, Family] = {
    # Llama 3, 3.1, 3.2, SmolLM2 and other models of this type.
    "llama": Family(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
        llama_biases,
        write_llama_biases,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        lambda field: {"window": field["sliding_window"]},
        lambda config: {"sliding_window": config.window},
    ),
    # Ministral 3: queries far from the start are longer (`RopeScaling.query_growth`).
    "ministral3": Family(
        "Ministral3ForCausalLM",
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        lambda field: {"window": field["sliding_window"]},
        lambda config: {"sliding_window": config.window},
        default_rope={
            "type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        rope_kinds=frozenset({"llama_4_scaling_beta"}),
        ignored_rope=frozenset({"max_position_embeddings"}),
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "layer_types": None,
        },
        all_windows,
        write_windows,
    ),
}
