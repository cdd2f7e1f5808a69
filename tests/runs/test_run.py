"""Whole runs from Python: rows of every kind, objects, the same run as on the command line, and wrong input."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers.commands import PRETRAINED_SETTINGS, SETTINGS, write_model
from rich.console import Console

from cotgrpo.cli import main
from cotgrpo.config import ConfigError, PrivilegedSelf, StageConfig, StudentConfig
from cotgrpo.data.sources import DataError
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.models import load_pretrained
from cotgrpo.objectives import Pair
from cotgrpo.runs import Run
from cotgrpo.runs.given import plain
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training.loop import TIME_KEYS
from cotgrpo.types import SftBatch

TRIPLES = ProceduralTeacher(seed=1).draw(120)
ROWS = [{"question": t.question, "rationale": t.rationale, "answer": t.answer} for t in TRIPLES]


def settings(text: str = SETTINGS) -> dict[str, Any]:
    """The small settings as nested dicts, as a file has them."""
    found = yaml.safe_load(text)
    assert isinstance(found, dict)
    return found


def run_of(folder: Path, *, text: str = SETTINGS, **more: Any) -> Run:
    return Run(folder, console=Console(file=io.StringIO()), **{**settings(text), **more})


def numbers(stage: Path) -> list[dict[str, Any]]:
    """The log, without times."""
    return [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_metrics(stage)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of both stages."""
    run = run_of(tmp_path_factory.mktemp("runs") / "run", train=ROWS)
    run.sft()
    run.grpo(objective=Pair(beta=0.5), ghosts=PrivilegedSelf(max_new_tokens=8))
    return run


def test_a_run_is_that_of_the_command_line(trained: Run, tmp_path: Path) -> None:
    """The same rows, settings and stages in another folder, by the commands: the same log, and the same config."""
    write_triples(tmp_path / "rows.jsonl", TRIPLES)
    (tmp_path / "c.yaml").write_text(SETTINGS, encoding="utf-8")
    common = ["--config", str(tmp_path / "c.yaml"), "--run_dir", str(tmp_path / "run")]
    common += ["--data.train", str(tmp_path / "rows.jsonl")]
    assert main(["sft", *common]) == 0
    own = ["--grpo.objective.beta", "0.5", "--grpo.ghosts.source", "privileged_self"]
    assert main(["grpo", *common, *own, "--grpo.ghosts.max_new_tokens", "8"]) == 0
    folder = Path(trained.config.run_dir)
    for stage in ("sft", "grpo"):
        assert numbers(folder / stage) == numbers(tmp_path / "run" / stage)
        saved = [yaml.safe_load((at / stage / "config.yaml").read_text()) for at in (folder, tmp_path / "run")]
        for config in saved:
            del config["run_dir"], config["data"]["train"]
        assert saved[0] == saved[1]


def test_a_complete_run_only_returns_its_reports(trained: Run) -> None:
    folder = Path(trained.config.run_dir)
    again = run_of(folder, train=ROWS)
    before = numbers(folder / "sft")
    assert again.sft()["accuracy"].keys() == {"base", "sft"}
    assert numbers(folder / "sft") == before


def test_the_trained_student_comes_back(trained: Run, tmp_path: Path) -> None:
    """In memory and as a folder, with the same logits; `reply` gives the texts that the evaluation graded."""
    model = trained.model()
    assert (model.stage, model.step) == ("grpo", 4)
    folder = trained.save(tmp_path / "student")
    loaded = load_pretrained(folder)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    columns = jnp.arange(12, dtype=jnp.int32).reshape(1, 12), jnp.ones((1, 12), jnp.int32)
    own = model.student.logits(model.params, tokens, *columns)
    np.testing.assert_allclose(own, loaded.student.logits(loaded.params, tokens, *columns), rtol=0, atol=1e-6)
    measured = trained.evaluate(rows=5)["replies"]
    texts = model.reply([reply["question"] for reply in measured], max_new_tokens=12, batch_size=2)
    assert texts == [reply["text"] for reply in measured]
    drawn = [model.reply("What is 2 + 3?", temperature=1.0, max_new_tokens=8, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert model.reply([]) == []


def test_a_run_is_opened_with_its_own_settings(trained: Run) -> None:
    opened = Run.open(trained.config.run_dir, console=Console(file=io.StringIO()))
    assert opened.config.grpo.objective == Pair(beta=0.5) and opened.config.data.test_rows == 20
    assert opened.evaluate(rows=5)["accuracy"]["n"] == 5
    assert opened.evaluate(test=ROWS[:7])["accuracy"]["n"] == 7
    assert opened.evaluate()["accuracy"]["n"] == 20, "rows and settings of one call are those of that call alone"


def frame(rows: list[dict[str, Any]]) -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(rows)


def data_set(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


KINDS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda rows: (row for row in rows),
    "data set": data_set,
    "streamed data set": lambda rows: data_set(rows).to_iterable_dataset(),
    "data frame": frame,
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_are_the_same_file(kind: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", train=KINDS[kind](ROWS[:5]))
    name = run.config.data.train
    assert isinstance(name, str) and name == str(tmp_path / "run" / "given" / "train.jsonl")
    assert [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()] == ROWS[:5]


def test_triples_are_rows(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", train=TRIPLES[:5], test=TRIPLES[5:8])
    lines = Path(str(run.config.data.train)).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["question"] for line in lines] == [t.question for t in TRIPLES[:5]]
    assert run.config.data.test == str(tmp_path / "run" / "given" / "test.jsonl")


@pytest.mark.parametrize("value", ["rows.jsonl", Path("rows.jsonl"), ["a.jsonl", Path("b.jsonl")], []])
def test_names_of_files_stay_names(value: Any, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", train=value)
    names = [value] if isinstance(value, str | Path) else value
    found = run.config.data.train
    assert ([found] if isinstance(found, str) else found) == [str(name) for name in names]
    assert not (tmp_path / "run").exists()


def test_the_same_rows_leave_the_file_alone_and_other_rows_are_found_out(trained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = run_of(folder, train=ROWS)
    run.sft(steps=2)
    written = (folder / "given" / "train.jsonl").stat()
    run_of(folder, train=ROWS)
    assert (folder / "given" / "train.jsonl").stat().st_ino == written.st_ino
    edited = [*ROWS[:3], {**ROWS[3], "rationale": "Another one."}, *ROWS[4:]]
    with pytest.raises(ConfigError, match="1 edited"):
        run_of(folder, train=edited).grpo(steps=2)
    assert run_of(folder, train=edited, allow_changed="data").grpo(steps=2)["accuracy"]


def test_a_pretrained_student_and_its_tokenizer_as_objects(tmp_path: Path) -> None:
    """A model that was changed in memory is the base of the run, which keeps it and finds another one out."""
    folder = write_model(tmp_path / "model", [row["question"] + row["rationale"] for row in ROWS])
    given = load_pretrained(folder)
    params = jax.tree.map(lambda x: x * 1.5, given.params)
    changed = dataclasses.replace(given, params=params)
    rows = {"train": TRIPLES}
    run = run_of(tmp_path / "run", text=PRETRAINED_SETTINGS, student=changed, **rows)
    run.sft(steps=2)
    kept = load_pretrained(tmp_path / "run" / "given" / "student")
    jax.tree.map(np.testing.assert_array_equal, kept.params, params)
    run_of(tmp_path / "run", text=PRETRAINED_SETTINGS, student=changed, **rows)
    with pytest.raises(ConfigError, match="other weights"):
        run_of(tmp_path / "run", text=PRETRAINED_SETTINGS, student=given, **rows)
    assert Run.open(tmp_path / "run").model().tokenizer.get_vocab() == run.model().tokenizer.get_vocab()


class Seen:
    """A callback."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def on_row(self, step: int, row: dict[str, Any]) -> None:
        self.rows.append(step)


def trusted(logits_V: Any, token: Any) -> Any:
    """An objective of one's own: the next-token loss."""
    log_p = jax.nn.log_softmax(logits_V)[token.ghost]
    return -log_p, {"own_prob": jnp.exp(log_p)}


@dataclasses.dataclass(frozen=True)
class Weighted:
    """The same as an object with a setting."""

    weight: float

    def __call__(self, logits_V: Any, token: Any) -> Any:
        loss, metrics = trusted(logits_V, token)
        return self.weight * loss, metrics


@pytest.mark.parametrize("objective", [trusted, Weighted(0.5)], ids=["function", "object"])
def test_code_of_ones_own_needs_no_path(objective: Any, tmp_path: Path) -> None:
    seen, asked = Seen(), list[str]()

    def is_right(reply: str, gold: str, row: dict[str, Any]) -> tuple[bool, str]:
        asked.append(row["question"])
        return True, ""

    run = run_of(tmp_path / "run", train=ROWS, callbacks=[seen], verify={"function": is_right})
    assert run.sft(steps=2)["accuracy"]["sft"]["value"] == 1.0
    assert set(asked) <= {row["question"] for row in ROWS} and len(asked) == 40
    run.grpo(steps=2, objective=objective)
    assert seen.rows[:2] == [2, 2] and len(seen.rows) >= 4
    assert "train/own_prob" in numbers(tmp_path / "run" / "grpo")[0]


def test_settings_may_be_dataclasses(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", student=StudentConfig(width=32), sft=StageConfig(steps=7), seed=3)
    assert (run.config.student.width, run.config.sft.steps, run.config.seed) == (32, 7, 3)
    own = {"objective": Pair(beta=0.5), "ghosts": PrivilegedSelf(max_new_tokens=8)}
    assert Run(tmp_path / "run", grpo=own).config.grpo.ghosts == PrivilegedSelf(max_new_tokens=8)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown section": ({"sftt": {"steps": 1}}, ConfigError, "unknown key 'sftt.steps'. Did you mean sft.steps?"),
    "unknown setting": ({"sft": {"step": 1}}, ConfigError, "unknown key 'sft.step'. Did you mean sft.steps?"),
    "wrong type": ({"sft": {"steps": "many"}}, ConfigError, "sft.steps"),
    "out of range": ({"sft": {"steps": 0}}, ConfigError, "sft.steps must be at least 1, got 0"),
    "a section as a number": ({"sft": 3}, ConfigError, "sft is a section"),
    "not applicable": ({"data": {"format": "plain", "system": "x"}}, ConfigError, "data.system does not apply"),
    "a number for rows": ({"train": 3}, DataError, "data.train: expected rows"),
    "numbers for rows": ({"train": [1, 2]}, DataError, "row 0 is a int"),
    "all splits": ({"train": {"train": ROWS, "test": ROWS}}, DataError, "Choose one of its splits"),
    "names and rows": ({"train": ["a.jsonl", ROWS[0]]}, DataError, "row 0 is a str"),
    "a set in a row": ({"train": [{"question": {1, 2}}]}, DataError, "row 0, question"),
    "infinity in a row": ({"test": [{"question": "q", "answer": float("inf")}]}, DataError, "data.test: row 0, answer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_writes_nothing_that_counts(name: str, tmp_path: Path) -> None:
    given, kind, text = WRONG[name]
    with pytest.raises(kind) as caught:
        Run(tmp_path / "run", **given)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_values_of_a_row() -> None:
    row = {"a": np.int64(3), "b": np.arange(2), "c": float("nan"), "d": (1, "x"), 5: True, "e": np.float32(0.5)}
    assert plain(row, "row 0") == {"a": 3, "b": [0, 1], "c": None, "d": [1, "x"], "5": True, "e": 0.5}


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    for act in (Run.open, lambda folder: Run(folder).evaluate(), lambda folder: Run(folder).model()):
        with pytest.raises(ConfigError, match="holds no trained student"):
            act(tmp_path / "none")


def test_the_trained_student_goes_into_a_step_of_ones_own(trained: Run) -> None:
    import optax

    from cotgrpo import TrainState, jit_step, make_sft_step

    model = trained.model()
    example = model.template.encode(TRIPLES[0])
    tokens = np.asarray(example.tokens, np.int32)[None]
    batch = SftBatch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=np.arange(tokens.shape[1] - 1, dtype=np.int32)[None],
        segment_ids=np.ones_like(tokens[:, 1:]),
        loss_mask=np.ones(tokens[:, 1:].shape, np.float32),
    )
    tx = optax.sgd(1e-2)
    step = jit_step(make_sft_step(model.student, tx))
    state, metrics = step(TrainState.create(params=model.params, tx=tx, key=0), batch)
    assert np.isfinite(metrics["loss"].mean()) and int(state.step) == 1
