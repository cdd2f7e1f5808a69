"""LFM2 and LFM2.5: short convolutions with a few layers of attention between them."""

from __future__ import annotations

from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.family import Family, HfConfig, ModelError
from cotgrpo.models.layers.options import ShortConv
from cotgrpo.models.layers.pattern import LayerKind

KINDS = {"full_attention": LayerKind("attention"), "conv": LayerKind("conv")}


def lfm2(field: HfConfig) -> dict[str, Any]:
    """Return LFM2's options: kinds of layers, and the width of the MLP."""
    types = layer_types(field)
    conv = ShortConv(positive(field, "conv_L_cache"), bool(field["conv_bias"])) if "conv" in types else None
    return {
        "qk_norm": True,
        "norm_eps": float(field["norm_eps"]),
        "mlp_width": mlp_width(field),
        "tied_head": field["tie_word_embeddings"] if field["tie_embedding"] is None else field["tie_embedding"],
        "layer_kinds": tuple(KINDS[kind] for kind in types) if conv else None,
        "short_conv": conv,
        "biases": ("conv_in", "conv_out") if conv and conv.bias else (),
    }


def layer_types(field: HfConfig) -> list[str]:
    """Return the kind of each layer. Without `layer_types`, `full_attn_idxs` has the layers with attention, or all."""
    count, types, attention = (field[name] for name in ("num_hidden_layers", "layer_types", "full_attn_idxs"))
    if types is None:
        indices = range(count) if attention is None else attention
        if any(not isinstance(i, int) or not 0 <= i < count for i in indices):
            raise ModelError(f"config.json: full_attn_idxs must lie in 0..{count - 1}, got {attention}.")
        types = ["full_attention" if i in indices else "conv" for i in range(count)]
    if not isinstance(types, list) or len(types) != count or set(types) - KINDS.keys():
        raise ModelError(
            f"config.json: layer_types must name {' or '.join(KINDS)} for each of the {count} layers, got {types}."
        )
    return types


def mlp_width(field: HfConfig) -> int:
    """Return the width of the MLP: two thirds of what the file names, rounded up, if `block_auto_adjust_ff_dim`."""
    width = positive(field, "intermediate_size" if field["block_ff_dim"] is None else "block_ff_dim")
    if not field["block_auto_adjust_ff_dim"]:
        return width
    width, factor = int(2 * width / 3), field["block_ffn_dim_multiplier"]
    if factor is None:
        return width
    multiple = positive(field, "block_multiple_of")
    return multiple * -(-int(factor * width) // multiple)


def positive(field: HfConfig, name: str) -> int:
    """Return a size of the family's own."""
    value = field[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {name} is {value!r}; expected a positive integer.")
    return value


def write_lfm2(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `lfm2` reads."""
    conv = config.short_conv or ShortConv()
    return {
        "norm_eps": config.norm_eps,
        "layer_types": [{"attention": "full_attention"}.get(layer.mixer, layer.mixer) for layer in config.layers],
        "conv_L_cache": conv.taps,
        "conv_bias": conv.bias,
        "block_auto_adjust_ff_dim": False,
        "pad_token_id": None,  # the default may lie beyond the vocabulary
    }


LFM: dict[str, Family] = {
    "lfm2": Family(
        "Lfm2ForCausalLM",
        {
            "intermediate_size": 12288,
            "num_key_value_heads": 8,
            "max_position_embeddings": 128_000,
            "norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "tie_word_embeddings": True,
            "tie_embedding": None,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_ff_dim": None,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
            "full_attn_idxs": None,
            "layer_types": None,
        },
        lfm2,
        write_lfm2,
        activations={"silu": "silu"},
        fixed={"block_use_swiglu": (True,), "use_pos_enc": (True,)},
        # Fields of the first files that repeat others, or that only set how training started.
        ignored="block_(dim|norm_eps|mlp_init_scale|out_init_scale|use_xavier_init)|conv_(dim|dim_out|use_xavier_init)|"
        "num_heads|theta|rms_norm_eps",
        modules={
            "out": "self_attn.out_proj",
            "gate": "feed_forward.w1",
            "up": "feed_forward.w3",
            "down": "feed_forward.w2",
            "attention_norm": "operator_norm",
            "mlp_norm": "ffn_norm",
            "query_norm": "self_attn.q_layernorm",
            "key_norm": "self_attn.k_layernorm",
            "final_norm": "embedding_norm",
        },
    ),
}
