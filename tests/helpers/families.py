"""A small random model of every family, made by `transformers` on torch, the oracle of the tests."""

from __future__ import annotations

import json
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


YARN: dict[str, Any] = {"type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16}


MINISTRAL3 = {
    "model_type": "ministral3",
    "head_dim": 12,
    "sliding_window": None,
    "rope_theta": 1_000_000.0,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4},
}

GRANITE = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.3,
    "logits_scaling": 3.0,
    "attention_multiplier": 0.4,
}

VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "patch_size": 8}
LAYERS = {"num_hidden_layers": 1, "image_size": 32}
GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 12,
    "head_dim": 12,
    "global_head_dim": 20,
    "sliding_window": 7,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "final_logit_softcapping": 3.0,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full")] * 4,
    "tie_word_embeddings": True,
}
GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.5,
        "rope_theta": 50_000.0,
        "factor": 2.0,
    },
}
GEMMA4_SHARED = {**GEMMA4, "num_kv_shared_layers": 6, "use_double_wide_mlp": True, "num_key_value_heads": 1}
GEMMA4_AUDIO = {
    "model_type": "gemma4_audio",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [4, 4],
    "output_proj_dims": 16,
}
AUDIOS = {"gemma4": GEMMA4_AUDIO, "gemma4_unified": {"model_type": "gemma4_unified_audio", "audio_embed_dim": 12}}
VISIONS: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "siglip_vision_model", **VISION, **LAYERS},
    "gemma4": {"model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 2, **VISION}
    | {"num_hidden_layers": 1, "position_embedding_size": 16, "pooling_kernel_size": 2},
    "gemma4_unified": {"model_type": "gemma4_unified_vision", "patch_size": 2, "pooling_kernel_size": 2}
    | {"mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 32},
    "mistral3": {"model_type": "pixtral", "head_dim": 8, **VISION, **LAYERS},
    "qwen3_vl": {"model_type": "qwen3_vl", "depth": 1, "num_heads": 2, "out_hidden_size": 32, **VISION}
    | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_vision", "depth": 1, "num_heads": 2, "out_hidden_size": 32, **VISION}
    | {"num_position_embeddings": 16},
    "qwen3_5": {"model_type": "qwen3_5_vision", "depth": 1, "num_heads": 2, "out_hidden_size": 32, **VISION}
    | {"num_position_embeddings": 16},
}

QWEN3_5 = {
    "model_type": "qwen3_5_text",
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 7,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 100_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
}


def wrapped(model_type: str, text: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a model with images around a text part."""
    outer = {"vision_config": VISIONS[model_type], "mm_tokens_per_image": 16, "image_token_index": 90}
    if model_type != "gemma3":
        outer = {"vision_config": VISIONS[model_type], "image_token_id": 90, "video_token_id": 91}
    if model_type in AUDIOS:  # tokens of images are another model's input, even if there is no image: none is drawn
        ids = {"image_token_id": 101, "video_token_id": 102, "audio_token_id": 103}
        outer = {"vision_config": VISIONS[model_type], "audio_config": AUDIOS[model_type], **ids}
    tied = {"tie_word_embeddings": text.get("tie_word_embeddings", model_type == "gemma3")}
    return {"model_type": model_type, "text_config": {**SMALL, **text}, **outer, **tied}


CASES: dict[str, dict[str, Any]] = {
    "llama3": {"model_type": "llama", "rope_theta": 500_000.0, "rms_norm_eps": 1e-5},
    "llama31_scaled": {"model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": LLAMA3, "head_dim": 16},
    "llama_biased": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 20,
        "num_key_value_heads": 1,
        "hidden_act": "gelu",
    },
    "llama_linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama_yarn": {"model_type": "llama", "head_dim": 24, "rope_scaling": YARN},
    "llama_yarn_all": {
        "model_type": "llama",
        "head_dim": 32,
        "rope_scaling": YARN
        | {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
    },
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": None,
        "tie_word_embeddings": True,
        "rope_theta": 100_000.0,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7, "head_dim": 12},
    "mistral_no_window": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1_000_000.0},
    "qwen2_windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "rope_scaling": YARN,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "num_key_value_heads": 1, "rope_theta": 1_000_000.0},
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 7,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.5,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 7,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
}

CASES |= {
    # Models with images around the text part.
    "gemma3_images": wrapped("gemma3", CASES["gemma3"]),
    "qwen3_vl": wrapped(
        "qwen3_vl",
        {
            "model_type": "qwen3_vl_text",
            "head_dim": 12,
            "attention_bias": True,
            "rope_theta": 5_000_000.0,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 2, 2]},
        },
    ),
    "qwen3_5": {**QWEN3_5, "num_hidden_layers": 5, "attention_bias": True},
    "qwen3_5_odd": {
        **QWEN3_5,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "linear_num_value_heads": 2,
        "linear_conv_kernel_dim": 3,
        "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": True,
    },
    "qwen3_5_images": wrapped("qwen3_5", {**QWEN3_5, "num_hidden_layers": 4, "full_attention_interval": 2}),
    "ministral3_images": wrapped("mistral3", {**MINISTRAL3, "tie_word_embeddings": False}),
    "mistral_images": wrapped("mistral3", {"model_type": "mistral", "head_dim": 12, "sliding_window": None}),
    "ministral3": MINISTRAL3,
    # One row of the table each.
    "gemma": {"model_type": "gemma", "head_dim": 20, "num_key_value_heads": 1, "attention_bias": True},
    "ministral": {
        "model_type": "ministral",
        "num_hidden_layers": 4,
        "head_dim": 20,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "cwm": {"model_type": "cwm", "num_hidden_layers": 5, "head_dim": 12, "sliding_window": 7, "rope_scaling": LLAMA3},
    "seed_oss": {
        "model_type": "seed_oss",
        "head_dim": 20,
        "attention_out_bias": True,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
    },
    "internlm3": {
        "model_type": "internlm3",
        "head_dim": 20,
        "qkv_bias": True,
        "bias": True,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    },
    # Below the length from which the rotation changes with the longest row.
    "internlm3_near": {"model_type": "internlm3", "head_dim": 20, "max_position_embeddings": 128}
    | {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 20, "use_bias": True, "tie_word_embeddings": True},
    "smollm3": {
        "model_type": "smollm3",
        "num_hidden_layers": 5,
        "attention_bias": True,
        "mlp_bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "no_rope_layers": [1, 0, 1, 1, 0],
        "rope_scaling": YARN,
    },
    "smollm3_plain": {"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": True},
    "granite": {
        "model_type": "granite",
        "attention_bias": True,
        "mlp_bias": True,
        "attention_dropout": 0.1,
        **GRANITE,
    },
    "granite4": {
        "model_type": "granitemoehybrid",
        "shared_intermediate_size": 56,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["attention"] * 2,
        "position_embedding_type": "rope",
        "attention_bias": True,
        "mamba_n_heads": 4,
        **GRANITE,
    },
    "granite4_nope": {
        "model_type": "granitemoehybrid",
        "shared_intermediate_size": 56,
        "num_local_experts": 0,
        "layer_types": ["attention"] * 2,
        "position_embedding_type": "nope",
        "tie_word_embeddings": True,
        "mamba_n_heads": 4,
        **GRANITE,
    },
    "olmo2": {"model_type": "olmo2", "head_dim": 12, "attention_bias": True, "num_key_value_heads": 1},
    "olmo3": {
        "model_type": "olmo3",
        "num_hidden_layers": 5,
        "sliding_window": 7,
        "rope_theta": 100_000.0,
        "rope_scaling": {**YARN, "rope_type": "yarn", "attention_factor": 1.2},
    },
    "exaone4": {
        "model_type": "exaone4",
        "num_hidden_layers": 5,
        "head_dim": 12,
        "sliding_window": 7,
        "sliding_window_pattern": 3,
        "rope_scaling": LLAMA3,
    },
    "exaone4_small": {
        "model_type": "exaone4",
        "sliding_window": None,
        "layer_types": ["full_attention"] * 2,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "model_type": "phi3",
        "hidden_size": 64,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 16,
        "sliding_window": 21,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 3.0],
            "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 9.0],
        },
    },
    "phi4_mini": {
        "model_type": "phi3",
        "hidden_size": 64,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 80,
        "max_position_embeddings": 320,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 3.0], "long_factor": [9.0] * 6},
    },
    "phi4": {"model_type": "phi3", "head_dim": 20, "rope_theta": 250_000.0, "rope_scaling": None},
    "hunyuan": {
        "model_type": "hunyuan_v1_dense",
        "head_dim": 12,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0},
    },
    "arcee": {
        "model_type": "arcee",
        "head_dim": 20,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "relu2",
        "rope_scaling": YARN,
    },
    "apertus": {
        "model_type": "apertus",
        "head_dim": 12,
        "attention_bias": True,
        "hidden_act": "xielu",
        "rope_scaling": LLAMA3,
    },
}


EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 5, "num_experts_per_tok": 2}
CASES |= {
    # Experts.
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 12, "norm_topk_prob": True, **EXPERTS},
    "qwen3_moe_mixed": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 5,
        "head_dim": 12,
        "attention_bias": True,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        **EXPERTS,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 3,
        "shared_expert_intermediate_size": 28,
        "mlp_only_layers": [1],
        **EXPERTS,
    },
    "qwen3_5_moe": wrapped(
        "qwen3_5_moe",
        {
            **QWEN3_5,
            "model_type": "qwen3_5_moe_text",
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 28,
            **EXPERTS,
        },
    ),
    "olmoe": {"model_type": "olmoe", "num_experts": 7, "num_experts_per_tok": 3, "num_key_value_heads": 4},
    "mixtral": {"model_type": "mixtral", "head_dim": 12, "sliding_window": 7, **LOCAL_EXPERTS},
    "granitemoe": {"model_type": "granitemoe", "attention_bias": True, **LOCAL_EXPERTS, **GRANITE},
    "granitemoeshared": {
        "model_type": "granitemoeshared",
        "shared_intermediate_size": 28,
        **LOCAL_EXPERTS,
        **GRANITE,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 4,
        "head_dim": 12,
        "sliding_window": 7,
        "swiglu_limit": 0.5,
        "swiglu_alpha": 1.3,
        "rope_theta": 150_000.0,
        "rope_scaling": YARN | {"rope_type": "yarn", "truncate": False, "beta_fast": 4.0},
        **LOCAL_EXPERTS,
    },
}

CASES |= {
    # Short convolutions with attention between them.
    "lfm2": {
        "model_type": "lfm2",
        "num_hidden_layers": 8,
        "layer_types": ["full_attention" if kind == "A" else "conv" for kind in "ccAccAcA"],
        "conv_L_cache": 4,
        "intermediate_size": 100,
        "block_multiple_of": 24,
        "block_ffn_dim_multiplier": 1.3,
        "rope_scaling": LLAMA3,
    },
    # E2B and E4B: embeddings of each layer, the last layers share keys and values.
    "gemma4": GEMMA4_SHARED,
    "gemma4_images": wrapped("gemma4", GEMMA4_SHARED),
    # Heads of one width, and a layer list in which no pattern repeats.
    "gemma4_even": {**GEMMA4, "num_hidden_layers": 7, "global_head_dim": 12, "num_kv_shared_layers": 3}
    | {
        "layer_types": [
            f"{kind}_attention" for kind in ("full", *["sliding"] * 2, "full", "sliding", "sliding", "full")
        ]
    }
    | {"rope_parameters": GEMMA4_ROPE, "attention_bias": True},
    # 31B and 12B: the keys of global layers are their values, with fewer heads.
    "gemma4_large": {**GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "attention_bias": True}
    | {"num_global_key_value_heads": 1, "use_bidirectional_attention": "vision", "layer_types": None},
    "gemma4_unified": wrapped(
        "gemma4_unified",
        {**GEMMA4, "model_type": "gemma4_unified_text", "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    # As the first files on the hub have it.
    "lfm2_old": {
        "model_type": "lfm2",
        "num_hidden_layers": 4,
        "full_attn_idxs": [2],
        "block_ff_dim": 72,
        "block_multiple_of": 16,
        "tie_embedding": True,
        "rope_theta": 1_000_000.0,
        "theta": 1_000_000.0,
        "conv_dim": 32,
        "block_use_swiglu": True,
    },
}


def old_config(case: str) -> dict[str, Any]:
    """config.json as checkpoints on the hub have it: rope_theta and rope_scaling beside the rest."""
    own = {} if "text_config" in CASES[case] else SMALL
    return json.loads(json.dumps({**own, **CASES[case]}))


def text_type(case: str) -> str:
    """Return the `model_type` of the text part."""
    return str(CASES[case].get("text_config", CASES[case])["model_type"])


def make_torch(case: str) -> Any:
    """A model with every parameter random, biases and norms too."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = old_config(case)
    made = auto_class(case).from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for name, p in made.named_parameters():
            noise = torch.randn_like(p)
            if name.endswith("A_log"):
                p.fill_(-2.0)  # by default most states are forgotten at once
            # Weights may be empty memory in a class that is made from a config.
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim >= 2 else (p + 0.3 * noise if p.isfinite().all() else noise))
        for name, buffer in made.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.mul_(1 + 0.2 * torch.randn_like(buffer))
    return made.eval()


def auto_class(case: str) -> Any:
    """Return the class of transformers that loads the case's model."""
    import transformers

    with_images = "text_config" in CASES[case]
    return transformers.AutoModelForImageTextToText if with_images else transformers.AutoModelForCausalLM
