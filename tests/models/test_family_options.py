"""The decoder's options of further families, against NumPy: logits, packing, caches, LoRA, meshes, compiled size."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_decoder import numpy_logits

import cotgrpo
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import decode, init_cache, init_params, make_student
from cotgrpo.models.lora import AdaptedParams, LoraConfig, init_lora, kernels, merge, with_adapters
from cotgrpo.models.rotary import RopeScaling
from cotgrpo.optimizers import param_labels
from cotgrpo.sharding import state_sharding

PLAIN = DecoderConfig(vocab_size=32, width=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24)
T = 14
LONGROPE = RopeScaling("longrope", 2.0, 9, attention_factor=1.2, short_factors=(1.0, 1.5), long_factors=(1.0, 4.0))
CONFIGS = {
    "norms_after": {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_over": "width"},
    "some_layers_unrotated": {"unrotated_layers": (1, 3), "window": 3, "local_layers": (0, 1), "qk_norm": True},
    "multipliers": {"embedding_scale": 6.0, "residual_scale": 0.3, "logit_divisor": 3.0, "query_scale": 0.4}
    | {"unrotated_layers": (0, 1, 2, 3), "tied_head": False},
    "partly_rotated": {"rotary_dim": 4, "rope_scaling": LONGROPE, "window": 5},
    "relu2": {"activation": "relu2", "rope_scaling": RopeScaling("alpha", 50.0), "biases": ("query", "up", "down")}
    | {"qk_norm": True, "qk_norm_rotated": True},
    "xielu": {"activation": "xielu", "qk_norm": True, "qk_norm_over": "width", "qk_norm_rotated": True}
    | {"rope_scaling": RopeScaling("linear", 2.0, 4, query_growth=0.7)},
}
"""Each option of the decoder that the plain one lacks, in some combination."""


def some(*fast: str) -> list[Any]:
    """Return the names of all options; those that are not named here are slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in CONFIGS]


OPTIONS = {name: dataclasses.replace(PLAIN, **options) for name, options in CONFIGS.items()}


def random_params(config: DecoderConfig) -> Any:
    """Every parameter random, and large enough that scores are far from uniform."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


def batch(rows: int = 2) -> tuple[Any, Any, Any]:
    tokens = np.random.default_rng(0).integers(0, PLAIN.vocab_size, (rows, T)).astype(np.int32)
    return tokens, np.tile(np.arange(T, dtype=np.int32), (rows, 1)), np.ones((rows, T), np.int32)


@functools.cache
def logits_of(name: str) -> tuple[Any, np.ndarray]:
    """Return random parameters, and the logits of two documents."""
    params = random_params(OPTIONS[name])
    return params, np.asarray(jax.jit(make_student(OPTIONS[name]).logits)(params, *batch()))


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_in_numpy(name: str) -> None:
    params, got = logits_of(name)
    for row, tokens in enumerate(batch()[0]):
        np.testing.assert_allclose(got[row], numpy_logits(OPTIONS[name], jax.device_get(params), tokens), atol=2e-5)
    assert OPTIONS[name].num_params() == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", some("some_layers_unrotated"))
def test_packed_documents_stay_apart(name: str) -> None:
    params, apart = logits_of(name)
    tokens, positions, _ = batch()
    segments = np.repeat([[1, 2]], T, axis=1).astype(np.int32)
    logits = jax.jit(make_student(OPTIONS[name]).logits)
    packed = logits(params, tokens.reshape(1, -1), positions.reshape(1, -1), segments)
    np.testing.assert_allclose(packed.reshape(apart.shape), apart, atol=2e-5)


@pytest.mark.parametrize("name", some("some_layers_unrotated", "partly_rotated"))
def test_decode_agrees_with_the_whole_pass(name: str) -> None:
    """Prefill of 10, then token by token."""
    config, (params, want) = OPTIONS[name].for_length(T), logits_of(name)
    tokens, positions, segments = batch()
    cache, rows, read = init_cache(config, 2, T), [], jax.jit(functools.partial(decode, config))
    for start, end in [(0, 10), *((t, t + 1) for t in range(10, T))]:
        part = slice(start, end)
        hidden, cache = read(params, tokens[:, part], positions[:, part], segments[:, part], cache, start)
        rows.append(hidden)
    got = jnp.concatenate(rows, axis=1) @ make_student(config).head(params)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("name", ["norms_after", "relu2", "xielu"])
def test_lora_on_its_default_targets(name: str) -> None:
    """Adapters of every projection that there is; next to the frozen weights they compute what merged ones do."""
    params, _ = logits_of(name)
    lora = LoraConfig(rank=2, alpha=4.0)
    adapters = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(3), x.shape), init_lora(params, lora, jax.random.key(1))
    )
    assert set(adapters["layers"]) == set(OPTIONS[name].projections) == {path[-1] for path in kernels(params)}
    student = make_student(OPTIONS[name])
    adapted = jax.jit(with_adapters(student).logits)(AdaptedParams(params, adapters, lora), *batch())
    merged = jax.jit(student.logits)(merge(params, adapters, lora), *batch())
    np.testing.assert_allclose(adapted, merged, atol=2e-5)


def test_a_target_that_a_model_lacks_is_an_error_if_it_was_asked_for() -> None:
    with pytest.raises(ValueError, match=r"target 'gate' matches no projection of the model"):
        init_lora(logits_of("relu2")[0], LoraConfig(targets=("gate", "up")), jax.random.key(0))


@pytest.mark.parametrize("name", some("norms_after"))
def test_sharded_on_eight_devices(name: str) -> None:
    """Loss gradients on a mesh of sequences, parameters and heads are those of one device."""
    params, _ = logits_of(name)
    student, inputs = make_student(OPTIONS[name]), batch(rows=4)
    loss = lambda p, *inputs: jnp.sum(jax.nn.log_softmax(student.logits(p, *inputs))[..., 3])
    want = jax.jit(jax.value_and_grad(loss))(params, *inputs)
    mesh = cotgrpo.make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, state_sharding(params, mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(loss))(placed, *inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_labels_of_the_activation_s_parameters() -> None:
    labels = param_labels(logits_of("xielu")[0])["layers"]
    assert labels["xielu"] == {"alpha_p": "bias", "alpha_n": "bias"} and labels["query_norm"]["scale"] == "norm"


@pytest.mark.parametrize("name", some("some_layers_unrotated", "xielu"))
def test_the_program_does_not_grow_with_depth(name: str) -> None:
    """One loop over the layers, forward and backward, in a program as long for 32 layers as for 4."""

    def text(layers: int) -> str:
        repeated = {
            field: tuple(i for i in range(layers) if i % 4 in getattr(OPTIONS[name], field))
            for field in ("unrotated_layers", "local_layers")
            if getattr(OPTIONS[name], field)
        }
        config = dataclasses.replace(OPTIONS[name], num_layers=layers, **repeated)
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        loss = lambda p: jnp.sum(make_student(config).logits(p, *batch()))
        return jax.jit(jax.grad(loss)).lower(params).as_text()

    few, many = text(4), text(32)
    assert few.count("stablehlo.while") == many.count("stablehlo.while") >= 2
    assert len(few.splitlines()) == len(many.splitlines())
    assert len(re.findall(r"dot_general", few)) == len(re.findall(r"dot_general", many))


def test_longrope_by_length() -> None:
    """A decode loop has one set of factors; a whole pass takes those of its longest position."""
    assert LONGROPE.for_length(9).long_factors == (1.0, 1.5) and LONGROPE.for_length(10).short_factors == (1.0, 4.0)
    config = OPTIONS["partly_rotated"]
    params, (tokens, positions, segments) = random_params(config), batch()
    logits = jax.jit(make_student(config).logits)
    short = logits(params, tokens[:, :9], positions[:, :9], segments[:, :9])
    want = [numpy_logits(config, jax.device_get(params), row[:9]) for row in tokens]
    np.testing.assert_allclose(short, np.stack(want), atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": 3}, "rotary_dim must be even and lie in 2..8, got 3"),
        ({"rotary_dim": 10}, "rotary_dim must be even and lie in 2..8, got 10"),
        ({"unrotated_layers": (4,)}, r"unrotated_layers must lie in 0\.\.3, but they hold 4"),
        ({"pre_norms": False}, "needs pre_norms, post_norms or both"),
        ({"qk_norm_over": "layer"}, "qk_norm_over must be one of"),
        ({"residual_scale": 0.0}, "residual_scale must be positive or None"),
        ({"logit_divisor": -1.0}, "logit_divisor must be positive or None"),
        ({"rope_scaling": LONGROPE}, "must have 4 numbers, one for each rotated pair, got 2"),
        ({"activation": "relu2", "biases": ("gate",)}, "biases must be of .* got 'gate'"),
    ],
)
def test_settings_that_make_no_decoder(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **change)
