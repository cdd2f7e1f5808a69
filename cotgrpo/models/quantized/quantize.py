"""Quantize frozen kernels with qwix, one layer at a time.

    base = quantize_base(params, "nf4")          # the kernels of all projections; the rest as it is
    adapted = AdaptedParams(base, adapters, lora)

Only layers' projections are quantized, as QLoRA does: they are nearly all of a model, and LoRA corrects them. Embedding
and head are read row by row and decide the logits; norms and biases are small. These keep their type.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from cotgrpo.models.quantized.kernel import BLOCK, SCALE, Format, Quantization, pack_nf4, quantized_shapes
from cotgrpo.types import Params

if TYPE_CHECKING:
    from jaxtyping import Float

    from cotgrpo.types import Array


def require_qwix() -> Any:
    """Return the library that quantizes.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ValueError(
            "lora.quantize_base needs the package qwix: pip install 'cotgrpo[qlora]' or pip install qwix."
        ) from error
    return qwix


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize_kernel(kernel: Float[Array, "I O"], to: Format, block: int) -> dict[str, Array]:
    """Return the arrays in place of one layer's kernel. They are computed in float32.

    Raises:
        ValueError: `block` does not divide the inputs, or qwix is not installed.
    """
    quantized_shapes(kernel.shape, to, block)
    qwix, outputs = require_qwix(), kernel.shape[-1]

    def quantize_blocks(part: Float[Array, "block O"]) -> tuple[Array, Array]:
        found = qwix.quantize(part, "nf4" if to == "nf4" else jnp.int8, channelwise_axes=(1,))
        # The largest weight of a block lies between -127 and -128. Without the bound rounding errors would decide.
        codes = pack_nf4(found.qvalue, block) if to == "nf4" else jnp.maximum(found.qvalue, -127)
        return codes, found.scale[0]

    # One row of blocks at a time: qwix compares each weight with all 16 values of nf4.
    codes, scale = jax.lax.map(quantize_blocks, kernel.astype(jnp.float32).reshape(-1, block, outputs))
    return {f"kernel_{to}": codes.reshape(-1, outputs), SCALE: scale}


def quantize_base(params: Params, to: Format, block: int = BLOCK) -> Params:
    """Return parameters with the kernels of all projections quantized, one layer at a time.

    Args:
        params: with kernels `[L, in, out]`.
        to: "int8" or "nf4".
        block: inputs that share a scale. It is even and divides the inputs of every projection.

    Raises:
        ValueError: `block` does not divide the inputs of a kernel, or qwix is not installed.
    """
    found: dict[tuple[str, ...], Any] = {}
    for path, leaf in flatten_dict(params).items():
        if is_quantized_kernel(path, leaf):
            one_layer = functools.partial(quantize_kernel, to=to, block=block)
            found |= {(*path[:-1], name): part for name, part in jax.lax.map(one_layer, leaf).items()}
        else:
            found[path] = leaf
    return unflatten_dict(found)


def is_quantized_kernel(path: tuple[str, ...], leaf: Any) -> bool:
    """Return whether a leaf is the kernel of a layers' projection."""
    return path[-1] == "kernel" and len(leaf.shape) == 3


def check_blocks(params: Params, quantization: Quantization) -> None:
    """Raise ValueError if a kernel cannot be quantized in blocks of this size. `params` may be shapes."""
    abstract_base(params, *quantization)


def abstract_base(params: Params, to: Format, block: int = BLOCK) -> Params:
    """Return the shapes of `quantize_base(params, ...)`. qwix is not needed.

    Raises:
        ValueError: `block` does not divide the inputs of a kernel. The message names it.
    """
    found: dict[tuple[str, ...], Any] = {}
    for path, leaf in flatten_dict(params).items():
        if not is_quantized_kernel(path, leaf):
            found[path] = leaf
            continue
        try:
            parts = quantized_shapes(leaf.shape, to, block)
        except ValueError as error:
            raise ValueError(f"{'/'.join(path)}: {error}") from None
        found |= {(*path[:-1], name): part for name, part in parts.items()}
    return unflatten_dict(found)
