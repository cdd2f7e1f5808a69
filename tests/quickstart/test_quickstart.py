"""The quick start in full, as its users run it: a task with room to improve, on sums that training never shows."""

from __future__ import annotations

import json
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

TOY = """
student: {width: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 16, mlp_width: 64}
sft: {steps: 4, batch_size: 2, optimizer: {warmup_steps: 0}}
grpo: {steps: 2, batch_size: 2, optimizer: {warmup_steps: 0}}
eval: {rows: 8, batch_size: 8, max_new_tokens: 17}
"""


@pytest.mark.slow
@pytest.mark.parametrize("language", TRAIN_ROWS)
def test_the_quick_start_learns(tmp_path: Path, language: str) -> None:
    arguments = ["quickstart", "--language", language, "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "cotgrpo.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    base, sft, grpo, on_policy = (report["accuracy"][name] for name in STAGES)
    assert all(row["n"] == TEST_ROWS for row in report["accuracy"].values())
    assert base["value"] < 0.05, "an untrained student cannot solve the task"
    assert 0.6 <= sft["value"] <= 0.98, "SFT is competent, and leaves room"
    assert abs(grpo["value"] - sft["value"]) < 0.03, "SFT has got out of the text what there is"
    assert on_policy["value"] >= grpo["value"] + 0.015, "live ghosts at the student's own replies say more"
    losses = report["held_out_loss"]
    assert losses["base"] > losses["sft"] > losses["on_policy"]
    assert f"{STAGES['on_policy']:26} {on_policy['value']:6.1%}" in done.stdout
    assert f"{100 * (on_policy['value'] - grpo['value']):+.1f} points" in " ".join(report["notes"])
    rows = [row for row in read_metrics(tmp_path / "on_policy" / "grpo") if "train/reward" in row]
    assert sum(row["train/accuracy"] for row in rows[-5:]) > sum(row["train/accuracy"] for row in rows[:5])
    assert not any(row["train/skipped"] for row in rows)


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


@pytest.mark.slow
def test_the_chinese_quick_start_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.yaml").write_text(TOY, encoding="utf-8")
    out = tmp_path / "run"
    arguments = ["quickstart", "--out", str(out), "--config", str(tmp_path / "toy.yaml")]
    assert main([*arguments, "--language", "zh"]) == 0
    assert f"teacher: {TRAIN_ROWS['zh']} triples" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert list(report["accuracy"]) == list(STAGES)
    assert report["command"] == f"cotgrpo quickstart --language zh --out {out} --seed 0"
    config = load_config(out / "sft" / "config.yaml")
    assert (config.data.format, config.data.answer_format, config.sft.steps) == ("chat", "答案是{answer}。", 4)
    ghosts = load_config(out / "on_policy" / "grpo" / "config.yaml").grpo.ghosts
    assert getattr(ghosts, "teacher", None) == str(TEACHERS["zh"])
    triples, _ = read_triples(out / "train.jsonl")
    assert len(triples) == TRAIN_ROWS["zh"] and triples[0].rationale.startswith("先算")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "等于多少？" in page and "\ufffd" not in page

    assert main(arguments) == 2  # the same folder in English
    assert "holds a run with another config" in capsys.readouterr().err


def test_an_unknown_language_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--language", "de"]) == 2
    error = capsys.readouterr().err
    assert "language" in error and "'en', 'zh'" in error
