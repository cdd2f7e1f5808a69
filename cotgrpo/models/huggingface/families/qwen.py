"""Qwen 2, 2.5 and 3."""

from __future__ import annotations

from typing import Any

from cotgrpo.models.huggingface.families.fields import attention_biases, used_windows, write_windows
from cotgrpo.models.huggingface.family import Family, HfConfig


def window_after(field: HfConfig) -> dict[str, Any]:
    """Return Qwen's windows: with `use_sliding_window`, in the layers from `max_window_layers` on."""
    types = ["full_attention", "sliding_attention"]
    return used_windows(field, [types[i >= field["max_window_layers"]] for i in range(field["num_hidden_layers"])])


QWEN_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

QWEN: dict[str, Family] = {
    "qwen2": Family(
        "Qwen2ForCausalLM",
        QWEN_DEFAULTS,
        lambda field: {"biases": ("query", "key", "value"), **window_after(field)},
        lambda config: {"use_sliding_window": config.window is not None, **write_windows(config)},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
        lambda field: {"qk_norm": True, "biases": attention_biases(field), **window_after(field)},
        lambda config: {
            "use_sliding_window": config.window is not None,
            "attention_bias": "out" in config.biases,
            **write_windows(config),
        },
    ),
    # The text part of Qwen3-VL. The three parts of its positions (mrope) are equal in text.
    "qwen3_vl_text": Family(
        "Qwen3VLForConditionalGeneration",
        {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 128000,
            "rope_theta": 500_000.0,
            "attention_bias": False,
        },
        lambda field: {"qk_norm": True, "biases": attention_biases(field)},
        lambda config: {"attention_bias": "out" in config.biases},
        ignored_rope=frozenset({"mrope_section", "mrope_interleaved"}),
    ),
}
