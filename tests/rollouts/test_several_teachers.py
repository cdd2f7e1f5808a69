"""Several live teachers: shares, routes by a field of the rows, resume, and wrong settings."""

from __future__ import annotations

import collections
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.commands import SETTINGS, write_model
from rich.console import Console

from cotgrpo.config import ConfigError
from cotgrpo.data.questions import Question
from cotgrpo.data.sources import DataError
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.rollouts.rollouts import RolloutPrompt, Rollouts, RolloutSettings
from cotgrpo.rollouts.several_teachers import SeveralTeachers, by_field
from cotgrpo.runs import Run
from cotgrpo.teachers.procedural import ProceduralTeacher
from cotgrpo.training.hooks import TrainingStopped
from cotgrpo.training.loop import TIME_KEYS
from cotgrpo.types import GhostBatch

ROWS = [
    {"question": t.question, "rationale": t.rationale, "answer": t.answer, "domain": "math" if n % 3 else "words"}
    for n, t in enumerate(ProceduralTeacher(seed=1).draw(120))
]


class Source(Rollouts):
    """Batches that are their own numbers."""

    def __init__(self, updates: int = 1) -> None:
        self.settings = RolloutSettings(2, 8, 4, updates_per_rollout=updates)
        self.taken, self.params = 0, None

    def set_params(self, params: Any) -> None:
        self.params = params

    def __next__(self) -> GhostBatch:
        """A batch whose only tokens are its number and the parameters that it was drawn by."""
        self.taken += 1
        tokens = np.array([[self.taken - 1, self.params]], np.int32)
        return GhostBatch(tokens, tokens, tokens, tokens, np.ones(tokens.shape, np.float32))

    def roll_out(self, number: int) -> Any: ...

    def reuse_batch(self, batch: Any) -> Any: ...

    def observed(self) -> dict[str, Any]:
        return {}

    def get_state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def several(shares: dict[str, float], updates: int = 1, seed: int = 0) -> SeveralTeachers:
    sources: Any = {name: Source(updates) for name in shares}
    return SeveralTeachers(sources, shares, seed=seed)


def drawn(batches: SeveralTeachers, count: int) -> list[str]:
    names = []
    for _ in range(count):
        names.append(batches.teacher_of(batches.taken))
        batches.set_params(batches.taken)
        assert np.asarray(next(batches).tokens).tolist() == [[batches.taken - 1] * 2]
    return names


@pytest.mark.parametrize("shares", [{"a": 0.7, "b": 0.3}, {"a": 7, "b": 2, "c": 1}, {"a": 1}])
def test_batches_follow_the_shares(shares: dict[str, float]) -> None:
    names = drawn(several(shares), 2_000)
    found, total = collections.Counter(names), sum(shares.values())
    for name, share in shares.items():
        p = share / total
        assert abs(found[name] / 2_000 - p) <= 4 * np.sqrt(p * (1 - p) / 2_000)
    assert drawn(several(shares), 50) == names[:50]
    assert len(shares) == 1 or drawn(several(shares, seed=1), 50) != names[:50]


def test_all_updates_of_a_rollout_have_one_teacher() -> None:
    names = drawn(several({"a": 1, "b": 1}, updates=3), 60)
    assert all(len(set(names[n : n + 3])) == 1 for n in range(0, 60, 3)) and len(set(names)) == 2


def test_a_position_is_restored() -> None:
    whole, parts = several({"a": 1, "b": 1}), several({"a": 1, "b": 1})
    names = drawn(whole, 20)
    assert drawn(parts, 7) == names[:7]
    again = several({"a": 1, "b": 1})
    again.set_state(parts.get_state())
    assert drawn(again, 13) == names[7:]


def asked(value: object, source: str = "rows.jsonl:3") -> RolloutPrompt:
    row = {} if value is None else {"domain": value}
    return RolloutPrompt(Question("What?", "1", source=source, row=row), np.zeros(2, np.int32))


def test_questions_by_a_field() -> None:
    questions = [asked(value) for value in ("math", "code", 5, "law")]
    found = by_field(questions, "domain", {"math": "a", "5": "a", "code": "b", "*": "c"})
    assert {name: [q.question.row["domain"] for q in rows] for name, rows in found.items()} == {
        "a": ["math", 5],
        "b": ["code"],
        "c": ["law"],
    }


@pytest.mark.parametrize(
    ("values", "teachers", "text"),
    [
        (["math", "law"], {"math": "a"}, "rows.jsonl:3 has domain 'law', for which grpo.ghosts.teachers names no"),
        ([None], {"math": "a"}, "rows.jsonl:3 has no field 'domain'"),
        (["math"], {"math": "a", "code": "b"}, "No question has the domain code of the teacher b"),
    ],
)
def test_rows_and_teachers_that_do_not_fit(values: list[Any], teachers: dict[str, str], text: str) -> None:
    with pytest.raises(DataError, match=text):
        by_field([asked(value) for value in values], "domain", teachers)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and a run of `sft` whose student has its tokenizer."""
    folder = tmp_path_factory.mktemp("several")
    write_model(folder / "model", [f"{row['question']}\n{row['rationale']}" for row in ROWS])
    settings = yaml.safe_load(SETTINGS) | {"tokenizer": {"path": str(folder / "model")}}
    Run(folder / "run", train=ROWS, console=Console(file=io.StringIO()), **settings).sft(steps=2)
    shutil.copytree(folder / "model", folder / "other")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("route", ["", "domain"])
def test_a_run_with_two_teachers(route: str, trained: Path, tmp_path: Path) -> None:
    """Both are asked, and a run that was stopped goes on as one that was not."""
    names = [str(trained / name) for name in ("model", "other")]
    teachers = {"math": names[0], "*": names[1]} if route else {names[0]: 0.5, names[1]: 0.5}
    ghosts = {"source": "teacher_model", "teachers": teachers, "route": route, "max_new_tokens": 16}
    ghosts |= {"updates_per_rollout": 2}
    logs = []
    for name in ("whole", "parts"):
        shutil.copytree(trained / "run", tmp_path / name)
        settings: dict[str, Any] = {"ghosts": ghosts, "log_every": 1, "steps": 8}
        settings["init_from"] = str(trained / "run" / "sft")
        if name == "parts":

            class Stopped:
                def on_step(self, step: int) -> None:
                    if step == 5:
                        raise TrainingStopped("enough")

            stopped = Run.open(tmp_path / name, console=Console(file=io.StringIO()), callbacks=[Stopped()])
            with pytest.raises(TrainingStopped, match="enough"):
                stopped.grpo(**settings)
        Run.open(tmp_path / name, console=Console(file=io.StringIO()), callbacks=[]).grpo(**settings)
        rows = read_metrics(tmp_path / name / "grpo")
        logs.append([{k: v for k, v in row.items() if k not in TIME_KEYS} for row in rows])
    assert logs[0] == logs[1]
    shares = [[row[f"train/teacher/{name}"] for row in logs[0] if "train/loss" in row] for name in names]
    assert all(0 < sum(share) < len(share) for share in shares) and set(np.sum(shares, axis=0)) == {1.0}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one and several": ({"teacher": "org/c", "teachers": {"org/a": 1}}, "give one of the two"),
    "a share of zero": ({"teachers": {"org/a": 0}}, "share above 0"),
    "a share that is a text": ({"teachers": {"org/a": "much"}}, "share above 0"),
    "a route without teachers": ({"teacher": "org/a", "route": "domain"}, "teachers is empty"),
    "a route to a number": ({"teachers": {"math": 1.0}, "route": "domain"}, "name the teacher of that domain"),
    "servers with prefetch": (
        {"source": "teacher_server", "teachers": {"http://a/v1": 1}, "prefetch_rollouts": True},
        "prefetch_rollouts needs one teacher",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name: str, tmp_path: Path) -> None:
    given, text = WRONG[name]
    with pytest.raises(ConfigError, match=text):
        Run(tmp_path / "run", grpo={"ghosts": {"source": "teacher_model", **given}})
    exact = {"name": "reverse_kl", "top_k": None}
    with pytest.raises(ConfigError, match="frozen model"):
        own = {"source": "teacher_model", "teachers": {"org/a": 1}}
        Run(tmp_path / "run", grpo={"objective": exact, "ghosts": own})
