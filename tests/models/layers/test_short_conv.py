"""Short convolutions between layers of attention: logits, packing, caches, LoRA, meshes, export, planning."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_decoder import numpy_logits

import cotgrpo
from cotgrpo.accelerators.roofline import Work
from cotgrpo.models import load_pretrained, save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import decode, init_cache, init_params, make_student, unstack_layers
from cotgrpo.models.huggingface.adapters import load_adapter, save_adapter
from cotgrpo.models.huggingface.config import config_json, decoder_config
from cotgrpo.models.huggingface.family import ModelError
from cotgrpo.models.layers.options import ShortConv
from cotgrpo.models.layers.pattern import LayerKind
from cotgrpo.models.lora import AdaptedParams, LoraConfig, init_lora, merge, with_adapters
from cotgrpo.optimizers import param_labels
from cotgrpo.optimizers.labels import decayed, stacked_matrices
from cotgrpo.sampling import Prompts, SamplingSettings, make_sampler
from cotgrpo.sampling.decoding_layout import decoding_bytes
from cotgrpo.sharding import state_sharding

LAYERS = "ccAccAc"
CONFIG = DecoderConfig(
    vocab_size=32,
    width=16,
    num_layers=len(LAYERS),
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=24,
    qk_norm=True,
    window=4,
    local_layers=(5,),
    short_conv=ShortConv(taps=4, bias=True),
    biases=("conv_in", "conv_out"),
    layer_kinds=tuple(LayerKind("conv" if letter == "c" else "attention") for letter in LAYERS),
)
T = 14
LFM2: dict[str, Any] = {
    "model_type": "lfm2",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 50,
    "block_multiple_of": 8,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "conv", "full_attention"] * 2,
    "max_position_embeddings": 64,
}


def random_params(config: DecoderConfig) -> Any:
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


def batch(rows: int = 2) -> tuple[Any, Any, Any]:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (rows, T)).astype(np.int32)
    return tokens, np.tile(np.arange(T, dtype=np.int32), (rows, 1)), np.ones((rows, T), np.int32)


@functools.cache
def logits() -> tuple[Any, np.ndarray]:
    """Return random parameters, and the logits of two documents."""
    params = random_params(CONFIG)
    return params, np.asarray(jax.jit(make_student(CONFIG).logits)(params, *batch()))


def test_logits_in_numpy() -> None:
    params, got = logits()
    for row, tokens in enumerate(batch()[0]):
        np.testing.assert_allclose(got[row], numpy_logits(CONFIG, jax.device_get(params), tokens), atol=2e-5)
    assert CONFIG.num_params() == sum(x.size for x in jax.tree.leaves(params))


def test_packed_documents_stay_apart() -> None:
    """Two documents in one row, with padding before, between and after them."""
    params, apart = logits()
    tokens, positions, _ = batch()
    gap = np.zeros((1, 3), np.int32)
    pack = lambda rows: np.concatenate([gap, rows[:1], gap, rows[1:], gap], axis=1)
    segments = pack(np.repeat([[1], [2]], T, axis=1).astype(np.int32))
    packed = jax.jit(make_student(CONFIG).logits)(params, pack(tokens), pack(positions), segments)
    np.testing.assert_allclose(packed[segments > 0].reshape(apart.shape), apart, atol=2e-5)


@pytest.mark.parametrize("parts", [(8, 9, 10, 11, 12, 13, 14), (1, 3, 9, 14)], ids=["tokens", "several"])
def test_decode_agrees_with_the_whole_pass(parts: tuple[int, ...]) -> None:
    """Rows padded on the left, read in parts of several tokens or one."""
    params, want = logits()
    tokens, positions, segments = batch()
    away = 5
    shift = lambda rows, fill: np.stack([rows[0], np.concatenate([np.full(away, fill, np.int32), rows[1, :-away]])])
    ragged = shift(tokens, 7), shift(positions, 0), shift(segments, 0)
    cache, rows, read = init_cache(CONFIG, 2, T), [], jax.jit(functools.partial(decode, CONFIG))
    unstacked, start = unstack_layers(CONFIG, params), 0
    for end in parts:
        hidden, cache = read(unstacked, *(x[:, start:end] for x in ragged), cache, start)
        rows.append(hidden)
        start = end
    head = make_student(CONFIG).head
    assert head is not None
    got = jnp.concatenate(rows, axis=1) @ head(params)
    np.testing.assert_allclose(got[0], want[0], atol=2e-5)
    np.testing.assert_allclose(got[1, away:], want[1, :-away], atol=2e-5)
    states = [index for index, state in enumerate(cache.states) if state is not None]
    assert states == [index for index, letter in enumerate(LAYERS) if letter == "c"]
    assert [key is None for key in cache.keys] == [letter == "c" for letter in LAYERS]


@pytest.mark.slow
def test_sampler_admits_prompts_into_rows_with_a_state() -> None:
    """Greedy replies of five prompts in two rows are those of the whole pass, token by token."""
    params, _ = logits()
    lengths, P, N = np.array([3, 6, 1, 5, 2], np.int32), 6, 5
    rng, prompts = np.random.default_rng(3), np.zeros((5, P), np.int32)
    for row, length in enumerate(lengths):
        prompts[row, P - length :] = rng.integers(1, CONFIG.vocab_size, length)
    sample = make_sampler(CONFIG, SamplingSettings(max_new_tokens=N, temperature=0.0), decode_batch_size=2)
    replies = jax.jit(sample)(params, Prompts(prompts, lengths), jax.random.key(0))
    read = jax.jit(make_student(CONFIG).logits)
    for row, length in enumerate(lengths):
        text = np.zeros((1, P + N), np.int32)
        text[0, :length] = prompts[row, P - length :]
        text[0, length : length + N] = replies.tokens[row]
        segments = (np.arange(P + N) < length + N).astype(np.int32)[None]
        found = read(params, text, np.arange(P + N, dtype=np.int32)[None], segments)
        np.testing.assert_array_equal(found[0, length - 1 : length - 1 + N].argmax(-1), replies.tokens[row])


@pytest.mark.slow
def test_adapters_next_to_frozen_weights_compute_what_merged_ones_do() -> None:
    params, _ = logits()
    lora = LoraConfig(rank=2, alpha=4.0, targets=("query", "out", "conv_in", "down"))
    adapters = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(3), x.shape), init_lora(params, lora, jax.random.key(1))
    )
    convs, attention = (adapters["layers"]["run_0"][f"block_{i}"] for i in (0, 1))
    assert set(convs) == {"conv_in", "conv_out", "down"} and set(attention) == {"query", "out", "down"}
    student = make_student(CONFIG)
    adapted = jax.jit(with_adapters(student).logits)(AdaptedParams(params, adapters, lora), *batch())
    merged = jax.jit(student.logits)(merge(params, adapters, lora), *batch())
    np.testing.assert_allclose(adapted, merged, atol=2e-5)


def test_adapter_folder_has_the_names_of_each_layer(tmp_path: Path) -> None:
    """What peft reads, and back. A name that two modules share is written in full."""
    from safetensors.numpy import load_file

    config = decoder_config(LFM2)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    lora = LoraConfig(rank=2, targets=("query", "/out$", "conv_in"))
    adapters = jax.tree.map(lambda x: x + 1.0, init_lora(params, lora, jax.random.key(1)))
    save_adapter(tmp_path / "adapter", adapters, lora, hf_config=LFM2)
    names = {
        name.removeprefix("base_model.model.model.layers.")
        for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    }
    modules = {2: ("self_attn.q_proj", "self_attn.out_proj"), 0: ("conv.in_proj",)}
    modules |= {1: modules[0], 3: modules[0], 4: modules[0], 5: modules[2]}
    assert names == {f"{i}.{m}.lora_{part}.weight" for i, own in modules.items() for m in own for part in "AB"}
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["in_proj", "q_proj", "self_attn.out_proj"]
    again, found = load_adapter(tmp_path / "adapter", params, LFM2)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    again = init_lora(params, found, jax.random.key(1))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), again, adapters)


@pytest.mark.slow
def test_export_and_back(tmp_path: Path) -> None:
    """The names of the checkpoint, its config.json, and the same parameters."""
    config = decoder_config(LFM2)
    assert config.mlp_width == 40 and [layer.mixer[0] for layer in config.layers] == list("ccacca")
    params = random_params(config)
    save_pretrained(tmp_path / "out", config, params)
    loaded = load_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert decoder_config(loaded.hf_config) == config == decoder_config(config_json(config))


@pytest.mark.slow
def test_sharded_on_eight_devices() -> None:
    """Loss gradients on a mesh of sequences, parameters, heads and channels are those of one device."""
    params, _ = logits()
    student, inputs = make_student(CONFIG), batch(rows=4)
    loss = lambda p, *inputs: jnp.sum(jax.nn.log_softmax(student.logits(p, *inputs))[..., 3])
    want = jax.jit(jax.value_and_grad(loss))(params, *inputs)
    for mesh in (cotgrpo.make_mesh(data=2, fsdp=2, tensor=2), cotgrpo.make_mesh(fsdp=4, context=2)):
        placed = jax.device_put(params, state_sharding(params, mesh))
        with jax.set_mesh(mesh):
            got = jax.jit(jax.value_and_grad(loss))(placed, *inputs)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_optimizers_know_the_filters() -> None:
    """Weight decay takes filters; muon leaves them to AdamW."""
    params = random_params(CONFIG)
    labels = param_labels(params)["layers"]["run_0"]["block_0"]
    assert labels["conv"] == {"bias": "bias", "filters": "filter"} and labels["conv_in"]["kernel"] == "matrix"
    assert decayed(params)["layers"]["run_0"]["block_0"]["conv"] == {"bias": False, "filters": True}
    of_muon = stacked_matrices(params)["layers"]["run_0"]["block_0"]
    assert of_muon["conv_in"]["kernel"] and not of_muon["conv"]["filters"]


def test_planning_counts_each_kind_of_layer() -> None:
    D, F, K, H, convs, attention = 16, 24, 2, 8, 5, 2
    work = Work(CONFIG, tokens=1, seq_len=100)
    mlp = 3 * D * F
    assert work.layer_weights == convs * (4 * D * D + mlp) + attention * (2 * D * 32 + 2 * D * K * H + mlp)
    assert work.seen_keys == 100 / 2 + (4 - 4**2 / 200)
    layout = decoding_bytes(CONFIG, {}, 3, 6, 5)
    window = 3 * 3 * (D * 4 + 4)  # rows, taps less one, float32 inputs and segments
    assert layout.bytes.cache == 3 * 11 * (attention * 2 * K * H * 4 + 8) + convs * window


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["conv"] * 5}, "must name full_attention or conv for each of the 6 layers"),
        ({"layer_types": ["conv"] * 5 + ["mamba"]}, r"got \['conv'.*'mamba'\]"),
        ({"layer_types": None, "full_attn_idxs": [2, 6]}, r"full_attn_idxs must lie in 0\.\.5, got \[2, 6\]"),
        ({"conv_L_cache": 0}, "conv_L_cache is 0; expected a positive integer"),
        ({"block_multiple_of": None}, "block_multiple_of is None"),
        ({"block_use_swiglu": False}, "block_use_swiglu is False; supported: True"),
    ],
)
def test_configs_that_make_no_model(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decoder_config(LFM2 | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer_kinds": CONFIG.layer_kinds[:-1] if CONFIG.layer_kinds else ()},
            "must name each of the 7 layers, got 6",
        ),
        ({"short_conv": None}, "mixer 'conv' needs short_conv"),
        ({"mixer": "mamba"}, "mixer must be one of"),
    ],
)
def test_settings_that_make_no_decoder(change: dict[str, Any], message: str) -> None:
    import dataclasses

    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_convolution_of_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"ShortConv.taps must be at least 1, got 0"):
        ShortConv(taps=0)


def test_layers_of_one_kind_are_one_stack() -> None:
    """All convolutions: the tree of like layers. The file's full_attn_idxs may be empty."""
    config = decoder_config(LFM2 | {"layer_types": None, "full_attn_idxs": []})
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert shapes["layers"]["conv_in"]["kernel"].shape == (6, 16, 48)
    assert not config.runs and config.num_params() == sum(x.size for x in jax.tree.leaves(shapes))
