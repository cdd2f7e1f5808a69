"""Gemma 4's layers against NumPy: unlike heads, shared keys and values, per-layer embeddings, and what they cost."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_gemma4 import gemma4_logits
from safetensors.numpy import load_file, save_file

import cotgrpo
from cotgrpo.accelerators.roofline import Work
from cotgrpo.models import ModelError, load_pretrained, save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import decode, init_cache, init_params, make_student
from cotgrpo.models.huggingface.config import decoder_config
from cotgrpo.models.layers.pattern import LayerKind
from cotgrpo.models.lora import AdaptedParams, LoraConfig, init_lora, kernels, merge, with_adapters
from cotgrpo.models.rotary import RopeScaling, frequencies, scaled_frequencies
from cotgrpo.optimizers import param_labels
from cotgrpo.sampling.decoding_layout import decoding_bytes
from cotgrpo.sharding import state_sharding

T = 11
PLAIN: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 12,
    "sliding_window": 4,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 32,
    "max_position_embeddings": 64,
}
TYPES = {"S": "sliding_attention", "F": "full_attention"}


def fields(layers: str, **own: Any) -> dict[str, Any]:
    """Return a config.json with these layers: S, a local one, or F, a global one."""
    return {**PLAIN, "num_hidden_layers": len(layers), "layer_types": [TYPES[letter] for letter in layers], **own}


SHARED = {"num_kv_shared_layers": 6, "use_double_wide_mlp": True, "num_key_value_heads": 1}
LARGE = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}
CONFIGS = {
    "shared": fields("SSFSSFSSFSSF", **SHARED, final_logit_softcapping=3.0),
    "large": fields("SSFSSF", **LARGE),
    "even_heads": fields("SFFSSF", global_head_dim=8, num_kv_shared_layers=2),
    "no_pattern": fields("FSSFSFFF", num_kv_shared_layers=3, attention_k_eq_v=True),
}
OPTIONS = {name: decoder_config(hf) for name, hf in CONFIGS.items()}


def some(*fast: str) -> list[Any]:
    """Return the names of all configs; those that are not named here are slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in CONFIGS]


def random_params(config: DecoderConfig) -> Any:
    """Every parameter random: norms around 1, and products that keep the size of what they read.

    Those of queries are around 1/2. Scores are not scaled down, and a softmax of large ones amplifies rounding.
    """
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def draw(path: Any, x: Any) -> Any:
        noise = rng.normal(size=x.shape)
        scale = "scale" in str(getattr(path[-1], "key", ""))
        values = 1 + 0.2 * noise if scale else noise * x.shape[-2] ** -0.5
        return jnp.asarray(values / 2 if "query_norm" in jax.tree_util.keystr(path) else values, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def batch(rows: int = 2) -> tuple[Any, Any, Any]:
    tokens = np.random.default_rng(0).integers(0, PLAIN["vocab_size"], (rows, T)).astype(np.int32)
    return tokens, np.tile(np.arange(T, dtype=np.int32), (rows, 1)), np.ones((rows, T), np.int32)


@functools.cache
def logits_of(name: str) -> tuple[Any, np.ndarray]:
    """Return random parameters, and the logits of two documents."""
    params = random_params(OPTIONS[name])
    return params, np.asarray(jax.jit(make_student(OPTIONS[name]).logits)(params, *batch()))


@pytest.mark.parametrize("name", some("shared", "large"))
def test_logits_in_numpy(name: str) -> None:
    params, got = logits_of(name)
    for row, tokens in enumerate(batch()[0]):
        np.testing.assert_allclose(got[row], gemma4_logits(OPTIONS[name], jax.device_get(params), tokens), atol=5e-5)
    assert OPTIONS[name].num_params() == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", some("shared"))
def test_packed_documents_stay_apart(name: str) -> None:
    params, apart = logits_of(name)
    tokens, positions, _ = batch()
    segments = np.repeat([[1, 2]], T, axis=1).astype(np.int32)
    logits = jax.jit(make_student(OPTIONS[name]).logits)
    packed = logits(params, tokens.reshape(1, -1), positions.reshape(1, -1), segments)
    np.testing.assert_allclose(packed.reshape(apart.shape), apart, atol=5e-5)


@pytest.mark.parametrize("name", some("shared"))
def test_decode_agrees_with_the_whole_pass(name: str) -> None:
    """Prefill of 8, then token by token. Layers that share keys and values have one pair together."""
    config, (params, want) = OPTIONS[name], logits_of(name)
    tokens, positions, segments = batch()
    cache, rows, read = init_cache(config, 2, T), [], jax.jit(functools.partial(decode, config))
    for start, end in [(0, 8), *((t, t + 1) for t in range(8, T))]:
        part = slice(start, end)
        hidden, cache = read(params, tokens[:, part], positions[:, part], segments[:, part], cache, start)
        rows.append(hidden)
    student = make_student(config)
    got = jnp.concatenate(rows, axis=1) @ student.head(params)
    got = got if student.softcap is None else student.softcap * jnp.tanh(got / student.softcap)
    np.testing.assert_allclose(got, want, atol=5e-5)
    own = config.num_layers - (CONFIGS[name].get("num_kv_shared_layers") or 0)
    assert [key is not None for key in cache.keys] == [index < own for index in range(config.num_layers)]


@pytest.mark.parametrize("name", some("shared"))
def test_gradients_of_the_loops_are_those_of_single_layers(name: str) -> None:
    """The gradient through a decoder without loops, in which keys and values are handed on one by one."""
    config, (params, _) = OPTIONS[name], logits_of(name)
    student, inputs = make_student(config), batch()

    def unrolled(p: Any) -> Any:
        rows, _ = decode(config, p, *inputs, init_cache(config, 2, T), 0)
        return jnp.sum(jnp.sin(rows))

    looped = lambda p: jnp.sum(jnp.sin(student.hidden(p, *inputs)))
    got, want = (jax.jit(jax.grad(loss))(params) for loss in (looped, unrolled))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.max(jnp.abs(b))) + 1e-6, err_msg=str(path))
        # Training leaves the scale of a layer as it is.
        assert bool(jnp.all(a == 0)) == (str(path[-1]) == "['layer_scale']"), path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared", "large"])
def test_sharded_on_eight_devices(name: str) -> None:
    """Gradients on a mesh of sequences, parameters and heads are those of one device."""
    params, _ = logits_of(name)
    student, inputs = make_student(OPTIONS[name]), batch(rows=4)
    loss = lambda p, *inputs: jnp.sum(jax.nn.log_softmax(student.logits(p, *inputs))[..., 3])
    want = jax.jit(jax.value_and_grad(loss))(params, *inputs)
    mesh = cotgrpo.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = state_sharding(params, mesh)
    if name == "shared":
        assert tuple(shardings["per_layer"]["embedding"].spec) == ("tensor", "fsdp")
        assert tuple(shardings["per_layer"]["projection"]["kernel"].spec) == ("fsdp", "tensor")
    placed = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(loss))(placed, *inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4 * np.max(np.abs(b)))


@pytest.mark.slow
def test_lora_on_its_default_targets() -> None:
    """Adapters of every projection that each kind of layer has compute what merged ones do."""
    params, _ = logits_of("shared")
    lora = LoraConfig(rank=2, alpha=4.0)
    adapters = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(3), x.shape), init_lora(params, lora, jax.random.key(1))
    )
    shared = ("layers", "run_1", "block_0")
    assert {path[-1] for path in kernels(params) if path[:3] == shared} == {
        *("query", "out", "gate", "up", "down", "per_layer_gate", "per_layer_out")
    }
    student = make_student(OPTIONS["shared"])
    adapted = jax.jit(with_adapters(student).logits)(AdaptedParams(params, adapters, lora), *batch())
    merged = jax.jit(student.logits)(merge(params, adapters, lora), *batch())
    np.testing.assert_allclose(adapted, merged, atol=5e-5)


def equations(jaxpr: Any) -> list[Any]:
    """Return the equations of a program, with those of its loops and calls."""
    found = list(jaxpr.eqns)
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += equations(inner) if hasattr(inner, "eqns") else []
    return found


def gradient(config: DecoderConfig) -> list[Any]:
    params = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((2, T), jnp.int32)
    loss = lambda p, *inputs: jnp.sum(make_student(config).logits(p, *inputs))
    return equations(jax.make_jaxpr(jax.grad(loss))(params, ids, ids, ids).jaxpr)


@pytest.mark.parametrize(
    ("few", "many"),
    [
        (fields("SSFS" * 2 + "F", num_kv_shared_layers=0), fields("SSFS" * 8 + "F", num_kv_shared_layers=0)),
        (fields("SSSSF" * 4, num_kv_shared_layers=10), fields("SSSSF" * 14, num_kv_shared_layers=40)),
        (fields("SSSSSF" * 2, **LARGE), fields("SSSSSF" * 10, **LARGE)),
    ],
    ids=["heads", "shared", "large"],
)
def test_the_program_does_not_grow_with_depth(few: dict[str, Any], many: dict[str, Any]) -> None:
    assert len(gradient(decoder_config(many))) <= 1.3 * len(gradient(decoder_config(few)))


def test_shared_keys_are_kept_once() -> None:
    """No loop returns the shared keys and values of each of its layers, forward or backward."""
    config = dataclasses.replace(decoder_config(fields("SF" * 8, num_kv_shared_layers=10)), remat="full")
    assert [run.repeats for run in config.runs] == [3, 5]
    shapes = [tuple(var.aval.shape) for eqn in gradient(config) if eqn.primitive.name == "scan" for var in eqn.outvars]
    pairs = [(2, T, *config.layers[index].kv_shape) for index in (0, 1)]
    stacked = [shape for shape in shapes if len(shape) == 5 and shape[1:] in pairs]
    assert stacked == [] and all(pair in shapes for pair in pairs)


def test_the_cache_counts_each_pair_once() -> None:
    """`decoding_bytes`, which `plan` and the sampler read, against the arrays of an empty cache."""
    config = OPTIONS["shared"]
    cache = jax.eval_shape(lambda: init_cache(config, 2, 24))
    want = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    found = decoding_bytes(config, {"data": 1}, 2, 16, 8)
    assert found.bytes.cache == want
    assert found.bytes.copy == 4 * config.num_params()
    every = decoding_bytes(decoder_config(CONFIGS["shared"] | {"num_kv_shared_layers": 0}), {"data": 1}, 2, 16, 8)
    assert every.bytes.cache - 2 * 4 * 2 * 24 == 2 * (want - 2 * 4 * 2 * 24)


def test_flops_of_unlike_heads() -> None:
    """Attention counts each layer's heads and keys; a product makes the layers' inputs."""
    config, T_long = OPTIONS["shared"], 64
    work = Work(config, tokens=T_long, seq_len=T_long)
    seen = {True: 4 - 4**2 / (2 * T_long), False: T_long / 2}
    scores = sum(2 * 4 * layer.head_dim * seen[config.is_local(i)] for i, layer in enumerate(config.layers))
    assert math.isclose(work.score_flops, scores)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    assert work.layer_weights == sum(x.size for path, x in leaves if str(path[-1]) == "['kernel']")


def test_labels() -> None:
    labels = param_labels(jax.eval_shape(lambda: init_params(OPTIONS["shared"], jax.random.key(0))))
    assert labels["per_layer"] == {"embedding": "embedding", "projection": {"kernel": "matrix"}, "scale": "norm"}
    assert labels["layers"]["run_0"]["block_0"]["layer_scale"] == "norm"


def test_proportional_rotation() -> None:
    plain = frequencies(1e6, 16)
    got = scaled_frequencies(1e6, 16, RopeScaling("proportional", 2.0, rotated_share=0.25))
    np.testing.assert_array_equal(got, [*(plain[:2] / 2), *[0] * 6])


def test_keys_that_no_layer_reads_may_be_in_the_checkpoint(tmp_path: Path) -> None:
    """Files on the hub hold them. Those of a layer that does not exist are an error."""
    config = OPTIONS["shared"]
    params = random_params(config)
    folder = save_pretrained(tmp_path / "model", config, params)
    stored = load_file(folder / "model.safetensors")
    assert "model.layers.5.self_attn.k_proj.weight" in stored
    names = [f"model.layers.{i}.self_attn.{name}.weight" for i in (6, 11, 12) for name in ("k_proj", "v_norm")]
    *unread, beyond, _ = [{name: np.ones(3, np.float32)} for name in names]
    save_file(functools.reduce(operator.or_, unread, stored), folder / "model.safetensors")
    loaded = load_pretrained(folder)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), loaded.params, params))
    save_file(stored | beyond, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"holds unexpected model\.layers\.12\.self_attn\.k_proj\.weight"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_and_back(name: str, tmp_path: Path) -> None:
    """A folder without a source has the fields of files on the hub, and describes the same decoder."""
    config = OPTIONS[name]
    folder = save_pretrained(tmp_path / "model", config, random_params(config))
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert hf["model_type"] == "gemma4_text" and decoder_config(hf) == config
    own = ("layer_types", "global_head_dim", "num_kv_shared_layers", "use_double_wide_mlp", "attention_k_eq_v")
    assert {field: hf[field] for field in own} == {field: {**DEFAULTS, **CONFIGS[name]}[field] for field in own}


DEFAULTS = {"num_kv_shared_layers": 0, "use_double_wide_mlp": False, "attention_k_eq_v": False}


def test_per_layer_config_is_read_too() -> None:
    """As transformers 5.24 writes it."""
    plain = {name: value for name, value in CONFIGS["large"].items() if "global" not in name}
    own = {str(i): {"head_dim": 12, "num_key_value_heads": 1} for i in (2, 5)}
    assert decoder_config({**plain, "per_layer_config": own}) == OPTIONS["large"]
    # The last layer is a global one, whatever layer_types has.
    types = [TYPES[letter] for letter in "SSFSSS"]
    assert decoder_config({**plain, "layer_types": types, "per_layer_config": own}) == OPTIONS["large"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_moe_block": True, "num_experts": 4}, "enable_moe_block is True; supported: False"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'; supported: None"),
        ({"num_kv_shared_layers": 12}, "num_kv_shared_layers is 12; expected 0 to 11"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers is -1; expected 0 to 11"),
        ({"num_kv_shared_layers": 10}, "layer 2 has shared_keys, but no global layer before it"),
        ({"global_head_dim": 13}, "head_dim must be even for rotary positions, got 13"),
        ({"global_head_dim": "12"}, "global_head_dim is '12'; expected a positive integer"),
        ({"per_layer_config": {"2": {"intermediate_size": 8}}}, "per_layer_config sets intermediate_size; supported"),
        ({"per_layer_config": {"2": {"head_dim": 16}}}, "per_layer_config differs between layers of one type"),
        ({"per_layer_config": [1]}, "per_layer_config is .*; expected an object"),
        ({"vocab_size_per_layer_input": 0}, "vocab_size must be at least 1, got 0"),
        ({"hidden_size_per_layer_input": "8"}, "hidden_size_per_layer_input is '8'; expected an integer"),
        ({"layer_types": ["full_attention"]}, "layer_types must name full_attention or sliding_attention for each"),
    ],
)
def test_config_json_that_makes_no_decoder(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decoder_config(CONFIGS["shared"] | change)


def test_kinds_that_make_no_decoder() -> None:
    config = DecoderConfig(vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24)
    with pytest.raises(ValueError, match="layer 1 has shared_keys, but no global layer before it has keys of its own"):
        dataclasses.replace(config, layer_kinds=(LayerKind(num_kv_heads=4), LayerKind(shared_keys=True)))
    with pytest.raises(ValueError, match="layer_kinds: local layers must have one head_dim, got 8, 16"):
        dataclasses.replace(config, window=4, layer_kinds=(LayerKind(), LayerKind(head_dim=16)))
