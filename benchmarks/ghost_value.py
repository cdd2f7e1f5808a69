r"""Measure the value of a ghost token: how often a student that takes it gets to the right answer.

The student replies to questions at temperature 1. In each wrong reply the first token counts that the ghost would
change. From there the student goes on several times: after its own token y, after the ghost's y*, and after its own
likeliest token, the control. Where y* is worth no more than the control, on-policy ghosts teach what greedy decoding
does anyway.

    python benchmarks/ghost_value.py --student runs/study/start --teacher runs/study/teacher --rows questions.jsonl \
        --json value.jsonl

`--student` and `--teacher` are run folders. `--rows` need `question`, `rationale` and `answer`. Two ghosts are asked
about the same replies: the live teacher, and the student itself with the solution in its prompt (`privileged_self`).
The output has a line for each ghost, with the counts of every question, so that a table can be made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from paired import Interval, accuracy, bootstrap

from cotgrpo.config import PrivilegedSelf
from cotgrpo.data.questions import Question
from cotgrpo.data.triples import Triple, read_triples
from cotgrpo.evaluation.replies import judge
from cotgrpo.ghosts.live import live_ghosts
from cotgrpo.runs import Run
from cotgrpo.runs.trained import Trained
from cotgrpo.sampling import Prompts, SamplingSettings, make_sampler, pad_prompts

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
    """

    student: Trained
    teacher: Trained
    triples: Sequence[Triple]
    new_tokens: int = 96
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        template: Any = self.student.template
        self.questions = [Question(t.question, t.answer) for t in self.triples]
        self.prompts = [template.prompt(t.question) for t in self.triples]
        solved = PrivilegedSelf()
        self.solved = [template.prompt(solved.privileged(t.question, t.rationale, t.answer)) for t in self.triples]
        columns = max(map(len, self.prompts)) + self.new_tokens
        self.columns, self.solved_columns = columns, max(map(len, self.solved))
        settings = SamplingSettings(self.new_tokens, template.stop_ids, temperature=1.0, pad_id=template.pad_id)
        self.sample = jax.jit(make_sampler(self.student.config, settings, self.student.vocab_size))
        self.ask = jax.jit(self.tokens_of_ghosts)

    def tokens_of_ghosts(self, params: Any, prompts: Prompts, replies: Any, solved: Prompts) -> dict[str, Any]:
        """Return the token of each ghost at every token of the replies, `[B, N]`."""
        own, teacher = params
        first = prompts.tokens.shape[1] - 1
        asked = {
            "teacher": live_ghosts(self.teacher.student, teacher, prompts, replies),
            "privileged_self": live_ghosts(self.student.student, own, prompts, replies, reads=solved),
            "likeliest": live_ghosts(self.student.student, own, prompts, replies),
        }
        return {name: batch.ghost_tokens[:, first : first + self.new_tokens] for name, batch in asked.items()}

    def batches(self, count: int) -> list[list[int]]:
        return [[*range(start, min(start + self.batch_size, count))] for start in range(0, count, self.batch_size)]

    def padded(self, prompts: Sequence[np.ndarray], columns: int) -> Prompts:
        pad: Any = self.student.template
        return pad_prompts(prompts, length=columns, rows=self.batch_size, pad_id=pad.pad_id)

    def wrong_replies(self, samples: int, say: Callable[[str], None]) -> tuple[list[Wrong], int]:
        """Let the student reply `samples` times to each question. Return its wrong replies, and the number of all."""
        found, total = [], 0
        params = (self.student.params, self.teacher.params)
        for sample in range(samples):
            for number, rows in enumerate(self.batches(len(self.prompts))):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), sample), number)
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

    def go_on(self, starts: Sequence[tuple[int, np.ndarray]], draws: int) -> np.ndarray:
        """Let the student go on from each (row, first tokens of a reply). Return how many of the draws are right."""
        right = np.zeros(len(starts), np.int64)
        template: Any = self.student.template
        ended = [i for i, (_, ids) in enumerate(starts) if ids[-1] in template.stop_ids]
        open_ones = [i for i in range(len(starts)) if i not in set(ended)]
        for i in ended:  # nothing is drawn
            row, ids = starts[i]
            right[i] = draws * judge(template, self.questions[row], ids, True).correct
        work = [i for i in open_ones for _ in range(draws)]
        for number, part in enumerate(self.batches(len(work))):
            key = jax.random.fold_in(jax.random.key(self.seed + 1), number)
            chosen = [starts[work[j]] for j in part]
            prompts = [np.concatenate([self.prompts[row], ids]) for row, ids in chosen]
            replies = jax.device_get(self.sample(self.student.params, self.padded(prompts, self.columns), key))
            for k, (row, ids) in enumerate(chosen):
                whole = np.concatenate([ids, replies.tokens[k, : replies.lengths[k]]])
                finished = bool(replies.finished[k])
                right[work[part[k]]] += judge(template, self.questions[row], whole, finished).correct
        return right

    def value(self, ghost: str, wrong: Sequence[Wrong], draws: int) -> dict[str, Any]:
        """Return the counts of one ghost: by question, the right replies after each of the three tokens."""
        rows, starts, places = [], dict[str, list[tuple[int, np.ndarray]]]((way, []) for way in WAYS), []
        for reply in wrong:
            changed = np.flatnonzero(reply.ghosts[ghost] != reply.ids)
            if not len(changed):
                continue
            t = int(changed[0])
            rows.append(reply.row)
            places.append(t)
            tokens = {"own": reply.ids[t], "ghost": reply.ghosts[ghost][t], "likeliest": reply.ghosts["likeliest"][t]}
            for way, token in tokens.items():
                starts[way].append((reply.row, np.append(reply.ids[:t], token).astype(np.int32)))
        right = {way: self.go_on(starts[way], draws).tolist() for way in WAYS}
        taken = {way: np.array([ids[-1] for _, ids in starts[way]]) for way in WAYS}
        share = np.concatenate([reply.ghosts[ghost] != reply.ids for reply in wrong]).mean()
        return {
            "ghost": ghost,
            "wrong_replies": len(wrong),
            "corrected": len(rows),
            "draws": draws,
            "changed_tokens": float(share),
            "first_change": float(np.median(places)),
            "same_as_likeliest": float(np.mean(taken["ghost"] == taken["likeliest"])),
            "rows": rows,
            "right": right,
        }


def of_questions(found: dict[str, Any], way: str) -> np.ndarray:
    """Return the share of right replies after a token, `[1, Q]`: the mean of each question's replies."""
    shares: dict[int, list[float]] = {}
    for row, right in zip(found["rows"], found["right"][way], strict=True):
        shares.setdefault(row, []).append(right / found["draws"])
    return np.array([[np.mean(values) for values in shares.values()]])


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the table: a row for each ghost, with 95 % intervals over questions."""
    text = [
        "| ghost | wrong replies | changed tokens | first change | right after y, % | after y*, % "
        "| after the likeliest, % | y* against y | y* against the likeliest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in lines:
        own, ghost, likeliest = (of_questions(found, way) for way in WAYS)
        means: list[Interval] = [accuracy(values) for values in (own, ghost, likeliest)]
        text.append(
            f"| {found['ghost']} | {found['corrected']} of {found['wrong_replies']} | {found['changed_tokens']:.0%} "
            f"| {found['first_change']:g} | {' | '.join(map(str, means))} "
            f"| {bootstrap(ghost - own).signed()} | {bootstrap(ghost - likeliest).signed()} |"
        )
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="run folder")
    parser.add_argument("--teacher", type=Path, required=True, help="run folder")
    parser.add_argument("--rows", type=Path, nargs="+", required=True)
    parser.add_argument("--questions", type=int, default=300, help="how many of the rows, from the first")
    parser.add_argument("--samples", type=int, default=2, help="replies to each question")
    parser.add_argument("--draws", type=int, default=4, help="how often the student goes on from each token")
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="output, a line for each ghost")
    options = parser.parse_args(arguments)
    triples, _ = read_triples(list(options.rows))
    student, teacher = (Run.open(folder).model() for folder in (options.student, options.teacher))
    sizes = {name: getattr(options, name) for name in ("new_tokens", "batch_size", "seed")}
    study = Study(student, teacher, triples[: options.questions], **sizes)
    wrong, total = study.wrong_replies(options.samples, lambda text: print(text, flush=True))
    lines = []
    for ghost in ("teacher", "privileged_self"):
        found = {"replies": total, "questions": len(study.questions), **sizes} | study.value(
            ghost, wrong, options.draws
        )
        lines.append(found)
        with open(options.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    print(table(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
