"""The matrix product of a layer, with a gradient that sums over all tokens at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import DTypeLike

from cotgrpo.models.config import SAVED_NAMES
from cotgrpo.models.quantized.kernel import QuantizedKernel
from cotgrpo.sharding import (
    constrain,
    constrain_kernel,
    in_this_layout,
    layout_is_hidden,
    open_axes,
    partition_spec,
    vary_alike,
)

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float

DotDimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
"""((contracted dimensions of left, of right), (batch dimensions of left, of right))."""


def project_tokens(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "D F"] | QuantizedKernel,
    dimensions: DotDimensions,
    precision: jax.lax.PrecisionLike = None,
    *,
    preferred_element_type: DTypeLike | None = None,
    letters: str = "DF",
    saved_name: str = SAVED_NAMES,
    head_dim: int | None = None,
) -> Float[Array, "B T F"]:
    """Return `x W`: a `dot_general` for `flax.linen.Dense`.

    The gradient `dW = sum_n x_n dy_n^T` sums over B and T. Autodiff writes it as `(dy^T x)^T` over two dimensions.
    For that, XLA's CPU compiler writes out a transposed `dy` and repeats the elementwise work that makes it.
    One product over the B T rows needs no copy.

    `letters` are the kernel's dimensions as `constrain` reads them. The kernel is gathered before each product and `dW`
    is laid out as the kernel lies. Left to itself, XLA moves activations, or sends the kernel in parts during the
    product, which makes it slower. `saved_name` is what remat policies call the result.

    With `head_dim`, the products have F as heads and their values. On TPUs attention reads heads in another layout, and
    XLA writes the product in it. From a product with F as one dimension it would copy the result.

    A `QuantizedKernel` is gathered as it is stored and dequantized to the type of what it multiplies, at each use. It
    has no gradient.
    """
    # Gathered at each use: the forward pass keeps the kernel as it lies.
    gathered = lambda kernel: constrain(kernel, letters)
    split = lambda size, letter: (size // head_dim, head_dim) if head_dim and letter == "F" else (size,)
    by_head = lambda x, letter: x.reshape(*x.shape[:-1], *split(x.shape[-1], letter))
    flat = lambda x, letter: x.reshape(*x.shape[: -len(split(0, letter))], -1)

    def kernel_by_head(
        kernel: Float[Array, "D F"] | QuantizedKernel, dtype: DTypeLike
    ) -> Float[Array, "*inputs_and_outputs"]:
        whole = kernel.dequantize(dtype, gathered) if isinstance(kernel, QuantizedKernel) else gathered(kernel)
        return whole.reshape(*split(kernel.shape[0], letters[0]), *split(kernel.shape[1], letters[1]))

    @jax.custom_vjp
    def product(x: Float[Array, "B T D"], kernel: Float[Array, "D F"] | QuantizedKernel) -> Float[Array, "B T F"]:
        x, inputs = by_head(x, letters[0]), len(split(0, letters[0]))
        contracted = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
        y = jax.lax.dot_general(
            x,
            kernel_by_head(kernel, x.dtype),
            dimensions if head_dim is None else (contracted, ((), ())),
            precision,
            preferred_element_type=preferred_element_type,
        )
        return flat(y, letters[1])

    def forward(
        x: CustomVJPPrimal, kernel: CustomVJPPrimal | QuantizedKernel
    ) -> tuple[Array, tuple[Array | None, Array | QuantizedKernel]]:
        # Frozen weights (those under LoRA) have no gradient, so x is not kept.
        perturbed = any(leaf.perturbed for leaf in jax.tree.leaves(kernel, is_leaf=is_primal))
        if perturbed and isinstance(kernel, QuantizedKernel):
            raise ValueError("A quantized kernel is frozen and has no gradient: train adapters (LoRA) next to it.")
        values = jax.tree.map(lambda leaf: leaf.value, kernel, is_leaf=is_primal)
        return product(x.value, values), (x.value if perturbed else None, values)

    def backward(
        kept: tuple[Array | None, Array | QuantizedKernel], dy: Float[Array, "B T F"] | SymbolicZero
    ) -> tuple[Array | None, Array | None]:
        x, kernel = kept
        if isinstance(dy, SymbolicZero):
            return None, None
        slopes: Array = by_head(dy, letters[1])
        whole = kernel_by_head(kernel, slopes.dtype)
        inputs, outputs = (len(split(0, letter)) for letter in letters)
        contracted = (tuple(range(slopes.ndim - outputs, slopes.ndim)), tuple(range(inputs, whole.ndim)))
        dx = jax.lax.dot_general(slopes, whole, (contracted, ((), ())), precision)
        dx = flat(dx, letters[0]).astype(slopes.dtype)
        if x is None or isinstance(kernel, QuantizedKernel):
            return dx, None
        # Tokens that are sharded along the sequence cannot become one dimension, so there B and T stay two.
        if head_dim is None and partition_spec("BT", x.shape[:2])[1] is None and not layout_is_hidden(x):
            x, slopes = (y.reshape(-1, y.shape[-1]) for y in (x, slopes))
        tokens = tuple(range(x.ndim - 1))
        dkernel = jax.lax.dot_general(by_head(x, letters[0]), slopes, ((tokens, tokens), ((), ())), precision)
        dkernel = dkernel.reshape(kernel.shape)
        dkernel = constrain_kernel(dkernel, letters) if open_axes() else gathered(dkernel)
        return dx, dkernel.astype(kernel.dtype)

    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)
    product.defvjp(forward, in_this_layout(backward), symbolic_zeros=True)
    return checkpoint_name(product(*vary_alike(x, kernel)), saved_name)
