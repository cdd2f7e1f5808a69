"""Families of Hugging Face models, as data: fields of their config.json as a `DecoderConfig`, and names of modules.

A family is a row of `FAMILIES`: the fields of its config.json, their defaults, the options of the decoder, and the
names of its modules. `cotgrpo.models.huggingface.config` reads and writes config.json by these rows, and
`cotgrpo.models.huggingface.tensor_layout` finds the decoder's parameters in a checkpoint. A model with images around
its text part is a row of `WRAPPERS`: the text part is one of the families.
"""

from __future__ import annotations

import math
from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.family import Family, HfConfig, Wrapper
from cotgrpo.models.huggingface.family import ModelError as ModelError
from cotgrpo.models.huggingface.rope_fields import write_rope


def window_after(field: HfConfig) -> dict[str, Any]:
    """Return Qwen's windows: with `use_sliding_window`, in the layers from `max_window_layers` on."""
    types = ["full_attention", "sliding_attention"]
    return used_windows(field, [types[i >= field["max_window_layers"]] for i in range(field["num_hidden_layers"])])


def used_windows(field: HfConfig, layer_types: list[str]) -> dict[str, Any]:
    """Return the windows of a family with `use_sliding_window`, which switches them off."""
    if not field["use_sliding_window"] or field["sliding_window"] is None:
        if "sliding_attention" in (field["layer_types"] or ()):
            raise ModelError(
                "config.json: layer_types holds sliding_attention, but use_sliding_window is false: set it to true, "
                "or make every layer full_attention."
            )
        return {}
    return windows(field, layer_types)


def window_between(field: HfConfig, pattern: int) -> dict[str, Any]:
    """Return Gemma's windows: in all layers but every `pattern`-th."""
    types = ["full_attention", "sliding_attention"]
    return windows(field, [types[bool((i + 1) % pattern)] for i in range(field["num_hidden_layers"])])


def windows(field: HfConfig, layer_types: list[str]) -> dict[str, Any]:
    """Return `window` and `local_layers` from config.json's `layer_types`, or from the argument if it has none."""
    layer_types = field["layer_types"] or layer_types
    if len(layer_types) != field["num_hidden_layers"] or set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ModelError(
            "config.json: layer_types must name full_attention or sliding_attention for each of the "
            f"{field['num_hidden_layers']} layers, got {layer_types}."
        )
    local = tuple(i for i, kind in enumerate(layer_types) if kind == "sliding_attention")
    if not local:
        return {}
    if field["sliding_window"] is None:
        raise ModelError(
            "config.json: layer_types holds sliding_attention, but sliding_window is null: give its length."
        )
    return {"window": field["sliding_window"], "local_layers": None if len(local) == len(layer_types) else local}


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `windows` reads."""
    local = range(config.num_layers) if config.local_layers is None else config.local_layers
    local = local if config.window is not None else ()
    types = ["full_attention", "sliding_attention"]
    return {"sliding_window": config.window, "layer_types": [types[i in local] for i in range(config.num_layers)]}


def attention_biases(field: HfConfig) -> tuple[str, ...]:
    """Return the projections that have a bias with `attention_bias`."""
    return ("query", "key", "value", "out") if field["attention_bias"] else ()


def llama_biases(field: HfConfig) -> dict[str, Any]:
    """Return the biases of `attention_bias` and `mlp_bias`."""
    return {"biases": attention_biases(field) + (("gate", "up", "down") if field["mlp_bias"] else ())}


def write_llama_biases(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `llama_biases` reads."""
    return {"attention_bias": "out" in config.biases, "mlp_bias": "down" in config.biases}


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


def all_windows(field: HfConfig) -> dict[str, Any]:
    """Return the windows of a family whose layers all have one, unless `layer_types` says otherwise."""
    kind = "full_attention" if field["sliding_window"] is None else "sliding_attention"
    return windows(field, [kind] * field["num_hidden_layers"])


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


INTERNLM3_NAMES = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}


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


def granite(field: HfConfig) -> dict[str, Any]:
    """Return Granite's four multipliers."""
    unless_one = lambda name: None if field[name] in (1, None) else float(field[name])
    return {
        "embedding_scale": unless_one("embedding_multiplier"),
        "residual_scale": unless_one("residual_multiplier"),
        "logit_divisor": unless_one("logits_scaling"),
        "query_scale": 1.0 if field["attention_multiplier"] is None else float(field["attention_multiplier"]),
        "biases": attention_biases(field),
    }


def write_granite(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `granite` reads."""
    return {
        "embedding_multiplier": config.embedding_scale or 1.0,
        "residual_multiplier": config.residual_scale or 1.0,
        "logits_scaling": config.logit_divisor or 1.0,
        "attention_multiplier": config.query_scale or config.head_dim**-0.5,
        "attention_bias": "out" in config.biases,
    }


def granite_hybrid(field: HfConfig) -> dict[str, Any]:
    """Return the options of Granite 4's dense models."""
    others = sorted(set(field["layer_types"] or ["mamba"]) - {"attention", "full_attention"})
    if others or len(field["layer_types"]) != field["num_hidden_layers"]:
        raise ModelError(
            "config.json of a granitemoehybrid model: layer_types must name attention for each of the "
            f"{field['num_hidden_layers']} layers, got {', '.join(others) or len(field['layer_types'] or ())}: layers "
            "with a state (mamba) are not supported. Granite 4's dense models (granite-4.0-350m, granite-4.0-1b, "
            "granite-4.0-micro) are."
        )
    rotated = field["position_embedding_type"] == "rope"
    layers = range(field["num_hidden_layers"])
    return {
        **granite(field),
        "mlp_width": field["shared_intermediate_size"],
        "unrotated_layers": () if rotated else tuple(layers),
    }


def write_granite_hybrid(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `granite_hybrid` reads."""
    return {
        **write_granite(config),
        "shared_intermediate_size": config.mlp_width,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["attention"] * config.num_layers,
        "position_embedding_type": "rope" if config.num_rotated else "nope",
        # transformers checks that these fit together, with or without such layers.
        "mamba_n_heads": config.width,
        "mamba_expand": 1,
        "mamba_d_head": 1,
    }


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
QWEN_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

GRANITE_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "attention_multiplier": 1.0,
}

FAMILIES: dict[str, Family] = {
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
    # Granite 3.
    "granite": Family(
        "GraniteForCausalLM",
        {**GRANITE_DEFAULTS, "mlp_bias": False},
        lambda field: {**granite(field), "biases": llama_biases(field)["biases"]},
        lambda config: {**write_granite(config), **write_llama_biases(config)},
    ),
    # Granite 4's dense models. The MLP is what the models with experts share.
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        {
            **GRANITE_DEFAULTS,
            "intermediate_size": 11008,
            "shared_intermediate_size": 1024,
            "position_embedding_type": None,
            "layer_types": None,
        },
        granite_hybrid,
        write_granite_hybrid,
        fixed={"num_local_experts": (0,), "normalization_function": ("rmsnorm",), "init_method": ("mup",)},
        ignored="mamba_.*|time_step_limit|num_experts_per_tok|output_router_logits|router_aux_loss_coef|.*_token_id",
        modules={"down": "shared_mlp.output_linear"},
        fused={"shared_mlp.input_linear": ("gate", "up")},
    ),
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

WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper(
        "Gemma3ForConditionalGeneration",
        ("gemma3_text",),
        # Published files leave out what equals the defaults of transformers.
        {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_vl": Wrapper("Qwen3VLForConditionalGeneration", ("qwen3_vl_text",), {}),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", ("mistral", "ministral3"), {"head_dim": 128}),
}

LACKING = {
    "qwen3_5": "gated delta-net layers and gated attention",
    "qwen3_next": "gated delta-net layers, gated attention and experts",
    "gemma4": "per-layer embeddings, shared keys and values, and another head width in global layers",
    "gemma3n": "per-layer embeddings, shared keys and values, and low-rank residuals",
    "qwen3_moe": "experts",
    "gpt_oss": "experts, attention sinks and MXFP4 weights",
    "deepseek_v3": "experts and latent attention",
    "mixtral": "experts",
    "lfm2": "short convolutions with a state",
    "llama4": "experts and chunked attention",
}
"""{`model_type`: what the decoder lacks} of types that people ask for."""

MODULES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
}
"""{our name: the module's name in a layer of the checkpoint}. `Family.modules` override them."""

POST_NORM_MODULES = {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
"""The same for families with norms after attention and after the MLP."""

PROJECTIONS = {name: MODULES[name] for name in ("query", "key", "value", "out", "gate", "up", "down")}
