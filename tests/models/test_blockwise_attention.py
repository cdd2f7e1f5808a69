"""Attention in blocks against the attention that holds all scores, and the layers' own gradients against autodiff."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.models.attention import attention, causal_segment_mask
from cotgrpo.models.blockwise_attention import BlockSchedule, block_attention
from cotgrpo.models.matmul import project_tokens
from cotgrpo.models.norm_and_gate import ACTIVATIONS, gated, rms_norm
from cotgrpo.xla_cpu import FEW_ROWS, outer_product_sum, project_few_tokens, vocab_sum

CASES: dict[str, dict[str, Any]] = {
    "one_block": {"T": 40},
    "uneven": {"T": 130},
    "grouped": {"T": 200, "Q": 6, "K": 2},
    "window": {"T": 200, "window": 30},
    "softcap": {"T": 130, "softcap": 3.0, "scale": 0.7},
    "loops": {"B": 4, "T": 1_100, "Q": 8, "K": 4, "H": 8, "window": 700},
}


def inputs(B: int = 2, T: int = 64, Q: int = 4, K: int = 4, H: int = 16, dtype: str = "float32") -> Any:
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (Q, K, K))
    # Two documents, then padding; the second row is one document.
    segment_ids = np.ones((B, T), np.int32)
    segment_ids[0, T // 3 :] = 2
    segment_ids[0, T - T // 5 :] = 0
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    positions[0, T // 3 :] -= T // 3
    positions[0, T - T // 5 :] = 0
    return (query, key, value), jnp.asarray(positions), jnp.asarray(segment_ids)


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_the_whole(case: str) -> None:
    shape = dict(CASES[case])
    window, softcap, scale = (shape.pop(name, None) for name in ("window", "softcap", "scale"))
    arrays, positions, segment_ids = inputs(**shape)
    real_BT11 = (segment_ids != 0)[:, :, None, None]
    mask = causal_segment_mask(positions, segment_ids, positions, segment_ids, window)
    tangent = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)

    def vocab_sum(attend: Any) -> Any:
        return lambda *qkv: (jnp.sum(jnp.where(real_BT11, attend(*qkv), 0) * tangent), attend(*qkv))

    whole = vocab_sum(lambda q, k, v: attention(q, k, v, mask, scale, softcap))
    blocks = vocab_sum(lambda q, k, v: block_attention(q, k, v, positions, segment_ids, window, scale, softcap))
    (_, want), want_grads = jax.jit(jax.value_and_grad(whole, (0, 1, 2), has_aux=True))(*arrays)
    (_, got), got_grads = jax.jit(jax.value_and_grad(blocks, (0, 1, 2), has_aux=True))(*arrays)
    np.testing.assert_allclose(jnp.where(real_BT11, got, 0), jnp.where(real_BT11, want, 0), atol=2e-6)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(got_grad, want_grad, atol=2e-5)


def test_bfloat16_blocks_are_near_float32() -> None:
    arrays, positions, segment_ids = inputs(T=130, dtype="bfloat16")
    got = jax.jit(block_attention)(*arrays, positions, segment_ids)
    assert got.dtype == jnp.bfloat16
    mask = causal_segment_mask(positions, segment_ids, positions, segment_ids)
    want = jax.jit(attention)(*(x.astype(jnp.float32) for x in arrays), mask)
    real = (segment_ids != 0)[:, :, None, None]
    np.testing.assert_allclose(jnp.where(real, got, 0), jnp.where(real, want, 0), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("case", CASES)
def test_a_cut_covers_the_sequence_and_skips(case: str) -> None:
    shape = {"B": 2, "Q": 4} | CASES[case]
    cut = BlockSchedule.of(shape["B"], shape["T"], shape["Q"], None)
    ends = [bucket.end for bucket in cut.buckets]
    assert [bucket.start for bucket in cut.buckets] == [0, *ends[:-1]]
    assert ends[-1] == cut.length >= shape["T"]
    assert len(cut.buckets) <= 8
    assert any(bucket.blocks > 1 for bucket in cut.buckets) == (case == "loops")


def autodiff_norm(x: Any, scale_D: Any, eps: float) -> Any:
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale_D[None, None]


def test_gradients_of_norm_and_gate_are_those_of_autodiff() -> None:
    rng = np.random.default_rng(0)
    x, y, tangent = (jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32) for _ in range(3))
    scale_D = jnp.asarray(rng.normal(size=8), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(function: Any, *arguments: Any) -> Any:
        value, pull_back = jax.vjp(function, *arguments)
        return value, *pull_back(tangent)

    got = value_and_gradients(lambda x, s: rms_norm(x, s, 1e-5), x, scale_D)
    want = value_and_gradients(lambda x, s: autodiff_norm(x, s, 1e-5), x, scale_D)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    for name, activation in ACTIVATIONS.items():
        got = value_and_gradients(functools.partial(gated, name), x, y)
        want = value_and_gradients(lambda x, y, activation=activation: activation(x) * y, x, y)
        for mine, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_projection_is_that_of_autodiff(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, kernel, tangent = (jnp.asarray(rng.normal(size=s), dtype) for s in ((2, 5, 8), (8, 3), (2, 5, 3)))
    dimensions = (((2,), (0,)), ((), ()))
    got, got_grad = jax.vjp(lambda x, w: project_tokens(x, w, dimensions), x, kernel)
    want, want_grad = jax.vjp(lambda x, w: jax.lax.dot_general(x, w, dimensions), x, kernel)
    tolerance = 1e-5 if dtype == "float32" else 0.1
    for mine, theirs in zip((got, *got_grad(tangent)), (want, *want_grad(tangent)), strict=True):
        assert mine.dtype == theirs.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs.astype(jnp.float32), atol=tolerance)


@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, "float32"), (6, "bfloat16"), (FEW_ROWS, "float32"), (FEW_ROWS + 2, "bfloat16")]
)
def test_a_product_with_a_transposed_kernel(rows: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x_BTD, kernel_FD = (
        jnp.asarray(rng.normal(size=s), dtype) for s in ((rows // 2 or 1, 2 if rows > 1 else 1, 8), (5, 8))
    )
    got = jax.jit(project_few_tokens)(x_BTD, kernel_FD)
    assert got.shape == (*x_BTD.shape[:2], 5) and got.dtype == jnp.dtype(dtype)
    want = x_BTD.astype(jnp.float32) @ kernel_FD.astype(jnp.float32).T
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=1e-5 if dtype == "float32" else 0.1)
    summed = jax.jit(lambda x, kernel: project_few_tokens(x, kernel, jnp.float32))(x_BTD, kernel_FD)
    assert summed.dtype == jnp.float32
    np.testing.assert_allclose(summed, want, atol=1e-5)


def test_few_rows_are_the_columns_of_the_compiled_product() -> None:
    """XLA would fold the transpositions, and make the product that copies the kernel."""

    def products(rows: int) -> list[str]:
        text = (
            jax.jit(lambda x, w: jax.nn.silu(project_few_tokens(x, w)))
            .lower(jnp.ones((rows, 32)), jnp.ones((48, 32)))
            .compile()
            .as_text()
        )
        return re.findall(r"= f32\[([0-9,]+)\]\S* dot\(", text)

    assert products(8) == ["48,8"] and products(FEW_ROWS + 1) == [f"{FEW_ROWS + 1},48"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_summed_over_rows(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x_ND, y_NF = (jnp.asarray(rng.normal(size=s), dtype) for s in ((6, 8), (6, 50)))
    program = jax.jit(lambda x, y: outer_product_sum(x, y, jnp.float32)).lower(x_ND, y_NF).compile()
    got = program(x_ND, y_NF)
    assert got.dtype == jnp.float32
    want = np.einsum("nd,nf->df", *(np.asarray(x, np.float64) for x in (x_ND, y_NF)))
    np.testing.assert_allclose(got, want, atol=1e-5)
    # The transposition is not taken into the product again.
    assert re.findall(r" dot\(.*lhs_contracting_dims=\{(\d)\}", program.as_text()) == ["1"]


def fused_with_sums(text: str) -> list[str]:
    """The exponentials and products of a compiled program that are in one computation with a sum's `reduce`."""
    bodies = [body for body in re.split(r"\n}\n", text) if re.search(r" reduce\(.*dimensions=\{1\}", body)]
    return [name for body in bodies if "ENTRY" not in body for name in re.findall(r" (exponential|multiply)\(", body)]


@pytest.mark.parametrize("row", [[1.0, -2.0, 3e38, 0.5], [1.0, np.inf, -3.0, 0.5], [np.nan, 1.0, 2.0, 0.5]])
def test_a_total_is_the_sum(row: list[float]) -> None:
    x_V = jnp.array(row)
    np.testing.assert_array_equal(jax.jit(vocab_sum)(x_V), jnp.sum(x_V))
    np.testing.assert_array_equal(jax.grad(vocab_sum)(jnp.arange(4.0)), jnp.ones(4))


def test_what_is_summed_is_written_first_on_a_cpu() -> None:
    square = lambda sum_of: jax.jit(jax.vmap(lambda x_V: sum_of(jnp.exp(x_V) * x_V)))
    x_NV = jax.random.normal(jax.random.key(0), (64, 4096))
    compiled = lambda function: function.lower(x_NV).compile().as_text()
    assert fused_with_sums(compiled(square(jnp.sum)))
    assert not fused_with_sums(compiled(square(vocab_sum)))
    np.testing.assert_allclose(square(vocab_sum)(x_NV), square(jnp.sum)(x_NV), rtol=1e-4)


@pytest.mark.parametrize(("platform", "barriers"), [("tpu", 0), ("cuda", 0), ("cpu", 1)])
def test_a_program_for_another_platform_has_no_barrier(platform: str, barriers: int) -> None:
    program = jax.jit(lambda x: outer_product_sum(x, x)).trace(jnp.ones((4, 8))).lower(lowering_platforms=(platform,))
    assert program.as_text().count("optimization_barrier") == barriers
