"""Gemma 4's text model in plain NumPy, one document at a time: the oracle of its layers where there is no torch."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cotgrpo.models.config import DecoderConfig
from helpers.numpy_decoder import dense, norm


def gemma4_logits(c: DecoderConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Return float64 logits `[T, V]`, capped."""
    x = np.float64(params["embedding"])[tokens] * c.width**0.5
    inputs = layer_inputs(c, params, tokens, x)
    last: dict[bool, tuple[np.ndarray, np.ndarray]] = {}
    for index, own in enumerate(c.layers):
        place = c.layer_places[index]
        stacked = functools.reduce(lambda tree, key: tree[key], place.path, params)
        p = {
            name: {k: np.float64(v[place.index]) for k, v in leaves.items()}
            for name, leaves in stacked.items()
            if name != "layer_scale"
        }
        local = c.local_layers is not None and index in c.local_layers
        mixed = attend(own, p, norm(c, p, "attention_norm", x), local, last)
        x = x + norm(c, p, "post_attention_norm", mixed)
        h = norm(c, p, "mlp_norm", x)
        h = dense(p, "down", gelu(dense(p, "gate", h)) * dense(p, "up", h))
        x = x + norm(c, p, "post_mlp_norm", h)
        if inputs is not None:
            h = dense(p, "per_layer_out", gelu(dense(p, "per_layer_gate", x)) * inputs[index])
            x = x + norm(c, p, "post_per_layer_norm", h)
        x = x * np.float64(stacked["layer_scale"][place.index])
    x = norm(c, params, "final_norm", x) @ np.float64(params["embedding"]).T
    return x if c.logit_softcap is None else c.logit_softcap * np.tanh(x / c.logit_softcap)


def layer_inputs(c: DecoderConfig, params: Any, tokens: np.ndarray, x: np.ndarray) -> np.ndarray | None:
    """Return what each layer reads of the per-layer embeddings, `[L, T, P]`."""
    if c.per_layer_embeddings is None:
        return None
    own, P = params["per_layer"], c.per_layer_embeddings.width
    by_layer = lambda y: y.reshape(len(tokens), c.num_layers, P).swapaxes(0, 1)
    projected = by_layer(x @ np.float64(own["projection"]["kernel"]) / c.width**0.5)
    looked_up = by_layer(np.float64(own["embedding"])[tokens] * P**0.5)
    return (norm(c, {"own": {"scale": own["scale"]}}, "own", projected) + looked_up) / 2**0.5


def attend(c: DecoderConfig, p: Any, h: np.ndarray, local: bool, last: dict[bool, Any]) -> np.ndarray:
    """Return the attention of a layer, and put its keys and values into `last` if it has some."""
    T = len(h)
    query = turn(c, norm(c, p, "query_norm", dense(p, "query", h).reshape(T, -1, c.head_dim)), local)
    if not c.shared_keys:
        key = dense(p, "key", h).reshape(T, -1, c.head_dim)
        value = key if c.key_is_value else dense(p, "value", h).reshape(T, -1, c.head_dim)
        value = norm(c, {"own": {"scale": np.ones(c.head_dim)}}, "own", value)
        last[local] = turn(c, norm(c, p, "key_norm", key), local), value
    key, value = last[local]
    away = np.arange(T)[:, None] - np.arange(T)[None, :]
    seen = (away >= 0) & (away < (c.window if local and c.window else T))
    mixed = np.zeros_like(query)
    for head in range(c.num_heads):
        group = head // (c.num_heads // key.shape[1])
        scores = np.where(seen, query[:, head] @ key[:, group].T, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ value[:, group]
    return dense(p, "out", mixed.reshape(T, -1))


def turn(c: DecoderConfig, x: np.ndarray, local: bool) -> np.ndarray:
    """Rotate the pairs (i, i + H/2): all of them in local layers, the first ones in global layers."""
    half, theta = c.head_dim // 2, c.local_rope_theta if local else c.rope_theta
    frequencies = theta ** (-2.0 * np.arange(half) / c.head_dim)
    if not local and c.rope_scaling is not None:
        turning = int(c.rope_scaling.rotated_share * c.head_dim // 2)
        frequencies = np.where(np.arange(half) < turning, frequencies / c.rope_scaling.factor, 0)
    angles = np.arange(len(x))[:, None, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], axis=-1
    )


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
