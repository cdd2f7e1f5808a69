"""Names of the modules of a layer in a checkpoint."""

from __future__ import annotations

MODULES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "conv_in": "conv.in_proj",
    "conv": "conv.conv",
    "conv_out": "conv.out_proj",
    "delta_in": "linear_attn.in_proj_qkv",
    "delta_gate": "linear_attn.in_proj_z",
    "delta_strength": "linear_attn.in_proj_b",
    "delta_decay": "linear_attn.in_proj_a",
    "delta": "linear_attn",
    "delta_out": "linear_attn.out_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "per_layer_gate": "per_layer_input_gate",
    "per_layer_out": "per_layer_projection",
    "post_per_layer_norm": "post_per_layer_input_norm",
}
"""{our name: the module's name in a layer of the checkpoint}. `Family.modules` override them."""

POST_NORM_MODULES = {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
"""The same for families with norms after attention and after the MLP."""

PROJECTIONS = {name: MODULES[name] for name in ("query", "key", "value", "out", "gate", "up", "down")}
