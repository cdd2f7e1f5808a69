r"""Measure the value of a ghost token: how often a student that takes it gets to the right answer.

The student replies to questions at temperature 1. In each wrong reply the first token counts that the ghost would
change. From there the student goes on several times: after its own token y, after the ghost's y*, and after its own
likeliest token, the control. Where y* is worth no more than the control, on-policy ghosts teach what greedy decoding
does anyway.

    python benchmarks/ghost_value.py --student runs/study/start --teacher runs/study/teacher --rows questions.jsonl \
        --json value.jsonl

`--student` and `--teacher` are run folders. `--rows` need `question`, `rationale` and `answer`. Two ghosts are asked
about the same replies: the live teacher, and the student itself with the solution in its prompt (`privileged_self`).
The output has a line for each ghost, with the counts of every question, so that a table can be made again. Parts of the
questions can be asked one after the other, or by several processes, with `--first`. The table puts them together.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from paired import Interval, accuracy, bootstrap, sign_flip

from cotgrpo.config import PrivilegedSelf
from cotgrpo.data.questions import Question
from cotgrpo.data.triples import Triple, read_triples
from cotgrpo.evaluation.replies import judge
from cotgrpo.ghosts.live import live_ghosts
from cotgrpo.runs import Run
from cotgrpo.runs.trained import Trained
from cotgrpo.sampling import QUEUE, Prompts, SamplingSettings, make_sampler, pad_prompts

COLUMNS = 64
"""Prompts are padded to multiples of this, so that few shapes compile."""
GO_ON = 2**31
"""Draws from a start have keys of their own: no number of a sample is as large."""
Start = tuple[int, tuple[int, ...]]
"""The number of a question, and the first tokens of a reply to it."""
GHOSTS = ("teacher", "privileged_self")
WAYS = ("own", "ghost", "likeliest")
"""The token that the student goes on from: its own, the ghost's, or its likeliest."""


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A wrong reply of the student.

    Attributes:
        row: number of its question.
        ids: its tokens.
        ghosts: at each of them, the token of each ghost.
    """

    row: int
    ids: np.ndarray
    ghosts: dict[str, np.ndarray]


@dataclasses.dataclass
class Study:
    """The student, the ghosts that it is corrected by, and the questions.

    Attributes:
        student: a trained student.
        teacher: the live teacher, with the same tokenizer.
        triples: questions with their solutions.
        new_tokens: longest reply in tokens.
        batch_size: replies decoded at a time.
        seed: of all draws.
        ghosts: those that are asked.
        first: number of the first question, in the output.
    """

    student: Trained
    teacher: Trained
    triples: Sequence[Triple]
    new_tokens: int = 96
    batch_size: int = 32
    seed: int = 0
    ghosts: Sequence[str] = GHOSTS
    first: int = 0

    def __post_init__(self) -> None:
        template: Any = self.student.template
        self.questions = [Question(t.question, t.answer) for t in self.triples]
        self.prompts = [template.prompt(t.question) for t in self.triples]
        solved = PrivilegedSelf()
        self.solved = [template.prompt(solved.privileged(t.question, t.rationale, t.answer)) for t in self.triples]
        self.columns, self.solved_columns = columns_of(self.prompts), columns_of(self.solved)
        settings = SamplingSettings(self.new_tokens, template.stop_ids, temperature=1.0, pad_id=template.pad_id)
        self.sample = jax.jit(make_sampler(self.student.config, settings, self.student.vocab_size, self.batch_size))
        self.ask = jax.jit(self.tokens_of_ghosts)
        self.key = jax.random.fold_in(jax.random.key(self.seed), self.first)

    def tokens_of_ghosts(self, params: Any, prompts: Prompts, replies: Any, solved: Prompts) -> dict[str, Any]:
        """Return the token of each ghost at every token of the replies, `[B, N]`."""
        own, teacher = params
        first = prompts.tokens.shape[1] - 1
        ask = {
            "teacher": lambda: live_ghosts(self.teacher.student, teacher, prompts, replies),
            "privileged_self": lambda: live_ghosts(self.student.student, own, prompts, replies, reads=solved),
            "likeliest": lambda: live_ghosts(self.student.student, own, prompts, replies),
        }
        asked = {name: ask[name]().ghost_tokens for name in (*self.ghosts, "likeliest")}
        return {name: tokens[:, first : first + self.new_tokens] for name, tokens in asked.items()}

    def batches(self, count: int) -> list[list[int]]:
        return [[*range(start, min(start + self.batch_size, count))] for start in range(0, count, self.batch_size)]

    def padded(self, prompts: Sequence[np.ndarray], columns: int, rows: int | None = None) -> Prompts:
        pad: Any = self.student.template
        return pad_prompts(prompts, length=columns, rows=rows or self.batch_size, pad_id=pad.pad_id)

    def wrong_replies(self, samples: int, say: Callable[[str], None]) -> tuple[list[Wrong], int]:
        """Let the student reply `samples` times to each question. Return its wrong replies, and the number of all."""
        found, total = [], 0
        params = (self.student.params, self.teacher.params)
        for sample in range(samples):
            for number, rows in enumerate(self.batches(len(self.prompts))):
                key = jax.random.fold_in(jax.random.fold_in(self.key, sample), number)
                prompts = self.padded([self.prompts[row] for row in rows], self.columns)
                replies = self.sample(self.student.params, prompts, key)
                solved = self.padded([self.solved[row] for row in rows], self.solved_columns)
                ghosts = jax.device_get(self.ask(params, prompts, replies, solved))
                replies = jax.device_get(replies)
                for i, row in enumerate(rows):
                    ids = replies.tokens[i, : replies.lengths[i]]
                    total += 1
                    if not judge(self.student.template, self.questions[row], ids, bool(replies.finished[i])).correct:
                        found.append(Wrong(row, ids, {name: g[i, : len(ids)] for name, g in ghosts.items()}))
            say(f"{total} replies, {len(found)} wrong")
        return found, total

    def go_on(self, starts: Sequence[Start], draws: int, say: Callable[[str], None]) -> list[int]:
        """Let the student go on from each start. Return how many of the draws are right."""
        right = [0] * len(starts)
        template: Any = self.student.template
        work = []
        for i, (row, ids) in enumerate(starts):
            if ids[-1] in template.stop_ids:  # nothing is drawn
                right[i] = draws * judge(template, self.questions[row], np.array(ids, np.int32), True).correct
            else:
                work += [i] * draws
        prompts = {i: np.concatenate([self.prompts[starts[i][0]], np.array(starts[i][1], np.int32)]) for i in {*work}}
        work.sort(key=lambda i: len(prompts[i]))  # similar lengths together, to save columns
        size = self.batch_size * QUEUE
        for number, first in enumerate(range(0, len(work), size)):
            part = work[first : first + size]
            key = jax.random.fold_in(jax.random.fold_in(self.key, GO_ON), number)
            chosen = [prompts[i] for i in part]
            padded = self.padded(chosen, columns_of(chosen), size)
            replies = jax.device_get(self.sample(self.student.params, padded, key))
            for k, i in enumerate(part):
                row, ids = starts[i]
                whole = np.concatenate([np.array(ids, np.int32), replies.tokens[k, : replies.lengths[k]]])
                right[i] += judge(template, self.questions[row], whole, bool(replies.finished[k])).correct
            say(f"{min(first + size, len(work))} of {len(work)} replies from a start")
        return right

    def starts_of(self, ghost: str, wrong: Sequence[Wrong]) -> list[dict[str, Start]]:
        """Return, for each wrong reply that the ghost changes, the three ways to go on from the first change."""
        found = []
        for reply in wrong:
            changed = np.flatnonzero(reply.ghosts[ghost] != reply.ids)
            if len(changed):
                t = int(changed[0])
                tokens = {"own": reply.ids, "ghost": reply.ghosts[ghost], "likeliest": reply.ghosts["likeliest"]}
                before = tuple(reply.ids[:t].tolist())
                found.append({way: (reply.row, (*before, int(ids[t]))) for way, ids in tokens.items()})
        return found

    def values(self, wrong: Sequence[Wrong], draws: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
        """Return the counts of each ghost: by question, the right replies after each of the three tokens.

        Ways that begin with the same tokens share their draws. So if the ghost's token is the likeliest, the two differ
        by nothing, and not by the noise of two draws.
        """
        starts = {ghost: self.starts_of(ghost, wrong) for ghost in self.ghosts}
        different = list(dict.fromkeys(start for each in starts.values() for ways in each for start in ways.values()))
        right = dict(zip(different, self.go_on(different, draws, say), strict=True))
        return [
            {
                "ghost": ghost,
                "wrong_replies": len(wrong),
                "corrected": len(starts[ghost]),
                "draws": draws,
                "changed_tokens": float(np.concatenate([r.ghosts[ghost] != r.ids for r in wrong]).mean()),
                "first_change": float(np.median([len(ways["own"][1]) - 1 for ways in starts[ghost]])),
                "same_as_likeliest": float(np.mean([ways["ghost"] == ways["likeliest"] for ways in starts[ghost]])),
                "rows": [self.first + ways["own"][0] for ways in starts[ghost]],
                "right": {way: [right[ways[way]] for ways in starts[ghost]] for way in WAYS},
            }
            for ghost in self.ghosts
        ]


def columns_of(prompts: Sequence[np.ndarray]) -> int:
    """Return the columns that prompts are padded to."""
    return -(-max(map(len, prompts)) // COLUMNS) * COLUMNS


def of_questions(found: dict[str, Any], way: str) -> np.ndarray:
    """Return the share of right replies after a token, `[1, Q]`: the mean of each question's replies."""
    shares: dict[int, list[float]] = {}
    for row, right in zip(found["rows"], found["right"][way], strict=True):
        shares.setdefault(row, []).append(right / found["draws"])
    return np.array([[np.mean(values) for values in shares.values()]])


def together(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the lines of one ghost, each of other questions, as one."""
    counts = [line["wrong_replies"] for line in lines]
    mean = lambda name, weights: float(np.average([line[name] for line in lines], weights=weights))
    return lines[0] | {
        "wrong_replies": sum(counts),
        "corrected": sum(line["corrected"] for line in lines),
        "changed_tokens": mean("changed_tokens", counts),
        "first_change": mean("first_change", [line["corrected"] for line in lines]),
        "same_as_likeliest": mean("same_as_likeliest", [line["corrected"] for line in lines]),
        "rows": [row for line in lines for row in line["rows"]],
        "right": {way: [right for line in lines for right in line["right"][way]] for way in WAYS},
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the table: a row for each ghost, with 95 % intervals over questions, and p-values of `sign_flip`."""
    text = [
        "| ghost | questions | wrong replies | changed tokens | first change | y* is the likeliest | right after y, % "
        "| after y*, % | after the likeliest, % | y* against y | p | y* against the likeliest | p |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ghost in dict.fromkeys(line["ghost"] for line in lines):
        found = together([line for line in lines if line["ghost"] == ghost])
        own, ours, likeliest = (of_questions(found, way) for way in WAYS)
        means: list[Interval] = [accuracy(values) for values in (own, ours, likeliest)]
        corrected = f"{found['corrected']} of {found['wrong_replies']}"
        text.append(
            f"| {ghost} | {own.size} | {corrected} | {found['changed_tokens']:.0%} "
            f"| {found['first_change']:.3g} | {found['same_as_likeliest']:.0%} | {' | '.join(map(str, means))} "
            f"| {bootstrap(ours - own).signed()} | {sign_flip((ours - own)[0]):.2g} "
            f"| {bootstrap(ours - likeliest).signed()} | {sign_flip((ours - likeliest)[0]):.2g} |"
        )
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, help="run folder")
    parser.add_argument("--teacher", type=Path, help="run folder; none: only privileged_self is asked")
    parser.add_argument("--rows", type=Path, nargs="+")
    parser.add_argument("--questions", type=int, default=300, help="how many of the rows")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--samples", type=int, default=2, help="replies to each question")
    parser.add_argument("--ghosts", nargs="+", choices=GHOSTS, default=GHOSTS)
    parser.add_argument("--draws", type=int, default=4, help="how often the student goes on from each token")
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="output, a line for each ghost")
    parser.add_argument("--table", action="store_true", help="print the table of the lines that are there, and end")
    options = parser.parse_args(arguments)
    if not options.table:
        if not (options.student and options.rows):
            parser.error("--student and --rows are needed, except for --table")
        measure(options)
    print(table([json.loads(line) for line in options.json.read_text(encoding="utf-8").splitlines()]))
    return 0


def measure(options: argparse.Namespace) -> None:
    """Write the lines of these questions."""
    triples, _ = read_triples(list(options.rows))
    student = Run.open(options.student).model()
    teacher = student if options.teacher is None else Run.open(options.teacher).model()
    ghosts = options.ghosts if options.teacher is not None else ["privileged_self"]
    sizes = {name: getattr(options, name) for name in ("new_tokens", "batch_size", "seed")}
    asked = triples[options.first :][: options.questions]
    study = Study(student, teacher, asked, ghosts=ghosts, first=options.first, **sizes)
    say = functools.partial(print, flush=True)
    wrong, total = study.wrong_replies(options.samples, say)
    figures = {"replies": total, "questions": len(study.questions), "first": options.first, **sizes}
    lines = [figures | found for found in study.values(wrong, options.draws, say)]
    with open(options.json, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(found) + "\n" for found in lines)


if __name__ == "__main__":
    raise SystemExit(main())
