"""A user's own functions by their Python path, as docs/own_code.md shows them: its code is what runs here."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import SETTINGS, error_of, options, read
from helpers.package_sources import ROOT

from cotgrpo.cli import main
from cotgrpo.config import parse_config
from cotgrpo.data.own.loading import OwnCodeError
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training.steps import check_own_code

PAGE = (ROOT / "docs" / "own_code.md").read_text(encoding="utf-8")
CODE = "\n\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
NUMBER = itertools.count()
MORE = """

def of_the_row(reply, gold, row):
    assert row["answer"] == gold, "a training row has its own columns"
    return row["mark"] % 2 == 0


def distinct(reply, gold, row):
    return len(set(reply))


class Fails(Callback):
    def on_step(self, step):
        if step == 3:
            raise ValueError("three")


def vector(logits_V, token):
    return logits_V, {}


def alone(logits_V, token):
    return logits_V[0]


def words(logits_V, token):
    return logits_V[0], {"name": "text"}


def infinite(logits_V, token):
    return jax.numpy.log(logits_V[0] * 0), {}


def impossible(logits_V, token):
    return logits_V[-1], {}


def raises(logits_V, token):
    return logits_V.shape[7], {}


class Draws:
    num_draws = 2

    def __call__(self, logits_V, token):
        return logits_V[token.drawn], {}


def reads(logits_V, token):
    return token["advantages"] * logits_V[token.ghost], {}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Rows with a column of their own, settings, the code of the page, and its name as a module."""
    folder, name = tmp_path_factory.mktemp("own_code"), f"own_{next(NUMBER)}_of_a_test"
    write_triples(folder / "plain.jsonl", ProceduralTeacher(seed=1).draw(60))
    rows = [json.loads(line) for line in (folder / "plain.jsonl").read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps(row | {"mark": number}) + "\n" for number, row in enumerate(rows))
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    (folder / "c.yaml").write_text(SETTINGS, encoding="utf-8")
    (folder / f"{name}.py").write_text(CODE + MORE, encoding="utf-8")
    return folder, name


@pytest.fixture(scope="module")
def trained(folder: tuple[Path, str]) -> None:
    """The folder `run`, trained with everything that the page shows."""
    path, name = folder
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        sft = ["sft", *options(path, "--run_dir", "run"), "--verify.function", f"{name}:verify"]
        sft += ["--verify.reward", f"{name}:reward", "--callbacks", f"{name}:StopWhenGood"]
        assert main([*sft, "--trackers", f"{name}:TextTracker", "--profile.steps", "2:3"]) == 0


@pytest.fixture(autouse=True)
def there(folder: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder[0])


@pytest.mark.usefixtures("trained")
def test_a_stage_with_everything_of_ones_own(folder: tuple[Path, str]) -> None:
    stage = folder[0] / "run" / "sft"
    measured = read(stage / "after.json")
    assert all(r["message"] == f"expected {r['gold']} at the end" for r in measured["replies"] if not r["correct"])
    assert measured["reward"] == pytest.approx(sum(r["reward"] for r in measured["replies"]) / len(measured["replies"]))
    assert measured["verify"] == {"function": f"{folder[1]}:verify", "reward": f"{folder[1]}:reward"}
    rows = read_metrics(stage)
    assert [int(line.split()[0]) for line in (stage / "rows.txt").read_text().splitlines()] == [r["step"] for r in rows]
    assert read(next((stage / "trackers").iterdir())) == {"id": "my-id", "step": 6, "rows_of_step": 2}
    assert list((stage / "profile").rglob("*.xplane.pb"))
    memory = {"train/host_memory_gb", "train/memory_gb"}
    assert all(memory & row.keys() for row in rows if "train/loss" in row)


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_eval_takes_the_functions_of_the_run_or_others(folder: tuple[Path, str]) -> None:
    """One cheap student: an untrained one, whose replies are never right."""
    assert main(["eval", "--run_dir", "run"]) == 0
    measured = read(Path("run/sft/eval.json"))
    assert measured["verify"]["reward"] == f"{folder[1]}:reward" and "message" in measured["replies"][0]
    assert main(["eval", "--run_dir", "run", "--verify.function", "", "--verify.reward", f"{folder[1]}:distinct"]) == 0
    replies = read(Path("run/sft/eval.json"))["replies"]
    assert "message" not in replies[0] and replies[0]["reward"] == int(replies[0]["reward"])


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_grpo_learns_from_the_objective_and_the_reward(folder: tuple[Path, str]) -> None:
    grpo = ["grpo", *options(folder[0], "--grpo.ghosts.max_new_tokens", "8")]
    (folder[0] / "grpo.yaml").write_text(
        re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0].replace("own:", f"{folder[1]}:")
    )
    own = ["--config", "grpo.yaml", "--run_dir", "focal", "--grpo.init_from", "run/sft"]
    verified = ["--verify.function", f"{folder[1]}:of_the_row"]
    assert main([*grpo, *own, *verified, "--grpo.ghosts.source", "privileged_self"]) == 0
    assert all(0 <= row["train/weight"] <= 1 for row in read_metrics(Path("focal/grpo")) if "train/loss" in row)

    group = ["--run_dir", "group", "--grpo.init_from", "run/sft", "--grpo.objective.name", "group_relative"]
    group += ["--grpo.ghosts.source", "verified_reward", "--grpo.batch_size", "4"]
    rewarded = ["--verify.function", f"{folder[1]}:of_the_row", "--verify.reward", f"{folder[1]}:distinct"]
    rewarded = ["--verify.reward", f"{folder[1]}:distinct", "--data.streaming", "true"]
    assert main([*grpo, *group, *verified, *rewarded]) == 0
    rows = [row for row in read_metrics(Path("group/grpo")) if "train/loss" in row]
    assert all(row["train/reply_reward"] >= 1 and 0 <= row["train/accuracy"] <= 1 for row in rows)
    shown = [json.loads(line) for line in Path("group/grpo/completions.jsonl").read_text().splitlines()]
    assert any(set(row["rewards"]) != {0.0} for row in shown), "rewards differ where verdicts do not"


@pytest.mark.slow
def test_a_failing_callback_loses_nothing(folder: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    sft = ["sft", *options(folder[0], "--run_dir", "failing")]
    capsys.readouterr()
    assert main([*sft, "--callbacks", f"{folder[1]}:Fails"]) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cotgrpo: Step 3: callbacks ")]
    assert re.search(
        rf"{folder[1]}:Fails.on_step failed \(ValueError: three\) at \S+{folder[1]}.py:\d+\. Fix it", line[0]
    )
    assert main(sft) == 0
    assert "Resuming after step 2" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(Path("failing/sft")) if "train/loss" in row] == [2, 4, 6]


OBJECTIVES: list[tuple[str, list[str], str]] = [
    ("vector", [], "the loss must be a scalar, got an array of the shape"),
    ("alone", [], r"must return \(loss, metrics\), a scalar and a dict of scalars, got an array of the shape \(\)"),
    ("words", [], "name must be a scalar, got str 'text'"),
    ("infinite", [], "is no objective: .*loss is -?inf"),
    ("impossible", [], "is no objective: .*(impossible token is not 0|loss is -?inf)"),
    ("raises", [], r"failed \(IndexError: .*\) at \S+_of_a_test.py:\d+"),
    ("missing", [], "has no attribute 'missing'"),
    ("FocalNll", ["--grpo.objective.options", "{powr: 1}"], "failed .*unexpected keyword argument 'powr'"),
    ("__doc__", [], "must be a function|cannot be loaded"),
    (
        "Draws",
        ["--grpo.ghosts.source", "privileged_self"],
        "draws 2 tokens, but grpo.ghosts.source privileged_self has",
    ),
]


@pytest.mark.parametrize(("name", "more", "message"), OBJECTIVES, ids=[name for name, *_ in OBJECTIVES])
def test_what_is_no_objective_is_one_line(
    folder: tuple[Path, str], name: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--grpo.objective.name", "own", "--grpo.objective.function", f"{folder[1]}:{name}"]
    capsys.readouterr()
    assert main(["grpo", *options(folder[0], "--run_dir", "none", *own, *more)]) == 2
    assert re.search(message, error := error_of(capsys)) and f"{folder[1]}:{name}" in error
    assert not Path("none/grpo").exists()


def test_an_objective_that_reads_the_batch_is_tried_by_its_step(folder: tuple[Path, str]) -> None:
    own = ["--grpo.objective.name", "own", "--grpo.objective.function", f"{folder[1]}:reads"]
    check_own_code(parse_config(own), "grpo")


WRONG: list[tuple[str, str, Callable[[str], list[str]]]] = [
    ("verify", "verify.function must be package.module:function", lambda m: ["--verify.function", m]),
    ("reward", "verify.reward: .* cannot be loaded", lambda m: ["--verify.reward", f"{m}:other"]),
    ("arguments", r"must take \(reply, gold, row\)", lambda m: ["--verify.function", f"{m}:vector"]),
    ("callback", "must be a class with some of the methods", lambda m: ["--callbacks", f"{m}:verify"]),
    ("callbacks", "callbacks must be package.module:function", lambda m: ["--callbacks", m]),
    ("tracker", r"with a method log\(step, row\)", lambda m: ["--trackers", f"{m}:verify"]),
    ("trackers", "some of wandb, mlflow, trackio or package", lambda m: ["--trackers", "wandbb"]),
    ("project", "tracker.project is empty", lambda m: ["--tracker.project", ""]),
    ("offline", "tracker.uri does not apply", lambda m: ["--tracker.offline", "true", "--tracker.uri", "x"]),
    ("backwards", "profile.steps must be FIRST:LAST", lambda m: ["--profile.steps", "13:10"]),
    ("zero", "profile.steps must be FIRST:LAST", lambda m: ["--profile.steps", "0:3"]),
    ("text", "profile.steps must be FIRST:LAST", lambda m: ["--profile.steps", "ten"]),
    ("beyond", "profile.steps is 3:7, but sft.steps is 6", lambda m: ["--profile.steps", "3:7"]),
]


@pytest.mark.parametrize(("name", "message", "more"), WRONG, ids=[name for name, *_ in WRONG])
def test_wrong_settings_are_one_line_before_anything_is_read(
    folder: tuple[Path, str],
    name: str,
    message: str,
    more: Callable[[str], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert main(["sft", *options(folder[0], "--run_dir", "none", *more(folder[1]))]) == 2
    assert re.search(message, error_of(capsys))
    assert not Path("none").exists()


class Typo:
    def on_evaluate(self, step: int, metrics: dict[str, Any]) -> None: ...


class OneArgument:
    def on_row(self, row: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("given", "message"), [(Typo, "Did you mean on_evaluation?"), (OneArgument, r"must take \(step, row\)")]
)
def test_methods_that_would_never_be_called(given: type, message: str, tmp_path: Path) -> None:
    from cotgrpo.training.hooks import CallbackHook

    with pytest.raises(OwnCodeError, match=message):
        CallbackHook(given, tmp_path)
