"""The command line: a small run of every command, the same command again, the help, and the errors."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import SETTINGS, options, read

from cotgrpo import huge_pages
from cotgrpo.cli import COMMANDS, main, make_parser
from cotgrpo.config.files import option_names
from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.quickstart.quickstart import teach
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training.loop import TIME_KEYS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that `sft` and `grpo` have filled, next to the rows and the config."""
    folder = tmp_path_factory.mktemp("cli")
    write_triples(folder / "rows.jsonl", ProceduralTeacher(seed=1).draw(120))
    (folder / "c.yaml").write_text(f"run_dir: {folder / 'run'}\n{SETTINGS}", encoding="utf-8")
    for command in ("sft", "grpo"):
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            assert main([command, *options(folder)]) == 0
        (folder / f"{command}.txt").write_text(shown.getvalue(), encoding="utf-8")
    return folder


def test_a_run_announces_what_it_does(trained: Path) -> None:
    for stage, title, steps in (("sft", "sft", 6), ("grpo", "grpo teacher-forced", 4)):
        lines = (trained / f"{stage}.txt").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if "rows kept" in line]
        assert kept == ["training rows: 100 of 120 rows kept", "held-out rows: 20 of 20 rows kept"]
        order = [
            rf"{title}: {steps} steps of \d+ rows of 256 tokens",
            r"  about [\d.]+ passes over 100 sequences, which are [\d,]+ tokens",
            rf"{title}: compiling the step on \d+ x 256 tokens",
            rf"{title}: compiled in [\d.]+ s; needs [\d.]+ GB of memory on a device",
            rf"{title}  2/{steps}  loss .*",
            rf"{title}: about \d+ s of training left, {steps - 2} steps of [\d.]+ m?s",
            rf"after {title}: held-out accuracy [\d.]+% of 20",
            r"  95 % interval [\d.]+% to [\d.]+%, loss [\d.]+ on 20",
        ]
        found = [next((n for n, line in enumerate(lines) if re.fullmatch(form, line)), -1) for form in order[:-1]]
        assert -1 not in found and found == sorted(found), dict(zip(order, found, strict=False))
        assert re.fullmatch(order[-1], lines[found[-1] + 1])
        assert max(len(lines[number]) for number in found) <= 80


def test_a_run_leaves_what_it_promises(trained: Path) -> None:
    for stage, steps in (("sft", 6), ("grpo", 4)):
        folder = trained / "run" / stage
        for name in ("config.yaml", "metrics.jsonl", "report.html", "tokenizer/tokenizer.json", f"checkpoints/{steps}"):
            assert (folder / name).exists(), f"{stage}/{name}"
        assert list((folder / "tensorboard").glob("*tfevents*"))
        report = read(folder / "report.json")
        expected = ["base", "sft"] if stage == "sft" else ["base", "sft", "grpo"]
        assert list(report["accuracy"]) == expected
        assert all(row["n"] == 20 and row["low"] <= row["value"] <= row["high"] for row in report["accuracy"].values())
        assert report["data"]["training rows"]["read"] == 120 and report["data"]["held-out rows"]["read"] == 20
        rows = read_metrics(folder)
        assert [row["step"] for row in rows if "train/loss" in row] == list(range(2, steps + 1, 2))
        for row in rows:
            assert "train/loss" not in row or min(row[f"train/{n}"] for n in ("loss", "tokens_per_sec", "mfu")) > 0
        assert rows[-1]["eval/loss"] > 0 or rows[-2]["eval/loss"] > 0
    grpo = [row for row in read_metrics(trained / "run" / "grpo") if "train/loss" in row]
    for name in ("reward", "ghost_prob", "drawn_prob", "match_rate", "entropy", "grad_norm", "learning_rate"):
        assert all(f"train/{name}" in row for row in grpo), name
    loss = read(trained / "run" / "sft" / "report.json")["held_out_loss"]
    assert loss["sft"] < loss["base"]
    # GRPO starts where SFT ended: what SFT measured is not measured again.
    assert read(trained / "run" / "grpo" / "before.json") == read(trained / "run" / "sft" / "after.json")


def test_run_again_it_is_complete(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "run" / "sft" / "metrics.jsonl").read_bytes()
    assert main(["sft", *options(trained, "--sft.log_every", "1")]) == 0
    assert "is complete" in capsys.readouterr().out
    assert (trained / "run" / "sft" / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_same_folder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", *options(trained, "--sft.steps", "7", "--seed", "9")]) == 2
    error = capsys.readouterr().err
    assert "holds a run with another config: seed (0 there, 9 now); sft.steps (6 there, 7 now)" in error


def test_eval_takes_the_runs_own_settings(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--run_dir", str(trained / "run"), "--eval.rows", "7"]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    measured = read(trained / "run" / "grpo" / "eval.json")
    assert measured["step"] == 4 and measured["accuracy"]["n"] == 7 and len(measured["replies"]) == 7
    assert main(["eval", "--run_dir", str(trained / "run")]) == 0
    assert read(trained / "run" / "grpo" / "eval.json")["loss"] == read(trained / "run" / "grpo" / "after.json")["loss"]


def test_grpo_from_another_run(trained: Path, tmp_path: Path) -> None:
    """`init_from` brings the student's tokenizer along, and a reference model stays near the start."""
    more = [
        "--run_dir",
        str(tmp_path),
        "--grpo.init_from",
        str(trained / "run" / "sft"),
        "--grpo.reference_kl",
        "0.5",
    ]
    assert main(["grpo", *options(trained, *more)]) == 0
    tokenizer = "tokenizer/tokenizer.json"
    assert (tmp_path / "grpo" / tokenizer).read_bytes() == (trained / "run" / "sft" / tokenizer).read_bytes()
    rows = [row for row in read_metrics(tmp_path / "grpo") if "train/kl" in row]
    assert rows and all(row["train/kl"] >= 0 for row in rows)
    assert list(read(tmp_path / "grpo" / "report.json")["accuracy"]) == ["sft", "grpo"]


def test_grpo_of_another_shape_or_without_a_student(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["grpo", *options(trained, "--run_dir", str(tmp_path))]) == 2
    assert "run `cotgrpo sft`" in capsys.readouterr().err
    more = ["--run_dir", str(tmp_path / "b"), "--grpo.init_from", str(trained / "run" / "sft"), "--student.width", "48"]
    assert main(["grpo", *options(trained, *more)]) == 2
    assert "params/embedding is [300, 32] there, and here [300, 48]" in capsys.readouterr().err
    assert main(["eval", "--run_dir", str(tmp_path / "c")]) == 2
    assert "holds no trained student" in capsys.readouterr().err


def test_bad_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"question": "a", "rationale": "b", "answer": "c"}\n{"question": "a", "rationale"\n', encoding="utf-8"
    )
    assert main(["sft", "--run_dir", str(tmp_path / "run"), "--data.train", str(rows)]) == 2
    error = capsys.readouterr().err
    assert f"{rows}:2: not valid JSON" in error and error.count("\n") == 1


def test_a_command_that_is_mended_is_no_other_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What failed before training claims no folder, and leaves no tokenizer behind."""
    more = ["--run_dir", str(tmp_path)]
    assert main(["sft", *options(trained, *more, "--data.seq_len", "2", "--tokenizer.vocab_size", "270")]) == 2
    assert "seq_len" in capsys.readouterr().err
    assert main(["sft", *options(trained, *more)]) == 0
    assert "300 tokens in the vocabulary" in capsys.readouterr().out


def test_a_loss_that_is_never_finite_stops_the_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--run_dir", str(tmp_path), "--student.init_scale", "1e38", "--max_skipped", "3"]
    assert main(["sft", *options(trained, *more)]) == 3
    assert "3 updates in a row were skipped" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on(trained: Path, tmp_path: Path) -> None:
    """`tests/training` kills the loop at many moments; here it is the whole command, once."""

    def start(run_dir: Path) -> subprocess.Popen[str]:
        arguments = options(trained, "--run_dir", str(run_dir), "--sft.steps", "40", "--sft.log_every", "3")
        command = [sys.executable, "-m", "cotgrpo.cli", "sft", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = start(tmp_path / "whole")
    killed = start(tmp_path / "killed")
    log = tmp_path / "killed" / "sft" / "metrics.jsonl"
    while killed.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 4):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it ended before it could be killed"
    again = start(tmp_path / "killed")
    for process in (whole, again):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert "Resuming after step" in output
    rows = [
        [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_metrics(tmp_path / name / "sft")]
        for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1] and rows[0][-1]["step"] == 40
    reports = [read(tmp_path / name / "sft" / "report.json") for name in ("whole", "killed")]
    assert reports[0]["samples"] == reports[1]["samples"] and reports[0]["held_out_loss"] == reports[1]["held_out_loss"]


def test_help_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert "GhostRespond Policy Optimization, not Group Relative" in shown
        assert all(f"    {command} " in shown or f"    {command}\n" in shown for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cotgrpo 0.")
    for arguments, message in (
        (["evl"], "unknown command 'evl'. Did you mean eval?"),
        (["zzz"], "unknown command 'zzz'"),
        (["sft", "--sft.stepz", "3"], "Unknown option --sft.stepz. Did you mean --sft.steps?"),
        (["plan", "--topolgy", "v5p:2x2x1"], "Unknown option --topolgy. Did you mean --topology?"),
        (["plan"], "plan needs --topology"),
        (["sft", "--sft.steps", "0"], "sft.steps must be at least 1, got 0"),
        (["sft", "--distributed.process_id", "one"], "--distributed.process_id: invalid int value: 'one'"),
        (["gold", "--edited", "e", "--out", "o", "--rows", "wrong"], "--rows must be all or edited, got 'wrong'"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


SHOWN = {
    "quickstart": ("--out", "--run_dir", "--sft.steps", "--grpo.steps", "--distributed.coordinator"),
    "generate": ("--questions", "--teacher.model", "--verify.keep", "--out"),
    "gold": ("--student", "--ghosts", "--edited", "--rows", "--out"),
    "sft": ("--sft.optimizer.learning_rate", "--lora.rank", "--data.train", "--mesh.fsdp", "--distributed.process_id"),
    "grpo": ("--grpo.objective.beta", "--grpo.objective.kl_weight", "--grpo.ghosts.teacher", "--grpo.reference_kl"),
    "eval": ("--model", "--out", "--eval.rows", "--checkpoint.folder"),
    "plan": ("--topology", "--stage", "--search", "--out", "--grpo.micro_batches", "--sft.micro_batches"),
    "export": ("--run_dir", "--out", "--dtype", "--adapter"),
}
OF_TRAINING = ("--callbacks", "--trackers", "--tracker.", "--profile.")
NOT_SHOWN = {
    "generate": ("--student.", "--data."),
    "gold": ("--config", "--data."),
    "sft": ("--grpo.", "--topology", "--model"),
    "grpo": ("--sft.", "--topology", "--model"),
    "eval": ("--sft.", "--grpo.", "--checkpoint.every", "--topology", *OF_TRAINING),
    "plan": ("--checkpoint.", "--eval.", "--model", "--verify.", *OF_TRAINING),
    "export": ("--config", "--data."),
}


@pytest.mark.parametrize("command", SHOWN)
def test_help_lists_the_options_of_a_command_and_no_others(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help-all"]) == 0
    shown = capsys.readouterr().out
    listed = set(re.findall(r"^  (--[\w.]+)|, (--[\w.]+)", shown, re.MULTILINE))
    listed = {name for pair in listed for name in pair if name}
    assert listed >= set(SHOWN[command])
    assert not [name for name in listed if name.startswith(NOT_SHOWN.get(command, "no option"))]
    assert "None" not in shown and "==SUPPRESS==" not in shown
    known = {f"--{name}" for name in option_names(make_parser(command)) if not name.endswith("+")}
    hidden = known - listed - {"--help", "--help-all", "--version"}
    assert all(
        name.startswith(NOT_SHOWN.get(command, ())) or name.startswith("--max_skipped") or "checkpoint" in name
        for name in hidden
    )


@pytest.mark.slow
def test_the_quick_start_runs_again_without_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command at toy size; `tests/quickstart` runs it in full."""
    toy = tmp_path / "toy.yaml"
    toy.write_text(SETTINGS.replace("data: {seq_len: 256, test_rows: 20}", "data: {seq_len: 256}"), encoding="utf-8")
    arguments = ["quickstart", "--out", str(tmp_path / "run"), "--config", str(toy)]
    arguments += ["--sft.optimizer.warmup_steps", "0", "--grpo.optimizer.warmup_steps", "0"]
    assert main(arguments) == 0
    report = read(tmp_path / "run" / "report.json")
    assert list(report["accuracy"]) == ["base", "sft", "grpo", "on_policy"] and report["wall_seconds"]["total"] > 0
    assert all(list(sample["replies"]) == list(report["accuracy"]) for sample in report["samples"])
    assert (
        f"{100 * (report['accuracy']['on_policy']['value'] - report['accuracy']['grpo']['value']):+.1f} points"
        in report["notes"][1]
    )
    assert all((tmp_path / "run" / name).is_file() for name in ("report.html", "accuracy.svg", "reply.svg"))
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("is complete") == 3
    rows = (tmp_path / "run" / "train.jsonl").read_bytes()
    assert main([*arguments, "--seed", "5"]) == 2
    assert "seed (0 there, 5 now)" in capsys.readouterr().err
    assert (tmp_path / "run" / "train.jsonl").read_bytes() == rows


def test_the_rows_of_the_quick_start(tmp_path: Path) -> None:
    first: set[str] = set()
    for seed in range(2):  # the second time the rows are there already
        teach(tmp_path, seed)
        train, questions, test = (
            {json.loads(line)["question"] for line in (tmp_path / name).read_text().splitlines()}
            for name in ("train.jsonl", "questions.jsonl", "test.jsonl")
        )
        assert (len(train), len(questions), len(test)) == (250, 4_000, 500)
        assert len(train | questions | test) == 4_750, "no question is in two of them"
        first = first or train
        assert train == first


def test_a_student_from_scratch_is_exported(trained: Path, tmp_path: Path) -> None:
    moved, out = tmp_path / "moved", tmp_path / "export"
    shutil.copytree(trained / "run" / "sft", moved / "sft")
    assert main(["export", "--run_dir", str(moved), "--out", str(out)]) == 0
    assert read(out / "config.json")["model_type"] == "llama"
    assert load_tokenizer(out).convert_tokens_to_ids("<eos>") == read(out / "generation_config.json")["eos_token_id"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Next-token loss on the sequence, from scratch" in card and "GhostRespond" not in card
    # The shape in the config file does not apply to --model.
    assert main(["eval", *options(trained), "--model", str(out), "--out", str(tmp_path / "eval")]) == 0
    measured, after = read(tmp_path / "eval" / "eval.json"), read(moved / "sft" / "after.json")
    assert measured["loss"] == pytest.approx(after["loss"], rel=1e-6)
    assert measured["replies"] == after["replies"]


PAGES = f"""
import os, runpy
pages = runpy.run_path({str(Path(huge_pages.__file__))!r})
print(os.getpid())
pages["use_huge_pages"]()
print(os.environ[pages["VARIABLE"]])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has the variable")
def test_huge_pages_are_asked_for_once_and_not_against_a_users_own_setting() -> None:
    """The process restarts itself under its own number and with its own arguments."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    run = lambda own: subprocess.run(
        [sys.executable, "-c", PAGES], env=environment | own, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    first, second, set_to, _ = run({})
    assert first == second and set_to == "glibc.malloc.hugetlb=1"
    assert run({"GLIBC_TUNABLES": ""})[1:] == ["", ""]
