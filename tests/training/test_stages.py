"""What a stage says about its weights before it trains."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cotgrpo.config import Config
from cotgrpo.optimizers import OptimizerConfig
from cotgrpo.training.stages import warn_of_rounding
from cotgrpo.training.weights import StageWeights


@pytest.mark.parametrize(
    ("dtype", "rounding", "warned"),
    [
        ("bfloat16", "nearest", True),
        ("bfloat16", "stochastic", False),
        ("bfloat16", "compensated", False),
        ("float32", "nearest", False),
    ],
)
def test_updates_that_are_rounded_away(
    dtype: str, rounding: Any, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the share that is lost, of this stage's weights at its rate, and the settings that mend it."""
    optimizer = OptimizerConfig(learning_rate=5e-6, rounding=rounding)
    config = Config()
    config = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, optimizer=optimizer))
    weights = {"kernel": (0.02 * jax.random.normal(jax.random.key(0), (128, 128))).astype(jnp.dtype(dtype))}
    warn_of_rounding("grpo", config, StageWeights(weights))
    said = capsys.readouterr().err
    assert bool(said) == warned and said.count("\n") == warned
    for part in ("about 92% of the updates are lost", "student.param_dtype float32", "grpo.optimizer.rounding"):
        assert (part in said) == warned
