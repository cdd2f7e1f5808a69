"""The gated delta rule and its convolution: a recurrence in NumPy, transformers, packing, states and padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.models.layers.causal_conv import ConvWindow, causal_conv
from cotgrpo.models.layers.delta_net import (
    DeltaState,
    DeltaTokens,
    chunked_delta_rule,
    delta_rule_steps,
    one_chunk,
    unit_lower_inverse,
)
from cotgrpo.models.layers.options import DELTA_CHUNK, DeltaNet

K, R, A, E = 2, 3, 8, 5
LENGTHS = (7, 60, 1, 50, 19)
"""Of the documents of a packed row: shorter than a chunk, longer, and one token."""


def random_tokens(T: int, decay: float = 1.0, batch: int = 2, seed: int = 0) -> DeltaTokens:
    rng = np.random.default_rng(seed)
    key = rng.normal(size=(batch, T, K, A))
    return DeltaTokens(
        *(
            jnp.asarray(x, jnp.float32)
            for x in (
                rng.normal(size=(batch, T, K, A)),
                key / np.linalg.norm(key, axis=-1, keepdims=True),
                rng.normal(size=(batch, T, K, R, E)),
                -decay * rng.exponential(size=(batch, T, K, R)),
                rng.uniform(size=(batch, T, K, R)),
            )
        )
    )


def packed_segments(padding: int = 0) -> np.ndarray:
    """The same documents in two rows, in opposite order, with padding at both ends."""
    rows = [np.repeat(np.arange(len(LENGTHS)) + 1, lengths) for lengths in (LENGTHS, LENGTHS[::-1])]
    return np.pad(np.stack(rows), ((0, 0), (padding, padding))).astype(np.int32)


def recurrence(tokens: DeltaTokens, segment_ids: np.ndarray, first: Any = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The rule as it is written, in float64: the outputs, 0 at padding, and the last states."""
    query, key, value, log_decay, strength = (np.asarray(x, np.float64) for x in tokens)
    out, states = np.zeros(value.shape), np.zeros((len(key), K, R, A, E)) + first
    for b in range(len(key)):
        last = 0
        for t in np.flatnonzero(segment_ids[b]):
            state = states[b] * (segment_ids[b, t] == last or last == 0)
            last = segment_ids[b, t]
            state = state * np.exp(log_decay[b, t])[..., None, None]
            error = strength[b, t][..., None] * (value[b, t] - np.einsum("krae,ka->kre", state, key[b, t]))
            states[b] = state + np.einsum("ka,kre->krae", key[b, t], error)
            out[b, t] = np.einsum("krae,ka->kre", states[b], query[b, t])
    return out, states


@pytest.mark.parametrize(("decay", "chunk"), [(1.0, None), (1e-3, 64), (1.0, 5), (40.0, 500), (1e5, 64), (1.0, 1)])
def test_the_rule_is_the_recurrence(decay: float, chunk: int | None) -> None:
    segment_ids = packed_segments(padding=3)
    tokens = random_tokens(segment_ids.shape[1], decay)
    compute = delta_rule_steps if chunk is None else lambda *args: chunked_delta_rule(*args, chunk=chunk)
    out, state = jax.jit(compute)(tokens, segment_ids)
    want, last = recurrence(tokens, segment_ids)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(np.asarray(out)[segment_ids > 0], want[segment_ids > 0], atol=2e-5)
    np.testing.assert_allclose(state.memory, last, atol=2e-5)
    np.testing.assert_array_equal(state.segment_ids, [len(LENGTHS)] * 2)


@pytest.mark.parametrize("kind", ["one key", "two keys", "forgets all between small decays", "no decay"])
def test_keys_and_gates_that_lose_digits(kind: str) -> None:
    """A power series of the triangular system, or differences of running sums of the gates, would fail here."""
    T = 200
    tokens = random_tokens(T)
    key, log_decay = np.zeros((2, T, K, A), np.float32), np.zeros((2, T, K, R), np.float32)
    key[..., 0] = 1
    if kind == "two keys":
        key[:, ::2, :, :2] = [0.6, 0.8]
    if kind == "forgets all between small decays":
        key, log_decay = np.asarray(tokens.key), np.full_like(log_decay, -1e-3)
        log_decay[:, ::9] = -1e6
    strength = np.ones_like(log_decay) if kind != "no decay" else np.full_like(log_decay, 0.999)
    tokens = tokens._replace(key=jnp.asarray(key), log_decay=jnp.asarray(log_decay), strength=jnp.asarray(strength))
    ones = np.ones((2, T), np.int32)
    want, _ = recurrence(tokens, ones)
    out, _ = jax.jit(chunked_delta_rule)(tokens, ones)
    np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(("decay", "chunk"), [(0.02, 7), (3.0, 64), (1e5, 64)])
def test_gradients_are_those_of_the_steps(decay: float, chunk: int) -> None:
    segment_ids = packed_segments(padding=2)
    tokens = random_tokens(segment_ids.shape[1], decay)
    weights = np.random.default_rng(1).normal(size=tokens.value.shape) * (segment_ids > 0)[:, :, None, None, None]
    first = np.random.default_rng(2).normal(size=(2, K, R, A, E)).astype(np.float32)

    def loss(compute: Callable[..., Any]) -> Callable[..., jax.Array]:
        def of(tokens: DeltaTokens, memory: jax.Array) -> jax.Array:
            out, state = compute(tokens, segment_ids, DeltaState(memory, jnp.ones(2, jnp.int32)))
            return jnp.sum(out * weights) + jnp.sum(state.memory * first)

        return jax.jit(jax.grad(of, argnums=(0, 1)))

    want = loss(delta_rule_steps)(tokens, first)
    got = loss(lambda *args: chunked_delta_rule(*args, chunk=chunk))(tokens, first)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5 * max(1, np.abs(w).max()))


def test_packed_documents_are_those_documents_alone() -> None:
    """Forward and gradients. A document starts inside a chunk, and one chunk holds several."""
    segment_ids = packed_segments()[:1]
    tokens = random_tokens(segment_ids.shape[1], 0.1, batch=1)
    starts = np.cumsum((0, *LENGTHS))

    def packed(tokens: DeltaTokens) -> jax.Array:
        return chunked_delta_rule(tokens, segment_ids, chunk=16)[0]

    def alone(tokens: DeltaTokens) -> jax.Array:
        parts = [
            chunked_delta_rule(DeltaTokens(*(x[:, a:b] for x in tokens)), jnp.ones((1, b - a), jnp.int32), chunk=16)[0]
            for a, b in itertools.pairwise(starts)
        ]
        return jnp.concatenate(parts, axis=1)

    np.testing.assert_allclose(jax.jit(packed)(tokens), jax.jit(alone)(tokens), atol=1e-5)
    weights = np.random.default_rng(3).normal(size=tokens.value.shape)
    got, want = (jax.jit(jax.grad(lambda t, f=f: jnp.sum(f(t) * weights)))(tokens) for f in (packed, alone))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * max(1, np.abs(w).max()))


@pytest.mark.parametrize("compute", [delta_rule_steps, chunked_delta_rule])
def test_a_state_goes_on_where_the_tokens_before_ended(compute: Callable[..., Any]) -> None:
    """In the same document, or with another one, and after calls that hold padding alone."""
    segment_ids = packed_segments()
    tokens, compute = random_tokens(segment_ids.shape[1], 0.1), jax.jit(compute)
    want, _ = compute(tokens, segment_ids)
    state, found = None, []
    for start, stop in ((0, 3), (3, 4), (4, 70), (70, 71), (71, segment_ids.shape[1])):
        part = DeltaTokens(*(x[:, start:stop] for x in tokens))
        out, state = compute(part, segment_ids[:, start:stop], state)
        found.append(out)
        _, after = compute(part, np.zeros((2, stop - start), np.int32), state)
        np.testing.assert_array_equal(after.memory, state.memory)
        np.testing.assert_array_equal(after.segment_ids, state.segment_ids)
    np.testing.assert_allclose(np.concatenate(found, axis=1), want, atol=1e-5)


@pytest.mark.parametrize("compute", [delta_rule_steps, chunked_delta_rule])
def test_padding_before_a_prompt_changes_nothing(compute: Callable[..., Any]) -> None:
    tokens = random_tokens(40, 0.1)
    want, state = compute(tokens, np.ones((2, 40), np.int32))
    noise = random_tokens(27, 5.0, seed=9)
    padded = DeltaTokens(*(jnp.concatenate([x, y, x], axis=1) for x, y in zip(noise, tokens, strict=True)))
    segment_ids = np.pad(np.ones((2, 40), np.int32), ((0, 0), (27, 27)))
    got, after = compute(padded, segment_ids)
    np.testing.assert_allclose(got[:, 27:67], want, atol=1e-5)
    np.testing.assert_allclose(after.memory, state.memory, atol=1e-5)


def test_bfloat16_tokens_are_summed_in_float32() -> None:
    tokens = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tokens(300, 0.01))
    ones = np.ones((2, 300), np.int32)
    out, state = jax.jit(chunked_delta_rule)(tokens, ones)
    assert out.dtype == state.memory.dtype == jnp.float32
    np.testing.assert_allclose(out, recurrence(tokens, ones)[0], atol=2e-5)


def test_the_backward_pass_keeps_no_state_per_token() -> None:
    """States of all tokens would take 2 x 1024 x 4 kB = 8 MB. One per chunk takes a 64th part."""
    T, heads, width = 1024, 2, 32
    shape = lambda *own: jax.ShapeDtypeStruct((1, T, heads, *own), jnp.float32)
    tokens = DeltaTokens(shape(width), shape(width), shape(1, width), shape(1), shape(1))
    loss = lambda tokens: jnp.sum(chunked_delta_rule(tokens, jnp.ones((1, T), jnp.int32))[0] ** 2)
    analysis = jax.jit(jax.grad(loss)).lower(tokens).compile().memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < T * heads * width * width * 4 / 2


def test_the_flops_of_a_token_are_those_of_the_products() -> None:
    """What plans count, against every product of a chunk."""
    net = DeltaNet(num_key_heads=2, num_value_heads=6, key_dim=8, value_dim=5)
    tokens = random_tokens(DELTA_CHUNK, batch=1)
    segments = jnp.ones((1, DELTA_CHUNK), jnp.int32), jnp.ones(1, jnp.int32)
    program = jax.make_jaxpr(one_chunk)(DeltaState.before(tokens).memory, (tokens, *segments))
    flops = sum(flops_of(equation) for equation in equations(program.jaxpr))
    assert net.chunked_flops == flops / DELTA_CHUNK
    assert net.rule_flops == 6 * 6 * 8 * 5 < net.chunked_flops


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, those of the functions that it calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            yield from equations(inner) if hasattr(inner, "eqns") else ()


def flops_of(equation: Any) -> int:
    if equation.primitive.name != "dot_general":
        return 0
    left, out = (x.aval.shape for x in (equation.invars[0], equation.outvars[0]))
    return 2 * math.prod(out) * math.prod(left[i] for i in equation.params["dimension_numbers"][0][0])


@pytest.mark.parametrize("size", [1, 2, 3, 16, 37, 64])
def test_unit_lower_inverse(size: int) -> None:
    lower = np.tril(np.random.default_rng(0).normal(size=(3, size, size)), -1).astype(np.float32) / size**0.5
    want = np.linalg.inv(np.eye(size) + lower.astype(np.float64))
    np.testing.assert_allclose(unit_lower_inverse(lower), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_the_convolution_sees_its_own_document(taps: int) -> None:
    """Against `numpy.convolve` of each document, in one call and in parts, with padding at both ends."""
    rng = np.random.default_rng(0)
    segment_ids = packed_segments(padding=2)
    x = rng.normal(size=(*segment_ids.shape, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 1, taps)).astype(np.float32)
    want = np.zeros_like(x)
    for b, channel, segment in np.ndindex(2, 3, len(LENGTHS)):
        own = segment_ids[b] == segment + 1
        want[b, own, channel] = np.convolve(x[b, own, channel], kernel[channel, 0, ::-1])[: own.sum()]
    convolve = jax.jit(causal_conv)
    whole, none = convolve(x, kernel, segment_ids)
    assert none is None
    np.testing.assert_allclose(whole, want, atol=1e-5)
    window, found = ConvWindow.empty(2, taps, 3, jnp.float32), []
    for start, stop in ((0, 1), (1, 3), (3, 4), (4, 80), (80, 138), (138, segment_ids.shape[1])):
        y, window = convolve(x[:, start:stop], kernel, segment_ids[:, start:stop], window)
        found.append(y)
    np.testing.assert_allclose(np.concatenate(found, axis=1), want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_the_rule_of_transformers(name: str) -> None:
    """Outputs, the state and gradients."""
    torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
    reference = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    T = 150
    tokens, weights = random_tokens(T, 0.3), np.random.default_rng(1).normal(size=(2, T, K * R, E)).astype(np.float32)
    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in tokens]
    query, key, value, log_decay, strength = leaves
    by_head = (value.flatten(2, 3), log_decay.flatten(2, 3), strength.flatten(2, 3))
    want, want_state = getattr(reference, name)(query * A**0.5, key, *by_head, output_final_state=True)
    (want * torch.tensor(weights)).sum().backward()

    def loss(tokens: DeltaTokens) -> tuple[jax.Array, Any]:
        out, state = chunked_delta_rule(tokens, jnp.ones((2, T), jnp.int32))
        return jnp.sum(out.reshape(weights.shape) * weights), (out, state.memory)

    got, (out, memory) = jax.jit(jax.grad(loss, has_aux=True))(tokens)
    np.testing.assert_allclose(out.reshape(weights.shape), want.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(memory.reshape(2, K * R, A, E), want_state.detach().numpy(), atol=2e-5)
    for leaf, g in zip(leaves, got, strict=True):
        np.testing.assert_allclose(g, leaf.grad.numpy(), atol=2e-5 * max(1, float(leaf.grad.abs().max())))
