"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and the ways to stretch it past the length a model was trained on.

A vector of H values is H/2 pairs; pair i at position t is turned by the angle `t * f_i`, with `f_i = theta ** (-2 i / H)` unless a
scaling says otherwise. Angles depend on the position alone, so a model computes them once and every layer reads them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int

SCALINGS = ("linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies `f_i` differ from `theta ** (-2 i / H)`.

    Attributes:
        kind: "linear": `f_i / factor` (position interpolation, arXiv:2306.15595).
            "dynamic": theta grows with the longest position of the call once that passes `original_length` (NTK-aware). Every logit then
            depends on the longest row of the batch, as it does in `transformers`; up to `original_length` it is no scaling at all.
            "llama3": wavelengths above `original_length / low_freq_factor` are divided by `factor`, those below
            `original_length / high_freq_factor` stay, and those between are blended (Llama 3.1, arXiv:2407.21783).
            "yarn": pairs that turn fewer than `beta_slow` times within `original_length` are divided by `factor`, those that turn
            more than `beta_fast` times stay, and those between are blended (arXiv:2309.00071).
        factor: how many times longer the context becomes, > 0.
        original_length: the number of positions the model was trained on; read by all kinds but "linear".
        low_freq_factor, high_freq_factor: read by "llama3".
        beta_fast, beta_slow: read by "yarn".
        truncate: "yarn" rounds the blended range of pairs outwards to whole pairs.
        attention_factor: "yarn" multiplies queries and keys by it.
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

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ValueError(f"RopeScaling.kind must be one of {SCALINGS}, got {self.kind!r}.")
        if not self.factor > 0:
            raise ValueError(f"RopeScaling.factor must be positive, got {self.factor}.")
        if self.kind != "linear" and self.original_length < 1:
            raise ValueError(
                f"RopeScaling.original_length must be at least 1 for kind {self.kind!r}, got {self.original_length}."
            )
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"RopeScaling.low_freq_factor ({self.low_freq_factor}) must be below high_freq_factor ({self.high_freq_factor})."
            )


def exponents(head_dim: int) -> np.ndarray:
    """float32 `[H/2]`, `2 i / H`."""
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def frequencies(theta: float, head_dim: int) -> np.ndarray:
    """float32 `[H/2]`, `theta ** (-2 i / H)`, rounded at each step as PyTorch rounds: far from 0 an angle shows the last bit."""
    powers = np.float64(theta) ** exponents(head_dim).astype(np.float64)
    return np.float32(1) / powers.astype(np.float32)


def scaled_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> np.ndarray:
    """float32 `[H/2]`, the frequencies under every scaling that does not look at the positions."""
    plain = frequencies(theta, head_dim)
    kept: Any  # the part of each frequency that is not divided by the factor
    if scaling is None:
        return plain
    if scaling.kind == "llama3":
        # The number of turns within the original context: low_freq_factor and high_freq_factor bound the blended band.
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
    """The (fractional) index of the pair that makes `turns` full turns within the original context."""
    return head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))


def rotation(
    positions: Int[Array, "B T"], theta: float, head_dim: int, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """(cos, sin) of every angle, float32; under "yarn" both times `attention_factor`."""
    if scaling is not None and scaling.kind == "dynamic":
        length = jnp.maximum(jnp.max(positions) + 1, scaling.original_length)
        stretch = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
        per_pair: Any = 1.0 / (theta * stretch ** (head_dim / (head_dim - 2))) ** exponents(head_dim)
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
    """Turns the pairs (i, i + H/2) of every head, in float32: the half-split layout of Hugging Face's Llama."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
