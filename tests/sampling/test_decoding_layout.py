"""The layout of a decode loop: chosen by bytes, the same tokens, and no weights that travel for a token."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cotgrpo
from cotgrpo.accelerators.chips import parse_topology
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.models.lora import AdaptedParams, LoraConfig, init_lora
from cotgrpo.planning.hlo import Collective, collectives
from cotgrpo.planning.tpu_compile import no_compilation_cache, tpu_devices
from cotgrpo.rollouts.on_policy import make_draw
from cotgrpo.sampling import Prompts, SamplingSettings, decoding_layout, make_sampler, pad_prompts
from cotgrpo.sampling.decoding_layout import DecodingLayout, decoding_bytes
from cotgrpo.sharding import AXES, constrain, jit_eval, state_sharding, traced_on
from cotgrpo.types import Params

# Heads that 8 devices do not divide, a vocabulary whose parts are no multiples of a block of draws, biases, a soft-cap.
SMALL = DecoderConfig(
    vocab_size=600,
    width=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
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
UNTIED = dataclasses.replace(SMALL, num_layers=1, tied_head=False, window=None, local_layers=None, dtype="bfloat16")
LORA = LoraConfig(rank=2, alpha=4.0)
PROMPTS = pad_prompts([np.arange(1, n + 1, dtype=np.int32) for n in (3, 8, 5, 1, 7, 7, 2, 6)])
NEW = 12
SETTINGS = SamplingSettings(NEW, eos_ids=tuple(range(40)), temperature=0.7)

MESHES: dict[str, dict[str, Any]] = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "data-fsdp": {"data": 2, "fsdp": 4},
    "fsdp-tensor": {"fsdp": 4, "tensor": 2},
    "context": {"context": 8},
    "fsdp-context": {"fsdp": 4, "context": 2},
    "tensor": {"tensor": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


def split_weights(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave only layouts that split weights over that many devices, as a device with little memory does."""
    own = decoding_layout.axis_options

    def enough(sizes: Any) -> Any:
        for finer, moved in own(sizes):
            if math.prod(finer[axis] for axis in (*moved, "tensor")) >= parts:
                yield finer, moved

    monkeypatch.setattr(decoding_layout, "axis_options", enough)


QWEN3_06B = DecoderConfig(
    vocab_size=151_936,
    width=1_024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=3_072,
    tied_head=True,
    qk_norm=True,
    dtype="bfloat16",
)
LLAMA3_8B = DecoderConfig(
    vocab_size=128_256,
    width=4_096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=14_336,
    tied_head=False,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
GIB = 2**30


@pytest.mark.parametrize(
    ("config", "sizes", "memory", "name", "weights_over", "heads_over", "rows_over"),
    [
        (QWEN3_06B, {"fsdp": 8}, 16 * GIB, "gathered", 1, 1, 8),
        (QWEN3_06B, {"fsdp": 4, "tensor": 2}, 16 * GIB, "gathered", 2, 2, 4),
        (LLAMA3_8B, {"fsdp": 16}, 95 * GIB, "gathered", 1, 1, 16),
        (LLAMA3_8B, {"fsdp": 16}, 16 * GIB, "tensor", 2, 2, 8),
        (LLAMA3_8B, {"fsdp": 64}, 16 * GIB, "tensor", 2, 2, 32),
        (LLAMA3_8B, {"data": 2, "fsdp": 8}, 12 * GIB, "tensor", 4, 4, 4),
        (dataclasses.replace(LLAMA3_8B, num_kv_heads=2), {"fsdp": 16}, 9 * GIB, "tensor", 4, 2, 4),
        (LLAMA3_8B, {"data": 8}, 16 * GIB, "tensor", 8, 8, 1),  # the state alone does not fit
        (LLAMA3_8B, {"fsdp": 16}, None, "gathered", 1, 1, 16),
    ],
)
def test_the_choice_by_bytes(
    config: DecoderConfig,
    sizes: dict[str, int],
    memory: int | None,
    name: str,
    weights_over: int,
    heads_over: int,
    rows_over: int,
) -> None:
    """For 64 sequences of 256 + 256 tokens, beside the float32 or bfloat16 state of AdamW."""
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    layout = decoding_bytes(config, sizes, 64, 256, 256, memory=memory)
    ways = lambda axes: math.prod(layout.sizes[axis] for axis in axes)
    assert (layout.name, ways(layout.tensor), ways(layout.heads), ways(layout.rows)) == (
        name,
        weights_over,
        heads_over,
        rows_over,
    )
    assert f"decoding: {name}, sequences over {rows_over} devices" in str(layout) and "\n" not in str(layout)
    assert layout.fits == ("no layout fits" not in str(layout))


def written(config: DecoderConfig, params: Params, mesh: Mesh | None, slots: int | None = None, **how: Any) -> Any:
    """Replies of `config` to `PROMPTS`, on the host."""
    sample = make_sampler(config, dataclasses.replace(SETTINGS, **how), 590, slots)
    return jax.device_get(jit_eval(sample, mesh)(params, PROMPTS, jax.random.key(0)))


@functools.cache
def on_one_device(config: DecoderConfig, lora: bool = False, **how: Any) -> Any:
    return written(config, params_of(config, lora), None, **how)


@functools.cache
def params_of(config: DecoderConfig, lora: bool = False) -> Params:
    params = init_params(config, jax.random.key(1))
    if not lora:
        return params
    adapters = init_lora(params, LORA, jax.random.key(2))
    return AdaptedParams(params, jax.tree.map(lambda x: x + 0.1, adapters), LORA)


@pytest.mark.parametrize(
    ("mesh", "parts", "options"),
    [
        ("fsdp", 1, {}),
        ("fsdp", 8, {"slots": 4}),  # more devices than key/value heads
        pytest.param("fsdp-tensor", 1, {"slots": 4}, marks=pytest.mark.slow),
        pytest.param("fsdp-tensor", 4, {"lora": True}, marks=pytest.mark.slow),
        pytest.param("fsdp", 1, {"lora": True}, marks=pytest.mark.slow),
        pytest.param("context", 2, {}, marks=pytest.mark.slow),
        pytest.param("fsdp", 4, {"top_k": 7, "top_p": 0.9}, marks=pytest.mark.slow),
        pytest.param("data-fsdp", 8, {"temperature": 0.0}, marks=pytest.mark.slow),
        ("tensor", 1, {}),  # an axis that does not divide the key/value heads
        pytest.param("all", 8, {}, marks=pytest.mark.slow),
        pytest.param("fsdp-context", 4, {"lora": True}, marks=pytest.mark.slow),
    ],
)
def test_the_same_tokens(mesh: str, parts: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on one device, with their log-probabilities."""
    lora, how = (
        options.get("lora", False),
        {name: value for name, value in options.items() if name[:4] in ("top_", "temp")},
    )
    want = on_one_device(SMALL, lora, **how)
    assert len(set(want.lengths)) > 1, "replies end at different times"
    split_weights(parts, monkeypatch)
    got = written(SMALL, params_of(SMALL, lora), cotgrpo.make_mesh(**MESHES[mesh]), options.get("slots"), **how)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-5)


def compiled_loop(
    config: DecoderConfig, mesh: Mesh, batch: int = 16, *, lora: bool = False, hoist: bool = True, **how: Any
) -> list[Collective]:
    """The collectives of the loop over tokens, read from the text of a sampler for the mesh, from shapes alone."""
    settings = dataclasses.replace(SETTINGS, **how)
    sample = make_sampler(config, settings)
    params = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    if lora:
        adapters = jax.eval_shape(functools.partial(init_lora, params, LORA), jax.random.key(0))
        params = AdaptedParams(params, adapters, LORA)
    whole = NamedSharding(mesh, P())
    place: Any = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.tree.map(place, params, state_sharding(params, mesh))
    ids = jnp.zeros((batch, 32), jnp.int32)
    prompts = Prompts(place(ids, whole), place(ids[:, 0], whole))
    key = place(jax.eval_shape(jax.random.key, 0), whole)

    def spread(params: Params, prompts: Prompts, key: Any) -> Any:
        return sample(params, jax.tree.map(lambda x: constrain(x, "BT"[: x.ndim]), prompts), key)

    # XLA for CPU moves gathers of small arrays out of a loop, and XLA for TPU does not move those of weights.
    passes = "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
    options: dict[str, str | bool] | None = None if hoist else {"xla_disable_hlo_passes": passes}
    with no_compilation_cache():  # which cannot keep a program for an absent TPU
        lowered = jax.jit(traced_on(mesh, spread), out_shardings=whole).lower(params, prompts, key)
        found = collectives(lowered.compile(compiler_options=options).as_text() or "")
    assert [c for c in found if not c.loops], "the weights are gathered before the loop"
    return [c for c in found if c.loops.count(None) > 1]


def most_bytes(config: DecoderConfig, batch: int) -> int:
    """The largest of a token's activations in float32: a row of the residual stream, of heads, or of block sums."""
    rows = (config.width, config.num_heads * config.head_dim, 256, -(-config.vocab_size // 256) + 8)
    return 4 * batch * max(rows)


@pytest.mark.parametrize(
    ("mesh", "parts", "options"),
    [
        ("fsdp", 1, {}),
        pytest.param("data-fsdp", 1, {"temperature": 0.0}, marks=pytest.mark.slow),
        pytest.param("fsdp-tensor", 1, {}, marks=pytest.mark.slow),
        pytest.param("context", 1, {"top_p": 0.9}, marks=pytest.mark.slow),
        pytest.param("fsdp", 4, {}, marks=pytest.mark.slow),
        ("fsdp-tensor", 4, {"lora": True}),
        pytest.param("all", 8, {}, marks=pytest.mark.slow),
        pytest.param("fsdp-context", 8, {}, marks=pytest.mark.slow),
    ],
)
def test_no_weights_travel_for_a_token(
    mesh: str, parts: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the text for 8 CPU devices: nothing if weights are gathered, and else no more than a token's activations."""
    split_weights(parts, monkeypatch)
    found = compiled_loop(UNTIED, cotgrpo.make_mesh(**MESHES[mesh]), hoist=False, **options)
    assert max((c.bytes for c in found), default=0) <= most_bytes(UNTIED, 16), "\n".join(map(str, found))
    ways = max(parts, MESHES[mesh].get("tensor", 1))
    assert bool(found) == (ways > 1), "without weights on other devices nothing travels"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "parts", "options"),
    [("fsdp", 1, {}), ("fsdp", 4, {}), ("fsdp-tensor", 1, {"lora": True})],
)
def test_no_weights_travel_for_a_token_on_a_tpu(
    mesh: str, parts: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in the text for a TPU v5e 2x4, for layers as wide as those of Qwen3-0.6B, with its vocabulary."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    split_weights(parts, monkeypatch)
    config = dataclasses.replace(QWEN3_06B, num_layers=1)
    devices = tpu_devices(parse_topology("v5e:2x4"))
    found = compiled_loop(config, cotgrpo.make_mesh(devices=devices, **MESHES[mesh]), batch=64, **options)
    assert max((c.bytes for c in found), default=0) <= most_bytes(config, 64), "\n".join(map(str, found))
    assert bool(found) == (max(parts, MESHES[mesh].get("tensor", 1)) > 1)


def test_one_program_for_all_updates_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout with newer parameters compiles nothing, and its copy of the weights is gone afterwards."""
    split_weights(4, monkeypatch)
    mesh, traced = cotgrpo.make_mesh(fsdp=8), list[DecodingLayout]()
    sample = jit_eval(make_sampler(UNTIED, SETTINGS, on_layout=traced.append), mesh)
    params = jax.device_put(params_of(UNTIED), state_sharding(params_of(UNTIED), mesh))
    held = lambda: sum(x.nbytes for x in jax.live_arrays())
    jax.block_until_ready(sample(params, PROMPTS, jax.random.key(0)))
    gc.collect()
    before = held()
    for number in range(3):
        later = jax.tree.map(lambda x, factor=1 + number / 10: x * factor, params)
        jax.block_until_ready(sample(later, PROMPTS, jax.random.key(number)))
        del later
        gc.collect()
        assert held() <= before, "parameters and replies of this rollout are gone, so a copy would be seen"
    assert [layout.name for layout in traced] == ["tensor"], "traced once"


def test_a_live_teacher_is_counted() -> None:
    """The bytes that it takes on each device are part of those that have to fit. The program is traced alone."""
    layouts = list[DecodingLayout]()
    mesh, params, teacher = cotgrpo.make_mesh(fsdp=8), params_of(UNTIED), params_of(SMALL)
    sample = make_sampler(UNTIED, SETTINGS, on_layout=layouts.append)
    draw_replies = make_draw(sample, make_student(SMALL))
    jax.eval_shape(traced_on(mesh, sample), params, PROMPTS, jax.random.key(0))
    jax.eval_shape(traced_on(mesh, draw_replies), (params, teacher), (PROMPTS, None, None), jax.random.key(0))
    shards = jax.device_put(teacher, state_sharding(teacher, mesh))
    on_a_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(shards))
    alone, both = (layout.bytes.state for layout in layouts)
    assert both - alone == on_a_device > 0


def test_the_bytes_of_copy_and_cache() -> None:
    """As NumPy counts them, for adapters too: all matrices in bfloat16 and norms in float32, and 24 columns a row."""
    config, sizes = dataclasses.replace(UNTIED, biases=(), qk_norm=False), {"fsdp": 4, "tensor": 2}
    layout = decoding_bytes(config, sizes, 16, 20, 4)
    D, F, V, KH, QH = 32, 48, 600, 16, 32
    matrices = 2 * D * QH + 2 * D * KH + 3 * D * F + 2 * V * D
    assert layout.bytes.copy == 2 * matrices // 2 + 4 * 3 * D
    assert layout.bytes.cache == 16 // 4 * 24 * (2 * 2 * KH // 2 + 8)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    adapters = jax.eval_shape(functools.partial(init_lora, shapes, LORA), jax.random.key(0))
    adapted = decoding_bytes(config, sizes, 16, 20, 4, params=AdaptedParams(shapes, adapters, LORA))
    wide = 4 * 2 * (2 * (QH + KH) + 3 * F) // 2  # of A or B, the side that `tensor` splits, float32
    narrow = 4 * 2 * 7 * D
    assert adapted.bytes.copy - layout.bytes.copy == (wide + narrow) // 2, "in the compute type"
    # The base is frozen, so no optimizer belongs to it.
    assert adapted.bytes.state < layout.bytes.state
