"""Group Relative Policy Optimization: advantages and surrogate against NumPy and autodiff, and whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cotgrpo import TrainState, make_grpo_step
from cotgrpo.cli import main
from cotgrpo.data.questions import Question
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.ghosts.group_relative import group_advantages, group_batch
from cotgrpo.logs.completions import read_completions
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.objectives import GroupRelative, TokenInputs, value_and_grad
from cotgrpo.rollouts.group_relative import GroupRelativeBatches
from cotgrpo.rollouts.rollouts import RolloutPrompt, RolloutSettings
from cotgrpo.sampling import SamplingSettings, make_sampler, pad_prompts
from cotgrpo.train_steps import make_batch_loss
from cotgrpo.training.loop import TIME_KEYS
from cotgrpo.types import GhostBatch

V, GROUP = 19, 4
CONFIG = DecoderConfig(
    vocab_size=V, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16, init_scale=0.3
)
STUDENT = make_student(CONFIG)
PARAMS, REFERENCE = (init_params(CONFIG, jax.random.key(seed)) for seed in (0, 1))
PROMPTS = pad_prompts([np.array(p, np.int32) for p in ([3, 4, 5], [6]) for _ in range(GROUP)])
SAMPLE = jax.jit(make_sampler(CONFIG, SamplingSettings(6, eos_ids=(0, 1), temperature=1.0)))


def test_advantages_against_numpy() -> None:
    rewards = np.array([1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1], np.float32)
    want = [(r - r.mean()) / (r.std() + 1e-4) for r in rewards.reshape(3, 4).astype(np.float64)]
    got = group_advantages(rewards, 4)
    np.testing.assert_allclose(got, np.concatenate(want), rtol=1e-5)
    assert not np.any(got[4:8]) and np.all(got[jnp.array([0, 3, 11])] > 0)


@pytest.mark.parametrize("advantage", [1.3, -0.7])
@pytest.mark.parametrize("shift", [-1.0, -0.1, 0.1, 1.0])
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_the_surrogate_against_numpy_and_autodiff(advantage: float, shift: float, kl_weight: float) -> None:
    """Ratios within the bounds and beyond both, for replies better and worse than their group."""
    objective = GroupRelative(clip=0.2, kl_weight=kl_weight)
    z, ref = (np.asarray(jax.random.normal(jax.random.key(seed), (V,)), np.float64) for seed in (0, 1))
    log_p, log_ref = (x[7] - np.log(np.exp(x).sum()) for x in (z, ref))
    ratio, u = np.exp(shift), np.exp(log_ref - log_p)
    want = -min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage) + kl_weight * (u - np.log(u) - 1)
    row = TokenInputs(
        jnp.int32(3),
        jnp.float32(1),
        jnp.int32(7),
        jnp.float32(ref),
        {"drawn_log_probs": jnp.float32(log_p - shift), "advantages": jnp.float32(advantage)},
    )
    (loss, metrics), grad = value_and_grad(objective)(jnp.float32(z), row)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(grad, jax.grad(lambda z: objective(z, row)[0])(jnp.float32(z)), atol=1e-6)
    assert metrics["clipped"] == float(shift > 0.5 if advantage > 0 else shift < -0.5)
    assert ("kl" in metrics) == bool(kl_weight)


def batch_of(rewards: Any) -> tuple[GhostBatch, Any]:
    """Replies that the student wrote before its parameters changed."""
    replies = SAMPLE(jax.tree.map(lambda x: 1.05 * x, PARAMS), PROMPTS, jax.random.key(3))
    return group_batch(PROMPTS, replies, np.asarray(rewards, np.float32), GROUP), replies


def test_the_step_is_the_papers_mean_and_its_gradient() -> None:
    """The mean over replies of the mean over their tokens, by plain autodiff over all logits, against the engine."""
    objective = GroupRelative(clip=0.05, kl_weight=0.1)
    batch, replies = batch_of([1, 0, 0, 0, 1, 1, 0, 1])
    assert len(set(np.asarray(replies.lengths).tolist())) > 1
    engine = make_batch_loss(STUDENT, objective, STUDENT, 5)

    def by_engine(params: Any) -> Any:
        loss, (_, weight) = engine(params, batch, None, REFERENCE)
        return loss / weight

    def plain(params: Any) -> Any:
        inputs = (batch.tokens, batch.positions, batch.segment_ids)
        log_p, log_ref = (
            jnp.take_along_axis(jax.nn.log_softmax(STUDENT.logits(p, *inputs)), batch.drawn_tokens[..., None], -1)[
                ..., 0
            ]
            for p in (params, REFERENCE)
        )
        first = PROMPTS.tokens.shape[1] - 1
        total = 0.0
        for row, length in enumerate(np.asarray(replies.lengths)):
            own = slice(first, first + int(length))
            ratio = jnp.exp(log_p[row, own] - replies.log_probs[row, : int(length)])
            a = group_advantages(np.array([1, 0, 0, 0, 1, 1, 0, 1], np.float32), GROUP)[row]
            log_u = log_ref[row, own] - log_p[row, own]
            surrogate = jnp.minimum(ratio * a, jnp.clip(ratio, 0.95, 1.05) * a)
            total += jnp.mean(-surrogate + 0.1 * (jnp.exp(log_u) - log_u - 1))
        return total / len(replies.lengths)

    (ours, grads), (theirs, want) = (jax.jit(jax.value_and_grad(f))(PARAMS) for f in (by_engine, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, want)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-3


@pytest.mark.parametrize("reward", [0, 1])
def test_groups_of_equal_rewards_change_nothing(reward: int) -> None:
    batch, _ = batch_of([reward] * 8)
    tx = optax.sgd(1.0)
    step = jax.jit(make_grpo_step(STUDENT, tx, GroupRelative()))
    state, metrics = step(TrainState.create(params=PARAMS, tx=tx, key=0), batch)
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    assert metrics["grad_norm"].mean() == 0 and metrics["skipped"].mean() == 0


def test_a_batch_without_advantages_is_an_error() -> None:
    batch = batch_of([1] * 8)[0].replace(extra={})
    tx = optax.sgd(1.0)
    with pytest.raises(ValueError, match="needs the extra array 'drawn_log_probs'"):
        make_grpo_step(STUDENT, tx, GroupRelative())(TrainState.create(params=PARAMS, tx=tx, key=0), batch)


def test_what_is_rewarded_becomes_likelier() -> None:
    """A reply is right where its first token is even: half of them at first, and nearly all in the end."""
    tx = optax.adam(0.03)
    step = jax.jit(make_grpo_step(STUDENT, tx, GroupRelative()))
    state, shares = TrainState.create(params=PARAMS, tx=tx, key=0), []
    for number in range(20):
        replies = SAMPLE(state.params, PROMPTS, jax.random.key(number))
        right = np.asarray(replies.tokens)[:, 0] % 2 == 0
        shares.append(right.mean())
        state, _ = step(state, group_batch(PROMPTS, replies, right.astype(np.float32), GROUP))
    assert shares[0] < 0.7 and np.mean(shares[-10:]) > 0.9


@pytest.mark.parametrize("reuse", [1, 2])
def test_replies_that_are_drawn_one_update_ahead(reuse: int) -> None:
    """They are those of the parameters before the update, however often they are used. The first has none older."""
    tokenizer = train_tokenizer(["no words"], vocab_size=300)
    template = Template(tokenizer)
    asked = [RolloutPrompt(Question(str(n), "7"), np.array([3 + n, 4], np.int32)) for n in range(8)]
    settings = RolloutSettings(8, 10, 6, updates_per_rollout=reuse)
    make = lambda: GroupRelativeBatches(SAMPLE, template, asked, settings, seed=0, group=GROUP, prefetch=True)
    batches = make()
    students = [jax.tree.map(lambda x, n=n: (1 + 0.5 * n) * x, PARAMS) for n in range(3 * reuse)]
    for number, params in enumerate(students):
        batches.set_params(params)
        batch = next(batches)
        first = number // reuse * reuse
        writer = students[max(first - 1, 0)]
        want = SAMPLE(writer, batches.padded(batches.prompts_for(first)), batches.key_of(first))
        np.testing.assert_array_equal(batch.drawn_tokens[:, 3:9], want.tokens)
        np.testing.assert_array_equal(batch.extra["drawn_log_probs"][:, 3:9], want.log_probs)
        state = json.loads(json.dumps(batches.get_state(), default=lambda arrays: arrays.text))
        assert ("drawn" in state) == ((number + 1) % reuse == 0)
        batches = make()  # as after a resume, from here
        batches.set_state(state)
    assert len({float(jnp.sum(SAMPLE(p, PROMPTS, jax.random.key(1)).log_probs)) for p in students}) == len(students)


SETTINGS = """
student: {width: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 16, mlp_width: 32}
tokenizer: {vocab_size: 300}
data: {seq_len: 32, test_rows: 4, loss_on: completion}
sft: {steps: 30, batch_size: 8, log_every: 30, optimizer: {learning_rate: 0.01}}
grpo:
  steps: 6
  batch_size: 8
  log_every: 3
  eval_every: 3
  objective: {name: group_relative, kl_weight: 0.04}
  ghosts: {source: verified_reward, num_generations: 4, max_new_tokens: 12}
eval: {rows: 4, batch_size: 4, max_new_tokens: 12}
checkpoint: {every: 3}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reuse", "ahead", "logged_steps"), [(2, False, {1, 3}), (1, True, {1, 3, 6}), (2, True, {1, 3})]
)
def test_a_run_from_the_command_line_and_its_end_after_a_cut(
    tmp_path: Path, reuse: int, ahead: bool, logged_steps: set[int]
) -> None:
    """Cut off after step 3: replies that are used twice have been used once, and those of step 4 may be drawn."""
    rows = [{"question": f"{n}+{n}?", "rationale": "so", "answer": "7"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(SETTINGS)
    options = ["--config", str(tmp_path / "c.yaml"), "--data.train", str(tmp_path / "rows.jsonl")]
    options += ["--grpo.ghosts.updates_per_rollout", str(reuse), "--grpo.ghosts.prefetch_rollouts", str(ahead).lower()]
    for command in ("sft", "grpo"):
        assert main([command, *options, "--run_dir", str(tmp_path / "run")]) == 0
    whole, cut = tmp_path / "run" / "grpo", tmp_path / "cut" / "grpo"
    logged = [row for row in read_metrics(whole) if "train/loss" in row]
    for row in logged:
        assert 0 < row["train/accuracy"] <= 1 and row["train/rollout_tokens"] > 0
        assert row["train/kl"] >= 0 and 0 <= row["train/clipped"] <= 1
    assert [row["step"] for row in read_metrics(whole) if "eval/accuracy" in row] == [3, 6]
    replies = read_completions(whole, 100)
    assert {row["step"] for row in replies} == logged_steps  # of every third, those that were drawn for it
    for row in replies:
        assert row["ghosts"] is None and len(row["rewards"]) == len(row["tokens"]) and len(set(row["rewards"])) <= 1
        assert not row["rewards"] or (row["rewards"][0] >= 0 if row["correct"] else row["rewards"][0] <= 0)
    page = (whole / "report.html").read_text()
    assert 'id="completions"' in page and "advantage of the whole reply" in page and "the ghost agrees" not in page
    assert "group_relative: Group Relative Policy Optimization" in page
    shutil.copytree(whole.parent, cut.parent)
    shutil.rmtree(cut / "checkpoints" / "6")
    (cut / "report.json").unlink()
    assert main(["grpo", *options, "--run_dir", str(cut.parent)]) == 0
    lasting = [
        [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_metrics(stage)] for stage in (whole, cut)
    ]
    assert lasting[0] == lasting[1]
    assert (cut / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
