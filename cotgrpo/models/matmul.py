"""The matrix product of a layer, with a gradient that sums over all tokens at once."""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from cotgrpo.models.config import SAVED_NAMES
from cotgrpo.sharding import partition_spec


def project_tokens(x: Any, kernel: Any, dimensions: Any, precision: Any = None, **options: Any) -> Any:
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
        if partition_spec("BT", x.shape[:2])[1] is None:
            x, dy = (y.reshape(-1, y.shape[-1]) for y in (x, dy))
        tokens = tuple(range(x.ndim - 1))
        return dx, jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())), precision).astype(kernel.dtype)

    product.defvjp(forward, backward, symbolic_zeros=True)
    return checkpoint_name(product(x, kernel), SAVED_NAMES)
