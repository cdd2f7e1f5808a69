"""Workarounds for XLA's CPU compiler: the same values, from programs that it compiles well. Other platforms get the plain formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float


def on_cpu(change: Callable[[Any], Any], x: Any) -> Any:
    """`change(x)`, which has x's values, in a program for a CPU; x itself elsewhere."""
    return jax.lax.platform_dependent(x, cpu=change, default=lambda x: x)


def materialized_on_cpu(x: Any) -> Any:
    """x, to be summed over a vocabulary.

    XLA's CPU backend takes the formula of x into the sum, which then runs on one core and takes several times as long as writing x out and adding it up.
    There x ends in a selection that changes no value and stays outside.
    """
    return on_cpu(lambda x: jnp.where(x > jnp.finfo(x.dtype).max, jnp.inf, x), x)


def vocab_sum(x: Float[Array, "V"]) -> Float[Array, ""]:
    """`sum_v x_v` over a vocabulary."""
    return jnp.sum(materialized_on_cpu(x))


def outer_product_sum(x: Float[Array, "N D"], y: Float[Array, "N F"], dtype: Any = None) -> Float[Array, "D F"]:
    """`x^T y = sum_n x_n y_n^T` in `dtype`, for F much larger than D, as a vocabulary is: the gradient of a head over its N tokens.

    XLA's CPU backend leaves a product over both first dimensions to another library than the rest, which reaches half their rate where F is large. There `x^T` is written out first.
    """
    # Without the barrier XLA takes the transposition into the product again.
    return jnp.matmul(on_cpu(jax.lax.optimization_barrier, x.T), y, preferred_element_type=dtype)


FEW_ROWS = 64
"""So many rows at most are multiplied as columns on a CPU."""


def project_few_tokens(x: Float[Array, "*batch D"], kernel_FD: Float[Array, "F D"], dtype: Any = None) -> Any:
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
