"""The matrix product of a projection, with the gradient of its weights written so that it needs no transposed copies."""

from __future__ import annotations

from typing import Any

import jax

from cotgrpo.sharding import spec_of


def token_product(x: Any, kernel: Any, dimensions: Any, precision: Any = None, **options: Any) -> Any:
    """`x W`, a `dot_general` for `flax.linen.Dense`: `[B, T, D] x [D, F] -> [B, T, F]`.

    The gradient `dW = sum_n x_n dy_n^T` sums over B and T. Left to autodiff it is `(dy^T x)^T` over two dimensions, for which XLA's CPU compiler writes
    `dy` out transposed, with all that makes `dy` computed element by element on the way; as one product over the B T rows it needs no copy.
    """

    @jax.custom_vjp
    def product(x: Any, kernel: Any) -> Any:
        return jax.lax.dot_general(x, kernel, dimensions, precision, **options)

    def backward(kept: Any, dy: Any) -> tuple[Any, Any]:
        x, kernel = kept
        dx = jax.lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())), precision)
        # Tokens that a mesh spreads by their place in the row have no order as one dimension: there B and T stay two.
        if spec_of("BT", x.shape[:2])[1] is None:
            x, dy = (y.reshape(-1, y.shape[-1]) for y in (x, dy))
        tokens = tuple(range(x.ndim - 1))
        dkernel = jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())), precision)
        return dx.astype(x.dtype), dkernel.astype(kernel.dtype)

    product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), backward)
    return product(x, kernel)
