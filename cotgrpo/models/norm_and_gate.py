"""RMSNorm and the MLP's gate, each with its own gradient that keeps as little as it needs and copies nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float

RmsNormKept = tuple[jax.Array, jax.Array, jax.Array]
"""x, the scale, and `1 / sqrt(mean(x^2) + eps)` of each row."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*batch D"], scale_D: Float[Array, "D"], eps: float) -> Float[Array, "*batch D"]:
    """Return `x / sqrt(mean(x^2) + eps) * scale`, computed in float32. The gradient keeps x and one number per row."""
    return rms_norm_forward(x, scale_D, eps)[0]


def rms_norm_forward(
    x: Float[Array, "*batch D"], scale_D: Float[Array, "D"], eps: float
) -> tuple[Float[Array, "*batch D"], RmsNormKept]:
    """Return the result of `rms_norm` and what its gradient needs."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * broadcast_last(scale_D, x)).astype(x.dtype), (x, scale_D, inverse)


def rms_norm_backward(
    eps: float, kept: RmsNormKept, dy: Float[Array, "*batch D"]
) -> tuple[Float[Array, "*batch D"], Float[Array, "D"]]:
    """With n = x / rms: `dn = dy scale`, `dx = (dn - n mean(n dn)) / rms`, `dscale = sum_rows dy n`."""
    x, scale_D, inverse = kept
    n, dy = x.astype(jnp.float32) * inverse, dy.astype(jnp.float32)
    dn = dy * broadcast_last(scale_D, x)
    dx = inverse * (dn - n * jnp.mean(n * dn, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(dy * n, axis=tuple(range(x.ndim - 1)))


rms_norm.defvjp(rms_norm_forward, rms_norm_backward)


def broadcast_last(x_D: Float[Array, "D"], like: Float[Array, "*batch D"]) -> Float[Array, "*ones D"]:
    """Reshape `x_D` to the rank of `like`, so that both can be multiplied or added."""
    return x_D.reshape((1,) * (like.ndim - 1) + (-1,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation: str, gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """Return `activation(gate) * up`. The gradient keeps these two and nothing computed from them."""
    return ACTIVATIONS[activation](gate) * up


def gated_backward(
    activation: str, kept: tuple[jax.Array, jax.Array], dy: Float[Array, "*batch F"]
) -> tuple[Float[Array, "*batch F"], Float[Array, "*batch F"]]:
    """Return autodiff's gradients of `gate` and `up`."""
    return jax.vjp(lambda gate, up: ACTIVATIONS[activation](gate) * up, *kept)[1](dy)


gated.defvjp(lambda activation, gate, up: (gated(activation, gate, up), (gate, up)), gated_backward)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}


def relu_squared(x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """Return `max(x, 0)^2` (So et al. 2021, arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def xielu(
    x: Float[Array, "*batch F"], alpha_p: Float[Array, "1"], alpha_n: Float[Array, "1"]
) -> Float[Array, "*batch F"]:
    """Return xIELU (Huang & Schlag 2024, arXiv:2411.13010), computed in float32.

    a x^2 + x / 2                                    for x > 0, with a = softplus(alpha_p)
    b (exp(min(x, -1e-6)) - 1 - x) + x / 2           else, with b = 1/2 + softplus(alpha_n)
    """
    x32 = x.astype(jnp.float32)
    a, b = (jax.nn.softplus(alpha.astype(jnp.float32)).reshape((1,) * x.ndim) for alpha in (alpha_p, alpha_n))
    above = a * jnp.square(x32)
    below = (jnp.expm1(jnp.minimum(x32, -1e-6)) - x32) * (0.5 + b)
    return (jnp.where(x32 > 0, above, below) + 0.5 * x32).astype(x.dtype)
