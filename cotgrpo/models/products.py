"""Matrix products and sums, written so that XLA's CPU backend makes them at their best rate; elsewhere they are what they were."""

from __future__ import annotations

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


def on_cpu(change: Callable[[Any], Any], x: Any) -> Any:
    """`change(x)`, which has x's values, in a program for a CPU; x itself elsewhere."""
    return jax.lax.platform_dependent(x, cpu=change, default=lambda x: x)


def written(x: Any) -> Any:
    """x, to be summed over a vocabulary.

    XLA's CPU backend takes the formula of x into the sum, which then runs on one core and takes several times as long as writing x out and adding it up.
    There x ends in a selection that changes no value and stays outside.
    """
    return on_cpu(lambda x: jnp.where(x > jnp.finfo(x.dtype).max, jnp.inf, x), x)


def total(x: Float[Array, "V"]) -> Float[Array, ""]:
    """`sum_v x_v` over a vocabulary."""
    return jnp.sum(written(x))


def summed_product(x: Float[Array, "N D"], y: Float[Array, "N F"], dtype: Any = None) -> Float[Array, "D F"]:
    """`x^T y = sum_n x_n y_n^T` in `dtype`, for F much larger than D, as a vocabulary is: the gradient of a head over its N tokens.

    XLA's CPU backend leaves a product over both first dimensions to another library than the rest, which reaches half their rate where F is large. There `x^T` is written out first.
    """
    # Without the barrier XLA takes the transposition into the product again.
    return jnp.matmul(on_cpu(jax.lax.optimization_barrier, x.T), y, preferred_element_type=dtype)


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
