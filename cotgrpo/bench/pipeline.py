"""What stands around the step: the student's own replies, the input pipeline, checkpoints.

`data` needs grain, tokenizers and transformers, `checkpoint` needs orbax: they are imported where they are used.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cotgrpo.accelerators.mfu import matrix_rate
from cotgrpo.accelerators.roofline import Work
from cotgrpo.bench.measure import Times, compiled, in_turn, ratio
from cotgrpo.bench.steps import Running
from cotgrpo.bench.workload import random_batch
from cotgrpo.ghosts.live import live_ghosts
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import make_student
from cotgrpo.sampling import Prompts, SamplingSettings, make_sampler


def measure_on_policy(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """A GRPO update on the student's own replies, in its three parts: rollout, the live ghost's forward pass, the step. The teacher is another student."""
    running, student = Running(config), make_student(config)
    teacher_params = jax.tree.map(jnp.copy, running.state.params)
    columns = args.seq - args.new_tokens
    if columns < 1:
        from cotgrpo.data.triples import DataError

        raise DataError(
            f"--seq {args.seq} is prompt and reply: it must be above --new-tokens, which is {args.new_tokens}."
        )
    ids = random_batch(config, args.batch, columns).tokens
    prompts = Prompts(tokens=ids, lengths=jnp.full((args.batch,), columns, jnp.int32))
    settings = SamplingSettings(max_new_tokens=args.new_tokens, temperature=1.0)
    key = jax.random.key(0)
    sample, _ = compiled(jax.jit(make_sampler(config, settings)), running.state.params, prompts, key)
    replies = sample(running.state.params, prompts, key)
    ask = jax.jit(lambda params, replies: live_ghosts(student, params, prompts, replies))
    ghosts, _ = compiled(ask, teacher_params, replies)
    batch = ghosts(teacher_params, replies)
    step, _ = running.step("grpo", batch)
    runs = {
        "rollout": lambda: sample(running.state.params, prompts, key),
        "ghost": lambda: ghosts(teacher_params, replies),
        "step": lambda: step(batch),
    }
    times = in_turn(runs, args.repeats, args.warmup)
    together = Times([sum(parts) for parts in zip(*(times[name].seconds for name in runs), strict=True)])
    together.cpu_seconds = [sum(parts) for parts in zip(*(times[name].cpu_seconds for name in runs), strict=True)]
    whole = together.median
    tokens = {"rollout": args.batch * args.new_tokens, "ghost": args.batch * args.seq, "step": args.batch * args.seq}
    share = args.new_tokens / args.seq
    flops = Work(config, args.batch * args.seq, args.seq, supervised=share).model_flops
    rows = [
        {"part": name}
        | found.row()
        | {"share": found.median / whole, "tokens_per_sec": tokens.get(name, tokens["step"]) / found.median}
        for name, found in (times | {"together": together}).items()
    ]
    return {"rows": rows, "step_mfu": flops / times["step"].median / matrix_rate(args.dtype)}


def measure_data(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Steps on packed real text from the Grain pipeline, as the host loop feeds them, beside the same step on one constant batch.

    Blocks of steps take turns. In a block nothing waits for the device but its end, so the next batch is made while the device works, as in training.
    """
    from cotgrpo.data.batches import make_batches, make_examples, packing_efficiency
    from cotgrpo.data.template import Template
    from cotgrpo.data.tokenizer import train_tokenizer
    from cotgrpo.data.triples import read_triples
    from cotgrpo.teachers.procedural import ProceduralTeacher

    triples = read_triples(args.rows)[0] if args.rows else ProceduralTeacher(seed=0).draw(2_000)
    texts = (f"{t.question}\n{t.rationale}\n{t.answer}" for t in triples)
    start = time.perf_counter()
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    trained = time.perf_counter()
    examples, report = make_examples(triples, Template(tokenizer), args.seq, too_long="drop")
    tokenized = time.perf_counter()
    sizes = {"batch_size": args.batch, "seq_len": args.seq}
    once = list(make_batches(examples, **sizes, num_epochs=1))
    packed = time.perf_counter()
    running = Running(config)
    batches = make_batches(examples, **sizes)
    constant = next(batches)
    step, _ = running.step("sft", constant)
    host = []
    for _ in range(args.steps * 4):
        began = time.perf_counter()
        next(batches)
        host.append(time.perf_counter() - began)

    def block(real: bool) -> Any:
        batch = constant
        for _ in range(args.steps):
            out = step(jax.device_put(batch))
            batch = next(batches) if real else constant
        return out

    times = in_turn({"constant": lambda: block(False), "real": lambda: block(True)}, args.repeats, args.warmup)
    efficiency = packing_efficiency(once[:-1] or once)  # the last batch is filled up with empty rows
    padded = args.batch * args.seq * args.steps
    rows = [
        {"batches": name}
        | {k: v / args.steps for k, v in found.row().items()}
        | {"padded_tokens_per_sec": padded / found.median, "tokens_per_sec": efficiency * padded / found.median}
        for name, found in times.items()
    ]
    return {
        "rows": rows,
        "real_over_constant": ratio(times["real"], times["constant"]),
        "packing_efficiency": efficiency,
        "rows_of": Path(args.rows).name if args.rows else "made-up sums",
        "documents": len(examples),
        "left_out": report.to_dict(),
        "host_seconds_a_batch": statistics.median(host),
        "seconds": {
            "tokenizer": trained - start,
            "tokenize": tokenized - trained,
            "pack_one_epoch": packed - tokenized,
        },
    }


def data_lines(result: dict[str, Any]) -> list[str]:
    """What `measure_data` found, in words."""
    found = result["real_over_constant"]
    low, high = found["range"]
    return [
        f"real / constant: {found['median_of_pairs']:.3f} (median of pairs; {low:.3f} to {high:.3f}); the host makes a batch in "
        f"{1e3 * result['host_seconds_a_batch']:.2f} ms",
        f"packing efficiency {result['packing_efficiency']:.2%} over {result['documents']:,} documents",
    ]


def measure_checkpoint(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Saving and restoring the whole train state: how long the loop waits, how long until it is on disk, how long a restore takes."""
    from cotgrpo.checkpoints.manager import Checkpoints

    state = Running(config).state
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    parts: dict[str, Times] = {"save, the loop waits": Times(), "save, until on disk": Times(), "restore": Times()}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1)
        for step in range(args.repeats):
            start = time.perf_counter(), time.process_time()
            checkpoints.save(step, state, {})
            waited = time.perf_counter(), time.process_time()
            checkpoints.wait()
            saved = time.perf_counter(), time.process_time()
            jax.block_until_ready(checkpoints.restore_latest(state))
            restored = time.perf_counter(), time.process_time()
            for found, begin, end in zip(parts.values(), (start, start, saved), (waited, saved, restored), strict=True):
                found.seconds.append(end[0] - begin[0])
                found.cpu_seconds.append(end[1] - begin[1])
        checkpoints.close()
    rows = [{"part": name} | found.row() | {"bytes_per_sec": size / found.median} for name, found in parts.items()]
    return {"rows": rows, "state_bytes": size}
