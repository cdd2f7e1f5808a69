"""Pretrained students through the command line: a model folder in, SFT, GRPO, and an equal model folder out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.commands import error_of, logits_of, options, read, write_rows_and_model
from safetensors.numpy import load_file

from cotgrpo.checkpoints.manager import CheckpointError
from cotgrpo.cli import main
from cotgrpo.config import load_config
from cotgrpo.data.tokenizer import UNDECODABLE, train_tokenizer
from cotgrpo.models import load_pretrained
from cotgrpo.training import stages
from cotgrpo.training.inputs import load_eval_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a model and a config; `chat` is a run of SFT."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_rows_and_model(folder)
    train(folder, "chat", "sft")
    return folder


def train(folder: Path, form: str, last: str) -> Path:
    """A run with this format of the data up to a stage, unless it is there."""
    for command in ("sft", "grpo")[: 1 + (last == "grpo")]:
        assert main([command, *options(folder, "--data.format", form, "--run_dir", str(folder / form))]) == 0
    return folder / form


FORMS = [("chat", "sft"), pytest.param("plain", "grpo", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("form", "last"), FORMS)
def test_trained_exported_and_measured_again(form: str, last: str, folder: Path, tmp_path: Path) -> None:
    run, out = train(folder, form, last), tmp_path / "export"
    loss = read(run / last / "report.json")["held_out_loss"]
    assert list(loss) == ["base", "sft", "grpo"][: len(loss)] and list(loss)[-1] == last
    assert sorted(loss.values(), reverse=True) == list(loss.values())
    assert main(["export", "--run_dir", str(run), "--out", str(out)]) == 0
    # The same rows are held out, from data.train and the seed, without a run.
    arguments = options(folder, "--data.format", form, "--model", str(out), "--out", str(tmp_path / "eval"))
    assert main(["eval", *arguments]) == 0
    measured, trained = read(tmp_path / "eval" / "eval.json"), read(run / last / "after.json")
    assert measured["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    for name in ("accuracy", "replies", "truncated", "unparsable"):
        assert measured[name] == trained[name]
    generation = read(out / "generation_config.json")
    assert generation["eos_token_id"] == ([4, 1] if form == "chat" else 1)
    assert read(out / "config.json") == read(folder / "model" / "config.json")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / "model" / name).read_bytes()


def test_the_model_card(folder: Path, tmp_path: Path) -> None:
    assert (
        main(["export", "--run_dir", str(folder / "chat"), "--out", str(tmp_path / "named"), "--dtype=bfloat16"]) == 0
    )
    card = (tmp_path / "named" / "README.md").read_text(encoding="utf-8")
    report = read(folder / "chat" / "sft" / "report.json")
    for text in (
        "# named",
        str(folder / "rows.jsonl"),
        "12 of these rows, left out of training",
        "<|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant",
        "Stage sft, step 4 of 4",
        f"| held-out rows, base | {report['accuracy']['base']['value']:.1%} of 12 (95 % interval",
        "| held-out rows, sft |",
        "learning_rate: 0.001",
        f"- orbax-checkpoint {report['versions']['orbax-checkpoint']}",
    ):
        assert text in card, text
    assert "width:" not in card, "the shape is that of config.json"
    assert "datasets" not in yaml.safe_load(card.split("---")[1]), "files are no data sets of the hub"
    tensors = load_file(tmp_path / "named" / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {"bfloat16"}


def test_the_first_stage_starts_from_the_weights(folder: Path) -> None:
    """Before SFT, the loss is that of the model folder itself, whose padded rows count for nothing."""
    before = read(folder / "chat" / "sft" / "before.json")
    setup = load_eval_inputs(load_config(folder / "chat" / "sft" / "config.yaml"))
    loaded = load_pretrained(folder / "model")
    assert setup.model.vocab_size == loaded.student.vocab_size == loaded.config.vocab_size - 5
    total = weight = 0.0
    for example in setup.test:
        logits = logits_of(loaded, example.tokens)[:, : setup.model.vocab_size]
        nll = np.log(np.exp(logits).sum(-1))[:-1] - logits[np.arange(len(logits) - 1), example.tokens[1:]]
        total += nll[example.supervised[1:]].sum()
        weight += example.supervised.sum()
    assert before["loss"] == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.slow
def test_weights_are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed stage, the next stage, eval and export need config.json and the tokenizer alone."""
    model = shutil.copytree(folder / "model", tmp_path / "model")
    more = ["--run_dir", str(tmp_path / "run"), "--student.path", str(model), "--data.format", "plain"]
    arguments = options(folder, *more)
    with monkeypatch.context() as patch:

        def stop(*args: Any, **kwargs: Any) -> None:
            raise CheckpointError("stopped on the way")

        patch.setattr(stages, "write_stage_report", stop)
        assert main(["sft", *arguments]) == 2
    (model / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "sft" / "checkpoints" / "4")
    assert main(["sft", *arguments]) == 0
    assert main(["grpo", *arguments]) == 0
    assert main(["eval", "--run_dir", str(tmp_path / "run")]) == 0
    assert main(["export", "--run_dir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    got, want = (read(run / "grpo" / "report.json") for run in (tmp_path / "run", train(folder, "plain", "grpo")))
    assert got["samples"] == want["samples"] and got["held_out_loss"] == want["held_out_loss"]


@pytest.mark.slow
def test_grpo_straight_from_the_model_and_near_it(folder: Path, tmp_path: Path) -> None:
    model = str(folder / "model")
    arguments = options(folder, "--run_dir", str(tmp_path), "--grpo.init_from", model, "--data.format", "chat")
    assert main(["grpo", *arguments, "--grpo.reference_kl", "0.5"]) == 0
    report = read(tmp_path / "grpo" / "report.json")
    assert list(report["accuracy"]) == ["base", "grpo"]
    assert report["held_out_loss"]["base"] == read(folder / "chat" / "sft" / "before.json")["loss"]


def test_held_out_rows_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", f"--model={folder / 'model'}", "--eval.rows", "3", "--eval.max_new_tokens", "4"]
    assert main([*arguments, "--data.test", str(folder / "rows.jsonl")]) == 0
    assert "0.0% of 3" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "data.test is empty" in error_of(capsys)
    assert main([*arguments, "--run_dir", str(tmp_path)]) == 2
    assert "--model and --run_dir name two students" in error_of(capsys)
    assert main(["eval", "--model"]) == 2
    assert "--model: expected one argument" in error_of(capsys)


@pytest.mark.parametrize(("form", "last"), FORMS)
def test_transformers_computes_the_same(form: str, last: str, folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "export"
    assert main(["export", "--run_dir", str(train(folder, form, last)), "--out", str(out)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    ours = load_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokens = np.asarray(tokenizer.encode("What is 12 + 30?"))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens[None])).logits[0].numpy()
    size = ours.student.vocab_size
    np.testing.assert_allclose(logits_of(ours, tokens)[:, :size], want[:, :size], atol=1e-4)
    # Greedy replies, and where they stop.
    reply = read(folder / form / last / "after.json")["replies"][0]
    text = [{"role": "user", "content": reply["question"]}]
    if form == "chat":
        prompt = tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
    else:
        prompt = f"{reply['question']}<sep>"
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    written = theirs.generate(inputs, max_new_tokens=8, do_sample=False)[0, inputs.shape[1] :]
    said = reply["text"].replace(UNDECODABLE, "\N{REPLACEMENT CHARACTER}")
    assert tokenizer.decode(written, skip_special_tokens=False) == said


def test_another_model_in_the_same_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", *options(folder, "--run_dir", str(folder / "chat"), "--student.path", "a/b")]) == 2
    assert f"student.path ('{folder / 'model'}' there, 'a/b' now)" in error_of(capsys)


def test_export_says_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = ["--run_dir", str(folder / "chat")], ["--out", str(tmp_path / "out")]
    for arguments, message in (
        (out, "needs --run_dir DIR"),
        (run, "and --out FOLDER"),
        ([*run, "--out", str(folder)], "is not empty: give the export a folder of its own"),
        ([*run, *out, "--dtyp", "x"], "Unknown option --dtyp. Did you mean --dtype?"),
        ([*run, *out, "--dtype", "int8"], "Expected a typing.Literal['float32', 'bfloat16', 'float16']"),
        (["--run_dir", str(tmp_path), *out], "holds no trained student"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def unknown_type(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(read(model / "config.json") | {"model_type": "mamba"}))


def larger_tokenizer(model: Path) -> None:
    train_tokenizer(["abc"], vocab_size=600, special_tokens=("<pad>", "<eos>", *map(str, range(300)))).save_pretrained(
        model
    )


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (shutil.rmtree, [], "No folder"),
        (without_tokenizer, [], "No tokenizer in"),
        (unknown_type, [], "unknown model_type 'mamba'"),
        (larger_tokenizer, [], "but the embedding has"),
        (truncated, [], "model.safetensors"),
        (None, ["--data.seq_len", "20"], "but the window (seq_len) has 20"),
        (None, ["--student.width", "64"], "student.width does not apply to a pretrained student"),
        (None, ["--tokenizer.path", "{other}"], "is that of another model: its token"),
        (None, ["--grpo.init_from", "/no/such/folder"], "no such folder"),
    ],
)
def test_wrong_models_are_one_line(
    change: Any, more: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(folder / "model", tmp_path / "model")
    if change is not None:
        change(model)
    train_tokenizer(["zebras and yaks"] * 9, vocab_size=290).save_pretrained(tmp_path / "other")
    arguments = options(folder, "--run_dir", str(tmp_path / "run"), "--student.path", str(model))
    command = "grpo" if "--grpo.init_from" in more else "sft"
    assert main([command, *arguments, *(a.format(other=tmp_path / "other") for a in more)]) == 2
    assert message in error_of(capsys)
