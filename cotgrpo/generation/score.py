"""`generate` with `score_for`: a teacher's likeliest tokens at the tokens of given replies, for one student.

The rows hold replies, such as a student's own. They are written as the student's tokens, by the template of its run,
and sent to a server that returns log-probabilities of a given text. Every answer is on the disk before the next is
asked for. Run again, the command asks for the missing ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from cotgrpo.atomic_files import write_json
from cotgrpo.checkpoints.run_lock import locked
from cotgrpo.config import Config, ConfigError, GenerateConfig, load_config, save_config
from cotgrpo.data.batches import make_examples
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import Example
from cotgrpo.data.triples import Triple, read_triples
from cotgrpo.disk_errors import explain_disk_errors
from cotgrpo.identity.fingerprints import tokenizer_fingerprint
from cotgrpo.logs.progress import PhaseProgress
from cotgrpo.rollouts.cached_ghosts import CachedReply, write_cache
from cotgrpo.teacher_servers.server import Scores, ScoringServer, ServerSettings, Text
from cotgrpo.teacher_servers.vocabulary import Vocabulary
from cotgrpo.teachers.endpoint import ConnectionSettings
from cotgrpo.terminal import say
from cotgrpo.training.inputs import Model, model_of

SAMPLES = 8
"""Replies by which the tokenizers are compared."""


@dataclasses.dataclass(frozen=True)
class TeacherServerSettings(ServerSettings):
    """The section `teacher` as a server that scores texts."""

    section: ClassVar[str] = "teacher"
    top_settings: ClassVar[str] = "top_logprobs"


def run_score(config: GenerateConfig, console: Console) -> dict[str, Any]:
    """Score the replies of the rows, write `ghosts.parquet` in `out`, and return the summary.

    Raises:
        ConfigError, DataError, ModelError: a stage or rows that cannot be used; before the first request.
        TeacherError: the teacher returns no log-probabilities, or has another tokenizer.
    """
    out, stage = Path(config.out), Path(str(config.score_for))
    run, model = student_of(stage)
    say(console, "reading the replies")
    triples, report = read_triples(
        config.questions,
        split=config.split,
        bad_rows=config.bad_rows,
        keep_incorrect=True,
        columns=config.columns,
        row_function=config.row_function,
    )
    say(console, f"replies: {report}")
    triples = triples[: config.max_questions or None]
    template = model.template("completion")
    examples, left = make_examples(triples, template, run.data.seq_len, too_long="drop", bad_rows=config.bad_rows)
    say(console, f"sequences of {stage}'s tokens: {left}")
    vocabulary = Vocabulary(model.tokenizer, model.vocab_size)
    top_k = min(config.top_logprobs, model.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out), ScoreJournal(out / "scores.jsonl") as journal:
        save_config(config, out / "config.yaml")
        texts = {id_of(example): text_of(example) for example in examples}
        waiting = [(name, text) for name, text in texts.items() if name not in journal.scores]
        if len(waiting) < len(texts):
            say(console, f"Continuing: {len(texts) - len(waiting)} of {len(texts)} replies are scored.")
        if waiting:
            names = {field.name for field in dataclasses.fields(ConnectionSettings)}
            settings = TeacherServerSettings(**{name: getattr(config.teacher, name) for name in names})
            samples = [text for _, text in waiting[:SAMPLES]]
            warn = lambda line: say(console, line, style="yellow")
            ask(ScoringServer(settings, vocabulary, top_k, samples, warn), waiting, journal, console)
        cached = [entry(triple, example, journal) for triple, example in pairs(triples, examples)]
        write_cache(out / "ghosts.parquet", cached, top_k, tokenizer_fingerprint(model.tokenizer))
    summary = {"replies": report.to_dict(), "scored": len(cached), "tokens": sum(len(c.top_ids) for c in cached)}
    write_json(out / "summary.json", summary)
    say(console, f"written: {out / 'ghosts.parquet'}, {summary['scored']} replies of {summary['tokens']} tokens")
    return summary


def student_of(stage: Path) -> tuple[Config, Model]:
    """Return the settings and the student of a stage's folder. Raises ConfigError if it is not one."""
    if not (stage / "config.yaml").is_file():
        raise ConfigError(f"score_for must be the folder of a stage, such as runs/run/sft: {stage} has no config.yaml.")
    run = load_config(stage / "config.yaml")
    return run, model_of(run, stage, None, [], copy=True)


def ask(server: ScoringServer, waiting: Sequence[tuple[str, Text]], journal: ScoreJournal, console: Console) -> None:
    """Score the missing replies, `concurrency` of them at a time."""
    size = server.settings.concurrency
    try:
        server.connect()
        with PhaseProgress("replies scored", console, len(waiting)) as phase:
            for start in range(0, len(waiting), size):
                part = waiting[start : start + size]
                texts = [text for _, text in part]
                columns = max(len(text.scored) for text in texts)
                scores: Scores = server.score_later(lambda texts=texts: texts, columns).result()  # type: ignore[misc]
                journal.append([(name, len(text.scored)) for name, text in part], scores)
                phase(start + len(part))
    finally:
        server.close()


def pairs(triples: Sequence[Triple], examples: Sequence[Example]) -> list[tuple[Triple, Example]]:
    """Return each example with its row. Of several examples of one row, the last one, which has its reply."""
    by_source = {example.source: example for example in examples}
    return [(triple, by_source[triple.source]) for triple in triples if triple.source in by_source]


def id_of(example: Example) -> str:
    """Return a hash of a sequence and of where its reply begins."""
    return hashlib.sha256(b"%d " % example.prompt_length + example.tokens.tobytes()).hexdigest()


def text_of(example: Example) -> Text:
    """Return the sequence of a row as context and scored reply."""
    tokens = [int(token) for token in example.tokens]
    return Text(tokens[: example.prompt_length], tokens[example.prompt_length :])


def entry(triple: Triple, example: Example, journal: ScoreJournal) -> CachedReply:
    """Return what the cache holds of a row."""
    rows = journal.scores[id_of(example)]
    return CachedReply(
        (triple.question, triple.rationale, triple.answer),
        ids=[int(token) for token in example.tokens],
        top_ids=[[pair[0] for pair in row] for row in rows],
        top_log_probs=[[pair[1] for pair in row] for row in rows],
    )


class ScoreJournal:
    """The scores so far, one reply a line: `{"id": ..., "top": [[[token, log-probability], ...], ...]}`.

    A line is on the disk once `append` has returned. Half a line at the end, as a kill leaves it, is cut off.

    Attributes:
        scores: by the id of the sequence.

    Raises:
        DataError: another line is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores: dict[str, list[list[list[Any]]]] = {}
        with explain_disk_errors(path):
            self.file = open(path, "a+b")  # noqa: SIM115  open until `__exit__`
            self.file.seek(0)
            lines, whole = self.file.read().splitlines(keepends=True), 0
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no end of line")
                found = json.loads(line)
                self.scores[found["id"]] = found["top"]
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):
                    raise DataError(f"{path}:{number}: not a score ({error}). Fix or remove the line.") from None
                self.file.truncate(whole)
            whole += len(line)

    def append(self, rows: Sequence[tuple[str, int]], scores: Scores) -> None:
        """Write the scores of replies, given by their ids and lengths."""
        with explain_disk_errors(self.path):
            for (name, length), ids, log_probs in zip(rows, scores.ids, scores.log_probs, strict=True):
                top = [
                    [[int(i), round(float(p), 6)] for i, p in zip(*place, strict=True) if p > -1e29]
                    for place in zip(ids[:length], log_probs[:length], strict=True)
                ]
                self.file.write(json.dumps({"id": name, "top": top}).encode() + b"\n")
                self.scores[name] = top
            self.file.flush()
            os.fsync(self.file.fileno())

    def __enter__(self) -> ScoreJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
