"""Families of Hugging Face models, as data: fields of their config.json as a `DecoderConfig`, and names of tensors.

A family is a row of `FAMILIES`: the fields of its config.json, their defaults, and the options of the decoder.
`cotgrpo.models.huggingface.config` reads and writes config.json by these rows. `tensor_names` maps the decoder's
parameters to the checkpoint's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from cotgrpo.models.config import DecoderConfig

HfConfig = Mapping[str, Any]


class ModelError(ValueError):
    """A model cannot be read or written. The message names the place, what was expected and the fix."""


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

COMMON: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
}
"""Fields of every family with the defaults of transformers. `Family.defaults` override them."""

FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": (None, {}, []),
}
"""Fields that are allowed with these values only. Other values would change the model."""

WITHOUT_EFFECT = frozenset(
    {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "tokenizer_class"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "cache_implementation", "pretraining_tp", "is_llama_config"}
    | {"output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "chunk_size_feed_forward"}
    | {"is_decoder", "problem_type", "id2label", "label2id", "num_labels", "task_specific_params", "finetuning_task"}
    | {"max_length", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "transformers.js_config"}
    | {"unsloth_fixed", "unsloth_version"}
)
"""Fields that do not change a logit. Names with a leading underscore, transformers' bookkeeping, are allowed too."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        architecture: the class in transformers.
        defaults: fields of its config.json that `COMMON` lacks or has with another default.
        reads: `reads(field) -> {name: value}`, options of the `DecoderConfig`. `field` is config.json with defaults
            filled in.
        writes: the inverse: the family's own fields of config.json.
        without_embedding: tokens of its tokenizer without a row in the embedding. They never occur in text.
    """

    architecture: str
    defaults: dict[str, Any]
    reads: Callable[[HfConfig], dict[str, Any]]
    writes: Callable[[DecoderConfig], dict[str, Any]]
    without_embedding: frozenset[str] = frozenset()


def window_after(field: HfConfig) -> dict[str, Any]:
    """Return Qwen's windows: with `use_sliding_window`, in the layers from `max_window_layers` on."""
    if not field["use_sliding_window"] or field["sliding_window"] is None:
        if "sliding_attention" in (field["layer_types"] or ()):
            raise ModelError(
                "config.json: layer_types holds sliding_attention, but use_sliding_window is false: set it to true, "
                "or make every layer full_attention."
            )
        return {}
    types = ["full_attention", "sliding_attention"]
    return windows(field, [types[i >= field["max_window_layers"]] for i in range(field["num_hidden_layers"])])


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
        "local_rope_theta": field["rope_local_base_freq"] if local else None,
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
QWEN_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

FAMILIES: dict[str, Family] = {
    # Llama 3, 3.1, 3.2, SmolLM2 and other models of this type.
    "llama": Family(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
        lambda field: {"biases": attention_biases(field) + (("gate", "up", "down") if field["mlp_bias"] else ())},
        lambda config: {"attention_bias": "out" in config.biases, "mlp_bias": "down" in config.biases},
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
        # The vision models' tokenizer comes with the text models too.
        without_embedding=frozenset({"<image_soft_token>"}),
    ),
}

PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def tensor_names(config: DecoderConfig) -> dict[tuple[str, ...], str]:
    """Return {path in the parameter tree: name in the checkpoint}, with `{}` for the index of a stacked layer.

    Checkpoints store kernels and the head transposed: `[outputs, inputs]`.
    """
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms |= {
            "post_attention_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm:
        norms |= {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
    names = {("embedding",): "model.embed_tokens.weight", ("final_norm", "scale"): "model.norm.weight"}
    if not config.tied_head:
        names["head",] = "lm_head.weight"
    for ours, theirs in PROJECTIONS.items():
        names["layers", ours, "kernel"] = f"model.layers.{{}}.{theirs}.weight"
        if ours in config.biases:
            names["layers", ours, "bias"] = f"model.layers.{{}}.{theirs}.bias"
    return names | {("layers", ours, "scale"): f"model.layers.{{}}.{theirs}.weight" for ours, theirs in norms.items()}
