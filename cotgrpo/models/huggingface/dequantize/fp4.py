"""Numbers of 4 bits with an exponent (E2M1) in blocks with a scale: MXFP4 and NVFP4."""

from __future__ import annotations

import numpy as np

from cotgrpo.models.huggingface.dequantize.decoded import Bounds, DecodedTensor, inside, steps
from cotgrpo.models.huggingface.dequantize.scaled import scales_of
from cotgrpo.models.huggingface.family import ModelError
from cotgrpo.models.huggingface.safetensors_files import StoredTensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The 16 numbers. The first of two is in the low bits of a byte."""


def fp4_values(packed: np.ndarray) -> np.ndarray:
    """Return the numbers in bytes. The last axis becomes twice as long."""
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return E2M1[pairs.reshape(*packed.shape[:-1], -1)]


def fp4_tensor(name: str, packed: StoredTensor, scale: StoredTensor, dtype: np.dtype, factor: float) -> DecodedTensor:
    """Return `[outputs, inputs]` of `packed` `[outputs, inputs / 2]` with a scale for each 16 or 32 inputs.

    Raises:
        ModelError: the blocks are of another size.
    """
    *rows, half = packed.shape
    blocks = scale.shape[-1]
    if scale.shape[:-1] != tuple(rows) or 2 * half not in (16 * blocks, 32 * blocks):
        raise ModelError(f"{packed.path}: {scale.name} {list(scale.shape)} does not fit {packed.name} {[*rows, half]}.")
    size = 2 * half // blocks

    def decode(bounds: Bounds) -> np.ndarray:
        *others, inputs = bounds
        groups = steps(inputs, size)
        stored = packed.read((*others, slice(groups.start * size // 2, groups.stop * size // 2)))
        scales = scales_of(scale)[(*others, groups)] * np.float32(factor)
        return (fp4_values(stored) * np.repeat(scales, size, axis=-1))[..., inside(inputs, size)]

    return DecodedTensor(packed.path, name, dtype, (*rows, 2 * half), decode)


def mxfp4_experts(name: str, blocks: StoredTensor, scales: StoredTensor, dtype: np.dtype) -> DecodedTensor:
    """Return `[experts, inputs, outputs]`, as gpt-oss has it in bfloat16.

    Args:
        name: of the tensor in a checkpoint of bfloat16.
        blocks: `[experts, outputs, inputs / 32, 16]` bytes.
        scales: `[experts, outputs, inputs / 32]` exponents.
        dtype: of the model before it was quantized.

    Raises:
        ModelError: the shapes do not fit.
    """
    if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape:
        raise ModelError(f"{blocks.path}: {scales.name} {list(scales.shape)} does not fit {list(blocks.shape)}.")
    experts, outputs, groups, half = blocks.shape
    size = 2 * half

    def decode(bounds: Bounds) -> np.ndarray:
        expert, inputs, output = bounds
        part = (expert, output, steps(inputs, size))
        stored = fp4_values(blocks.read((*part, slice(0, half))))
        exponents = scales.read(part).astype(np.int32)[..., None] - 127
        rows = np.ldexp(stored, exponents).reshape(*stored.shape[:2], -1)
        return rows[..., inside(inputs, size)].swapaxes(1, 2)

    return DecodedTensor(blocks.path, name, dtype, (experts, groups * size, outputs), decode)
