"""Gemma 1 to 4."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.families.fields import TYPES, attention_biases, window_between, windows, write_windows
from cotgrpo.models.huggingface.family import Family, HfConfig, ModelError
from cotgrpo.models.huggingface.rope_fields import write_rope
from cotgrpo.models.layers.options import PerLayerEmbeddings
from cotgrpo.models.layers.pattern import LayerKind


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


def gemma4(field: HfConfig) -> dict[str, Any]:
    """Return Gemma 4's options: scaled scores and norms of its own, embeddings of each layer, kinds of layers."""
    five_to_one = [TYPES[bool((i + 1) % 6)] for i in range(field["num_hidden_layers"])]
    # transformers makes the last layer a global one, whatever layer_types has.
    local = windows({**field, "layer_types": [*(field["layer_types"] or five_to_one)[:-1], "full_attention"]}, [])
    width = field["hidden_size_per_layer_input"] or 0
    for name, value in (
        ("hidden_size_per_layer_input", width),
        ("num_kv_shared_layers", field["num_kv_shared_layers"]),
    ):
        if not isinstance(value, int):
            raise ModelError(f"config.json: {name} is {value!r}; expected an integer, 0 for none.")
    kinds = gemma4_kinds(field, local.get("local_layers") or ())
    return {
        "layer_kinds": kinds if len(set(kinds)) > 1 or kinds[0] != LayerKind() else None,
        "post_norms": True,
        "qk_norm": True,
        "value_norm": True,
        "layer_scale": True,
        "query_scale": 1.0,
        "embedding_scale": math.sqrt(field["hidden_size"]),
        "logit_softcap": field["final_logit_softcapping"],
        "biases": attention_biases(field),
        "per_layer_embeddings": PerLayerEmbeddings(width, field["vocab_size_per_layer_input"]) if width else None,
        "local_rope_theta": field["local_rope_theta"] if local else None,
        **local,
    }


def gemma4_kinds(field: HfConfig, local: Collection[int]) -> tuple[LayerKind, ...]:
    """Return the kind of each layer: global ones have heads of their own, the last ones share keys and values."""
    layers, shared = field["num_hidden_layers"], field["num_kv_shared_layers"] or 0
    if not 0 <= shared < layers:
        raise ModelError(
            f"config.json: num_kv_shared_layers is {shared}; expected 0 to {layers - 1}, as a layer before them has to "
            "have keys and values."
        )
    heads, first = attention_heads(field, local), layers - shared
    wide = 2 * field["intermediate_size"] if field["use_double_wide_mlp"] else None
    plain = {"head_dim": field["head_dim"], "num_kv_heads": field["num_key_value_heads"]}
    kinds = []
    for index in range(layers):
        own: dict[str, Any] = {name: value for name, value in heads[index in local].items() if value != plain[name]}
        equal = field["attention_k_eq_v"] and index not in local and index < first
        mlp, reads = (wide, True) if index >= first else (None, None)
        kinds.append(LayerKind(**own, mlp_width=mlp, shared_keys=reads, key_is_value=equal or None))
    return tuple(kinds)


def attention_heads(field: HfConfig, local: Collection[int]) -> dict[bool, dict[str, int]]:
    """Return the width and number of key/value heads of local layers (True) and of global ones (False).

    They are fields of `per_layer_config`, which transformers 5.24 writes, or of `global_head_dim` and
    `num_global_key_value_heads`, which files on the hub have.
    """
    plain = {"head_dim": field["head_dim"], "num_kv_heads": field["num_key_value_heads"]}
    found = {True: plain, False: plain}
    if not isinstance(field["per_layer_config"] or {}, Mapping):
        raise ModelError(f"config.json: per_layer_config is {field['per_layer_config']!r}; expected an object.")
    if field["per_layer_config"] is None:
        own = {"head_dim": field["global_head_dim"]}
        for name in ("global_head_dim", "num_global_key_value_heads"):
            absent = field[name] is None and name == "num_global_key_value_heads"
            if not absent and not (isinstance(field[name], int) and field[name] > 0):
                raise ModelError(f"config.json: {name} is {field[name]!r}; expected a positive integer.")
        if field["attention_k_eq_v"] and field["num_global_key_value_heads"] is not None:
            own["num_kv_heads"] = field["num_global_key_value_heads"]
        return {**found, False: plain | own}
    names = {"head_dim": "head_dim", "num_key_value_heads": "num_kv_heads"}
    given = {int(index): dict(own) for index, own in field["per_layer_config"].items()}
    for kind in found:
        layers = [i for i in range(field["num_hidden_layers"]) if (i in local) == kind]
        overrides = [given.get(i, {}) for i in layers] or [{}]
        unknown = sorted({name for own in overrides for name in own} - set(names))
        if unknown or any(own != overrides[0] for own in overrides):
            what = f"sets {', '.join(unknown)}" if unknown else "differs between layers of one type"
            raise ModelError(
                f"config.json: per_layer_config {what}; supported: head_dim and num_key_value_heads, the same in all "
                "layers of one type."
            )
        found[kind] = plain | {names[name]: value for name, value in overrides[0].items()}
    return found


def write_gemma4(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `gemma4` reads."""
    own, scaling = config.per_layer_embeddings, config.rope_scaling
    last = config.layers[-1]  # a global one
    wide = last.shared_keys and last.mlp_width != config.mlp_width
    spec = write_rope(scaling) or {"rope_type": "default"}
    spec = {name: value for name, value in spec.items() if (name, value) != ("factor", 1.0)}
    share = {"partial_rotary_factor": scaling.rotated_share} if scaling and scaling.kind == "proportional" else {}
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta or 10_000.0}
    return {
        "final_logit_softcapping": config.logit_softcap,
        "attention_bias": "out" in config.biases,
        "hidden_size_per_layer_input": own.width if own else 0,
        "vocab_size_per_layer_input": own.vocab_size if own else config.vocab_size,
        "global_head_dim": last.head_dim,
        "num_global_key_value_heads": last.num_kv_heads if last.num_kv_heads != config.num_kv_heads else None,
        "attention_k_eq_v": any(layer.key_is_value for layer in config.layers),
        "num_kv_shared_layers": sum(layer.shared_keys for layer in config.layers),
        "use_double_wide_mlp": wide,
        "rope_parameters": {
            "full_attention": {**spec, **share, "rope_theta": config.rope_theta},
            "sliding_attention": local,
        },
        **write_windows(config),
    }


GEMMA4_TEXT = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "tie_word_embeddings": True,
}
"""What a `text_config` may leave out, as it equals the defaults of transformers."""
GEMMA4_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "sliding_window": 512,
    "layer_types": None,
    "final_logit_softcapping": None,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "per_layer_config": None,
    "partial_rotary_factor": None,
}
GEMMA4_ROPE: dict[str, Any] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
GEMMA4_FIXED: dict[str, tuple[Any, ...]] = {
    "enable_moe_block": (False, None),
    # "vision": tokens of an image see each other. There are none in text.
    "use_bidirectional_attention": (None, "vision", False),
}
GEMMA4_COMMON: dict[str, Any] = {
    "writes": write_gemma4,
    "fixed": GEMMA4_FIXED,
    "default_rope": GEMMA4_ROPE,
    "local_rope_theta": 10_000.0,
    "rope_kinds": frozenset({"proportional"}),
}
"""What both forms of Gemma 4 have."""

GEMMA: dict[str, Family] = {
    "gemma4_text": Family(
        "Gemma4ForCausalLM",
        GEMMA4_DEFAULTS,
        gemma4,
        ignored="num_experts|top_k_experts|(moe|expert)_intermediate_size",
        **GEMMA4_COMMON,
    ),
    # The 12B model, which reads images and sound without towers of their own.
    "gemma4_unified_text": Family(
        "Gemma4UnifiedForCausalLM",
        {
            **GEMMA4_DEFAULTS,
            "max_position_embeddings": 262144,
            "sliding_window": 1024,
            "hidden_size_per_layer_input": 0,
        },
        lambda field: gemma4({**field, "hidden_size_per_layer_input": 0}),  # transformers does not read it here
        **GEMMA4_COMMON,
    ),
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
