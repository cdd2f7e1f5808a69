"""A mixture of experts against NumPy: results, gradients, ties, loads of every kind, meshes, and what it costs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import cotgrpo
from cotgrpo.config import ConfigError, StudentConfig
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import Decoder, decode, init_cache, init_params, make_student
from cotgrpo.models.layers.experts import (
    Experts,
    Load,
    balance_loss,
    load_metrics,
    make_plan,
    mixture_of_experts,
    route,
)
from cotgrpo.models.layers.pattern import LayerKind
from cotgrpo.models.lora import LoraConfig, init_lora, lora_student
from cotgrpo.optimizers import make_optimizer
from cotgrpo.optimizers.labels import param_labels
from cotgrpo.planning.hlo import collectives
from cotgrpo.sharding import check_mesh, constrain, state_sharding, traced_on
from cotgrpo.types import SftBatch, TrainState

PLAIN = Experts(number=5, chosen=2, width=6)
CASES: dict[str, Experts] = {
    "plain": PLAIN,
    "weights_of_all": dataclasses.replace(PLAIN, normalized=False),
    "every_expert": Experts(number=4, chosen=4, width=3, normalized=False),
    "one_expert": Experts(number=1, chosen=1, width=3),
    "more_experts_than_pairs": Experts(number=50, chosen=2, width=4),
    "clipped_with_biases": Experts(number=5, chosen=2, width=6, biases=True, limit=0.4, gate_slope=1.7),
}
B, T, D = 2, 9, 8


def random_params(experts: Experts, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in experts.shapes(D).items()}


def random_rows(seed: int = 1, rows: int = B) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, T, D)), jnp.float32)


def biases_of(params: Any, name: str) -> np.ndarray:
    return params.get(f"{name}_bias", np.zeros((len(params[name]), 1)))


def in_numpy(experts: Experts, params: Any, x: np.ndarray) -> np.ndarray:
    """Token by token and expert by expert, in float64."""
    p = {name: np.float64(value) for name, value in params.items()}
    rows = np.float64(x).reshape(-1, x.shape[-1])
    total = np.zeros_like(rows)
    for n, row in enumerate(rows):
        logits = row @ p["router"] + p.get("router_bias", 0.0)
        chosen = np.argsort(-logits, kind="stable")[: experts.chosen]
        among = chosen if experts.normalized else np.arange(experts.number)
        for e in chosen:
            weight = np.exp(logits[e] - logits.max()) / np.exp(logits[among] - logits.max()).sum()
            gate, up = (
                row @ p[name][e] + p.get(f"{name}_bias", np.zeros((experts.number, 1)))[e] for name in ("gate", "up")
            )
            if experts.limit is not None:
                gate, up = np.minimum(gate, experts.limit), np.clip(up, -experts.limit, experts.limit)
                h = gate / (1 + np.exp(-experts.gate_slope * gate)) * (up + 1)
            else:
                h = gate / (1 + np.exp(-gate)) * up
            total[n] += weight * (h @ p["down"][e] + biases_of(p, "down")[e])
    return total.reshape(x.shape)


def value(experts: Experts, params: Any, x: jax.Array) -> jax.Array:
    return mixture_of_experts(experts, "silu", params, x, jnp.ones(x.shape[:2], bool))[0]


@pytest.mark.parametrize("products", ["blocks", "ragged"])
@pytest.mark.parametrize("case", CASES)
def test_the_mixture_in_numpy(case: str, products: Any) -> None:
    experts = dataclasses.replace(CASES[case], products=products)
    params, x = random_params(experts), random_rows()
    got = jax.jit(functools.partial(value, experts))(params, x)
    np.testing.assert_allclose(got, in_numpy(experts, params, np.asarray(x)), atol=2e-5)


@pytest.mark.parametrize("products", ["blocks", "ragged"])
@pytest.mark.parametrize("case", ["plain", "weights_of_all", "clipped_with_biases"])
def test_gradients_by_differences(case: str, products: Any) -> None:
    """Along random directions of every parameter and of the tokens, against central differences in NumPy."""
    experts = dataclasses.replace(CASES[case], products=products)
    params, x = random_params(experts), random_rows()
    slopes = np.random.default_rng(2).normal(size=x.shape)
    loss = lambda params, x: jnp.sum(value(experts, params, x) * slopes)
    grads, dx = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    rng, step = np.random.default_rng(3), 1e-6

    def slope_along(name: str | None, direction: np.ndarray) -> float:
        def at(sign: int) -> float:
            moved = {k: np.float64(v) + (sign * step * direction if k == name else 0) for k, v in params.items()}
            rows = np.float64(x) + (sign * step * direction if name is None else 0)
            return float(np.sum(in_numpy(experts, moved, rows) * slopes))

        return (at(1) - at(-1)) / (2 * step)

    for name, grad in [*grads.items(), (None, dx)]:
        direction = rng.normal(size=grad.shape)
        assert float(np.sum(grad * direction)) == pytest.approx(slope_along(name, direction), rel=2e-3, abs=1e-3), name


def test_ties_go_to_the_first_experts() -> None:
    """Equal logits: the experts of lower numbers, with equal weights."""
    experts = Experts(number=6, chosen=3, width=2)
    _, weights, chosen = route(experts, jnp.ones((4, D)), jnp.zeros((D, 6)), None)
    np.testing.assert_array_equal(chosen, np.tile([0, 1, 2], (4, 1)))
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("products", ["blocks", "ragged"])
def test_an_expert_that_no_token_chooses(products: Any) -> None:
    """All tokens go to two of five experts. The others change nothing and get no gradient, and nothing is NaN."""
    experts = dataclasses.replace(CASES["clipped_with_biases"], products=products)
    params = random_params(experts) | {"router_bias": jnp.array([-100.0, 0.0, -100.0, 0.0, -100.0])}
    x = random_rows()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(value(experts, p, x) ** 2)))(params)
    spoiled = {
        name: v if name.startswith("router") else v.at[jnp.array([0, 2, 4])].set(7e7) for name, v in params.items()
    }
    np.testing.assert_array_equal(value(experts, spoiled, x), value(experts, params, x))
    for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
        moved = np.abs(np.asarray(grads[name])).reshape(5, -1).max(axis=1)
        assert np.isfinite(moved).all() and (moved[[0, 2, 4]] == 0).all() and (moved[[1, 3]] > 0).all(), name


@pytest.mark.parametrize(("number", "block"), [(5, 1), (5, 8), (3, 8), (8, 4)])
def test_a_plan_has_every_pair_once_and_in_its_experts_rows(number: int, block: int) -> None:
    """Pairs of experts that the device lacks get no row."""
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(8)[:3] for _ in range(40)]) - 1  # of experts -1..6
    plan = make_plan(jnp.asarray(chosen, jnp.int32), number, block)
    rows, pairs, sizes = np.asarray(plan.rows).reshape(-1), np.asarray(plan.pairs), np.asarray(plan.sizes)
    flat, here = chosen.reshape(-1), (chosen.reshape(-1) >= 0) & (chosen.reshape(-1) < number)
    assert (sizes % block == 0).all() and len(pairs) % block == 0
    assert (rows[~here] == len(pairs)).all() and len(set(rows[here])) == here.sum() == (pairs < len(flat)).sum()
    np.testing.assert_array_equal(pairs[rows[here]], np.flatnonzero(here))
    starts = np.cumsum(sizes) - sizes
    assert ((rows[here] >= starts[flat[here]]) & (rows[here] < (starts + sizes)[flat[here]])).all()
    np.testing.assert_array_equal(np.asarray(plan.expert_of_row)[rows[here]], flat[here])


def test_the_load_counts_real_tokens_only() -> None:
    experts = PLAIN
    params, x = random_params(experts), random_rows()
    real = np.random.default_rng(0).random((B, T)) < 0.6
    _, load = mixture_of_experts(experts, "silu", params, x, jnp.asarray(real))
    logits = np.float64(x) @ np.float64(params["router"])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-logits, axis=-1)[..., :2][real]
    np.testing.assert_array_equal(load.tokens, np.bincount(chosen.reshape(-1), minlength=5))
    np.testing.assert_allclose(load.probabilities, probabilities[real].sum(0), rtol=1e-5)


def test_the_balance_loss_and_the_metrics_by_hand() -> None:
    """Two layers of two experts and four tokens: an even load costs K, all on one expert E."""
    experts = Experts(number=2, chosen=1, width=1)
    even, one = jnp.array([[2.0, 2.0]] * 2), jnp.array([[4.0, 0.0]] * 2)
    assert float(balance_loss(experts, even, even)) == pytest.approx(1.0)
    assert float(balance_loss(experts, one, one)) == pytest.approx(2.0)
    assert load_metrics(even) == {"expert_share_max": 0.5, "expert_entropy": pytest.approx(1.0)}
    assert load_metrics(one) == {"expert_share_max": 1.0, "expert_entropy": 0.0}
    assert load_metrics(jnp.zeros((1, 3))) == {"expert_share_max": 0.0, "expert_entropy": 0.0}


def test_the_balance_loss_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    experts, rng = Experts(number=5, chosen=2, width=1), np.random.default_rng(0)
    logits, real = rng.normal(size=(3, B * T, 5)).astype(np.float32), rng.random((B, T)) < 0.7
    loads = []
    for own in logits:
        chosen = jax.lax.top_k(jnp.asarray(own), 2)[1]
        flat = real.reshape(-1)
        tokens = np.bincount(np.asarray(chosen)[flat].reshape(-1), minlength=5)
        loads.append((tokens, np.asarray(jax.nn.softmax(own, axis=-1))[flat].sum(0)))
    tokens, probabilities = (jnp.asarray(np.stack(part), jnp.float32) for part in zip(*loads, strict=True))
    want = mixtral.load_balancing_loss_func(tuple(map(torch.tensor, logits)), 5, 2, torch.tensor(real))
    assert float(balance_loss(experts, tokens, probabilities)) == pytest.approx(float(want), rel=1e-5)


# Every option at once, a dense layer among three, and sinks.
FULL = DecoderConfig(
    vocab_size=64,
    width=16,
    num_layers=3,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    mlp_width=16,
    experts=Experts(number=8, chosen=3, width=8, biases=True, shared=True, shared_gate=True, balance_weight=0.1),
    layer_kinds=(LayerKind(mlp="experts"), LayerKind(mlp="dense"), LayerKind(mlp="experts")),
    sinks=True,
    init_scale=0.3,
)
ALIKE = dataclasses.replace(FULL, mlp="experts", layer_kinds=None)


def tokens_of(config: DecoderConfig, rows: int = 16, length: int = 8) -> tuple[np.ndarray, ...]:
    """Two documents a row, then padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    segments = np.tile(np.repeat([1, 2, 0], [3, length - 4, 1]), (rows, 1)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(3), np.arange(length - 4), [0]]), (rows, 1)).astype(np.int32)
    return tokens, positions, segments


def test_packed_documents_equal_separate_ones() -> None:
    params = init_params(FULL, jax.random.key(0))
    logits = jax.jit(make_student(FULL).logits)
    tokens, positions, segments = tokens_of(FULL, 2)
    packed = logits(params, tokens, positions, segments)
    for segment in (1, 2):
        own = segments[0] == segment
        apart = logits(params, tokens[:, own], positions[:, own], segments[:, own])
        np.testing.assert_allclose(packed[:, own], apart, atol=2e-5)


@pytest.mark.parametrize("config", [ALIKE, FULL], ids=["alike", "mixed"])
def test_decode_agrees_with_the_whole_pass(config: DecoderConfig) -> None:
    """Prefill of 5, then token by token, with the second row padded on the left."""
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)
    segments = np.ones((2, 9), np.int32)
    segments[1, :3] = 0
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    whole = jax.jit(make_student(config).rows)(params, tokens, positions, segments)
    cache, rows, read = init_cache(config, 2, 9), [], jax.jit(functools.partial(decode, config))
    for start, end in [(0, 5), *((t, t + 1) for t in range(5, 9))]:
        part = slice(start, end)
        hidden, cache = read(params, tokens[:, part], positions[:, part], segments[:, part], cache, start)
        rows.append(hidden)
    real = segments > 0
    np.testing.assert_allclose(jnp.concatenate(rows, axis=1)[real], whole[real], atol=2e-5)


@pytest.mark.parametrize("config", [ALIKE, FULL], ids=["alike", "mixed"])
def test_num_params_counts_the_leaves_and_the_active_ones(config: DecoderConfig) -> None:
    leaves = jax.tree.leaves(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    assert config.num_params() == sum(leaf.size for leaf in leaves)
    layers = sum(layer.mlp == "experts" for layer in config.layers)
    assert config.num_params() - config.num_active_params() == layers * 5 * (3 * 16 * 8 + 2 * 8 + 16)


def test_labels_of_every_leaf() -> None:
    """Weight decay leaves biases, norms, sinks and the gate of the shared MLP alone; muon sees matrices of experts."""
    params = init_params(ALIKE, jax.random.key(0))
    labels = param_labels(params)["layers"]
    assert {name for name, label in labels["experts"].items() if label == "matrix"} == {"router", "gate", "up", "down"}
    assert labels["sinks"] == labels["experts"]["shared_gate"] == "bias"
    tx = make_optimizer("muon", learning_rate=1e-2, total_steps=3)
    updates = jax.jit(lambda p: tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)[0])(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("kinds", [None, ("experts", "experts", "dense", "experts")])
def test_the_program_does_not_grow_with_depth(kinds: tuple[str, ...] | None) -> None:
    """Equations of the gradient of 32 layers and of four."""

    def size(num_layers: int) -> int:
        own = None if kinds is None else tuple(LayerKind(mlp=kind) for kind in kinds) * (num_layers // 4)
        config = dataclasses.replace(ALIKE if kinds is None else FULL, num_layers=num_layers, layer_kinds=own)
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        loss = lambda p: jnp.sum(make_student(config).rows(p, *tokens_of(config, 2)))
        return len(str(jax.make_jaxpr(jax.grad(loss))(params)).splitlines())

    assert size(32) <= 1.05 * size(4)


def test_a_dense_decoder_sows_and_pays_nothing() -> None:
    config = dataclasses.replace(ALIKE, mlp="dense", experts=None, sinks=False)
    student, params = make_student(config), jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert not student.has_aux
    text = str(jax.make_jaxpr(lambda p: student.rows(p, *tokens_of(config, 2)))(params))
    assert " sort[" not in text and "top_k" not in text and "ragged" not in text
    sown = jax.eval_shape(
        lambda p: Decoder(config).apply({"params": p}, *tokens_of(config, 2), mutable=["load"]), params
    )
    assert not jax.tree.leaves(sown[1])


def sft_batch(seed: int) -> SftBatch:
    tokens, positions, segments = tokens_of(FULL)
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 64, tokens.shape).astype(np.int32)
    return SftBatch(tokens, targets, positions, segments, (segments > 0).astype(np.float32))


def train(
    config: DecoderConfig, mesh: Any = None, remat: str = "dots", dtype: str = "float32"
) -> tuple[Any, list[dict]]:
    """Return parameters after two steps, and the metrics of each."""
    config = dataclasses.replace(config, remat=remat, dtype=dtype)
    tx = optax.sgd(0.3, momentum=0.9)
    step = cotgrpo.jit_step(cotgrpo.make_sft_step(make_student(config), tx, tile_size=8), mesh=mesh)
    state, found = TrainState.create(params=init_params(config, jax.random.key(1)), tx=tx, key=5), []
    for seed in range(2):
        state, metrics = step(state, sft_batch(seed))
        found.append({name: metric.mean() for name, metric in metrics.items()})
    return jax.device_get(state.params), found


on_one_device = functools.cache(train)
MESHES: dict[str, dict[str, int]] = {
    "expert": {"expert": 8},
    "expert-fsdp-tensor": {"expert": 2, "fsdp": 2, "tensor": 2},
    "data-expert": {"data": 2, "expert": 4},
    "expert-context": {"expert": 2, "context": 2, "fsdp": 2},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "context-data": {"context": 4, "data": 2},
}


FAST = ("expert", "expert-fsdp-tensor")


@pytest.mark.parametrize(
    "mesh", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_a_layer_on_eight_devices(mesh: str) -> None:
    """Result, load and gradients of one layer, with biases and a clipped activation."""
    experts = Experts(number=8, chosen=3, width=8, biases=True, limit=1.0, gate_slope=1.2)
    params, x = random_params(experts), jnp.asarray(np.random.default_rng(1).normal(size=(8, 8, D)), jnp.float32)
    real = jnp.asarray(np.random.default_rng(2).random((8, 8)) < 0.8)

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Load]:
        y, load = mixture_of_experts(experts, "silu", params, constrain(x, "BTD"), real)
        return jnp.sum(jnp.sin(y)) + balance_loss(experts, load.tokens[None], load.probabilities[None]), load

    both = jax.value_and_grad(loss, (0, 1), has_aux=True)
    own = cotgrpo.make_mesh(**MESHES[mesh])
    places = state_sharding({"experts": params}, own)["experts"], NamedSharding(own, PartitionSpec())
    got = jax.jit(traced_on(own, both), in_shardings=places)(params, x)
    for here, there in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(both)(params, x)), strict=True):
        np.testing.assert_allclose(here, there, atol=2e-5 * float(np.abs(there).max()))


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        pytest.param(ALIKE, "expert-fsdp-tensor", id="alike"),
        pytest.param(FULL, "expert-context", id="mixed", marks=pytest.mark.slow),
        pytest.param(FULL, "fsdp", id="mixed-fsdp", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_train_as_one(config: DecoderConfig, mesh: str) -> None:
    """Loss, metrics of the load, and every parameter, which all learn."""
    want, want_metrics = on_one_device(config)
    got, got_metrics = train(config, cotgrpo.make_mesh(**MESHES[mesh]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), got, want)
    for here, there in zip(got_metrics, want_metrics, strict=True):
        assert here.keys() == there.keys() >= {"aux_loss", "expert_balance", "expert_share_max", "expert_entropy"}
        for name, number in there.items():
            assert here[name] == pytest.approx(number, abs=1e-5, rel=1e-5), name
    start = init_params(config, jax.random.key(1))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), want, jax.device_get(start))
    assert min(jax.tree.leaves(moved)) > 1e-5, "every parameter learns, or their equality shows nothing"


def test_the_balance_loss_is_off_by_default_and_measured() -> None:
    """Then `aux_loss` is 0, and the metric is there."""
    assert ALIKE.experts is not None
    off = dataclasses.replace(ALIKE, experts=dataclasses.replace(ALIKE.experts, balance_weight=0.0))
    _, metrics = on_one_device(off)
    assert metrics[0]["aux_loss"] == 0 and metrics[0]["expert_balance"] > 2.9
    _, weighted = on_one_device(ALIKE)
    assert weighted[0]["aux_loss"] == pytest.approx(0.1 * weighted[0]["expert_balance"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full", "qkv_proj,gate_proj,up_proj"])
def test_remat_changes_nothing(remat: str) -> None:
    want, _ = on_one_device(ALIKE)
    got, _ = train(ALIKE, remat=remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), got, want)


@pytest.mark.slow
def test_bfloat16_is_near_float32() -> None:
    """The router is float32 in both, and trains."""
    _, want = on_one_device(ALIKE)
    _, got = train(ALIKE, dtype="bfloat16")
    assert got[1]["loss"] == pytest.approx(want[1]["loss"], rel=0.02)
    assert got[0]["expert_balance"] == pytest.approx(want[0]["expert_balance"], rel=0.03)


def test_what_travels_over_the_expert_axis() -> None:
    """The tokens of a layer, once each way in each pass; never an expert."""
    experts = Experts(number=8, chosen=3, width=64)
    mesh, params = cotgrpo.make_mesh(expert=8), random_params(experts)
    places = state_sharding({"layers": {"experts": params}}, mesh)["layers"]["experts"]
    places |= {name: NamedSharding(mesh, PartitionSpec("expert")) for name in ("gate", "up", "down")}
    rows = NamedSharding(mesh, PartitionSpec("expert"))
    run = lambda params, x: value(experts, params, constrain(x, "BTD"))
    compiled = jax.jit(traced_on(mesh, run), in_shardings=(places, rows), out_shardings=rows)
    found = collectives(compiled.lower(params, random_rows(rows=16)).compile().as_text())
    largest = 16 * T * D * 4  # all tokens
    assert found and all(own.bytes <= largest for own in found), found


def test_the_mesh_has_the_axis_only_if_it_splits_something() -> None:
    assert cotgrpo.make_mesh(data=8).axis_names == ("data", "fsdp", "tensor", "context")
    assert cotgrpo.make_mesh(data=2, expert=4).shape["expert"] == 4
    shape = cotgrpo.make_mesh(expert=8).shape
    with pytest.raises(ValueError, match=r"expert=8 does not divide the model's experts.number, 5"):
        check_mesh(shape, dataclasses.asdict(dataclasses.replace(ALIKE, experts=PLAIN)))
    check_mesh(shape, dataclasses.asdict(FULL))
    check_mesh(shape, dataclasses.asdict(dataclasses.replace(ALIKE, mlp="dense", experts=None)))


def test_adapters_go_to_attention_and_the_shared_mlp() -> None:
    config = dataclasses.replace(ALIKE, experts=PLAIN)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    adapters = jax.eval_shape(lambda p: init_lora(p, LoraConfig(rank=2), jax.random.key(0)), params)
    assert set(adapters["layers"]) == {"query", "key", "value", "out"}
    with pytest.raises(ValueError, match=r"'experts/up' matches no projection .*: layers/key, .* have no adapters"):
        init_lora(params, LoraConfig(targets=("experts/up",)), jax.random.key(0))
    whole = init_params(ALIKE, jax.random.key(0))
    student, lora = make_student(ALIKE), LoraConfig(rank=2)
    adapted = lora_student(student, whole, lora)
    trained = init_lora(whole, lora, jax.random.key(1))
    assert set(trained["layers"]) == {"query", "key", "value", "out", "gate", "up", "down"}
    batch = tokens_of(ALIKE, 2)
    np.testing.assert_allclose(adapted.rows(trained, *batch), student.rows(whole, *batch), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": 0}, "Experts.number must be at least 1, got 0"),
        ({"chosen": 6}, r"Experts.chosen must be at most number \(5\), got 6"),
        ({"limit": 0.0}, "Experts.limit must be positive or None, got 0.0"),
        ({"balance_weight": -1.0}, "Experts.balance_weight must be at least 0, got -1.0"),
        ({"products": "dense"}, "Experts.products must be one of"),
        ({"shared_gate": True}, "Experts.shared_gate needs shared"),
    ],
)
def test_bad_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **change)


def test_bad_settings_of_a_student() -> None:
    with pytest.raises(ValueError, match="mlp 'experts' needs experts, but it is None"):
        dataclasses.replace(ALIKE, experts=None)
    with pytest.raises(ValueError, match="experts have a gate, which the activation 'relu2' lacks"):
        dataclasses.replace(ALIKE, activation="relu2")
    with pytest.raises(ConfigError, match="balance_weight must be at least 0"):
        StudentConfig(balance_weight=-0.1)
    dense = dataclasses.replace(ALIKE, mlp="dense", experts=None)
    with pytest.raises(ConfigError, match=r"student.balance_weight is 0.1, but the student has no experts"):
        StudentConfig(balance_weight=0.1).computed(dense, "cpu")
    computed = StudentConfig(balance_weight=0.1).computed(ALIKE, "tpu").experts
    assert computed is not None and computed.balance_weight == 0.1 and computed.products == "ragged"


def test_the_load_is_a_pair_of_sums() -> None:
    assert Load._fields == ("tokens", "probabilities")
