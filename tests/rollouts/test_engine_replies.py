"""Training by the command line on replies of an engine: as with the sampler of this process, whatever goes down."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import error_of
from helpers.rollout_server import RolloutServer

from cotgrpo.cli import main
from cotgrpo.logs.completions import read_completions
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.rollouts.journal import RolloutJournal
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training.loop import TIME_KEYS

pytest.importorskip("openai")

SETTINGS = """
student: {width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8, mlp_width: 32, init_scale: 0.2}
tokenizer: {vocab_size: 280}
data: {seq_len: 128, test_rows: 8, loss_on: completion}
sft: {steps: 2, batch_size: 2, log_every: 2}
grpo: {steps: 4, batch_size: 4, log_every: 1, optimizer: {learning_rate: 0.03}, max_entropy_growth: null}
eval: {rows: 4, batch_size: 4, max_new_tokens: 4}
checkpoint: {every: 2}
"""
SELF = ("--grpo.ghosts.source", "privileged_self", "--grpo.ghosts.max_new_tokens", "10")
REWARD = (
    *("--grpo.ghosts.source", "verified_reward", "--grpo.objective.name", "group_relative"),
    *("--grpo.ghosts.max_new_tokens", "10", "--grpo.ghosts.num_generations", "2"),
)
OWN_REWARD = ("--verify.reward", "engine_reward:reward")
"""A random student has no right reply to learn from."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, the student after SFT, and the same as a folder that a server can serve."""
    folder = tmp_path_factory.mktemp("engine")
    write_triples(folder / "rows.jsonl", ProceduralTeacher(seed=1).draw(40))
    (folder / "c.yaml").write_text(SETTINGS, encoding="utf-8")
    assert main(["sft", *options(folder, folder / "run")]) == 0
    assert main(["export", "--run_dir", str(folder / "run"), "--out", str(folder / "student")]) == 0
    return folder


def options(folder: Path, run_dir: Path, *more: str) -> list[str]:
    files = ["--config", str(folder / "c.yaml"), "--data.train", str(folder / "rows.jsonl")]
    return [*files, "--run_dir", str(run_dir), *more]


def grpo(folder: Path, run_dir: Path, *more: str) -> int:
    return main(["grpo", *options(folder, run_dir, "--grpo.init_from", str(folder / "run" / "sft"), *more)])


def served(url: str, *more: str) -> tuple[str, ...]:
    engine = ("--grpo.rollouts.engine", "server", "--grpo.rollouts.base_url", url, "--grpo.rollouts.send_seed", "true")
    quick = ("--grpo.rollouts.retry_delay", "0.02", "--grpo.rollouts.longest_delay", "0.1")
    return (*engine, *quick, *more)


def lasting(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_metrics(run_dir / "grpo")]


def test_replies_come_from_the_newest_weights(folder: Path, tmp_path: Path) -> None:
    """Every reply is of the weights of its own step. The engine's log-probabilities are the student's to 1e-3, so the
    ratio is 1. Only the last two versions are kept.
    """
    with RolloutServer(folder / "student", ("vllm",)) as server:
        assert grpo(folder, tmp_path, *SELF, *served(server.url)) == 0
        loaded, versions = server.loaded, sorted(p.name for p in (tmp_path / "grpo" / "rollout_weights").iterdir())
    rows = [row for row in lasting(tmp_path) if "train/loss" in row]
    assert [row["train/rollout_version"] for row in rows] == [0, 1, 2, 3]
    assert all(row["train/rollout_gap"] < 1e-3 and row["train/rollout_age"] == 0 for row in rows)
    assert all(row["train/rollout_ratio"] == pytest.approx(1, abs=1e-3) for row in rows)
    assert [Path(path).name for path in loaded] == ["00000000", "00000001", "00000002", "00000003"]
    assert versions == ["00000002", "00000003"]
    assert [row["version"] for row in read_completions(tmp_path / "grpo", 100)] == [n for n in range(4) for _ in "1234"]
    saved = (tmp_path / "grpo" / "config.yaml").read_text(encoding="utf-8")
    assert "engine: server" in saved and "send_seed: true" in saved


HARDEST = ("--grpo.rollouts.refresh_every", "2", "--grpo.ghosts.updates_per_rollout", "2", "--grpo.steps", "8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ghosts", "dialect"), [(SELF, "vllm"), ((*REWARD, *OWN_REWARD), "sglang")], ids=["ghost", "reward"]
)
def test_a_run_that_is_stopped_and_resumed_is_the_whole_run(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ghosts: tuple[str, ...],
    dialect: str,
) -> None:
    """The run goes back to its checkpoint, and takes the rollouts after it from the journal: another engine, with
    other draws, answers in between. Old weights and second updates are weighted as in the whole run.
    """
    (tmp_path / "engine_reward.py").write_text("def reward(reply, gold, row):\n    return float(len(reply) % 7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = lambda name, url, *more: grpo(folder, tmp_path / name, *ghosts, *HARDEST, *served(url), *more)
    with RolloutServer(folder / "student", (dialect,)) as server:
        assert run("whole", server.url) == 0
    rows = [row for row in lasting(tmp_path / "whole") if "train/rollout_age" in row]
    assert [row["train/rollout_age"] for row in rows] == [0, 1, 0, 1]
    assert all(row["train/rollout_gap"] > 1e-3 for row in rows if row["train/rollout_age"])

    def stop(path: str, body: Any) -> None:
        if sum("return_token_ids" in body or "return_logprob" in body for _, body in server.asked) == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    with RolloutServer(folder / "student", (dialect,), fault=stop) as server:
        assert run("cut", server.url) == 128 + signal.SIGTERM
    newest = max((tmp_path / "cut" / "grpo" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest)  # as after a kill, some rollouts are newer than the checkpoint
    with RolloutServer(folder / "student", (dialect,)) as server:
        assert run("cut", server.url) == 0
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole")
    logs = [(tmp_path / name / "grpo" / "completions.jsonl").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    capsys.readouterr()


@pytest.mark.slow
def test_adapters_alone_are_refreshed(folder: Path, tmp_path: Path) -> None:
    lora = ("--student.path", str(folder / "student"), "--lora.rank", "2", "--grpo.steps", "2")
    start = ("--grpo.init_from", str(folder / "student"))
    with RolloutServer(folder / "student", ("vllm",)) as server:
        assert main(["grpo", *options(folder, tmp_path, *SELF, *lora, *start, *served(server.url))]) == 0
        names = [body.get("model") for path, body in server.asked if "return_token_ids" in body]
        assert len(server.adapters) == 1  # the older one was unloaded
    assert names[0] is None and len(set(names)) == 3 and all("student-" in name for name in names[1:])
    assert (tmp_path / "grpo" / "rollout_weights" / "00000001" / "adapter_model.safetensors").is_file()
    assert all(row["train/rollout_gap"] < 1e-3 for row in lasting(tmp_path) if "train/rollout_gap" in row)


@pytest.mark.slow
def test_of_two_processes_the_first_alone_asks(folder: Path, tmp_path: Path) -> None:
    """Both write the weights, and train on the same replies: those of one process, each asked for once."""
    with RolloutServer(folder / "student", ("vllm",)) as server:
        assert grpo(folder, tmp_path / "one", *SELF, *served(server.url), "--grpo.steps", "2") == 0
        count = len(server.asked)
        with socket.create_server(("localhost", 0)) as free:
            coordinator = f"localhost:{free.getsockname()[1]}"
        arguments = options(folder, tmp_path / "two", *SELF, *served(server.url), "--grpo.steps", "2")
        arguments += ["--grpo.init_from", str(folder / "run" / "sft"), "--distributed.coordinator", coordinator]
        program = [sys.executable, "-m", "cotgrpo.cli", "grpo", *arguments, "--distributed.num_processes", "2"]
        environment = {**os.environ, "NPROC": str(os.cpu_count()), "JAX_COMPILATION_CACHE_DIR": ""}
        running = [
            subprocess.Popen([*program, "--distributed.process_id", str(i)], env=environment, stdout=subprocess.DEVNULL)
            for i in range(2)
        ]
        assert [process.wait(400) for process in running] == [0, 0]
        assert len(server.asked) == 2 * count
    texts = [[row["text"] for row in read_completions(tmp_path / name / "grpo", 100)] for name in ("one", "two")]
    assert texts[0] == texts[1] and len(texts[0]) == 8
    assert sorted(path.name for path in (tmp_path / "two" / "grpo" / "rollout_weights").iterdir()) == [
        "00000000",
        "00000001",
    ]


@pytest.mark.slow
def test_weights_that_the_server_says_it_has_loaded_and_has_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RolloutServer(folder / "student", ("vllm",)) as server:
        server.keeps_old = True
        assert grpo(folder, tmp_path, *SELF, *served(server.url)) == 2
    assert "still answers with older weights, though it said that it has loaded" in error_of(capsys)
    steps = [row["step"] for row in lasting(tmp_path) if "train/loss" in row]
    assert steps in ([], [1])  # the first has the same weights


@pytest.mark.slow
def test_a_server_that_cannot_be_used_is_one_line_before_the_first_step(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RolloutServer(folder / "student", ()) as server:
        assert grpo(folder, tmp_path, *SELF, *served(server.url)) == 2
        assert "does not return the token ids of its replies" in error_of(capsys)
        server.dialects = ("vllm",)
        server.fault = lambda path, body: (404, {"detail": "Not Found"}) if path == "/collective_rpc" else None
        assert grpo(folder, tmp_path, *SELF, *served(server.url)) == 2
        assert "VLLM_SERVER_DEV_MODE=1" in error_of(capsys)
    assert not read_metrics(tmp_path / "grpo")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--grpo.ghosts.source", "teacher_forced"], "which ghosts.source teacher_forced does not train on"),
        (["--grpo.ghosts.source", "self_reply"], "which ghosts.source self_reply does not train on"),
        ([*REWARD, "--grpo.rollouts.base_url", "localhost:8000"], "grpo.rollouts.base_url must be a URL such as"),
        ([*REWARD, "--grpo.rollouts.refresh_every", "0"], "grpo.rollouts.refresh_every must be at least 1"),
        ([*REWARD, "--grpo.rollouts.largest_gap", "0"], "grpo.rollouts.largest_gap must be above 0"),
        ([*REWARD, "--grpo.rollouts.folder", " "], "grpo.rollouts.folder must be the name of a folder"),
        ([*REWARD, "--grpo.rollouts.dialect", "echo"], "grpo.rollouts.dialect"),
        (
            [*REWARD, "--grpo.ghosts.prefetch_rollouts", "true", "--grpo.rollouts.refresh_every", "2"],
            "grpo.ghosts.prefetch_rollouts true needs rollouts.refresh_every 1",
        ),
        ([*REWARD, "--grpo.rollouts.engine", "in_process"], "grpo.rollouts.base_url does not apply"),
        ([*REWARD, "--grpo.rollouts.base_url", "http://192.0.2.1/v1"], "OPENAI_API_KEY is not set"),
    ],
)
def test_wrong_settings(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert grpo(folder, tmp_path, *served("http://localhost:1/v1"), *more) == 2
    assert message in error_of(capsys)


def test_a_damaged_rollout_is_made_again(tmp_path: Path) -> None:
    journal = RolloutJournal(tmp_path, keep=2)
    for number in range(4):
        journal.write(number, {"tokens": np.full((2, 3), number, np.int32)})
    assert [journal.find(number) is None for number in range(5)] == [True, True, False, False, True]
    assert np.array_equal(journal.find(3)["tokens"], np.full((2, 3), 3))  # type: ignore[index]
    path = journal.path(3)
    for data in (b"", path.read_bytes()[:-40], json.dumps({"tokens": 1}).encode()):
        path.write_bytes(data)
        assert journal.find(3) is None
