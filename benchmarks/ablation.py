"""What the choice of objective and of contexts is worth: every arm from the same SFT checkpoint, on the quick start's task, seeds and learning rates.

    python benchmarks/ablation.py --json benchmarks/results/cpu/ablation.jsonl       # --quick: a form of some minutes

GRPO here is GhostRespond Policy Optimization, not Group Relative. A teacher of the student's own shape is trained on many problems, a student on few
(SFT), and then each arm trains that student on for `--steps` updates: teacher-forced (the contexts are the text of the training rows) or on-policy
(the contexts are the student's own replies to the same questions, and the teacher says the ghost token at each prefix). An update sees the same number of
replies in all arms, about. Held-out sums occur in nobody's training. Each arm's learning rate is the one that does best on some held-out
questions, mean over seeds; what is reported is the accuracy on others.

Every finished run is a line of the output file, and a run that is there is not repeated: stop the script whenever you like.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cotgrpo import Nll, Pair, Reinforce, RewardGradient, TrainState, jit_step, make_grpo_step, make_optimizer
from cotgrpo.config import StudentConfig
from cotgrpo.data.batches import make_batches
from cotgrpo.data.questions import Question
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import load_tokenizer, train_tokenizer
from cotgrpo.data.triples import Triple
from cotgrpo.ghosts.procedural import ProceduralTeacher
from cotgrpo.models import load_pretrained, save_pretrained
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.run.evaluate import ExactMatch
from cotgrpo.run.on_policy import OnPolicyBatches, make_draw
from cotgrpo.run.quickstart import QUICKSTART
from cotgrpo.run.rollouts import Asked, RolloutSettings
from cotgrpo.sampling import SamplingSettings, make_sampler

SEQ_LEN, PROMPT_COLUMNS = QUICKSTART.data.seq_len, 32


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train on.

    Attributes:
        objective: of one token.
        contexts: "teacher_forced", "on_policy", or "half" of each.
        corrupted: the share of ghost replies with a wrong digit.
    """

    objective: Any
    contexts: str
    corrupted: float = 0.0


OBJECTIVES = {
    "nll": Nll(),
    "nll+pair": Pair(),
    "pair": Pair(nll_weight=0.0, pair_weight=1.0),
    "calibrated pair": Pair(beta=0.5, nll_weight=0.0, pair_weight=1.0, negatives="calibrated"),
    "reward gradient": RewardGradient(),
    "reinforce": Reinforce(),
}
ARMS = {
    f"{name}, {contexts}{', 10 % corrupted' if corrupted else ''}": Arm(objective, contexts, corrupted)
    for corrupted in (0.0, 0.1)
    for contexts in ("teacher_forced", "on_policy", "half")
    for name, objective in OBJECTIVES.items()
}
"""Continued SFT is "nll, teacher_forced"."""
MAIN = ("nll, teacher_forced", "nll, on_policy", "nll+pair, teacher_forced", "nll+pair, on_policy")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the task is, and how long everything runs.

    Attributes:
        kinds: of problems (`cotgrpo.ghosts.procedural.KINDS`), or None for all.
        student: the shape of student and teacher.
        rows: the student's training problems.
        sft_steps: updates of the SFT that every arm starts from.
        teacher_rows: the teacher's training problems.
        teacher_steps: its updates.
        steps: updates of an arm.
        packed_rows: of a teacher-forced batch.
        replies: of an on-policy batch, about as many as there are in the packed rows.
        new_tokens: replies are cut off here.
        held_out: questions to choose the learning rate by, and others to report.
    """

    kinds: tuple[str, ...] | None = None
    student: StudentConfig = QUICKSTART.student
    rows: int = 2_000
    sft_steps: int = 600
    teacher_rows: int = 30_000
    teacher_steps: int = 3_000
    steps: int = 300
    packed_rows: int = 12
    replies: int = 24
    new_tokens: int = QUICKSTART.eval.max_new_tokens
    held_out: tuple[int, int] = (500, 1_000)


FULL = Sizes()
SHORT = Sizes(
    kinds=("column_addition",),
    student=dataclasses.replace(QUICKSTART.student, width=96, num_layers=2, num_heads=6, num_kv_heads=3, mlp_width=256),
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
TINY = dataclasses.replace(
    SHORT, rows=60, sft_steps=4, teacher_rows=100, teacher_steps=4, steps=2, packed_rows=2, replies=3, held_out=(4, 6)
)
"""Whether the script runs at all."""


@dataclasses.dataclass
class Ablation:
    """The task with its teacher; trains students and measures them."""

    sizes: Sizes
    work: Path

    def __post_init__(self) -> None:
        sizes, folder = self.sizes, self.work / "teacher"
        draw = lambda seed, count, held_out: ProceduralTeacher(seed, sizes.kinds, held_out=held_out).draw(count)
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
        held_out = draw(0, sum(sizes.held_out), True)
        match = lambda rows: ExactMatch(
            self.decoder, self.template, [asked(row) for row in rows], max_new_tokens=sizes.new_tokens, batch_size=250
        )
        self.validation, self.test = match(held_out[: sizes.held_out[0]]), match(held_out[sizes.held_out[0] :])
        sampling = SamplingSettings(
            sizes.new_tokens, self.template.stop_ids, temperature=1.0, pad_id=self.template.pad_id
        )
        self.draw = jax.jit(make_draw(make_sampler(self.decoder, sampling), self.teacher.student))

    def forced(self, triples: Sequence[Triple], seed: int, rows: int | None = None) -> Any:
        """Packed teacher-forced batches."""
        examples = [self.template.encode(triple) for triple in triples]
        return make_batches(examples, batch_size=rows or self.sizes.packed_rows, seq_len=SEQ_LEN, seed=seed)

    def on_policy(self, seed: int, replies: int, forced: Any = None) -> OnPolicyBatches:
        """Batches of the student's own replies with the teacher's ghosts."""
        forced_rows = 0 if forced is None else self.sizes.packed_rows // 2
        settings = RolloutSettings(
            replies,
            SEQ_LEN if forced_rows else PROMPT_COLUMNS + self.sizes.new_tokens,
            self.sizes.new_tokens,
            forced_rows,
        )
        return OnPolicyBatches(
            self.draw,
            self.teacher.params,
            make_student(self.decoder),
            self.template,
            [Asked(asked(triple), self.template.prompt(triple.question)) for triple in self.train_rows],
            settings,
            seed=seed,
            forced=forced,
        )

    def updates(
        self, params: Any, objective: Any, batches: Any, rate: float, steps: int, seed: int
    ) -> tuple[Any, dict[str, float]]:
        """The parameters after so many updates, and what they cost: processor seconds and wall seconds, compilation left out."""
        tx = make_optimizer(learning_rate=rate, total_steps=steps, warmup_steps=min(20, steps // 2))
        step = jit_step(make_grpo_step(make_student(self.decoder), tx, objective))
        state = TrainState.create(params=jax.tree.map(jnp.copy, params), tx=tx, key=seed)
        clocks, metrics = (0.0, 0.0), {}
        follow = getattr(batches, "follow", lambda params: None)
        for number in range(steps):
            follow(state.params)
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
        """The student after SFT, which all arms of a seed start from; kept in the work folder."""
        folder = self.work / f"sft_{seed}"
        if not (folder / "config.json").is_file():
            first = init_params(self.decoder, jax.random.key(seed))
            params, _ = self.updates(first, Nll(), self.forced(self.train_rows, seed), 3e-3, self.sizes.sft_steps, seed)
            save_pretrained(folder, self.decoder, params, tokenizer=self.template.tokenizer)
        return load_pretrained(folder).params

    def run(self, arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """One arm at one learning rate from one seed's student: the row of the output file."""
        how, sizes = ARMS[arm], self.sizes
        rows = corrupt(self.train_rows, how.corrupted, seed)
        batches = self.forced(rows, 100 + seed) if how.contexts != "on_policy" else None
        if how.contexts != "teacher_forced":
            half = how.contexts == "half"
            forced = self.forced(rows, 100 + seed, sizes.packed_rows // 2) if half else None
            batches = self.on_policy(100 + seed, sizes.replies // (2 if half else 1), forced)
            if how.corrupted:
                batches.draw = jax.jit(corrupting(self.draw, how.corrupted, self.template))
        params, cost = self.updates(self.started(seed), how.objective, batches, rate, steps, seed)
        return {"arm": arm, "rate": rate, "seed": seed, "steps": steps} | cost | self.measure(params)

    def measure(self, params: Any) -> dict[str, float]:
        return {"validation": self.validation(params).value, "test": self.test(params).value}


def asked(triple: Triple) -> Question:
    """The row as a question with its right answer."""
    return Question(triple.question, triple.answer)


def corrupt(triples: Sequence[Triple], share: float, seed: int) -> list[Triple]:
    """The rows, of which this share has one digit of rationale or answer changed; the lines behind it stay as they were."""
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
    """`draw`, after which this share of the student's replies has one digit among its ghost tokens changed."""
    digits = jnp.asarray([template.ids(str(digit))[-1] for digit in range(10)])

    def corrupted(params: Any, teacher_params: Any, prompts: Any, reads: Any, forced: Any, key: Any) -> Any:
        batch, replies, log_probs = draw(params, teacher_params, prompts, reads, forced, key)
        place, which, other = jax.random.split(jax.random.fold_in(key, 1), 3)
        ghost_BT = batch.ghost_tokens
        own_B1 = jnp.arange(ghost_BT.shape[0])[:, None] < prompts.tokens.shape[0]
        is_digit_BT = jnp.isin(ghost_BT, digits) & (batch.loss_mask != 0) & own_B1
        rank_BT = jnp.where(is_digit_BT, jax.random.uniform(place, ghost_BT.shape), 0.0)
        hit_B1 = jax.random.uniform(which, own_B1.shape) < share
        hit_BT = hit_B1 & (rank_BT > 0) & (rank_BT == jnp.max(rank_BT, axis=1, keepdims=True))
        value_BT = jnp.argmax(ghost_BT[..., None] == digits[None, None, :], axis=-1)
        changed_BT = digits[(value_BT + jax.random.randint(other, own_B1.shape, 1, 10)) % 10]
        return batch.replace(ghost_tokens=jnp.where(hit_BT, changed_BT, ghost_BT)), replies, log_probs

    return corrupted


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Each arm at its best learning rate, and then at every one."""
    lines = [
        "| arm | steps | learning rate | seeds | held-out accuracy, % | entropy, nats | processor seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for steps in sorted({row["steps"] for row in rows if row["arm"] == arm}):
            mine = [row for row in rows if row["arm"] == arm and row["steps"] == steps]
            by_rate = {rate: [r for r in mine if r["rate"] == rate] for rate in sorted({r["rate"] for r in mine})}
            most = max(len(runs) for runs in by_rate.values())
            complete = {rate: runs for rate, runs in by_rate.items() if len(runs) == most}
            best = max(complete, key=lambda rate: statistics.mean(r["validation"] for r in complete[rate]))
            runs = complete[best]
            mean = lambda name, runs=runs: statistics.mean(run[name] for run in runs)
            scores = [100 * run["test"] for run in runs]
            spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
            others = ", ".join(
                f"{r:g}: {100 * statistics.mean(x['test'] for x in runs):.1f}" for r, runs in by_rate.items()
            )
            lines.append(
                f"| {arm} | {steps} | {best:g} ({others}) | {len(runs)} | {statistics.mean(scores):.1f} +- {spread:.1f} "
                f"| {mean('entropy'):.3f} | {mean('cpu_seconds'):.0f} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "short", "tiny"), default="full", help="; ".join(SIZES))
    parser.add_argument("--quick", action="store_true", help="the short size, the main arms, one seed")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"of {'; '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="updates of an arm")
    parser.add_argument(
        "--rows", type=int, help="the student's training problems, instead of the size's; has a work folder of its own"
    )
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-3, 4e-3, 1e-3, 5e-4])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/ablation"), help="keeps the teacher and the SFT students"
    )
    parser.add_argument("--json", type=Path, help="the finished runs, a line each; default: in the work folder")
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
        rows.append(row)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    print(table(rows))
    return 0


SIZES = {"full": FULL, "short": SHORT, "tiny": TINY}

if __name__ == "__main__":
    raise SystemExit(main())
