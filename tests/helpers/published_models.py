"""config.json of published models, as far as it sets the decoder, and how many parameters their text part has."""

from __future__ import annotations

from typing import Any

LLAMA3: dict[str, Any] = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"factor": 8.0, "original_max_position_embeddings": 8192}


def hub(
    model_type: str, V: int, D: int, F: int, L: int, Q: int, K: int, eps: float = 1e-5, **more: Any
) -> dict[str, Any]:
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L}
    heads = {"num_attention_heads": Q, "num_key_value_heads": K}
    return {"model_type": model_type, "max_position_embeddings": 32768, "rms_norm_eps": eps, **sizes, **heads, **more}


def images(model_type: str, text: dict[str, Any], **outer: Any) -> dict[str, Any]:
    return {"model_type": model_type, "text_config": text, "vision_config": {"hidden_size": 1152}, **outer}


def gemma3(D: int, F: int, L: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "sliding_window": 1024, **more}
    text = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, **sizes}
    return images("gemma3", text, mm_tokens_per_image=256, boi_token_index=255999, image_token_index=262144)


def gemma4(layers: str, D: int, F: int, Q: int, K: int, **more: Any) -> dict[str, Any]:
    """Return a Gemma 4 of these layers: S, a local one, or F, a global one."""
    types = [{"S": "sliding_attention", "F": "full_attention"}[letter] for letter in layers]
    full = {"partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0, "rope_type": "proportional"}
    rope = {"full_attention": full, "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"}}
    heads = {"head_dim": 256, "global_head_dim": 512, "hidden_activation": "gelu_pytorch_tanh"}
    own = {"layer_types": types, "rope_parameters": rope, "final_logit_softcapping": 30.0, "enable_moe_block": False}
    text = hub("gemma4_text", 262144, D, F, len(layers), Q, K, 1e-6, **heads, **own, **more)
    tokens = {"boi_token_id": 255999, "eoi_token_id": 258882, "image_token_id": 258880, "audio_token_id": 258881}
    return images("gemma4", text, tie_word_embeddings=True, **tokens)


E_SIZES = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144, "sliding_window": 512}
"""Of the small models, whose names have their size without the per-layer embeddings."""
EQUAL_KEYS = {"attention_k_eq_v": True, "num_global_key_value_heads": 4, "hidden_size_per_layer_input": 0}


def qwen3_vl(D: int, F: int, L: int, Q: int, tied: bool) -> dict[str, Any]:
    rope: dict[str, Any] = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text = hub("qwen3_vl_text", 151936, D, F, L, Q, 8, 1e-6, head_dim=128, rope_scaling=rope, rope_theta=5_000_000)
    return images("qwen3_vl", text, tie_word_embeddings=tied, image_token_id=151655, vision_start_token_id=151652)


def ministral3(D: int, F: int, L: int, tied: bool = False) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
    }
    rope |= {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384}
    text = hub("ministral3", 131072, D, F, L, 32, 8, head_dim=128, rope_parameters=rope, tie_word_embeddings=tied)
    return images("mistral3", text, projector_hidden_act="gelu", spatial_merge_size=2)


def qwen3_5(D: int, F: int, L: int, Q: int, K: int, values: int, tied: bool) -> dict[str, Any]:
    rope: dict[str, Any] = {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default"}
    rope |= {"rope_theta": 10_000_000, "partial_rotary_factor": 0.25}
    text = hub("qwen3_5_text", 248320, D, F, L, Q, K, 1e-6, head_dim=256, rope_parameters=rope, attn_output_gate=True)
    text |= {"linear_num_key_heads": 16, "linear_num_value_heads": values, "linear_conv_kernel_dim": 4}
    text |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "full_attention_interval": 4}
    text |= {"mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    return images("qwen3_5", text, tie_word_embeddings=tied, image_token_id=248056, vision_start_token_id=248053)


def qwen3_5_moe(D: int, L: int, Q: int, K: int, values: int, experts: int) -> dict[str, Any]:
    hf = qwen3_5(D, 0, L, Q, K, values, False)
    own = {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
    own |= {"model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 512, "router_aux_loss_coef": 0.001}
    text = {name: value for name, value in hf["text_config"].items() if name != "intermediate_size"}
    return hf | {"model_type": "qwen3_5_moe", "text_config": text | own}


def granite4(D: int, F: int, L: int, Q: int, K: int, **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"shared_intermediate_size": F, "num_local_experts": 0, "layer_types": ["attention"] * L}
    fields |= {"position_embedding_type": "rope", "logits_scaling": 10, "residual_multiplier": 0.22}
    fields |= {"embedding_multiplier": 12, "attention_multiplier": 0.015625, "mamba_n_heads": 64}
    return hub("granitemoehybrid", 100352, D, F, L, Q, K, tie_word_embeddings=True, **fields, **more)


def hunyuan(V: int, D: int, F: int, L: int, Q: int, K: int, tied: bool) -> dict[str, Any]:
    rope = {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "type": "dynamic"}
    fields: dict[str, Any] = {
        "use_qk_norm": True,
        "use_cla": False,
        "kv_lora_rank": None,
        "rope_scaling": rope,
        "eod_token_id": 3,
    }
    return hub("hunyuan_v1_dense", V, D, F, L, Q, K, head_dim=128, tie_word_embeddings=tied, **fields)


def experts(
    model_type: str, V: int, D: int, F: int, L: int, Q: int, K: int, number: int, chosen: int, **more: Any
) -> dict[str, Any]:
    """Return a model with experts, and fields that do not change a logit."""
    field = "num_experts" if model_type in ("qwen3_moe", "qwen2_moe", "olmoe") else "num_local_experts"
    own = {field: number, "num_experts_per_tok": chosen, "output_router_logits": False, "router_aux_loss_coef": 0.001}
    return hub(model_type, V, D, F, L, Q, K, **own, **more)


YARN_OSS = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
YARN_OSS |= {"original_max_position_embeddings": 4096}
GPT_OSS: dict[str, Any] = {"attention_bias": True, "sliding_window": 128, "rope_theta": 150000, "swiglu_limit": 7.0}
GPT_OSS |= {"rope_scaling": YARN_OSS, "experts_per_token": 4, "initial_context_length": 4096}
GRANITE3 = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_dropout": 0.1}
SHORT_AND_LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
YARN_R1 = {"attn_factor": 0.8782488562869419, "factor": 4.0, "original_max_position_embeddings": 32768}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": hub("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "Llama 3.1 8B": hub("llama", 128256, 4096, 14336, 32, 32, 8, rope_scaling=LLAMA3),
    "SmolLM2 135M": hub("llama", 49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
    "Mistral 7B v0.3": hub("mistral", 32768, 4096, 14336, 32, 32, 8, sliding_window=None),
    "Qwen2.5 0.5B": hub("qwen2", 151936, 896, 4864, 24, 14, 2, 1e-6, tie_word_embeddings=True),
    "Qwen2.5 7B": hub("qwen2", 152064, 3584, 18944, 28, 28, 4, 1e-6, use_sliding_window=False),
    "Qwen3 0.6B": hub("qwen3", 151936, 1024, 3072, 28, 16, 8, 1e-6, head_dim=128, tie_word_embeddings=True),
    "Qwen3 8B": hub("qwen3", 151936, 4096, 12288, 36, 32, 8, 1e-6, head_dim=128),
    "DeepSeek R1 0528 Qwen3 8B": hub("qwen3", 151936, 4096, 12288, 36, 32, 8, 1e-6, head_dim=128)
    | {"rope_scaling": YARN_R1 | {"rope_type": "yarn"}},
    "Gemma 2 2B": hub("gemma2", 256000, 2304, 9216, 26, 8, 4, 1e-6, cache_implementation="hybrid"),
    "Gemma 3 1B": hub("gemma3_text", 262144, 1152, 6912, 26, 4, 1, 1e-6, sliding_window=512),
    "Gemma 3 4B": gemma3(2560, 10240, 34),
    "Gemma 3 12B": gemma3(3840, 15360, 48, num_attention_heads=16, num_key_value_heads=8),
    "Gemma 3 27B": gemma3(
        5376, 21504, 62, num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168
    ),
    "Gemma 4 E2B": gemma4("SSSSF" * 7, 1536, 6144, 8, 1, num_kv_shared_layers=20, use_double_wide_mlp=True, **E_SIZES),
    "Gemma 4 E4B": gemma4("SSSSSF" * 7, 2560, 10240, 8, 2, num_kv_shared_layers=18, **E_SIZES),
    "Gemma 4 31B": gemma4("SSSSSF" * 10, 5376, 21504, 32, 16, sliding_window=1024, **EQUAL_KEYS),
    "Qwen3-VL 2B": qwen3_vl(2048, 6144, 28, 16, True),
    "Qwen3-VL 4B": qwen3_vl(2560, 9728, 36, 32, True),
    "Qwen3-VL 8B": qwen3_vl(4096, 12288, 36, 32, False),
    "Qwen3.5 0.8B": qwen3_5(1024, 3584, 24, 8, 2, 16, True),
    "Qwen3.5 2B": qwen3_5(2048, 6144, 24, 8, 2, 16, True),
    "Qwen3.5 4B": qwen3_5(2560, 9216, 32, 16, 4, 32, True),
    "Qwen3.5 9B": qwen3_5(4096, 12288, 32, 16, 4, 32, False),
    "Qwen3.5 27B": qwen3_5(5120, 17408, 64, 24, 4, 48, False),
    "Qwen3.5 35B A3B": qwen3_5_moe(2048, 40, 16, 2, 32, experts=256),
    "Ministral 3 3B": ministral3(3072, 9216, 26, True),
    "Ministral 3 8B": ministral3(4096, 14336, 34),
    "Ministral 3 14B": ministral3(5120, 16384, 40),
    "Gemma 2B": hub("gemma", 256000, 2048, 16384, 18, 8, 1, 1e-6, head_dim=256, hidden_act="gelu"),
    "Gemma 7B": hub("gemma", 256000, 3072, 24576, 28, 16, 16, 1e-6, head_dim=256, hidden_act="gelu"),
    "Ministral 8B 2410": hub("ministral", 131072, 4096, 12288, 36, 32, 8, head_dim=128, sliding_window=32768),
    "CWM 32B": hub("cwm", 128256, 6144, 21504, 64, 48, 8, sliding_window=8192),
    "Seed-OSS 36B": hub("seed_oss", 155136, 5120, 27648, 64, 80, 8, 1e-6, head_dim=128, residual_dropout=0.1),
    "InternLM3 8B": hub("internlm3", 128512, 4096, 10240, 48, 32, 2, head_dim=128, qkv_bias=False, bias=False),
    "ERNIE 4.5 0.3B": hub("ernie4_5", 103424, 1024, 3072, 18, 16, 2, head_dim=128, use_bias=False),
    "SmolLM3 3B": hub("smollm3", 128256, 2048, 11008, 36, 16, 4, 1e-6, rope_theta=5e6, max_window_layers=28),
    "Granite 3.3 2B": hub("granite", 49159, 2048, 8192, 40, 32, 8, tie_word_embeddings=True, **GRANITE3),
    "Granite 3.3 8B": hub("granite", 49159, 4096, 12800, 40, 32, 8, tie_word_embeddings=True, **GRANITE3),
    "Granite 4.0 micro 3B": granite4(2560, 8192, 40, 40, 8),
    "OLMo 2 1B": hub("olmo2", 100352, 2048, 8192, 16, 16, 16, 1e-6, rope_theta=500000),
    "OLMo 2 7B": hub("olmo2", 100352, 4096, 11008, 32, 32, 32, 1e-6, rope_theta=500000),
    "OLMo 2 32B": hub("olmo2", 100352, 5120, 27648, 64, 40, 8, 1e-6, rope_theta=500000),
    "OLMo 3 7B": hub("olmo3", 100278, 4096, 11008, 32, 32, 32, 1e-6, sliding_window=4096, rope_theta=500000),
    "EXAONE 4.0 1.2B": hub("exaone4", 102400, 2048, 4096, 30, 32, 8, head_dim=64, tie_word_embeddings=True)
    | {"sliding_window": None, "layer_types": ["full_attention"] * 30, "sliding_window_pattern": None},
    "EXAONE 4.0 32B": hub("exaone4", 102400, 5120, 27392, 64, 40, 8, head_dim=128, sliding_window=4096)
    | {"sliding_window_pattern": "LLLG"},
    "Phi-3.5 mini": hub("phi3", 32064, 3072, 8192, 32, 32, 32, sliding_window=262144, rope_scaling=SHORT_AND_LONG),
    "Phi-4 mini": hub("phi3", 200064, 3072, 8192, 32, 24, 8, tie_word_embeddings=True, partial_rotary_factor=0.75)
    | {"rope_scaling": SHORT_AND_LONG, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
    "Phi-4": hub("phi3", 100352, 5120, 17920, 40, 40, 10, rope_theta=250000, rope_scaling=None, embd_pdrop=0.0),
    "HunYuan 0.5B": hunyuan(120818, 1024, 3584, 24, 16, 8, True),
    "HunYuan 7B": hunyuan(128167, 4096, 14336, 32, 32, 8, True),
    "AFM 4.5B": hub("arcee", 128004, 2560, 18432, 36, 20, 4, head_dim=128, hidden_act="relu2"),
    "Qwen3 30B A3B": experts("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 128, 8, head_dim=128, norm_topk_prob=True)
    | {"moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 48},
    "Qwen3 Coder 30B A3B": experts("qwen3_moe", 151936, 2048, 5472, 48, 32, 4, 128, 8, head_dim=128, qkv_bias=False)
    | {"moe_intermediate_size": 768, "norm_topk_prob": True, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
    "Qwen3 235B A22B": experts("qwen3_moe", 151936, 4096, 12288, 94, 64, 4, 128, 8, head_dim=128, norm_topk_prob=True)
    | {"moe_intermediate_size": 1536, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 94},
    "Qwen1.5 MoE A2.7B": experts("qwen2_moe", 151936, 2048, 5632, 24, 16, 16, 60, 4, norm_topk_prob=False)
    | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1},
    "OLMoE 1B 7B": experts("olmoe", 50304, 2048, 1024, 16, 16, 16, 64, 8, norm_topk_prob=False, clip_qkv=None),
    "Mixtral 8x7B": experts("mixtral", 32000, 4096, 14336, 32, 32, 8, 8, 2, sliding_window=None),
    "Granite 3.1 1B A400M": experts("granitemoe", 49155, 1024, 512, 24, 16, 8, 32, 8, tie_word_embeddings=True)
    | GRANITE3,
    "Granite 3.1 3B A800M": experts("granitemoe", 49155, 1536, 512, 32, 24, 8, 40, 8, tie_word_embeddings=True)
    | GRANITE3,
    "gpt-oss 20B": experts("gpt_oss", 201088, 2880, 2880, 24, 64, 8, 32, 4, head_dim=64, **GPT_OSS),
    "gpt-oss 120B": experts("gpt_oss", 201088, 2880, 2880, 36, 64, 8, 128, 4, head_dim=64, **GPT_OSS),
    "Apertus 8B": hub("apertus", 131072, 4096, 21504, 32, 32, 8, hidden_act="xielu", qk_norm=True, post_norm=False),
}


def lfm2(D: int, F: int, L: int, Q: int, **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"block_ff_dim": F, "block_dim": D, "block_norm_eps": 1e-5, "block_use_swiglu": True}
    fields |= {"conv_L_cache": 3, "conv_bias": False, "conv_dim": D, "conv_use_xavier_init": True, "num_heads": Q}
    fields |= {"norm_eps": 1e-5, "theta": 1e6, "use_pos_enc": True, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}
    return hub("lfm2", 65536, D, F, L, Q, 8, rope_theta=1e6, **fields | more)


MORE_OFTEN = ["full_attention" if kind == "A" else "conv" for kind in "ccA" * 2 + "cccA" * 4 + "ccA" * 2 + "cc"]
PUBLISHED |= {
    "LFM2 350M": lfm2(1024, 6656, 16, 16),
    "LFM2 700M": lfm2(1536, 10240, 16, 24),
    "LFM2 1.2B": lfm2(2048, 12288, 16, 32),
    "LFM2 2.6B": lfm2(2048, 10752, 30, 32, block_auto_adjust_ff_dim=False, full_attn_idxs=None, layer_types=MORE_OFTEN),
}
