"""The metric `reward_gain` of a step is the change of the reward on its own batch, and changes nothing else."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from test_train_steps import CONFIG, assert_same, make_batch, run

import cotgrpo
from cotgrpo.models.decoder import init_params, make_student


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("mesh_axes", [{}, {"fsdp": 4, "tensor": 2}], ids=["one device", "mesh"])
def test_it_is_the_change_of_the_reward(micro_batches: int, mesh_axes: dict[str, int]) -> None:
    batch, tx = make_batch(), optax.sgd(0.5)
    mesh = cotgrpo.make_mesh(**mesh_axes) if mesh_axes else None
    step = cotgrpo.make_grpo_step(make_student(CONFIG), tx, micro_batches=micro_batches, reward_gain=True)
    before = init_params(CONFIG, jax.random.key(0))
    state, metrics = cotgrpo.jit_step(step, mesh=mesh)(
        cotgrpo.TrainState.create(params=jax.tree.map(np.asarray, before), tx=tx, key=0), batch
    )
    plain, plain_metrics = run(cotgrpo.make_grpo_step, batch, tx=tx, micro_batches=micro_batches)
    if mesh is None:
        assert_same(state.params, plain.params)
    old, new = (
        np.asarray(make_student(CONFIG).logits(params, batch.tokens, batch.positions, batch.segment_ids), np.float64)
        for params in (before, plain.params)
    )
    p = np.exp(old - old.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    change = new - old
    ghost = np.take_along_axis(change, np.asarray(batch.targets)[..., None], -1)[..., 0]
    mask = np.asarray(batch.loss_mask)
    want = np.sum(mask * (ghost - np.sum(p * change, -1))) / mask.sum()
    assert want > 0
    np.testing.assert_allclose(metrics["reward_gain"].mean(), want, rtol=1e-3)
    assert metrics.keys() - plain_metrics.keys() == {"reward_gain"}
    np.testing.assert_allclose(metrics["loss"].mean(), plain_metrics["loss"].mean(), rtol=1e-5)
