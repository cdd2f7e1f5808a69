"""Training by the command line with a live ghost on a server: as with the model in the process, whatever goes down."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers.commands import error_of
from helpers.scoring_server import ScoringServer, own_model

from cotgrpo.cli import main
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.logs.completions import read_completions
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.models import save_pretrained
from cotgrpo.models.decoder import DecoderConfig, init_params
from cotgrpo.rollouts.cached_ghosts import read_cache
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training.loop import TIME_KEYS

pytest.importorskip("openai")

SETTINGS = """
student: {width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8, mlp_width: 32, init_scale: 0.2}
data: {seq_len: 128, test_rows: 8, loss_on: completion}
sft: {steps: 2, batch_size: 2, log_every: 2}
grpo: {steps: 4, batch_size: 3, log_every: 2}
eval: {rows: 4, batch_size: 4, max_new_tokens: 4}
checkpoint: {every: 2}
"""
SHAPE = DecoderConfig(
    vocab_size=300, width=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, init_scale=0.2
)
SERVED = ("--grpo.ghosts.source", "teacher_server", "--grpo.ghosts.max_new_tokens", "10")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a larger teacher with a padded embedding, and the student after SFT."""
    folder = tmp_path_factory.mktemp("served")
    triples = ProceduralTeacher(seed=1).draw(60)
    write_triples(folder / "rows.jsonl", triples)
    tokenizer = train_tokenizer((f"{t.question}\n{t.rationale}\n{t.answer}" for t in triples), vocab_size=280)
    save_pretrained(folder / "teacher", SHAPE, init_params(SHAPE, jax.random.key(5)), tokenizer=tokenizer)
    (folder / "c.yaml").write_text(f"tokenizer: {{path: {folder / 'teacher'}}}\n{SETTINGS}", encoding="utf-8")
    assert main(["sft", *options(folder, folder / "run")]) == 0
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return own_model(str(folder / "teacher"))


def options(folder: Path, run_dir: Path, *more: str) -> list[str]:
    files = ["--config", str(folder / "c.yaml"), "--data.train", str(folder / "rows.jsonl")]
    return [*files, "--run_dir", str(run_dir), *more]


def grpo(folder: Path, run_dir: Path, *more: str) -> int:
    return main(["grpo", *options(folder, run_dir, "--grpo.init_from", str(folder / "run" / "sft"), *more)])


def lasting(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_metrics(run_dir / "grpo")]


def test_a_run_learns_what_it_learns_from_the_model_in_its_process(folder: Path, model: Any, tmp_path: Path) -> None:
    """The same replies, ghosts and metrics to 1e-3; the replies in the log are the same."""
    objective = ("--grpo.objective.name", "forward_kl", "--grpo.objective.top_k", "5")
    here = ("--grpo.ghosts.source", "teacher_model", "--grpo.ghosts.teacher", str(folder / "teacher"))
    assert grpo(folder, tmp_path / "here", *objective, *here, "--grpo.ghosts.max_new_tokens", "10") == 0
    with ScoringServer(model[0], model[1], ("vllm",)) as server:
        assert grpo(folder, tmp_path / "served", *objective, *SERVED, "--grpo.ghosts.base_url", server.url) == 0
    for own, served in zip(lasting(tmp_path / "here"), lasting(tmp_path / "served"), strict=True):
        assert served.pop("train/without_ghost", 0) == 0
        assert served == pytest.approx(own, abs=1e-3)
    tokens = [
        [(row["tokens"], row["ghosts"]) for row in read_completions(tmp_path / name / "grpo", 100)]
        for name in ("here", "served")
    ]
    assert tokens[0] == tokens[1]


HARDEST = [
    *("--grpo.ghosts.prefetch_rollouts", "true", "--grpo.ghosts.updates_per_rollout", "2"),
    *("--grpo.ghosts.choice", "drawn", "--grpo.ghosts.teacher_forced_share", "0.34"),
    *("--grpo.objective.name", "forward_kl", "--grpo.objective.top_k", "5", "--grpo.steps", "9"),
    *("--grpo.ghosts.retry_delay", "0.05", "--grpo.ghosts.longest_delay", "0.2"),
]


@pytest.mark.slow
def test_server_and_run_are_killed_and_the_metrics_are_those_of_an_undisturbed_run(
    folder: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server goes down in mid-run. The run is stopped while it waits, and goes on at another address. There the
    server goes down and comes back.
    """
    with ScoringServer(model[0], model[1], ("vllm",)) as server:
        assert grpo(folder, tmp_path / "whole", *SERVED, *HARDEST, "--grpo.ghosts.base_url", server.url) == 0
        count = len(server.asked)
    assert count > 16  # to find out how the server is asked, to compare tokenizers, and two a rollout
    run = lambda url: grpo(folder, tmp_path / "cut", *SERVED, *HARDEST, "--grpo.ghosts.base_url", url)

    stopped = threading.Event()

    def stop(path: str, body: Any) -> None:
        if len(server.asked) == count - 6 and not stopped.is_set():
            stopped.set()
            server.closed = True  # it answers nothing any more
            threading.Timer(2.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

    with ScoringServer(model[0], model[1], ("vllm",), fault=stop) as server:
        code = run(server.url)
        server.closed = False
    assert code == 128 + signal.SIGTERM
    out, error = capsys.readouterr()
    assert "does not answer" in out and "Stopped by a signal after step" in error

    def restart() -> None:
        down.closed = True
        time.sleep(1.5)
        down.closed = False

    def fail_once(path: str, body: Any) -> None:
        if len(down.asked) == 11:
            threading.Thread(target=restart).start()

    with ScoringServer(model[0], model[1], ("vllm",), fault=fail_once) as down:
        assert run(down.url) == 0
    assert "answers again" in capsys.readouterr().out
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole")
    logs = [(tmp_path / name / "grpo" / "completions.jsonl").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_server_that_cannot_be_used_is_one_line_before_the_run_begins(
    folder: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScoringServer(model[0], model[1], ()) as server:
        assert grpo(folder, tmp_path / "run", *SERVED, "--grpo.ghosts.base_url", server.url) == 2
    assert "vllm serve MODEL --max-logprobs 1" in error_of(capsys)
    other = train_tokenizer(["nothing of the kind"] * 3, vocab_size=262)
    with ScoringServer(model[0], other, ("vllm",)) as server:
        assert grpo(folder, tmp_path / "run", *SERVED, "--grpo.ghosts.base_url", server.url) == 2
    assert "another tokenizer than the student: in '" in error_of(capsys)
    assert not (tmp_path / "run" / "grpo" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "grpo.ghosts.base_url must be the server's address"),
        (["--grpo.ghosts.base_url", "ftp://x"], "base_url must be a URL such as http://localhost:8000/v1"),
        (["--grpo.ghosts.base_url", "http://u:p@x/v1"], "grpo.ghosts.api_key_env"),
        (["--grpo.ghosts.base_url", "http://x/v1", "--grpo.ghosts.concurrency", "0"], "concurrency must be at least 1"),
        (["--grpo.ghosts.base_url", "http://x/v1", "--grpo.ghosts.top_logprobs", "0"], "top_logprobs must be at least"),
        (["--grpo.ghosts.base_url", "http://x/v1", "--grpo.ghosts.dialect", "ollama"], "dialect"),
        (["--grpo.ghosts.base_url", "http://192.0.2.1/v1"], "The environment variable OPENAI_API_KEY is not set"),
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
    assert grpo(folder, tmp_path, *SERVED, *more) == 2
    assert message in error_of(capsys)


@pytest.mark.slow
def test_the_address_of_the_server_may_change_and_the_model_may_not(
    folder: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = lambda url, steps: grpo(
        folder, tmp_path, *SERVED, "--grpo.ghosts.base_url", url, "--grpo.steps", steps, "--checkpoint.every", "1"
    )
    with ScoringServer(model[0], model[1], ("vllm",)) as server:
        assert run(server.url, "2") == 0
    for name in ("checkpoints/2", "report.json", "after.json"):
        path = tmp_path / "grpo" / name
        path.rename(path.with_name("moved"))
    other = SHAPE, init_params(SHAPE, jax.random.key(6))
    save_pretrained(tmp_path / "other", *other, tokenizer=model[1])
    capsys.readouterr()
    with ScoringServer(*own_model(str(tmp_path / "other")), ("vllm",)) as server:
        assert run(server.url, "2") == 2
    assert "other log-probabilities of the same text than before the run was stopped" in error_of(capsys)
    with ScoringServer(model[0], model[1], ("sglang",)) as server:
        assert run(server.url, "2") == 0
    assert json.loads((tmp_path / "grpo" / "report.json").read_text(encoding="utf-8"))


def score(folder: Path, url: str, out: Path, *more: str) -> int:
    rows = ["--questions", str(folder / "rows.jsonl"), "--score_for", str(folder / "run" / "sft")]
    where = ["--teacher.base_url", url, "--teacher.retry_delay", "0.05", "--out", str(out)]
    return main(["generate", *rows, *where, "--top_logprobs", "4", *more])


@pytest.mark.slow
def test_given_replies_are_scored_for_a_student_and_trained_on_without_the_server(
    folder: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command is stopped by an error after some replies, and asks for no reply twice. Every token of a reply has
    the model's own log-probabilities.
    """
    left = 30

    def fail(path: str, body: Any) -> tuple[int, Any] | None:
        nonlocal left
        left -= 1
        return (402, {"error": {"message": "pay"}}) if left == 0 else None

    with ScoringServer(model[0], model[1], ("vllm",), fault=fail) as server:
        assert score(folder, server.url, tmp_path / "scored") == 2
        assert "asks for payment" in capsys.readouterr().err
        before = (tmp_path / "scored" / "scores.jsonl").read_bytes().count(b"\n")
        assert before > 8
        path = tmp_path / "scored" / "scores.jsonl"
        path.write_bytes(path.read_bytes() + b'{"id": "half')
        assert score(folder, server.url, tmp_path / "scored") == 0
        prompts = [tuple(body["prompt"]) for _, body in server.asked if body["prompt_logprobs"] == 4]
    cache = read_cache(tmp_path / "scored" / "ghosts.parquet")
    assert len(cache.replies) == 60 and cache.top_logprobs == 4
    own = [tuple(reply.ids) for reply in cache.replies.values()]
    assert sum(prompts.count(ids) > 1 for ids in own) <= 8 + 2  # those in flight, and the two first samples
    for reply in list(cache.replies.values())[:5]:
        rows = model[0](list(reply.ids))[len(reply.ids) - len(reply.top_ids) - 1 : -1]
        for row, ids, values in zip(rows, reply.top_ids, reply.top_log_probs, strict=True):
            assert values == pytest.approx([float(row[i]) for i in ids], abs=1e-3)
            assert values[0] == pytest.approx(float(row.max()), abs=1e-3)
    cached = ("--grpo.ghosts.source", "cached", "--grpo.ghosts.path", str(tmp_path / "scored" / "ghosts.parquet"))
    capsys.readouterr()
    assert (
        grpo(folder, tmp_path / "run", *cached, "--grpo.objective.name", "forward_kl", "--grpo.objective.top_k", "4")
        == 0
    )
    assert "52 of 52 rows have cached ghosts" in (out := capsys.readouterr().out) and "(100.0 %)" in out


def test_replies_that_cannot_be_scored_are_one_line(
    folder: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScoringServer(model[0], model[1], ()) as server:
        assert score(folder, server.url, tmp_path / "a") == 2
        assert "teacher.top_logprobs" not in (error := error_of(capsys)) and "does not return the 4 likeliest" in error
        assert score(folder, server.url, tmp_path / "b", "--score_for", str(tmp_path)) == 2
        assert "score_for must be the folder of a stage" in error_of(capsys)
        assert score(folder, server.url, tmp_path / "c", "--top_logprobs", "0") == 2
        assert "top_logprobs must be at least 1 with score_for" in error_of(capsys)
        assert score(folder, server.url, tmp_path / "d", "--teacher.batch", "true") == 2
        assert "score_for needs a server" in error_of(capsys)
