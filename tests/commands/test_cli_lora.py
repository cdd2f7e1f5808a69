"""LoRA through the command line: adapters trained in both stages, resumed, measured, merged and exported for `peft`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import error_of, logits_of, options, read, whole_and_cut, write_rows_and_model
from safetensors.numpy import load_file

from cotgrpo.cli import main
from cotgrpo.config import parse_config
from cotgrpo.models import load_pretrained
from cotgrpo.models.lora import AdaptedParams
from cotgrpo.rollouts.rollouts import Rollouts
from cotgrpo.training import weights as weights_module
from cotgrpo.training.inputs import model_of
from cotgrpo.training.weights import restore_weights

LORA = ["--lora.rank", "4", "--lora.alpha", "8", "--lora.targets", "[query, value, down]", "--data.format", "chat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a model and a config; `run` is a run of both stages with LoRA."""
    folder = tmp_path_factory.mktemp("lora")
    write_rows_and_model(folder)
    for command in ("sft", "grpo"):
        assert main([command, *options(folder, *LORA, "--run_dir", str(folder / "run"))]) == 0
    return folder


def test_only_adapters_are_trained_and_both_stages_learn(folder: Path) -> None:
    report = read(folder / "run" / "grpo" / "report.json")
    loss = report["held_out_loss"]
    assert list(loss) == ["base", "sft", "grpo"] and loss["grpo"] < loss["sft"] < loss["base"]
    position = read(next((folder / "run" / "grpo" / "checkpoints" / "2").glob("position/metadata")))
    params = {name for name in position["arrays"] if name.startswith("params")}
    assert len(params) == 6 and all("lora_" in name for name in params)
    # GRPO trains the adapters of SFT on, beside the weights of the folder.
    config = parse_config(options(folder, *LORA, "--run_dir", str(folder / "run")))
    model = model_of(config, folder / "run" / "grpo", None, [])
    weights, step = restore_weights(folder / "run" / "grpo", model)
    first = load_pretrained(folder / "model").params["layers"]
    assert step == 2 and weights.base_name == str(folder / "model")
    np.testing.assert_array_equal(weights.base["layers"]["query"]["kernel"], first["query"]["kernel"])
    assert np.abs(weights.merged()["layers"]["query"]["kernel"] - first["query"]["kernel"]).max() > 1e-5
    np.testing.assert_array_equal(weights.merged()["layers"]["key"]["kernel"], first["key"]["kernel"])


def test_merged_export_says_and_scores_the_same(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    assert main(["export", "--run_dir", str(folder / "run"), "--out", str(out)]) == 0
    arguments = options(folder, "--data.format", "chat", "--model", str(out), "--out", str(tmp_path / "eval"))
    assert main(["eval", *arguments]) == 0
    measured, trained = read(tmp_path / "eval" / "eval.json"), read(folder / "run" / "grpo" / "after.json")
    assert measured["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    assert measured["replies"] == trained["replies"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert all(text in card for text in ("rank: 4", "Stage grpo, step 2 of 2", "Pair(beta=1.0"))
    assert main(["eval", "--run_dir", str(folder / "run")]) == 0
    assert read(folder / "run" / "grpo" / "eval.json")["loss"] == pytest.approx(trained["loss"], rel=1e-6)


def test_the_adapter_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    assert main(["export", "--run_dir", str(folder / "run"), "--out", str(out), "--adapter"]) == 0
    settings = read(out / "adapter_config.json")
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert settings["base_model_name_or_path"] == str(folder / "model")
    assert len(load_file(out / "adapter_model.safetensors")) == 2 * 3 * 2  # layers, projections, A and B
    assert "library_name: peft" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_peft_computes_the_same(folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    run = ["export", "--run_dir", str(folder / "run")]
    assert main([*run, "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    assert main([*run, "--out", str(tmp_path / "merged")]) == 0
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    tokens = np.arange(7, 40)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens[None])).logits[0].numpy()
    ours = load_pretrained(tmp_path / "merged")
    size = ours.student.vocab_size
    np.testing.assert_allclose(logits_of(ours, tokens)[:, :size], want[:, :size], atol=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a frozen reference and dropout: the reference is the student before the stage, also after a resume."""
    more = [*LORA, "--lora.dropout", "0.2", "--grpo.reference_kl", "0.5", "--grpo.log_every", "1"]
    more += ["--grpo.steps", "3", "--checkpoint.every", "1"]
    losses = whole_and_cut(folder, more, tmp_path, monkeypatch)
    assert losses["cut"] == losses["whole"] and len(losses["whole"]) == 4


@pytest.mark.slow
def test_beside_a_trained_stage_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All parameters in SFT and adapters in GRPO, then all parameters again."""
    run = tmp_path / "run"
    arguments = options(folder, "--data.format", "chat", "--run_dir", str(run))
    assert main(["sft", *arguments]) == 0
    assert main(["grpo", *arguments, *LORA]) == 0
    loss = read(run / "grpo" / "report.json")["held_out_loss"]
    assert loss["sft"] == read(run / "sft" / "report.json")["held_out_loss"]["sft"] > loss["grpo"]
    assert main(["export", "--run_dir", str(run), "--out", str(tmp_path / "out"), "--adapter"]) == 2
    assert "not a pretrained model" in error_of(capsys)
    again = options(folder, "--data.format", "chat", "--run_dir", str(tmp_path / "again"))
    assert main(["grpo", *again, "--grpo.init_from", str(run / "grpo")]) == 0
    measured = read(tmp_path / "again" / "grpo" / "report.json")["held_out_loss"]
    assert measured["sft"] == pytest.approx(loss["grpo"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["privileged_self", "verified_reward"])
def test_nothing_is_merged_while_a_student_is_trained(
    source: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts, the live ghost, the reference and all measurements apply the adapters next to the base."""
    shutil.copytree(folder / "run" / "sft", tmp_path / "run" / "sft")
    (tmp_path / "run" / "sft" / "after.json").unlink()  # it is measured again
    drawn: list[object] = []
    set_params = Rollouts.set_params

    def note(self: Rollouts, trained: object) -> None:
        set_params(self, trained)
        drawn.append(self.params)

    monkeypatch.setattr(Rollouts, "set_params", note)
    monkeypatch.setattr(weights_module, "merge", lambda *args: pytest.fail("the adapters are merged"))
    more = ["--grpo.ghosts.source", source, "--grpo.ghosts.max_new_tokens", "8", "--run_dir", str(tmp_path / "run")]
    if source == "privileged_self":
        more += ["--grpo.reference_kl", "0.1"]
    else:
        more += ["--grpo.objective.name", "group_relative", "--grpo.ghosts.num_generations", "2"]
    assert main(["grpo", *options(folder, *LORA, *more)]) == 0
    assert len(drawn) == 2 and all(isinstance(params, AdaptedParams) for params in drawn)
    assert main(["eval", "--run_dir", str(tmp_path / "run")]) == 0
    measured, trained = (read(tmp_path / "run" / "grpo" / name) for name in ("eval.json", "after.json"))
    assert measured["loss"] == trained["loss"] and measured["replies"] == trained["replies"]


def test_what_is_wrong_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, run = ["--run_dir", str(tmp_path / "new")], ["--run_dir", str(folder / "run")]
    onto = ["--grpo.init_from", str(folder / "run" / "sft")]
    plain = shutil.copytree(folder / "run" / "sft", tmp_path / "plain" / "best")
    for arguments, message in (
        (["sft", *options(folder, *new, "--lora.rank", "-1")], "lora.rank must be at least 1, got -1"),
        (["sft", *options(folder, *new, "--lora.alpha", "8")], "lora.alpha does not apply to a run with lora.rank 0"),
        (["sft", *options(folder, *new, "--lora.rank", "4", "--lora.dropout", "1")], "lora.dropout must lie in [0, 1)"),
        (["sft", *options(folder, *new, "--lora.rank", "4", "--lora.targets", "[qkv]")], "'qkv' matches no projection"),
        (["sft", *options(folder, *new, "--lora.rank", "4", "--student.path", "null")], "student is from scratch"),
        (["sft", *options(folder, *LORA, *run, "--lora.rank", "8")], "lora.rank (4 there, 8 now)"),
        (["grpo", *options(folder, *new, *LORA, *onto, "--lora.rank", "8")], "cannot be trained further as"),
        (["grpo", *options(folder, *new, *LORA, "--grpo.init_from", str(plain))], "expected RUN_DIR/sft"),
        (["export", *run, "--out", str(tmp_path / "o"), "--adapter", "--dtype", "bfloat16"], "Leave --dtype out"),
        (["export", *run, "--out", str(tmp_path / "o"), "--adaptr"], "Did you mean --adapter?"),
    ):
        assert main(arguments) == 2, arguments
        assert message in error_of(capsys)
    assert not (tmp_path / "new").exists() and not (tmp_path / "o").exists()
