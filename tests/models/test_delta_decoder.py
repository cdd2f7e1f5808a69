"""A decoder with gated delta nets between gated attention, as Qwen3.5: without torch."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.numpy_decoder import numpy_logits
from safetensors.numpy import load_file, save_file

import cotgrpo
from cotgrpo.models import ModelError, load_pretrained, save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import decode, init_cache, init_params, make_student
from cotgrpo.models.huggingface.config import config_json, decoder_config, family_of
from cotgrpo.models.huggingface.tensor_layout import tensor_layout
from cotgrpo.models.huggingface.weights import stored_shapes
from cotgrpo.models.layers.options import DeltaNet
from cotgrpo.models.layers.pattern import LayerKind
from cotgrpo.models.lora import AdaptedParams, LoraConfig, init_lora, merge, with_adapters
from cotgrpo.sampling import SamplingSettings, make_sampler, pad_prompts
from cotgrpo.sharding import state_sharding

DELTA, ATTENTION = LayerKind("delta"), LayerKind("attention")
CONFIG = DecoderConfig(
    vocab_size=32,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=24,
    qk_norm=True,
    norm_plus_one=True,
    attention_gate=True,
    rotary_dim=4,
    biases=("query", "out"),
    delta_net=DeltaNet(num_key_heads=2, num_value_heads=4, key_dim=6, value_dim=8, taps=3),
    layer_kinds=(DELTA, DELTA, ATTENTION),
)
T = 14


def random_params(config: DecoderConfig = CONFIG) -> Any:
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


def batch(rows: int = 2) -> tuple[Any, Any, Any]:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (rows, T)).astype(np.int32)
    return tokens, np.tile(np.arange(T, dtype=np.int32), (rows, 1)), np.ones((rows, T), np.int32)


def test_logits_are_those_of_the_formulas() -> None:
    params, inputs = random_params(), batch()
    got = jax.jit(make_student(CONFIG).logits)(params, *inputs)
    host = jax.tree.map(np.asarray, params)
    for row, tokens in zip(got, inputs[0], strict=True):
        np.testing.assert_allclose(row, numpy_logits(CONFIG, host, tokens), atol=5e-5)


@pytest.mark.slow
def test_packed_documents_stay_apart() -> None:
    params, (tokens, positions, segments) = random_params(), batch()
    logits = jax.jit(make_student(CONFIG).logits)
    apart = logits(params, tokens, positions, segments)
    flat = (tokens.reshape(1, -1), positions.reshape(1, -1), np.repeat([[1, 2]], T, axis=1).astype(np.int32))
    np.testing.assert_allclose(logits(params, *flat).reshape(apart.shape), apart, atol=5e-5)


def test_decode_agrees_with_the_whole_pass() -> None:
    """Rows that are padded on the left, a prompt in parts, then token by token. A row that has ended stays so."""
    params, (tokens, positions, segments) = random_params(), batch()
    lengths = np.array([T, T - 5])
    positions = np.maximum(np.arange(T)[None] - (T - lengths[:, None]), 0).astype(np.int32)
    segments = (np.arange(T)[None] >= T - lengths[:, None]).astype(np.int32)
    whole = jax.jit(make_student(CONFIG).hidden)(params, tokens, positions, segments)
    cache, rows, read = init_cache(CONFIG, 2, T), [], jax.jit(functools.partial(decode, CONFIG))
    for start, stop in ((0, 4), (4, 8), *((t, t + 1) for t in range(8, T))):
        part = np.s_[:, start:stop]
        hidden, cache = read(params, tokens[part], positions[part], segments[part], cache, jnp.int32(start))
        rows.append(hidden)
    real = segments > 0
    np.testing.assert_allclose(np.concatenate(rows, axis=1)[real], np.asarray(whole)[real], atol=5e-5)
    _, after = read(params, tokens[:, :1], positions[:, :1], np.zeros((2, 1), np.int32), cache, jnp.int32(T - 1))
    for own, before in zip(after.states, cache.states, strict=True):
        if own is not None:
            jax.tree.map(np.testing.assert_array_equal, own, before)


@pytest.mark.slow
def test_replies_do_not_depend_on_padding_or_on_who_is_in_the_batch() -> None:
    """Rows take new prompts while others go on: the state of the reply before must not stay."""
    params, prompts = random_params(), [np.arange(3, 3 + n, dtype=np.int32) for n in (6, 2, 9, 4, 5)]
    sample = lambda some, **more: jax.jit(make_sampler(CONFIG, SamplingSettings(7, pad_id=0), **more))(
        params, pad_prompts(some), jax.random.key(0)
    )
    want = sample(prompts)
    np.testing.assert_array_equal(sample(prompts, decode_batch_size=2).tokens, want.tokens)
    np.testing.assert_array_equal(sample(prompts[1:2]).tokens[0], want.tokens[1])


@pytest.mark.slow
def test_remat_changes_nothing() -> None:
    params, inputs = random_params(), batch()

    def grads(remat: str) -> Any:
        student = make_student(dataclasses.replace(CONFIG, remat=remat))
        return jax.jit(jax.grad(lambda p: jnp.sum(student.logits(p, *inputs)[..., 3])))(params)

    want = grads("none")
    for remat in ("dots", "minimal", "full", "qkv_proj,out_proj"):
        for a, b in zip(jax.tree.leaves(grads(remat)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"context": 2, "fsdp": 4}])
def test_eight_devices_compute_what_one_does(sizes: dict[str, int]) -> None:
    """A step: loss, and the parameters after it."""
    (tokens, positions, segments), params = batch(8), random_params()
    segments = np.where(np.arange(T)[None] < 6, 1, 2).astype(np.int32) * np.ones((8, 1), np.int32)
    own = cotgrpo.SftBatch(tokens, np.roll(tokens, -1, axis=1), positions % 6, segments, np.ones((8, T), np.float32))
    tx = optax.sgd(0.1)
    step = cotgrpo.make_sft_step(make_student(CONFIG), tx)
    create = lambda: cotgrpo.TrainState.create(params=jax.tree.map(jnp.copy, params), tx=tx, key=0)
    want, metrics = cotgrpo.jit_step(step)(create(), own)
    mesh = cotgrpo.make_mesh(**sizes)
    state = create()
    got, found = cotgrpo.jit_step(step, mesh=mesh)(jax.device_put(state, state_sharding(state, mesh)), own)
    assert found["loss"].mean() == pytest.approx(metrics["loss"].mean(), rel=1e-5)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.slow
def test_adapters_of_every_projection() -> None:
    """What is trained next to the frozen weights computes what the merged weights do."""
    params, inputs = random_params(), batch()
    lora = LoraConfig(rank=2, targets=("delta_", "query", "down"))
    adapters = jax.tree.map(lambda x: x + 0.1, init_lora(params, lora, jax.random.key(1)))
    names = {path[-2].key for path, _ in jax.tree.leaves_with_path(adapters)}
    assert names == {*DeltaNet().projections(1), "query", "down"}
    got = jax.jit(with_adapters(make_student(CONFIG)).logits)(AdaptedParams(params, adapters, lora), *inputs)
    want = jax.jit(make_student(CONFIG).logits)(merge(params, adapters, lora), *inputs)
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_counts() -> None:
    """Parameters, and the bytes of a state that does not grow with the columns of the cache."""
    assert sum(x.size for x in jax.tree.leaves(random_params())) == CONFIG.num_params()
    net = CONFIG.delta_net
    assert net is not None

    def state_bytes(columns: int) -> int:
        states = jax.eval_shape(lambda: init_cache(CONFIG, 1, columns)).states
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))

    ids = 4 * net.taps  # of the segments of the window and of the state
    assert state_bytes(9) == state_bytes(99) == 2 * 4 * (net.state_size + (net.taps - 1) * net.channels) + 2 * ids


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"num_value_heads": 5, "num_key_heads": 2}, "multiple of num_key_heads"),
        ({"taps": 0}, "taps must be at least 1"),
        ({"key_dim": -1}, "key_dim must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(kind: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaNet(**kind)


def test_delta_layers_need_their_options() -> None:
    with pytest.raises(ValueError, match="mixer 'delta' needs delta_net"):
        dataclasses.replace(CONFIG, delta_net=None)


QWEN3_5: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 64,
    # As published files have them.
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "hidden_act": "silu",
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "mamba_ssm_dtype": "float32",
    "mlp_only_layers": [],
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10_000_000,
        "rope_type": "default",
    },
}
WITH_IMAGES: dict[str, Any] = {
    "model_type": "qwen3_5",
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 28,
    "video_token_id": 29,
    "vision_start_token_id": 26,
    "vision_end_token_id": 27,
    "tie_word_embeddings": True,
    "text_config": QWEN3_5,
    "vision_config": {"model_type": "qwen3_5", "depth": 1},
}


@pytest.mark.parametrize("wrapped", [True, False], ids=["images", "text"])
def test_a_published_folder_goes_out_as_it_came(wrapped: bool, tmp_path: Path) -> None:
    """Images and the head for further tokens are skipped and written back, decays stay in float32."""
    hf, prefix = (WITH_IMAGES, "model.language_model.") if wrapped else (QWEN3_5, "model.")
    rng, config = np.random.default_rng(0), decoder_config(hf)
    shapes = stored_shapes(config, tensor_layout(config, family_of(hf), prefix))
    shapes |= {"mtp.fc.weight": (16, 32), "mtp.layers.0.self_attn.k_proj.weight": (32, 16)}
    shapes |= {"model.visual.blocks.0.norm1.weight": (8,)} if wrapped else {}
    in_float32 = ("A_log", "linear_attn.norm.weight")
    tensors = {
        name: rng.normal(size=shape).astype(np.float32 if name.endswith(in_float32) else jnp.bfloat16)
        for name, shape in shapes.items()
    }
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(hf))
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    loaded = load_pretrained(tmp_path / "in", "stored")
    assert [layer.mixer for layer in loaded.config.layers] == ["delta"] * 3 + ["attention"]
    assert loaded.config.rotary_dim == 4 and loaded.config.rope_theta == 1e7
    save_pretrained(tmp_path / "out", loaded.config, loaded.params, source=loaded)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.float32(written[name]), np.float32(tensor), err_msg=name)
    for name in tensors:
        if name.endswith(in_float32):
            assert written[name].dtype == np.float32
    assert decoder_config(config_json(loaded.config)) == decoder_config(hf)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"attn_output_gate": False}, "attn_output_gate is False; supported: True"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types must name"),
        ({"layer_types": ["linear_attention"] * 3 + ["sliding_attention"]}, "layer_types must name"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype is 'bfloat16'"),
        ({"hidden_act": "gelu"}, "unsupported hidden_act 'gelu'"),
        ({"linear_num_value_heads": 3}, "multiple of num_key_heads"),
        ({"linear_conv_kernel_dim": None}, "linear_conv_kernel_dim is None; expected a positive integer"),
        ({"linear_key_head_dim": "6"}, "linear_key_head_dim is '6'; expected a positive integer"),
        ({"linear_value_head_dim": 0}, "linear_value_head_dim is 0; expected a positive integer"),
    ],
)
def test_fields_that_the_decoder_lacks_are_an_error(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decoder_config(QWEN3_5 | field)


def test_delta_layers_alone() -> None:
    """Every layer is of the same kind: one stack, and no keys in the cache."""
    config = decoder_config(QWEN3_5 | {"layer_types": ["linear_attention"] * 4})
    assert config.layer_kinds is None and config.mixer == "delta" and not config.runs
    params = random_params(config)
    assert params["layers"]["delta_in"]["kernel"].shape[0] == 4
    assert decoder_config(config_json(config)) == config
    tokens, positions, segments = batch()
    logits = jax.jit(make_student(config).logits)(params, tokens % 31, positions, segments)
    np.testing.assert_allclose(
        logits[0], numpy_logits(config, jax.tree.map(np.asarray, params), tokens[0] % 31), atol=5e-5
    )
