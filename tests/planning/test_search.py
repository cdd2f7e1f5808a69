"""The search of meshes, remat policies and micro-batches: its arithmetic, and what it compiles."""

from __future__ import annotations

import dataclasses
import functools
import io
from typing import Any

import pytest
from rich.console import Console

from cotgrpo.accelerators.chips import parse_topology
from cotgrpo.config import Config, ConfigError, DataConfig, StageConfig, StudentConfig, TokenizerConfig
from cotgrpo.planning import search
from cotgrpo.planning.search import Candidate, candidates, compile_fastest, estimated_candidates, rank_candidates
from cotgrpo.planning.stage_plan import StagePlan

CONFIG = Config(
    student=StudentConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64),
    tokenizer=TokenizerConfig(vocab_size=64),
    data=DataConfig(seq_len=16),
    sft=StageConfig(batch_size=8),
)
PLAN = StagePlan(CONFIG, "sft", parse_topology("v5e:2x2"), {"fsdp": 4})
QUIET = Console(file=io.StringIO())
FSDP, TENSOR = {"fsdp": 4}, {"fsdp": 2, "tensor": 2}


@functools.cache
def estimates() -> list[Candidate]:
    return estimated_candidates(PLAN)


def test_the_quick_arithmetic_is_that_of_a_plan() -> None:
    found = estimates()
    assert len(found) == len(list(candidates(PLAN))) > 50
    way = found[len(found) // 2]
    total = way.plan.figures(by_arithmetic=True)["bytes_per_device"]["total"]
    assert way.memory == pytest.approx(total, rel=1e-6)


def test_a_policy_that_keeps_more_is_faster_and_takes_more_memory() -> None:
    ways = [way for way in estimates() if way.place == estimates()[0].place]
    assert [way.plan.decoder.remat for way in ways] == list(search.SEARCHED)
    assert [way.seconds for way in ways] == sorted(way.seconds for way in ways)
    assert [way.memory for way in ways] == sorted((way.memory for way in ways), reverse=True)


def test_policies_that_name_attention_need_one_that_keeps_it() -> None:
    student = dataclasses.replace(CONFIG.student, attention="xla")
    plan = dataclasses.replace(PLAN, config=dataclasses.replace(CONFIG, student=student))
    assert {way.decoder.remat for way in candidates(plan)} == {p for p in search.SEARCHED if "attention" not in p}


@pytest.mark.parametrize(
    ("fitting", "expected"),
    [
        # All fit: the two fastest of the first mesh, and the next mesh's fastest.
        ({"none", "dots", "minimal"}, [(FSDP, "none"), (FSDP, "dots"), (TENSOR, "none")]),
        # What keeps everything does not fit. On the second mesh that is tried too.
        ({"dots", "minimal"}, [(FSDP, "none"), (FSDP, "dots"), (FSDP, "minimal")]),
        ({"minimal"}, [(FSDP, "none"), (FSDP, "dots"), (FSDP, "minimal")]),
        # Nothing fits: as many are compiled as there are, up to the most.
        (set(), [(FSDP, "none"), (FSDP, "dots"), (FSDP, "minimal"), (TENSOR, "none"), (TENSOR, "dots")]),
    ],
)
def test_compiling_stops_with_the_fastest(
    fitting: set[str], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def figures(self: StagePlan) -> dict[str, Any]:
        compiled.append((self.mesh, self.decoder.remat))
        return {"fits": self.decoder.remat in fitting, "compile_seconds": 1.0}

    monkeypatch.setattr(StagePlan, "figures", figures)
    monkeypatch.setattr(search, "MOST", 5)
    ways = [
        Candidate(search.change_plan(PLAN, mesh, policy, 1), memory, 1.0)
        for mesh in (FSDP, TENSOR)
        for policy, memory in (("none", 3.0), ("dots", 2.0), ("minimal", 1.0))
    ]
    assert len(compile_fastest(ways, QUIET)) == len(compiled)
    assert compiled == expected


def test_more_memory_than_one_that_did_not_fit_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def figures(self: StagePlan) -> dict[str, Any]:
        compiled.append(self.decoder.remat)
        return {"fits": False, "compile_seconds": 1.0}

    monkeypatch.setattr(StagePlan, "figures", figures)
    ways = [
        Candidate(search.change_plan(PLAN, FSDP, policy, 1), size, 1.0) for policy, size in (("dots", 2), ("none", 3))
    ]
    compile_fastest(ways, QUIET)
    assert compiled == ["dots"]


def test_nothing_near_is_an_error_with_what_to_do() -> None:
    huge = dataclasses.replace(CONFIG, student=StudentConfig(width=16_384, num_layers=40, mlp_width=65_536))
    with pytest.raises(ConfigError, match="Nothing comes near to fitting on v5e:2x2: the smallest candidate takes"):
        rank_candidates(dataclasses.replace(PLAN, config=huge), QUIET)


def test_of_equal_times_the_smaller_comes_first() -> None:
    plan = lambda name, fits, seconds, size: {
        "name": name, "fits": fits, "seconds": {"step": [seconds, seconds]}, "bytes_per_device": {"total": size},
    }  # fmt: skip
    found = [plan("a", False, 0.1, 1), plan("b", True, 1.0, 9), plan("c", True, 1.0, 5), plan("d", True, 0.9, 9)]
    assert [own["name"] for own in sorted(found, key=search.by_speed)] == ["d", "c", "b", "a"]
