"""Attention over packed sequences, in plain XLA: the reference that every other backend has to agree with.

A query sees a key when both lie in the same segment and the key's position is not after the query's. Positions restart in each document,
so this one rule serves packed training rows, padding, and a key/value cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from cotgrpo.types import Array, Bool, Float, Int

MASKED = -1e30
"""The score of a key that may not be seen: finite, so that a fully masked row is a uniform row and not NaN."""


def causal_segment_mask(
    query_positions: Int[Array, "B T"],
    query_segments: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    key_segments: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
    """True where query t may read key s: same segment, and position of s <= position of t."""
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same & (key_positions[:, None, :] <= query_positions[:, :, None])


def attention(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T Q H"]:
    """Grouped-query attention, `softmax(q k^T / sqrt(H) + mask) v`; scores and softmax in float32.

    Query head n reads key/value head `n // (Q / K)`. The group stays an axis of its own, so keys and values are never repeated in memory.
    """
    B, T, Q, H = query.shape
    K = key.shape[2]
    grouped = query.reshape(B, T, K, Q // K, H) * (H**-0.5)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None, :, :], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, value)
    return mixed.reshape(B, T, Q, H)


def rotate(x: Float[Array, "B T heads H"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T heads H"]:
    """Rotary position embedding in the half-split layout of Hugging Face's Llama (Su et al. 2021, arXiv:2104.09864).

    Pair (i, i + H/2) is turned by the angle `position * theta ** (-2 i / H)`, in float32.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
