"""Checkpoints as people have them: prefixes, pointers, quantized folders, and what an export keeps of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from cotgrpo import make_mesh
from cotgrpo.models import ModelError, load_pretrained, save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params
from cotgrpo.models.huggingface.folder import open_folder
from cotgrpo.models.huggingface.safetensors_files import StoredTensor

CONFIG = DecoderConfig(
    vocab_size=97, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24, tied_head=False
)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture
def folder(tmp_path: Path, params: Any) -> Path:
    return save_pretrained(tmp_path / "model", CONFIG, params)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")


def rewrite_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_equal(got: Any, want: Any) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("prefix", ["", "model.model.", "language_model.model.", "module.model.", "_orig_mod.model."])
@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight", "module.lm_head.weight"])
def test_any_prefix(prefix: str, head: str, folder: Path, params: Any, tmp_path: Path) -> None:
    """The parameters are found, and an export has the names that transformers reads."""
    before = (folder / "model.safetensors").read_bytes()
    rewrite(folder, lambda t: {head if n == "lm_head.weight" else prefix + n.removeprefix("model."): t[n] for n in t})
    loaded = load_pretrained(folder)
    assert_equal(loaded.params, params)
    save_pretrained(tmp_path / "out", loaded.config, loaded.params, source=loaded)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_text_part_beside_its_images(folder: Path, params: Any) -> None:
    """A text config next to the weights of the whole model."""
    rewrite(
        folder,
        lambda t: (
            {n.replace("model.", "model.language_model.", 1): t[n] for n in t}
            | {"model.vision_tower.blocks.0.weight": np.ones((2, 2), np.float32)}
        ),
    )
    assert_equal(load_pretrained(folder).params, params)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize(("content", "message"), [(POINTER, "pointer of Git LFS"), (b"<!DOCTYPE html>", "web page")])
def test_what_is_not_the_file(name: str, content: bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name} is a {message}.*hf download"):
        load_pretrained(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_weights_that_are_not_numbers(value: float, name: str, kind: str, folder: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {n: t.astype(jnp.dtype(kind)) for n, t in tensors.items()}
        tensors[name].reshape(-1)[3] = value
        return tensors

    rewrite(folder, spoil)
    with pytest.raises(ModelError, match=rf"model\.safetensors: {name} holds {value}"):
        load_pretrained(folder)


def test_shards_without_their_index(params: Any, tmp_path: Path) -> None:
    folder = save_pretrained(tmp_path / "out", CONFIG, params, max_shard_bytes=8000)
    (folder / "model.safetensors.index.json").unlink()
    assert_equal(load_pretrained(folder).params, params)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].rename(folder / "other.safetensors")
    with pytest.raises(ModelError, match=rf"lacks {shards[1].name}, one of {len(shards)} shards"):
        load_pretrained(folder)
    for shard in (shards[0], *shards[2:]):
        shard.unlink()
    with pytest.raises(ModelError, match=r"No weights in .* It holds other\.safetensors: .*rename it"):
        load_pretrained(folder)


def quantize(folder: Path) -> dict[str, np.ndarray]:
    """Store the projections in fp8 with a scale for each block of 8x8. Return what they are then."""
    want: dict[str, np.ndarray] = {}

    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        stored: dict[str, np.ndarray] = {}
        for name, w in tensors.items():
            want[name] = stored[name] = w.astype(jnp.bfloat16)
            if name.endswith("proj.weight"):
                blocks = w.reshape(w.shape[0] // 8, 8, -1, 8)
                scale = np.abs(blocks).max((1, 3)) / 448
                stored[name] = (blocks / scale[:, None, :, None]).reshape(w.shape).astype(jnp.float8_e4m3fn)
                stored[f"{name}_scale_inv"] = scale
                want[name] = stored[name].astype(np.float32) * np.kron(scale, np.ones((8, 8), np.float32))
        return stored

    rewrite_fp8(folder, change(load_file(folder / "model.safetensors")))
    rewrite_config(folder, dtype="bfloat16")
    rewrite_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    return want


def rewrite_fp8(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file by hand: the library does not take fp8 of NumPy."""
    codes = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
    header: dict[str, Any] = {}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": codes[str(array.dtype)], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)


def test_a_quantized_model_in_and_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded in floating point, by slices on a mesh, and exported in bfloat16 without a quantization."""
    want = quantize(folder)
    alone = load_pretrained(folder)
    for layer in range(2):
        np.testing.assert_array_equal(
            alone.params["layers"]["down"]["kernel"][layer].T, want[f"model.layers.{layer}.mlp.down_proj.weight"]
        )
    assert (alone.config.param_dtype, alone.config.dtype) == ("float32", "bfloat16")
    taken: dict[str, list[int]] = {}
    read = StoredTensor.read

    def counted(self: StoredTensor, index: Any = None) -> np.ndarray:
        part = read(self, index)
        taken.setdefault(self.name, []).append(part.nbytes)
        return part

    monkeypatch.setattr(StoredTensor, "read", counted)
    sharded = load_pretrained(folder, mesh=make_mesh(fsdp=2, tensor=4))
    assert_equal(sharded.params, alone.params)
    assert taken["model.layers.0.mlp.up_proj.weight"] == [16 * 24 // 8] * 8, "each device's eighth, in fp8"
    monkeypatch.undo()
    save_pretrained(tmp_path / "out", alone.config, alone.params, source=alone)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for t in exported.values()} == {"bfloat16"} and exported.keys() == want.keys()
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in hf and hf["dtype"] == "bfloat16"


def test_a_quantization_that_no_field_names(folder: Path) -> None:
    quantize(folder)
    rewrite_config(folder, quantization_config=None)
    loaded = load_pretrained(folder)  # the parts tell enough
    assert np.isfinite(np.asarray(loaded.params["layers"]["up"]["kernel"])).all()


@pytest.mark.parametrize(
    ("card", "hint"),
    [("---\nbase_model: owner/whole\n---\n", "Its model card names owner/whole."), ("# text", "Its name suggests st.")],
)
def test_a_format_that_is_not_read_names_the_model(card: str, hint: str, folder: Path) -> None:
    folder = folder.rename(folder.with_name("st-exl3"))
    (folder / "README.md").write_text(card)
    rewrite_config(folder, quantization_config={"quant_method": "exl3"})
    with pytest.raises(ModelError, match=f"'exl3'.*in bfloat16. {hint}$") as error:
        open_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("named", [True, False])
def test_the_number_type_of_the_source_is_kept(kind: str, named: bool, params: Any, tmp_path: Path) -> None:
    """Also if config.json does not name it; a float32 tree in memory does not change what is written."""
    folder = save_pretrained(tmp_path / "model", CONFIG, params, dtype=kind)
    if not named:
        hf = json.loads((folder / "config.json").read_text())
        del hf["dtype"]
        (folder / "config.json").write_text(json.dumps(hf))
    loaded = load_pretrained(folder)
    assert loaded.config.param_dtype == "float32"
    save_pretrained(tmp_path / "out", loaded.config, loaded.params, source=loaded)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    save_pretrained(tmp_path / "wide", loaded.config, loaded.params, source=loaded, dtype="float32")
    assert {str(t.dtype) for t in load_file(tmp_path / "wide" / "model.safetensors").values()} == {"float32"}


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (70_000.0, "float16", r"of the size 70000, and float16 ends at 65504: export with --dtype bfloat16 or float32"),
        (-1e6, "float16", "of the size 1e"),
        (3.4e38, "bfloat16", r"of the size 3\.4e\+38, and bfloat16 ends"),
        (np.nan, "float32", "holds nan: the student is ruined"),
        (-np.inf, "bfloat16", "holds -inf: the student is ruined"),
    ],
)
def test_numbers_that_the_export_cannot_hold(
    value: float, dtype: str, message: str, params: Any, tmp_path: Path
) -> None:
    kernel = params["layers"]["down"]["kernel"]
    spoiled = {**params, "layers": {**params["layers"], "down": {"kernel": kernel.at[1, 2, 3].set(value)}}}
    with pytest.raises(
        ModelError, match=rf"model\.layers\.1\.mlp\.down_proj\.weight holds .*{message.removeprefix('holds ')}"
    ):
        save_pretrained(tmp_path / "out", CONFIG, spoiled, dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_the_files_of_a_model_come_along(folder: Path, tmp_path: Path) -> None:
    kept = {
        **{name: f"text of {name}" for name in ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "merges.txt")},
        **{
            name: "x"
            for name in ("tokenizer.model", "spiece.model", "vocab.txt", "tekken.json", "preprocessor_config.json")
        },
        "vocab.json": "{}",
        "generation_config.json": '{\n  "eos_token_id": 2,\n  "top_p": 0.9\n}\n',
    }
    for name, text in {**kept, "README.md": "---\nlicense: apache-2.0\n---\n", "notes.md": "private"}.items():
        (folder / name).write_text(text)
    loaded = load_pretrained(folder)
    out = save_pretrained(tmp_path / "out", loaded.config, loaded.params, source=loaded)
    assert {name: (out / name).read_text() for name in kept} == kept
    assert not (out / "notes.md").exists()
    card = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert card["license"] == "apache-2.0" and "base_model" not in card, "a folder of this machine is no base model"
