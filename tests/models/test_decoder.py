"""The decoder against a NumPy forward pass, its causality, its key/value cache and its size in depth."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cotgrpo
from cotgrpo.models.decoder import (
    REMAT_POLICIES,
    DecoderConfig,
    decode,
    head_of,
    init_cache,
    init_params,
    make_student,
)

# Weights of this size make attention sharp and every layer matter.
# At the usual 0.02 a wrong layer would hide in the residual stream.
CONFIG = DecoderConfig(
    vocab_size=61,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    init_scale=0.2,
)
SHAPES = {
    "tied": CONFIG,
    "untied": dataclasses.replace(CONFIG, tied_head=False),
    "one_kv_head": dataclasses.replace(CONFIG, num_kv_heads=1),
    "kv_head_for_each": dataclasses.replace(CONFIG, num_kv_heads=4),
    "wide_heads": dataclasses.replace(CONFIG, num_heads=3, num_kv_heads=3, head_dim=14),
    "one_layer": dataclasses.replace(CONFIG, num_layers=1, rope_theta=500_000.0, norm_eps=1e-2),
}
SLOW_SHAPES = ("one_kv_head", "kv_head_for_each", "one_layer")


@functools.cache
def make_params(config: DecoderConfig) -> Any:
    """Random parameters whose norm scales are not all one, as after training."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> Any:
        if path[-1].key == "scale":
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        to_residual = path[-2].key in ("out", "down") if len(path) > 1 else False
        scale = config.init_scale / (2 * config.num_layers) ** 0.5 if to_residual else config.init_scale
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)

    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape).astype(np.int32)


@functools.cache
def jitted_hidden(config: DecoderConfig) -> Any:
    return jax.jit(make_student(config).hidden)


def forward(config: DecoderConfig, params: Any, tokens: Any, positions: Any = None, segments: Any = None) -> np.ndarray:
    """The decoder's rows `[B, T, D]`; whole documents unless said otherwise."""
    positions = (
        np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape) if positions is None else positions
    )
    segments = np.ones_like(tokens) if segments is None else segments
    return np.asarray(jitted_hidden(config)(params, tokens, positions, segments))


# The oracle: one document, float64, one head and one query at a time.


def oracle_norm(x_TD: np.ndarray, scale_D: np.ndarray, eps: float) -> np.ndarray:
    return x_TD / np.sqrt((x_TD**2).mean(axis=1)[:, None] + eps) * scale_D[None, :]


def oracle_rotate(x_TH: np.ndarray, theta: float) -> np.ndarray:
    """Entries i and i + H/2 as one complex number, turned by `t * theta^(-2i/H)`."""
    T, H = x_TH.shape
    turned = x_TH[:, : H // 2] + 1j * x_TH[:, H // 2 :]
    for t in range(T):
        for i in range(H // 2):
            turned[t, i] *= np.exp(1j * t * theta ** (-2 * i / H))
    return np.concatenate([turned.real, turned.imag], axis=1)


def oracle_attention(query_TH: np.ndarray, key_TH: np.ndarray, value_TH: np.ndarray) -> np.ndarray:
    rows = []
    for t in range(len(query_TH)):
        scores = key_TH[: t + 1] @ query_TH[t] / np.sqrt(query_TH.shape[1])
        weights = np.exp(scores - scores.max())
        rows.append((weights / weights.sum()) @ value_TH[: t + 1])
    return np.stack(rows)


def oracle(config: DecoderConfig, params: Any, tokens_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last norm's rows `[T, D]` and the logits `[T, V]` of one document."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    c, H = config, config.head_dim
    x = params["embedding"][tokens_T]
    for layer in range(c.num_layers):
        weights = jax.tree.map(lambda leaf, at=layer: leaf[at], params["layers"])
        matrix = lambda name, weights=weights: weights[name]["kernel"]
        h = oracle_norm(x, weights["attention_norm"]["scale"], c.norm_eps)
        heads = []
        for n in range(c.num_heads):
            own = slice(n * H, (n + 1) * H)
            group = n // (c.num_heads // c.num_kv_heads)
            shared = slice(group * H, (group + 1) * H)
            query = oracle_rotate((h @ matrix("query"))[:, own], c.rope_theta)
            key = oracle_rotate((h @ matrix("key"))[:, shared], c.rope_theta)
            heads.append(oracle_attention(query, key, (h @ matrix("value"))[:, shared]))
        x = x + np.concatenate(heads, axis=1) @ matrix("out")
        h = oracle_norm(x, weights["mlp_norm"]["scale"], c.norm_eps)
        gate, up = h @ matrix("gate"), h @ matrix("up")
        x = x + (gate / (1 + np.exp(-gate)) * up) @ matrix("down")
    rows = oracle_norm(x, params["final_norm"]["scale"], c.norm_eps)
    return rows, rows @ (params["embedding"].T if c.tied_head else params["head"])


@pytest.mark.parametrize(
    "shape",
    ["tied", "untied", "wide_heads", *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW_SHAPES)],
)
def test_forward_is_the_numpy_oracle(shape: str) -> None:
    config = SHAPES[shape]
    params, tokens = make_params(config), random_tokens(1, 2, 17)
    rows = forward(config, params, tokens)
    logits = rows @ np.asarray(head_of(config, params))
    for b in range(2):
        want_rows, want_logits = oracle(config, params, tokens[b])
        np.testing.assert_allclose(rows[b], want_rows, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(logits[b], want_logits, rtol=1e-5, atol=1e-5)


def test_the_head_is_the_transposed_embedding_when_tied() -> None:
    tied, untied = make_params(CONFIG), make_params(SHAPES["untied"])
    np.testing.assert_array_equal(head_of(CONFIG, tied), tied["embedding"].T)
    np.testing.assert_array_equal(head_of(SHAPES["untied"], untied), untied["head"])
    assert "head" not in tied


# What a token can see.


def packed_row(lengths: tuple[int, ...], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segment ids `[1, width]` of documents one after another, then padding."""
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)
    pad = (0, width - sum(lengths))
    return np.pad(positions, pad)[None].astype(np.int32), np.pad(segments, pad)[None].astype(np.int32)


def test_a_row_depends_on_its_own_document_up_to_itself_and_on_nothing_else() -> None:
    """d output_t / d input_s is exactly zero or clearly not.

    Every slot holds another token id, so row s of the embedding is input s.
    """
    lengths, T = (9, 6, 1), 20
    positions, segments = packed_row(lengths, T)
    params, tokens = make_params(CONFIG), np.arange(T, dtype=np.int32)[None]
    probe = np.random.default_rng(0).normal(size=CONFIG.width).astype(np.float32)

    def probed(embedding: Any) -> Any:
        rows = make_student(CONFIG).hidden(params | {"embedding": embedding}, tokens, positions, segments)
        return rows[0] @ probe

    slopes_TVD = jax.jit(jax.jacrev(probed))(params["embedding"])
    slopes_TS = np.linalg.norm(slopes_TVD, axis=-1)[:, :T]
    index = np.arange(T)
    visible_TS = (segments[0][:, None] == segments[0][None, :]) & (index[:, None] >= index[None, :])
    documents = slice(sum(lengths))
    assert not np.any(slopes_TS[documents][~visible_TS[documents]])
    assert np.min(slopes_TS[documents][visible_TS[documents]]) > 1e-4


def test_packed_documents_are_as_they_are_alone() -> None:
    lengths, params = (9, 6, 1), make_params(CONFIG)
    positions, segments = packed_row(lengths, 16)
    tokens = random_tokens(2, 1, 16)
    packed = forward(CONFIG, params, tokens, positions, segments)[0]
    start = 0
    for n in lengths:
        alone = forward(CONFIG, params, tokens[:, start : start + n])[0]
        np.testing.assert_allclose(packed[start : start + n], alone, rtol=1e-5, atol=1e-5)
        start += n


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_padding_changes_nothing(side: str) -> None:
    tokens, params, n = random_tokens(3, 2, 11), make_params(CONFIG), 11
    want = forward(CONFIG, params, tokens)
    before, after = (5, 0) if side == "left" else (0, 5)
    pad = lambda x, with_: np.pad(x, ((0, 0), (before, after)), constant_values=with_)
    positions = pad(np.broadcast_to(np.arange(n, dtype=np.int32), (2, n)), 0)
    rows = forward(CONFIG, params, pad(tokens, 7), positions, pad(np.ones((2, n), np.int32), 0))
    np.testing.assert_allclose(rows[:, before : before + n], want, rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(rows))


def test_only_differences_of_position_count() -> None:
    """Rotary attention is relative: a document that starts at position 1,000 has the same rows."""
    tokens, params = random_tokens(4, 1, 12), make_params(CONFIG)
    later = np.arange(1_000, 1_012, dtype=np.int32)[None]
    np.testing.assert_allclose(
        forward(CONFIG, params, tokens, later), forward(CONFIG, params, tokens), rtol=1e-3, atol=1e-3
    )


# The key/value cache.


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param((5, 1, 1, 7), id="uneven"),
        pytest.param((1,) * 14, id="one_by_one", marks=pytest.mark.slow),
        pytest.param((14,), id="at_once", marks=pytest.mark.slow),
    ],
)
def test_decoding_with_a_cache_is_the_forward_pass(chunks: tuple[int, ...]) -> None:
    """Rows of 14, 9 and 1 tokens, left-padded, read into a cache with room to spare, whose empty slots hold garbage."""
    lengths, T, params = np.array([14, 9, 1]), 14, make_params(CONFIG)
    tokens = random_tokens(5, 3, T)
    offset = np.arange(T)[None, :] - (T - lengths)[:, None]
    positions, segments = np.maximum(offset, 0).astype(np.int32), (offset >= 0).astype(np.int32)
    cache = init_cache(CONFIG, batch=3, length=T + 6)
    garbage = lambda arrays, by: tuple(x + by for x in arrays)
    cache = cache.replace(keys=garbage(cache.keys, 50.0), values=garbage(cache.values, -50.0))
    step = jax.jit(lambda cache, slot, ids, at, owner: decode(CONFIG, params, ids, at, owner, cache, slot))
    read, slot = [], 0
    for size in chunks:
        part = slice(slot, slot + size)
        rows, cache = step(cache, slot, tokens[:, part], positions[:, part], segments[:, part])
        read.append(np.asarray(rows))
        slot += size
    rows = np.concatenate(read, axis=1)
    for b, n in enumerate(lengths):
        want = forward(CONFIG, params, tokens[b : b + 1, T - n :])[0]
        np.testing.assert_allclose(rows[b, T - n :], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.segment_ids[:, :T], segments)
    np.testing.assert_array_equal(cache.segment_ids[:, T:], -1)


def test_a_cache_is_of_the_compute_type() -> None:
    cache = init_cache(dataclasses.replace(CONFIG, dtype="bfloat16"), batch=2, length=5)
    assert {x.dtype for x in cache.keys + cache.values} == {jnp.dtype("bfloat16")}
    K, H = CONFIG.num_kv_heads, CONFIG.head_dim
    assert [x.shape for x in cache.keys] == [(2, K, H, 5)] * CONFIG.num_layers
    assert [x.shape for x in cache.values] == [(2, K, 5, H)] * CONFIG.num_layers


# Types, recomputation, size.


def test_bfloat16_is_near_float32() -> None:
    params, tokens = make_params(CONFIG), random_tokens(6, 2, 17)
    rows = forward(dataclasses.replace(CONFIG, dtype="bfloat16"), params, tokens)
    want = forward(CONFIG, params, tokens)
    assert rows.dtype == jnp.bfloat16
    error = np.linalg.norm(rows.astype(np.float32) - want) / np.linalg.norm(want)
    assert 1e-4 < error < 3e-2  # bfloat16 has 8 bits: no error at all would mean that nothing was computed in it


def test_parameters_are_of_the_storage_type() -> None:
    for name in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, param_dtype=name)
        params = jax.eval_shape(lambda config=config: init_params(config, jax.random.key(0)))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(name)}


def compiled_gradient(config: DecoderConfig, seq: int) -> Any:
    """The compiled `params -> (loss, gradient)` of the mean NLL of random text."""
    tokens = random_tokens(7, 2, seq + 1)
    positions = jnp.broadcast_to(jnp.arange(seq), (2, seq))
    inputs = (jnp.asarray(tokens[:, :-1]), positions, jnp.ones_like(positions))

    def loss(params: Any) -> Any:
        logits = make_student(config).logits(params, *inputs)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    return jax.jit(jax.value_and_grad(loss)).lower(make_params(config)).compile()


@pytest.mark.parametrize(
    "policies", [("none", "dots", "full"), pytest.param(REMAT_POLICIES, marks=pytest.mark.slow)], ids=["three", "all"]
)
def test_recomputation_changes_no_loss_and_no_gradient_and_saves_memory(policies: tuple[str, ...]) -> None:
    config = dataclasses.replace(CONFIG, num_layers=6)
    runs = {policy: compiled_gradient(dataclasses.replace(config, remat=policy), seq=96) for policy in policies}
    loss, grads = runs["none"](make_params(config))
    for run in runs.values():
        same_loss, same_grads = run(make_params(config))
        np.testing.assert_allclose(same_loss, loss, rtol=1e-6)
        for got, want in zip(jax.tree.leaves(same_grads), jax.tree.leaves(grads), strict=True):
            assert np.max(np.abs(got - want)) <= 3e-6 * np.max(np.abs(want))
    used = {policy: run.memory_analysis().temp_size_in_bytes for policy, run in runs.items()}
    assert used["full"] < used["dots"] < 0.8 * used["none"], used
    products = {policy: run.as_text().count(" dot(") for policy, run in runs.items()}
    assert products["dots"] == products["none"] < products["full"], products


@pytest.mark.parametrize("shape", SHAPES)
def test_num_params_is_the_size_of_the_tree(shape: str) -> None:
    config = SHAPES[shape]
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert config.num_params() == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_layers_are_stacked() -> None:
    layers = init_params(CONFIG, jax.random.key(0))["layers"]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(layers)} == {CONFIG.num_layers}
    first, second = (layers["query"]["kernel"][i] for i in (0, 1))
    assert not np.array_equal(first, second)  # each layer has weights of its own


def test_initial_weights_have_the_scale_asked_for() -> None:
    config = dataclasses.replace(CONFIG, width=64, mlp_width=128, num_layers=8, init_scale=0.02)
    params = init_params(config, jax.random.key(0))
    layers = params["layers"]
    into, back = ("query", "key", "value", "gate", "up"), ("out", "down")
    deviations = {name: float(np.std(layers[name]["kernel"])) for name in into + back}
    for name in into:
        assert deviations[name] == pytest.approx(0.02, rel=0.05)
    for name in back:
        assert deviations[name] == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8 layers)
    assert float(np.std(params["embedding"])) == pytest.approx(0.02, rel=0.05)


def test_a_train_step_is_one_program_at_any_depth() -> None:
    """The lowered text loops over layers: 32 layers make it as long as 4, to one percent."""

    def lowered(layers: int) -> str:
        config = dataclasses.replace(CONFIG, num_layers=layers)
        tx = cotgrpo.make_optimizer(learning_rate=1e-3, total_steps=10)
        make_state = lambda: cotgrpo.TrainState.create(params=init_params(config, jax.random.key(0)), tx=tx, key=0)
        ids: Any = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        weights: Any = jax.ShapeDtypeStruct((2, 16), jnp.float32)
        batch = cotgrpo.SftBatch(ids, ids, ids, ids, weights)
        step = cotgrpo.jit_step(cotgrpo.make_grpo_step(make_student(config), tx))
        return step.lower(jax.eval_shape(make_state), batch).as_text()

    shallow, deep = lowered(4), lowered(32)
    assert abs(len(deep) - len(shallow)) <= 0.01 * len(shallow)
    assert deep.count("dot_general") == shallow.count("dot_general") > 10


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth(tmp_path: pathlib.Path) -> None:
    """32 layers within 1.3 times the time of 4: fresh processes in turn, no compilation cache, the least of four."""
    command = [sys.executable, "-m", "cotgrpo.cli", "bench", "compile", "--layers", "4", "32", "--repeats", "4"]
    subprocess.run([*command, "--json", str(tmp_path / "times.json")], check=True, timeout=900)
    assert json.loads((tmp_path / "times.json").read_text())["last_over_first"] <= 1.3


# What is refused.


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size must be at least 1, got 0"),
        ("width", 0, "width must be at least 1, got 0"),
        ("num_layers", 0, "num_layers must be at least 1, got 0"),
        ("num_heads", 0, "num_heads must be at least 1, got 0"),
        ("num_kv_heads", 0, "num_kv_heads must be at least 1, got 0"),
        ("head_dim", -2, "head_dim must be at least 1, got -2"),
        ("mlp_width", 0, "mlp_width must be at least 1, got 0"),
        ("num_kv_heads", 3, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ("head_dim", 7, "head_dim must be even for rotary positions, got 7"),
        ("remat", "block", "remat must be one of .*'full'.*, got 'block'"),
        ("dtype", "float16", "dtype must be one of .*'bfloat16'.*, got 'float16'"),
        ("param_dtype", "int8", "param_dtype must be one of .*'bfloat16'.*, got 'int8'"),
    ],
)
def test_a_bad_config_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"DecoderConfig.{message}"):
        dataclasses.replace(CONFIG, **{field: value})


def test_the_vocabulary_must_hold_the_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer has 62 tokens but the model's vocabulary holds 61"):
        make_student(CONFIG, vocab_size=62)
    assert make_student(CONFIG, vocab_size=60).vocab_size == 60
    assert make_student(CONFIG, vocab_size=61).vocab_size is make_student(CONFIG).vocab_size is None
