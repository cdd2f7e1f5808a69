"""Qwen 2, 2.5, 3 and 3.5."""

from __future__ import annotations

from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.families.fields import attention_biases, used_windows, write_windows
from cotgrpo.models.huggingface.family import Family, HfConfig, ModelError
from cotgrpo.models.huggingface.rope_fields import write_rope
from cotgrpo.models.layers.options import DeltaNet
from cotgrpo.models.layers.pattern import LayerKind


def window_after(field: HfConfig) -> dict[str, Any]:
    """Return Qwen's windows: with `use_sliding_window`, in the layers from `max_window_layers` on."""
    types = ["full_attention", "sliding_attention"]
    return used_windows(field, [types[i >= field["max_window_layers"]] for i in range(field["num_hidden_layers"])])


MIXERS = {"linear_attention": "delta", "full_attention": "attention"}
"""{`layer_types` of Qwen3.5: `LayerKind.mixer`}."""
DELTA_NET = {
    "linear_num_key_heads": "num_key_heads",
    "linear_num_value_heads": "num_value_heads",
    "linear_key_head_dim": "key_dim",
    "linear_value_head_dim": "value_dim",
    "linear_conv_kernel_dim": "taps",
}
"""{field of config.json: field of `DeltaNet`}."""


def qwen3_5(field: HfConfig) -> dict[str, Any]:
    """Return Qwen3.5's options: most layers have a gated delta net, and attention has a gate."""
    count, interval = field["num_hidden_layers"], field["full_attention_interval"] or 4
    types = field["layer_types"] or [tuple(MIXERS)[(i + 1) % interval == 0] for i in range(count)]
    if len(types) != count or set(types) - set(MIXERS):
        raise ModelError(
            f"config.json: layer_types must name {' or '.join(MIXERS)} for each of the {count} layers, got {types}."
        )
    kinds = tuple(LayerKind(MIXERS[name]) for name in types)
    head_dim = field["head_dim"] or field["hidden_size"] // field["num_attention_heads"]
    rotated = int(head_dim * field["partial_rotary_factor"])
    options = {
        "qk_norm": True,
        "norm_plus_one": True,
        "attention_gate": True,
        "biases": attention_biases(field),
        "rotary_dim": None if rotated == head_dim else rotated,
    }
    if "linear_attention" in types:
        for name in DELTA_NET:
            if not isinstance(field[name], int) or isinstance(field[name], bool) or field[name] < 1:
                raise ModelError(f"config.json: {name} is {field[name]!r}; expected a positive integer.")
        options["delta_net"] = DeltaNet(**{ours: field[theirs] for theirs, ours in DELTA_NET.items()})
    return options | ({"layer_kinds": kinds} if len(set(kinds)) == 2 else {"mixer": kinds[0].mixer})


def write_qwen3_5(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `qwen3_5` reads."""
    types = {mixer: kind for kind, mixer in MIXERS.items()}
    net = config.delta_net
    return {
        "attention_bias": "out" in config.biases,
        "layer_types": [types.get(layer.mixer) for layer in config.layers],
        "rope_parameters": {
            "rope_type": "default",
            **(write_rope(config.rope_scaling) or {}),
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": (config.rotary_dim or config.head_dim) / config.head_dim,
        },
        **({} if net is None else {theirs: getattr(net, ours) for theirs, ours in DELTA_NET.items()}),
    }


QWEN_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

QWEN3_5_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "layer_types": None,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
QWEN3_5_FIXED: dict[str, tuple[Any, ...]] = {
    "attn_output_gate": (True, None),
    "output_gate_type": ("swish", "silu", None),
    "mamba_ssm_dtype": ("float32", None),
}
QWEN3_5_IGNORED = "mtp_.*|unsloth_.*"
MROPE = frozenset({"mrope_section", "mrope_interleaved"})
"""The three parts of a token's position, which are equal in text."""

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
    # The text part of Qwen3-VL.
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
        ignored_rope=MROPE,
    ),
    # The text part of Qwen3.5.
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        QWEN3_5_DEFAULTS,
        qwen3_5,
        write_qwen3_5,
        activations={"silu": "silu"},
        fixed=QWEN3_5_FIXED,
        ignored=QWEN3_5_IGNORED,
        ignored_rope=MROPE,
    ),
}
