"""Numbers of 8 bits times a scale: fp8 by tensor, channel or block, MXFP8, and int8."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cotgrpo.models.huggingface.dequantize.decoded import Bounds, DecodedTensor
from cotgrpo.models.huggingface.family import ModelError
from cotgrpo.models.huggingface.safetensors_files import StoredTensor


def scaled_tensor(
    weight: StoredTensor,
    scale: StoredTensor,
    dtype: np.dtype,
    *,
    block: Sequence[int] | None = None,
    zero_point: StoredTensor | None = None,
    factor: float = 1.0,
) -> DecodedTensor:
    """Return `(weight - zero_point) * scale * factor`.

    Args:
        weight: of 8 bits.
        scale: one number for the tensor, one for each row, or one for each block. Bytes are powers of two (`E8M0`).
        dtype: of the model before it was quantized.
        block: the sizes of a block along the last axes. None: blocks that divide the tensor evenly.
        zero_point: of the scale's shape. None: 0.
        factor: of all scales.

    Raises:
        ModelError: the scales do not fit the tensor.
    """
    at = scale_index(weight, scale, block)

    def decode(bounds: Bounds) -> np.ndarray:
        values = weight.read(bounds).astype(np.float32)
        if zero_point is not None:
            values -= at(zero_point.read().astype(np.float32), bounds)
        values *= at(np.asarray(scales_of(scale) * np.float32(factor)), bounds)
        return values

    return DecodedTensor(weight.path, weight.name, dtype, weight.shape, decode)


def scales_of(scale: StoredTensor) -> np.ndarray:
    """Return scales in float32. Bytes are exponents: `2 ** (byte - 127)`."""
    values = scale.read()
    return np.ldexp(np.float32(1), values.astype(np.int32) - 127) if values.dtype == np.uint8 else values.astype("f4")


def scale_index(
    weight: StoredTensor, scale: StoredTensor, block: Sequence[int] | None
) -> Callable[[np.ndarray, Bounds], np.ndarray]:
    """Return a function that spreads scales over a slice of the weight."""
    rank, shape = len(weight.shape), scale.shape
    if np.prod(shape, dtype=int) == 1:
        shape = (1,) * rank
    elif len(shape) < rank:  # one for each row, or for each matrix of a stack
        shape = (*shape, *(1,) * (rank - len(shape)))
    sizes: list[int] = []
    for axis, (size, scales) in enumerate(zip(weight.shape, shape, strict=False)):
        given = block[axis - rank] if block is not None and rank - axis <= len(block) else None
        if given is not None and -(-size // given) == scales:
            sizes.append(given)
        elif scales and size % scales == 0:
            sizes.append(size // scales)
    if len(sizes) != rank or len(shape) != rank:
        raise ModelError(
            f"{weight.path}: {scale.name} has the shape {list(scale.shape)}, which does not fit {weight.name} of the "
            f"shape {list(weight.shape)}: the checkpoint is damaged, or quantized in an unknown way."
        )

    def at(scales: np.ndarray, bounds: Bounds) -> np.ndarray:
        scales = scales.reshape(shape)
        for axis, (part, size) in enumerate(zip(bounds, sizes, strict=True)):
            scales = np.take(scales, np.arange(part.start, part.stop) // size, axis) if shape[axis] > 1 else scales
        return scales

    return at
