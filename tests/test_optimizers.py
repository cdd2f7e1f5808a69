"""The optimizers: the schedule, labels, what is decayed and clipped, rounding of bfloat16, muon, schedule-free, and
every optimizer of optax in a train step.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import cotgrpo
from cotgrpo.models.decoder import DecoderConfig, init_params
from cotgrpo.models.lora import LoraConfig, init_lora
from cotgrpo.optimizers import (
    Optimizer,
    OptimizerConfig,
    clip_by_norm,
    decayed,
    gradient_params,
    lost_share,
    make_optimizer,
    param_labels,
    with_moving_average,
    with_rounding,
)
from cotgrpo.types import SftBatch, Student, TrainState

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


@pytest.mark.parametrize("name", get_args(Optimizer))
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
        ({"rounding": "up"}, r"rounding must be one of .*stochastic.* got 'up'"),
        ({"name": "schedule_free", "schedule": "linear"}, "schedule does not apply to schedule_free"),
        ({"name": "schedule_free", "b1": 0.0}, "b1 must be above 0 for schedule_free"),
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


# Labels.

DECODER = DecoderConfig(
    vocab_size=32, width=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=16, tied_head=False
)


def by_label(params: Any) -> dict[str, set[str]]:
    """Return {label: names of the leaves} of a tree."""
    found: dict[str, set[str]] = {}
    for path, label in jax.tree_util.tree_leaves_with_path(param_labels(params)):
        found.setdefault(label, set()).add("/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path))
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_labels_of_the_decoder(tied: bool) -> None:
    """All leaves of the layers have one axis more than they would have alone."""
    config = dataclasses.replace(DECODER, tied_head=tied, biases=("query", "key", "value"), qk_norm=True)
    params = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    kernels = {f"layers/{name}/kernel" for name in ("query", "key", "value", "out", "gate", "up", "down")}
    found = by_label(params)
    assert found["matrix"] == kernels
    assert found["embedding"] == ({"embedding"} if tied else {"embedding", "head"})
    assert found["bias"] == {f"layers/{name}/bias" for name in ("query", "key", "value")}
    assert found["norm"] == {name for name in names_in(params) if name.endswith("scale")} and len(found["norm"]) >= 5
    adapters = jax.eval_shape(functools.partial(init_lora, params, LoraConfig()), jax.random.key(0))
    assert by_label(adapters) == {"adapter": names_in(adapters)}


def names_in(params: Any) -> set[str]:
    return {name for names in by_label(params).values() for name in names}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(8, 4)(tokens)
        x = nn.LayerNorm()(x) + nn.MultiHeadDotProductAttention(2)(x)
        return nn.Dense(8, name="lm_head")(nn.RMSNorm()(nn.Dense(4)(x)))


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass
class Affine:
    """A layer whose leaves are attributes, as those of Equinox are."""

    weight: Any
    bias: Any = None


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass
class Module:
    embed: Affine
    ln1: Affine
    blocks: list[Affine]
    head: Affine


class Nnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed, self.norm = nnx.Embed(8, 4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)
        self.dense = nnx.Linear(4, 8, rngs=rngs)


def foreign_trees() -> dict[str, tuple[Any, dict[str, str]]]:
    """Return trees of other frameworks, and patterns of some of their leaves with the labels expected."""
    key = jax.random.key(0)
    square, wide, vector = jnp.zeros((4, 4)), jnp.zeros((8, 4)), jnp.zeros(4)
    module = Module(Affine(wide), Affine(vector, vector), [Affine(square, vector)], Affine(wide, jnp.zeros(8)))
    torch = dict.fromkeys(("model.layers.0.self_attn.q_proj.weight", "transformer.h.0.mlp.c_fc.weight"), (4, 4))
    torch |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"), (8, 4))
    torch |= dict.fromkeys(("model.layers.0.input_layernorm.weight", "model.norm.weight", "h.0.ln_1.weight"), (4,))
    torch |= {"model.layers.0.self_attn.q_proj.bias": (4,), "h.0.attn.q.lora_A.weight": (4, 2), "h.0.ln_1.bias": (4,)}
    return {
        "linen": (
            Linen().init(key, jnp.zeros((1, 3), jnp.int32)),
            {
                "Embed_0/embedding|lm_head/kernel": "embedding",
                "Norm_0/scale": "norm",
                "/bias": "bias",
                "(Dense_0|query|key|value|out)/kernel": "matrix",
            },
        ),
        "attributes": (
            module,
            {"^(embed|head)/weight": "embedding", "ln1/weight": "norm", "bias": "bias", "blocks.*weight": "matrix"},
        ),
        "nnx": (
            nnx.split(Nnx())[1],
            {"embed.*": "embedding", "norm/scale.*": "norm", "dense/bias.*": "bias", "dense/kernel.*": "matrix"},
        ),
        "torch": (
            {name: jnp.zeros(shape) for name, shape in torch.items()},
            {
                "(embed_tokens|lm_head|wte).weight": "embedding",
                "norm.weight|ln_1.weight": "norm",
                "bias": "bias",
                "(q_proj|c_fc).weight": "matrix",
                "lora_A": "adapter",
            },
        ),
        "plain": (
            {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4), "gamma": jnp.zeros((2, 4)), "temperature": jnp.zeros(())},
            {"^w$": "matrix", "^(b|temperature)$": "bias", "gamma": "norm"},
        ),
    }


@pytest.mark.parametrize("name", ["linen", "attributes", "nnx", "torch", "plain"])
def test_labels_of_foreign_trees(name: str) -> None:
    params, expected = foreign_trees()[name]
    labels = {leaf: label for label, leaves in by_label(params).items() for leaf in leaves}
    assert {label for label in labels.values()} == set(expected.values())
    for leaf, label in labels.items():
        assert [own for pattern, own in expected.items() if re.search(pattern, leaf)] == [label], leaf
    assert jax.tree.structure(param_labels(params)) == jax.tree.structure(params)


# Rounding.

LOW = ("adamw", "adafactor", "lion", "sgd", "muon", "schedule_free")
EDGES = (0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-37, np.inf, -np.inf)


def steps_of(tx: Any, params: Any, gradients: list[Any]) -> tuple[Any, Any]:
    """Return the parameters and the state after these gradients."""
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


def joined(top: Any, carry: Any) -> np.ndarray:
    """Return the float32 weights of which `top` are the upper bits and `carry` the rest."""
    return (np.asarray(top.astype(jnp.float32)).view(np.int32) + np.asarray(carry, np.int32)).view(np.float32)


@pytest.mark.parametrize("relative", [1e-4, 1e-5])
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_small_updates_arrive_in_the_mean(rounding: Any, relative: float, scale: float) -> None:
    """30 updates of this relative size, over weights of both signs and all mantissas; to nearest, all are lost."""
    size = 1 << 17
    start = (scale * np.geomspace(0.01, 3, size) * np.where(np.arange(size) % 2, 1, -1)).astype(jnp.bfloat16)
    params = {"kernel": jnp.asarray(start).reshape(256, -1)}
    moves = -relative * params["kernel"].astype(jnp.float32)  # towards zero, whatever the sign
    same = [{"kernel": moves}] * 30
    end, state = steps_of(with_rounding(optax.identity(), rounding), params, same)
    assert end["kernel"].dtype == jnp.bfloat16
    whole = (
        np.asarray(end["kernel"], np.float32) if state.carry is None else joined(end["kernel"], state.carry["kernel"])
    )
    change = (whole.astype(np.float64) / np.asarray(params["kernel"], np.float64) - 1).ravel()
    spread = change.std() / size**0.5
    for signed in (change, change[::2], change[1::2]):
        assert abs(signed.mean() + 30 * relative) < 6 * spread + 2e-3 * 30 * relative
    lost, _ = steps_of(with_rounding(optax.identity(), "nearest"), params, same)
    np.testing.assert_array_equal(lost["kernel"], params["kernel"])


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_edges_of_the_format(rounding: Any) -> None:
    """An update of zero changes nothing. Finite weights stay finite, infinite ones and NaN stay what they are."""
    weights = jnp.asarray([*EDGES, np.nan, 9e-41, 3.3895e38], jnp.bfloat16)
    tx = with_rounding(optax.identity(), rounding)
    still, _ = steps_of(tx, {"w": weights}, [{"w": jnp.zeros(weights.shape)}] * 3)
    np.testing.assert_array_equal(np.asarray(still["w"], np.float32)[:-2], np.asarray(weights, np.float32)[:-2])
    moved, _ = steps_of(tx, {"w": weights}, [{"w": 1e-3 * jnp.ones(weights.shape)}] * 5)
    np.testing.assert_array_equal(np.isfinite(moved["w"].astype(np.float32)), np.isfinite(weights.astype(np.float32)))
    assert np.isinf(np.asarray(moved["w"], np.float32)[[7, 8]]).all()
    np.testing.assert_allclose(np.asarray(moved["w"], np.float32)[:2], 5e-3, rtol=2e-2)
    broken, _ = steps_of(tx, {"w": weights}, [{"w": jnp.full(weights.shape, jnp.nan)}])
    assert np.isnan(np.asarray(broken["w"], np.float32)).all(), "a bad update is not hidden"


@pytest.mark.parametrize("name", LOW)
def test_compensated_sums_are_those_of_float32(name: Any) -> None:
    """The weight and its carry are the float32 weight, for any optimizer; a float32 leaf is left alone."""
    build = lambda rounding: make_optimizer(
        name, learning_rate=1e-4, total_steps=9, weight_decay=0.1, clip_norm=None, rounding=rounding
    )
    keys = [jax.random.key(number) for number in range(6)]
    low = {"kernel": jax.random.normal(keys[0], (4, 6, 8)).astype(jnp.bfloat16), "bias": jnp.ones(8)}
    gradients = [{"kernel": jax.random.normal(key, (4, 6, 8)), "bias": jnp.ones(8)} for key in keys[1:]]
    wide, _ = steps_of(build("nearest"), jax.tree.map(lambda x: x.astype(jnp.float32), low), gradients)
    got, state = steps_of(build("compensated"), low, gradients)
    # Two programs, in which XLA may fuse a product with a sum or not: the last bit of float32.
    np.testing.assert_allclose(joined(got["kernel"], state.carry["kernel"]), wide["kernel"], rtol=3e-7, atol=1e-8)
    np.testing.assert_allclose(got["bias"], wide["bias"], rtol=3e-7)
    assert state.carry["kernel"].dtype == jnp.int16 and state.carry["bias"] is None


@pytest.mark.parametrize("name", LOW)
def test_stochastic_rounding_moves_as_float32_in_the_mean(name: Any) -> None:
    """The mean over many equal weights is that of one float32 weight, for every optimizer; another seed differs."""
    build = lambda rounding: make_optimizer(name, learning_rate=1e-4, total_steps=9, clip_norm=None, rounding=rounding)
    low = {"kernel": jnp.ones((128, 128), jnp.bfloat16)}
    gradient = {"kernel": jnp.eye(128)} if name == "muon" else {"kernel": jnp.ones((128, 128))}
    wide, _ = steps_of(build("nearest"), {"kernel": jnp.ones((128, 128))}, [gradient] * 8)
    got, _ = steps_of(build("stochastic"), low, [gradient] * 8)
    again, _ = steps_of(build("stochastic"), low, [gradient] * 8)
    np.testing.assert_array_equal(got["kernel"], again["kernel"])
    asked = np.asarray(wide["kernel"], np.float64).mean() - 1
    change = np.asarray(got["kernel"], np.float64) - 1
    assert abs(change.mean() - asked) < 6 * change.std() / 128 and asked < 0 < np.abs(change).max()


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_a_resumed_run_rounds_alike(rounding: Any) -> None:
    tx = make_optimizer(learning_rate=1e-4, total_steps=9, rounding=rounding)
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (32, 32)).astype(jnp.bfloat16)}}
    gradients = [jax.tree.map(lambda x, n=n: jnp.sin(n + x), params) for n in range(6)]
    whole, _ = steps_of(tx, params, gradients)
    half, state = steps_of(tx, params, gradients[:3])
    half, state = jax.tree.map(np.asarray, (half, state))  # as from a checkpoint
    for gradient in gradients[3:]:
        updates, state = jax.jit(tx.update)(gradient, state, half)
        half = optax.apply_updates(half, updates)
    np.testing.assert_array_equal(half["a"]["kernel"], whole["a"]["kernel"])


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("spec", [(None, "fsdp", "data"), (None, ("data", "fsdp"), None), ("fsdp", None, "data")])
def test_sharded_weights_round_alike(rounding: Any, spec: Any) -> None:
    weights = jax.random.normal(jax.random.key(0), (4, 16, 8)).astype(jnp.bfloat16)
    mesh = cotgrpo.make_mesh(data=2, fsdp=4)
    spread = jax.device_put(weights, NamedSharding(mesh, PartitionSpec(*spec)))
    tx = with_rounding(optax.adamw(1e-4), rounding)
    whole, parts = (
        steps_of(tx, {"kernel": w}, [{"kernel": jnp.sin(9 * w)}] * 3)[0]["kernel"] for w in (weights, spread)
    )
    np.testing.assert_array_equal(whole, parts)
    assert np.mean(np.asarray(whole != weights)) > 0.02


def test_the_share_that_is_lost() -> None:
    """It is that of the weights which do not change, measured; the sentence in words has it and the way out."""
    weights = {"kernel": (0.02 * jax.random.normal(jax.random.key(0), (256, 256))).astype(jnp.bfloat16)}
    for size in (1e-6, 5e-6, 5e-5, 5e-4):
        changed = (weights["kernel"].astype(jnp.float32) + size).astype(jnp.bfloat16) != weights["kernel"]
        assert lost_share(weights, size) == pytest.approx(1 - float(changed.mean()), abs=0.01)
    assert 0.9 < lost_share(weights, 5e-6) < 0.94
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    assert lost_share(wide, 1e-6) == 0
    config = OptimizerConfig("adafactor", 5e-6)
    assert "about 92% of the updates are lost" in str(config.rounding_loss(weights))
    assert config.rounding_loss(wide) is None
    for rounding in ("stochastic", "compensated"):
        assert dataclasses.replace(config, rounding=rounding).rounding_loss(weights) is None
    assert "about 100%" in str(OptimizerConfig("sgd", 1e-4, b1=0.0).rounding_loss(weights))
    assert "smaller than 1/512" in str(OptimizerConfig("sgd", 1e-3, clip_norm=None).rounding_loss(weights))


# Muon.


def newton_schulz(gradient: np.ndarray) -> np.ndarray:
    """Return the gradient of one matrix, orthogonalized: the oracle in float64 (Jordan et al. 2024)."""
    x = gradient.T if gradient.shape[0] > gradient.shape[1] else gradient
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


def test_muon_orthogonalizes_each_layer_and_nothing_else() -> None:
    params = init_params(dataclasses.replace(DECODER, biases=("query",)), jax.random.key(0))
    for name in ("key", "value", "out", "gate", "up"):  # a wide and a tall kernel are enough to compile
        del params["layers"][name]
    keys = iter(jax.random.split(jax.random.key(1), 99))
    gradients = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    settings: dict[str, Any] = {"learning_rate": 0.1, "total_steps": 4, "schedule": "constant", "clip_norm": None}
    muon, adamw = (make_optimizer(name, weight_decay=0.5, **settings) for name in ("muon", "adamw"))
    got, rest = (jax.jit(tx.update)(gradients, tx.init(params), params)[0] for tx in (muon, adamw))
    for path, label in jax.tree_util.tree_leaves_with_path(param_labels(params)):
        at = functools.partial(functools.reduce, lambda tree, key: tree[key.key], path)
        update, weights, gradient = (np.asarray(at(tree), np.float64) for tree in (got, params, gradients))
        if label != "matrix":
            np.testing.assert_allclose(update, at(rest), rtol=1e-6, err_msg=str(path))
            continue
        for layer in range(DECODER.num_layers):
            # The first step's momentum, corrected for its start at zero, is 1 + ... times the gradient: a factor.
            own = 0.2 * max(gradient.shape[1:]) ** 0.5 * newton_schulz(gradient[layer])
            np.testing.assert_allclose(update[layer], -0.1 * (own + 0.5 * weights[layer]), atol=2e-5)


def test_muon_refuses_what_is_not_a_stack_of_matrices() -> None:
    """An attention kernel `[D, heads, H]` next to norms without a layer axis."""
    params = Linen().init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"muon needs matrices.*kernel with the shape \(4, 2, 2\)"):
        make_optimizer("muon", learning_rate=0.1, total_steps=4).init(params)


# Schedule-free.


def test_schedule_free_keeps_the_average_as_its_parameters() -> None:
    """Gradients are those of optax's own loop at y; the parameters are its `schedule_free_eval_params`."""
    rate, params = 0.05, {"kernel": jnp.asarray([[1.0, -2.0]]), "bias": jnp.asarray([3.0])}
    gradient = jax.grad(lambda p: sum(jnp.sum((leaf - 0.5) ** 2) for leaf in jax.tree.leaves(p)))
    theirs = optax.contrib.schedule_free_adamw(rate, b1=0.9, b2=0.95)
    ours = make_optimizer("schedule_free", learning_rate=rate, total_steps=60, clip_norm=None)
    y, x = params, params
    their_state, state = theirs.init(y), ours.init(x)
    for _ in range(12):
        updates, their_state = theirs.update(gradient(y), their_state, y)
        y = optax.apply_updates(y, updates)
        updates, state = ours.update(gradient(gradient_params(x, state)), state, x)
        x = optax.apply_updates(x, updates)
        want = optax.contrib.schedule_free_eval_params(their_state, y)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), x, want)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), gradient_params(x, state), y)
    assert optax.tree.get(state, "hyperparams")["learning_rate"] == pytest.approx(rate), "it does not fall"
    plain = make_optimizer(learning_rate=rate, total_steps=60)
    assert gradient_params(params, plain.init(params)) is params


# Every optimizer of optax.


NEEDS: dict[str, Callable[..., Any]] = {
    "sam": lambda make: make(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))),
    "mechanize": lambda make: make(optax.adam(0.1)),
    "schedule_free": lambda make: make(optax.sgd(0.1), learning_rate=0.1),
    "split_real_and_imaginary": lambda make: make(optax.adam(0.1)),
    "reduce_on_plateau": lambda make: optax.chain(optax.adam(0.1), make()),
    "normalize": lambda make: optax.chain(make(), optax.sgd(0.1)),
    "noisy_sgd": lambda make: make(0.1, key=jax.random.key(0)),
    "polyak_sgd": lambda make: make(),
    "dowg": lambda make: make(),
    "dog": lambda make: make(),
}
"""Arguments of those that do not take a learning rate alone."""

CANNOT: dict[str, str] = {
    "dpsgd": "It clips the gradient of every sequence by itself, and a step has the sum over the batch.",
    "differentially_private_aggregate": "The same: a part of dpsgd.",
    "hutchinson_estimator_diag_hessian": "A part of sophia: it estimates second derivatives and updates nothing.",
    "optimistic_adam": "optax has replaced it by optimistic_adam_v2.",
    "sophia": "It needs second derivatives. The tiled loss has its gradient in closed form, and no second one.",
    "schedule_free_eval_params": "It is not an optimizer: it reads the state of one.",
}
"""Why the others are not for a train step."""


def optimizers_of_optax() -> dict[str, Callable[..., Any]]:
    """Return the aliases and all of contrib that builds a transformation, without the parts `scale_by_...`."""
    return {
        name: function
        for module, home in ((optax, "optax._src.alias"), (optax.contrib, "optax.contrib"))
        for name, function in sorted(vars(module).items())
        if inspect.isfunction(function)
        and function.__module__.startswith(home)
        and not name.startswith(("_", "scale_by_"))
    }


FAST = (
    "polyak_sgd",
    "momo",
    "reduce_on_plateau",
    "sam",
    "prodigy",
    "dog",
    "schedule_free_adamw",
    "muon",
)  # the others are slow in sum
WHOLE = [
    pytest.param(name, micro_batches, marks=[] if micro_batches == 2 and name in FAST else pytest.mark.slow)
    for name in optimizers_of_optax()
    for micro_batches in (1, 2)
    if name not in CANNOT and (name, micro_batches) != ("lbfgs", 1)  # compiles for long
]


def tiny_student() -> tuple[Student, Any, SftBatch]:
    """Return a student with a stack of two layers, its parameters, and a batch."""

    def hidden(params: Any, tokens: Any, positions: Any, segment_ids: Any) -> Any:
        x = params["embedding"][tokens]
        for layer in range(2):
            x = x + jnp.tanh(x @ params["layers"]["kernel"][layer] + params["layers"]["bias"][layer][None, None])
        return x * params["norm"]["scale"][None, None]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embedding": 0.3 * jax.random.normal(keys[0], (16, 8)),
        "layers": {"kernel": 0.3 * jax.random.normal(keys[1], (2, 8, 8)), "bias": jnp.zeros((2, 8))},
        "norm": {"scale": jnp.ones(8)},
        "head": 0.3 * jax.random.normal(keys[2], (8, 16)),
    }
    tokens = np.arange(4 * 8, dtype=np.int32).reshape(4, 8) % 16
    same = {"positions": np.tile(np.arange(8, dtype=np.int32), (4, 1)), "segment_ids": np.ones((4, 8), np.int32)}
    mask = np.ones((4, 8), np.float32)
    return Student(hidden, lambda p: p["head"]), params, SftBatch(tokens, (tokens * 7 + 3) % 16, loss_mask=mask, **same)


@pytest.mark.parametrize(("name", "micro_batches"), WHOLE)
def test_every_optimizer_of_optax_in_a_donated_step(name: str, micro_batches: int) -> None:
    make = optimizers_of_optax()[name]
    tx = NEEDS.get(name, lambda make: make(learning_rate=0.1))(make)
    student, params, batch = tiny_student()
    state = TrainState.create(params=params, tx=tx, key=jax.random.key(0))
    step = cotgrpo.jit_step(cotgrpo.make_sft_step(student, tx, micro_batches=micro_batches))
    for _ in range(2):
        state, metrics = step(state, batch)
        assert metrics["skipped"].mean() == 0
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        assert np.isfinite(new).all() and new.dtype == old.dtype, "and the caller's own arrays can be read"
    assert optax.tree.norm(optax.tree.sub(state.params, params)) > 0


@pytest.mark.parametrize("name", ["prodigy", "dog", "sam"])
def test_nothing_of_a_state_is_shared(name: str) -> None:
    """Neither within the state nor with the caller, eagerly, traced, or on a mesh; `copy=False` moves the arrays."""
    tx = NEEDS.get(name, lambda make: make(learning_rate=0.1))(optimizers_of_optax()[name])
    weights, key = jnp.ones((8, 4)), jax.random.key(3)
    params = {"embedding": weights, "head": weights, "again": jax.device_put(weights, weights.sharding)}
    donate = jax.jit(lambda state: state.replace(step=state.step + 1), donate_argnums=0)
    create = functools.partial(TrainState.create, tx=tx)
    spread = jax.device_put(params, NamedSharding(cotgrpo.make_mesh(fsdp=8), PartitionSpec("fsdp")))
    traced = jax.jit(lambda params, key: create(params=params, key=key))
    states = (create(params=params, key=key), create(params=spread, key=key), traced(params, key))
    assert states[1].params["head"].sharding == spread["head"].sharding
    for state in (*states, jax.jit(lambda p: create(params=p, key=0, copy=False))(params)):
        assert int(donate(donate(state)).step) == 2
    assert float(params["head"].sum()) == float(spread["head"].sum()) == 32 and jax.random.uniform(key) >= 0
    moved = create(params={"embedding": weights}, key=key, copy=False)
    assert moved.params["embedding"] is weights and donate(moved).step == 1 and weights.is_deleted()


def test_the_table_names_every_optimizer_of_optax() -> None:
    """A new one is tried as it is; this fails if one of those in words is gone."""
    assert not ({*CANNOT, *NEEDS} - optimizers_of_optax().keys())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_moving_average_changes_no_update_and_is_kept_in_float32(dtype: Any) -> None:
    """Against NumPy over five steps. The third is skipped, and keeps the average."""
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    tokens = jnp.zeros((1, 2), jnp.int32)
    batch = SftBatch(tokens, tokens, tokens, tokens + 1, jnp.ones((1, 2)))
    rows = lambda p, tokens, *_: jnp.broadcast_to(p["kernel"][0].astype(jnp.float32), (*tokens.shape, 3))
    student, plain = Student.from_logits(rows), optax.adam(0.1)
    averaged = with_moving_average(plain, 0.75)
    steps = [jax.jit(cotgrpo.make_sft_step(student, tx)) for tx in (plain, averaged)]
    states = [TrainState.create(params=params, tx=tx, key=0) for tx in (plain, averaged)]
    want = np.asarray(params["kernel"], np.float64)
    for number in range(5):
        loss_mask = jnp.full((1, 2), jnp.nan if number == 2 else 1.0)
        states = [step(s, batch.replace(loss_mask=loss_mask))[0] for step, s in zip(steps, states, strict=True)]
        jax.tree.map(np.testing.assert_array_equal, states[0].params, states[1].params)
        if number != 2:
            want = 0.75 * want + 0.25 * np.asarray(states[1].params["kernel"], np.float64)
        average = states[1].opt_state.average
        assert {leaf.dtype for leaf in jax.tree.leaves(average)} == {jnp.dtype(jnp.float32)}
        # XLA may average bfloat16 parameters before it rounds them.
        np.testing.assert_allclose(average["kernel"], want, rtol=1e-6 if dtype == jnp.float32 else 4e-3)
    assert np.any(np.asarray(average["kernel"]) != np.asarray(states[1].params["kernel"], np.float32))
