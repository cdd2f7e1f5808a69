"""Gemma 1, 2 and 3."""

from __future__ import annotations

import math
from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.families.fields import attention_biases, window_between, write_windows
from cotgrpo.models.huggingface.family import Family, HfConfig, ModelError


def gemma(field: HfConfig) -> dict[str, Any]:
    """Return the options that Gemma 2 and 3 share."""
    return {
        "post_norms": True,
        "norm_plus_one": True,
        "embedding_scale": math.sqrt(field["hidden_size"]),
        "query_scale": field["query_pre_attn_scalar"] ** -0.5,
        "logit_softcap": field["final_logit_softcapping"],
        "biases": attention_biases(field),
    }


def write_gemma(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `gemma` reads."""
    scalar = (config.query_scale or 1.0) ** -2
    return {
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar,
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": config.attention_softcap,
        "attention_bias": "out" in config.biases,
        **write_windows(config),
    }


def gemma3(field: HfConfig) -> dict[str, Any]:
    """Return Gemma 3's options: also q/k norms, and another rotary base in the local layers."""
    if field["attn_logit_softcapping"] is not None:
        raise ModelError(
            f"config.json: attn_logit_softcapping is {field['attn_logit_softcapping']}, but transformers' Gemma 3 does "
            "not apply it: remove it."
        )
    local = window_between(field, field["sliding_window_pattern"])
    return {
        **gemma(field),
        **local,
        "qk_norm": True,
        "local_rope_theta": field["local_rope_theta"] if local else None,
    }


GEMMA_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}

GEMMA: dict[str, Family] = {
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        lambda field: {
            **gemma(field),
            "attention_softcap": field["attn_logit_softcapping"],
            **window_between(field, 2),
        },
        write_gemma,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **GEMMA_DEFAULTS,
            "max_position_embeddings": 131072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        },
        gemma3,
        lambda config: {**write_gemma(config), "rope_local_base_freq": config.local_rope_theta or 10_000.0},
        local_rope_theta=10_000.0,
        # The vision models' tokenizer comes with the text models too.
        without_embedding=frozenset({"<image_soft_token>"}),
    ),
    # Gemma 1. Its first files call the approximation of gelu "gelu".
    "gemma": Family(
        "GemmaForCausalLM",
        {
            "num_key_value_heads": 16,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "attention_bias": False,
        },
        lambda field: {
            "norm_plus_one": True,
            "embedding_scale": math.sqrt(field["hidden_size"]),
            "biases": attention_biases(field),
        },
        lambda config: {"attention_bias": "out" in config.biases},
        activations={"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh", "gelu_new": "gelu_tanh", "silu": "silu"},
        ignored="hidden_activation",
    ),
}
