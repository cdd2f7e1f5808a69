"""The quick start in full, as its users run it: a task with room to improve, on sums that training never shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cotgrpo.cli import main
from cotgrpo.commands import quickstart as command
from cotgrpo.config import Config
from cotgrpo.config.files import load_config
from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.data.triples import read_triples
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.quickstart import quickstart
from cotgrpo.quickstart.quickstart import QUICKSTARTS, STAGES, TEACHERS, TEST_ROWS, TRAIN_ROWS, teach
from cotgrpo.teachers.procedural import ProceduralTeacher

FINISHED = "COTGRPO_QUICKSTART"
"""Variable with the folder of a finished English quick start and its `output.txt`. CI has one: the README's command."""
SMALL = {
    "en": {},
    # In Chinese, half of the questions and 120 updates show the same.
    "zh": {"sft.eval_every": 2000, "grpo.steps": 120, "grpo.eval_every": 120, "eval.rows": 250},
}
"""Settings of the test, by language; the others are those of the command."""


@pytest.fixture(scope="module", params=TRAIN_ROWS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """The language, the folder and the output of a quick start that is run as its users run it."""
    language: str = request.param
    if language == "en" and (given := os.environ.get(FINISHED)):
        return language, Path(given), Path(given, "output.txt").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("quickstart") / language
    arguments = ["quickstart", "--language", language, "--out", str(folder)]
    arguments += [f"--{name}={value}" for name, value in SMALL[language].items()]
    done = subprocess.run(
        [sys.executable, "-m", "cotgrpo.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return language, folder, done.stdout


@pytest.mark.slow
def test_the_quick_start_learns(finished: tuple[str, Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    language, folder, output = finished
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert list(report["accuracy"]) == list(STAGES)
    base, sft, grpo, on_policy = (report["accuracy"][name] for name in STAGES)
    assert all(row["n"] == SMALL[language].get("eval.rows", TEST_ROWS) for row in report["accuracy"].values())
    assert base["value"] < 0.05, "an untrained student cannot solve the task"
    assert 0.6 <= sft["value"] <= 0.98, "SFT is competent, and leaves room"
    assert abs(grpo["value"] - sft["value"]) < 0.03, "SFT has got out of the text what there is"
    assert on_policy["value"] >= grpo["value"] + 0.015, "live ghosts at the student's own replies say more"
    losses = report["held_out_loss"]
    assert losses["base"] > losses["sft"] > losses["on_policy"]
    assert f"{STAGES['on_policy']:26} {on_policy['value']:6.1%}" in output
    assert f"{100 * (on_policy['value'] - grpo['value']):+.1f} points" in " ".join(report["notes"])
    rows = [row for row in read_metrics(folder / "on_policy" / "grpo") if "train/reward" in row]
    assert sum(row["train/accuracy"] for row in rows[-5:]) > sum(row["train/accuracy"] for row in rows[:5])
    assert not any(row["train/skipped"] for row in rows)
    if language == "zh":
        check_chinese(folder, output, report, capsys)


def check_chinese(out: Path, output: str, report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Its files, texts and settings are Chinese. The same folder in English is an error, and stays as it is."""
    assert f"teacher: {TRAIN_ROWS['zh']} triples" in output
    assert report["command"] == f"cotgrpo quickstart --language zh --out {out} --seed 0"
    config = load_config(out / "sft" / "config.yaml")
    assert (config.data.format, config.data.answer_format, config.sft.steps) == ("chat", "答案是{answer}。", 2000)
    ghosts = load_config(out / "on_policy" / "grpo" / "config.yaml").grpo.ghosts
    assert getattr(ghosts, "teacher", None) == str(TEACHERS["zh"])
    triples, _ = read_triples(out / "train.jsonl")
    assert len(triples) == TRAIN_ROWS["zh"] and triples[0].rationale.startswith("先算")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "等于多少？" in page and "\ufffd" not in page
    assert main(["quickstart", "--out", str(out), *(f"--{k}={v}" for k, v in SMALL["zh"].items())]) == 2
    assert "holds a run with another config" in capsys.readouterr().err


def test_the_rows_of_both_languages_have_the_same_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "QUESTIONS", 50)
    for language in ("en", "zh"):
        teach(tmp_path / language, 0, language)
    for name in ("train.jsonl", "questions.jsonl", "test.jsonl"):
        english, chinese = (read_lines(tmp_path / language / name) for language in ("en", "zh"))
        count = min(len(english), len(chinese))
        assert count >= 50
        if name != "questions.jsonl":  # those begin after the triples, of which there are fewer in Chinese
            assert [row["answer"] for row in english[:count]] == [row["answer"] for row in chinese[:count]]
        assert all(row["question"].endswith("等于多少？") for row in chinese)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_chinese_live_teacher_reads_what_the_student_does() -> None:
    """Its tokenizer was trained for chats. Packed rows hold two replies."""
    settings = QUICKSTARTS["zh"]
    tokenizer = load_tokenizer(TEACHERS["zh"])
    data = settings.data
    template = ChatTemplate(tokenizer, data.reasoning, data.answer_format, data.system, "completion")
    for held_out in (False, True):
        for row in ProceduralTeacher(0, ("column_addition",), held_out=held_out, language="zh").draw(40):
            example = template.encode(row)
            reply = example.tokens[example.prompt_length :]
            assert 2 * len(example.tokens) <= data.seq_len and len(reply) <= settings.eval.max_new_tokens
            assert template.split_reply(reply) == (row.rationale, row.answer)
            assert tokenizer.decode(reply).endswith(f"答案是{row.answer}。<eos>")


@pytest.mark.parametrize(
    ("given", "language", "window"),
    [([], "en", 160), (["--language", "zh"], "zh", 208), (["--language", "zh", "--data.seq_len", "256"], "zh", 256)],
)
def test_each_language_has_its_own_defaults(
    monkeypatch: pytest.MonkeyPatch, given: list[str], language: str, window: int
) -> None:
    seen: list[tuple[Config, str]] = []
    monkeypatch.setattr(command, "run_quickstart", lambda config, console, language: seen.append((config, language)))
    assert main(["quickstart", "--seed", "3", *given]) == 0
    ((config, used),) = seen
    assert used == language and config.data.seq_len == window and config.seed == 3
    assert (
        config.tokenizer == QUICKSTARTS[language].tokenizer and config.data.format == QUICKSTARTS[language].data.format
    )


def test_an_unknown_language_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--language", "de"]) == 2
    error = capsys.readouterr().err
    assert "language" in error and "'en', 'zh'" in error
