"""Steps, samplers and live ghosts in float64, with strict dtype promotion, and with JAX's debugging switches."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cotgrpo.ghosts.live import live_ghosts, reply_rewards, reweighted
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.models.lora import LoraConfig, init_lora, make_lora_step, merge
from cotgrpo.objectives import (
    ForwardKl,
    GroupRelative,
    Nll,
    Objective,
    Pair,
    ReferenceKl,
    Reinforce,
    RewardGradient,
    needs_reference,
    num_draws,
)
from cotgrpo.sampling import Prompts, Replies, SamplingSettings, make_sampler
from cotgrpo.train_steps import make_eval_step, make_grpo_step
from cotgrpo.types import GhostBatch, Student, TrainState

V, D, B, T = 11, 5, 4, 6


def own(logits_V: jax.Array, inputs: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return an objective of a user."""
    gap = logits_V[inputs.drawn] - logits_V[inputs.ghost]
    return inputs["advantages"] * gap, {"gap": gap}


OBJECTIVES: dict[str, Objective] = {
    "nll": Nll(),
    "pair": Pair(),
    "calibrated": Pair(beta=0.5, negatives="calibrated"),
    "drawn": Pair(estimator="drawn", samples=3),
    "drawn calibrated": Pair(beta=0.5, negatives="calibrated", estimator="drawn"),
    "reinforce": Reinforce(),
    "reward gradient": RewardGradient(),
    "forward KL": ForwardKl(top_k=3),
    "reference KL": ReferenceKl(Pair()),
    "reference KL drawn": ReferenceKl(Pair(estimator="drawn")),
    "group-relative": GroupRelative(),
    "group-relative with a reference": GroupRelative(kl_weight=0.1),
    "own": own,
}
TYPES = {
    "float64, strict, int64 ids": (True, "strict", np.float64, np.int64),
    "float32, strict, int8 ids": (False, "strict", np.float32, np.int8),
    "float32 with x64, strict": (True, "strict", np.float32, np.int32),
}


@contextlib.contextmanager
def number_types(x64: bool, promotion: str) -> Any:
    with jax.enable_x64(x64), jax.numpy_dtype_promotion(promotion):
        yield


def problem(objective: Objective, real: Any, whole: Any, mask: Any = np.float64) -> tuple[Student, Any, GhostBatch]:
    random = np.random.default_rng(0)
    params = {"embedding": random.normal(size=(V, D)).astype(real), "head": random.normal(size=(D, V)).astype(real)}
    ids = lambda: random.integers(0, V - 1, (B, T)).astype(whole)
    student = Student(
        hidden=lambda params, tokens, *_: params["embedding"][tokens],
        head=lambda params: params["head"],
        softcap=20.0,
        vocab_size=V - 1,
    )
    extra = {
        "top_ids": np.broadcast_to(np.arange(3), (B, T, 3)).astype(whole),
        "top_log_probs": np.broadcast_to(np.log([0.5, 0.2, 0.1]), (B, T, 3)),
        "drawn_log_probs": np.full((B, T), -2.0),
        "advantages": random.normal(size=(B, T)),
    }
    batch = GhostBatch(
        tokens=ids(),
        ghost_tokens=ids(),
        positions=np.zeros((B, T), whole),
        segment_ids=np.ones((B, T), whole),
        loss_mask=(random.random((B, T)) > 0.3).astype(mask),
        drawn_tokens=ids() if isinstance(objective, GroupRelative) else None,
        extra=extra,
    )
    return student, jax.tree.map(jnp.asarray, params), batch


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_steps_keep_the_type_of_the_parameters(name: str, types: str, micro_batches: int) -> None:
    x64, promotion, real, whole = TYPES[types]
    objective = OBJECTIVES[name]
    with number_types(x64, promotion):
        student, params, batch = problem(objective, real, whole)
        reference = student if needs_reference(objective) else None
        tx = optax.adamw(1e-3)
        step = make_grpo_step(
            student, tx, objective, reference=reference, micro_batches=micro_batches, reward_gain=True
        )
        state = TrainState.create(params=params, tx=tx, key=jax.random.key(0))
        new, metrics = jax.eval_shape(step, state, batch, *([params] if reference else []))
        assert jax.tree.map(jnp.result_type, new.params) == jax.tree.map(jnp.result_type, params)
        counts = ("tokens", "padded_tokens", "invalid_tokens", "skipped")
        assert {str(m.total.dtype) for name, m in metrics.items() if name not in counts} == {np.dtype(real).name}
        if not num_draws(objective) and reference is None:
            assert jax.eval_shape(make_eval_step(student, objective), params, batch)["loss"].total.dtype == real


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("mask", [np.float64, np.float32, np.int8, np.bool_])
def test_a_float64_step_has_the_digits_of_float64(mask: Any, micro_batches: int) -> None:
    with number_types(True, "standard"):
        student, params, batch = problem(Nll(), np.float64, np.int32, mask)
        student = dataclasses.replace(student, softcap=None)
        tx = optax.sgd(1.0)
        state = TrainState.create(params=params, tx=tx, key=jax.random.key(0))
        new, metrics = jax.jit(make_grpo_step(student, tx, Nll(), micro_batches=micro_batches))(state, batch)
    embedding, head = (np.asarray(params[name]) for name in ("embedding", "head"))
    weight = np.asarray(batch.loss_mask, np.float64).reshape(-1, 1)
    tokens, ghosts = batch.tokens.reshape(-1), batch.ghost_tokens.reshape(-1)
    logits = (embedding[tokens] @ head)[:, : V - 1]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    loss = -np.sum(weight[:, 0] * np.log(p[np.arange(len(ghosts)), ghosts])) / weight.sum()
    slope = np.zeros((B * T, V))
    slope[:, : V - 1] = weight * (p - np.eye(V - 1)[ghosts]) / weight.sum()
    pull = np.zeros_like(embedding)
    np.add.at(pull, tokens, slope @ head.T)
    np.testing.assert_allclose(metrics["loss"].mean(), loss, rtol=1e-13)
    np.testing.assert_allclose(new.params["head"], head - embedding[tokens].T @ slope, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(new.params["embedding"], embedding - pull, rtol=1e-12, atol=1e-13)


CONFIG = DecoderConfig(vocab_size=37, width=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)
PROMPTS = Prompts(tokens=np.array([[1, 2, 3], [0, 0, 4]], np.int32), lengths=np.array([3, 1], np.int32))
REPLIES = Replies(
    tokens=np.ones((2, 4), np.int32),
    log_probs=np.zeros((2, 4), np.float32),
    lengths=np.array([3, 4], np.int32),
    finished=np.ones(2, bool),
)
MODELS = {
    "float32": (False, "strict", "float32", "float32"),
    "bfloat16": (False, "strict", "bfloat16", "float32"),
    "bfloat16 parameters": (False, "strict", "bfloat16", "bfloat16"),
    "float32 with x64": (True, "strict", "float32", "float32"),
}


@pytest.mark.parametrize("types", MODELS)
def test_a_decoder_samples_reads_and_trains_in_every_type(types: str) -> None:
    x64, promotion, dtype, param_dtype = MODELS[types]
    with number_types(x64, promotion):
        config = dataclasses.replace(CONFIG, dtype=dtype, param_dtype=param_dtype)
        params = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        )
        student, key = make_student(config, 35), jax.random.key(0)
        for settings in (SamplingSettings(4, eos_ids=(0,)), SamplingSettings(4, temperature=0.7, top_k=5, top_p=0.9)):
            for decode_batch_size in (None, 1):
                sampler = make_sampler(config, settings, 35, decode_batch_size)
                replies = jax.eval_shape(sampler, params, PROMPTS, key)
                assert replies.tokens.dtype == replies.lengths.dtype == jnp.int32
                assert replies.log_probs.dtype == jnp.float32
        replies = jax.tree.map(jnp.asarray, REPLIES)
        ghosts = jax.eval_shape(lambda: live_ghosts(student, params, PROMPTS, replies, key=key, top_k=3))
        assert ghosts.ghost_tokens.dtype == jnp.int32
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ghosts)
        rows = jnp.ones((2, 1), bool)
        past = jnp.zeros(ghosts.tokens.shape, jnp.float32)
        jax.eval_shape(lambda: reply_rewards(student, params, zeros))
        jax.eval_shape(lambda: reweighted(student, params, zeros, past, rows, 0.2))
        tx, lora = optax.adamw(1e-3), LoraConfig(rank=2, dropout=0.1)
        batch = dataclasses.replace(zeros, extra={}, drawn_tokens=None)
        adapters = init_lora(params, lora, key)
        state = TrainState.create(params=adapters, tx=tx, key=key)
        step = make_lora_step(lambda student: make_grpo_step(student, tx), student, lora)
        jax.eval_shape(step, state, batch, params)
        jax.eval_shape(lambda: merge(params, adapters, lora))
        state = TrainState.create(params=params, tx=tx, key=key)
        new, _ = jax.eval_shape(make_grpo_step(student, tx, Pair(estimator="drawn"), micro_batches=2), state, batch)
        assert jax.tree.map(jnp.result_type, new.params) == jax.tree.map(jnp.result_type, params)
