"""The arithmetic of quantized kernels, against NumPy and against qwix if it is installed (`cotgrpo[qlora]`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.models.quantized.kernel import (
    NF4_VALUES,
    SCALE,
    QuantizedKernel,
    nf4_values,
    pack_nf4,
    quantized_kernel,
    quantized_shapes,
)
from cotgrpo.models.quantized.quantize import abstract_base, quantize_base, quantize_kernel

FORMATS = ["int8", "nf4"]
SHAPES = [(64, 48, 16), (128, 7, 64), (6, 5, 2), (192, 33, 64)]
TABLE = np.array(NF4_VALUES, np.float32)
HALF_STEP = {"int8": 0.5 / 127.5, "nf4": float(np.diff(TABLE).max() / 2)}
"""Largest error of a weight, in parts of the largest weight of its block. int8 rounds to 127.5 steps of it."""


def kernel_of(inputs: int, outputs: int) -> np.ndarray:
    """Weights with a block of zeros, and scales that differ by far."""
    rng = np.random.default_rng(inputs + outputs)
    kernel = rng.normal(size=(inputs, outputs)) * 10.0 ** rng.integers(-3, 3, outputs)
    kernel[: inputs // 3, 0] = 0
    return kernel.astype(np.float32)


def numpy_quantized(kernel: np.ndarray, to: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[in, out]` and scales by the definition."""
    inputs, outputs = kernel.shape
    blocks = kernel.reshape(-1, block, outputs)
    largest = np.abs(blocks).max(axis=1)
    scale = np.where(largest == 0, 1, largest / (np.float32(127.5) if to == "int8" else 1)).astype(np.float32)
    parts = blocks / scale[:, None]
    codes = np.abs(parts[..., None] - TABLE).argmin(-1) if to == "nf4" else np.clip(np.round(parts), -127, 127)
    return codes.reshape(inputs, outputs), scale


def numpy_dequantized(codes: np.ndarray, scale: np.ndarray, to: str) -> np.ndarray:
    values = TABLE[codes] if to == "nf4" else codes.astype(np.float32)
    return (values.reshape(len(scale), -1, codes.shape[1]) * scale[:, None]).reshape(codes.shape)


def numpy_kernel(kernel: np.ndarray, to: str, block: int) -> dict[str, Any]:
    codes, scale = numpy_quantized(kernel, to, block)
    stored = pack_nf4(jnp.asarray(codes), block) if to == "nf4" else jnp.asarray(codes, jnp.int8)
    return {f"kernel_{to}": stored, SCALE: jnp.asarray(scale)}


@pytest.mark.parametrize(("inputs", "outputs", "block"), SHAPES)
@pytest.mark.parametrize("to", FORMATS)
def test_dequantized_as_defined(to: str, inputs: int, outputs: int, block: int) -> None:
    kernel = kernel_of(inputs, outputs)
    parts = numpy_kernel(kernel, to, block)
    assert {name: (x.shape, x.dtype) for name, x in parts.items()} == {
        name: (x.shape, x.dtype) for name, x in quantized_shapes((inputs, outputs), to, block).items()
    }
    found = quantized_kernel(parts)
    assert isinstance(found, QuantizedKernel) and found.shape == kernel.shape
    want = numpy_dequantized(*numpy_quantized(kernel, to, block), to)
    np.testing.assert_array_equal(found.dequantize(jnp.float32), want)
    np.testing.assert_array_equal(found.dequantize(jnp.bfloat16), jnp.asarray(want).astype(jnp.bfloat16))
    stacked = QuantizedKernel(found.codes[None], found.scale[None])
    assert stacked.shape == (1, *kernel.shape)
    np.testing.assert_array_equal(stacked.dequantize(jnp.float32)[0], want)


def test_all_values_of_nf4() -> None:
    np.testing.assert_array_equal(nf4_values(jnp.arange(16, dtype=jnp.uint8)), TABLE)
    assert TABLE[0] == -1 and TABLE[7] == 0 and TABLE[15] == 1 and (np.diff(TABLE) > 0).all()


@pytest.mark.parametrize(("inputs", "outputs", "block"), SHAPES)
@pytest.mark.parametrize("to", FORMATS)
def test_quantized_as_defined_and_as_by_qwix(to: Any, inputs: int, outputs: int, block: int) -> None:
    qwix = pytest.importorskip("qwix")
    kernel = kernel_of(inputs, outputs)
    ours = quantize_kernel(jnp.asarray(kernel), to, block)
    want = numpy_kernel(kernel, to, block)
    np.testing.assert_array_equal(ours[f"kernel_{to}"], want[f"kernel_{to}"])
    np.testing.assert_allclose(ours[SCALE], want[SCALE], rtol=1e-6)  # XLA multiplies by 1 / 127.5
    whole = {"channelwise_axes": (1,), "tiled_axes": {0: block}}
    theirs = qwix.quantize(jnp.asarray(kernel), "nf4" if to == "nf4" else jnp.int8, **whole)
    if to == "int8":
        theirs = dataclasses.replace(theirs, qvalue=jnp.maximum(theirs.qvalue, -127))
    found = quantized_kernel(ours)
    assert found is not None
    np.testing.assert_array_equal(found.dequantize(jnp.float32), qwix.dequantize(theirs))


@pytest.mark.parametrize("to", FORMATS)
def test_no_weight_is_further_off_than_half_a_step(to: str) -> None:
    kernel = kernel_of(512, 64)
    error = np.abs(numpy_dequantized(*numpy_quantized(kernel, to, 64), to) - kernel).reshape(-1, 64, 64)
    largest = np.abs(kernel).reshape(-1, 64, 64).max(axis=1, keepdims=True)
    share = (error / np.where(largest == 0, 1, largest)).max()
    assert 0.9 * HALF_STEP[to] < share <= HALF_STEP[to] * (1 + 1e-4)


@pytest.mark.parametrize("to", FORMATS)
def test_only_projections_of_a_tree_are_quantized(to: Any) -> None:
    pytest.importorskip("qwix")
    stack = np.stack([kernel_of(64, 8), 2 * kernel_of(64, 8)])
    tree = {
        "embedding": jnp.ones((9, 64), jnp.bfloat16),
        "layers": {
            "query": {"kernel": jnp.asarray(stack), "bias": jnp.ones((2, 8))},
            "norm": {"scale": jnp.ones((2, 64))},
        },
    }
    base = quantize_base(tree, to, 16)
    assert set(base["layers"]["query"]) == {f"kernel_{to}", SCALE, "bias"}
    assert base["embedding"] is tree["embedding"] and base["layers"]["norm"]["scale"] is tree["layers"]["norm"]["scale"]
    of = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert of(base) == of(abstract_base(tree, to, 16))
    for layer in range(2):
        one = numpy_kernel(stack[layer], to, 16)
        for name, part in one.items():
            np.testing.assert_allclose(base["layers"]["query"][name][layer], part, rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "block", "expected"),
    [
        (96, 64, "layers/up/kernel: a block of 64 inputs does not divide a kernel with 96 of them: .* such as 32"),
        (97, 64, "97 of them: .* it is odd"),
        (32, 64, "such as 32"),
    ],
)
def test_blocks_that_do_not_fit(inputs: int, block: int, expected: str) -> None:
    tree = {"layers": {"up": {"kernel": jax.ShapeDtypeStruct((2, inputs, 8), jnp.float32)}}}
    with pytest.raises(ValueError, match=expected):
        abstract_base(tree, "nf4", block)
