"""QLoRA through the command line: a base in nf4 under adapters, in both stages, resumed, measured and exported."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import error_of, options, read, whole_and_cut, write_rows_and_model

from cotgrpo.cli import main
from cotgrpo.config import parse_config
from cotgrpo.models import load_pretrained
from cotgrpo.models.lora import is_quantized
from cotgrpo.rollouts.rollouts import Rollouts
from cotgrpo.training.inputs import model_of
from cotgrpo.training.weights import restore_weights

LORA = ["--lora.rank", "4", "--lora.alpha", "8", "--data.format", "chat"]
NF4 = [*LORA, "--lora.quantize_base", "nf4", "--lora.block_size", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a model and a config; `run` is an SFT run with QLoRA."""
    pytest.importorskip("qwix")
    folder = tmp_path_factory.mktemp("qlora")
    write_rows_and_model(folder)
    assert main(["sft", *options(folder, *NF4, "--run_dir", str(folder / "run"))]) == 0
    return folder


def test_only_adapters_are_saved_and_the_base_is_read_again(folder: Path) -> None:
    run = folder / "run" / "sft"
    loss = read(run / "report.json")["held_out_loss"]
    assert loss["sft"] < loss["base"]
    arrays = read(next((run / "checkpoints" / "4").glob("position/metadata")))["arrays"]
    assert {name.rsplit("/", 1)[-1] for name in arrays if name.startswith("params")} == {"lora_a", "lora_b"}
    config = parse_config(options(folder, *NF4, "--run_dir", str(folder / "run")))
    weights, _ = restore_weights(run, model_of(config, run, None, []))
    assert is_quantized(weights.base) and weights.base_name == str(folder / "model")
    assert weights.base["layers"]["up"]["kernel_nf4"].dtype == np.uint8
    assert main(["eval", "--run_dir", str(folder / "run")]) == 0
    measured, after = read(run / "eval.json"), read(run / "after.json")
    assert measured["loss"] == after["loss"] and measured["replies"] == after["replies"]


def test_merged_into_the_weights_before_they_were_quantized(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", "--run_dir", str(folder / "run"), "--out"]
    assert main([*export, str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert "as they were before nf4" in " ".join(capsys.readouterr().out.split())
    assert main([*export, str(tmp_path / "adapter"), "--adapter"]) == 0
    found = load_pretrained(tmp_path / "merged").params["layers"]
    first = load_pretrained(folder / "model").params["layers"]
    config = parse_config(options(folder, *NF4, "--run_dir", str(folder / "run")))
    run = folder / "run" / "sft"
    weights, _ = restore_weights(run, model_of(config, run, None, []), with_base=False)
    for name, pair in weights.trained["layers"].items():
        update = 2.0 * np.matmul(np.asarray(pair["lora_a"], np.float64), np.asarray(pair["lora_b"], np.float64))
        assert np.abs(update).max() > 1e-5
        np.testing.assert_allclose(found[name]["kernel"], first[name]["kernel"] + update, atol=1e-6)
    settings = read(tmp_path / "adapter" / "adapter_config.json")
    assert settings["r"] == 4 and (tmp_path / "adapter" / "tokenizer.json").is_file()
    # The adapter is a student itself: its base is found, and the merged weights are the same.
    again = load_pretrained(tmp_path / "adapter").params["layers"]
    np.testing.assert_allclose(again["up"]["kernel"], found["up"]["kernel"], atol=1e-6)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_rollouts_read_the_quantized_base(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*NF4, "--grpo.reference_kl", "0.5", "--grpo.log_every", "1", "--grpo.steps", "3", "--checkpoint.every", "1"]
    more += ["--grpo.ghosts.source", "privileged_self", "--grpo.ghosts.max_new_tokens", "8"]
    drawn: list[object] = []
    set_params = Rollouts.set_params

    def note(self: Rollouts, trained: object) -> None:
        set_params(self, trained)
        drawn.append(self.params)

    monkeypatch.setattr(Rollouts, "set_params", note)
    losses = whole_and_cut(folder, more, tmp_path, monkeypatch)
    assert losses["cut"] == losses["whole"] and len(losses["whole"]) == 4
    assert drawn and all(is_quantized(params.base) for params in drawn)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_all_parameters_after_qlora_start_from_the_whole_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run" / "sft", tmp_path / "run" / "sft")
    arguments = options(folder, "--data.format", "chat", "--run_dir", str(tmp_path / "run"))
    assert main(["grpo", *arguments]) == 0
    assert main(["export", "--run_dir", str(folder / "run"), "--out", str(tmp_path / "merged")]) == 0
    config = parse_config(arguments)
    weights, _ = restore_weights(tmp_path / "run" / "grpo", model_of(config, tmp_path / "run" / "grpo", None, []))
    assert not is_quantized(weights.trained)
    before, after = read(tmp_path / "run" / "grpo" / "before.json"), read(tmp_path / "run" / "sft" / "after.json")
    assert before["loss"] != after["loss"], "the student with whole kernels is measured again"
    assert before["loss"] == pytest.approx(after["loss"], rel=0.05)
    merged = load_pretrained(tmp_path / "merged").params["layers"]["up"]["kernel"]
    assert np.abs(weights.trained["layers"]["up"]["kernel"] - merged).max() < 1e-2


def test_what_is_wrong_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    new = ["--run_dir", str(tmp_path / "new")]
    nf4 = ["--lora.quantize_base", "nf4"]
    for more, message in (
        (nf4, "lora.quantize_base does not apply to a run with lora.rank 0"),
        ([*LORA, *nf4], "layers/down/kernel: a block of 64 inputs does not divide a kernel with 48 of them"),
        ([*LORA, *nf4, "--lora.block_size", "7"], "lora.block_size must be even"),
        ([*LORA, "--lora.block_size", "16"], "lora.block_size does not apply without quantize_base"),
        ([*LORA, "--lora.quantize_base", "float16"], "lora.quantize_base"),
        ([*LORA, "--load_in_4bit", "true"], "lora.quantize_base"),
        ([*NF4, "--student.path", "null"], "student is from scratch"),
    ):
        assert main(["sft", *options(folder, *new, *more)]) == 2, more
        assert message in error_of(capsys)
    monkeypatch.setitem(sys.modules, "qwix", None)
    assert main(["sft", *options(folder, *new, *NF4)]) == 2
    assert "pip install 'cotgrpo[qlora]'" in error_of(capsys)
    assert not (tmp_path / "new").exists()
