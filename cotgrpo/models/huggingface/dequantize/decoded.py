"""A tensor whose values are computed when it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from cotgrpo.models.huggingface.safetensors_files import StoredTensor

Bounds = tuple[slice, ...]
"""One slice for each axis, with `start` and `stop` and steps of 1."""


@dataclasses.dataclass(frozen=True)
class DecodedTensor(StoredTensor):
    """A tensor that is dequantized slice by slice. Only the stored bytes of a slice are read.

    Attributes:
        decode: `decode(bounds)` returns a slice in float32.
    """

    decode: Callable[[Bounds], np.ndarray]

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return a slice of the tensor, or all of it, in float32."""
        index = index or (slice(None),) * len(self.shape)
        bounds = [slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)]
        return self.decode(tuple(bounds))


def whole(tensor: StoredTensor) -> np.ndarray:
    """Return all of a small tensor in float32. An exponent of type `E8M0` in bytes is not a number yet."""
    return tensor.read().astype(np.float32)


def steps(bounds: slice, size: int) -> slice:
    """Return the groups of `size` elements that hold those of `bounds`."""
    return slice(bounds.start // size, -(-bounds.stop // size))


def inside(bounds: slice, size: int) -> slice:
    """Return where the elements of `bounds` are in the groups of `steps(bounds, size)`."""
    first = bounds.start // size * size
    return slice(bounds.start - first, bounds.stop - first)
