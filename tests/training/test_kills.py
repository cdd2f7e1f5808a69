"""Forty kills with -9, spread over the lives of all commands: what comes out is what an undisturbed run makes.

`helpers/killed.py` says how a moment is chosen. Each test prints its seed and its moments.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.commands import SETTINGS, read, write_rows_and_model
from helpers.faulty_server import KEY, completion, worked
from helpers.killed import Killed
from helpers.loopback_server import Answer, Asked, LoopbackServer

from cotgrpo.cli import main
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.models import load_pretrained
from cotgrpo.training.loop import TIME_KEYS

pytestmark = pytest.mark.slow

OF_A_FOLDER = ("wall_seconds", "command", "config", "held_out_split", "notes")
"""What the report of a run in another folder has otherwise."""
LORA = ["--lora.rank", "4", "--lora.targets", "[query, value, down]", "--data.format", "chat"]
LIVE = ["--grpo.ghosts.max_new_tokens", "8", "--grpo.eval_every", "2", "--data.format", "chat"]


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("COTGRPO_KILL_SEED") or time.time_ns() % 2**32)
    print(f"COTGRPO_KILL_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a model and its config, and a config for a student from scratch."""
    folder = tmp_path_factory.mktemp("inputs")
    write_rows_and_model(folder)
    with open(folder / "c.yaml", "a", encoding="utf-8") as file:
        file.write("max_skipped: 5\n")
    (folder / "scratch.yaml").write_text(SETTINGS.replace("checkpoint: {", "checkpoint: {keep: 2, "), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(inputs: Path) -> Path:
    """A run of `sft` from the model, and one from scratch."""
    for name, config in (("of_model", "c.yaml"), ("scratch", "scratch.yaml")):
        format = ["--data.format", "chat"] if name == "of_model" else []
        assert main(["sft", *stage(inputs, config, *format)(inputs / name)[1:]]) == 0
    return inputs


def stage(inputs: Path, config: str, *more: str, name: str = "sft") -> Callable[[Path], list[str]]:
    """The arguments of a stage in a folder."""
    fixed = ["--config", str(inputs / config), "--data.train", str(inputs / "rows.jsonl"), *more]
    return lambda folder: [name, *fixed, "--run_dir", str(folder)]


def lasting(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_metrics(folder)]


def arrays(folder: Path) -> dict[str, Any]:
    """The arrays of the newest checkpoint, by name."""
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    with warnings.catch_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
        warnings.simplefilter("ignore")  # sharding is that of the file
        tree = checkpointer.restore(folder / "checkpoints" / str(step) / "state")
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    plain = jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(plain)}


UNFINISHED = "not finished"
"""On the page of a run that goes on."""


def assert_same_stage(run: Killed, name: str) -> None:
    """All that the killed runs leave is what the whole one left, except for times and the name of the folder."""
    print(f"{len(run.moments)} kills: {run.moments}")
    whole = run.whole / name
    for folder in run.ended:
        killed = folder / name
        assert lasting(killed) == lasting(whole) != []
        same, found = arrays(whole), arrays(killed)
        assert same.keys() == found.keys()
        for key, array in same.items():
            np.testing.assert_array_equal(found[key], array, err_msg=key)
        facts = [{k: v for k, v in read(f / "report.json").items() if k not in OF_A_FOLDER} for f in (whole, killed)]
        assert facts[0] == facts[1]
        page = (killed / "report.html").read_text(encoding="utf-8")
        assert page.rstrip().endswith("</html>") and UNFINISHED not in page
        for path in ("before.json", "after.json", "completions.jsonl", "tokenizer/tokenizer.json"):
            written = [(f / path).read_bytes() if (f / path).exists() else None for f in (whole, killed)]
            assert written[0] == written[1], path
        left = [str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".new", ".partial"))]
        assert not left, left


def test_sft_from_scratch(inputs: Path, tmp_path: Path, rng: random.Random) -> None:
    """Also in the middle of a save, and while each file that claims the folder is written."""
    run = Killed(tmp_path / "runs", stage(inputs, "scratch.yaml"), rng)
    targets = ("tokenizer.new", "inputs.json", "rename sft/config.yaml", "checksums.json", "rename sft/checkpoints/4")
    run.kill(3, targets)
    assert_same_stage(run, "sft")


def test_sft_of_adapters(inputs: Path, tmp_path: Path, rng: random.Random) -> None:
    run = Killed(tmp_path / "runs", stage(inputs, "c.yaml", *LORA), rng)
    run.kill(5)
    assert_same_stage(run, "sft")


GRPO = {
    "text": ("scratch.yaml", "scratch", [], 5),
    "teacher_model": ("c.yaml", "of_model", [*LIVE, "--grpo.ghosts.source", "teacher_model"], 5),
    "privileged_self": ("c.yaml", "of_model", [*LIVE, "--grpo.ghosts.source", "privileged_self"], 4),
}


@pytest.mark.parametrize("source", GRPO)
def test_grpo(trained: Path, tmp_path: Path, rng: random.Random, source: str) -> None:
    config, start, more, kills = GRPO[source]
    more = [*more, "--grpo.ghosts.teacher", str(trained / "model")] if source == "teacher_model" else more
    more = [*more, "--grpo.init_from", str(trained / start / "sft"), "--grpo.steps", "4"]
    run = Killed(tmp_path / "runs", stage(trained, config, *more, name="grpo"), rng)
    run.kill(kills)
    assert_same_stage(run, "grpo")


def test_the_report(trained: Path, tmp_path: Path, rng: random.Random) -> None:
    """All steps are done; the last measurement and the report are not. The page is one of an unfinished run."""

    def prepare(folder: Path) -> None:
        shutil.copytree(trained / "scratch", folder)
        for name in ("after.json", "report.json"):
            (folder / "sft" / name).unlink()
        (folder / "sft" / "report.html").write_text(f"<!doctype html>{UNFINISHED}</html>")

    run = Killed(tmp_path / "runs", stage(trained, "scratch.yaml"), rng, prepare)
    run.kill(0, ("rename sft/after.json", "rename sft/report.json", "open sft/report.html"))
    assert_same_stage(run, "sft")


def test_generate(tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """No question is asked twice once its reply is in the journal."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    questions = [f"What is {n} + 1?" for n in range(24)]
    rows = [{"id": f"q{n}", "question": text, "gold": str(n + 1)} for n, text in enumerate(questions)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked: dict[str, list[str]] = {}
    twice: list[str] = []

    def answer(request: Asked) -> Answer:
        question = request.json()["messages"][-1]["content"]
        journal = run.folder / "replies.jsonl"
        if journal.exists() and json.dumps(question) in journal.read_text(encoding="utf-8"):
            twice.append(question)
        asked.setdefault(run.folder.name, []).append(question)
        time.sleep(0.005)
        return Answer(completion(worked(question)))

    with LoopbackServer(answer) as server:
        fixed = ["--questions", str(tmp_path / "q.jsonl"), "--teacher.base_url", server.url, "--teacher.model", "m"]
        fixed += ["--prompt.question", "{question}", "--teacher.concurrency", "2"]
        run = Killed(tmp_path / "runs", lambda folder: ["generate", *fixed, "--out", str(folder)], rng)
        run.kill(2, ("open replies.jsonl", "rename config.yaml", "rename summary.json", "open README.md"))
        middle(run, lambda folder: lines_in(folder / "replies.jsonl") >= rng.randrange(4, 20))
    print(f"{len(run.moments)} kills: {run.moments}")
    assert not twice
    for folder in run.ended:
        assert set(asked[folder.name]) == set(questions)
        for name in ("triples.jsonl", "README.md"):
            text = [(f / name).read_text(encoding="utf-8").replace(f.name, "") for f in (run.whole, folder)]
            assert text[0] == text[1]
        records = [json.loads(line) for line in (folder / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
        assert sorted(record["question"] for record in records) == sorted(questions)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def middle(run: Killed, there: Callable[[Path], bool]) -> None:
    """Kill the command in a new folder once `there` holds, between its file operations, and let it end."""
    run.new_folder()
    process = run.start()
    while process.poll() is None and not there(run.folder):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    run.moments.append("in the middle")
    run.run()
    run.ended.append(run.folder)


def test_export(trained: Path, tmp_path: Path, rng: random.Random) -> None:
    """The folder is whole or not there, and the same to the byte."""
    from transformers import AutoTokenizer

    def command(folder: Path) -> list[str]:
        return ["export", "--run_dir", str(trained / "of_model"), "--out", str(folder / "student")]

    run = Killed(tmp_path / "runs", command, rng)
    run.kill(3, ("rename student",), delay=0.0)
    print(f"{len(run.moments)} kills: {run.moments}")
    whole = {path.name: path.read_bytes() for path in (run.whole / "student").iterdir()}
    for folder in run.ended:
        found = {path.name: path.read_bytes() for path in (folder / "student").iterdir()}
        assert found == whole and len(found) >= 5
        assert sorted(path.name for path in folder.iterdir()) == ["student"]
    model = load_pretrained(run.ended[-1] / "student")
    assert model.config.vocab_size >= len(AutoTokenizer.from_pretrained(run.ended[-1] / "student"))
