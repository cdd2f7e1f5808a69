"""Several runs in one page: the settings that differ, the accuracies, and the curves over each other.

A run may be unfinished, of other stages, or damaged. The page says which part of it is missing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cotgrpo.atomic_files import find_json_object, write_text
from cotgrpo.checkpoints.stops import stop_text
from cotgrpo.config import ConfigError, flat
from cotgrpo.config.files import read_mapping
from cotgrpo.disk_errors import explain_disk_errors
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.reports.charts import Curve, curve_chart, interval_chart, stage_label
from cotgrpo.reports.page import LEGENDS, METRICS, environment, in_order, points
from cotgrpo.reports.report import STAGE_FOLDERS, ReportError, Shape, check, read_report

COLOURS = ("sft", "grpo", "on_policy", "other", "base")
"""Colours of the runs, in turn. After the last they begin again, with dashed lines."""
VALUES_SHOWN = 4
"""Curves of a chart whose last values fit into its legend."""
LEAVES = ("data.columns", "grpo.objective.options")
ANSWERS_SHOWN = 8
REPLIES: Shape = {"replies": [{"question": str, "gold": str, "text": str, "correct": bool}]}
MEASURED: Shape = {"accuracy": {"value": float, "n": int, "low": float, "high": float}}


@dataclasses.dataclass(frozen=True)
class StageOfRun:
    """What the folder of a stage holds.

    Attributes:
        name: "sft" or "grpo".
        rows: of the log.
        settings: by dotted key; empty if they cannot be read.
        accuracy: the measurements that were made, by what they measure.
        finished: whether the stage has its report.
        problems: what is missing or damaged.
        replies: the newest measured replies, by question.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    accuracy: Mapping[str, Mapping[str, Any]]
    finished: bool
    problems: Sequence[str]
    replies: Mapping[str, Mapping[str, Any]]

    @property
    def step(self) -> int:
        """The newest step of the log."""
        return max((int(row["step"]) for row in self.rows), default=0)

    @property
    def status(self) -> str:
        """How far the stage is, in words."""
        total = self.settings.get(f"{self.name}.steps")
        of = f" of {total}" if isinstance(total, int) else ""
        return f"step {self.step}{of}, {'finished' if self.finished else 'not finished'}"


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """A run of the page.

    Attributes:
        letter: its short name in charts and tables.
        folder: as it was given.
        number: its place, from 0.
        stages: what it holds.
        problems: what is missing, of the whole run.
    """

    letter: str
    folder: str
    number: int
    stages: Sequence[StageOfRun]
    problems: Sequence[str]

    @property
    def style(self) -> str:
        """The CSS of its colour."""
        return f"--series: var(--{self.colour})"

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]

    @property
    def dashed(self) -> bool:
        return self.number // len(COLOURS) % 2 == 1

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its newest stage that can be read, with those of the other stages from their own."""
        found: dict[str, Any] = {}
        for stage in self.stages:
            others = tuple(f"{other}." for other in ("sft", "grpo") if other != stage.name)
            found |= {key: value for key, value in stage.settings.items() if not key.startswith((*others, "run_dir"))}
        return found

    @property
    def accuracy(self) -> dict[str, Mapping[str, Any]]:
        """All of its measurements."""
        return {name: row for stage in self.stages for name, row in stage.accuracy.items()}

    @property
    def replies(self) -> Mapping[str, Mapping[str, Any]]:
        """The replies of its newest stage that has any, by question."""
        return next((stage.replies for stage in reversed(self.stages) if stage.replies), {})


def compare_runs(folders: Sequence[str], out: Path) -> Path:
    """Write a page that compares runs.

    Args:
        folders: of runs, or of stages.
        out: the page.

    Returns:
        Its path.

    Raises:
        ConfigError: fewer than two runs, one that is not there, or nothing of any of them.
    """
    if len(folders) < 2:
        raise ConfigError("compare needs the folders of at least two runs: cotgrpo compare RUN RUN.")
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"{folder} is not a folder: expected that of a run, as run_dir names it.")
    runs = [read_run(folder, number) for number, folder in enumerate(folders)]
    if not any(run.stages for run in runs):
        raise ConfigError(
            f"Nothing of a run was found in {', '.join(folders)}: expected folders with sft or grpo in it."
        )
    if out.is_dir() or (out.exists() and out.read_bytes()[:9].lower() != b"<!doctype"):
        raise ConfigError(f"{out} exists and is not a page: choose another --out.")
    with explain_disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, render(runs))
    return out


def read_run(folder: str, number: int) -> ComparedRun:
    """Return what is there of a run. A stage's own folder is a run of that stage."""
    path = Path(folder)
    letter = chr(ord("A") + number) if number < 26 else f"R{number + 1}"
    places = {name: path / place for name, place in STAGE_FOLDERS.items() if (path / place).is_dir()}
    if not places and any((path / name).exists() for name in ("metrics.jsonl", "config.yaml", "report.json")):
        places = {path.resolve().name: path}
    problems = [] if places else ["nothing of a run is in it: neither sft nor grpo"]
    return ComparedRun(letter, folder, number, [read_stage(name, place) for name, place in places.items()], problems)


def read_stage(name: str, folder: Path) -> StageOfRun:
    """Return what is there of a stage."""
    problems: list[str] = []
    settings: dict[str, Any] = {}
    try:
        settings = dict(flat(read_mapping(folder / "config.yaml"), leaves=LEAVES))
    except ConfigError as error:
        problems.append(f"settings: {error}")
    rows: list[dict[str, Any]] = []
    try:
        rows = sorted(read_metrics(folder), key=lambda row: int(row["step"]))
        if not rows:
            problems.append(f"curves: {folder / 'metrics.jsonl'} has no rows")
    except OSError as error:
        problems.append(f"curves: {folder / 'metrics.jsonl'} cannot be read ({error.strerror})")
    finished, reported = False, dict[str, Any]()
    if (folder / "report.json").exists():
        try:
            reported, finished = read_report(folder / "report.json"), True
        except ReportError as error:
            problems.append(f"report: {error}")
    accuracy = measurements(name, folder)
    if not accuracy and reported:
        accuracy = {f"{stage_label(moment)} in the report": row for moment, row in reported["accuracy"].items()}
    if not accuracy:
        problems.append("accuracy: nothing was measured yet, or the measurements cannot be read")
    if (stopped := stop_text(folder)) is not None:
        problems.append(stopped)
    return StageOfRun(name, rows, settings, accuracy, finished, problems, newest_replies(folder))


def measurements(stage: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the accuracies that a stage's folder holds."""
    found = {}
    for file, what in (("before.json", "before"), ("after.json", "after"), ("eval.json", "eval of")):
        values = find_json_object(folder / file)
        try:
            check(values, MEASURED, "")
        except ReportError:
            continue
        assert values is not None
        found[f"{what} {stage_label(stage)}"] = values["accuracy"]
    return found


def newest_replies(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the newest replies that a stage's folder holds, by question."""
    for file in ("eval.json", "after.json", "before.json"):
        values = find_json_object(folder / file)
        try:
            check(values, REPLIES, "")
        except ReportError:
            continue
        assert values is not None
        return {reply["question"]: reply for reply in values["replies"]}
    return {}


def differing_answers(runs: Sequence[ComparedRun]) -> list[tuple[Mapping[str, Any], list[Mapping[str, Any] | None]]]:
    """Return questions that several runs were asked, each with a reply of every run, None if it was not asked.

    Questions that not all of them answer right, or wrong, come first, and those with equal replies are left out.
    """
    asked = [run.replies for run in runs if run.replies]
    if len(asked) < 2:
        return []
    several = [q for q in dict.fromkeys(q for replies in asked for q in replies) if sum(q in r for r in asked) > 1]
    count = lambda question, key: len({replies[question][key] for replies in asked if question in replies})
    found = [question for question in several if count(question, "text") > 1]
    found.sort(key=lambda question: -count(question, "correct"))
    rows = [[run.replies.get(question) for run in runs] for question in found[:ANSWERS_SHOWN]]
    return [(next(reply for reply in row if reply is not None), row) for row in rows]


def render(runs: Sequence[ComparedRun]) -> str:
    """Return the page as HTML text."""
    moments = list(dict.fromkeys(name for run in runs for name in run.accuracy))
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            runs=runs,
            differing=list(differing_settings(runs)),
            moments=moments,
            accuracy_chart=accuracy_chart(runs),
            answers=differing_answers(runs),
            stages=[(stage, list(stage_charts(stage, runs))) for stage in stages_of(runs)],
        )
    )


def stages_of(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the stages of all runs, in the order of training."""
    return in_order(dict.fromkeys(stage.name for run in runs for stage in run.stages))


def differing_settings(runs: Sequence[ComparedRun]) -> Iterator[tuple[str, list[str]]]:
    """Yield each setting that differs between runs, with its value in each; "" if it is missing.

    Runs without any setting of its section, as those of another stage, do not count.
    """
    known = [run.settings for run in runs]
    for key in dict.fromkeys(key for settings in known for key in settings):
        values = [json.dumps(s[key], ensure_ascii=False, default=str) if key in s else "" for s in known]
        section = key.partition(".")[0]
        sections = [{name.partition(".")[0] for name in settings} for settings in known]
        if len({value for value, there in zip(values, sections, strict=True) if section in there}) > 1:
            yield key, values


def accuracy_chart(runs: Sequence[ComparedRun]) -> Markup:
    """Draw the newest accuracy of each run."""
    rows = []
    for run in runs:
        moment, row = next(reversed(run.accuracy.items()), ("", None))
        rows.append((run.colour, f"{run.letter} {moment}".strip(), row))
    return interval_chart("Newest accuracy", rows)


def stage_charts(stage: str, runs: Sequence[ComparedRun]) -> Iterator[tuple[str, str, Markup]]:
    """Yield title, unit and chart of each metric that a run has logged in a stage."""
    for metric in METRICS:
        for key in metric.keys:
            curves = [
                Curve(stage, run.letter, found, second=run.dashed, colour=run.colour)
                for run in runs
                for own in run.stages
                if own.name == stage and (found := points(own.rows, key))
            ]
            few = len(curves) <= VALUES_SHOWN
            if curves:
                kind = f", {LEGENDS[key]}" if key in LEGENDS else ""
                chart = curve_chart(metric.title, curves, percent=metric.percent, log=metric.log, last_values=few)
                yield f"{metric.title}{kind}", metric.unit, chart
