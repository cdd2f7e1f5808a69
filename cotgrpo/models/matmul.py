"""The matrix product of a layer, with a gradient that sums over all tokens at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import DTypeLike

from cotgrpo.models.config import SAVED_NAMES
from cotgrpo.sharding import constrain, constrain_kernel, in_this_layout, layout_is_hidden, partition_spec, vary_alike

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float

DotDimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
"""((contracted dimensions of left, of right), (batch dimensions of left, of right))."""


def project_tokens(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "D F"],
    dimensions: DotDimensions,
    precision: jax.lax.PrecisionLike = None,
    *,
    preferred_element_type: DTypeLike | None = None,
    letters: str = "DF",
    saved_name: str = SAVED_NAMES,
) -> Float[Array, "B T F"]:
    """Return `x W`: a `dot_general` for `flax.linen.Dense`.

    The gradient `dW = sum_n x_n dy_n^T` sums over B and T. Autodiff writes it as `(dy^T x)^T` over two dimensions.
    For that, XLA's CPU compiler writes out a transposed `dy` and repeats the elementwise work that makes it.
    One product over the B T rows needs no copy.

    `letters` are the kernel's dimensions as `constrain` reads them. The kernel is gathered before each product and `dW`
    is laid out as the kernel lies. Left to itself, XLA moves activations, or sends the kernel in parts during the
    product, which makes it slower. `saved_name` is what remat policies call the result.
    """
    # Gathered at each use: the forward pass keeps the kernel as it lies.
    gathered = lambda kernel: constrain(kernel, letters)

    @jax.custom_vjp
    def product(x: Float[Array, "B T D"], kernel: Float[Array, "D F"]) -> Float[Array, "B T F"]:
        kernel = gathered(kernel)
        return jax.lax.dot_general(x, kernel, dimensions, precision, preferred_element_type=preferred_element_type)

    def forward(x: CustomVJPPrimal, kernel: CustomVJPPrimal) -> tuple[Array, tuple[Array | None, Array]]:
        # Frozen weights (those under LoRA) have no gradient, so x is not kept.
        return product(x.value, kernel.value), (x.value if kernel.perturbed else None, kernel.value)

    def backward(
        kept: tuple[Array | None, Array], dy: Float[Array, "B T F"] | SymbolicZero
    ) -> tuple[Array | None, Array | None]:
        x, kernel = kept
        if isinstance(dy, SymbolicZero):
            return None, None
        dx = jax.lax.dot_general(dy, gathered(kernel), (((dy.ndim - 1,), (1,)), ((), ())), precision).astype(dy.dtype)
        if x is None:
            return dx, None
        # Tokens that are sharded along the sequence cannot become one dimension, so there B and T stay two.
        if partition_spec("BT", x.shape[:2])[1] is None and not layout_is_hidden(x):
            x, dy = (y.reshape(-1, y.shape[-1]) for y in (x, dy))
        tokens = tuple(range(x.ndim - 1))
        dkernel = jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())), precision)
        return dx, constrain_kernel(gathered(dkernel), letters).astype(kernel.dtype)

    product.defvjp(forward, in_this_layout(backward), symbolic_zeros=True)
    return checkpoint_name(product(*vary_alike(x, kernel)), saved_name)
