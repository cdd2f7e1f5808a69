"""Experts in checkpoints: a tensor each or one of all, read whole and by slices, and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.families import old_config
from safetensors.numpy import load_file, save_file

import cotgrpo
from cotgrpo.models import ModelError, load_pretrained, save_pretrained
from cotgrpo.models.huggingface.config import decoder_config
from cotgrpo.models.huggingface.expert_layout import expert_slots
from cotgrpo.models.huggingface.families import FAMILIES
from cotgrpo.models.huggingface.families.experts import EXPERTS
from cotgrpo.models.huggingface.safetensors_files import find_tensors

CASES = ("qwen3_moe_mixed", "qwen2_moe", "mixtral", "granitemoeshared", "gpt_oss")
"""One for each way in which a checkpoint names its experts."""


def random_params(config: Any) -> Any:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: cotgrpo.models.decoder.init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def saved(case: str, folder: Path) -> Any:
    """Save a decoder of the case with random parameters, and return these."""
    config = decoder_config(old_config(case))
    params = random_params(config)
    save_pretrained(folder, config, params)
    assert json.loads((folder / "config.json").read_text())["model_type"] == old_config(case)["model_type"]
    return params


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read(case: str, tmp_path: Path) -> None:
    """On one device, and by slices on a mesh."""
    params = saved(case, tmp_path / "model")
    for mesh in (None, cotgrpo.make_mesh(fsdp=4, tensor=2)):
        read = jax.device_get(load_pretrained(tmp_path / "model", mesh=mesh).params)
        jax.tree.map(np.testing.assert_array_equal, read, params)


NAMES = {
    "qwen3_moe_mixed": "mlp.experts.{e}.{part}_proj.weight",
    "qwen2_moe": "mlp.experts.{e}.{part}_proj.weight",
    "mixtral": "block_sparse_moe.experts.{e}.{part}.weight",
}
PARTS = {"mixtral": ("w1", "w3", "w2")}


@pytest.mark.parametrize("case", NAMES)
def test_one_tensor_of_all_experts_loads_too(case: str, tmp_path: Path) -> None:
    """As the classes of transformers 5 have them: gate and up in one tensor `[E, 2 F, D]`."""
    params = saved(case, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gate, up, down = PARTS.get(case, ("gate", "up", "down"))
    for layer in range(old_config(case)["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        take = lambda part, prefix=prefix: [
            tensors.pop(f"{prefix}{NAMES[case].format(e=e, part=part)}") for e in range(5)
        ]
        if f"{prefix}{NAMES[case].format(e=0, part=gate)}" in tensors:
            pairs = zip(take(gate), take(up), strict=True)
            tensors[f"{prefix}mlp.experts.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in pairs])
            tensors[f"{prefix}mlp.experts.down_proj"] = np.stack(take(down))
        if (router := tensors.pop(f"{prefix}block_sparse_moe.gate.weight", None)) is not None:
            tensors[f"{prefix}mlp.gate.weight"] = router
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(load_pretrained(tmp_path).params), params)


def test_a_slice_of_interleaved_experts_by_hand(tmp_path: Path) -> None:
    """gpt-oss: `[E, inputs, outputs]`, with gate and up by turns."""
    config = decoder_config(old_config("gpt_oss"))
    saved("gpt_oss", tmp_path)
    slots = expert_slots(config, FAMILIES["gpt_oss"].experts[0], "model.layers.1.")
    tensor = find_tensors(tmp_path)["model.layers.1.mlp.experts.gate_up_proj"]
    whole = tensor.read()
    np.testing.assert_array_equal(slots["up"][3].read(tensor, slice(2, 9), slice(1, 5)), whole[3, 2:9, 3:11:2])
    np.testing.assert_array_equal(slots["gate"][0].read(tensor), whole[0, :, 0::2])


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_gpt_oss_as_it_is_published(mesh: dict[str, int] | None, tmp_path: Path) -> None:
    """Experts in MXFP4: 32 numbers of 4 bits share an exponent, and gate and up alternate."""
    hf = old_config("gpt_oss") | {"intermediate_size": 32, "quantization_config": {"quant_method": "mxfp4"}}
    config = decoder_config({name: value for name, value in hf.items() if name != "quantization_config"})
    params, rng = random_params(config), np.random.default_rng(1)
    save_pretrained(tmp_path, config, params)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    tensors = load_file(tmp_path / "model.safetensors")
    experts = params["layers"]["experts"]
    for layer in range(config.num_layers):
        for name, outputs in (("gate_up_proj", 64), ("down_proj", 32)):
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[prefix]
            blocks = rng.integers(0, 256, (5, outputs, 1, 16)).astype(np.uint8)
            scales = rng.integers(124, 130, (5, outputs, 1)).astype(np.uint8)
            tensors |= {f"{prefix}_blocks": blocks, f"{prefix}_scales": scales}
            numbers = FP4[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(5, outputs, 32)
            whole = (numbers * 2.0 ** (np.float32(scales) - 127)).swapaxes(1, 2)  # [E, inputs, outputs]
            parts = {"gate": whole[:, :, 0::2], "up": whole[:, :, 1::2]} if outputs == 64 else {"down": whole}
            for part, value in parts.items():
                experts[part][layer] = value
    save_file(tensors, tmp_path / "model.safetensors")
    read = load_pretrained(tmp_path, "float32", mesh=mesh and cotgrpo.make_mesh(**mesh)).params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(read), params)


@pytest.mark.parametrize(
    ("case", "missing"),
    [
        ("qwen3_moe_mixed", "model.layers.1.mlp.experts.4.up_proj.weight"),
        ("gpt_oss", "model.layers.3.mlp.experts.down_proj_bias"),
        ("gpt_oss", "model.layers.0.self_attn.sinks"),
        ("granitemoeshared", "model.layers.1.block_sparse_moe.router.layer.weight"),
    ],
)
def test_a_missing_or_unexpected_tensor_is_named(case: str, missing: str, tmp_path: Path) -> None:
    saved(case, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    own = tensors.pop(missing)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"lacks {missing}"):
        load_pretrained(tmp_path)
    save_file({**tensors, missing: own[..., :-1].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{missing} has the shape"):
        load_pretrained(tmp_path)


def test_every_family_names_its_experts() -> None:
    assert all(family.experts for family in EXPERTS.values())
