"""Measure generation: greedy replies, and a GRPO update on the student's own replies."""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

from cotgrpo.accelerators.mfu import matrix_rate
from cotgrpo.accelerators.roofline import Work
from cotgrpo.bench.measure import Times, compile_timed, in_turn, peak_bytes
from cotgrpo.bench.steps import Running
from cotgrpo.bench.workload import random_batch
from cotgrpo.ghosts.live import live_ghosts
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_cache, init_params, make_student, unstack_layers
from cotgrpo.sampling import Prompts, SamplingSettings, make_sampler


def copy_rate() -> float:
    """Measure the bytes per second that the device reads and writes in a large elementwise addition: best of five."""
    array = jnp.zeros(2**25 if jax.default_backend() == "cpu" else 2**29, jnp.float32)
    run = jax.jit(lambda x: x + 1.0).lower(array).compile()
    return 2 * array.nbytes / min(in_turn({"copy": lambda: run(array)}, 5)["copy"].seconds)


def measure_generate(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time greedy replies of full length.

    Each further token reads all weights and the cache once. `bandwidth` is its share of the measured rate of memory.
    """
    params, rows = unstack_layers(config, init_params(config, jax.random.key(0))), []
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    rate = copy_rate()
    for batch in args.batches:
        ids = random_batch(config, batch, args.seq).tokens
        prompts = Prompts(tokens=ids, lengths=jnp.full((batch,), args.seq, jnp.int32))
        programs, facts = {}, {}
        for new in (1, args.new_tokens):
            sample = jax.jit(make_sampler(config, SamplingSettings(max_new_tokens=new)))
            program, facts[new] = compile_timed(sample, params, prompts, jax.random.key(0))
            programs[str(new)] = functools.partial(program, params, prompts, jax.random.key(0))
        times = in_turn(programs, args.repeats, args.warmup)
        first, whole = times["1"].median, times[str(args.new_tokens)]
        a_token = (whole.median - first) / (args.new_tokens - 1)
        kept = jax.eval_shape(functools.partial(init_cache, config, batch, args.seq + args.new_tokens))
        cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((kept.keys, kept.values, kept.states)))
        speed = {"first_token_s": first, "tokens_per_sec": batch * args.new_tokens / whole.median}
        bound = {"further_token_s": a_token, "bandwidth": (weights + cache) / a_token / rate}
        rows.append(
            {"batch": batch} | whole.row() | speed | bound | facts[args.new_tokens] | {"peak_bytes": peak_bytes()}
        )
    return {"rows": rows, "copy_bytes_per_sec": rate, "weight_bytes": weights}


def measure_on_policy(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time a GRPO update on the student's own replies, in its three parts.

    They are the rollout, the live ghost's forward pass and the step. The teacher is another student of the same shape.
    """
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
    sample, _ = compile_timed(jax.jit(make_sampler(config, settings)), running.state.params, prompts, key)
    replies = sample(running.state.params, prompts, key)
    ask = jax.jit(lambda params, replies: live_ghosts(student, params, prompts, replies))
    ghosts, _ = compile_timed(ask, teacher_params, replies)
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
