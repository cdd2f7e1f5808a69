"""Phases of a GhostRespond update by hand-computed numbers, and what rollouts take of the memory."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from cotgrpo.accelerators.chips import parse_topology
from cotgrpo.accelerators.step_estimate import peak_share
from cotgrpo.cli import main
from cotgrpo.config import Config, DataConfig, GrpoConfig, PrivilegedSelf, StudentConfig, TokenizerConfig
from cotgrpo.config.ghosts import SelfReply, TeacherForced, TeacherModel, TeacherServer, VerifiedReward
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params
from cotgrpo.objectives import GroupRelative
from cotgrpo.planning.rollout_plan import HBM_SHARE, HOP_SECONDS, RolloutPlan, teacher_params, teacher_paths
from cotgrpo.planning.stage_plan import StagePlan
from cotgrpo.rollout_servers.settings import RolloutServerSettings

ROOT = Path(__file__).parents[2]
DECODER = DecoderConfig(64, 32, 2, 4, 2, 8, 64, dtype="bfloat16", tied_head=False)
TEACHER = DecoderConfig(64, 64, 3, 4, 2, 16, 128, dtype="bfloat16", tied_head=False)
ONE = parse_topology("h100:1")
MESH = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def plan_for(ghosts: Any, topology: str = "h100:1", mesh: dict[str, int] = MESH, **settings: Any) -> RolloutPlan:
    teachers = (TEACHER,) if isinstance(ghosts, TeacherModel) else ()
    params = jax.eval_shape(functools.partial(init_params, DECODER), jax.eval_shape(jax.random.key, 0))
    stage = GrpoConfig(batch_size=8, ghosts=ghosts, **settings)
    return RolloutPlan(stage, DECODER, teachers, 16, parse_topology(topology), mesh, params)


def weights(decoder: DecoderConfig) -> int:
    """Weights of the matrix products: layers and head."""
    layers = decoder.num_layers * sum(inputs * outputs for inputs, outputs in decoder.projections.values())
    return layers + decoder.width * decoder.vocab_size


@pytest.mark.parametrize(
    ("ghosts", "settings", "replies", "rows"),
    [
        (TeacherModel(teacher="x", max_new_tokens=4), {}, 8, 8),
        (TeacherModel(teacher="x", max_new_tokens=4, updates_per_rollout=2), {}, 4, 8),
        (TeacherModel(teacher="x", max_new_tokens=4, teacher_forced_share=0.25), {}, 6, 6),
        (PrivilegedSelf(max_new_tokens=4, decode_batch_size=2), {}, 8, 2),
        (VerifiedReward(max_new_tokens=4, num_generations=4), {"objective": GroupRelative()}, 8, 8),
        (SelfReply(max_new_tokens=4, questions=100, num_generations=3, refresh_every=10), {}, 30, 8),
    ],
    ids=["a teacher", "two updates", "rows of text", "a small batch", "rewards", "own replies"],
)
def test_replies_of_an_update(ghosts: Any, settings: dict[str, Any], replies: float, rows: int) -> None:
    plan = plan_for(ghosts, **settings)
    assert (plan.replies, plan.rows, plan.prompt_tokens) == (replies, rows, 12)


def test_a_token_reads_the_weights_and_the_cache_once() -> None:
    plan = plan_for(TeacherModel(teacher="x", max_new_tokens=4))
    layout = plan.layout(resident=0)
    copy = layout.bytes.copy
    assert 2 * weights(DECODER) <= copy <= 4 * DECODER.num_params()
    # The cache is that of 12 prompt tokens and, on average, half of the 4 new ones.
    read = copy + (12 + 4 / 2) / 16 * layout.bytes.cache
    assert plan.token_seconds(layout) == pytest.approx(read / (HBM_SHARE * 3350e9))
    whole = plan.prefill_seconds + 4 * plan.token_seconds(layout)
    assert plan.rollout_seconds(layout) == pytest.approx(whole)
    halves = dataclasses.replace(plan.settings, ghosts=dataclasses.replace(plan.ghosts, updates_per_rollout=2))
    assert dataclasses.replace(plan, settings=halves).rollout_seconds(layout) == pytest.approx(whole / 2)


def test_split_weights_sum_the_stream_twice_a_layer() -> None:
    """Two devices hold half of the weights each: two layers, two sums of 8 rows of 32 bfloat16 numbers in each."""
    mesh = MESH | {"tensor": 2}
    plan = plan_for(TeacherModel(teacher="x", max_new_tokens=4), "h100:2", mesh)
    layout = plan.layout(resident=0)
    read = (layout.bytes.copy + (12 + 4 / 2) / 16 * layout.bytes.cache) / (HBM_SHARE * 3350e9)
    sent = 4 * 2 * (1 / 2) * 8 * 32 * 2 / 450e9
    assert plan.token_seconds(layout) == pytest.approx(read + sent + 4 * HOP_SECONDS)


def test_a_prefill_and_the_ghosts_pass_are_forward_passes() -> None:
    plan = plan_for(TeacherModel(teacher="x", max_new_tokens=4))
    rate = peak_share(ONE.chip) * 989e12
    layers, head = weights(DECODER) - 32 * 64, 32 * 64
    attention = 2 * 2 * 2 * 4 * 8 * 12 / 2  # two products in two layers: 2 Q H for each of 12 / 2 keys
    assert plan.prefill_seconds == pytest.approx(8 * 12 * (2 * layers + attention) / rate)
    layers, head = weights(TEACHER) - 64 * 64, 64 * 64
    attention = 3 * 2 * 2 * 4 * 16 * 16 / 2
    expected = 8 * 16 * (2 * layers + 2 * 4 / 16 * head + attention) / rate
    assert plan.ghost_seconds() == pytest.approx(expected)


def test_a_server_s_pass_is_not_counted_and_that_is_said() -> None:
    plan = plan_for(TeacherServer(base_url="http://localhost", model="m", max_new_tokens=4))
    assert plan.ghost_seconds() == 0 and plan.teacher_bytes == 0
    assert any("server" in note for note in plan.notes())


def test_replies_of_an_engine_on_a_server_take_nothing_here() -> None:
    ghosts = TeacherModel(teacher="x", max_new_tokens=4)
    plan = plan_for(ghosts, rollouts=RolloutServerSettings(base_url="http://localhost:8000"))
    assert plan.on_server and plan.rollout_seconds(plan.layout(resident=0)) == 0
    assert any("server writes the replies" in note for note in plan.notes())


def test_the_live_teacher_s_weights_are_counted_once_on_each_device() -> None:
    plan = plan_for(TeacherModel(teacher="x", max_new_tokens=4))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(teacher_params(TEACHER, "bfloat16")))
    assert plan.teacher_bytes == whole == 2 * TEACHER.num_params()
    halves = plan_for(TeacherModel(teacher="x", max_new_tokens=4), "h100:2", MESH | {"fsdp": 2})
    assert whole / 2 < halves.teacher_bytes < 0.6 * whole  # norms' scales are whole on both


def test_teachers_by_name_and_by_share() -> None:
    of = lambda **settings: teacher_paths(GrpoConfig(ghosts=TeacherModel(**settings)))
    assert of(teacher="a") == ("a",)
    assert of(teachers={"a": 0.5, "b": 0.5}) == ("a", "b")
    assert of(teachers={"x": "a", "y": "b", "*": "a"}, route="field") == ("a", "b")
    assert teacher_paths(GrpoConfig(ghosts=TeacherForced())) == ()


def test_the_phases_of_a_whole_plan_add_up() -> None:
    """The live teacher is the student's own first self, in float32; rollouts hold a copy in bfloat16 and the cache."""
    student = StudentConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64)
    config = Config(
        student=dataclasses.replace(student, dtype="bfloat16"),
        tokenizer=TokenizerConfig(vocab_size=64),
        data=DataConfig(seq_len=16),
        grpo=GrpoConfig(batch_size=8, ghosts=PrivilegedSelf(max_new_tokens=4)),
    )
    figures = StagePlan(config, "grpo", parse_topology("h100:2"), {"fsdp": 2}).figures()
    memory, decoding, phases = (figures[key] for key in ("bytes_per_device", "decoding", "phases"))
    assert memory["live teacher"] == memory["parameters"] > 0
    stays = memory["parameters"] + memory["optimizer"] + memory["live teacher"] + memory["frozen parameters"]
    assert decoding["total"] == stays + sum(decoding["bytes_per_device"].values())
    step = stays + memory["batch"] + memory["temporaries"]
    assert memory["total"] == max(step, decoding["total"])
    assert phases["train step"]["seconds"] == figures["expected"]["seconds"]
    assert sum(phase["share"] for phase in phases.values()) == pytest.approx(1)
    assert "phases" not in StagePlan(config, "sft", parse_topology("h100:2"), {"fsdp": 2}).figures()


@pytest.mark.parametrize("search", [[], ["--search"]], ids=["plan", "search"])
def test_a_run_that_does_not_fit_is_an_error_of_one_line(
    search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight billion parameters in float32 with AdamW are 96 GB without a gradient; an H100 has 80."""
    out = tmp_path / "plan.json"
    student = ["--student.path", str(ROOT / "configs" / "models" / "llama-3-8b"), "--sft.batch_size", "1"]
    arguments = ["plan", *student, "--stage", "sft", "--topology", "h100:1", "--out", str(out), *search]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "fit" in error and "h100:1" in error and "Take more chips" in error and error.count("\n") == 1
    if not search:  # the plan is written all the same
        assert not json.loads(out.read_text())["fits"]


def test_a_plan_names_the_versions_that_made_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", "--topology", "b200:8", "--mesh.data", "8", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["versions"]["jax"] == jax.__version__
    printed = capsys.readouterr().out
    assert f"jax {jax.__version__}" in printed and "nothing was compiled" in printed
    lines = [line for line in printed.splitlines() if not line.startswith("written:")]
    assert max(map(len, lines)) <= 80  # a terminal's width if the output goes elsewhere
