"""What a layer computes besides products and attention, each with its own gradient: what is kept is as little as it needs, and nothing is copied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*batch D"], scale_D: Float[Array, "D"], eps: float) -> Float[Array, "*batch D"]:
    """`x / sqrt(mean(x^2) + eps) * scale`, computed in float32. Kept for the gradient: x and one number a row."""
    return normed(x, scale_D, eps)[0]


def normed(x: Any, scale_D: Any, eps: float) -> Any:
    """The result of `rms_norm`, and what its gradient needs."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * along(scale_D, x)).astype(x.dtype), (x, scale_D, inverse)


def rms_norm_backward(eps: float, kept: Any, dy: Any) -> tuple[Any, Any]:
    """With n = x / rms: `dn = dy scale`, `dx = (dn - n mean(n dn)) / rms`, `dscale = sum_rows dy n`."""
    x, scale_D, inverse = kept
    n, dy = x.astype(jnp.float32) * inverse, dy.astype(jnp.float32)
    dn = dy * along(scale_D, x)
    dx = inverse * (dn - n * jnp.mean(n * dn, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(dy * n, axis=tuple(range(x.ndim - 1)))


rms_norm.defvjp(normed, rms_norm_backward)


def along(scale_D: Any, x: Any) -> Any:
    """`scale_D` with the other dimensions of x."""
    return scale_D.reshape((1,) * (x.ndim - 1) + (-1,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation: str, gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """`activation(gate) * up`. Kept for the gradient: the two."""
    return ACTIVATIONS[activation](gate) * up


def gated_backward(activation: str, kept: Any, dy: Any) -> Any:
    """Autodiff's own, of the gate and up that were kept."""
    return jax.vjp(lambda gate, up: ACTIVATIONS[activation](gate) * up, *kept)[1](dy)


gated.defvjp(lambda activation, gate, up: (gated(activation, gate, up), (gate, up)), gated_backward)

ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}
