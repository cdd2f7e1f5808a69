"""Measure the student's own replies: how fast they are written, and how long the device waits for the host.

    python benchmarks/rollouts.py --json benchmarks/results/cpu/rollouts.json

The sampler runs on random weights. Any token may end a reply, so lengths are very mixed, a quarter of the longest on
average. It writes all prompts at once, then in batches of `--slots` prompts, then in `--slots` slots that take the next
prompt when their reply has ended. The batches use other random numbers; the slots write the same replies as all at
once.

The loop is that of on-policy training on the quick start's task, with a live ghost and with the group-relative
objective (replies when they are needed, or one update ahead). The device's idle time is the time of an update without
its parts, each measured alone. GRPO here is GhostRespond Policy Optimization, not Group Relative. The script needs the
whole package.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cotgrpo import Pair, TrainState, jit_step, make_grpo_step, make_optimizer
from cotgrpo.config import StudentConfig
from cotgrpo.data.questions import Question
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.objectives import GroupRelative, Objective
from cotgrpo.rollouts.group_relative import GroupRelativeBatches
from cotgrpo.rollouts.on_policy import OnPolicyBatches, make_draw
from cotgrpo.rollouts.rollouts import RolloutPrompt, Rollouts, RolloutSettings, grade_replies
from cotgrpo.sampling import Prompts, SamplingSettings, make_sampler, pad_prompts
from cotgrpo.teachers.procedural import ProceduralTeacher
from cotgrpo.types import Params

VOCAB, GROUP = 512, 4


def student_of(args: argparse.Namespace, vocab: int) -> DecoderConfig:
    heads = max(args.width // 64, 1)
    shape = StudentConfig(
        width=args.width,
        num_layers=args.layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        mlp_width=3 * args.width,
    )
    return shape.decoder(vocab)


def fastest(repeats: int, call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the least seconds of a call after compilation, and what it returned."""
    result, times = jax.block_until_ready(call()), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times), result


def sampler_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for each way to write the replies to all prompts."""
    config = student_of(args, VOCAB)
    params, key = init_params(config, jax.random.key(0)), jax.random.key(1)
    rng = np.random.default_rng(0)
    lengths = rng.integers(args.prompt // 4, args.prompt + 1, args.prompts)
    prompts = pad_prompts([rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths], length=args.prompt)
    ends = tuple(range(max(4 * VOCAB // args.new_tokens, 1)))
    settings = SamplingSettings(args.new_tokens, eos_ids=ends, temperature=1.0)

    def row(kind: str, width: int, slots: int | None, parts: list[Prompts]) -> dict[str, Any]:
        sample = jax.jit(make_sampler(config, settings, decode_batch_size=slots))
        keys = [jax.random.fold_in(key, number) for number in range(len(parts))]
        seconds, replies = fastest(
            args.repeats, lambda: [sample(params, *both) for both in zip(parts, keys, strict=True)]
        )
        memory = sample.lower(params, parts[0], key).compile().memory_analysis()
        lengths = np.concatenate([reply.lengths for reply in replies])
        return {
            "kind": kind,
            "at_a_time": width,
            "seconds": seconds,
            "tokens_per_sec": float(lengths.sum()) / seconds,
            "mean_length": float(lengths.mean()),
            "longest": int(lengths.max()),
            "temp_bytes": None if memory is None else memory.temp_size_in_bytes,
        }

    found = [row("all at once", args.prompts, None, [prompts])]
    for slots in args.slots:
        cut = lambda start, width: jax.tree.map(lambda x: x[start : start + width], prompts)
        found.append(row("batches", slots, None, [cut(start, slots) for start in range(0, args.prompts, slots)]))
        found.append(row("slots", slots, slots, [prompts]))
    return found


def loop_row(
    name: str,
    batches: Rollouts,
    objective: Objective,
    config: DecoderConfig,
    params: Params,
    args: argparse.Namespace,
    prefetch: bool = False,
) -> dict[str, Any]:
    """Measure the seconds of an update in a loop that waits no more than it must, and those of its parts alone.

    With `prefetch`, the loop's replies are written one update ahead.
    """
    tx = make_optimizer(learning_rate=1e-4, total_steps=1_000)
    step = jit_step(make_grpo_step(make_student(config), tx, objective))
    state = TrainState.create(params=jax.tree.map(np.array, params), tx=tx, key=0)
    batches.set_params(params)
    drawing = fastest(args.repeats, lambda: next(batches))[0]
    judging = 0.0
    if isinstance(batches, GroupRelativeBatches):
        asked = batches.prompts_for(0)
        written = jax.device_get(batches.sample(params, batches.padded(asked), batches.key_of(0)))
        judging = fastest(args.repeats, lambda: grade_replies(batches.template, asked, written))[0]
        drawing -= judging
    batch, alone = jax.block_until_ready(next(batches)), []
    for number in range(args.repeats + 1):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state, batch)[0])
        alone += [time.perf_counter() - start] * (number > 0)
    if prefetch:
        assert isinstance(batches, GroupRelativeBatches)
        batches.prefetch = True
    batches.set_params(state.params)
    batch = jax.block_until_ready(next(batches))
    start = time.perf_counter()
    for _ in range(args.updates):
        state, _ = step(state, batch)
        batches.observed()
        batches.set_params(state.params)
        batch = next(batches)
    jax.block_until_ready(batch)
    update = (time.perf_counter() - start) / args.updates
    busy = drawing + min(alone)
    return {
        "kind": name,
        "update_s": update,
        "drawing_s": drawing,
        "step_s": busy - drawing,
        "judging_s": judging,
        "idle": 1 - busy / update,
    }


def loop_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the loop with a live ghost (the student's own likeliest token) and with group-relative replies."""
    triples = ProceduralTeacher(seed=0).draw(500)
    tokenizer = train_tokenizer((f"{t.question}\n{t.rationale}\n{t.answer}" for t in triples), vocab_size=VOCAB)
    template = Template(tokenizer, loss_on="completion")
    config = student_of(args, len(tokenizer))
    params, student = init_params(config, jax.random.key(0)), make_student(config)
    sampler = make_sampler(config, SamplingSettings(args.new_tokens, template.stop_ids, temperature=1.0))
    asked = [
        RolloutPrompt(Question(t.question, t.answer, t, t.source, t.system), template.prompt(t.question))
        for t in triples
    ]
    settings = RolloutSettings(args.prompts, 64 + args.new_tokens, args.new_tokens)
    live = OnPolicyBatches(jax.jit(make_draw(sampler, student)), params, student, template, asked, settings, seed=0)
    group = GroupRelativeBatches(jax.jit(sampler), template, asked, settings, seed=0, group=GROUP)
    return [
        loop_row("live ghost", live, Pair(), config, params, args),
        loop_row("group_relative", group, GroupRelative(), config, params, args),
        loop_row("group_relative, ahead", group, GroupRelative(), config, params, args, prefetch=True),
    ]


def table(result: dict[str, Any]) -> str:
    lines = ["| replies | at a time | seconds | tokens/s | temporary memory |", "|---|---|---|---|---|"]
    for row in result["sampler"]:
        memory = "" if row["temp_bytes"] is None else f"{row['temp_bytes'] / 1e6:.1f} MB"
        lines.append(
            f"| {row['kind']} | {row['at_a_time']} | {row['seconds']:.2f} | {row['tokens_per_sec']:,.0f} | {memory} |"
        )
    lines += ["", "| loop | update s | drawing s | step s | judging s | device idle |", "|---|---|---|---|---|---|"]
    for row in result["loop"]:
        times = " | ".join(f"{row[f'{name}_s']:.3f}" for name in ("update", "drawing", "step", "judging"))
        lines.append(f"| {row['kind']} | {times} | {row['idle']:.1%} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=64, help="number of replies, a multiple of 4")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the longest prompt")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens of the longest reply")
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    device = {"device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "jax": jax.__version__}
    result = device | settings | {"sampler": sampler_rows(args), "loop": loop_rows(args)}
    print(table(result))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
