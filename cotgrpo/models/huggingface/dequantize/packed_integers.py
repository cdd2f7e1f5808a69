"""Integers of 2, 3, 4 or 8 bits in 32-bit words: GPTQ, AWQ, and `pack-quantized` of compressed-tensors."""

from __future__ import annotations

import numpy as np

from cotgrpo.models.huggingface.dequantize.decoded import Bounds, DecodedTensor, inside, steps, whole
from cotgrpo.models.huggingface.family import ModelError
from cotgrpo.models.huggingface.safetensors_files import StoredTensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""AWQ keeps output `i` of eight in place `AWQ_ORDER[i]` of a word."""


def unpack(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Return the integers in words of 32 bits along an axis, lowest bits first."""
    words = np.moveaxis(words, axis, -1)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        values = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
        values = values.reshape(*words.shape[:-1], -1)
    else:  # an integer may begin in one word and end in the next
        stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
        stream = stream[..., : stream.shape[-1] // bits * bits]
        values = stream.reshape(*words.shape[:-1], -1, bits) @ (1 << np.arange(bits))
    return np.moveaxis(values, -1, axis).astype(np.float32)


def word_groups(bits: int) -> tuple[int, int]:
    """Return how many integers fill how many words without a rest."""
    return (32 // bits, 1) if 32 % bits == 0 else (32, bits)


def gptq_tensor(
    parts: dict[str, StoredTensor], name: str, dtype: np.dtype, *, bits: int, group_size: int, zero_offset: int
) -> DecodedTensor:
    """Return `[outputs, inputs]` of GPTQ: `scale * (q - zero - zero_offset)` with the group of each input.

    Args:
        parts: `qweight` `[inputs * bits / 32, outputs]`, `scales` `[groups, outputs]`, `qzeros`
            `[groups, outputs * bits / 32]` and maybe `g_idx` `[inputs]`.
        name: of the tensor.
        dtype: of the model before it was quantized.
        bits: of an integer.
        group_size: inputs of a group, if there is no `g_idx`. -1: all.
        zero_offset: 1 for the first version of the format, which stores zero points less one.
    """
    qweight, scales, qzeros = (parts[key] for key in ("qweight", "scales", "qzeros"))
    count, words = word_groups(bits)
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    check_shape(scales, (scales.shape[0], outputs))
    check_shape(qzeros, (scales.shape[0], outputs * bits // 32))
    size = inputs if group_size == -1 else group_size
    group_of = parts["g_idx"].read() if "g_idx" in parts else np.arange(inputs) // size

    def decode(bounds: Bounds) -> np.ndarray:
        output, row = bounds
        at = steps(row, count)
        q = unpack(qweight.read((slice(at.start * words, at.stop * words), output)), bits, 0)[inside(row, count)]
        at = steps(output, count)
        zeros = qzeros.read((slice(0, qzeros.shape[0]), slice(at.start * words, at.stop * words)))
        zero = unpack(zeros, bits, 1)[:, inside(output, count)] + zero_offset
        zero = zero if bits == 3 else zero % 2**bits  # a zero point of 0 was stored as -1
        scale = scales.read((slice(0, scales.shape[0]), output)).astype(np.float32)
        group = group_of[row]
        return ((q - zero[group]) * scale[group]).T

    return DecodedTensor(qweight.path, name, dtype, (outputs, inputs), decode)


def awq_tensor(parts: dict[str, StoredTensor], name: str, dtype: np.dtype) -> DecodedTensor:
    """Return `[outputs, inputs]` of AWQ with 4 bits: `scale * (q - zero)`.

    Args:
        parts: `qweight` `[inputs, outputs / 8]`, `qzeros` `[groups, outputs / 8]` and `scales` `[groups, outputs]`.
        name: of the tensor.
        dtype: of the model before it was quantized.
    """
    qweight, scales, qzeros = (parts[key] for key in ("qweight", "scales", "qzeros"))
    inputs, outputs = qweight.shape[0], qweight.shape[1] * 8
    groups = scales.shape[0]
    check_shape(scales, (groups, outputs))
    check_shape(qzeros, (groups, outputs // 8))
    if not groups or inputs % groups:
        raise ModelError(f"{scales.path}: {scales.name} has {groups} groups, which do not divide {inputs} inputs.")
    size = inputs // groups

    def ordered(words: np.ndarray) -> np.ndarray:
        values = unpack(words, 4, 1)
        return values.reshape(len(values), -1, 8)[:, :, AWQ_ORDER].reshape(len(values), -1)

    def decode(bounds: Bounds) -> np.ndarray:
        output, row = bounds
        at, group = steps(output, 8), steps(row, size)
        q = ordered(qweight.read((row, at)))[:, inside(output, 8)]
        zero = ordered(qzeros.read((group, at)))[:, inside(output, 8)]
        scale = scales.read((group, output)).astype(np.float32)
        spread = np.arange(row.start, row.stop) // size - group.start
        return ((q - zero[spread]) * scale[spread]).T

    return DecodedTensor(qweight.path, name, dtype, (outputs, inputs), decode)


def packed_tensor(parts: dict[str, StoredTensor], name: str, dtype: np.dtype) -> DecodedTensor:
    """Return `[outputs, inputs]` of compressed-tensors: `scale * (q - 2 ** (bits - 1) - zero)`.

    Args:
        parts: `weight_packed` `[outputs, words]`, `weight_scale` `[outputs, groups]`, `weight_shape` `[2]`, and maybe
            `weight_zero_point` `[words, groups]` and `weight_g_idx` `[inputs]`.
        name: of the tensor.
        dtype: of the model before it was quantized.
    """
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    outputs, inputs = (int(size) for size in parts["weight_shape"].read())
    bits = next((bits for bits in range(2, 9) if -(-inputs * bits // 32) == packed.shape[1]), 0)
    groups = scales.shape[-1]
    if not bits or packed.shape[0] != outputs or not groups or inputs % groups:
        raise ModelError(
            f"{packed.path}: {packed.name} {list(packed.shape)} and {scales.name} {list(scales.shape)} do not fit "
            f"{[outputs, inputs]}."
        )
    (count, words), size = word_groups(bits), inputs // groups
    order = parts["weight_g_idx"].read() if "weight_g_idx" in parts else None
    # An order of -1 means that the groups are consecutive.
    group_of = np.arange(inputs) // size if order is None or (order < 0).any() else order

    def decode(bounds: Bounds) -> np.ndarray:
        output, row = bounds
        at = steps(row, count)
        stored = packed.read((output, slice(at.start * words, min(at.stop * words, packed.shape[1]))))
        q = unpack(stored, bits, 1)[:, inside(row, count)] - 2 ** (bits - 1)
        group = group_of[row]
        if "weight_zero_point" in parts:
            zero = unpack(parts["weight_zero_point"].read(), bits, 0)[:outputs] - 2 ** (bits - 1)
            q -= zero[output][:, group]
        return q * whole(scales)[output][:, group]

    return DecodedTensor(packed.path, name, dtype, (outputs, inputs), decode)


def check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    """Raise ModelError if a tensor does not have this shape."""
    if tensor.shape != shape:
        raise ModelError(f"{tensor.path}: {tensor.name} has the shape {list(tensor.shape)}, expected {list(shape)}.")
