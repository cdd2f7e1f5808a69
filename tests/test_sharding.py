"""Eight devices equal one: losses, metrics and parameters on every mesh. What a mesh refuses, and what travels."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import cotgrpo
from cotgrpo.ghosts.live import reply_rewards, reweighted
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.models.lora import LoraConfig, init_lora, make_lora_step
from cotgrpo.objectives import Nll, Pair
from cotgrpo.objectives.divergences import ForwardKl, ReferenceKl
from cotgrpo.planning.hlo import collectives
from cotgrpo.planning.tpu_compile import no_compilation_cache
from cotgrpo.rollouts.on_policy import make_draw
from cotgrpo.sampling import Prompts, SamplingSettings, make_sampler, pad_prompts
from cotgrpo.sharding import check_batch, check_mesh, constrain, jit_eval, mesh_shape, state_sharding, traced_on
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
    vocab_size=64,
    width=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    mlp_width=48,
    tied_head=False,
    remat="full",
    init_scale=0.2,
)
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
TOP_K = 5


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
    if not ghosts:
        return SftBatch(tokens, targets, positions, segments, mask)
    q = rng.dirichlet(np.ones(60), (B, T)).astype(np.float32)
    top = np.argsort(-q, axis=-1)[..., :TOP_K]
    log_q = np.log(np.take_along_axis(q, top, -1))
    return GhostBatch(
        tokens, targets, positions, segments, mask, extra={"top_ids": top.astype(np.int32), "top_log_probs": log_q}
    )


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
    start = init_params(config, jax.random.key(1))
    start = init_lora(start, LORA, jax.random.key(3)) if options.get("lora") else start
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), want, jax.device_get(start))
    assert min(jax.tree.leaves(moved)) > 1e-3, "every parameter learns, or their equality shows nothing"


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), got, want)


DRAWN = Pair(estimator="drawn", samples=2)


@pytest.mark.parametrize("mesh", [MIXED, pytest.param("fsdp-tensor", marks=pytest.mark.slow)])
def test_grpo_with_drawn_tokens(mesh: str) -> None:
    """With gradients accumulated over two micro-batches: the same tokens are drawn, whatever the shard."""
    assert_same(TIED, DRAWN, mesh, micro_batches=2)


@pytest.mark.parametrize("mesh", ["context", pytest.param("data", marks=pytest.mark.slow)])
def test_sft(mesh: str) -> None:
    assert_same(PLAIN, Nll(), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MIXED, "tensor"])
def test_forward_kl(mesh: str) -> None:
    assert_same(TIED, ForwardKl(TOP_K), mesh, micro_batches=2)


@pytest.mark.slow
def test_layers_inputs_in_the_hosts_memory() -> None:
    assert_same(dataclasses.replace(TIED, remat="offload"), Nll(), MIXED, micro_batches=2)


def test_grpo_near_a_reference_with_lora() -> None:
    assert_same(PLAIN, ReferenceKl(Pair(), 0.3), MIXED, lora=True, micro_batches=2)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("config", "objective", "options"),
    [
        pytest.param(TIED, Nll(), {"micro_batches": 2}, id="sft"),
        pytest.param(PLAIN, Pair(), {"micro_batches": 2}, id="exact"),
        pytest.param(TIED, DRAWN, {"lora": True, "micro_batches": 2}, id="drawn-lora"),
    ],
)
def test_every_mesh(mesh: str, config: DecoderConfig, objective: Any, options: dict[str, Any]) -> None:
    assert_same(config, objective, mesh, **options)


@pytest.mark.parametrize("mesh", [MIXED, pytest.param("tensor", marks=pytest.mark.slow)])
def test_generation_and_evaluation(mesh: str) -> None:
    """Replies drawn with a temperature, their log-probabilities, and held-out metrics."""
    params = init_params(TIED, jax.random.key(1))
    rng = np.random.default_rng(0)
    prompts = pad_prompts([rng.integers(0, 60, n).astype(np.int32) for n in (3, 8, 5, 1, 7, 7, 2, 6)])
    settings = SamplingSettings(12, eos_ids=tuple(range(8)), temperature=0.7)
    sample, in_slots = (make_sampler(TIED, settings, 60, slots) for slots in (None, 4))
    evaluate = cotgrpo.make_eval_step(make_student(TIED, 60), Pair())
    where = cotgrpo.make_mesh(**MESHES[mesh])
    want = jax.device_get(jit_eval(sample)(params, prompts, jax.random.key(0)))
    got = jax.device_get(jit_eval(sample, where)(params, prompts, jax.random.key(0)))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-5)
    assert len(set(want.lengths)) > 1, "rows end at different times"
    got = jax.device_get(jit_eval(in_slots, where)(params, prompts, jax.random.key(0)))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    batch = make_batch(0, False)
    one, many = (jit_eval(evaluate, mesh)(params, batch) for mesh in (None, where))
    for name, metric in one.items():
        assert many[name].mean() == pytest.approx(metric.mean(), rel=1e-5), name


@pytest.mark.parametrize(
    "mesh", [MIXED, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("data", "fsdp", "tensor", "context"))]
)
def test_rollouts(mesh: str) -> None:
    """Replies, ghosts drawn from a teacher of another shape that reads longer prompts, and weights of a later use."""
    student, teacher = make_student(TIED, 60), make_student(PLAIN, 60)
    models = init_params(TIED, jax.random.key(1)), init_params(PLAIN, jax.random.key(2))
    rng = np.random.default_rng(0)
    prompts, reads = (
        pad_prompts([rng.integers(0, 60, n).astype(np.int32) for n in lengths], length=12)
        for lengths in ((3, 8, 5, 1, 7, 7, 2, 6), (5, 9, 6, 4, 8, 8, 3, 7))
    )
    sample = make_sampler(TIED, SamplingSettings(12, eos_ids=tuple(range(8)), temperature=0.7), 60)
    draw = make_draw(sample, teacher, drawn_ghosts=True)
    own = np.ones((8, 1), bool)
    again = lambda params, held: reweighted(student, params, *held, own, 0.2)

    def rolled(mesh: Any = None) -> Any:
        batch, replies, log_probs = jit_eval(draw, mesh)(models, (prompts, reads, None), jax.random.key(0))
        later = jax.tree.map(lambda x: 1.1 * x, models[0])
        weights = jit_eval(again, mesh)(later, (batch, log_probs)).loss_mask
        rewards = jit_eval(functools.partial(reply_rewards, student), mesh)(models[0], batch)
        return jax.device_get((batch, replies.tokens, (log_probs, weights, rewards)))

    where = cotgrpo.make_mesh(**MESHES[mesh])
    (batch, tokens, floats), (their_batch, their_tokens, theirs) = rolled(where), rolled()
    np.testing.assert_array_equal(tokens, their_tokens)
    jax.tree.map(np.testing.assert_array_equal, batch, their_batch)
    for ours, one in zip(floats, theirs, strict=True):
        np.testing.assert_allclose(ours, one, atol=1e-5)
    assert len(set(floats[1][batch.loss_mask != 0].round(3).tolist())) > 5


def test_slots_stay_where_they_are() -> None:
    """In the compiled text: nothing travels while tokens are decoded. Between, the next prompts do, but no cache."""
    prompts = Prompts(np.ones((64, 24), np.int32), np.full(64, 24, np.int32))
    sample = make_sampler(PLAIN, SamplingSettings(40, eos_ids=(0,), temperature=1.0), decode_batch_size=32)
    mesh = cotgrpo.make_mesh(data=8)
    spread = lambda params, prompts, key: sample(
        params, jax.tree.map(lambda x: constrain(x, "BT"[: x.ndim]), prompts), key
    )
    whole = jax.sharding.NamedSharding(mesh, P())
    params = jax.device_put(init_params(PLAIN, jax.random.key(0)), whole)
    compiled = jax.jit(traced_on(mesh, spread), out_shardings=whole).lower(params, prompts, jax.random.key(0))
    found = collectives(compiled.compile().as_text())
    assert [c for c in found if c.loops.count(None) == 1], "the loop in which prompts are read"
    assert not [c for c in found if c.loops.count(None) > 1], (
        "the loop over tokens, whose condition alone asks all devices"
    )
    group = 8 * 24 * PLAIN.num_kv_heads * PLAIN.head_dim  # a layer's keys of one prompt a device
    assert max(math.prod(shape) for c in found for _, shape in c.arrays) == group


WIDE = DecoderConfig(
    vocab_size=2_048, width=256, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=32, tied_head=False
)  # fmt: skip
TILE = 16


def compiled_text(devices: Any, objective: Any, micro_batches: int, **sizes: int) -> str:
    """The program of a train step of `WIDE` for these devices, from shapes alone."""
    shape = mesh_shape(sizes, len(devices))
    mesh = Mesh(np.array(devices).reshape(tuple(shape.values())), tuple(shape), axis_types=(AxisType.Auto,) * 4)
    tx = optax.sgd(0.1)
    step = cotgrpo.make_grpo_step(make_student(WIDE), tx, objective, micro_batches=micro_batches, tile_size=TILE)
    params = jax.eval_shape(functools.partial(init_params, WIDE), jax.random.key(0))
    state = jax.eval_shape(lambda params: TrainState.create(params=params, tx=tx, key=0), params)
    batch = jax.eval_shape(lambda: make_batch(0, True, B=16, T=64))
    with no_compilation_cache():  # which cannot keep a program for an absent TPU
        return cotgrpo.jit_step(step, mesh=mesh).lower(state, batch).compile().as_text()


def devices_of(platform: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    if platform == "cpu":
        return jax.devices()
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    variables = {"SKIP_MDS_QUERY": "1", "ACCELERATOR_TYPE": "v5litepod-16", "WORKER_HOSTNAMES": "localhost"}
    for name, value in variables.items():
        monkeypatch.setenv(f"TPU_{name}", value)
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("objective", [Pair(estimator="drawn"), ForwardKl(TOP_K)], ids=["pair", "forward_kl"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_head_travels_once(
    platform: str, objective: Any, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the compiled text, nothing that travels in the loop over tiles is larger than a tile of hidden rows."""
    text = compiled_text(devices_of(platform, monkeypatch), objective, micro_batches, fsdp=4, tensor=2)
    found = collectives(text)
    of_tiles = [c for c in found if None in c.loops]
    assert of_tiles, "the loop over tiles has the reductions over the tensor axis"
    rows = TILE * WIDE.width
    assert max(math.prod(shape) for c in of_tiles for _, shape in c.arrays) <= rows
    assert {c.group for c in of_tiles if c.kind != "collective-permute"} == {2}, "of the tensor axis alone"
    # The head has D x V / 2 elements on a device, as the untied embedding. Layouts differ, so elements are counted.
    whole = WIDE.width * WIDE.vocab_size // 2
    gathers = [c for c in found if c.kind == "all-gather" for _, shape in c.arrays if math.prod(shape) == whole]
    assert [c.times() for c in gathers] == [1], "the head, before the loop over micro-batches, and no embedding"
    reductions = [c for c in found if c.kind in ("all-reduce", "reduce-scatter") and None not in c.loops]
    sizes = [
        (math.prod(shape) * (c.group if c.kind == "reduce-scatter" else 1), c)
        for c in reductions
        for _, shape in c.arrays
    ]
    of_head = [c for size, c in sizes if size == whole]
    assert [c.times() for c in of_head] == [micro_batches], "no table of the embedding's gradient is summed"
    if platform == "cpu":  # XLA for TPUs writes an all-reduce for groups of which it has no reduce-scatter
        assert of_head[0].kind == "reduce-scatter"


def test_activations_lie_as_the_batch_does() -> None:
    """No layer moves the residual stream between devices but for the sums over the tensor axis."""
    found = collectives(compiled_text(jax.devices(), Nll(), 1, data=2, fsdp=4))
    stream = 2 * 64 * WIDE.width
    kernels = max(WIDE.width * WIDE.mlp_width, WIDE.width * 32)
    assert stream > kernels
    in_layers = [math.prod(shape) for c in found if c.loops and None not in c.loops for _, shape in c.arrays]
    assert in_layers and max(in_layers) <= kernels


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"asks for 3 devices, but there are 8"),
        ({"tensor": 3, "data": -1}, r"a multiple of 3 devices, but there are 8"),
        ({"data": -1, "fsdp": -1}, r"at most one -1"),
        ({"data": 0}, r"must be positive"),
        ({"model": 8}, r"Unknown mesh axis 'model': the axes are data, fsdp, tensor, context"),
    ],
)
def test_meshes_that_cannot_be_made(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cotgrpo.make_mesh(**sizes)


def test_one_axis_is_filled() -> None:
    assert dict(cotgrpo.make_mesh(tensor=2, fsdp=-1).shape) == {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}
    assert mesh_shape({"data": 8, "fsdp": -1}, 8)["fsdp"] == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 16}, r"tensor=16 does not divide the model's num_kv_heads, 8, .* a divisor of 8"),
        ({"tensor": 3}, r"tensor=3 does not divide the model's num_heads, 16"),
        ({"fsdp": 64}, r"fsdp=64 does not divide the model's width, 32, .* a divisor of 32"),
    ],
)
def test_models_that_are_too_small(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mesh(sizes, dataclasses.asdict(TIED))
    with pytest.raises(ValueError, match="vocab_size, 1003"):
        check_mesh({"tensor": 2}, dataclasses.asdict(TIED) | {"vocab_size": 1003})


def test_batches_that_cannot_be_spread() -> None:
    tx = optax.sgd(0.1)
    step = cotgrpo.jit_step(cotgrpo.make_sft_step(make_student(PLAIN), tx), mesh=cotgrpo.make_mesh(data=4, context=2))
    params = jax.eval_shape(functools.partial(init_params, PLAIN), jax.random.key(0))
    state = jax.eval_shape(lambda params: TrainState.create(params=params, tx=tx, key=0), params)
    with pytest.raises(ValueError, match=r"data x fsdp = 4 devices, which a batch of 6 cannot fill evenly: .* of 4"):
        step.lower(state, make_batch(0, False, B=6))
    with pytest.raises(ValueError, match=r"context=2 does not divide the 15 tokens"):
        step.lower(state, make_batch(0, False, T=15))
    with pytest.raises(ValueError, match=r"2 micro-batches of a batch of 12 .* a multiple of 8"):
        check_batch({"data": 4}, 12, 16, micro_batches=2)


def test_parameters_lie_by_rule() -> None:
    params = jax.eval_shape(functools.partial(init_params, TIED), jax.random.key(0))
    layers = state_sharding(params, cotgrpo.make_mesh(fsdp=2, tensor=2, data=2))["layers"]
    specs = {f"{name}/{leaf}": s.spec for name, module in layers.items() for leaf, s in module.items()}
    assert specs["query/kernel"] == P(None, "fsdp", "tensor") and specs["query/bias"] == P(None, "tensor")
    assert specs["down/kernel"] == P(None, "tensor", "fsdp")
    assert {specs[name] for name in specs if name.endswith("scale")} == {P()}, "norms are whole"
