"""Workarounds for XLA's CPU compiler: the same values from programs that it compiles well.

On other platforms each function is the plain formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float


def on_cpu(change: Callable[[jax.Array], jax.Array], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `change(x)` in a program for a CPU, x elsewhere. `change` must keep the values of x."""
    return jax.lax.platform_dependent(x, cpu=change, default=lambda x: x)


def materialized_on_cpu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x, written to memory before it is summed over a vocabulary.

    XLA's CPU backend fuses the formula of x into the sum, which then runs on one core. That takes several times as long
    as writing x and then adding it up. Here x ends in a selection that changes no value and is not fused.
    """
    return on_cpu(lambda x: jnp.where(x > jnp.finfo(x.dtype).max, jnp.inf, x), x)


def vocab_sum(x: Float[Array, "V"]) -> Float[Array, ""]:
    """Return `sum_v x_v` over a vocabulary."""
    return jnp.sum(materialized_on_cpu(x))


def outer_product_sum(
    x: Float[Array, "N D"], y: Float[Array, "N F"], dtype: DTypeLike | None = None
) -> Float[Array, "D F"]:
    """Return `x^T y = sum_n x_n y_n^T` in `dtype`, for F much larger than D, such as the gradient of a head.

    XLA's CPU backend gives a product over both first dimensions to a library that is half as fast if F is large.
    There `x^T` is written out first.
    """
    # Without the barrier XLA fuses the transposition into the product again.
    return jnp.matmul(on_cpu(jax.lax.optimization_barrier, x.T), y, preferred_element_type=dtype)


FEW_ROWS = 64
"""On a CPU, at most this many rows are multiplied as columns."""


def project_few_tokens(
    x: Float[Array, "*batch D"], kernel_FD: Float[Array, "F D"], dtype: DTypeLike | None = None
) -> Float[Array, "*batch F"]:
    """Return `x W^T` in `dtype`. Not made to be differentiated.

    XLA's CPU backend copies the right factor of a product into the order of its inner loop. With many rows the copy
    costs little. A decode step with a few rows reads every weight for a handful of products. There `(W x^T)^T` copies x
    instead and takes 0.6 to 0.85 of the time.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW_ROWS or jax.default_backend() != "cpu":
        return jax.lax.dot_general(x, kernel_FD, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)
    columns = jax.lax.dot_general(kernel_FD, rows, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    # Without the barrier XLA merges this product and the transposition into the product that copies the kernel.
    return jax.lax.optimization_barrier(columns).T.reshape(*x.shape[:-1], -1)
