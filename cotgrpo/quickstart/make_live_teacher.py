"""Make the quick start's live teacher: a small model that has learned the whole task.

GRPO is not Group Relative here. The model in the package (`TEACHER`) was made in some minutes on a CPU by

    python -m cotgrpo.quickstart.make_live_teacher --work runs/live_teacher --out FOLDER

and the Chinese one with `--language zh` and `--work runs/live_teacher_zh`.

It has never seen a sum of the quick start's test. The procedural teacher keeps those apart for every seed.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from cotgrpo.config import Config, OptimizerConfig, StageConfig, TokenizerConfig
from cotgrpo.quickstart.quickstart import KINDS, QUICKSTARTS, write_rows
from cotgrpo.teachers.procedural import ProceduralTeacher
from cotgrpo.teachers.procedural_words import WORDS, LanguageName
from cotgrpo.training import run_export, run_sft

TRAIN_ROWS, TEST_ROWS, SEED = 20_000, 500, 1_000


def settings(work: Path, language: LanguageName = "en") -> Config:
    """Return the settings of its training: the quick start's student, on eighty times the rows."""
    quickstart = QUICKSTARTS[language]
    data = dataclasses.replace(quickstart.data, train=[str(work / "train.jsonl")], test=[str(work / "test.jsonl")])
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=40)
    return dataclasses.replace(
        quickstart,
        run_dir=str(work),
        seed=SEED,
        tokenizer=TokenizerConfig(vocab_size=400),
        data=data,
        sft=StageConfig(steps=1_200, batch_size=16, eval_every=400, optimizer=optimizer),
    )


def make_teacher(work: Path, out: Path, language: LanguageName = "en") -> None:
    """Train it in `work`, or resume there, and write it to `out`, new or empty, in bfloat16."""
    write_rows(work / "train.jsonl", ProceduralTeacher(SEED, KINDS, language=language).draw(TRAIN_ROWS))
    test = ProceduralTeacher(SEED, KINDS, held_out=True, language=language).draw(TEST_ROWS)
    write_rows(work / "test.jsonl", test)
    run_sft(settings(work, language))
    run_export(work, out, "bfloat16")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/live_teacher"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--language", choices=sorted(WORDS), default="en")
    options = parser.parse_args()
    make_teacher(options.work, options.out, options.language)
