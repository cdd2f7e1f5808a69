"""Where checkpoints keep weights: prefixes of models with images, fused tensors, orders of rows, adapters. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cotgrpo.models import ModelError, load_pretrained, save_pretrained
from cotgrpo.models.huggingface.adapters import load_adapter, save_adapter
from cotgrpo.models.huggingface.config import decoder_config, family_of
from cotgrpo.models.huggingface.tensor_layout import Slot, tensor_layout
from cotgrpo.models.huggingface.weights import stored_shapes
from cotgrpo.models.lora import LoraConfig, init_lora

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
GEMMA3: dict[str, Any] = {"model_type": "gemma3", "mm_tokens_per_image": 4, "vision_config": {}}
GEMMA3 |= {"text_config": {**SIZES, "model_type": "gemma3_text", "sliding_window": 4}}
ERNIE = {**SIZES, "model_type": "ernie4_5", "use_bias": True}
PHI = {**SIZES, "model_type": "phi3"}
APERTUS = {**SIZES, "model_type": "apertus", "hidden_act": "xielu"}


def write(folder: Path, hf: dict[str, Any], prefix: str = "model.", **more: np.ndarray) -> dict[str, np.ndarray]:
    """Write a checkpoint of random numbers. Return its tensors."""
    rng, config = np.random.default_rng(0), decoder_config(hf)
    shapes = stored_shapes(config, tensor_layout(config, family_of(hf), prefix))
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | more
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model."])
def test_a_model_with_images_stays_one(prefix: str, tmp_path: Path) -> None:
    """Names as they were, the other parts bit by bit in their own type, and the processor's files."""
    vision = {
        "vision_tower.layers.0.weight": np.arange(6, dtype=np.float16),
        "multi_modal_projector.w": np.ones((2, 2)),
        "audio_tower.input_max": np.array(np.inf),
    }
    tensors = write(tmp_path / "in", GEMMA3, prefix, **{k: v.astype(np.float16) for k, v in vision.items()})
    (tmp_path / "in" / "preprocessor_config.json").write_text("{}")
    loaded = load_pretrained(tmp_path / "in")
    assert loaded.config.num_layers == 2 and loaded.config.tied_head and loaded.config.norm_plus_one
    save_pretrained(tmp_path / "out", loaded.config, loaded.params, source=loaded)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys() and (tmp_path / "out" / "preprocessor_config.json").is_file()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype and np.array_equal(written[name], tensor), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == GEMMA3 | {"dtype": "float32"}


def test_unexpected_tensors_of_a_text_part_are_an_error(tmp_path: Path) -> None:
    write(
        tmp_path / "in", GEMMA3, "language_model.model.", **{"language_model.model.layers.2.x": np.ones(2, np.float32)}
    )
    with pytest.raises(ModelError, match=r"holds unexpected language_model\.model\.layers\.2\.x"):
        load_pretrained(tmp_path / "in")


def test_names_without_a_prefix(tmp_path: Path) -> None:
    """What the class without a head writes."""
    tensors = write(tmp_path / "in", ERNIE, "")
    loaded = load_pretrained(tmp_path / "in")
    np.testing.assert_array_equal(loaded.params["embedding"], tensors["embed_tokens.weight"])


@pytest.mark.parametrize("hf", [ERNIE, PHI, APERTUS], ids=["interleaved", "fused", "constants"])
def test_in_and_out(hf: dict[str, Any], tmp_path: Path) -> None:
    tensors = write(tmp_path / "in", hf)
    loaded = load_pretrained(tmp_path / "in")
    save_pretrained(tmp_path / "out", loaded.config, loaded.params, source=loaded)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    assert {name.rsplit(".", 1)[1] for name in written.keys() - tensors.keys()} <= {"beta", "eps"}


def test_rows_of_fused_and_interleaved_tensors(tmp_path: Path) -> None:
    fused = write(tmp_path / "phi", PHI)["model.layers.1.self_attn.qkv_proj.weight"]
    layers = load_pretrained(tmp_path / "phi").params["layers"]
    parts = [np.asarray(layers[name]["kernel"][1]).T for name in ("query", "key", "value")]
    np.testing.assert_array_equal(np.concatenate(parts), fused)
    stored = write(tmp_path / "ernie", ERNIE)["model.layers.0.self_attn.k_proj.weight"].reshape(2, 8, 16)
    ours = np.asarray(load_pretrained(tmp_path / "ernie").params["layers"]["key"]["kernel"][0]).T.reshape(2, 8, 16)
    np.testing.assert_array_equal(ours[:, :4], stored[:, 0::2])
    np.testing.assert_array_equal(ours[:, 4:], stored[:, 1::2])
    rows = np.arange(16)
    slot = Slot("x", heads=2)
    np.testing.assert_array_equal(slot.from_stored(slot.to_stored(rows)), rows)


def test_a_mesh_reads_fused_and_interleaved_tensors(tmp_path: Path) -> None:
    import cotgrpo

    mesh = cotgrpo.make_mesh(data=2, fsdp=2, tensor=2)
    for name, hf in (("phi", PHI), ("ernie", ERNIE)):
        write(tmp_path / name, hf)
        whole, sharded = load_pretrained(tmp_path / name), load_pretrained(tmp_path / name, mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, sharded.params, whole.params)


def test_other_constants_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "in", APERTUS, **{"model.layers.0.mlp.act_fn.beta": np.float32([0.25])})
    with pytest.raises(ModelError, match=r"act_fn\.beta is .*0\.25.*; supported: 0\.5"):
        load_pretrained(tmp_path / "in")


@pytest.mark.parametrize(
    ("hf", "name"),
    [
        (ERNIE, "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"),
        (GEMMA3, "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight"),
    ],
)
def test_adapters_in_the_model_s_own_names_and_order(hf: dict[str, Any], name: str, tmp_path: Path) -> None:
    write(tmp_path / "in", hf)
    params, lora = load_pretrained(tmp_path / "in").params, LoraConfig(rank=2, alpha=2.0)
    adapters = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(2), x.shape), init_lora(params, lora, jax.random.key(1))
    )
    save_adapter(tmp_path / "adapter", adapters, lora, hf_config=hf)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")[name].reshape(4, 8, 2)
    own = np.asarray(adapters["layers"]["query"]["lora_b"][1]).T.reshape(4, 8, 2)
    same = own if hf is GEMMA3 else np.stack([own[:, :4], own[:, 4:]], axis=2).reshape(4, 8, 2)
    np.testing.assert_array_equal(stored, same)
    loaded, _ = load_adapter(tmp_path / "adapter", params, hf_config=hf)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


def test_adapters_of_fused_modules_are_merged_only(tmp_path: Path) -> None:
    write(tmp_path / "in", PHI)
    params, lora = load_pretrained(tmp_path / "in").params, LoraConfig(rank=2)
    adapters = init_lora(params, lora, jax.random.key(1))
    with pytest.raises(ModelError, match=r"adapter of gate, key, query, up, value alone: a phi3 model keeps several"):
        save_adapter(tmp_path / "adapter", dict(adapters), lora, hf_config=PHI)
