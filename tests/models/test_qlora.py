"""Adapters next to a quantized base: the same as next to its dequantized weights, wherever a student computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cotgrpo
from cotgrpo import TrainState, make_mesh, make_sft_step
from cotgrpo.models import load_pretrained, save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.models.lora import (
    AdaptedParams,
    LoraConfig,
    init_lora,
    is_quantized,
    kernels,
    make_lora_step,
    merge,
    share_kept,
    with_adapters,
)
from cotgrpo.models.quantized.kernel import SCALE, Quantization, QuantizedKernel, quantized_kernel
from cotgrpo.models.quantized.quantize import quantize_base
from cotgrpo.sampling import SamplingSettings, make_sampler, pad_prompts
from cotgrpo.sharding import state_sharding
from cotgrpo.types import SftBatch

pytest.importorskip("qwix")

CONFIG = DecoderConfig(
    vocab_size=64,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=64,
    biases=("query", "key", "value"),
    init_scale=0.3,
)
FORMATS = ["int8", "nf4"]
B, T = 8, 16


def lora_of(to: Any) -> LoraConfig:
    return LoraConfig(rank=3, alpha=6.0, targets=("query", "value", "down"), quantize_base=to, block_size=16)


def parts_of(to: str, config: DecoderConfig = CONFIG) -> tuple[Any, Any, Any, LoraConfig]:
    """Float parameters, the quantized base, trained adapters and their config."""
    lora = lora_of(to)
    params = init_params(config, jax.random.key(0))
    params["layers"]["query"]["bias"] += 0.3
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), init_lora(params, lora, jax.random.key(1))
    )
    assert lora.quantization is not None
    return params, quantize_base(params, *lora.quantization), adapters, lora


def dequantized(base: Any) -> Any:
    """The base with float kernels."""
    layers = {}
    for name, module in base["layers"].items():
        kernel = quantized_kernel(module)
        rest = {key: x for key, x in module.items() if not key.startswith("kernel_")}
        layers[name] = rest if kernel is None else rest | {"kernel": kernel.dequantize(jnp.float32)}
    return base | {"layers": layers}


def context() -> tuple[Any, Any, Any]:
    """Two packed documents a row."""
    tokens = np.random.default_rng(2).integers(1, CONFIG.vocab_size, (B, T)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(10), np.arange(6)]), (B, 1)).astype(np.int32)
    return tokens, positions, np.where(np.arange(T) < 10, 1, 2) * np.ones((B, 1), np.int32)


def logits_of(config: DecoderConfig, params: Any) -> Any:
    return jax.jit(with_adapters(make_student(config)).logits)(params, *context())


@pytest.mark.parametrize("to", FORMATS)
def test_forward_and_gradients_are_those_of_the_dequantized_base(to: str) -> None:
    _, base, adapters, lora = parts_of(to)
    student = with_adapters(make_student(CONFIG))

    def loss(adapters: Any, base: Any) -> Any:
        return jnp.sum(jnp.sin(student.logits(AdaptedParams(base, adapters, lora), *context())))

    both = [jax.jit(jax.value_and_grad(loss))(adapters, tree) for tree in (base, dequantized(base))]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), *both)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(both[0][1]))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_dequantized_kernel_is_kept_for_the_backward_pass(remat: str) -> None:
    from jax._src.ad_checkpoint import saved_residuals

    config = dataclasses.replace(CONFIG, remat=remat, mlp_width=96)
    _, base, adapters, lora = parts_of("nf4", config)
    student = with_adapters(make_student(config))
    loss = lambda adapters, base: jnp.sum(student.logits(AdaptedParams(base, adapters, lora), *context()))
    shapes = lambda base: [x.shape for x, _ in saved_residuals(lambda adapters: loss(adapters, base), adapters)]
    up = (CONFIG.width, 96)
    assert (3, *up) in shapes(dequantized(base)), "a float kernel is kept, or the test sees nothing"
    assert not [shape for shape in shapes(base) if shape[-2:] in (up, up[::-1])]


def test_a_product_is_off_by_no_more_than_half_steps() -> None:
    """|y - y_q| <= sum_i |x_i| scale_i / 2 for each output, which follows from the rounding of each weight alone."""
    params, base, *_ = parts_of("int8")
    x = np.random.default_rng(3).normal(size=(5, CONFIG.width)).astype(np.float32)
    for name in ("query", "up"):
        exact, module = np.asarray(params["layers"][name]["kernel"], np.float64), base["layers"][name]
        kernel = quantized_kernel(module)
        assert kernel is not None
        off = np.abs(x @ np.asarray(kernel.dequantize(jnp.float32), np.float64) - x @ exact)
        half = np.repeat(np.asarray(module[SCALE], np.float64) / 2, 16, axis=1)
        bound = np.abs(x) @ half
        assert (off <= bound * 1.001).all() and off.max() > 0.05 * bound.max()


def test_logits_are_off_by_what_rounding_explains() -> None:
    """The difference to the float model is its derivative along the rounding, half way, up to the third order."""
    params, base, adapters, lora = parts_of("int8")
    student = with_adapters(make_student(CONFIG))
    off = np.subtract(*(logits_of(CONFIG, AdaptedParams(tree, adapters, lora)) for tree in (base, params)))
    assert np.abs(off).max() > 1e-3

    def along(params: Any) -> Any:
        return jnp.sum(off * student.logits(AdaptedParams(params, adapters, lora), *context()))

    change = jax.tree.map(jnp.subtract, dequantized(base), params)
    slopes = jax.jit(jax.grad(along))(jax.tree.map(lambda w, d: w + d / 2, params, change))
    predicted = sum(float(jnp.sum(slope * d)) for slope, d in zip(*map(jax.tree.leaves, (slopes, change)), strict=True))
    assert predicted == pytest.approx(float(np.sum(off**2)), rel=0.02)


def step_of(lora: LoraConfig, mesh: Any) -> Any:
    make = lambda student: make_sft_step(student, optax.adam(1e-2))
    return cotgrpo.jit_step(make_lora_step(make, make_student(CONFIG), lora), mesh=mesh)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    "sizes",
    [pytest.param({"fsdp": 8}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=["fsdp", "three"],
)
def test_sharded_as_on_one_device(to: str, sizes: dict[str, int]) -> None:
    _, base, adapters, lora = parts_of(to)
    tokens, positions, segment_ids = context()
    batch = SftBatch(tokens, np.roll(tokens, -1, 1), positions, segment_ids, np.ones((B, T), np.float32))
    mesh, results = make_mesh(**sizes), []
    for on in (None, mesh):
        step = step_of(lora, on)
        state = TrainState.create(params=adapters, tx=optax.adam(1e-2), key=0, copy=True)
        given = base if on is None else jax.device_put(base, state_sharding(base, on))
        for _ in range(2):
            state, metrics = step(state, batch, given)
        results.append((state.params, metrics["loss"].total))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), *results)
    moments = jax.tree.leaves(state.opt_state)
    assert sum(x.size for x in moments if x.ndim) == 2 * sum(x.size for x in jax.tree.leaves(adapters))
    own, kernel = (state_sharding(tree, mesh)["layers"]["up"] for tree in (base, dequantized(base)))
    assert own[f"kernel_{to}"].spec == kernel["kernel"].spec
    if sizes["fsdp"] == 2:  # else the two blocks of scales do not divide it, and are not split
        assert own[SCALE].spec == kernel["kernel"].spec


@pytest.mark.parametrize("to", FORMATS)
def test_replies_are_those_of_the_dequantized_base(to: str) -> None:
    _, base, adapters, lora = parts_of(to)
    prompts = pad_prompts([np.arange(1, n + 1, dtype=np.int32) for n in (3, 7, 5)], length=8)
    sample = jax.jit(make_sampler(CONFIG, SamplingSettings(max_new_tokens=8)))
    ours, theirs = (
        sample(AdaptedParams(tree, adapters, lora), prompts, jax.random.key(0)) for tree in (base, dequantized(base))
    )
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-4)


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "tensor": 2, "data": 2}], ids=["one", "eight"])
def test_read_layer_by_layer_as_quantized_whole(sizes: dict[str, int] | None, tmp_path: Path) -> None:
    params = init_params(CONFIG, jax.random.key(0))
    save_pretrained(tmp_path / "model", CONFIG, params, dtype="bfloat16")
    mesh = None if sizes is None else make_mesh(**sizes)
    for to in ("int8", "nf4"):
        want = quantize_base(load_pretrained(tmp_path / "model").params, to, 16)
        model = load_pretrained(tmp_path / "model", "bfloat16", mesh, quantization=Quantization(to, 16))
        assert is_quantized(model.params) and model.params["embedding"].dtype == jnp.bfloat16
        assert jax.tree.structure(model.params) == jax.tree.structure(want)
        for name, kernel in kernels(want).items():
            assert isinstance(kernel, QuantizedKernel)
            jax.tree.map(np.testing.assert_array_equal, kernels(model.params)[name], kernel)


def test_what_needs_the_whole_weights_is_refused(tmp_path: Path) -> None:
    _, base, adapters, lora = parts_of("nf4")
    for refused in (
        lambda: merge(base, adapters, lora),
        lambda: share_kept(base, adapters, lora, "bfloat16"),
        lambda: save_pretrained(tmp_path / "out", CONFIG, AdaptedParams(base, adapters, lora)),
    ):
        with pytest.raises(ValueError, match=r"base is quantized.*read again from its folder"):
            refused()
    assert not (tmp_path / "out").exists()


def test_a_quantized_kernel_has_no_gradient() -> None:
    _, base, adapters, lora = parts_of("nf4")
    scale = base["layers"]["up"][SCALE]
    student = with_adapters(make_student(CONFIG))

    def loss(scale: Any) -> Any:
        layers = base["layers"] | {"up": base["layers"]["up"] | {SCALE: scale}}
        return jnp.sum(student.logits(AdaptedParams(base | {"layers": layers}, adapters, lora), *context()))

    with pytest.raises(ValueError, match="quantized kernel is frozen and has no gradient"):
        jax.grad(loss)(scale)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quantize_base": "float16"}, "quantize_base must be none, int8 or nf4, got 'float16'"),
        ({"block_size": 32}, "block_size does not apply without quantize_base"),
        ({"quantize_base": "nf4", "block_size": 7}, "block_size must be even"),
        ({"quantize_base": "nf4", "block_size": 0}, "block_size must be even"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        LoraConfig(**settings)
