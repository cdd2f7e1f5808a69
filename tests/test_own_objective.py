"""An objective of a user's own, with per-token arrays of its own, written as a user would write it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cotgrpo
from cotgrpo import GhostBatch, SftBatch, TrainState
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student

CONFIG = DecoderConfig(vocab_size=48, width=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32)
B, T, K = 8, 16, 3


def weighted_advantage(logits_V: Any, token: Any) -> Any:
    """A plain function: a policy gradient with an importance weight and a value baseline for each token."""
    log_p = jax.nn.log_softmax(logits_V)
    advantage = token["returns"] - token["baseline"]
    return -token["importance"] * advantage * log_p[token.ghost], {"advantage": advantage}


@dataclasses.dataclass(frozen=True)
class SoftTargets:
    """A class: cross entropy to K tokens with weights, and its closed form. `p sum_k w_k - sum_k w_k e_k`."""

    closed_form: bool

    num_draws = 0
    batch_fields = ("soft_ids", "soft_weights")

    def __call__(self, logits_V: Any, token: Any) -> Any:
        log_p = jax.nn.log_softmax(logits_V)
        return -jnp.sum(token["soft_weights"] * log_p[token["soft_ids"]]), {}

    @property
    def value_and_grad(self) -> Any:
        return self.gradient if self.closed_form else None

    def gradient(self, logits_V: Any, token: Any) -> Any:
        weights_K = token["soft_weights"]
        grad_V = jax.nn.softmax(logits_V) * jnp.sum(weights_K)
        return self(logits_V, token), grad_V.at[token["soft_ids"]].add(-weights_K)


OBJECTIVES = {
    "function": weighted_advantage,
    "class": SoftTargets(closed_form=False),
    "closed_form": SoftTargets(closed_form=True),
}


def make_batch() -> GhostBatch:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG.vocab_size, (B, T + 1), dtype=np.int32)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return GhostBatch(
        tokens=ids[:, :-1],
        ghost_tokens=ids[:, 1:],
        positions=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        segment_ids=np.ones((B, T), np.int32),
        loss_mask=(rng.random((B, T)) < 0.6).astype(np.float32),
        extra={
            "importance": np.exp(normal(B, T)),
            "returns": normal(B, T),
            "baseline": normal(B, T),
            "soft_ids": rng.integers(0, CONFIG.vocab_size, (B, T, K), dtype=np.int32),
            "soft_weights": rng.dirichlet(np.ones(K), (B, T)).astype(np.float32),
        },
    )


def full_logits_loss(objective: Any, params: Any, batch: GhostBatch) -> Any:
    """The mean over supervised tokens, from all logits at once, with nothing of the package but the model."""
    logits = make_student(CONFIG).logits(params, batch.tokens, batch.positions, batch.segment_ids)
    p = jax.nn.log_softmax(logits)
    if objective is weighted_advantage:
        extra = batch.extra
        chosen = jnp.take_along_axis(p, batch.ghost_tokens[..., None], axis=-1)[..., 0]
        losses = -extra["importance"] * (extra["returns"] - extra["baseline"]) * chosen
    else:
        chosen = jnp.take_along_axis(p, batch.extra["soft_ids"], axis=-1)
        losses = -jnp.sum(batch.extra["soft_weights"] * chosen, axis=-1)
    return jnp.sum(batch.loss_mask * losses) / jnp.sum(batch.loss_mask)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2, "context": 2}], ids=["one_device", "eight_devices"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_autodiff_on_full_logits(name: str, mesh: dict[str, int] | None) -> None:
    objective, batch, tx = OBJECTIVES[name], make_batch(), optax.sgd(0.5)
    params = init_params(CONFIG, jax.random.key(1))
    loss, grads = jax.jit(jax.value_and_grad(lambda p: full_logits_loss(objective, p, batch)))(params)
    want = jax.device_get(jax.tree.map(lambda p, g: p - 0.5 * g, params, grads))

    step = cotgrpo.make_grpo_step(make_student(CONFIG), tx, objective, micro_batches=2, tile_size=8)
    step = cotgrpo.jit_step(step, mesh=None if mesh is None else cotgrpo.make_mesh(**mesh))
    state, metrics = step(TrainState.create(params=params, tx=tx, key=0), batch)

    assert metrics["loss"].mean() == pytest.approx(float(loss), rel=1e-5)
    assert jax.tree.leaves(state.params)[0].sharding.device_set.__len__() == (1 if mesh is None else 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), jax.device_get(state.params), want)
    if name == "function":
        advantage = batch.extra["returns"] - batch.extra["baseline"]
        assert metrics["advantage"].mean() == pytest.approx(np.average(advantage, weights=batch.loss_mask), rel=1e-4)


def test_an_sft_batch_carries_extra_arrays_too() -> None:
    batch = make_batch()
    text = SftBatch(batch.tokens, batch.ghost_tokens, batch.positions, batch.segment_ids, batch.loss_mask, batch.extra)
    step = cotgrpo.make_sft_step(make_student(CONFIG), optax.sgd(0.5), weighted_advantage)
    state = TrainState.create(params=init_params(CONFIG, jax.random.key(1)), tx=optax.sgd(0.5), key=0)
    _, metrics = jax.jit(step)(state, text)
    assert metrics["loss"].mean() == pytest.approx(float(full_logits_loss(weighted_advantage, state.params, batch)))


BAD_BATCHES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("tokens", {"tokens": np.zeros((B, T, 1), np.int32)}, ["GhostBatch.tokens", "[B, T]", "(8, 16, 1)"]),
    ("ghosts", {"ghost_tokens": np.zeros((B, T - 1), np.int32)}, ["ghost_tokens", "(8, 16)", "(8, 15)"]),
    ("positions", {"positions": np.zeros((B - 1, T), np.int32)}, ["positions", "(8, 16)", "(7, 16)"]),
    ("segments", {"segment_ids": np.zeros((B, T))}, ["segment_ids", "integers", "float"]),
    ("float ids", {"tokens": np.zeros((B, T), np.float32)}, ["GhostBatch.tokens", "integers", "float32"]),
    ("mask", {"loss_mask": np.ones((B, 1))}, ["loss_mask", "(8, 16)", "(8, 1)"]),
    ("complex mask", {"loss_mask": np.ones((B, T), np.complex64)}, ["loss_mask", "complex64"]),
    ("draws", {"drawn_tokens": np.zeros((B, T, 2, 2), np.int32)}, ["drawn_tokens", "[B, T, G]", "(8, 16, 2, 2)"]),
    ("a list", {"positions": [[0] * T] * B}, ["GhostBatch.positions", "array", "list"]),
    ("nothing", {"segment_ids": None}, ["GhostBatch.segment_ids", "array", "NoneType"]),
    ("no dict", {"extra": [np.ones((B, T))]}, ["GhostBatch.extra", "dict", "list"]),
    ("extra", {"extra": {"importance": np.ones(B)}}, ["extra['importance']", "[B, T, K]", "(8,)"]),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in BAD_BATCHES], ids=[case[0] for case in BAD_BATCHES])
def test_a_batch_that_does_not_fit_is_one_sentence(change: dict[str, Any], words: list[str]) -> None:
    """Raised when the step is traced, before the model sees the batch."""
    tx = optax.sgd(0.5)
    step = cotgrpo.make_grpo_step(make_student(CONFIG), tx, lambda z, token: (-z[token.ghost], {}))
    state = jax.eval_shape(
        lambda: TrainState.create(params=init_params(CONFIG, jax.random.key(1)), tx=tx, key=jax.random.key(0))
    )
    fields = {name: value for name, value in vars(make_batch()).items() if name != "extra"} | change
    on_a_mesh = cotgrpo.jit_step(step, mesh=cotgrpo.make_mesh(fsdp=8))
    for trace in (lambda batch: jax.eval_shape(step, state, batch), lambda batch: on_a_mesh.lower(state, batch)):
        with pytest.raises(ValueError, match=r"^GhostBatch\.[^\n]*\.(\n|$)") as error:
            trace(unchecked(GhostBatch, fields))
        assert all(word in str(error.value) for word in words), str(error.value)


def unchecked(kind: type, fields: dict[str, Any]) -> Any:
    """A batch whose fields nothing has looked at: the tests' own check of signatures would be first."""
    batch = kind.__new__(kind)
    for name, value in ({"drawn_tokens": None, "extra": {}} | fields).items():
        object.__setattr__(batch, name, value)
    return batch


def test_a_field_that_is_missing_is_named() -> None:
    state = TrainState.create(params=init_params(CONFIG, jax.random.key(1)), tx=optax.sgd(0.5), key=0)
    batch = make_batch().replace(extra={"returns": np.zeros((B, T), np.float32)})
    declared = cotgrpo.make_grpo_step(make_student(CONFIG), optax.sgd(0.5), SoftTargets(closed_form=True))
    with pytest.raises(ValueError, match=r"'soft_ids'.*soft_weights.*returns"):
        jax.eval_shape(declared, state, batch)
    read = cotgrpo.make_grpo_step(make_student(CONFIG), optax.sgd(0.5), weighted_advantage)
    with pytest.raises(KeyError, match=r"baseline.*returns"):
        jax.eval_shape(read, state, batch)
