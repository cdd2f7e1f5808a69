"""The commands of docs/evaluation.md: their files exist, and lm-evaluation-harness agrees with `cotgrpo eval`."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.commands import read

from cotgrpo.cli import main
from cotgrpo.config import parse_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in PAGE.splitlines() if line.startswith(("cotgrpo ", "lm_eval "))]
HARNESS = [command for command in COMMANDS if command[0] == "lm_eval"]
MODEL = ROOT / "cotgrpo" / "quickstart" / "live_teacher"


def test_the_page_names_tasks_that_exist() -> None:
    assert len(HARNESS) == 2
    for command in HARNESS:
        options = dict(itertools.pairwise(command))
        folder = ROOT / options["--include_path"]
        tasks = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yaml")]
        (task,) = [task for task in tasks if task["task"] == options["--tasks"]]
        assert ("--apply_chat_template" in command) == (task["task"] == "cotgrpo_chat")
        assert task["generation_kwargs"]["max_gen_toks"] == parse_config([]).eval.max_new_tokens
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).is_file(), link


def test_the_tasks_find_the_answer_in_a_reply() -> None:
    for name, replies in {
        "chat": {"5+4=9\n\n#### 9": "9", "#### 1,234 \n": "1,234", "no mark": None},
        "plain": {" 168 ": "168", "": None},
    }.items():
        task = yaml.safe_load((ROOT / "docs" / "lm_eval" / f"{name}.yaml").read_text(encoding="utf-8"))
        pattern = task["filter_list"][0]["filter"][0]["regex_pattern"]
        for reply, answer in replies.items():
            found = re.findall(pattern, reply)
            assert (found[0] if found else None) == answer


def test_the_page_names_settings_that_exist() -> None:
    for command in COMMANDS:
        if command[:2] == ["cotgrpo", "eval"]:
            settings = [option for option in command[2:] if option not in ("--model", "--out")]
            if "--model" in command:
                settings = command[command.index("--data.test") : command.index("--out")]
            parse_config(settings)
    for key in set(re.findall(r"`((?:eval|sft|data)\.[a-z_]+)", PAGE)) - {"eval.json"}:
        section, _, name = key.partition(".")
        assert hasattr(getattr(parse_config([]), section), name), key


@pytest.mark.slow
def test_the_harness_agrees_with_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that is right on some rows: the same replies, and the same verdict on each."""
    pytest.importorskip("torch")
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from cotgrpo.quickstart.quickstart import KINDS
    from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples

    monkeypatch.chdir(tmp_path)
    write_triples(tmp_path / "train.jsonl", ProceduralTeacher(9, KINDS).draw(60))
    write_triples(tmp_path / "test.jsonl", ProceduralTeacher(0, KINDS, held_out=True).draw(24))
    settings = ["--run_dir", "run", "--data.train", "train.jsonl", "--data.test", "test.jsonl", "--data.seq_len", "192"]
    settings += ["--student.path", str(MODEL), "--sft.steps", "4", "--sft.batch_size", "4"]
    settings += ["--sft.optimizer.learning_rate", "4e-3", "--data.loss_on", "completion"]
    assert main(["sft", *settings, "--eval.max_new_tokens", "120"]) == 0
    assert main(["export", "--run_dir", "run", "--out", "exported"]) == 0
    (command,) = [command for command in HARNESS if "cotgrpo_plain" in command]
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    program = [sys.executable, "-m", *command, "--device", "cpu", "--gen_kwargs", "max_gen_toks=120"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    subprocess.run(program, check=True, cwd=tmp_path, env=environment)
    (path,) = (tmp_path / "lm_eval_results").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    theirs = {sample["doc"]["question"]: bool(sample["exact_match"]) for sample in samples}
    ours = {row["question"]: row["correct"] for row in read(tmp_path / "run" / "sft" / "after.json")["replies"]}
    assert theirs == ours and len(ours) == 24
    assert len(set(ours.values())) == 2  # some are right, some are wrong
