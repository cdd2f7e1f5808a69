"""An adapter that `peft` has written as `student.path`: trained further, merged, pinned and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.commands import error_of, options, read, write_rows_and_model
from safetensors.numpy import load_file, save_file

from cotgrpo.cli import main
from cotgrpo.config import parse_config
from cotgrpo.models import ModelError, load_pretrained
from cotgrpo.models.huggingface.adapters import save_adapter
from cotgrpo.models.huggingface.folder import open_folder
from cotgrpo.models.lora import LoraConfig, init_lora
from cotgrpo.training.inputs import model_of
from cotgrpo.training.weights import restore_weights

LORA = LoraConfig(rank=2, alpha=6.0, targets=("query", "down"), rslora=True)
SAME = ["--lora.rank", "2", "--lora.alpha", "6", "--lora.targets", "[query, down]", "--lora.rslora", "true"]
CHAT = ["--data.format", "chat"]


def write_adapter(folder: Path, base: str) -> Path:
    """An adapter next to the model in `folder`, with an update that is not zero."""
    params = load_pretrained(folder / "model").params
    rng = np.random.default_rng(0)
    adapters = init_lora(params, LORA, jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), adapters)
    return save_adapter(folder / "adapter", adapters, LORA, base)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a model, a config and an adapter; `run` trains the adapter further."""
    folder = tmp_path_factory.mktemp("adapter")
    write_rows_and_model(folder)
    adapter = write_adapter(folder, str(folder / "model"))
    more = ["--student.path", str(adapter), *CHAT, *SAME, "--run_dir", str(folder / "run")]
    assert main(["sft", *options(folder, *more)]) == 0
    return folder


def merged_by_numpy(folder: Path) -> dict[str, np.ndarray]:
    """`W + alpha / sqrt(rank) B A` of the stored tensors, by the definition of the format."""
    tensors, stored = (
        load_file(folder / "model" / "model.safetensors"),
        load_file(folder / "adapter" / "adapter_model.safetensors"),
    )
    for name in [name for name in stored if "lora_A" in name]:
        update = stored[name.replace("lora_A", "lora_B")].astype(np.float64) @ stored[name].astype(np.float64)
        own = name.removeprefix("base_model.model.").replace(".lora_A", "")
        tensors[own] = (tensors[own] + 6.0 / np.sqrt(2) * update).astype(np.float32)
    return tensors


def test_loaded_as_its_model_with_the_update(folder: Path) -> None:
    model = load_pretrained(folder / "adapter")
    want = merged_by_numpy(folder)
    for ours, theirs in (("query", "self_attn.q_proj"), ("down", "mlp.down_proj"), ("up", "mlp.up_proj")):
        for layer in range(2):
            expected = want[f"model.layers.{layer}.{theirs}.weight"].T
            np.testing.assert_allclose(model.params["layers"][ours]["kernel"][layer], expected, atol=1e-5)
    assert model.student.vocab_size == load_pretrained(folder / "model").student.vocab_size


def test_trained_further_pinned_and_exported(folder: Path, tmp_path: Path) -> None:
    run = folder / "run" / "sft"
    assert read(run / "report.json")["held_out_loss"]["sft"] < read(run / "report.json")["held_out_loss"]["base"]
    record = read(run / "student" / "base.json")
    assert record["base"] == str(folder / "model") and record["adapter"] == str(folder / "adapter")
    assert {"weights", "adapter", "tokenizer"} <= set(record["fingerprint"])
    arguments = options(folder, "--student.path", str(folder / "adapter"), *CHAT, *SAME)
    weights, step = restore_weights(run, model_of(parse_config(arguments), run, None, []))
    first = load_pretrained(folder / "model").params["layers"]
    np.testing.assert_array_equal(weights.base["layers"]["query"]["kernel"], first["query"]["kernel"])
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    start = stored["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].T
    moved = np.abs(np.asarray(weights.trained["layers"]["query"]["lora_b"][0]) - start).max()
    assert step == 4 and 0 < moved < 0.02, "the adapter goes on from where it was"
    assert main(["export", "--run_dir", str(folder / "run"), "--out", str(tmp_path / "out"), "--adapter"]) == 0
    assert read(tmp_path / "out" / "adapter_config.json")["use_rslora"]
    assert main(["eval", "--run_dir", str(folder / "run")]) == 0
    assert read(run / "eval.json")["loss"] == read(run / "after.json")["loss"]


def test_merged_if_no_lora_is_configured(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--student.path", str(folder / "adapter"), *CHAT, "--sft.steps", "1", "--run_dir", str(tmp_path / "run")]
    assert main(["sft", *options(folder, *more)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"{folder / 'model'} with the adapter {folder / 'adapter'}, which is merged" in text
    base = read(tmp_path / "run" / "sft" / "report.json")["held_out_loss"]["base"]
    assert base == pytest.approx(read(folder / "run" / "sft" / "report.json")["held_out_loss"]["base"], rel=1e-4)
    arguments = options(folder, *CHAT, "--model", str(folder / "adapter"), "--out", str(tmp_path / "eval"))
    assert main(["eval", *arguments]) == 0
    assert read(tmp_path / "eval" / "eval.json")["loss"] == pytest.approx(base, rel=1e-4)


@pytest.mark.slow
def test_a_quantized_base_under_an_adapter_of_peft(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("qwix")
    more = ["--student.path", str(folder / "adapter"), *CHAT, *SAME, "--run_dir", str(tmp_path / "run")]
    nf4 = ["--lora.quantize_base", "nf4", "--lora.block_size", "16"]
    assert main(["sft", *options(folder, *more, *nf4)]) == 0
    loss = read(tmp_path / "run" / "sft" / "report.json")["held_out_loss"]
    assert loss["sft"] < loss["base"]


def changed(folder: Path, to: Path, **settings: Any) -> Path:
    """A copy of the adapter with other settings."""
    adapter = shutil.copytree(folder / "adapter", to / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings), encoding="utf-8")
    return adapter


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"base_model_name_or_path": None}, "has no base_model_name_or_path"),
        ({"base_model_name_or_path": "gone"}, "base_model_name_or_path cannot be opened. No folder gone"),
        ({"base_model_name_or_path": "SELF"}, "which is an adapter too"),
        ({"use_dora": True}, "unsupported setting use_dora = True"),
        ({"peft_type": "VERA"}, "unsupported peft_type 'VERA'"),
        ({"modules_to_save": ["lm_head"]}, "unsupported setting modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "unsupported setting rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "unsupported setting alpha_pattern"),
        ({"layers_to_transform": [0]}, "unsupported setting layers_to_transform"),
        ({"lora_bias": True}, "unsupported setting lora_bias"),
        ({"bias": "all"}, "unsupported bias 'all'"),
        ({"target_parameters": ["x"]}, "unsupported setting target_parameters"),
    ],
)
def test_adapters_that_cannot_be_read(settings: dict[str, Any], expected: str, folder: Path, tmp_path: Path) -> None:
    if settings.get("base_model_name_or_path") == "SELF":
        settings = {"base_model_name_or_path": str(tmp_path / "adapter")}
    with pytest.raises(ModelError) as error:
        load_pretrained(changed(folder, tmp_path, **settings))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_what_is_wrong_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled = changed(folder, tmp_path)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    right = "set lora.rank 2, lora.alpha 6, lora.rslora true and lora.targets [down, query]; or set lora.rank 0"
    for adapter, lora, expected in (
        (folder / "adapter", ["--lora.rank", "4"], right),
        (folder / "adapter", [*SAME, "--lora.targets", "[query]"], right),
        (pickled, SAME, "adapter_model.bin is a pickle"),
    ):
        more = ["--student.path", str(adapter), *CHAT, *lora, "--run_dir", str(tmp_path / "run")]
        assert main(["sft", *options(folder, *more)]) == 2
        assert expected in error_of(capsys)


def test_the_paths_that_an_adapter_may_name(folder: Path, tmp_path: Path) -> None:
    """A path of the model relative to the adapter's folder, and a tokenizer of its own."""
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    shutil.copytree(folder / "model", adapter / "base")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "base"}), encoding="utf-8")
    found = open_folder(adapter)
    assert (found.folder, found.adapter, found.tokenizer_folder) == (adapter / "base", str(adapter), adapter / "base")
    shutil.copyfile(folder / "model" / "tokenizer.json", adapter / "tokenizer.json")
    assert open_folder(adapter).tokenizer_folder == adapter
    # With whole weights next to it, a folder is a model, and peft's files are left alone.
    shutil.copyfile(folder / "model" / "config.json", adapter / "config.json")
    save_file(load_file(folder / "model" / "model.safetensors"), adapter / "model.safetensors")
    assert open_folder(adapter).adapter is None
    with pytest.raises(ModelError, match="base_model_name_or_path"):
        (tmp_path / "odd").mkdir()
        (tmp_path / "odd" / "adapter_config.json").write_text("{}", encoding="utf-8")
        open_folder(tmp_path / "odd")
