"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scalings to contexts longer than in training.

A vector of H values is H/2 pairs. Pair i at position t is rotated by the angle `t * f_i`. Without scaling,
`f_i = theta ** (-2 i / H)`. Angles depend only on the position, so they are computed once for all layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.sharding import vary_alike

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int

SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope", "alpha", "proportional")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies `f_i` differ from `theta ** (-2 i / H)`: `rope_scaling` in config.json.

    Attributes:
        kind: "linear": `f_i / factor` (position interpolation, arXiv:2306.15595).
            "dynamic": theta grows with the longest position of the call beyond `original_length` (NTK-aware).
            Every logit then depends on the longest row of the batch, as in `transformers`.
            "llama3": frequencies of wavelengths above `original_length / low_freq_factor` are divided by `factor`.
            Those below `original_length / high_freq_factor` stay; those between are blended (arXiv:2407.21783).
            "yarn": frequencies of pairs with fewer than `beta_slow` turns in `original_length` are divided by `factor`.
            Those with more than `beta_fast` turns stay; those between are blended (arXiv:2309.00071).
            "longrope": pair i is divided by `long_factors[i]` if the longest position of the call lies beyond
            `original_length`, else by `short_factors[i]` (arXiv:2402.13753).
            "alpha": theta is multiplied by `factor ** (H / (H - 2))` (NTK-aware, at any length).
            "proportional": only the first `rotated_share` of the pairs turn. Frequencies are divided by `factor`.
        factor: how many times longer the context becomes, > 0.
        original_length: number of positions in training. "linear", "alpha" and "proportional" ignore it.
        low_freq_factor, high_freq_factor: for "llama3".
        beta_fast, beta_slow: for "yarn".
        truncate: whether "yarn" widens the blended range to whole pairs.
        attention_factor: "yarn" and "longrope" multiply queries and keys by it.
        short_factors, long_factors: for "longrope", one of each per pair.
        rotated_share: for "proportional", in (0, 1].
        query_growth: g multiplies a query at position t by `1 + g ln(1 + floor(t / original_length))`
            (Llama 4's temperature).

    Raises:
        ValueError: an unknown kind, or a number out of range.
    """

    kind: str
    factor: float
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    rotated_share: float = 1.0
    query_growth: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ValueError(f"RopeScaling.kind must be one of {SCALINGS}, got {self.kind!r}.")
        if not self.factor > 0:
            raise ValueError(f"RopeScaling.factor must be positive, got {self.factor}.")
        if self.kind not in ("linear", "alpha", "proportional") and self.original_length < 1:
            raise ValueError(
                f"RopeScaling.original_length must be at least 1 for kind {self.kind!r}, got {self.original_length}."
            )
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"RopeScaling.low_freq_factor ({self.low_freq_factor}) must be below "
                f"high_freq_factor ({self.high_freq_factor})."
            )
        if not 0 < self.rotated_share <= 1:
            raise ValueError(f"RopeScaling.rotated_share must lie in (0, 1], got {self.rotated_share}.")
        if self.kind == "longrope" and not (min(self.short_factors, default=0) > 0 < min(self.long_factors, default=0)):
            raise ValueError("RopeScaling.short_factors and long_factors must be positive numbers, one for each pair.")

    def for_length(self, length: int) -> RopeScaling:
        """Return the scaling of sequences of up to `length` positions, the same in all calls.

        With a cache, keys stay as they were rotated. So a decode loop must not change the factors on its way.
        """
        if self.kind != "longrope":
            return self
        used = self.long_factors if length > self.original_length else self.short_factors
        return dataclasses.replace(self, short_factors=used, long_factors=used)

    def query_factors(self, positions: Int[Array, "B T"]) -> Float[Array, "B T"] | None:
        """Return the factor of each query, in float32; None if they are all 1."""
        if not self.query_growth:
            return None
        turns = jnp.floor(positions.astype(jnp.float32) / self.original_length)
        return 1.0 + self.query_growth * jnp.log1p(turns)


def exponents(head_dim: int) -> np.ndarray:
    """Return `2 i / H` for each pair i, float32 `[H/2]`."""
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def frequencies(theta: float, head_dim: int) -> np.ndarray:
    """Return `theta ** (-2 i / H)` for each pair i, float32 `[H/2]`.

    Each step rounds as PyTorch does: at large positions an angle depends on the frequency's last bit.
    """
    powers = np.float64(theta) ** exponents(head_dim).astype(np.float64)
    return np.float32(1) / powers.astype(np.float32)


def scaled_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> np.ndarray:
    """Return the frequencies of any scaling that does not depend on the positions: float32 `[H/2]`."""
    if scaling is not None and scaling.kind == "alpha":
        return frequencies(theta * scaling.factor ** (head_dim / (head_dim - 2)), head_dim)
    plain = frequencies(theta, head_dim)
    kept: np.ndarray  # the share of each frequency that is not divided by the factor
    if scaling is None:
        return plain
    if scaling.kind == "proportional":
        turning = np.arange(head_dim // 2) < int(scaling.rotated_share * head_dim // 2)
        return np.asarray(np.where(turning, plain, 0) / np.float32(scaling.factor), np.float32)
    if scaling.kind == "llama3":
        # Turns within the original context: low_freq_factor and high_freq_factor bound the blended range.
        turns = np.float32(scaling.original_length) / (np.float32(2 * math.pi) / plain)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    elif scaling.kind == "yarn":
        first, last = (pair_that_turns(n, theta, head_dim, scaling) for n in (scaling.beta_fast, scaling.beta_slow))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - first) / (last - first if last != first else 1e-3)
        kept = 1 - ramp
    else:
        return np.asarray(plain / scaling.factor, np.float32)
    kept = np.clip(kept, 0, 1, dtype=np.float32)
    return np.asarray(plain / scaling.factor * (1 - kept) + plain * kept, np.float32)


def pair_that_turns(turns: float, theta: float, head_dim: int, scaling: RopeScaling) -> float:
    """Return the fractional index of the pair that makes `turns` full turns within the original context."""
    return head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))


def rotation(
    positions: Int[Array, "B T"], theta: float, head_dim: int, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Return (cos, sin) of every angle in float32, times `attention_factor`.

    `head_dim` is the number of values of a head that are rotated.
    """
    if scaling is not None and scaling.kind == "dynamic":
        length = jnp.maximum(jnp.max(positions) + 1, scaling.original_length)
        stretch = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
        per_pair: Array | np.ndarray = 1.0 / (theta * stretch ** (head_dim / (head_dim - 2))) ** exponents(head_dim)
    elif scaling is not None and scaling.kind == "longrope":
        powers = (np.float64(theta) ** exponents(head_dim)).astype(np.float32)
        short, long = (
            np.float32(1) / (np.asarray(factors, np.float32) * powers)
            for factors in (scaling.short_factors, scaling.long_factors)
        )
        per_pair = jnp.where(jnp.max(positions) >= scaling.original_length, long, short)
    else:
        per_pair = scaled_frequencies(theta, head_dim, scaling)
    angles = positions[:, :, None].astype(jnp.float32) * per_pair[None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is not None and scaling.attention_factor != 1.0:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin


def rotate(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T heads H"]:
    """Rotate the pairs (i, i + R/2) of every head in float32: the half-split layout of Hugging Face's Llama.

    R is twice the number of angles. Values from R on stay as they are.
    """
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :rotated], cos, sin), x[..., rotated:]], axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotate_by_product(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T heads H"]:
    """Return what `rotate` returns, as the exact product with a signed permutation swaps the halves of a head.

    XLA for TPUs writes both halves to memory before it joins them, and fuses a product with what follows. If only some
    values of a head turn, this is `rotate`.
    """
    return rotate(x, cos, sin) if 2 * cos.shape[-1] < x.shape[-1] else swap_and_rotate(*vary_alike(x, cos, sin))


@jax.custom_vjp
def swap_and_rotate(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T heads H"]:
    """Return `x cos + swap(x) sin` in float32, with `swap(x) = (-x_second, x_first)`."""
    half = cos.shape[-1]
    swap = np.zeros((2 * half, 2 * half), np.float32)
    swap[range(half, 2 * half), range(half)] = -1
    swap[range(half), range(half, 2 * half)] = 1
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    swapped = jnp.matmul(x, jnp.asarray(swap, x.dtype), precision=precision, preferred_element_type=jnp.float32)
    cos, sin = (jnp.concatenate([angle, angle], axis=-1)[:, :, None, :] for angle in (cos, sin))
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


# The rotation the other way around. By autodiff, the product would round gradients in float32 to bfloat16.
swap_and_rotate.defvjp(
    lambda x, cos, sin: (swap_and_rotate(x, cos, sin), (cos, sin)),
    lambda angles, dy: (swap_and_rotate(dy, angles[0], -angles[1]), None, None),
)
