"""Compare objectives and contexts on made-up sums: every arm starts from the same SFT checkpoint.

    python benchmarks/ablation.py --size saturated --json benchmarks/results/cpu/ablation_saturated.jsonl

`--arms`, `--learning_rates` and `--steps` run less of it. GRPO here is GhostRespond Policy Optimization, not Group
Relative. A teacher of the student's own shape is trained on many problems, and a student on few (SFT). Each arm then
trains that student for `--steps` updates. Teacher-forced contexts are the text of the training rows. On-policy contexts
are the student's own replies to the same questions or to new ones, and the teacher supplies the ghost token at each
prefix. An update sees about the same number of replies in all arms. Training never sees the held-out sums.

Each arm's learning rate is the best on some held-out questions, by the mean over seeds. The table reports the accuracy
on others. Every finished run is a line of the output file. The script skips finished runs, so it can be stopped at any
time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cotgrpo import (
    ForwardKl,
    Nll,
    Pair,
    Reinforce,
    RewardGradient,
    TrainState,
    jit_step,
    make_grpo_step,
    make_optimizer,
    objectives,
)
from cotgrpo.config import StudentConfig
from cotgrpo.data.batches import make_batches
from cotgrpo.data.questions import Question
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import load_tokenizer, train_tokenizer
from cotgrpo.data.triples import Triple
from cotgrpo.evaluation.accuracy import ExactMatch
from cotgrpo.models import load_pretrained, save_pretrained
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.objectives import GroupRelative
from cotgrpo.quickstart.quickstart import QUICKSTART
from cotgrpo.rollouts.group_relative import GroupRelativeBatches
from cotgrpo.rollouts.on_policy import OnPolicyBatches, make_draw
from cotgrpo.rollouts.rollouts import RolloutPrompt, RolloutSettings
from cotgrpo.rollouts.self_replies import SelfReplyBatches, SelfReplySettings
from cotgrpo.sampling import SamplingSettings, make_sampler
from cotgrpo.teachers.procedural import ProceduralTeacher

SEQ_LEN, PROMPT_COLUMNS = QUICKSTART.data.seq_len, 32
GROUP = 4
"""Number of replies to a question that are compared with each other."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train the student further.

    Attributes:
        objective: objective of one token.
        contexts: "teacher_forced", "on_policy", or "half" of each; "self_reply", the text of the student's own right
            replies; or "group_relative", the student's own replies, graded and compared with each other.
        new_questions: whether on-policy replies answer questions that the student has no text for. Teacher-forced rows
            are then the teacher's text for these, which SFT did not have: the control that separates new questions from
            own contexts. The text of "half" is always that of the training rows.
        corrupted: share of ghost replies with a wrong digit.
        drawn: whether ghosts are drawn from the teacher's distribution, as its text is, instead of its likeliest token.
    """

    objective: Any
    contexts: str
    new_questions: bool = False
    corrupted: float = 0.0
    drawn: bool = False


OBJECTIVES = {
    "nll": Nll(),
    "nll+pair": Pair(),
    "pair": Pair(nll_weight=0.0, pair_weight=1.0),
    "calibrated pair": Pair(beta=0.5, nll_weight=0.0, pair_weight=1.0, negatives="calibrated"),
    "reward gradient": RewardGradient(),
    "reinforce": Reinforce(),
}
"""Objectives that any ghost can serve; `ForwardKl` needs a live one."""
ARMS = {
    f"{name}, {contexts}{', new questions' if new else ''}{', 10 % corrupted' if corrupted else ''}": Arm(
        objective, contexts, new, corrupted
    )
    for corrupted in (0.0, 0.1)
    for new in (False, True)
    for contexts in ("teacher_forced", "on_policy", "half")
    for name, objective in OBJECTIVES.items()
}
ARMS |= {
    f"forward kl, {contexts}{', new questions' if new else ''}": Arm(ForwardKl(), contexts, new)
    for new in (False, True)
    for contexts in ("on_policy", "half")
}
ARMS |= {
    f"{name}, drawn ghosts, on_policy{', new questions' if new else ''}": Arm(objective, "on_policy", new, drawn=True)
    for new in (False, True)
    for name, objective in OBJECTIVES.items()
}
ARMS |= {
    f"{contexts}{', new questions' if new else ''}": Arm(objective, contexts, new)
    for contexts, objective in (("self_reply", Nll()), ("group_relative", GroupRelative()))
    for new in (False, True)
}
SFT = "nll, teacher_forced"
"""Continued SFT."""
MAIN = ("nll, teacher_forced", "nll, on_policy", "nll+pair, teacher_forced", "nll+pair, on_policy")


LARGER = dataclasses.replace(QUICKSTART.student, width=128, num_layers=3, num_heads=8, num_kv_heads=4, mlp_width=384)
"""A student of 0.6 M parameters, for all kinds of problems."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the task is, and how long everything runs.

    Attributes:
        kinds: kinds of problems (`cotgrpo.teachers.procedural.KINDS`), or None for all.
        digits: digits of their numbers.
        student: shape of student and teacher.
        rows: number of the student's training problems.
        new_questions: number of further problems, for the arms that ask new ones.
        sft_steps: updates of the SFT that every arm starts from.
        teacher_rows: number of the teacher's training problems.
        teacher_steps: updates of the teacher.
        steps: updates of an arm.
        packed_rows: rows of a teacher-forced batch.
        replies: replies of an on-policy batch, about as many as the packed rows hold.
        new_tokens: replies are cut off here.
        held_out: numbers of questions to choose the learning rate by, and to report.
    """

    kinds: tuple[str, ...] | None = None
    digits: int = 2
    student: StudentConfig = LARGER
    rows: int = 2_000
    new_questions: int = 4_000
    sft_steps: int = 600
    teacher_rows: int = 30_000
    teacher_steps: int = 3_000
    steps: int = 300
    packed_rows: int = 12
    replies: int = 24
    new_tokens: int = 96
    held_out: tuple[int, int] = (500, 1_000)


FULL = Sizes()
SHORT = Sizes(
    kinds=("column_addition",),
    student=QUICKSTART.student,
    rows=500,
    sft_steps=600,
    teacher_rows=20_000,
    teacher_steps=1_200,
    steps=150,
    packed_rows=6,
    replies=16,
    new_tokens=72,
    held_out=(300, 700),
)
"""One kind of problem and a student of 0.2 M parameters: what two slow cores can do in an hour."""
SATURATED = dataclasses.replace(SHORT, rows=250, sft_steps=2_000, steps=300, replies=12, held_out=(500, 2_000))
"""The quick start's task: few rows, and SFT until they are learned.

The student's own replies to their questions are then the rows' text, word for word.
"""
TINY = dataclasses.replace(
    SHORT,
    rows=60,
    new_questions=40,
    sft_steps=4,
    teacher_rows=100,
    teacher_steps=4,
    steps=2,
    packed_rows=2,
    replies=3,
    held_out=(4, 6),
)
"""Whether the script runs at all."""
SIZES = {"full": FULL, "short": SHORT, "saturated": SATURATED, "tiny": TINY}


@dataclasses.dataclass
class Ablation:
    """The task with its teacher. It trains students and measures them."""

    sizes: Sizes
    work: Path

    def __post_init__(self) -> None:
        sizes, folder = self.sizes, self.work / "teacher"
        draw = lambda seed, count, held_out: ProceduralTeacher(seed, sizes.kinds, sizes.digits, held_out=held_out).draw(
            count
        )
        teacher_rows = draw(1_000, sizes.teacher_rows, False)
        if not (folder / "config.json").is_file():
            tokenizer = train_tokenizer(
                (f"{t.question}\n{t.rationale}\n{t.answer}" for t in teacher_rows), vocab_size=400
            )
            self.template = Template(tokenizer, loss_on="completion")
            self.decoder = sizes.student.decoder(len(tokenizer))
            params = init_params(self.decoder, jax.random.key(1_000))
            batches = self.forced(teacher_rows, 1_000, rows=16)
            params = self.updates(params, Nll(), batches, 3e-3, sizes.teacher_steps, 1_000)[0]
            save_pretrained(folder, self.decoder, params, tokenizer=tokenizer)
        self.template = Template(load_tokenizer(folder), loss_on="completion")
        self.teacher = load_pretrained(folder)
        self.decoder = dataclasses.replace(self.teacher.config, init_scale=sizes.student.init_scale)
        self.train_rows = draw(0, sizes.rows, False)
        known = {row.question for row in self.train_rows}
        others = draw(2_000, sizes.new_questions + sizes.rows, False)
        self.new_rows = [row for row in others if row.question not in known][: sizes.new_questions]
        held_out = draw(0, sum(sizes.held_out), True)
        match = lambda rows: ExactMatch(
            self.decoder, self.template, [asked(row) for row in rows], max_new_tokens=sizes.new_tokens, batch_size=250
        )
        self.validation, self.test = match(held_out[: sizes.held_out[0]]), match(held_out[sizes.held_out[0] :])
        self.draws = {
            (top_k, drawn): jax.jit(make_draw(self.sampler(1.0), self.teacher.student, top_k=top_k, drawn_ghosts=drawn))
            for top_k, drawn in ((0, False), (0, True), (ForwardKl().top_k or 0, False))
        }

    def forced(self, triples: Sequence[Triple], seed: int, rows: int | None = None) -> Any:
        """Return packed teacher-forced batches."""
        examples = [self.template.encode(triple) for triple in triples]
        return make_batches(examples, batch_size=rows or self.sizes.packed_rows, seq_len=SEQ_LEN, seed=seed)

    def on_policy(
        self,
        seed: int,
        rows: Sequence[Triple],
        replies: int,
        forced: Any = None,
        top_k: int = 0,
        drawn: bool = False,
    ) -> OnPolicyBatches:
        """Return batches of the student's own replies to the questions of these rows.

        They carry the teacher's ghosts, likeliest or drawn, and the `top_k` likeliest tokens of its distribution.
        """
        forced_rows = 0 if forced is None else self.sizes.packed_rows // 2
        settings = RolloutSettings(
            replies,
            SEQ_LEN if forced_rows else PROMPT_COLUMNS + self.sizes.new_tokens,
            self.sizes.new_tokens,
            forced_rows,
        )
        return OnPolicyBatches(
            self.draws[top_k, drawn],
            self.teacher.params,
            make_student(self.decoder),
            self.template,
            self.questions(rows),
            settings,
            seed=seed,
            forced=forced,
        )

    def updates(
        self, params: Any, objective: Any, batches: Any, rate: float, steps: int, seed: int
    ) -> tuple[Any, dict[str, float]]:
        """Return the parameters after these updates, and their processor and wall seconds without compilation."""
        tx = make_optimizer(learning_rate=rate, total_steps=steps, warmup_steps=min(20, steps // 2))
        step = jit_step(make_grpo_step(make_student(self.decoder), tx, objective))
        state = TrainState.create(params=params, tx=tx, key=seed)
        clocks, metrics = (0.0, 0.0), {}
        for number in range(steps):
            if hasattr(batches, "set_params"):
                batches.set_params(state.params)
            state, metrics = step(state, next(batches))
            if number == 0:
                jax.block_until_ready(state)
                clocks = time.process_time(), time.perf_counter()
        jax.block_until_ready(state)
        share = steps / max(steps - 1, 1)
        return state.params, {
            "cpu_seconds": share * (time.process_time() - clocks[0]),
            "seconds": share * (time.perf_counter() - clocks[1]),
            "entropy": metrics["entropy"].mean(),
        }

    def started(self, seed: int) -> Any:
        """Return the student after SFT, which all arms of a seed start from. The work folder keeps it."""
        folder = self.work / f"sft_{seed}"
        if not (folder / "config.json").is_file():
            first = init_params(self.decoder, jax.random.key(seed))
            params, _ = self.updates(first, Nll(), self.forced(self.train_rows, seed), 3e-3, self.sizes.sft_steps, seed)
            save_pretrained(folder, self.decoder, params, tokenizer=self.template.tokenizer)
        return load_pretrained(folder).params

    def run(self, arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """Train one arm at one learning rate from one seed's student; return the row of the output file."""
        how = ARMS[arm]
        params, cost = self.updates(self.started(seed), how.objective, self.batches(how, 100 + seed), rate, steps, seed)
        return {"arm": arm, "rate": rate, "seed": seed, "steps": steps} | cost | self.measure(params)

    def batches(self, how: Arm, seed: int) -> Any:
        """Return what an arm learns from."""
        sizes = self.sizes
        rows = self.new_rows if how.new_questions else self.train_rows
        if how.contexts == "teacher_forced":
            return self.forced(corrupt(rows, how.corrupted, seed), seed)
        if how.contexts == "self_reply":
            return self.self_replies(rows, seed)
        if how.contexts == "group_relative":
            settings = RolloutSettings(sizes.replies, PROMPT_COLUMNS + sizes.new_tokens, sizes.new_tokens)
            return GroupRelativeBatches(
                jax.jit(self.sampler(1.0)), self.template, self.questions(rows), settings, seed=seed, group=GROUP
            )
        half = how.contexts == "half"
        text = corrupt(self.train_rows, how.corrupted, seed)
        forced = self.forced(text, seed, sizes.packed_rows // 2) if half else None
        top_k = objectives.top_k(how.objective)
        batches = self.on_policy(seed, rows, sizes.replies // (2 if half else 1), forced, top_k, how.drawn)
        if how.corrupted:
            batches.draw = jax.jit(corrupting(batches.draw, how.corrupted, self.template))
        return batches

    def sampler(self, temperature: float) -> Any:
        settings = SamplingSettings(
            self.sizes.new_tokens, self.template.stop_ids, temperature=temperature, pad_id=self.template.pad_id
        )
        return make_sampler(self.decoder, settings)

    def questions(self, rows: Sequence[Triple]) -> list[RolloutPrompt]:
        return [RolloutPrompt(asked(row), self.template.prompt(row.question)) for row in rows]

    def self_replies(self, rows: Sequence[Triple], seed: int) -> SelfReplyBatches:
        """Return batches of the student's best right reply to each of the questions."""
        settings = SelfReplySettings(
            num_generations=GROUP,
            questions=128,
            refresh_every=50,
            batch_size=self.sizes.packed_rows,
            seq_len=SEQ_LEN,
            prompt_columns=PROMPT_COLUMNS,
            packing=True,
        )
        samplers = [jax.jit(self.sampler(temperature)) for temperature in (0.7, 1.0)]
        folder = tempfile.mkdtemp(dir=self.work)
        return SelfReplyBatches(samplers, self.template, rows, settings, Path(folder), seed, lambda params: params)

    def corrections(self, params: Any, rows: Sequence[Triple]) -> dict[str, float]:
        """Count what a live ghost corrects in this student's replies.

        `per_reply` is the number of tokens for which the ghost proposes another one. After the first of these in a
        reply, `sums` is the number of digits that follow `a+b=`, and `sums_right` is how many of them the ghost gets
        right.
        """
        batches, found = self.on_policy(7, rows, 256), dict.fromkeys(("per_reply", "sums", "sums_right"), 0.0)
        batches.set_params(params)
        batch = jax.device_get(next(batches))
        decode = self.template.tokenizer.decode
        for tokens, ghosts, mask in zip(batch.tokens, batch.ghost_tokens, batch.loss_mask, strict=True):
            columns = [int(t) for t in mask.nonzero()[0]]
            other = [t for t in columns if ghosts[t] != tokens[t + 1]]
            found["per_reply"] += len(other) / len(batch.tokens)
            for t in columns if other else ():
                line = re.search(r"(?:^|\n)(\d)\+(\d)(?:\+(\d))?=$", str(decode(tokens[columns[0] + 1 : t + 1])))
                if line and t > other[0]:
                    total = sum(int(digit) for digit in line.groups() if digit)
                    found["sums"] += 1
                    found["sums_right"] += decode(ghosts[t : t + 1]) == str(total)[0]
        return found

    def measure(self, params: Any) -> dict[str, float]:
        return {"validation": self.validation(params).value, "test": self.test(params).value}


def asked(triple: Triple) -> Question:
    """Return the row as a question with its right answer."""
    return Question(triple.question, triple.answer)


def corrupt(triples: Sequence[Triple], share: float, seed: int) -> list[Triple]:
    """Change one digit of rationale or answer in this share of the rows.

    Later lines keep the numbers that they had.
    """
    rng = random.Random(seed)
    found = []
    for triple in triples:
        parts = [triple.rationale, triple.answer]
        digits = [(p, i) for p, part in enumerate(parts) for i, letter in enumerate(part) if letter.isdigit()]
        if rng.random() < share:
            p, i = rng.choice(digits)
            other = (int(parts[p][i]) + rng.randrange(1, 10)) % 10
            parts[p] = f"{parts[p][:i]}{other}{parts[p][i + 1 :]}"
        found.append(dataclasses.replace(triple, rationale=parts[0], answer=parts[1]))
    return found


def corrupting(draw: Any, share: float, template: Template) -> Any:
    """Wrap `draw`: this share of the student's replies gets one wrong digit among its ghost tokens."""
    digits = jnp.asarray([template.ids(str(digit))[-1] for digit in range(10)])

    def corrupted(models: Any, rows: Any, key: Any) -> Any:
        batch, replies, log_probs = draw(models, rows, key)
        place, which, other = jax.random.split(jax.random.fold_in(key, 1), 3)
        ghost_BT = batch.ghost_tokens
        own_B1 = jnp.arange(ghost_BT.shape[0])[:, None] < rows[0].tokens.shape[0]
        is_digit_BT = jnp.isin(ghost_BT, digits) & (batch.loss_mask != 0) & own_B1
        rank_BT = jnp.where(is_digit_BT, jax.random.uniform(place, ghost_BT.shape), 0.0)
        hit_B1 = jax.random.uniform(which, own_B1.shape) < share
        hit_BT = hit_B1 & (rank_BT > 0) & (rank_BT == jnp.max(rank_BT, axis=1, keepdims=True))
        value_BT = jnp.argmax(ghost_BT[..., None] == digits[None, None, :], axis=-1)
        changed_BT = digits[(value_BT + jax.random.randint(other, own_B1.shape, 1, 10)) % 10]
        return batch.replace(ghost_tokens=jnp.where(hit_BT, changed_BT, ghost_BT)), replies, log_probs

    return corrupted


def at_best_rate(rows: Sequence[dict[str, Any]], arm: str, steps: int) -> list[dict[str, Any]]:
    """Return an arm's runs at its best learning rate on the validation questions.

    Only rates that all its seeds have count.
    """
    mine = [row for row in rows if row["arm"] == arm and row["steps"] == steps]
    by_rate = [[row for row in mine if row["rate"] == rate] for rate in sorted({row["rate"] for row in mine})]
    most = max(map(len, by_rate), default=0)
    complete = [runs for runs in by_rate if len(runs) == most]
    return max(complete, key=lambda runs: statistics.mean(run["validation"] for run in runs), default=[])


def spread(values: Sequence[float], sign: str = "") -> str:
    """Return the mean and, for several values, the standard deviation, in percent."""
    deviation = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.1f}{deviation}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of arms, each at its best learning rate.

    A row has the gain over SFT continued for as many updates, seed by seed, and the result at every rate.
    """
    lines = [
        "| arm | steps | learning rate | seeds | held-out accuracy, % | against SFT continued | entropy, nats "
        "| processor seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for steps in sorted({row["steps"] for row in rows if row["arm"] == arm}):
            runs = at_best_rate(rows, arm, steps)
            sft = {run["seed"]: run["test"] for run in at_best_rate(rows, SFT, steps)}
            ahead = [run["test"] - sft[run["seed"]] for run in runs if run["seed"] in sft]
            mean = lambda name, runs=runs: statistics.mean(run[name] for run in runs)
            of_rate: dict[float, list[float]] = {}
            for row in rows:
                if row["arm"] == arm and row["steps"] == steps:
                    of_rate.setdefault(row["rate"], []).append(row["test"])
            every = ", ".join(f"{rate:g}: {100 * statistics.mean(of_rate[rate]):.1f}" for rate in sorted(of_rate))
            lines.append(
                f"| {arm} | {steps} | {runs[0]['rate']:g} ({every}) | {len(runs)} "
                f"| {spread([run['test'] for run in runs])} | {spread(ahead, '+') if ahead and arm != SFT else '-'} "
                f"| {mean('entropy'):.3f} | {mean('cpu_seconds'):.0f} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--quick", action="store_true", help="the short size, the main arms, one seed")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"of {'; '.join(ARMS)}".replace("%", "%%")
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="updates of an arm")
    parser.add_argument(
        "--rows",
        type=int,
        help="number of the student's training problems (default: the size's); has its own work folder",
    )
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-3, 4e-3, 1e-3, 5e-4])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/ablation"), help="folder of the teacher and the SFT students"
    )
    parser.add_argument("--json", type=Path, help="output, one finished run a line (default: in the work folder)")
    options = parser.parse_args(arguments)
    name = "short" if options.quick else options.size
    sizes, work = SIZES[name], options.work / name
    if options.rows:
        sizes, work = dataclasses.replace(sizes, rows=options.rows), options.work / f"{name}_{options.rows}"
    arms = options.arms or (MAIN if options.quick else ARMS)
    seeds = 1 if options.quick else options.seeds
    steps = options.steps or sizes.steps
    work.mkdir(parents=True, exist_ok=True)
    path = options.json or work / "ablation.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    done = {(row["arm"], row["rate"], row["seed"], row["steps"]) for row in rows}
    ablation = Ablation(sizes, work)
    wanted = [("teacher", 0.0, 0, 0), *(("before", 0.0, seed, 0) for seed in range(seeds))]
    wanted += [(arm, rate, seed, steps) for rate in options.learning_rates for seed in range(seeds) for arm in arms]
    for arm, rate, seed, count in wanted:
        if (arm, rate, seed, count) in done:
            continue
        if arm in ARMS:
            row = ablation.run(arm, rate, seed, count)
        else:
            params = ablation.teacher.params if arm == "teacher" else ablation.started(seed)
            costs = dict.fromkeys(("cpu_seconds", "seconds", "entropy"), 0.0)
            row = {"arm": arm, "rate": rate, "seed": seed, "steps": count} | costs | ablation.measure(params)
            if arm == "before":
                rows_of = {"own questions": ablation.train_rows, "new questions": ablation.new_rows}
                row["corrections"] = {name: ablation.corrections(params, asked) for name, asked in rows_of.items()}
        rows.append(row)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
