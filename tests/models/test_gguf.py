"""GGUF files, in the form in which llama.cpp's converter writes them, with the `gguf` package as the oracle.

The converter itself needs torch and is in no package. What it changes in a checkpoint is in `as_converted`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from cotgrpo import make_mesh
from cotgrpo.models import ModelError, load_pretrained, save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params
from cotgrpo.models.huggingface.config import decoder_config
from cotgrpo.models.huggingface.folder import ModelFolder

gguf = pytest.importorskip("gguf")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "torch_dtype": "bfloat16",
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"model_type": "llama", "tie_word_embeddings": True}),
    "mistral": ("llama", {"model_type": "mistral", "sliding_window": None}),
    "qwen2": ("qwen2", {"model_type": "qwen2"}),
    "qwen3": ("qwen3", {"model_type": "qwen3", "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"model_type": "gemma2", "sliding_window": 32}),
    "gemma3": ("gemma3", {"model_type": "gemma3_text", "sliding_window": 32}),
}
"""{case: (`general.architecture`, fields of config.json)}."""


def exported(case: str, folder: Path) -> tuple[DecoderConfig, Any]:
    """Write a random model of a case as Hugging Face's folder."""
    hf = {**SIZES, **MODELS[case][1]}
    config = decoder_config(hf)
    source = ModelFolder(config, folder.parent, hf)
    params = init_params(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])
    save_pretrained(folder, config, params, source=source, dtype="float32")
    return config, params


def as_converted(name: str, array: np.ndarray, arch: str, config: DecoderConfig) -> np.ndarray:
    """What the converter changes: rotary pairs of Llama become neighbours, norms of Gemma get 1 added."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    count = next((n for key, n in heads.items() if f".{key}." in name), 0)
    if arch == "llama" and count:
        return array.reshape(count, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array + 1 if arch.startswith("gemma") and name.endswith("norm.weight") else array


def convert(case: str, tmp_path: Path, kind: str = "F32") -> tuple[Path, Any]:
    """A folder with the GGUF file of a random model, and its parameters."""
    config, params = exported(case, tmp_path / "hf")
    arch = MODELS[case][0]
    theirs = gguf.get_tensor_name_map(
        next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_layers
    )
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SIZES, **MODELS[case][1]}))
    writer = gguf.GGUFWriter(folder / "model.gguf", arch)
    for name, array in load_file(tmp_path / "hf" / "model.safetensors").items():
        mapped = theirs.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, f"the converter has no name for {name}"
        array = as_converted(name, array.astype(np.float32), arch, config)
        quantized = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(mapped, gguf.quantize(array, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, params


def largest_difference(got: Any, want: Any) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


@pytest.mark.parametrize("case", MODELS)
def test_every_tensor_comes_back(case: str, tmp_path: Path) -> None:
    """Every tensor of an export has a name in the converter's map, and is read back to the last bit."""
    folder, params = convert(case, tmp_path)
    loaded = load_pretrained(folder)
    assert largest_difference(loaded.params, params) < 1e-6
    assert (loaded.config.param_dtype, loaded.config.dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("kind", "most"), [("F16", 1e-3), ("BF16", 4e-3), ("Q8_0", 4e-3), ("Q5_1", 0.04), ("Q4_0", 0.1)]
)
def test_quantized_types(kind: str, most: float, tmp_path: Path) -> None:
    folder, params = convert("llama", tmp_path, kind)
    loaded = load_pretrained(folder)
    assert 0 < largest_difference(loaded.params, params) < most
    sharded = load_pretrained(folder, mesh=make_mesh(fsdp=2, tensor=4))
    assert largest_difference(sharded.params, loaded.params) == 0
    out = save_pretrained(tmp_path / "out", loaded.config, loaded.params, source=loaded)
    assert {str(t.dtype) for t in load_file(out / "model.safetensors").values()} == {"bfloat16"}


def test_what_is_not_a_whole_model(tmp_path: Path) -> None:
    folder, _ = convert("llama", tmp_path)
    whole = (folder / "model.gguf").read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message) as error:
            load_pretrained(folder)
        assert "\n" not in str(error.value)

    (folder / "other.gguf").write_bytes(whole)
    refused("holds 2 GGUF models")
    (folder / "other.gguf").unlink()
    for size in (0, 3, 100, 5000, len(whole) - 4000):
        (folder / "model.gguf").write_bytes(whole[:size])
        refused("is not a whole GGUF file")
    (folder / "model.gguf").rename(folder / "model-00001-of-00002.gguf")
    refused("holds 1 of 2 parts")
    (folder / "model-00001-of-00002.gguf").write_bytes(whole)
    (folder / "model-00001-of-00002.gguf").rename(folder / "model.gguf")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    refused("no config.json next to its GGUF weights")
    (folder / "config.json").write_text(json.dumps(hf | {"num_hidden_layers": 3}))
    refused(r"lacks model\.layers\.2\.")
    with pytest.raises(ModelError, match="is a file, and a student is a folder"):
        load_pretrained(folder / "model.gguf")


def test_an_architecture_that_is_not_read(tmp_path: Path) -> None:
    folder, _ = convert("llama", tmp_path)
    writer = gguf.GGUFWriter(folder / "model.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="the architecture 'mamba' is not read; supported: llama"):
        load_pretrained(folder)
