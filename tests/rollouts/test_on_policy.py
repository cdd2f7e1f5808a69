"""On-policy training by the command line: a tiny student and its teacher, resumed, and errors of a wrong teacher."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cotgrpo import ForwardKl, TrainState, make_grpo_step
from cotgrpo.cli import main
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.ghosts.live import reweighted, with_replies
from cotgrpo.logs.completions import read_completions
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.models import save_pretrained
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.rollouts.on_policy import make_draw
from cotgrpo.sampling import SamplingSettings, make_sampler, pad_prompts
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training.loop import TIME_KEYS
from cotgrpo.types import GhostBatch

SETTINGS = """
student: {width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8, mlp_width: 32, init_scale: 0.2}
tokenizer: {path: TOKENIZER}
data: {seq_len: 128, test_rows: 8, loss_on: completion}
sft: {steps: 2, batch_size: 2, log_every: 2}
grpo:
  steps: 6
  batch_size: 3
  log_every: 3
  eval_every: 3
  ghosts: {source: teacher_model, teacher: TEACHER, max_new_tokens: 10}
eval: {rows: 8, batch_size: 8, max_new_tokens: 10}
checkpoint: {every: 2}
"""
SHAPE = DecoderConfig(
    vocab_size=300, width=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, init_scale=0.2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a larger teacher with a padded embedding, the student after SFT, and an on-policy run of it."""
    folder = tmp_path_factory.mktemp("on_policy")
    triples = ProceduralTeacher(seed=1).draw(60)
    write_triples(folder / "rows.jsonl", triples)
    tokenizer = train_tokenizer((f"{t.question}\n{t.rationale}\n{t.answer}" for t in triples), vocab_size=280)
    tokenizer.save_pretrained(folder / "tokenizer")
    save_pretrained(folder / "teacher", SHAPE, init_params(SHAPE, jax.random.key(5)), tokenizer=tokenizer)
    settings = SETTINGS.replace("TOKENIZER", str(folder / "tokenizer")).replace("TEACHER", str(folder / "teacher"))
    (folder / "c.yaml").write_text(f"run_dir: {folder / 'run'}\n{settings}", encoding="utf-8")
    for command in ("sft", "grpo"):
        assert main([command, *options(folder)]) == 0
    return folder


def options(folder: Path, *more: str) -> list[str]:
    return ["--config", str(folder / "c.yaml"), "--data.train", str(folder / "rows.jsonl"), *more]


def from_sft(folder: Path, run_dir: Path, *more: str) -> list[str]:
    """Another on-policy run from the same student."""
    start = str(folder / "run" / "sft")
    return options(folder, "--run_dir", str(run_dir), "--grpo.init_from", start, *more)


def lasting(stage: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_metrics(stage)]


def test_what_a_run_reports(folder: Path) -> None:
    stage = folder / "run" / "grpo"
    *_, row = [row for row in read_metrics(stage) if "train/loss" in row]
    promised = (
        "loss reward ghost_prob drawn_prob match_rate entropy accuracy reply_length unfinished rollout_tokens_per_sec"
    )
    assert all(isinstance(row[f"train/{name}"], float) for name in promised.split())
    assert row["train/rollout_tokens"] == pytest.approx(3 * row["train/reply_length"])
    assert [r["step"] for r in read_metrics(stage) if "eval/accuracy" in r] == [3, 6]
    rows = read_completions(stage, 100)
    assert [row["step"] for row in rows] == [1] * 3 + [3] * 3 + [6] * 3
    for row in rows:
        assert len(row["tokens"]) == len(row["ghosts"]) == len(row["rewards"]) <= 10
        assert [reward == 0 for reward in row["rewards"]] == [ghost is None for ghost in row["ghosts"]]
    assert len({row["question"] for row in rows}) > 3
    page = (stage / "report.html").read_text()
    assert 'id="completions"' in page


HARDEST = [
    *(
        "--grpo.ghosts.source",
        "privileged_self",
        "--grpo.ghosts.choice",
        "drawn",
        "--grpo.ghosts.decode_batch_size",
        "1",
    ),
    *("--grpo.ghosts.updates_per_rollout", "3", "--grpo.ghosts.teacher_forced_share", "0.34"),
    *("--grpo.objective.name", "forward_kl", "--grpo.objective.top_k", "5", "--grpo.ghosts.max_new_tokens", "10"),
]


REWARDED = [
    *("--grpo.ghosts.when", "wrong", "--grpo.reward_weight", "0.5", "--grpo.ghosts.num_generations", "3"),
    *("--grpo.ghosts.updates_per_rollout", "3"),
]
FEEDBACK = "{question}\nAn attempt: {reply} {feedback}\n{question}"
MOVING = [
    *("--grpo.ghosts.source", "privileged_self", "--grpo.ghosts.self", "ema", "--grpo.ghosts.decay", "0.5"),
    *("--grpo.ghosts.privileged_prompt", FEEDBACK, "--grpo.ghosts.max_new_tokens", "10"),
    *("--grpo.ghosts.when", "disagree", "--grpo.ghosts.teacher_forced_share", "0.34"),
]
EXACT = [
    *("--grpo.objective.name", "jensen_shannon", "--grpo.objective.top_k", "null"),
    *("--grpo.ghosts.updates_per_rollout", "3", "--grpo.optimizer.learning_rate", "0.01"),
]


@pytest.mark.parametrize(
    "more",
    [[], *(pytest.param(more, marks=pytest.mark.slow) for more in (HARDEST, REWARDED, MOVING, EXACT))],
    ids=["plain", "hardest", "rewarded", "moving", "exact"],
)
def test_a_run_that_is_cut_off_resumes_as_the_same_run(folder: Path, tmp_path: Path, more: list[str]) -> None:
    """Cut off after step 4, when replies that are used three times have been used once, as by kill -9."""
    run = folder / "run"
    if more:
        run = tmp_path / "whole"
        shutil.copytree(folder / "run" / "sft", run / "sft")
        assert main(["grpo", *options(folder, "--run_dir", str(run), *more)]) == 0
    shutil.copytree(run, tmp_path / "cut")
    whole, cut = run / "grpo", tmp_path / "cut" / "grpo"
    for name in ("checkpoints/6", "report.json", "after.json"):
        path = cut / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["grpo", *options(folder, "--run_dir", str(cut.parent), *more)]) == 0
    assert lasting(cut) == lasting(whole)
    assert (cut / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    replies = [json.loads((stage / "after.json").read_text())["replies"] for stage in (whole, cut)]
    assert replies[0] == replies[1]
    *_, row = [row for row in read_metrics(whole) if "train/loss" in row]
    assert ("train/ghost_share" in row) == ("--grpo.ghosts.when" in more)
    assert ("train/clipped" in row) == ("--grpo.reward_weight" in more)


def test_other_questions_than_those_of_the_training_rows(folder: Path, tmp_path: Path) -> None:
    """A live ghost needs no text: rows of a question and its answer do. Those of the test are not among them."""
    report = json.loads((folder / "run" / "grpo" / "report.json").read_text(encoding="utf-8"))
    new = {t.question: t.answer for t in ProceduralTeacher(seed=9).draw(5)}
    held_out = report["samples"][0]["question"]
    rows = [{"question": question, "answer": answer} for question, answer in (new | {held_out: "1"}).items()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    more = ["--grpo.ghosts.prompts", str(tmp_path / "prompts.jsonl"), "--grpo.steps", "2", "--grpo.log_every", "1"]
    assert main(["grpo", *from_sft(folder, tmp_path, *more)]) == 0
    asked = [row["question"] for row in read_completions(tmp_path / "grpo", 100)]
    assert len(asked) == 6 and set(asked) == set(new)
    report = json.loads((tmp_path / "grpo" / "report.json").read_text(encoding="utf-8"))
    assert report["data"]["prompts"]["dropped"] == {"question is in the test set": 1}
    assert report["data"]["prompts"]["kept"] == 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--grpo.ghosts.teacher", "OTHER"],
            "has another tokenizer than the student: token 3 is '!' in the student's, and is",
        ),
        (["--grpo.ghosts.teacher", "nowhere"], "No folder nowhere"),
        (["--grpo.ghosts.max_new_tokens", "120"], "leaves 8 besides a reply of 120 (grpo.ghosts.max_new_tokens)"),
        (["--grpo.ghosts.teacher", "null"], "grpo.ghosts.teacher must be the folder or hub id"),
        (
            ["--grpo.ghosts.source", "teacher_forced", "--grpo.ghosts.teacher", "nowhere"],
            "grpo.ghosts.teacher does not apply to the ghosts 'teacher_forced', which takes no options.",
        ),
        (["--grpo.ghosts.temperature", "0"], "ghosts.temperature must be above 0"),
        (["--grpo.objective.name", "forward_kl", "--grpo.objective.top_k", "281"], "top_k is 281, but the student's"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    if "OTHER" in more:
        tokenizer = train_tokenizer(
            ["other words altogether"], vocab_size=262, special_tokens=("<pad>", "<eos>", "<sep>", "<x>")
        )
        shutil.copytree(folder / "teacher", tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        more = [str(tmp_path / "other") if word == "OTHER" else word for word in more]
    assert main(["grpo", *from_sft(folder, tmp_path / "run", *more)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_student_that_is_told_the_distribution_comes_to_it() -> None:
    """`ForwardKl` to a teacher's four likeliest of 19 tokens, on own contexts: the divergence falls to a tenth."""
    config = dataclasses.replace(SHAPE, vocab_size=19)
    params, teacher_params = (init_params(config, jax.random.key(seed)) for seed in (0, 1))
    student, tx = make_student(config), optax.adam(0.01)
    draw = jax.jit(make_draw(make_sampler(config, SamplingSettings(5, temperature=1.0)), student, top_k=4))
    prompts = pad_prompts([np.array([3, 4], np.int32), np.array([5], np.int32)] * 4)
    step = jax.jit(make_grpo_step(student, tx, ForwardKl(4)))
    state, losses = TrainState.create(params=params, tx=tx, key=0), []
    for number in range(100):
        models = state.params, teacher_params
        batch, _, _ = draw(models, (prompts, None, None), jax.random.key(number))
        state, metrics = step(state, batch)
        losses.append(metrics["loss"].mean())
    assert np.mean(losses[-10:]) < 0.1 * losses[0] and losses[0] > 0.1
    other = batch.replace(extra=batch.extra | {"top_ids": batch.extra["top_ids"][..., :3]})
    with pytest.raises(ValueError, match=r"ForwardKl\(top_k=4\) needs 4 top_ids .* got 3 and 4"):
        step(state, other)


def test_replies_used_again_are_weighted_by_what_came_before() -> None:
    """The clipped product of the ratios of a reply's earlier tokens, against NumPy; 1 for the student that wrote it."""
    config = DecoderConfig(vocab_size=19, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16)
    old = init_params(config, jax.random.key(0))
    new = jax.tree.map(lambda x: 1.5 * x, old)
    student = make_student(config)
    prompts = pad_prompts([np.array([3, 4], np.int32), np.array([5], np.int32)])
    replies = jax.jit(make_sampler(config, SamplingSettings(5, temperature=1.0)))(old, prompts, jax.random.key(2))
    batch = GhostBatch.teacher_forced(with_replies(prompts, replies))
    log_probs = jnp.pad(replies.log_probs, ((0, 0), (1, 1)))
    own = jnp.array([[True], [False]])
    jitted = jax.jit(lambda params: reweighted(student, params, batch, log_probs, own, 0.1).loss_mask)
    np.testing.assert_allclose(jitted(old), batch.loss_mask, atol=1e-5)
    logits = jax.jit(student.logits)(new, batch.tokens, batch.positions, batch.segment_ids)
    logits = np.asarray(logits, np.float64)
    now = np.take_along_axis(
        logits - np.log(np.exp(logits).sum(-1, keepdims=True)), np.asarray(batch.ghost_tokens)[..., None], -1
    )
    now = now[..., 0]
    ratios = np.exp((now - np.asarray(log_probs))[0, 1:6])
    want = np.clip(np.concatenate([[1.0], np.cumprod(ratios)[:-1]]), 0.9, 1.1)
    assert len(set(np.round(want, 4))) > 2
    got = np.asarray(jitted(new))
    np.testing.assert_allclose(got[0, 1:6], want, rtol=1e-4)
    np.testing.assert_array_equal(got[1], batch.loss_mask[1])


@pytest.mark.slow
def test_a_run_that_flattens_the_student_is_stopped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Literal REINFORCE raises the entropy without end."""
    more = ["--grpo.objective.name", "reinforce", "--grpo.optimizer.learning_rate", "0.1", "--grpo.log_every", "1"]
    more += ["--grpo.steps", "40", "--grpo.max_entropy_growth", "1.05", "--grpo.eval_every", "0"]
    assert main(["grpo", *from_sft(folder, tmp_path, *more)]) == 3
    assert "more than 1.05 times" in capsys.readouterr().err
