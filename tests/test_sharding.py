"""One device is eight: the same losses, metrics and parameters on every mesh; what a mesh refuses; and what its programs say to each other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cotgrpo
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.models.lora import LoraConfig, init_lora, make_lora_step
from cotgrpo.objectives import Nll, Pair, ReferenceKl
from cotgrpo.types import GhostBatch, SftBatch, TrainState

# Grouped heads, biases, both kinds of norms, a tied head with a soft-cap, a window in every other layer.
TIED = DecoderConfig(
    vocab_size=64,
    width=32,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=4,
    mlp_width=48,
    tied_head=True,
    biases=("query", "key", "value"),
    qk_norm=True,
    logit_softcap=10.0,
    window=5,
    local_layers=(0,),
    init_scale=0.2,
)
PLAIN = DecoderConfig(
    vocab_size=64, width=32, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4, mlp_width=48, tied_head=False, remat="block", init_scale=0.2
)  # fmt: skip
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.2, targets=("query", "value", "down"))

MESHES: dict[str, dict[str, int]] = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "context": {"context": 8},
    "fsdp-tensor": {"fsdp": 4, "tensor": 2},
    "data-fsdp-tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp-tensor-context": {"fsdp": 2, "tensor": 2, "context": 2},
    "data-context": {"data": 2, "context": 4},
}
MIXED = "fsdp-tensor-context"


def make_batch(seed: int, ghosts: bool, B: int = 16, T: int = 16) -> Any:
    """Two documents a row and padding behind them; some rows hardly supervised, so that shards have different work."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(3, T + 1, (B, 2)), axis=1)[:, :, None]
    at = np.arange(T)[None, :]
    first, second = at < ends[:, 0], at < ends[:, 1]
    segments = np.where(first, 1, np.where(second, 2, 0)).astype(np.int32)
    positions = np.where(first, at, np.where(second, at - ends[:, 0], 0)).astype(np.int32)
    share = rng.choice([0.05, 0.5, 1.0], (B, 1))
    mask = ((segments > 0) & (rng.random((B, T)) < share)).astype(np.float32)
    tokens, targets = (rng.integers(0, 60, (B, T)).astype(np.int32) for _ in range(2))
    kind = functools.partial(GhostBatch, tokens, targets) if ghosts else functools.partial(SftBatch, tokens, targets)
    return kind(positions, segments, mask)


def run(
    config: DecoderConfig,
    objective: Any,
    mesh: Any = None,
    *,
    micro_batches: int = 1,
    lora: bool = False,
    steps: int = 2,
) -> tuple[Any, list[dict[str, float]]]:
    """Parameters after some steps, and the metrics of each step."""
    student, params = make_student(config, 60), init_params(config, jax.random.key(1))
    reference = student if isinstance(objective, ReferenceKl) else None
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5, momentum=0.9))

    def make(student: Any) -> Any:
        if isinstance(objective, Nll):
            return cotgrpo.make_sft_step(student, tx, micro_batches=micro_batches, tile_size=8)
        return cotgrpo.make_grpo_step(
            student, tx, objective, reference=reference, micro_batches=micro_batches, tile_size=8
        )

    frozen = init_params(config, jax.random.key(2))
    extra = () if reference is None else (frozen,)
    step = make_lora_step(make, student, LORA) if lora else make(student)
    trained = init_lora(params, LORA, jax.random.key(3)) if lora else params
    extra = (params, *extra) if lora else extra
    state, metrics = TrainState.create(params=trained, tx=tx, key=5), []
    compiled = cotgrpo.jit_step(step, mesh=mesh)
    for number in range(steps):
        state, found = compiled(state, make_batch(number, not isinstance(objective, Nll)), *extra)
        metrics.append({name: metric.mean() for name, metric in found.items()})
    return jax.device_get(state.params), metrics


on_one_device = functools.cache(run)


def assert_same(config: DecoderConfig, objective: Any, mesh: str, **options: Any) -> None:
    """Parameters and metrics of one device and of eight differ by at most 1e-5."""
    want, want_metrics = on_one_device(config, objective, lora=options.get("lora", False))
    got, got_metrics = run(config, objective, cotgrpo.make_mesh(**MESHES[mesh]), **options)
    assert_close(got, want)
    for here, there in zip(got_metrics, want_metrics, strict=True):
        assert here.keys() == there.keys()
        for name, value in there.items():
            assert here[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
    start = init_lora(init_params(config, jax.random.key(1)), LORA, jax.random.key(3)) if options.get("lora") else init_params(config, jax.random.key(1))  # fmt: skip
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), want, jax.device_get(start))
    assert min(jax.tree.leaves(moved)) > 1e-3, "every parameter learns, or their equality shows nothing"


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), got, want)


DRAWN = Pair(estimator="drawn", samples=2)


@pytest.mark.parametrize("mesh", MESHES)
def test_grpo_with_drawn_tokens(mesh: str) -> None:
    """Fused with gradients accumulated over two micro-batches: the same tokens are drawn, and every shard walks over its own."""
    assert_same(TIED, DRAWN, mesh, micro_batches=2)


@pytest.mark.parametrize("mesh", ["fsdp-tensor", MIXED])
def test_sft(mesh: str) -> None:
    assert_same(PLAIN, Nll(), mesh)


def test_grpo_near_a_reference_with_lora() -> None:
    assert_same(PLAIN, ReferenceKl(Pair(), 0.3), MIXED, lora=True, micro_batches=2)
