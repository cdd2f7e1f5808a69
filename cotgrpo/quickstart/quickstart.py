"""Run the whole method on a synthetic task, on a CPU in minutes: a procedural teacher, SFT, GRPO, a report.

GRPO is GhostRespond Policy Optimization, not Group Relative. The student has to write out sums digit by digit, with
their carries. No sum of the test occurs in training.

The teacher's text is scarce, and SFT learns from it what it can. GRPO continues from there twice, with the same number
of updates. The first run uses the same text (teacher-forced). The second uses the student's own replies to further
questions, with a live teacher that supplies the ghost token at each prefix (on-policy). No text exists for these
questions.

The task is in English or in Chinese, with the same sums. The Chinese student is a chat student, and writes its answer
as `答案是118。`.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cotgrpo.atomic_files import read_json, whole_file, write_json, write_text
from cotgrpo.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    GrpoConfig,
    OptimizerConfig,
    StageConfig,
    StudentConfig,
    TeacherModel,
    TokenizerConfig,
)
from cotgrpo.data.triples import Triple
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.logs.completions import read_completions
from cotgrpo.reports.charts import interval_chart, standalone
from cotgrpo.reports.reply_chart import reply_chart
from cotgrpo.reports.report import COMPLETIONS_READ, is_completion, write_report
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.teachers.procedural_words import LanguageName
from cotgrpo.terminal import say
from cotgrpo.training import run_grpo, run_sft
from cotgrpo.training.reporting import merge_samples

KINDS = ("column_addition",)
TRAIN_ROWS = {"en": 250, "zh": 200}
"""Triples of each language, so few that SFT leaves room to improve. The Chinese text names places and carries."""
QUESTIONS, TEST_ROWS = 4_000, 500
TEACHER = Path(__file__).with_name("live_teacher")
"""The live teacher's folder, made by `cotgrpo.quickstart.make_live_teacher`."""
TEACHERS = {"en": TEACHER, "zh": Path(__file__).with_name("live_teacher_zh")}
"""The live teacher of each language."""
REPLIES_OF_A_ROW = 2
"""Average number of replies in a packed row. With it, on-policy and teacher-forced updates supervise as many tokens."""

QUICKSTART = Config(
    run_dir="quickstart_run",
    student=StudentConfig(
        width=96,
        num_layers=2,
        num_heads=6,
        num_kv_heads=3,
        head_dim=16,
        mlp_width=256,
        rope_theta=1_000.0,
        init_scale=0.06,
    ),
    tokenizer=TokenizerConfig(path=str(TEACHER)),  # ghost tokens are ids, so both need the same tokens
    data=DataConfig(seq_len=160, loss_on="completion"),
    sft=StageConfig(
        steps=2_000, batch_size=8, eval_every=500, optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20)
    ),
    grpo=GrpoConfig(
        steps=300, batch_size=8, eval_every=100, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20)
    ),
    eval=EvalConfig(rows=TEST_ROWS, batch_size=250, max_new_tokens=72),
    checkpoint=CheckpointConfig(every=150, keep=2),
)
"""The quick start's settings. Each of them is also an option of the command."""

QUICKSTARTS = {
    "en": QUICKSTART,
    # A reply of sentences has more tokens.
    "zh": dataclasses.replace(
        QUICKSTART,
        tokenizer=TokenizerConfig(path=str(TEACHERS["zh"])),
        data=DataConfig(seq_len=208, loss_on="completion", format="chat", answer_format="答案是{answer}。"),
        eval=dataclasses.replace(QUICKSTART.eval, max_new_tokens=96),
    ),
}
"""The settings in each language."""

STAGES = {
    "base": "untrained",
    "sft": "after SFT",
    "grpo": "after GRPO, teacher-forced",
    "on_policy": "after GRPO, on-policy",
}


def run_quickstart(
    config: Config | None = None, console: Console | None = None, language: LanguageName = "en"
) -> dict[str, Any]:
    """Run teacher, SFT, GRPO and a report of all in `config.run_dir`. Resume if run again. Return `report.json`.

    The teacher writes `train.jsonl`, `questions.jsonl` and `test.jsonl` there, from `config.seed`. If
    `config.data.train` names other rows, the on-policy stage is left out, since the live teacher knows only its task.

    Args:
        config: the settings; None: those of `QUICKSTARTS` in this language.
        console: where the lines are printed.
        language: "en" or "zh", the language of the teacher's text.
    """
    config = config or QUICKSTARTS[language]
    seed = config.seed
    console = console or Console()
    folder = Path(config.run_dir)
    started = time.perf_counter()
    own_rows = bool(config.data.train)
    if not own_rows:
        on_process_0(lambda: teach(folder, seed, language))
        rows = f"{TRAIN_ROWS[language]} triples, {QUESTIONS:,} questions and {TEST_ROWS} held-out rows"
        say(console, f"teacher: {rows} in {folder}")
        data = dataclasses.replace(config.data, train=[str(folder / "train.jsonl")], test=[str(folder / "test.jsonl")])
        config = dataclasses.replace(config, data=data)
    elif config.tokenizer == QUICKSTARTS[language].tokenizer:  # it knows sums only
        config = dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=400))
    stages = {"teacher": time.perf_counter() - started}
    reports = {"sft": run_sft(config, console), "grpo": run_grpo(config, console)}
    if not own_rows:
        reports["on_policy"] = run_grpo(on_policy(config, language), console)
    report = combined(config, reports, stages, language)
    page = on_process_0(lambda: str(write_combined(folder, report)))
    say(console, "accuracy on held-out questions:")
    for name, row in report["accuracy"].items():
        interval = f"(95 % interval {row['low']:.1%} to {row['high']:.1%})"
        say(console, f"{STAGES[name]:26} {row['value']:6.1%} of {row['n']} {interval}")
    say(console, f"{report['wall_seconds']['total']:.0f} s in all; open {page}")
    return report


def on_policy(config: Config, language: LanguageName = "en") -> Config:
    """Return the settings of the on-policy stage.

    It starts from the same student as the teacher-forced one, and learns from its own replies to other questions.
    """
    folder, grpo = Path(config.run_dir), config.grpo
    ghosts = TeacherModel(
        teacher=str(TEACHERS[language]),
        prompts=(str(folder / "questions.jsonl"),),
        max_new_tokens=config.eval.max_new_tokens,
    )
    grpo = dataclasses.replace(
        grpo, init_from=str(folder / "sft"), ghosts=ghosts, batch_size=REPLIES_OF_A_ROW * grpo.batch_size
    )
    return dataclasses.replace(config, run_dir=str(folder / "on_policy"), grpo=grpo)


def write_combined(folder: Path, report: dict[str, Any]) -> Path:
    """Write `report.json`, its page, the chart of the accuracies and a picture of a reply. Return the page's path."""
    logged = read_completions(folder / "on_policy" / "grpo", COMPLETIONS_READ)
    if replies := [row for row in logged if is_completion(row) and row["ghosts"] is not None]:
        most = max(replies, key=lambda row: sum(ghost is not None for ghost in row["ghosts"]))
        write_text(folder / "reply.svg", standalone(reply_chart(most)))
    rows = [(name, STAGES[name], row) for name, row in report["accuracy"].items()]
    write_text(folder / "accuracy.svg", standalone(interval_chart("Held-out accuracy", rows)))
    page = write_report(folder, report)
    write_json(folder / "report.json", report)
    return page


def teach(folder: Path, seed: int, language: LanguageName = "en") -> None:
    """Write the teacher's triples and further questions, unless they exist. Neither has sums of the test."""
    count = TRAIN_ROWS[language]
    rows = ProceduralTeacher(seed, KINDS, language=language).draw(count + QUESTIONS)
    # The questions have no rationale. Their answers only grade the student's replies, for the log.
    asked = [dataclasses.replace(row, rationale="") for row in rows[count:]]
    test = ProceduralTeacher(seed, KINDS, held_out=True, language=language).draw(TEST_ROWS)
    write_rows(folder / "test.jsonl", test)
    write_rows(folder / "questions.jsonl", asked)
    write_rows(folder / "train.jsonl", rows[:count])


def write_rows(path: Path, rows: Sequence[Triple]) -> None:
    """Write the rows atomically, unless the file exists."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            write_triples(temporary, rows)


def combined(
    config: Config, reports: dict[str, dict[str, Any]], wall: dict[str, float], language: LanguageName = "en"
) -> dict[str, Any]:
    """Merge the reports of all stages. `wall` holds the seconds before them."""
    for name, label in (("sft", "SFT"), ("grpo", "GRPO"), ("on_policy", "on-policy GRPO")):
        if name in reports:
            wall[f"{label} training"] = reports[name]["wall_seconds"]["training"]
            wall[f"{label} evaluation"] = reports[name]["wall_seconds"]["evaluation"]
    wall["total"] = sum(wall.values())
    notes = [
        "Teacher-forced GRPO continues from the SFT student with the same text, so part of its gain comes from more "
        "training steps."
    ]
    found = reports["grpo"]
    accuracy, losses, data = dict(found["accuracy"]), dict(found["held_out_loss"]), dict(found["data"])
    if "on_policy" in reports:
        own = reports["on_policy"]
        accuracy["on_policy"], losses["on_policy"] = own["accuracy"]["grpo"], own["held_out_loss"]["grpo"]
        data |= own["data"]
        gain = 100 * (accuracy["on_policy"]["value"] - accuracy["grpo"]["value"])
        notes.append(
            "On-policy GRPO starts from the SFT student too, and makes as many updates: its held-out accuracy differs "
            f"by {gain:+.1f} points from that of teacher-forced. The student replies to "
            f"{data['prompts']['kept']:,} questions that it has no text for, and a live teacher supplies the ghost "
            "token at each prefix of its replies."
        )
    option = "" if language == "en" else f"--language {language} "
    return found | {
        "title": "cotgrpo quickstart",
        "command": f"cotgrpo quickstart {option}--out {shlex.quote(config.run_dir)} --seed {config.seed}",
        "accuracy": accuracy,
        "held_out_loss": losses,
        "data": data,
        "samples": samples(Path(config.run_dir), accuracy),
        "wall_seconds": wall,
        "notes": notes,
    }


def samples(folder: Path, measured: Iterable[str]) -> list[dict[str, Any]]:
    """Return replies of the student at each point, to the same questions."""
    files = {
        "base": "sft/before.json",
        "sft": "sft/after.json",
        "grpo": "grpo/after.json",
        "on_policy": "on_policy/grpo/after.json",
    }
    return merge_samples({name: read_json(folder / files[name])["replies"] for name in measured})
