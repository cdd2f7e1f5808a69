r"""Train a real pretrained student in many ways from one start, and compare the ways on the same questions.

    python benchmarks/real_student.py --student FOLDER --rows words.jsonl --teacher_rows more.jsonl \
        --work runs/study --json results.jsonl

`--rows` are (question, rationale, answer) rows in any layout that cotgrpo reads. They are divided by a hash of their
questions: test questions, questions that choose the learning rate, a small part with text that the student starts from
(SFT), and further questions, whose text no arm reads. The teacher is the same model, trained on all rows but those that
are held out, and on `--teacher_rows`. Each arm trains the start further for `--steps` updates, at each learning rate
with the first seed, then with the other seeds at the rate that does best. GRPO here is GhostRespond Policy
Optimization, not Group Relative.

A run is a run folder in `--work`, and a line of `--json` when it is measured. Both are taken up where they were left.
A student that was measured is removed, since its folder is ten times its size. `--table` prints the tables of the lines
that are there. On a GPU, give a larger student and `--dtype bfloat16`.

Rows that name `split: test` are test questions first of all. Of questions that differ in their numbers only, one is
kept. Work is counted and not timed: positions trained, tokens decoded, and model FLOPs. So it does not depend on the
machine, nor on what else ran there.

Other regimes are other sizes: `--small 40 --start_steps 20 --teacher_run runs/study/teacher` starts from fewer rows,
and rows with long solutions need a larger `--seq_len` and `--new_tokens`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from paired import accuracy, as_good, difference, mcnemar

from cotgrpo import make_eval_step
from cotgrpo.accelerators.roofline import Work
from cotgrpo.atomic_files import write_json, write_text
from cotgrpo.data.batches import make_batches, make_examples
from cotgrpo.data.questions import Question, question_text, read_questions
from cotgrpo.data.triples import Triple, read_triples, write_triples
from cotgrpo.evaluation.accuracy import ExactMatch, SampledMatch, mean_metrics
from cotgrpo.evaluation.replies import Draws
from cotgrpo.ghosts.live import live_ghosts, with_replies
from cotgrpo.identity.fingerprints import tokenizer_fingerprint
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.models.decoder import DecoderConfig
from cotgrpo.reports.charts import interval_chart, standalone
from cotgrpo.rollouts.cached_ghosts import CachedReply, write_cache
from cotgrpo.runs import Run
from cotgrpo.runs.trained import Trained
from cotgrpo.sampling import SamplingSettings, make_sampler, pad_prompts

Q = TypeVar("Q", Question, Triple)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many rows there are of each kind, and how long everything runs.

    Attributes:
        test: questions that arms are compared on.
        choice: questions that choose the learning rate.
        small: rows with text that the start is trained on.
        forget: rows of `--teacher_rows` that nobody is trained on. Their loss is what a student forgets.
        more: rows of `--teacher_rows` that the teacher is trained on too, at most.
        start_steps: updates of the start. More of them should gain nothing.
        teacher_steps: updates of the teacher.
        steps: updates of an arm.
        batch_size: packed rows of SFT.
        replies: replies of an on-policy batch.
        seq_len: columns of a packed row.
        new_tokens: longest reply.
        votes: drawn replies to each test question.
        voted: students of an arm of `VOTED`, from the first seed, that are asked for votes.
        probes: test questions whose drawn replies are looked at token by token.
    """

    test: int = 450
    choice: int = 150
    small: int = 200
    forget: int = 60
    more: int = 400
    start_steps: int = 80
    teacher_steps: int = 400
    steps: int = 60
    batch_size: int = 4
    replies: int = 8
    seq_len: int = 256
    new_tokens: int = 96
    votes: int = 4
    voted: int = 1
    probes: int = 64


SIZES = {
    "full": Sizes(),
    "tiny": Sizes(4, 3, 8, 2, 4, 2, 2, 2, 2, 4, 160, 8, 2, 1, 4),
}
COLUMNS = 64
"""Rows are padded to multiples of this, so that few shapes compile."""
START_RATE, TEACHER_RATE = 1e-4, 2e-4


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train the start further.

    Attributes:
        stage: "sft" or "grpo".
        rows: the training rows: "small", "greedy" or "drawn" text of the teacher for the further questions, or
            "solved", the further questions with the solutions of the data set. "_wrong": a tenth of it is wrong.
        settings: of the stage. "TEACHER", "FURTHER" and "LABELS" stand for paths.
        times: updates, as a multiple of those of the study.
    """

    stage: str
    rows: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    times: int = 1

    @property
    def ghost_reads(self) -> bool:
        """Whether a live ghost reads every reply."""
        return self.settings.get("ghosts", {}).get("source") in ("teacher_model", "privileged_self")


def ghost(objective: str, source: str = "teacher_model", **more: Any) -> dict[str, Any]:
    """Return the settings of a stage with ghosts."""
    where = {"teacher": "TEACHER", "prompts": ["FURTHER"]} if source == "teacher_model" else {}
    return {"objective": {"name": objective}, "ghosts": {"source": source, **where, **more}}


ARMS = {
    "sft": Arm("sft", "small"),
    "teacher_text": Arm("sft", "greedy"),
    "on_policy_nll": Arm("grpo", "small", ghost("nll")),
    "teacher_text_labels": Arm(
        "grpo", "drawn", ghost("nll", "cached") | {"ghosts": {"source": "cached", "path": "LABELS"}}
    ),
    "teacher_text_longer": Arm("sft", "greedy", times=2),
    "on_policy": Arm("grpo", "small", ghost("pair")),
    "forward_kl": Arm("grpo", "small", ghost("forward_kl")),
    "solved_text": Arm("sft", "solved"),
    "privileged_frozen": Arm("grpo", "solved", ghost("nll", "privileged_self")),
    "group_relative": Arm("grpo", "solved", ghost("group_relative", "verified_reward")),
    "teacher_text_drawn": Arm("sft", "drawn"),
    "on_policy_drawn": Arm("grpo", "small", ghost("nll", choice="drawn")),
    "on_policy_gated": Arm("grpo", "small", ghost("nll", when="wrong")),
    "reverse_kl": Arm("grpo", "small", ghost("reverse_kl")),
    "privileged_ema": Arm("grpo", "solved", ghost("nll", "privileged_self", self="ema")),
    "teacher_text_wrong": Arm("sft", "greedy_wrong"),
    "solved_text_wrong": Arm("sft", "solved_wrong"),
    "privileged_wrong": Arm("grpo", "solved_wrong", ghost("nll", "privileged_self")),
}
"""In the order in which they run: what a reader needs most comes first."""
VOTED = ("sft", "teacher_text", "on_policy_nll")
"""Arms that are asked for votes too. To decode several replies to every test question costs as much as an arm."""
BASE, TEXT = "sft", "teacher_text"
"""What every arm is compared with: SFT continued, and SFT on the teacher's text for the further questions."""


def form(row: Question | Triple) -> str:
    """Return a question without its numbers. Two questions of one form are the same exercise."""
    return re.sub(r"\d+", "#", re.sub(r"\W+", " ", question_text(row).lower())).strip()


def place(row: Question | Triple) -> str:
    """Return a row's place in the order of a study: a hash of its question."""
    return hashlib.sha256(f"real_student {question_text(row)}".encode()).hexdigest()


def one_of_each(rows: Iterable[Q]) -> list[Q]:
    """Return the rows in the order of a study, the first of each form. Rows of a test split come first."""
    found: dict[str, Q] = {}
    for row in sorted(rows, key=lambda row: (row.row.get("split") != "test", place(row))):
        found.setdefault(form(row), row)
    return list(found.values())


def with_mistake(text: str, answer: str, seed: str) -> str:
    """Return a text with another whole number wherever it has the answer. A text without it stays.

    Args:
        text: a solution.
        answer: the number that is replaced.
        seed: decides the other number.
    """
    number = answer.strip().removesuffix(".0")
    if not re.fullmatch(r"\d+", number):
        return text
    other = int(number) + 1 + int(hashlib.sha256(seed.encode()).hexdigest(), 16) % 9
    return re.sub(rf"(?<![\d.]){number}(?!\d|\.\d)", str(other), text)


def with_mistakes(rows: Sequence[Triple], share: float = 0.1) -> list[Triple]:
    """Return the rows, a share of them with a wrong answer in the rationale and as the answer."""
    found = []
    for row in rows:
        seed = place(row)
        if int(seed, 16) % 1000 < 1000 * share:
            text, answer = (with_mistake(text, row.answer, seed) for text in (row.rationale, row.answer))
            row = dataclasses.replace(row, rationale=text, answer=answer)
        found.append(row)
    return found


@dataclasses.dataclass
class Rows:
    """The rows of a study, as files in its folder.

    Attributes:
        folder: for the files.
        sizes: how many there are of each kind.
        files: layouts that `cotgrpo.data` reads.
        teacher_files: further rows for the teacher alone.
    """

    folder: Path
    sizes: Sizes
    files: Sequence[str]
    teacher_files: Sequence[str]

    def __post_init__(self) -> None:
        sizes = self.sizes
        questions, _ = read_questions(list(self.files), bad_rows="drop")
        in_order = one_of_each(questions)
        self.test, rest = in_order[: sizes.test], in_order[sizes.test :]
        self.choice, rest = rest[: sizes.choice], rest[sizes.choice :]
        usable = [row for row in rest if row.reference is not None]
        if len(usable) <= sizes.small:
            raise SystemExit(f"{len(usable)} rows are left to train on: more than {sizes.small} are needed.")
        rows = [row.reference for row in usable if row.reference is not None]
        self.small, self.further = rows[: sizes.small], rows[sizes.small :]
        more = read_triples(list(self.teacher_files), split="train")[0] if self.teacher_files else []
        known = {form(row) for row in in_order}
        more = [row for row in one_of_each(more) if form(row) not in known]
        self.forget, self.more = more[: sizes.forget] or rows[:1], more[sizes.forget :][: sizes.more]
        for name in ("small", "further", "forget", "more"):
            self.write(name, getattr(self, name))
        self.write("solved", self.further)
        self.write("solved_wrong", with_mistakes(self.further))
        asked = [{"question": row.question, "gold": row.answer} for row in self.further]
        write_text(self.path("questions"), "".join(json.dumps(row) + "\n" for row in asked))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def write(self, name: str, rows: Sequence[Triple]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_triples(self.path(name), rows)

    def __str__(self) -> str:
        counts = {name: len(getattr(self, name)) for name in ("test", "choice", "small", "further", "forget", "more")}
        return ", ".join(f"{count} {name}" for name, count in counts.items())


class Measure:
    """Measures students. Its programs compile once and serve all of them.

    Args:
        like: a student of the study.
        rows: its rows.
        teacher: whose likeliest tokens the students' drawn replies are compared with.
    """

    def __init__(self, like: Trained, rows: Rows, teacher: Trained) -> None:
        sizes, self.template, self.teacher = rows.sizes, like.template, teacher
        sampled: dict[str, Any] = {"max_new_tokens": sizes.new_tokens, "batch_size": 32, "vocab_size": like.vocab_size}
        self.choice = ExactMatch(like.config, like.template, rows.choice, **sampled)
        self.test = ExactMatch(like.config, like.template, rows.test, **sampled)
        draws = Draws(sizes.votes, temperature=0.7)
        self.votes = SampledMatch(like.config, like.template, rows.test, draws, [1, sizes.votes], **sampled)
        probed: list[Question] = rows.test[: sizes.probes]
        pad: Any = like.template
        self.prompts = pad_prompts([pad.prompt(row.question) for row in probed], pad_id=pad.pad_id)
        settings = SamplingSettings(sizes.new_tokens, like.template.stop_ids, temperature=1.0, pad_id=pad.pad_id)
        sample, evaluate = make_sampler(like.config, settings, like.vocab_size), make_eval_step(like.student)
        self.evaluate = jax.jit(evaluate)
        unseen, _ = make_examples(rows.forget, like.template, sizes.seq_len, too_long="drop", bad_rows="drop")
        packed: dict[str, Any] = {"batch_size": sizes.batch_size, "seq_len": sizes.seq_len, "num_epochs": 1}
        self.forget = functools.partial(make_batches, unseen, **packed)

        def probe(params: Any, teacher_params: Any, key: jax.Array) -> tuple[Any, ...]:
            replies = sample(params, self.prompts, key)
            batch = with_replies(self.prompts, replies)
            ghosts = live_ghosts(teacher.student, teacher_params, self.prompts, replies)
            changed = ((ghosts.ghost_tokens != batch.targets) * batch.loss_mask).sum() / batch.loss_mask.sum()
            return evaluate(params, batch), changed, replies.lengths.mean()

        self.probe = jax.jit(probe)

    def __call__(self, student: Trained, votes: bool) -> dict[str, Any]:
        """Return all figures on the test questions, those of `votes` if they are wanted."""
        greedy = self.test(student.params)
        found: dict[str, Any] = {}
        if votes:
            drawn = self.votes(student.params)
            found = {"majority": drawn.maj_at_k[max(drawn.maj_at_k)].value}
        metrics, changed, length = self.probe(student.params, self.teacher.params, jax.random.key(0))
        return found | {
            "forget_loss": mean_metrics(self.evaluate, student.params, self.forget())["loss"],
            "greedy": "".join(str(int(reply.correct)) for reply in greedy.replies),
            "truncated": greedy.truncated,
            "entropy": metrics["entropy"].mean(),
            "changed_tokens": float(changed),
            "length": float(length),
        }


class Study:
    """Trains the teacher, the start and the arms, each in a run folder, and keeps a line of every finished run.

    Args:
        student: folder or hub id of the pretrained student.
        rows: the rows of the study.
        work: folder of all runs.
        lines: the output file.
        dtype: of the computation; None: that of the student.
        teacher_run: run folder of a teacher that another study has trained on the same rows; None: train it.
    """

    def __init__(
        self, student: str, rows: Rows, work: Path, lines: Path, dtype: str | None, teacher_run: Path | None = None
    ) -> None:
        self.student, self.rows, self.work, self.path, self.dtype = student, rows, work, lines, dtype
        self.teacher_run = teacher_run or work / "teacher"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self.lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        self.measure: Measure | None = None

    def run(self, name: str, train: Sequence[Path], **settings: Any) -> Run:
        """Return a run of the study with these rows."""
        sizes = self.rows.sizes
        data = {"format": "chat", "loss_on": "completion", "seq_len": sizes.seq_len}
        data |= dict.fromkeys(("too_long", "bad_rows"), "drop")
        return Run(
            self.work / name,
            student={"path": self.student} | ({"dtype": self.dtype} if self.dtype else {}),
            train=[str(path) for path in train],
            test=[str(self.rows.path("forget"))],
            data=data,
            eval={"rows": 1, "max_new_tokens": sizes.new_tokens},
            checkpoint={"every": 50, "keep": 1},
            **settings,
        )

    def trained(self, name: str, train: Sequence[str], rate: float, steps: int) -> Trained:
        """Train the start or the teacher, unless it is there, and return it. `NAME/model` is its exported folder."""
        run = self.run(name, [self.rows.path(each) for each in train])
        optimizer = {"learning_rate": rate, "warmup_steps": steps // 10}
        run.sft(steps=steps, batch_size=self.rows.sizes.batch_size, optimizer=optimizer)
        folder = self.work / name / "model"
        if not (folder / "config.json").is_file():
            run.save(folder)
        return run.model()

    def prepare(self) -> None:
        """Train teacher and start, let the teacher write its text, and measure both."""
        sizes = self.rows.sizes
        if self.teacher_run == self.work / "teacher":
            everything = ["small", "further", *(["more"] if self.rows.more else [])]
            self.teacher = self.trained("teacher", everything, TEACHER_RATE, sizes.teacher_steps)
        else:
            self.teacher = Run.open(self.teacher_run).model()
        self.start = self.trained("start", ["small"], START_RATE, sizes.start_steps)
        self.measure = Measure(self.start, self.rows, self.teacher)
        for name, folder in (("teacher", self.teacher_run), ("start", self.work / "start")):
            key = {"arm": name, "rate": 0.0, "seed": 0, "steps": 0}
            self.add(key, functools.partial(self.figures, folder, votes=True))
        for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
            self.write_text(name, temperature)
        self.write_labels()

    def write_text(self, name: str, temperature: float) -> None:
        """Write the teacher's replies to the further questions, those with an answer. Wrong ones stay."""
        path = self.rows.path(name)
        if path.is_file():
            return
        asked = [Question(row.question, row.answer) for row in self.rows.further]
        how: dict[str, Any] = {"max_new_tokens": self.rows.sizes.new_tokens, "batch_size": 32}
        how["vocab_size"] = self.teacher.vocab_size
        if temperature:
            match = SampledMatch(self.teacher.config, self.teacher.template, asked, Draws(1, temperature), [1], **how)
            replies = [several[0] for several in match(self.teacher.params).replies]
        else:
            replies = ExactMatch(self.teacher.config, self.teacher.template, asked, **how)(self.teacher.params).replies
        kept = [reply for reply in replies if reply.finished and reply.answer is not None]
        right = sum(reply.correct for reply in kept)
        print(
            f"{name}: {len(kept)} of {len(replies)} replies of the teacher end with an answer, {right} are right",
            flush=True,
        )
        ends = self.ends()
        said = lambda reply: [("user", reply.question), ("assistant", strip_end(reply.text, ends))]
        rows = [{"messages": [{"role": who, "content": text} for who, text in said(reply)]} for reply in kept]
        if not rows:
            raise SystemExit(f"No reply of the teacher ends with an answer within {self.rows.sizes.new_tokens} tokens.")
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.rows.write(f"{name}_wrong", with_mistakes(read_triples(path, bad_rows="drop")[0]))

    def ends(self) -> list[str]:
        """Return the tokens that end a reply, as text."""
        tokenizer: Any = self.teacher.tokenizer
        return [str(tokenizer.decode([token])) for token in self.teacher.template.stop_ids]

    def write_labels(self) -> None:
        """Write the teacher's likeliest token at each token of its drawn text."""
        path = self.work / "labels.parquet"
        if path.is_file():
            return
        template: Any = self.teacher.template
        spec = self.teacher.student
        likeliest = jax.jit(lambda params, *row: spec.logits(params, *row).argmax(-1))
        found = []
        for triple in read_triples(self.rows.path("drawn"), bad_rows="drop")[0]:
            tokens = np.asarray(template.encode(triple).tokens)
            reply = len(tokens) - len(template.prompt(triple.question))
            if len(tokens) > self.rows.sizes.seq_len:
                continue
            padded = np.zeros((1, -(-len(tokens) // COLUMNS) * COLUMNS), np.int32)
            padded[0, : len(tokens)] = tokens
            column = np.arange(padded.shape[1])[None]
            labels = np.asarray(likeliest(self.teacher.params, padded, column, (column < len(tokens)).astype(np.int32)))
            ids = labels[0, len(tokens) - 1 - reply : len(tokens) - 1]
            key = (triple.question, triple.rationale, triple.answer)
            found.append(CachedReply(key, [[0.0]] * reply, ids=tokens.tolist(), top_ids=[[int(i)] for i in ids]))
        write_cache(path, found, 1, tokenizer_fingerprint(self.teacher.tokenizer))

    def train(self, name: str, rate: float, seed: int) -> Path:
        """Train an arm, unless it is there. Return the folder of its run."""
        arm, sizes = ARMS[name], self.rows.sizes
        folder = self.work / f"{name}-{rate:g}-{seed}"
        if (folder / arm.stage / "report.json").is_file() and not (folder / arm.stage / "checkpoints").is_dir():
            shutil.rmtree(folder)  # it was measured and removed, and is wanted again
        run = self.run(folder.name, [self.rows.path(arm.rows)], seed=seed)
        steps = self.steps(name)
        settings: dict[str, Any] = {
            "steps": steps,
            "init_from": str(self.work / "start" / "sft"),
            "optimizer": {"learning_rate": rate, "warmup_steps": steps // 10},
        }
        if arm.stage == "sft":
            run.sft(**settings, batch_size=sizes.batch_size)
            return folder
        more = json.loads(replaced(json.dumps(arm.settings), self.paths()))
        on_policy = more["ghosts"]["source"] != "cached"
        if on_policy:
            more["ghosts"]["max_new_tokens"] = sizes.new_tokens
        run.grpo(**settings, **more, batch_size=sizes.replies if on_policy else sizes.batch_size)
        return folder

    def paths(self) -> dict[str, str]:
        """Return what stands for what in the settings of arms."""
        return {
            "TEACHER": str(self.teacher_run / "model"),
            "FURTHER": str(self.rows.path("questions")),
            "LABELS": str(self.work / "labels.parquet"),
        }

    def figures(self, folder: Path, *, votes: bool) -> dict[str, Any]:
        """Return the test figures of a run."""
        assert self.measure is not None
        return self.measure(Run.open(folder).model(), votes)

    def add(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the line with this key, or make it and write it."""
        found = next((line for line in self.lines if all(line.get(name) == key[name] for name in key)), None)
        if found is not None:
            return found
        line = key | make()
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print({k: v for k, v in line.items() if k != "greedy"}, flush=True)
        return line

    def choose(self, name: str, rates: Sequence[float]) -> float:
        """Train an arm at each rate with the first seed. Return the rate with the most right choice questions."""
        found = {}
        for rate in rates:
            key = {"arm": name, "rate": rate, "seed": 0, "steps": self.steps(name), "chosen_on": "choice"}
            found[rate] = self.add(key, functools.partial(self.chosen, name, rate))["choice"]
        best = max(found, key=lambda rate: found[rate])
        for rate in rates:
            if rate != best:
                self.remove(name, rate, 0)
        return best

    def chosen(self, name: str, rate: float) -> dict[str, Any]:
        assert self.measure is not None
        folder = self.train(name, rate, 0)
        return {"choice": self.measure.choice(Run.open(folder).model().params).value}

    def arm(self, name: str, rates: Sequence[float], seeds: int) -> None:
        """Train and measure an arm at its best rate with every seed."""
        rate = self.choose(name, rates) if len(rates) > 1 else rates[0]
        for seed in range(seeds):
            key = {"arm": name, "rate": rate, "seed": seed, "steps": self.steps(name), "chosen_on": ""}
            self.add(key, functools.partial(self.measured, name, rate, seed))
            self.remove(name, rate, seed)

    def measured(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        folder = self.train(name, rate, seed)
        work = work_of(read_metrics(folder / ARMS[name].stage), ARMS[name], self.start.config, self.rows.sizes.seq_len)
        votes = name in VOTED and seed < self.rows.sizes.voted
        return work | self.figures(folder, votes=votes)

    def steps(self, name: str) -> int:
        """Return the updates of an arm."""
        return self.rows.sizes.steps * ARMS[name].times

    def remove(self, name: str, rate: float, seed: int) -> None:
        """Remove the student of a run, and keep its logs."""
        shutil.rmtree(self.work / f"{name}-{rate:g}-{seed}" / ARMS[name].stage / "checkpoints", ignore_errors=True)


def work_of(metrics: Sequence[Mapping[str, Any]], arm: Arm, decoder: DecoderConfig, seq_len: int) -> dict[str, float]:
    """Return the work of an arm's updates, counted: positions trained, tokens decoded, and model TFLOPs.

    A position costs two FLOPs a weight forward and four backward. An on-policy position is also decoded once, and read
    by the ghost if there is one. Padding, longer prompts of a ghost, and a teacher's writing beforehand do not count.

    Args:
        metrics: the rows of the run's log: means over the steps since the row before.
        arm: what was trained.
        decoder: the student's shape. The teacher has the same.
        seq_len: columns of a row.
    """
    steps = np.diff([0, *(row["step"] for row in metrics)])
    total = lambda name: float(sum(n * row.get(name, 0.0) for n, row in zip(steps, metrics, strict=True)))
    trained, decoded = total("train/tokens"), total("train/rollout_tokens")
    forward = Work(decoder, tokens=1, seq_len=seq_len).model_flops / 3
    passes = 3 + (decoded > 0) + arm.ghost_reads
    return {"trained": trained, "decoded": decoded, "tflops": trained * passes * forward / 1e12}


def strip_end(text: str, ends: Sequence[str]) -> str:
    """Return a reply without the token that ends it."""
    for end in ends:
        text = text.removesuffix(end)
    return text.strip()


def replaced(text: str, names: Mapping[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(json.dumps(name), json.dumps(value))
    return text


def verdicts(lines: Sequence[Mapping[str, Any]], arm: str) -> np.ndarray:
    """Return the greedy verdicts of an arm, `[S, Q]`, in the order of its seeds."""
    mine = sorted((line for line in lines if line["arm"] == arm and "greedy" in line), key=lambda line: line["seed"])
    return np.array([[int(c) for c in line["greedy"]] for line in mine])


def table(lines: Sequence[Mapping[str, Any]], margin: float = 0.02) -> str:
    """Return the table of arms: accuracy with 95 % intervals over questions and seeds, and paired differences.

    "As good" is equivalence within the margin at 5 %: the 90 % interval of the difference lies inside it.
    """
    rows = [
        "| arm | rate | seeds | greedy, % | maj@k, % | against SFT continued | McNemar, by seed "
        "| against the teacher's text | within 2 points | entropy | changed tokens | length | forgetting "
        "| positions trained | tokens decoded | model TFLOPs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(line["arm"] for line in lines if "greedy" in line):
        mine = [line for line in lines if line["arm"] == arm and "greedy" in line]
        ours = verdicts(lines, arm)
        mean = lambda name, mine=mine: float(np.mean([line[name] for line in mine if name in line]))
        voted = f"{100 * mean('majority'):.1f}" if any("majority" in line for line in mine) else "-"
        cells = [arm, f"{mine[0]['rate']:g}", str(len(mine)), str(accuracy(ours)), voted]
        for other in (BASE, TEXT):
            theirs = verdicts(lines, other)
            comparable = arm in ARMS and arm != other and theirs.shape == ours.shape
            cells.append(difference(ours, theirs).signed() if comparable else "-")
            if other == BASE:
                tests = [f"{mcnemar(a, b):.2g}" for a, b in zip(ours, theirs, strict=True)] if comparable else ["-"]
                cells.append(", ".join(tests))
            else:
                cells.append(as_good(difference(ours, theirs, 0.9), margin) if comparable else "-")
        cells += [f"{mean('entropy'):.3f}", f"{mean('changed_tokens'):.1%}", f"{mean('length'):.0f}"]
        cells += [f"{mean('forget_loss'):.3f}"]
        work = ("trained", "decoded", "tflops")
        cells += [f"{mean(name):,.0f}" for name in work] if arm in ARMS else ["-"] * len(work)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def chart(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the figure: each arm's accuracy with its interval, as an SVG file."""
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in lines if "greedy" in line):
        found = verdicts(lines, arm)
        interval = accuracy(found)
        kind = "base" if arm in ("start", "teacher") else ARMS[arm].stage
        rows.append((kind, arm, dataclasses.asdict(interval) | {"n": found.size}))
    return standalone(interval_chart("Test accuracy", rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="folder or hub id of a pretrained model")
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--teacher_rows", nargs="*", default=[])
    parser.add_argument("--teacher_run", type=Path, help="run folder of a teacher that is trained already")
    parser.add_argument("--work", type=Path, default=Path("runs/real_student"))
    parser.add_argument("--json", type=Path, help="output, a line for each run (default: in the work folder)")
    parser.add_argument("--size", choices=SIZES, default="full")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, help="in place of that of the size")
    parser.add_argument("--arms", nargs="*", choices=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-5, 1e-4])
    parser.add_argument("--dtype", help="of the computation")
    parser.add_argument("--table", action="store_true", help="print the table of the lines that are there, and end")
    options = parser.parse_args(arguments)
    changed = {
        f.name: getattr(options, f.name) for f in dataclasses.fields(Sizes) if getattr(options, f.name) is not None
    }
    sizes = dataclasses.replace(SIZES[options.size], **changed)
    path = options.json or options.work / "results.jsonl"
    if not options.table:
        rows = Rows(options.work / "rows", sizes, options.rows, options.teacher_rows)
        print(f"rows: {rows}", flush=True)
        study = Study(options.student, rows, options.work, path, options.dtype, options.teacher_run)
        write_json(options.work / "study.json", {"student": options.student, "sizes": dataclasses.asdict(sizes)})
        study.prepare()
        for name in options.arms if options.arms is not None else ARMS:
            study.arm(name, options.learning_rates, options.seeds)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    print(table(lines))
    write_text(path.with_suffix(".svg"), chart(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
