"""Granite 3 and 4."""

from __future__ import annotations

from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.families.fields import attention_biases, llama_biases, write_llama_biases
from cotgrpo.models.huggingface.family import Family, HfConfig, ModelError


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


GRANITE_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "attention_multiplier": 1.0,
}

GRANITE: dict[str, Family] = {
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
}
