"""Trackers get every row once and in order, whatever fails, and never hold the run up."""

from __future__ import annotations

import importlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from cotgrpo.data.own.loading import OwnCodeError
from cotgrpo.logs import trackers
from cotgrpo.logs.tracker_kinds import KINDS
from cotgrpo.logs.trackers import TrackedRun, Tracker, TrackerFeed, make_tracker

ROWS = [
    {"step": step, f"{kind}/loss": step / 10, "note": None}
    for step, kinds in ((2, ["train"]), (4, ["train", "eval"]), (6, ["train", "eval"]))
    for kind in kinds
]


class Recorder(Tracker):
    """Keeps what it gets. `fail_at` are the calls of `log`, from 1, that fail."""

    def __init__(self, fail_at: tuple[int, ...] = (), fails_to_start: bool = False) -> None:
        self.fail_at, self.fails_to_start, self.calls = fail_at, fails_to_start, 0
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ids: list[str] = []
        self.files: list[Path] = []
        self.closed = 0

    def start(self, run: TrackedRun) -> str:
        self.ids.append(run.id)
        if self.fails_to_start:
            raise ConnectionError("refused")
        return run.id or "the id"

    def log(self, step: int, row: dict[str, float]) -> None:
        self.calls += 1
        if self.calls in self.fail_at:
            raise ConnectionError("lost\nthe server")
        self.rows.append((step, row))

    def log_file(self, path: Path) -> None:
        self.files.append(path)

    def close(self) -> None:
        self.closed += 1


WANTED = [(row["step"], {k: v for k, v in row.items() if k.endswith("loss")}) for row in ROWS]


def feed(tracker: Tracker, folder: Path, rows: list[dict[str, Any]], known: int = 0) -> list[str]:
    """Send rows, the first `known` of which are in the log already. Return what was printed."""
    said: list[str] = []
    fed = TrackerFeed("own:tracker", tracker, TrackedRun("p", "n", folder), rows[:known], said.append)
    for row in rows[known:]:
        fed.put(row["step"], row)
    fed.put_file(folder / "report.html")
    fed.close()
    return said


def test_every_row_arrives_once_in_order(tmp_path: Path) -> None:
    tracker = Recorder()
    assert feed(tracker, tmp_path, ROWS) == []
    assert tracker.rows == WANTED and tracker.ids == [""] and tracker.closed == 1
    assert tracker.files == [tmp_path / "report.html"]
    kept = json.loads((tmp_path / "trackers" / "own_tracker.json").read_text())
    assert kept == {"id": "the id", "step": 6, "rows_of_step": 2}


@pytest.mark.parametrize("stopped_after", range(len(ROWS) + 1))
@pytest.mark.parametrize("resumed_after", [0, 2, 4, 6])
def test_a_resumed_run_goes_on_with_the_same_id(tmp_path: Path, stopped_after: int, resumed_after: int) -> None:
    """The log keeps the rows up to the checkpoint, and the run writes the later ones again."""
    first, second = Recorder(), Recorder()
    feed(first, tmp_path, ROWS[:stopped_after])
    known = sum(row["step"] <= resumed_after for row in ROWS[:stopped_after])
    feed(second, tmp_path, ROWS, known)
    assert second.ids == ["the id"] and first.rows + second.rows == WANTED


def test_what_failed_is_sent_again_and_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.001)
    tracker = Recorder(fail_at=(2, 3, 5))
    said = feed(tracker, tmp_path, ROWS)
    said += feed(tracker, tmp_path, ROWS, len(ROWS))  # if the end came before the last attempt
    assert tracker.rows == WANTED
    assert 1 <= sum("failed (ConnectionError: lost the server) at" in text for text in said) <= 3, said
    assert all("\n" not in text for text in said)


@pytest.mark.parametrize("tracker", [Recorder(fails_to_start=True), Recorder(fail_at=tuple(range(99)))])
def test_one_that_is_down_lacks_rows_and_a_later_run_sends_them(tmp_path: Path, tracker: Recorder) -> None:
    said = feed(tracker, tmp_path, ROWS)
    assert "the tracker own:tracker failed (ConnectionError" in said[0] and "metrics.jsonl has every row" in said[0]
    assert said[-1].startswith(f"warning: the tracker own:tracker lacks {len(ROWS)} rows") and len(said) == 2
    again = Recorder()
    assert feed(again, tmp_path, ROWS, len(ROWS)) == [] and again.rows == WANTED


def test_one_that_never_answers_holds_nobody_up(tmp_path: Path) -> None:
    answer = threading.Event()

    class Silent(Tracker):
        def log(self, step: int, row: dict[str, float]) -> None:
            answer.wait(60)

    said: list[str] = []
    fed = TrackerFeed("silent", Silent(), TrackedRun("p", "n", tmp_path), [], said.append)
    for row in ROWS:
        fed.put(row["step"], row)
    fed.close(0.01)
    answer.set()
    fed.thread.join(60)
    assert [text for text in said if f"lacks {len(ROWS)} rows" in text]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"id": 3, "step": "x", "rows_of_step": null}'])
def test_a_damaged_note_of_what_it_has_is_a_new_start(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "own_tracker.json").write_bytes(damage)
    tracker = Recorder()
    feed(tracker, tmp_path, ROWS)
    assert tracker.rows == WANTED and tracker.ids == [""]


class OnlyLog:
    def __init__(self) -> None:
        self.rows: list[int] = []

    def log(self, step: int, row: dict[str, float]) -> None:
        self.rows.append(step)


class Raises:
    def __init__(self) -> None:
        raise ValueError("no")


class WrongLog:
    def log(self, row: dict[str, float]) -> None: ...


def test_an_object_with_log_alone_is_a_tracker(tmp_path: Path) -> None:
    inner = OnlyLog()
    _, tracker = make_tracker(inner)
    assert feed(tracker, tmp_path, ROWS) == [] and inner.rows == [row["step"] for row in ROWS]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (object(), r"must be a tracker, with a method log\(step, row\), got a object"),
        (WrongLog, r"WrongLog.log must take \(step, row\), got a function of \(row\)"),
        (Raises, r"Raises\(\) failed \(ValueError: no\) at .*test_trackers.py:\d+"),
        ("no_such_module_of_a_test:T", "cannot be loaded"),
    ],
)
def test_what_is_no_tracker_is_an_error(given: object, message: str) -> None:
    with pytest.raises(OwnCodeError, match=f"^trackers: .*{message}") as found:
        make_tracker(given)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_package_is_a_line_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(
        OwnCodeError, match=rf"^trackers: {name} needs the package {name}: pip install 'cotgrpo\[{name}\]'"
    ):
        make_tracker(name, offline=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", KINDS)
def test_the_packages_themselves_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name)
    run = TrackedRun("sums", "a-run", tmp_path, {"sft": {"steps": 6}, "seed": 0}, offline=True)
    (tmp_path / "report.html").write_text("<!doctype html>", encoding="utf-8")
    said: list[str] = []
    ids = []
    for count in (3, len(ROWS)):  # the second time it is resumed
        fed = TrackerFeed(name, make_tracker(name, offline=True)[1], run, ROWS[:count], said.append)
        fed.put_file(tmp_path / "report.html")
        fed.close(120)
        ids.append(json.loads(fed.path.read_text())["id"])
    assert said == [] and ids[0] == ids[1]
    if name == "mlflow":
        client = importlib.import_module("mlflow").MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
        found = [(m.step, m.value) for m in client.get_metric_history(ids[0], "train/loss")]
        assert found == [(row["step"], row["train/loss"]) for row in ROWS if "train/loss" in row]
        assert client.get_run(ids[0]).data.params["sft.steps"] == "6"
