"""What a layer computes besides attention, each with its own gradient: what is kept is as little as it needs, and nothing is copied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from cotgrpo.models.config import KEPT
from cotgrpo.sharding import spec_of

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float


def token_product(x: Any, kernel: Any, dimensions: Any, precision: Any = None, **options: Any) -> Any:
    """`x W`, a `dot_general` for `flax.linen.Dense`: `[B, T, D] x [D, F] -> [B, T, F]`.

    The gradient `dW = sum_n x_n dy_n^T` sums over B and T. Left to autodiff it is `(dy^T x)^T` over two dimensions, for which XLA's CPU compiler writes
    `dy` out transposed, with all that makes `dy` computed element by element on the way; as one product over the B T rows it needs no copy.
    """

    @jax.custom_vjp
    def product(x: Any, kernel: Any) -> Any:
        return jax.lax.dot_general(x, kernel, dimensions, precision, **options)

    def forward(x: Any, kernel: Any) -> Any:
        # Frozen weights (LoRA's) have no gradient, and so x is not kept.
        return product(x.value, kernel.value), (x.value if kernel.perturbed else None, kernel.value)

    def backward(kept: Any, dy: Any) -> tuple[Any, Any]:
        x, kernel = kept
        if isinstance(dy, SymbolicZero):
            return None, None
        dx = jax.lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())), precision).astype(dy.dtype)
        if x is None:
            return dx, None
        # Tokens that a mesh spreads by their place in the row have no order as one dimension: there B and T stay two.
        if spec_of("BT", x.shape[:2])[1] is None:
            x, dy = (y.reshape(-1, y.shape[-1]) for y in (x, dy))
        tokens = tuple(range(x.ndim - 1))
        return dx, jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())), precision).astype(kernel.dtype)

    product.defvjp(forward, backward, symbolic_zeros=True)
    return checkpoint_name(product(x, kernel), KEPT)


FEW_ROWS = 64
"""So many rows at most are multiplied as columns on a CPU."""


def transposed_product(x: Float[Array, "*batch D"], kernel_FD: Float[Array, "F D"], dtype: Any = None) -> Any:
    """`x W^T`, `[..., F]`, in `dtype`; not made to be differentiated.

    XLA's CPU backend copies the right factor of a product into the order of its inner loop, which is little beside the work of many rows. A token of each of a few replies reads every
    weight for a handful of products: there `(W x^T)^T` copies x instead, and takes 0.6 to 0.85 of the time.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW_ROWS or jax.default_backend() != "cpu":
        return jax.lax.dot_general(x, kernel_FD, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)
    columns = jax.lax.dot_general(kernel_FD, rows, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    # Without the barrier XLA makes one product of this and the transposition, the one that was to be avoided.
    return jax.lax.optimization_barrier(columns).T.reshape(*x.shape[:-1], -1)


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
