"""What a stage measures and reports: the cache of measurements, the clock, and `report.json` with its page."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from cotgrpo.atomic_files import find_json_object, write_json
from cotgrpo.config import Cached, Config, SelfReply, TeacherForced, VerifiedReward
from cotgrpo.data.rows import DropReport
from cotgrpo.distributed.processes import is_process_0, on_process_0
from cotgrpo.evaluation.accuracy import draws_of, draws_text
from cotgrpo.evaluation.held_out import HeldOut, set_figures
from cotgrpo.identity.fingerprints import versions
from cotgrpo.reports.report import ReportError, Shape, check, read_report, write_report
from cotgrpo.terminal import say
from cotgrpo.training.inputs import StageInputs
from cotgrpo.training.mesh import run_mesh, run_options
from cotgrpo.training.steps import StageName, stage_title
from cotgrpo.types import Params

SAMPLES_SHOWN = 12
MADE_OF_ROWS = ("training sequences", "held-out questions", "held-out replies")
"""Reports on what is made of rows that other reports count."""
MEASUREMENT: Shape = {
    "accuracy": {"value": float, "n": int, "low": float, "high": float},
    "loss_rows": int,
    "replies": [{"question": str, "gold": str, "text": str, "correct": bool}],
}
"""What `before.json` and `after.json` hold, besides `loss`, a number or null."""
GROUP_RELATIVE = (
    "The objective of this run was group_relative: Group Relative Policy Optimization, which the field calls GRPO. "
    "It has no ghost, and learns from whether whole replies are right."
)


class Timer:
    """Wall-clock seconds of a stage, those of training apart."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.training_seconds = 0.0

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Count the time in this block as training."""
        started = time.perf_counter()
        yield
        self.training_seconds += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far. Everything but training counts as evaluation."""
        total = time.perf_counter() - self.started
        return {"training": self.training_seconds, "evaluation": total - self.training_seconds, "total": total}


@dataclasses.dataclass(frozen=True)
class MeasurementCache:
    """Held-out measurements, kept in the stage's folder as `before.json` and `after.json`.

    A resumed run does not measure again, unless the held-out rows are others now. GRPO does not repeat what the SFT
    stage that it starts from has measured on the same rows.

    Attributes:
        folder: of the stage.
        held_out: measures a student.
        sft_folder: the folder of the SFT stage that the student comes from, or None.
        begun: whether the stage has a checkpoint, so that the student before it is not at hand.
        requantized: whether the student is not the one that SFT measured: its frozen kernels are quantized now and were
            not then, or the other way around.
    """

    folder: Path
    held_out: HeldOut
    sft_folder: Path | None
    begun: bool = False
    requantized: bool = False

    def measure(self, name: str, params: Callable[[], Params], when: str) -> dict[str, Any] | None:
        """Return the measurement in the file `name`. If there is none, measure `params()` and write it.

        Return None for the student before a stage that has begun, if it was measured on other rows.
        """
        path = self.folder / name
        written = on_process_0(lambda: find_measurement(path))
        same = written is not None and self.same_rows(written)
        if written is not None and not self.held_out.is_whole(written):  # other settings of eval now
            same = same and name == "before.json" and self.begun
        known = written if same else on_process_0(lambda: self.find_of_sft(name))
        if known is None and written is not None and name == "before.json" and self.begun:
            say(self.held_out.console, f"{path} was measured on other held-out rows: the report leaves it out")
            return None
        if known is None:
            questions = len(self.held_out.exact_match.questions)
            say(self.held_out.console, f"{when}: {questions} greedy replies (compiled at the first use)")
            known = self.held_out.measure(params(), when)
        if is_process_0() and not same:
            write_json(path, known)
        return dict(known)

    def find_of_sft(self, name: str) -> dict[str, Any] | None:
        """Return what the SFT stage has measured after its end, which is before this stage."""
        return self.of_sft("after.json") if name == "before.json" and not self.requantized else None

    def of_sft(self, name: str) -> dict[str, Any] | None:
        """Return a measurement of the SFT stage, if it was made on the same rows."""
        found = None if self.sft_folder is None else find_measurement(self.sft_folder / name)
        return found if found is not None and self.same_rows(found) and self.held_out.is_whole(found) else None

    def same_rows(self, found: dict[str, Any]) -> bool:
        """Return whether a measurement was made on the held-out rows of now."""
        rows = [[question.question, question.gold] for question in self.held_out.exact_match.questions]
        measured = [[reply["question"], reply["gold"]] for reply in found["replies"]]
        same_verifier = found.get("verify", {}) == self.held_out.verify
        return measured == rows and found["loss_rows"] == self.held_out.num_references and same_verifier


def find_measurement(path: Path) -> dict[str, Any] | None:
    """Return the measurement in a file; None if it is missing, cut off or anything else, so that it is made again."""
    found = find_json_object(path)
    try:
        check(found, MEASUREMENT, "")
    except ReportError:
        return None
    return found if found is not None and isinstance(found.get("loss", ""), float | int | None) else None


def print_reports(inputs: StageInputs, console: Console) -> None:
    """Print what was read, and what was left out."""
    for line in report_lines(inputs.reports):
        say(console, line)


def report_lines(reports: Mapping[str, DropReport]) -> list[str]:
    """Return what was left out of the rows and why, and in one line the rows of which all were kept.

    What is made of the rows, such as sequences, is named only if some are left out.
    """
    lines, whole = [], list[str]()
    for title, report in reports.items():
        if report.dropped or report.noted:
            lines.append(f"{title}: {report}")
        elif not whole:
            whole.append(f"{title}: {report}")
        elif not (title in MADE_OF_ROWS or title.endswith(", questions")):
            whole.append(f"{title}: all {report.read}")
    return [*lines, "; ".join(whole)] if whole else lines


def announce(stage: StageName, config: Config, inputs: StageInputs, console: Console) -> None:
    """Print what a stage will do: its steps, and the rows and tokens that they are on."""
    settings, ghosts = getattr(config, stage), config.grpo.ghosts
    replies = stage == "grpo" and not isinstance(ghosts, TeacherForced | SelfReply | Cached)
    what = "replies of the student" if replies else f"rows of {config.data.seq_len} tokens"
    line = f"{stage_title(stage, config)}: {settings.steps:,} steps of {settings.batch_size} {what}"
    if inputs.train and not replies:
        tokens = sum(len(example.tokens) for example in inputs.train)
        passes = settings.steps * settings.batch_size * config.data.seq_len / tokens
        if not config.data.packing:
            passes = settings.steps * settings.batch_size / len(inputs.train)
        line += f"\n  about {passes:.3g} passes over {len(inputs.train):,} sequences, which are {tokens:,} tokens"
    say(console, line)


def write_stage_report(
    stage: StageName,
    config: Config,
    inputs: StageInputs,
    measured: dict[str, dict[str, Any]],
    wall: dict[str, float],
    console: Console,
) -> dict[str, Any]:
    """Write `report.json` and `report.html` of a stage. Return what the first holds.

    Args:
        stage: "sft" or "grpo".
        config: of the run.
        inputs: its rows.
        measured: held-out measurements of the student at each point, in order: "base", "sft", "grpo".
        wall: seconds, from `Timer.seconds`.
        console: where the page's path is printed.
    """
    folder = Path(config.run_dir) / stage
    report = stage_report(stage, config, inputs, measured, wall)
    page = write_report(folder, report)
    write_json(folder / "report.json", report)  # last: a stage that has it is complete
    say(console, f"report: {page}")
    return report


def write_live_report(
    stage: StageName,
    config: Config,
    inputs: StageInputs,
    measured: dict[str, dict[str, Any]],
    wall: dict[str, float],
    step: int,
) -> None:
    """Write `report.html` of a stage that is not finished, after `step`. See `write_stage_report`."""
    report = stage_report(stage, config, inputs, measured, wall)
    done = f"This run is not finished: the page shows it up to step {step} of {getattr(config, stage).steps}."
    report |= {"title": f"{report['title']} (not finished)", "stage": stage, "notes": [done, *report["notes"]]}
    write_report(Path(config.run_dir) / stage, report)


def stage_report(
    stage: StageName,
    config: Config,
    inputs: StageInputs,
    measured: dict[str, dict[str, Any]],
    wall: dict[str, float],
) -> dict[str, Any]:
    """Return what `report.json` holds. Arguments are those of `write_stage_report`."""
    saved = Path(config.run_dir) / stage / "config.yaml"
    report: dict[str, Any] = {
        "title": f"cotgrpo {stage}",
        "command": f"cotgrpo {stage} --config {shlex.quote(str(saved))}",
        "accuracy": {name: m["accuracy"] for name, m in measured.items()},
        "held_out_loss": {name: m["loss"] for name, m in measured.items() if m["loss"] is not None},
        "held_out_split": inputs.split_text,
        "held_out_rows": {"accuracy": len(inputs.test_questions), "loss": len(inputs.test)},
        "wall_seconds": wall,
        "evaluations": [row for name, m in measured.items() for row in evaluation_rows(name, m)],
        "samples": merge_samples({name: m["replies"] for name, m in measured.items()}),
        "data": {title: r.to_dict() for title, r in inputs.reports.items()},
        "config": saved.read_text(encoding="utf-8"),
        "versions": versions() | machine() | options_row(config),
    }
    report["notes"] = [sentence(inputs.split_text)]
    settings = getattr(config, stage)
    if settings.epochs is not None:
        report["notes"].append(f"{settings.epochs:g} epochs of the training rows are {settings.steps:,} steps.")
    if stage == "grpo" and isinstance(config.grpo.ghosts, VerifiedReward):
        report["notes"] = [GROUP_RELATIVE, *report["notes"]]
    return report


def evaluation_rows(moment: str, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each test set at one point, if more was measured than the accuracy on held-out rows."""
    sets = {"held-out": measured} | measured.get("sets", {})
    if len(sets) == 1 and "sampled" not in measured:
        return []
    return [
        {"moment": moment, "set": name, "n": found["accuracy"]["n"], "figures": set_figures(found)}
        | ({"draws": draws_text(draws_of(found["sampled"]))} if "sampled" in found else {})
        for name, found in sets.items()
    ]


def add_evaluation(folder: Path, moment: str, measured: dict[str, Any]) -> None:
    """Add further test sets and drawn replies of a later measurement to the report of a finished stage, if it has one.

    They replace those of an earlier measurement at the same moment.
    """
    rows = evaluation_rows(moment, measured)
    try:
        report = read_report(folder / "report.json") if rows else None
    except ReportError:
        return
    if report is not None:
        report["evaluations"] = [row for row in report.get("evaluations", []) if row["moment"] != moment] + rows
        write_report(folder, report)
        write_json(folder / "report.json", report)


def merge_samples(replies: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the same questions with the student's reply at each point.

    Up to two thirds are questions whose replies changed. Changes between stages of training come first, then the other
    rows.
    """
    rows = []
    for answers in zip(*replies.values(), strict=True):
        by_name = {n: {"text": a["text"], "correct": a["correct"]} for n, a in zip(replies, answers, strict=True)}
        rows.append({"question": answers[0]["question"], "gold": answers[0]["gold"], "replies": by_name})
    trained = [name for name in replies if name != "base"]  # an untrained student is rarely right
    differ = lambda row, names: len({row["replies"][name]["correct"] for name in names}) > 1
    changed = sorted((r for r in rows if differ(r, replies)), key=lambda r: not differ(r, trained))
    same = [r for r in rows if r not in changed]
    first = changed[: SAMPLES_SHOWN * 2 // 3]
    return first + same[: SAMPLES_SHOWN - len(first)]


def sentence(text: str) -> str:
    """Return a line of the terminal as a sentence of the report."""
    return f"{text[:1].upper()}{text[1:]}."


def options_row(config: Config) -> dict[str, str]:
    """Return XLA's options of the train step as a row of the report, if a run prints them."""
    line = run_options(config, run_mesh(config))
    return {"XLA's options": line} if line else {}


def machine() -> dict[str, str]:
    """Return the version of Python, and the device."""
    return {
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
