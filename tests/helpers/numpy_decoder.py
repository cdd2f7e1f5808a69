"""The decoder in plain NumPy, one token sequence at a time: the oracle of its options where there is no torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cotgrpo.models.config import DecoderConfig


def numpy_logits(config: DecoderConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Return float64 logits `[T, V]` of one document."""
    c, T = config, len(tokens)
    x = params["embedding"][tokens].astype(np.float64) * (c.embedding_scale or 1.0)
    for index in range(c.num_layers):
        p = {name: {k: np.float64(v[index]) for k, v in own.items()} for name, own in params["layers"].items()}
        local = c.window is not None and index in (c.local_layers if c.local_layers is not None else range(99))
        mixed = attend(c, p, norm(c, p, "attention_norm", x) if c.pre_norms else x, index, local)
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
    return dense(p, "out", mixed.reshape(T, -1))


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
