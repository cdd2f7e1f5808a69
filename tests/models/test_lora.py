"""LoRA: what is computed, what is trained, where it lies. The way to and from `peft` is in tests/test_peft_files.py."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import cotgrpo
from cotgrpo import Nll, Pair, ReferenceKl, SftBatch, Student, TrainState
from cotgrpo.checkpoints.manager import Checkpoints
from cotgrpo.config import CheckpointConfig
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.models.lora import LoraConfig, init_lora, lora_student, make_lora_step, merge
from cotgrpo.sharding import state_sharding
from cotgrpo.training.loop import LoopSettings, train

CONFIG = DecoderConfig(
    vocab_size=61, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, biases=("query",)
)
LORA = LoraConfig(rank=4, alpha=6.0)
SHAPES = {
    "query": (32, 32),
    "key": (32, 16),
    "value": (32, 16),
    "out": (32, 32),
    "gate": (32, 48),
    "up": (32, 48),
    "down": (48, 32),
}
B, T = 8, 12
STUDENT = make_student(CONFIG)
SGD, NLL = optax.sgd(0.1), Nll()
EVAL = jax.jit(cotgrpo.make_eval_step(STUDENT))


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(CONFIG, jax.random.key(0))


def trained(params: Any, lora: LoraConfig = LORA) -> Any:
    """Adapters as after some training: B is not zero."""
    adapters = init_lora(params, lora, jax.random.key(1))
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def make_batch(seed: int = 0) -> SftBatch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, CONFIG.vocab_size, (B, T + 1)).astype(np.int32)
    ones = np.ones((B, T), np.int32)
    mask = (np.arange(T) >= rng.integers(0, T - 2, (B, 1))).astype(np.float32)
    positions = ones * np.arange(T, dtype=np.int32)
    return SftBatch(*(jnp.asarray(x) for x in (ids[:, :-1], ids[:, 1:], positions, ones, mask)))


def inputs(batch: SftBatch) -> tuple[Any, Any, Any]:
    return batch.tokens, batch.positions, batch.segment_ids


@functools.cache
def jitted_step(lora: LoraConfig, objective: Any, tx: Any, mesh: Any, micro_batches: int) -> Any:
    make = lambda student: cotgrpo.make_grpo_step(student, tx, objective, micro_batches=micro_batches)
    return cotgrpo.jit_step(make_lora_step(make, STUDENT, lora), mesh=mesh)


def run(
    params: Any,
    adapters: Any,
    *,
    lora: LoraConfig = LORA,
    objective: Any = NLL,
    steps: int = 1,
    start: int = 0,
    mesh: Any = None,
    micro_batches: int = 1,
) -> tuple[TrainState, dict[str, cotgrpo.Metric]]:
    step = jitted_step(lora, objective, SGD, mesh, micro_batches)
    state = TrainState.create(params=jax.tree.map(jnp.copy, adapters), tx=SGD, key=3).replace(step=jnp.int32(start))
    for seed in range(steps):
        state, metrics = step(state, make_batch(seed), params)
    return state, metrics


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("lora", "remat"),
    [
        pytest.param(dataclasses.replace(LORA, rslora=True), "full", id="rslora_remat"),
        pytest.param(LORA, "none", id="plain", marks=pytest.mark.slow),
    ],
)
def test_beside_and_merged_are_the_same_model(lora: LoraConfig, remat: str, params: Any) -> None:
    adapters, batch = trained(params, lora), make_batch()
    merged = merge(params, adapters, lora)
    scale = 6.0 / 2.0 if lora.rslora else 6.0 / 4.0
    for name, pair in adapters["layers"].items():
        for layer in range(2):
            product = np.asarray(pair["lora_a"][layer], np.float64) @ np.asarray(pair["lora_b"][layer], np.float64)
            want = np.asarray(params["layers"][name]["kernel"][layer], np.float64) + scale * product
            np.testing.assert_allclose(merged["layers"][name]["kernel"][layer], want, atol=1e-6)
    student = make_student(dataclasses.replace(CONFIG, remat=remat))
    logits = jax.jit(student.logits)
    beside = jax.jit(lora_student(student, params, lora).logits)(adapters, *inputs(batch))
    assert_close(beside, logits(merged, *inputs(batch)))
    assert np.abs(beside - logits(params, *inputs(batch))).max() > 0.1


def test_fresh_adapters(params: Any) -> None:
    """A as in peft, B zero; A of a projection is the same whatever else is adapted; abstract parameters serve too."""
    adapters = init_lora(params, LORA, jax.random.key(1))
    assert set(adapters) == {"layers"} and set(adapters["layers"]) == set(SHAPES)
    for name, (width, outputs) in SHAPES.items():
        a, b = adapters["layers"][name]["lora_a"], adapters["layers"][name]["lora_b"]
        assert a.shape == (2, width, 4) and b.shape == (2, 4, outputs) and a.dtype == b.dtype == jnp.float32
        assert not b.any() and 0.9 < np.abs(a).max() * width**0.5 <= 1 and abs(a.mean()) < 0.2 * width**-0.5
        assert not np.allclose(a[0], a[1])
    abstract = jax.eval_shape(lambda: params)
    few = init_lora(abstract, LoraConfig(rank=4, targets=("value", "gate|up")), jax.random.key(1))
    assert set(few["layers"]) == {"value", "gate", "up"}
    assert_close(few, {"layers": {name: adapters["layers"][name] for name in few["layers"]}}, 0.0)


def test_the_first_step_sees_the_frozen_model(params: Any) -> None:
    _, metrics = run(params, init_lora(params, LORA, jax.random.key(1)))
    want = EVAL(params, make_batch())
    np.testing.assert_allclose(metrics["loss"].mean(), want["loss"].mean(), rtol=1e-6)


@pytest.mark.parametrize("objective", [Nll(), pytest.param(Pair(), marks=pytest.mark.slow)], ids=["sft", "grpo"])
def test_the_update_is_the_gradient_through_the_merged_weights(objective: Any, params: Any) -> None:
    adapters = trained(params)
    merged, pull_back = jax.vjp(lambda a: merge(params, a, LORA), adapters)
    whole = TrainState.create(params=merged, tx=SGD, key=0)
    after, want = jax.jit(cotgrpo.make_grpo_step(STUDENT, SGD, objective))(whole, make_batch())
    (grads,) = pull_back(jax.tree.map(jnp.subtract, merged, after.params))
    state, metrics = run(params, adapters, objective=objective)
    assert_close(state.params, jax.tree.map(jnp.subtract, adapters, grads))
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-3
    np.testing.assert_allclose(metrics["loss"].mean(), want["loss"].mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("objective", "dropout", "sizes"),
    [
        (Nll(), 0.0, {"fsdp": 8}),
        pytest.param(Pair(estimator="drawn"), 0.3, {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=["sft", "grpo_drawn_dropout"],
)
def test_micro_batches_and_devices_change_nothing(
    objective: Any, dropout: float, sizes: dict[str, int], params: Any
) -> None:
    """Losses, metrics and adapters after two steps, to 1e-5; with dropout too, as a row's mask follows from the row."""
    options: Any = {
        "lora": dataclasses.replace(LORA, dropout=dropout),
        "objective": objective,
        "steps": 2,
    }
    adapters = trained(params)
    one, metrics = run(params, adapters, **options)
    assert np.abs(one.params["layers"]["up"]["lora_a"] - adapters["layers"]["up"]["lora_a"]).max() > 1e-4
    parts, parts_metrics = run(params, adapters, micro_batches=4, **options)
    many, many_metrics = run(params, adapters, mesh=cotgrpo.make_mesh(**sizes), **options)
    assert_close((parts.params, means(parts_metrics)), (one.params, means(metrics)))
    assert_close((many.params, means(many_metrics)), (one.params, means(metrics)))
    assert many.params["layers"]["up"]["lora_a"].addressable_shards[0].data.shape[1] == 32 // sizes["fsdp"]


def means(metrics: dict[str, cotgrpo.Metric]) -> dict[str, float]:
    return {name: metric.mean() for name, metric in metrics.items()}


def test_adapters_lie_as_the_kernels_beside_them(params: Any) -> None:
    mesh = cotgrpo.make_mesh(data=2, fsdp=2, tensor=2)
    tx = optax.adam(1e-3)
    state = TrainState.create(params=trained(params), tx=tx, key=0)
    shardings = state_sharding((params, state.params, state.opt_state[0].mu), mesh)
    for name in SHAPES:
        _, inner, outer = shardings[0]["layers"][name]["kernel"].spec
        for tree in shardings[1:]:
            assert tree["layers"][name]["lora_a"].spec == P(None, inner, None)
            assert tree["layers"][name]["lora_b"].spec == P(None, None, outer)


def test_state_and_checkpoint_hold_adapters_alone(params: Any, tmp_path: Path) -> None:
    adapters = trained(params)
    tx = cotgrpo.make_optimizer(learning_rate=1e-2, total_steps=10)
    state = TrainState.create(params=adapters, tx=tx, key=0)
    held = sum(leaf.size for leaf in jax.tree.leaves((state.params, state.opt_state)))
    small = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert 3 * small <= held <= 3 * small + 10, "adapters, two moments, and some counters"
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state, {})
    checkpoints.wait()
    restored, _, _ = checkpoints.restore_latest(jax.eval_shape(lambda: state)) or (None, None, None)
    checkpoints.close()
    assert_close(restored.params, state.params, 0.0)


class Batches:
    """Endless, with a position that can be saved."""

    def __init__(self) -> None:
        self.taken = 0

    def __next__(self) -> SftBatch:
        self.taken += 1
        return make_batch(self.taken)

    def get_state(self) -> dict[str, int]:
        return {"taken": self.taken}

    def set_state(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


@pytest.mark.parametrize("mesh", [{}, pytest.param({"fsdp": 8}, marks=pytest.mark.slow)], ids=["one", "eight"])
def test_the_host_loop_trains_adapters_and_resumes_on_another_mesh(
    mesh: dict[str, int], params: Any, tmp_path: Path
) -> None:
    """`train` takes the frozen weights as `extra`; three steps on some devices and three on one are six on one."""
    tx, lora = cotgrpo.make_optimizer(learning_rate=1e-2, total_steps=6), dataclasses.replace(LORA, dropout=0.1)
    pure = make_lora_step(lambda student: cotgrpo.make_grpo_step(student, tx), STUDENT, lora)

    on_one = cotgrpo.jit_step(pure)

    def call(folder: str, steps: int, **mesh: int) -> Any:
        step = cotgrpo.jit_step(pure, mesh=cotgrpo.make_mesh(**mesh)) if mesh else on_one
        state = TrainState.create(params=init_lora(params, lora, jax.random.key(1)), tx=tx, key=0)
        settings = LoopSettings("lora", steps, log_every=3, checkpoint=CheckpointConfig(every=3))
        evaluate = lambda adapters: {"loss": EVAL(merge(params, adapters, lora), make_batch())["loss"].mean()}
        return train(step, state, Batches(), tmp_path / folder, settings, extra=(params,), evaluate=evaluate).params

    call("parts", 3, **mesh)
    assert_close(call("parts", 6), call("whole", 6))


def test_the_frozen_weights_are_an_argument_and_have_no_gradient(params: Any) -> None:
    """No constant is as large as a kernel, and no matrix product makes the shape of a kernel or of the stack."""
    tx = optax.sgd(0.1)
    step = make_lora_step(lambda s: cotgrpo.make_sft_step(s, tx), STUDENT, LORA)
    state = TrainState.create(params=trained(params), tx=tx, key=0)
    jaxpr = jax.make_jaxpr(step)(state, make_batch(), params)
    assert all(np.size(const) < 100 for const in jaxpr.consts)
    whole = jax.make_jaxpr(cotgrpo.make_sft_step(STUDENT, tx))(
        TrainState.create(params=params, tx=tx, key=0), make_batch()
    )
    wanted = {shape for pair in SHAPES.values() for shape in (pair, pair[::-1])}
    assert not products(jaxpr) & wanted
    assert products(whole) & wanted, "as training of the kernels does"


def products(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of the results of all matrix products, in inner programs too."""
    shapes = re.findall(r":\w+\[([\d,]*)\] = dot_general", str(jaxpr))
    return {tuple(int(n) for n in shape.split(",") if n) for shape in shapes}


def test_a_reference_comes_after_the_frozen_weights(params: Any) -> None:
    tx, objective = optax.sgd(0.5), ReferenceKl(Pair(), 1.0)
    make = lambda student: cotgrpo.make_grpo_step(student, tx, objective, reference=STUDENT)
    step = cotgrpo.jit_step(make_lora_step(make, STUDENT, LORA))
    state = TrainState.create(params=init_lora(params, LORA, jax.random.key(1)), tx=tx, key=0)
    state, metrics = step(state, make_batch(), params, params)
    np.testing.assert_allclose(metrics["kl"].mean(), 0.0, atol=1e-6)
    _, metrics = step(state, make_batch(), params, params)
    assert metrics["kl"].mean() > 1e-6


def test_training_learns_and_leaves_the_frozen_weights(params: Any) -> None:
    # A fresh head's logits are near zero whatever the adapters do; a trained one's are not.
    params = params | {"embedding": 20 * params["embedding"]}
    before = jax.device_get(params)
    tx = cotgrpo.make_optimizer(learning_rate=0.02, total_steps=30)
    pure = make_lora_step(lambda s: cotgrpo.make_sft_step(s, tx), STUDENT, LORA)
    traced = []

    def step(*arguments: Any) -> Any:
        traced.append(1)
        return pure(*arguments)

    jitted = cotgrpo.jit_step(step)
    state = TrainState.create(params=init_lora(params, LORA, jax.random.key(1)), tx=tx, key=0)
    losses = []
    for _ in range(30):
        state, metrics = jitted(state, make_batch(), params)
        losses.append(metrics["loss"].mean())
    assert losses[-1] < 0.7 * losses[0] and len(traced) == 1
    assert_close(params, before, 0.0)
    merged = EVAL(merge(params, state.params, LORA), make_batch())
    assert merged["loss"].mean() < losses[-1] + 1e-3


def test_a_small_update_of_bfloat16_weights_counts(params: Any) -> None:
    """A change below the last bit of W is lost when merged, kept unmerged, and kept by a float32 merge."""
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapters = jax.tree.map(lambda x: 0.02 * x, trained(params))
    batch = make_batch()
    logits = jax.jit(STUDENT.logits)
    start = logits(stored, *inputs(batch))
    beside = jax.jit(lora_student(STUDENT, stored, LORA).logits)(adapters, *inputs(batch))
    wide = merge(jax.tree.map(lambda x: x.astype(jnp.float32), stored), adapters, LORA)
    moved = np.abs(beside - start).max()
    assert moved > 1e-5
    assert np.abs(beside - logits(wide, *inputs(batch))).max() < 0.05 * moved
    merged = merge(stored, adapters, LORA)
    assert merged["layers"]["up"]["kernel"].dtype == jnp.bfloat16
    changed = np.mean(merged["layers"]["up"]["kernel"] != stored["layers"]["up"]["kernel"])
    assert changed < 0.2


class Projections(nn.Module):
    """Two stacked layers of two projections, whose products are the model's output."""

    width: int

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return x, jnp.stack([nn.Dense(self.width, use_bias=False, name=name)(x) for name in ("query", "key")])


def identity(dropout: float) -> tuple[Student, Any, Any, LoraConfig]:
    """A student that returns `dropout(x)` of both layers' projections.

    W = 0, A and B are unit matrices, and x is the token's id + 1.
    """
    width = 16
    eye = jnp.broadcast_to(jnp.eye(width), (2, width, width))

    def hidden(params: Any, tokens: Any, positions: Any, segment_ids: Any) -> Any:
        layers = nn.scan(Projections, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(width)
        x = jnp.broadcast_to(tokens[..., None] + 1.0, (*tokens.shape, width))
        return jnp.moveaxis(layers.apply({"params": params}, x, None)[1], (0, 1), (2, 3)).reshape(*tokens.shape, -1)

    params = {name: {"kernel": jnp.zeros((2, width, width))} for name in ("query", "key")}
    adapters = {name: {"lora_a": eye, "lora_b": eye} for name in ("query", "key")}
    lora = LoraConfig(rank=width, alpha=width, dropout=dropout, targets=("query", "key"))
    return Student(hidden, None), params, adapters, lora


def test_dropout() -> None:
    """Zero or x / (1 - p), drawn apart for layers, projections, rows and tokens.

    The same row and key draw the same. Evaluation draws none.
    """
    student, params, adapters, lora = identity(0.25)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 50, (6, 20)), jnp.int32)
    hidden = jax.jit(lambda key, ids: lora_student(student, params, lora, key).hidden(adapters, ids, ids, ids))
    apply = lambda key, tokens: np.moveaxis(np.asarray(hidden(key, tokens)).reshape(6, 20, 2, 2, 16), (2, 3), (0, 1))
    x = np.broadcast_to(np.asarray(tokens)[..., None] + 1.0, (6, 20, 16))
    np.testing.assert_array_equal(apply(None, tokens), np.broadcast_to(x, (2, 2, 6, 20, 16)))
    out = apply(jax.random.key(0), tokens)
    dropped = out == 0
    np.testing.assert_allclose(out, np.where(dropped, 0, x / 0.75), rtol=1e-6)
    assert abs(dropped.mean() - 0.25) < 0.02
    for axis in range(5):
        first, second = np.take(dropped, 0, axis), np.take(dropped, 1, axis)
        # Apart: both are dropped at p^2 of the places.
        assert abs((first & second).mean() - 0.25**2) < 0.03, f"axis {axis} shares its mask"
    np.testing.assert_array_equal(apply(jax.random.key(0), tokens[::-1])[:, :, ::-1], out)
    assert (apply(jax.random.key(1), tokens) != out).any()


def test_dropout_differs_from_step_to_step(params: Any) -> None:
    lora, adapters = dataclasses.replace(LORA, dropout=0.5), trained(params)
    losses = [run(params, adapters, lora=lora, start=start)[1]["loss"].mean() for start in (0, 1, 0)]
    assert losses[0] != losses[1] and losses[0] == losses[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "LoraConfig.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "LoraConfig.alpha must be positive, got 0.0"),
        ({"dropout": 1.0}, r"LoraConfig.dropout must lie in \[0, 1\), got 1.0"),
        ({"targets": "query"}, "LoraConfig.targets must be a tuple of at least one pattern, got 'query'"),
        ({"targets": ()}, "LoraConfig.targets must be a tuple"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_a_target_that_matches_nothing_names_what_there_is(params: Any) -> None:
    message = "The LoRA target 'q_proj' matches no projection of the model. There are: .*layers/query, .*layers/value"
    with pytest.raises(ValueError, match=message):
        init_lora(params, LoraConfig(targets=("query", "q_proj")), jax.random.key(0))


def test_adapters_of_another_model(params: Any) -> None:
    wider = jax.eval_shape(lambda: init_params(dataclasses.replace(CONFIG, mlp_width=64), jax.random.key(0)))
    adapters = trained(params)
    with pytest.raises(ValueError, match=r"adapters of layers/down have the shapes .* belong to another model"):
        merge(wider, adapters, LORA)
    with pytest.raises(ValueError, match="and rank 8 need"):
        lora_student(STUDENT, params, LoraConfig(rank=8)).hidden(adapters, *inputs(make_batch()))
    with pytest.raises(
        ValueError, match=r"adapters hold layers/wide, which the model does not have. It has: .*layers/up"
    ):
        merge(params, {"layers": {"wide": adapters["layers"]["up"]}}, LORA)
    with pytest.raises(ValueError, match="The adapter tree is empty"):
        merge(params, {}, LORA)


def test_a_model_that_does_not_apply_the_adapters() -> None:
    student = Student.from_logits(lambda params, *_: params["query"]["kernel"])
    _, params, adapters, lora = identity(0.0)
    with pytest.raises(
        ValueError, match="The model does not apply the adapters of key, query: expected a Flax linen model"
    ):
        lora_student(student, params, lora).hidden(adapters, *[jnp.zeros((1, 2), jnp.int32)] * 3)


def test_bad_settings_of_the_step_are_errors_when_it_is_built() -> None:
    with pytest.raises(ValueError, match="micro_batches must be at least 1, got 0"):
        make_lora_step(lambda s: cotgrpo.make_sft_step(s, optax.sgd(0.1), micro_batches=0), STUDENT, LORA)
