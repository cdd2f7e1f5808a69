"""The decoder in plain NumPy, one token sequence at a time: the oracle of its options where there is no torch."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from cotgrpo.models.config import DecoderConfig


def numpy_logits(config: DecoderConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Return float64 logits `[T, V]` of one document."""
    c, T = config, len(tokens)
    x = params["embedding"][tokens].astype(np.float64) * (c.embedding_scale or 1.0)
    for index in range(c.num_layers):
        place = c.layer_places[index]
        stacked = functools.reduce(lambda tree, key: tree[key], place.path, params)
        p = {name: {k: np.float64(v[place.index]) for k, v in own.items()} for name, own in stacked.items()}
        local = c.window is not None and index in (c.local_layers if c.local_layers is not None else range(99))
        h = norm(c, p, "attention_norm", x) if c.pre_norms else x
        mixer = {"delta": delta_net, "conv": short_conv}.get(c.layers[index].mixer)
        mixed = attend(c, p, h, index, local) if mixer is None else mixer(c, p, h)
        x = x + (norm(c, p, "post_attention_norm", mixed) if c.post_norms else mixed) * (c.residual_scale or 1.0)
        h = mlp(c, p, norm(c, p, "mlp_norm", x) if c.pre_norms else x)
        x = x + (norm(c, p, "post_mlp_norm", h) if c.post_norms else h) * (c.residual_scale or 1.0)
    x = norm(c, {"final_norm": params["final_norm"]}, "final_norm", x)
    head = params["embedding"].T if c.tied_head else params["head"]
    assert x.shape == (T, c.width)
    return x @ np.float64(head) / (c.logit_divisor or 1.0)


def norm(c: DecoderConfig, p: Any, name: str, x: np.ndarray) -> np.ndarray:
    scale = np.float64(p[name]["scale"]) + (1.0 if c.norm_plus_one else 0.0)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + c.norm_eps) * scale


def dense(p: Any, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[name]["kernel"] + p[name].get("bias", 0.0)


def norm_heads(c: DecoderConfig, p: Any, name: str, x: np.ndarray) -> np.ndarray:
    if c.qk_norm_over == "head":
        return norm(c, p, name, x)
    return norm(c, p, name, x.reshape(len(x), -1)).reshape(x.shape)


def attend(c: DecoderConfig, p: Any, h: np.ndarray, index: int, local: bool) -> np.ndarray:
    T = len(h)
    query, key, value = (dense(p, name, h).reshape(T, -1, c.head_dim) for name in ("query", "key", "value"))
    gate = np.inf
    if c.attention_gate:
        query, gate = query[:, 0::2], query[:, 1::2]
    if c.qk_norm and not c.qk_norm_rotated:
        query, key = norm_heads(c, p, "query_norm", query), norm_heads(c, p, "key_norm", key)
    if index not in c.unrotated_layers:
        query, key = turn(c, query), turn(c, key)
    if c.qk_norm and c.qk_norm_rotated:
        query, key = norm_heads(c, p, "query_norm", query), norm_heads(c, p, "key_norm", key)
    if c.rope_scaling is not None and c.rope_scaling.query_growth:
        turns = np.arange(T) // c.rope_scaling.original_length
        query = query * (1 + c.rope_scaling.query_growth * np.log(1 + turns))[:, None, None]
    away = np.arange(T)[:, None] - np.arange(T)[None, :]
    seen = (away >= 0) & (away < (c.window if local and c.window else T))
    mixed = np.zeros_like(query)
    for head in range(c.num_heads):
        group = head // (c.num_heads // c.num_kv_heads)
        scores = query[:, head] @ key[:, group].T * (c.query_scale or c.head_dim**-0.5)
        weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
        mixed[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ value[:, group]
    return dense(p, "out", (mixed * sigmoid(gate)).reshape(T, -1))


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def short_conv(c: DecoderConfig, p: Any, h: np.ndarray) -> np.ndarray:
    """The gated short convolution, one token after the other."""
    before, after, value = np.split(dense(p, "conv_in", h), 3, axis=-1)
    taps, inputs = c.short_conv.taps, before * value
    filters = p["conv"]["filters"][:, 0]  # the last tap is that of the present token
    mixed = np.zeros_like(inputs)
    for t in range(len(h)):
        for back in range(min(taps, t + 1)):
            mixed[t] += filters[:, taps - 1 - back] * inputs[t - back]
    return dense(p, "conv_out", after * (mixed + p["conv"].get("bias", 0.0)))


def delta_net(c: DecoderConfig, p: Any, h: np.ndarray) -> np.ndarray:
    """The gated delta rule, one token and one value head after the other."""
    net, own, T = c.delta_net, p["delta"], len(h)
    assert net is not None
    before = np.concatenate([np.zeros((net.taps - 1, net.channels)), dense(p, "delta_in", h)])
    mixed = sum(before[tap : tap + T] * own["filters"][:, 0, tap] for tap in range(net.taps))
    query, key, value = np.split(mixed * sigmoid(mixed), [net.keys, 2 * net.keys], axis=-1)
    query, key = (x.reshape(T, net.num_key_heads, net.key_dim) for x in (query, key))
    query, key = (x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6) for x in (query, key))
    value = value.reshape(T, net.num_value_heads, net.value_dim)
    strength = sigmoid(dense(p, "delta_strength", h))
    decay = np.exp(-np.exp(own["decay_log"]) * np.log1p(np.exp(dense(p, "delta_decay", h) + own["decay_bias"])))
    out = np.zeros_like(value)
    for head in range(net.num_value_heads):
        state, group = np.zeros((net.key_dim, net.value_dim)), head // (net.num_value_heads // net.num_key_heads)
        for t in range(T):
            state = decay[t, head] * state
            error = strength[t, head] * (value[t, head] - key[t, group] @ state)
            state = state + np.outer(key[t, group], error)
            out[t, head] = query[t, group] @ state / np.sqrt(net.key_dim)
    out = out / np.sqrt(np.mean(out**2, axis=-1, keepdims=True) + c.norm_eps) * own["scale"]
    gate = dense(p, "delta_gate", h)
    return dense(p, "delta_out", out.reshape(T, -1) * gate * sigmoid(gate))


def turn(c: DecoderConfig, x: np.ndarray) -> np.ndarray:
    """Rotate the pairs (i, i + R/2) of the first R values of each head."""
    T, rotated, scaling = len(x), c.rotary_dim or c.head_dim, c.rope_scaling
    theta, divisors, factor = c.rope_theta, np.ones(rotated // 2), 1.0
    if scaling is not None:
        factor = scaling.attention_factor
        if scaling.kind == "alpha":
            theta = theta * scaling.factor ** (rotated / (rotated - 2))
        elif scaling.kind == "longrope":
            divisors = np.array(scaling.long_factors if scaling.original_length < T else scaling.short_factors)
        else:
            assert scaling.kind == "linear"
            divisors = divisors * scaling.factor
    angles = np.arange(T)[:, None] * theta ** (-2.0 * np.arange(rotated // 2) / rotated) / divisors
    cos, sin = factor * np.cos(angles)[:, None], factor * np.sin(angles)[:, None]
    first, second, rest = np.split(x, [rotated // 2, rotated], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def mlp(c: DecoderConfig, p: Any, h: np.ndarray) -> np.ndarray:
    up = dense(p, "up", h)
    if c.activation == "silu":
        gate = dense(p, "gate", h)
        return dense(p, "down", gate / (1 + np.exp(-gate)) * up)
    if c.activation == "relu2":
        return dense(p, "down", np.maximum(up, 0) ** 2)
    a, b = (math.log1p(math.exp(p["xielu"][name].item())) for name in ("alpha_p", "alpha_n"))
    below = (0.5 + b) * (np.expm1(np.minimum(up, -1e-6)) - up)
    return dense(p, "down", np.where(up > 0, a * up**2, below) + 0.5 * up)
