"""The optimizers: the schedule, what is decayed and clipped, the ranges of the settings, and each optimizer's state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cotgrpo.optimizers import OptimizerConfig, clip_by_norm, decayed, make_optimizer

PARAMS = {"kernel": jnp.full((2, 3), 2.0), "scale": jnp.full((4, 3), 2.0), "norm": {"bias": jnp.full((2, 2), 2.0)}}


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.9, 0.8, 0.7, 0.6]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, *(0.6 + 0.2 * (1 + np.cos(np.pi * k / 4)) for k in (1, 2, 3, 4))]),
    ],
)
def test_schedules(schedule: Any, want: list[float]) -> None:
    """A ramp that starts at 1 / warmup_steps of the peak, and then the decay to 60 % at the last step."""
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule=schedule, final_fraction=0.6)
    got = [float(config.make_schedule(8)(step)) for step in range(9)]
    np.testing.assert_allclose(got, 2 * np.asarray(want), rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_every_optimizer_decays_matrices_alone(name: Any) -> None:
    """With zero gradients nothing but weight decay moves a parameter. The state holds the learning rate in use."""
    tx = make_optimizer(name, learning_rate=0.1, total_steps=10, schedule="constant", weight_decay=0.5)
    state = tx.init(PARAMS)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS)
    assert float(jnp.max(jnp.abs(updates["scale"]))) == float(jnp.max(jnp.abs(updates["norm"]["bias"]))) == 0
    assert float(jnp.max(updates["kernel"])) < 0
    assert optax.tree.get(state, "hyperparams")["learning_rate"] == pytest.approx(0.1)
    assert decayed(PARAMS) == {"kernel": True, "scale": False, "norm": {"bias": False}}


def test_clipping() -> None:
    gradients = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([[4.0]], jnp.bfloat16)}
    for most, factor in ((2.5, 0.5), (5.0, 1.0), (9.0, 1.0)):
        clipped, _ = clip_by_norm(most).update(gradients, optax.EmptyState())
        np.testing.assert_allclose(clipped["a"], [3 * factor, 0], rtol=1e-6)
        assert clipped["b"].dtype == jnp.bfloat16 and float(clipped["b"][0, 0]) == 4 * factor
    whole = make_optimizer("sgd", learning_rate=1.0, total_steps=2, schedule="constant", clip_norm=None)
    updates, _ = whole.update(gradients, whole.init(gradients), gradients)
    np.testing.assert_allclose(updates["a"], [-3, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, r"name must be one of .*adafactor.* got 'adam'"),
        ({"schedule": "step"}, r"schedule must be one of .* got 'step'"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0"),
        ({"final_fraction": 1.5}, r"final_fraction must lie in \[0, 1\], got 1.5"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1"),
        ({"clip_norm": 0.0}, "clip_norm must be positive or None, got 0"),
        ({"warmup_steps": 10}, r"warmup_steps must lie in \[0, total_steps\), got 10 with total_steps=10"),
        ({"warmup_steps": -1}, "warmup_steps must lie in"),
    ],
)
def test_ranges(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings).build(total_steps=10)


def test_settings_are_those_of_the_config() -> None:
    """`make_optimizer` takes every setting of `OptimizerConfig` by its name, and no other."""
    settings = dataclasses.asdict(OptimizerConfig())
    assert make_optimizer(total_steps=10, **settings).init(PARAMS)
    with pytest.raises(TypeError, match="momentum"):
        make_optimizer(learning_rate=1e-3, total_steps=10, momentum=0.9)
