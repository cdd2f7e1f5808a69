"""Numbers of 4 bits from a table (nf4, fp4) in blocks with a scale, as bitsandbytes stores them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from cotgrpo.models.huggingface.dequantize.decoded import Bounds, DecodedTensor, whole
from cotgrpo.models.huggingface.family import ModelError
from cotgrpo.models.huggingface.safetensors_files import StoredTensor

STATE = "quant_state.bitsandbytes__"


def four_bit_tensor(parts: Mapping[str, StoredTensor], name: str, dtype: np.dtype) -> DecodedTensor:
    """Return a tensor that is stored as one row of 4-bit numbers.

    Args:
        parts: `""` (the bytes), `absmax`, `quant_map`, `quant_state.bitsandbytes__nf4` or `__fp4`, and with double
            quantization `nested_absmax` and `nested_quant_map`.
        name: of the tensor.
        dtype: of the model before it was quantized.

    Raises:
        ModelError: a part is missing or corrupt.
    """
    packed = parts[""]
    state, shape, block = read_state(parts, name)
    if np.prod(packed.shape, dtype=int) != -(-int(np.prod(shape)) // 2):
        raise ModelError(f"{packed.path}: {name} has {packed.shape} bytes, which do not fit its shape {list(shape)}.")
    row = int(np.prod(shape[1:], dtype=int))
    flat = (slice(0, 1),) * (len(packed.shape) - 1)

    def decode(bounds: Bounds) -> np.ndarray:
        first, last = bounds[0].start * row, bounds[0].stop * row
        part = slice(first // 2, -(-last // 2))
        stored = packed.read((part, *flat) if packed.shape[0] != 1 else (*flat, part)).reshape(-1)
        pairs = np.stack([stored >> 4, stored & 15], axis=-1).reshape(-1)[first % 2 :][: last - first]
        scales = block_scales(parts, state)[np.arange(first, last) // block]
        values = whole(parts["quant_map"])[pairs] * scales
        return values.reshape(-1, *shape[1:])[(slice(None), *bounds[1:])]

    return DecodedTensor(packed.path, name, dtype, shape, decode)


def read_state(parts: Mapping[str, StoredTensor], name: str) -> tuple[dict[str, Any], tuple[int, ...], int]:
    """Return the JSON of a tensor's quantization, its shape, and the elements of a block."""
    found = next((parts[key] for key in parts if key.startswith(STATE)), None)
    missing = {"absmax", "quant_map"} - set(parts)
    if found is None or missing:
        raise ModelError(f"{parts[''].path} lacks {name}.{min(missing) if missing else STATE + 'nf4'}.")
    try:
        state = json.loads(found.read().tobytes())
        shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        if "nested_absmax" in parts:
            float(state["nested_offset"]), int(state["nested_blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{found.path}: {found.name} is corrupt ({type(error).__name__}: {error}).") from error
    return state, shape, block


def block_scales(parts: Mapping[str, StoredTensor], state: Mapping[str, Any]) -> np.ndarray:
    """Return the scale of each block. With double quantization it is a number of 8 bits itself."""
    if "nested_absmax" not in parts:
        return whole(parts["absmax"])
    codes = parts["absmax"].read().reshape(-1)
    nested = whole(parts["nested_absmax"])[np.arange(len(codes)) // int(state["nested_blocksize"])]
    scales: np.ndarray = whole(parts["nested_quant_map"])[codes] * nested + np.float32(state["nested_offset"])
    return scales
