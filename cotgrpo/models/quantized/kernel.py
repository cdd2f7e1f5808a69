"""A quantized kernel: codes, and one scale per block of inputs and output.

    W[i, o] ~ value(codes[i, o]) * scale[i // block, o]

`int8` codes are their own values. `nf4` codes are indices of the 16 values of NormalFloat (Dettmers et al. 2023,
arXiv:2305.14314), and two of them share a byte. `cotgrpo.models.quantized.quantize` makes the arrays. In a tree of
parameters they stand in place of a projection's `kernel`:

    {"query": {"kernel_nf4": uint8 [L, in / 2, out], "kernel_scale": float32 [L, in / block, out], "bias": ...}}

Quantized kernels are frozen. A product dequantizes its kernel where it multiplies, in the forward and again in the
backward pass, so no more than one layer's kernels exist in the compute type at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

if TYPE_CHECKING:
    from jaxtyping import Float, Integer, Shaped

    from cotgrpo.types import Array

Format = Literal["int8", "nf4"]
FORMATS: tuple[Format, ...] = ("int8", "nf4")
BLOCK = 64
"""Inputs that share a scale, as in bitsandbytes."""
CODES = {"kernel_int8": jnp.int8, "kernel_nf4": jnp.uint8}
"""{name in a tree: dtype} of the codes."""
SCALE = "kernel_scale"
QUANTIZED_PARTS = (*CODES, SCALE)
"""Names of what stands in place of a kernel. Generation keeps these arrays as they are."""

NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The values of the 16 codes of nf4 (appendix E of the paper)."""


class Quantization(NamedTuple):
    """How kernels are quantized.

    Attributes:
        to: their format.
        block: inputs that share a scale.
    """

    to: Format
    block: int = BLOCK


class QuantizedKernel(flax.struct.PyTreeNode):
    """The arrays of one kernel, or of a stack of them. `shape` is that of the kernel.

    Attributes:
        codes: int8 `[..., in, out]`; or, for nf4, uint8 `[..., in / 2, out]`. There the low four bits are the code of
            an input in the first half of its block, and the high ones that of the same place in the second half.
        scale: float32 `[..., in / block, out]`.
    """

    codes: Integer[Array, "*stack I O"]
    scale: Float[Array, "*stack N O"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        *stack, rows, outputs = self.codes.shape
        return (*stack, rows * (2 if self.codes.dtype == jnp.uint8 else 1), outputs)

    def dequantize(
        self, dtype: DTypeLike, lay_out: Callable[[Shaped[Array, "..."]], Shaped[Array, "..."]] = lambda part: part
    ) -> Float[Array, "*stack in out"]:
        """Return the kernel, computed in float32 and rounded to `dtype`.

        `lay_out` is applied to codes and scale first: they are what devices send each other, not the kernel.
        """
        codes, scale = lay_out(self.codes), lay_out(self.scale)
        *stack, blocks, outputs = scale.shape
        codes = codes.reshape(*stack, blocks, codes.shape[-2] // blocks, outputs)
        if codes.dtype == jnp.uint8:
            values = nf4_values(jnp.concatenate([codes & 15, codes >> 4], axis=-2))
        else:
            values = codes.astype(jnp.float32)
        return (values * scale[..., None, :]).astype(dtype).reshape(self.shape)


def nf4_values(codes: Integer[Array, "..."]) -> Float[Array, "..."]:
    """Return the float32 values of codes from 0 to 15.

    It chooses by each bit in turn. A gather from a table of 16 would do the same, one element at a time on a TPU.
    """
    values: list[Any] = [jnp.float32(value) for value in NF4_VALUES]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    found: Float[Array, ...] = values[0]
    return found


def pack_nf4(codes: Integer[Array, "*stack I O"], block: int) -> Integer[Array, "*stack half O"]:
    """Return codes from 0 to 15 as bytes, two in each, as `QuantizedKernel` describes."""
    *stack, inputs, outputs = codes.shape
    halves = codes.astype(jnp.uint8).reshape(*stack, inputs // block, 2, block // 2, outputs)
    packed = halves[..., 0, :, :] | (halves[..., 1, :, :] << 4)
    return packed.reshape(*stack, inputs // 2, outputs)


def codes_name(module: Mapping[str, Any]) -> str | None:
    """Return the name of the codes among the parameters of a projection; None: its kernel is not quantized."""
    return next((name for name in CODES if name in module), None)


def quantized_kernel(module: Mapping[str, Any]) -> QuantizedKernel | None:
    """Return the quantized kernel among the parameters of a projection, or None."""
    name = codes_name(module)
    return None if name is None else QuantizedKernel(module[name], module[SCALE])


def quantized_shapes(shape: tuple[int, ...], to: Format, block: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the arrays in place of a kernel `[..., in, out]`, as shapes.

    Raises:
        ValueError: `block` does not divide the inputs.
    """
    *stack, inputs, outputs = shape
    if inputs % block:
        raise ValueError(
            f"a block of {block} inputs does not divide a kernel with {inputs} of them: expected an even divisor of "
            f"{inputs}, such as {math.gcd(inputs, block) if math.gcd(inputs, block) % 2 == 0 else 'none: it is odd'}."
        )
    name = f"kernel_{to}"
    rows = inputs // 2 if to == "nf4" else inputs
    return {
        name: jax.ShapeDtypeStruct((*stack, rows, outputs), CODES[name]),
        SCALE: jax.ShapeDtypeStruct((*stack, inputs // block, outputs), jnp.float32),
    }
