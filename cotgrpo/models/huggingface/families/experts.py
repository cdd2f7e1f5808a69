"""Families with a mixture of experts: Qwen 2 and 3, OLMoE, Mixtral, Granite and gpt-oss."""

from __future__ import annotations

from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.families.fields import attention_biases, windows, write_windows
from cotgrpo.models.huggingface.families.granite import GRANITE_DEFAULTS, granite, write_granite
from cotgrpo.models.huggingface.families.qwen import (
    MROPE,
    QWEN3_5_DEFAULTS,
    QWEN3_5_FIXED,
    QWEN3_5_IGNORED,
    qwen3_5,
    write_qwen3_5,
)
from cotgrpo.models.huggingface.family import ExpertNames, Family, HfConfig, ModelError
from cotgrpo.models.layers.experts import Experts
from cotgrpo.models.layers.pattern import LayerKind

NO_EXPERTS = Experts(1, 1, 1)
"""What a config.json is written with for a decoder without experts, which then differs."""
IGNORED = "output_router_logits|router_aux_loss_coef|router_jitter_noise|_?experts_implementation"
"""Fields that concern the training of the router in transformers, or how experts are computed."""


def mixture(field: HfConfig, number: str, width: str, normalized: bool, **others: Any) -> dict[str, Any]:
    """Return the options of layers with experts. `number` and `width` are names of fields."""
    sizes = {name: field[name] for name in (number, "num_experts_per_tok", width)}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ModelError(f"config.json: {name} is {size!r}; expected a positive integer.")
    if sizes["num_experts_per_tok"] > sizes[number]:
        raise ModelError(
            f"config.json: num_experts_per_tok is {sizes['num_experts_per_tok']}, but {number} is {sizes[number]}: "
            "expected at most that."
        )
    experts = Experts(sizes[number], sizes["num_experts_per_tok"], sizes[width], normalized=normalized, **others)
    return {"mlp": "experts", "experts": experts}


def number_of_experts(field: HfConfig, default: int) -> HfConfig:
    """Return the fields with `num_experts`, which transformers 5 writes as `num_local_experts`."""
    given = {field[name] for name in ("num_experts", "num_local_experts") if field[name] is not None}
    if len(given) > 1:
        raise ModelError(
            f"config.json: num_experts is {field['num_experts']} and num_local_experts is "
            f"{field['num_local_experts']}: remove one."
        )
    return {**field, "num_experts": given.pop() if given else default}


def sparse_layers(field: HfConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with Qwen's choice of layers: every `decoder_sparse_step`-th one but `mlp_only_layers`."""
    count, step, dense = field["num_hidden_layers"], field["decoder_sparse_step"], field["mlp_only_layers"] or ()
    if not isinstance(step, int) or step < 1:
        raise ModelError(f"config.json: decoder_sparse_step is {step!r}; expected a positive integer.")
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(count)]
    if all(sparse):
        return options
    if not any(sparse):
        return {name: value for name, value in options.items() if name not in ("mlp", "experts")}
    # Where a shared MLP has another width than the dense layers, each kind of layer has its own.
    shared = field.get("shared_expert_intermediate_size")
    widths = {True: shared or None, False: field["intermediate_size"] if shared else None}
    kinds = tuple(LayerKind(mlp="experts" if own else "dense", mlp_width=widths[own]) for own in sparse)
    return options | {"mlp": "dense", "mlp_width": field["intermediate_size"], "layer_kinds": kinds}


def write_mixture(config: DecoderConfig, number: str, width: str) -> dict[str, Any]:
    """Return the fields that `mixture` reads."""
    experts = config.experts or NO_EXPERTS
    return {number: experts.number, "num_experts_per_tok": experts.chosen, width: experts.width}


def write_sparse_layers(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `sparse_layers` reads."""
    dense = [i for i, layer in enumerate(config.layers) if layer.mlp == "dense"]
    return {
        **write_mixture(config, "num_experts", "moe_intermediate_size"),
        "norm_topk_prob": (config.experts or NO_EXPERTS).normalized,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


def qwen3_moe(field: HfConfig) -> dict[str, Any]:
    """Return Qwen3's options: q/k norms, and experts in most layers."""
    field = number_of_experts(field, 128)
    options = {"qk_norm": True, "biases": attention_biases(field)}
    if field["use_sliding_window"]:
        options["window"] = field["sliding_window"]
    return sparse_layers(
        field, options | mixture(field, "num_experts", "moe_intermediate_size", field["norm_topk_prob"])
    )


def qwen2_moe(field: HfConfig) -> dict[str, Any]:
    """Return Qwen1.5's and 2's options: an MLP with a gate of its own next to the experts."""
    field = number_of_experts(field, 60)
    if field["use_sliding_window"]:
        raise ModelError("config.json of a qwen2_moe model: use_sliding_window is true; supported: false.")
    options: dict[str, Any] = {"biases": ("query", "key", "value") if field["qkv_bias"] else ()}
    experts = mixture(
        field, "num_experts", "moe_intermediate_size", field["norm_topk_prob"], shared=True, shared_gate=True
    )
    return sparse_layers(field, options | experts | {"mlp_width": field["shared_expert_intermediate_size"]})


def write_qwen2_moe(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `qwen2_moe` reads."""
    shared = next((layer.mlp_width for layer in config.layers if layer.mlp == "experts"), config.mlp_width)
    return {
        **write_sparse_layers(config),
        "shared_expert_intermediate_size": shared,
        "qkv_bias": "query" in config.biases,
        "use_sliding_window": False,
    }


def qwen3_5_moe(field: HfConfig) -> dict[str, Any]:
    """Return the options of Qwen3.5 with experts in every layer, and an MLP with a gate of its own next to them."""
    field = number_of_experts(field, 256)
    experts = mixture(field, "num_experts", "moe_intermediate_size", True, shared=True, shared_gate=True)
    return {**qwen3_5(field), **experts, "mlp_width": field["shared_expert_intermediate_size"]}


def write_qwen3_5_moe(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `qwen3_5_moe` reads."""
    return {
        **write_qwen3_5(config),
        **write_mixture(config, "num_experts", "moe_intermediate_size"),
        "shared_expert_intermediate_size": config.mlp_width,
    }


def olmoe(field: HfConfig) -> dict[str, Any]:
    """Return OLMoE's options: q/k norms over the whole width."""
    field = number_of_experts(field, 64)
    experts = mixture(field, "num_experts", "intermediate_size", field["norm_topk_prob"])
    return {"qk_norm": True, "qk_norm_over": "width", "biases": attention_biases(field), **experts}


def write_local_experts(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields of experts that Mixtral, Granite and gpt-oss share."""
    return write_mixture(config, "num_local_experts", "intermediate_size")


def granite_moe(field: HfConfig) -> dict[str, Any]:
    """Return the options of Granite's experts, and of the MLP that all tokens share."""
    shared = field.get("shared_intermediate_size") or 0
    experts = mixture(field, "num_local_experts", "intermediate_size", True, shared=shared > 0)
    return {**granite(field), **experts, **({"mlp_width": shared} if shared else {})}


def write_granite_shared(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields of `granite_moe` with a shared MLP."""
    shared = config.experts is not None and config.experts.shared
    own = {"shared_intermediate_size": config.mlp_width if shared else 0}
    return {**write_granite(config), **write_local_experts(config), **own}


def gpt_oss(field: HfConfig) -> dict[str, Any]:
    """Return gpt-oss's options: sinks, a clipped activation, biases, and a window in every other layer."""
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(field["num_hidden_layers"])]
    experts = mixture(
        field,
        "num_local_experts",
        "intermediate_size",
        True,
        biases=True,
        limit=float(field["swiglu_limit"]),
        gate_slope=float(field["swiglu_alpha"]),
    )
    return {"sinks": True, "biases": attention_biases(field), **windows(field, types), **experts}


def write_gpt_oss(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `gpt_oss` reads."""
    experts = config.experts or NO_EXPERTS
    return {
        **write_local_experts(config),
        **write_windows(config),
        "swiglu_limit": experts.limit or 7.0,
        "swiglu_alpha": experts.gate_slope,
        "attention_bias": "out" in config.biases,
    }


QWEN_SHARED = {name: f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
QWEN_EXPERTS = (
    ExpertNames(
        "mlp.gate",
        {name: f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")},
        shared=QWEN_SHARED,
    ),
    ExpertNames("mlp.gate", shared=QWEN_SHARED),
)
"""A tensor for each expert, as files have it, or one of all, as the classes of transformers 5 have it."""
MIXTRAL_EXPERTS = (
    ExpertNames(
        "block_sparse_moe.gate",
        {
            "gate": "block_sparse_moe.experts.{}.w1.weight",
            "up": "block_sparse_moe.experts.{}.w3.weight",
            "down": "block_sparse_moe.experts.{}.w2.weight",
        },
    ),
    ExpertNames("mlp.gate"),
)
GRANITE_EXPERTS = (
    ExpertNames(
        "block_sparse_moe.router.layer",
        gate_up="block_sparse_moe.input_linear.weight",
        down="block_sparse_moe.output_linear.weight",
    ),
    ExpertNames(
        "block_sparse_moe.router",
        gate_up="block_sparse_moe.experts.gate_up_proj",
        down="block_sparse_moe.experts.down_proj",
    ),
)
QWEN_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
}
GRANITE_MOE_DEFAULTS: dict[str, Any] = {**GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2}

EXPERTS: dict[str, Family] = {
    # Qwen3-30B-A3B and 235B-A22B.
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **QWEN_DEFAULTS,
            "num_key_value_heads": 4,
            "attention_bias": False,
            "num_experts": None,
            "num_local_experts": None,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        qwen3_moe,
        lambda config: {
            **write_sparse_layers(config),
            "attention_bias": "out" in config.biases,
            "use_sliding_window": config.window is not None,
            "sliding_window": config.window,
        },
        # Qwen3-Coder names them. The class in transformers does not read them.
        fixed={"use_qk_norm": (True, None), "qkv_bias": (False, None), "shared_expert_intermediate_size": (0, None)},
        ignored=f"{IGNORED}|max_window_layers",
        experts=QWEN_EXPERTS,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {
            **QWEN_DEFAULTS,
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "num_experts": None,
            "num_local_experts": None,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        qwen2_moe,
        write_qwen2_moe,
        ignored=f"{IGNORED}|max_window_layers|layer_types",
        experts=QWEN_EXPERTS,
    ),
    # The text part of Qwen3.5's models with experts.
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        {
            **QWEN3_5_DEFAULTS,
            "num_key_value_heads": 2,
            "num_experts": None,
            "num_local_experts": None,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "intermediate_size": 512,
        },
        qwen3_5_moe,
        write_qwen3_5_moe,
        activations={"silu": "silu"},
        fixed=QWEN3_5_FIXED | {"norm_topk_prob": (True, None)},
        ignored=f"{IGNORED}|{QWEN3_5_IGNORED}",
        ignored_rope=MROPE,
        experts=QWEN_EXPERTS,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "num_experts": None,
            "num_local_experts": None,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        olmoe,
        lambda config: {
            "attention_bias": "out" in config.biases,
            "num_experts": (config.experts or NO_EXPERTS).number,
            "num_experts_per_tok": (config.experts or NO_EXPERTS).chosen,
            "intermediate_size": (config.experts or NO_EXPERTS).width,
            "norm_topk_prob": (config.experts or NO_EXPERTS).normalized,
        },
        fixed={"clip_qkv": (None,)},
        ignored=IGNORED,
        experts=QWEN_EXPERTS,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        lambda field: {
            "window": field["sliding_window"],
            **mixture(field, "num_local_experts", "intermediate_size", True),
        },
        lambda config: {"sliding_window": config.window, **write_local_experts(config)},
        ignored=IGNORED,
        experts=MIXTRAL_EXPERTS,
    ),
    # Granite 3's models with experts.
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        GRANITE_MOE_DEFAULTS,
        granite_moe,
        lambda config: {**write_granite(config), **write_local_experts(config)},
        ignored=IGNORED,
        experts=GRANITE_EXPERTS,
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedForCausalLM",
        {**GRANITE_MOE_DEFAULTS, "shared_intermediate_size": 0},
        granite_moe,
        write_granite_shared,
        ignored=IGNORED,
        modules={"down": "shared_mlp.output_linear"},
        fused={"shared_mlp.input_linear": ("gate", "up")},
        experts=GRANITE_EXPERTS,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "sliding_window": 128,
            "layer_types": None,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
        },
        gpt_oss,
        write_gpt_oss,
        ignored=f"{IGNORED}|experts_per_token|initial_context_length",
        default_rope={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        experts=(ExpertNames("mlp.router", inputs_first=True, interleaved=True),),
    ),
}
