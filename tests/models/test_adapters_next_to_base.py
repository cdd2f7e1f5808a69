"""Adapters next to a frozen base, wherever a student computes: rollouts, accuracy and losses as in training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cotgrpo
from cotgrpo import TrainState, make_mesh, make_sft_step
from cotgrpo.ghosts.live import map_contexts, with_replies
from cotgrpo.models import load_pretrained, save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.models.lora import (
    AdaptedParams,
    LoraConfig,
    init_lora,
    lora_student,
    make_lora_step,
    merge,
    share_kept,
    with_adapters,
)
from cotgrpo.objectives import softmax
from cotgrpo.sampling import SamplingSettings, make_sampler, pad_prompts
from cotgrpo.sharding import jit_eval

CONFIG = DecoderConfig(
    vocab_size=64,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    biases=("query", "key", "value"),
    init_scale=0.3,
)
LORA = LoraConfig(rank=4, alpha=6.0, dropout=0.2)
N = 10
rng = np.random.default_rng(0)
PROMPTS = pad_prompts([rng.integers(1, 64, n).astype(np.int32) for n in (3, 5, 2, 7, 4, 6, 3, 5)], length=8)


def adapted(size: float, **stored: str) -> tuple[DecoderConfig, AdaptedParams]:
    """A student with an update of `|dW| / |W| = size` in every projection."""
    config = dataclasses.replace(CONFIG, **stored)
    params = init_params(config, jax.random.key(0))
    adapters = init_lora(params, LORA, jax.random.key(1))
    for name, pair in adapters["layers"].items():
        pair["lora_b"] = jax.random.normal(jax.random.key(2), pair["lora_b"].shape)
        update = LORA.scale * np.einsum("lir,lro->lio", pair["lora_a"], pair["lora_b"])
        w = np.asarray(params["layers"][name]["kernel"], np.float32)
        pair["lora_b"] = pair["lora_b"] * (size * np.linalg.norm(w) / np.linalg.norm(update))
    return config, AdaptedParams(params, adapters, LORA)


def reply_log_probs(student: Any, params: Any, batch: Any) -> np.ndarray:
    """Log-probabilities of the tokens of each reply `[B, N]`, from one forward pass."""
    log_prob = lambda logits_V, token: softmax(logits_V).log_prob(token)
    found = jax.jit(lambda p, b: map_contexts(student, p, b, log_prob, jnp.roll(b.tokens, -1, axis=1)))(params, batch)
    return np.asarray(found)[:, -N - 1 : -1]


def trained_log_probs(config: DecoderConfig, params: AdaptedParams, batch: Any) -> np.ndarray:
    """The same by the student that a train step with LoRA sees."""
    log_prob = lambda logits_V, token: softmax(logits_V).log_prob(token)

    def trainer(adapters: Any, base: Any, b: Any) -> Any:
        return map_contexts(
            lora_student(make_student(config), base, LORA), adapters, b, log_prob, jnp.roll(b.tokens, -1, axis=1)
        )

    return np.asarray(jax.jit(trainer)(params.adapters, params.base, batch))[:, -N - 1 : -1]


@pytest.mark.parametrize("sizes", [None, pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    ("stored", "size"),
    [
        ("bfloat16", 1e-4),
        pytest.param("bfloat16", 1e-1, marks=pytest.mark.slow),
        pytest.param("float32", 1e-4, marks=pytest.mark.slow),
        pytest.param("float32", 1e-1, marks=pytest.mark.slow),
    ],
)
def test_replies_come_from_the_student_that_is_trained(stored: str, size: float, sizes: dict[str, int] | None) -> None:
    """The sampler's own log-probabilities, with its cache and its queue, are those of the train step's student."""
    config, params = adapted(size, param_dtype=stored, dtype="float32")
    mesh = None if sizes is None else make_mesh(**sizes)
    sample = jit_eval(make_sampler(config, SamplingSettings(N, temperature=1.0), None, 4), mesh)
    replies = sample(params, PROMPTS, jax.random.key(5))
    batch = with_replies(PROMPTS, replies)
    got, want = np.asarray(replies.log_probs), trained_log_probs(config, params, batch)
    np.testing.assert_allclose(got, want, atol=3e-5)
    np.testing.assert_allclose(reply_log_probs(with_adapters(make_student(config)), params, batch), want, atol=1e-6)
    update = np.abs(reply_log_probs(make_student(config), params.base, batch) - want).max()
    assert update > 100 * np.abs(got - want).max(), "the base alone is another student"
    if stored == "bfloat16":
        merged = reply_log_probs(make_student(config), merge(params.base, params.adapters, LORA), batch)
        assert np.abs(merged - want).max() > 10 * np.abs(got - want).max(), "and so is a merge in bfloat16"


def test_bfloat16_products_differ_by_their_rounding_alone() -> None:
    """With bfloat16 products, sampler and trainer are as far apart as they are without adapters."""
    config, params = adapted(1e-1, param_dtype="bfloat16", dtype="bfloat16")
    sample = jax.jit(make_sampler(config, SamplingSettings(N, temperature=1.0)))
    replies, plain = (sample(p, PROMPTS, jax.random.key(5)) for p in (params, params.base))
    batch, plain_batch = with_replies(PROMPTS, replies), with_replies(PROMPTS, plain)
    error = np.asarray(replies.log_probs) - trained_log_probs(config, params, batch)
    plain_error = np.asarray(plain.log_probs) - reply_log_probs(make_student(config), params.base, plain_batch)
    update = reply_log_probs(make_student(config), params.base, batch) - trained_log_probs(config, params, batch)
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    assert rms(error) < 2 * rms(plain_error) < 0.1 * rms(update)


def test_measured_losses_are_the_train_steps(tmp_path: Path) -> None:
    """The eval step on adapted parameters, and a train step with LoRA, return one loss; so do a copy and its merge."""
    config, params = adapted(1e-3, param_dtype="bfloat16", dtype="float32")
    replies = jax.jit(make_sampler(config, SamplingSettings(N, temperature=1.0)))(params, PROMPTS, jax.random.key(1))
    batch, student = with_replies(PROMPTS, replies), with_adapters(make_student(config))
    evaluate = jax.jit(cotgrpo.make_eval_step(student))
    got = evaluate(params, batch)["loss"].mean()
    tx, lora = optax.sgd(0.0), dataclasses.replace(LORA, dropout=0.0)
    step = jax.jit(make_lora_step(lambda s: make_sft_step(s, tx), student, lora))
    state = TrainState.create(params=params.adapters, tx=tx, key=0)
    assert got == pytest.approx(step(state, batch, params.base)[1]["loss"].mean(), abs=1e-6)
    assert abs(got - evaluate(params.base, batch)["loss"].mean()) > 1e-4
    # An export is merged in float32 and rounded once, to the type it is stored in.
    exported = {}
    for dtype in ("float32", "bfloat16"):
        save_pretrained(tmp_path / dtype, config, params, dtype=dtype)
        exported[dtype] = load_pretrained(tmp_path / dtype, "float32")
    wide = merge(jax.tree.map(lambda x: x.astype(jnp.float32), params.base), params.adapters, LORA)
    for (path, w), full, half in zip(
        jax.tree_util.tree_leaves_with_path(wide),
        jax.tree.leaves(exported["float32"].params),
        jax.tree.leaves(exported["bfloat16"].params),
        strict=True,
    ):
        np.testing.assert_allclose(full, w, atol=1e-6, err_msg=jax.tree_util.keystr(path))
        np.testing.assert_array_equal(half, full.astype(jnp.bfloat16).astype(jnp.float32))
    assert evaluate(exported["float32"].params, batch)["loss"].mean() == pytest.approx(got, abs=1e-5)


@pytest.mark.parametrize(
    ("stored", "size", "low", "high"),
    [
        ("bfloat16", 1e-5, 0.0, 0.05),
        ("bfloat16", 1e-4, 0.02, 0.3),
        ("bfloat16", 1e-1, 0.95, 1.05),
        ("float32", 1e-4, 0.99, 1.01),
        ("float32", 0.0, 1.0, 1.0),
    ],
)
def test_how_much_of_an_update_survives_a_merge(stored: str, size: float, low: float, high: float) -> None:
    _, params = adapted(size, param_dtype=stored)
    assert low <= share_kept(params.base, params.adapters, LORA, stored) <= high
    got = want = 0.0
    for name, pair in params.adapters["layers"].items():
        kernel = params.base["layers"][name]["kernel"]
        w = np.asarray(kernel, np.float32)
        update = LORA.scale * np.einsum("lir,lro->lio", pair["lora_a"], pair["lora_b"])
        got += float(np.sum((np.asarray((w + update).astype(kernel.dtype), np.float32) - w) * update))
        want += float(np.sum(update * update))
    if want:
        assert share_kept(params.base, params.adapters, LORA, stored) == pytest.approx(got / want, rel=1e-2, abs=1e-3)


def test_a_rollout_costs_the_adapters_more_and_no_merge() -> None:
    """FLOPs of the compiled sampler, whose loops count once: a prefill of all prompts and one token of each."""
    config, params = adapted(1e-2, param_dtype="bfloat16", dtype="bfloat16")
    sample = jax.jit(make_sampler(config, SamplingSettings(N, temperature=1.0)))
    flops = {}
    for name, tree in (("adapted", params), ("base", params.base)):
        cost = sample.lower(tree, PROMPTS, jax.random.key(0)).compile().cost_analysis()
        flops[name] = cost["flops"]
    rows, columns = PROMPTS.tokens.shape
    sides = sum(x.shape[1] + y.shape[2] for x, y in ((p["lora_a"], p["lora_b"]) for p in adapters_of(params)))
    own = 2 * LORA.rank * config.num_layers * sides * rows * (columns + 1)
    more = flops["adapted"] - flops["base"]
    assert own < more < 1.5 * own


def adapters_of(params: AdaptedParams) -> list[dict[str, Any]]:
    return list(params.adapters["layers"].values())
