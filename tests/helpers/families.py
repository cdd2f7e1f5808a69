"""A small random model of every family, made by `transformers` on torch, the oracle of the tests."""

from __future__ import annotations

import json
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


YARN = {"type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16}


CASES: dict[str, dict[str, Any]] = {
    "llama3": {"model_type": "llama", "rope_theta": 500_000.0, "rms_norm_eps": 1e-5},
    "llama31_scaled": {"model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": LLAMA3, "head_dim": 16},
    "llama_biased": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 20,
        "num_key_value_heads": 1,
        "hidden_act": "gelu",
    },
    "llama_linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama_yarn": {"model_type": "llama", "head_dim": 24, "rope_scaling": YARN},
    "llama_yarn_all": {
        "model_type": "llama",
        "head_dim": 32,
        "rope_scaling": YARN
        | {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
    },
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": None,
        "tie_word_embeddings": True,
        "rope_theta": 100_000.0,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7, "head_dim": 12},
    "mistral_no_window": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1_000_000.0},
    "qwen2_windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "rope_scaling": YARN,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "num_key_value_heads": 1, "rope_theta": 1_000_000.0},
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 7,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.5,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 7,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
}


def old_config(case: str) -> dict[str, Any]:
    """config.json as checkpoints on the hub have it: rope_theta and rope_scaling beside the rest."""
    return json.loads(json.dumps({**SMALL, **CASES[case]}))


def make_torch(case: str) -> Any:
    """A model with every parameter random, biases and norms too."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = old_config(case)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn_like(p)
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim == 2 else p + 0.3 * noise)
    return model.eval()
