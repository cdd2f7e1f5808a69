"""Families that differ from Llama in a few options, one row each."""

from __future__ import annotations

from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.families.fields import (
    attention_biases,
    llama_biases,
    used_windows,
    windows,
    write_llama_biases,
    write_windows,
)
from cotgrpo.models.huggingface.family import Family, HfConfig, ModelError


def cwm(field: HfConfig) -> dict[str, Any]:
    """Return CWM's options: windows in all layers but the first of four."""
    types = ["sliding_attention" if i % 4 else "full_attention" for i in range(field["num_hidden_layers"])]
    biases = ("gate", "up", "down") if field["mlp_bias"] else ()
    return {"biases": biases, **windows(field, types)}


def seed_oss(field: HfConfig) -> dict[str, Any]:
    """Return Seed-OSS's options: three fields for biases."""
    biases: tuple[str, ...] = ("query", "key", "value") if field["attention_bias"] else ()
    biases += ("out",) if field["attention_out_bias"] else ()
    return {"biases": biases + (("gate", "up", "down") if field["mlp_bias"] else ())}


def internlm3(field: HfConfig) -> dict[str, Any]:
    """Return InternLM3's options. Its first files have other names for the two fields of Llama."""
    qkv, others = (field[new] if field[old] is None else field[old] for old, new in INTERNLM3_NAMES.items())
    if bool(qkv) != bool(others):
        raise ModelError(
            f"config.json: qkv_bias is {qkv} and bias is {others}; transformers' InternLM3 supports equal values only."
        )
    return llama_biases({"attention_bias": qkv, "mlp_bias": others})


def smollm3(field: HfConfig) -> dict[str, Any]:
    """Return SmolLM3's options: no rotation in every fourth layer, which alone may have a window."""
    count, interval = field["num_hidden_layers"], field["no_rope_layer_interval"]
    rotated = field["no_rope_layers"]  # 1: with rotation
    if rotated is None:
        rotated = [int((i + 1) % interval != 0) for i in range(count)]
    if not isinstance(rotated, list) or len(rotated) < count:
        raise ModelError(f"config.json: no_rope_layers must hold 0 or 1 for each of the {count} layers, got {rotated}.")
    rotated = rotated[:count]
    types = ["full_attention" if turned else "sliding_attention" for turned in rotated]
    return {
        **llama_biases(field),
        **used_windows(field, types),
        "unrotated_layers": tuple(i for i, turned in enumerate(rotated) if not turned),
    }


def write_smollm3(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `smollm3` reads."""
    return {
        **write_llama_biases(config),
        **write_windows(config),
        "use_sliding_window": config.window is not None,
        "no_rope_layers": [int(i not in config.unrotated_layers) for i in range(config.num_layers)],
        "pad_token_id": None,  # the default may lie beyond the vocabulary
    }


def exaone4(field: HfConfig) -> dict[str, Any]:
    """Return EXAONE 4's options: norms after the blocks only. If there are windows, global layers rotate nothing."""
    count, pattern = field["num_hidden_layers"], field["sliding_window_pattern"]
    options = {"pre_norms": False, "post_norms": True, "qk_norm": True}
    if field["sliding_window"] is None:
        return options | windows(field, ["full_attention"] * count)
    if isinstance(pattern, str):
        local = [pattern[i % len(pattern)] == "L" and i < count - 1 for i in range(count)]
    else:
        local = [bool(pattern) and (i + 1) % pattern != 0 for i in range(count)]
    types = ["sliding_attention" if here else "full_attention" for here in local]
    found = windows(field, types)
    within = range(count) if found and found["local_layers"] is None else found.get("local_layers", ())
    return options | found | {"unrotated_layers": tuple(i for i in range(count) if i not in within)}


def phi3(field: HfConfig) -> dict[str, Any]:
    """Return Phi's options: a part of each head is rotated, and every layer may have a window."""
    head_dim = field["head_dim"] or field["hidden_size"] // field["num_attention_heads"]
    rotated = int(head_dim * field["partial_rotary_factor"])
    return {"window": field["sliding_window"], "rotary_dim": None if rotated == head_dim else rotated}


def write_phi3(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `phi3` reads."""
    scaling, longest = config.rope_scaling, config.max_positions or 4096
    return {
        "sliding_window": config.window,
        "partial_rotary_factor": (config.rotary_dim or config.head_dim) / config.head_dim,
        "original_max_position_embeddings": scaling.original_length if scaling else longest,
        "pad_token_id": None,  # the default may lie beyond the vocabulary
    }


def without_gate(field: HfConfig) -> dict[str, Any]:
    """Return the biases of an MLP without a gate."""
    return {"biases": attention_biases(field) + (("up", "down") if field["mlp_bias"] else ())}


INTERNLM3_NAMES = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}

DENSE: dict[str, Family] = {
    "cwm": Family(
        "CwmForCausalLM",
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": 8192,
            "layer_types": None,
            "mlp_bias": False,
        },
        cwm,
        lambda config: {"mlp_bias": "down" in config.biases, **write_windows(config)},
        default_rope={
            "rope_type": "llama3",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
            "attention_dropout": 0.1,
            "mlp_bias": False,
        },
        seed_oss,
        lambda config: {
            "attention_bias": "query" in config.biases,
            "attention_out_bias": "out" in config.biases,
            "mlp_bias": "down" in config.biases,
        },
    ),
    "internlm3": Family(
        "InternLM3ForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "mlp_bias": False,
            "qkv_bias": None,
            "bias": None,
            "auto_map": None,
        },
        internlm3,
        write_llama_biases,
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        {
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": True,
            "use_bias": False,
            "auto_map": None,
        },
        lambda field: llama_biases({"attention_bias": field["use_bias"], "mlp_bias": field["use_bias"]}),
        lambda config: {"use_bias": "out" in config.biases},
        ignored="compression_ratio|.*dropout.*|fuse_.*|rope_(scaling|1d|3d).*|max_sequence_length|sinkhorn_.*|freq_.*",
        interleaved=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "layer_types": None,
            "attention_bias": False,
            "mlp_bias": False,
        },
        smollm3,
        write_smollm3,
        ignored="max_window_layers",
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        exaone4,
        write_windows,
    ),
    # Phi-3, Phi-3.5, Phi-4 and Phi-4-mini.
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
            "auto_map": None,
        },
        phi3,
        write_phi3,
        fixed={"full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,), "mlp_bias": (False,)}
        | {"attention_bias": (False,)},
        rope_kinds=frozenset({"longrope"}),
        fused={"self_attn.qkv_proj": ("query", "key", "value"), "mlp.gate_up_proj": ("gate", "up")},
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1ForCausalLM",
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attention_bias": False},
        lambda field: {"qk_norm": True, "qk_norm_rotated": True, "biases": attention_biases(field)},
        lambda config: {"attention_bias": "out" in config.biases},
        fixed={"use_qk_norm": (True,), "use_rotary_pos_emb": (True,), "norm_type": ("rms",), "num_experts": (1, 0)}
        | {"use_cla": (False,), "use_mla": (False,), "mlp_bias": (False,), "position_embedding_xdrope": (False,)},
        ignored="anyres_.*|vit_.*|moe_.*|.*_token_id|.*_id|.*media.*|attention_head_dim|cla_share_factor|class_num|"
        "dense_list|max_image_size|org_vocab_size|pool_type|qk_(no|ro)pe_head_dim|num_shared_expert|auto_map|"
        "(kv|q)_lora_rank|v_head_dim|norm_topk_prob|use_mixed_mlp_moe|group_limited_greedy|topk_group|n_group|"
        "routed_scaling_factor|skip_cls_token|add_classification_head",
        rope_kinds=frozenset({"alpha"}),
        modules={"query_norm": "self_attn.query_layernorm", "key_norm": "self_attn.key_layernorm"},
    ),
    "arcee": Family(
        "ArceeForCausalLM",
        {
            "hidden_act": "relu2",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "mlp_bias": False,
        },
        without_gate,
        write_llama_biases,
        activations={"relu2": "relu2"},
    ),
    "apertus": Family(
        "ApertusForCausalLM",
        {
            "hidden_act": "xielu",
            "max_position_embeddings": 65536,
            "rms_norm_eps": 1e-5,
            "rope_theta": 12_000_000.0,
            "attention_bias": False,
        },
        lambda field: {"qk_norm": True, "biases": attention_biases(field)},
        lambda config: {"attention_bias": "out" in config.biases},
        activations={"xielu": "xielu"},
        fixed={"qk_norm": (True,), "post_norm": (False,), "mlp_bias": (False,)},
        default_rope={
            "rope_type": "llama3",
            "rope_theta": 12_000_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        modules={"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
    ),
}
