"""OLMo 2 and 3."""

from __future__ import annotations

from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.families.fields import attention_biases, window_between, write_windows
from cotgrpo.models.huggingface.family import Family, HfConfig
from cotgrpo.models.huggingface.rope_fields import write_rope


def olmo(field: HfConfig) -> dict[str, Any]:
    """Return what OLMo 2 and 3 share: norms after the blocks only, q/k norms over the whole width."""
    return {
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": True,
        "qk_norm_over": "width",
        "biases": attention_biases(field),
    }


def olmo3(field: HfConfig) -> dict[str, Any]:
    """Return OLMo 3's options: also windows in three of four layers, whose rotation is not scaled."""
    local = window_between(field, 4)
    same = field["local_rope_theta"] == field["rope_theta"] and field["rope_scaling"].get("rope_type") == "default"
    return {**olmo(field), **local, "local_rope_theta": field["local_rope_theta"] if local and not same else None}


def write_olmo3(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `olmo3` reads."""
    local = config.local_rope_theta or config.rope_theta
    scaling = write_rope(config.rope_scaling) or {"rope_type": "default"}
    return {
        "attention_bias": "out" in config.biases,
        **write_windows(config),
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": scaling | {"rope_theta": config.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


OLMO: dict[str, Family] = {
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attention_bias": False},
        olmo,
        lambda config: {"attention_bias": "out" in config.biases},
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "attention_bias": False,
            "sliding_window": 4096,
            "layer_types": None,
        },
        olmo3,
        write_olmo3,
        # transformers takes this base for local layers, whatever rope_theta is, unless rope_parameters name theirs.
        local_rope_theta=500_000.0,
    ),
}
