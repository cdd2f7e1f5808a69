"""Measure whole train steps: SFT and GRPO (GhostRespond), the share of supervised tokens, and remat policies."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from cotgrpo.accelerators.mfu import matrix_rate
from cotgrpo.accelerators.roofline import Work
from cotgrpo.bench.measure import compile_timed, in_turn, peak_bytes, ratio
from cotgrpo.bench.workload import random_batch
from cotgrpo.models.config import DecoderConfig, RematPolicy
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.optimizers import make_optimizer
from cotgrpo.sharding import jit_step
from cotgrpo.train_steps import make_grpo_step, make_sft_step
from cotgrpo.types import GhostBatch, Metrics, SftBatch, TrainState

Batch = SftBatch | GhostBatch
MAKERS: dict[str, Any] = {"sft": make_sft_step, "grpo": make_grpo_step}


class Running:
    """A train state that several compiled steps share. A step donates it, so each takes it from the one before."""

    def __init__(self, config: DecoderConfig) -> None:
        self.config, self.tx = config, make_optimizer(learning_rate=1e-4, total_steps=1_000_000)
        params = init_params(config, jax.random.key(0))
        self.state = TrainState.create(params=params, tx=self.tx, key=0, copy=False)

    def step(
        self, maker: str, batch: Batch, micro_batches: int = 1, remat: RematPolicy | None = None
    ) -> tuple[Callable[[Batch], tuple[TrainState, Metrics]], dict[str, Any]]:
        """Compile the step `maker`; return it as a function of a batch, with its compile time and memory.

        `remat` replaces the policy of the config.
        """
        config = dataclasses.replace(self.config, remat=remat or self.config.remat)
        step = MAKERS[maker](make_student(config), self.tx, micro_batches=micro_batches)
        program, facts = compile_timed(jit_step(step), self.state, batch)

        def run(batch: Batch) -> tuple[TrainState, Metrics]:
            self.state, metrics = program(self.state, batch)
            return self.state, metrics

        return run, facts


def speed(config: DecoderConfig, args: argparse.Namespace, seconds: float, supervised: float) -> dict[str, float]:
    """Return tokens per second and the model's operations for a step of this length."""
    tokens = args.batch * args.seq
    flops = Work(config, tokens, args.seq, supervised=supervised).model_flops
    return {
        "model_flops": flops,
        "tokens_per_sec": tokens / seconds,
        "padded_tokens_per_sec": tokens / seconds,
        "model_flops_per_sec": flops / seconds,
        "mfu": flops / seconds / matrix_rate(args.dtype),
    }


def measure_step(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time one SFT step and one GRPO step, teacher-forced, on the same batch in turn."""
    running, batch = Running(config), random_batch(config, args.batch, args.seq, args.supervised)
    runs, facts = {}, {}
    for name in MAKERS:
        run, facts[name] = running.step(name, batch, args.micro_batches)
        jax.block_until_ready(run(batch))
        facts[name]["peak_bytes_so_far"] = peak_bytes()
        runs[name] = functools.partial(run, batch)
    times = in_turn(runs, args.repeats, args.warmup)
    rows = [
        {"step": name} | times[name].row() | speed(config, args, times[name].median, args.supervised) | facts[name]
        for name in runs
    ]
    return {"rows": rows, "grpo_over_sft": ratio(times["grpo"], times["sft"])}


def step_lines(result: dict[str, Any]) -> list[str]:
    """Return the ratio of the two steps as a line."""
    found = result["grpo_over_sft"]
    low, high = found["range"]
    cpu = f", processor seconds {found['cpu_seconds']:.3f}" if found["cpu_seconds"] else ""
    return [
        f"GRPO / SFT step time: {found['median_of_pairs']:.3f} (median of pairs; {low:.3f} to {high:.3f}), "
        f"fastest {found['fastest']:.3f}{cpu}"
    ]


def measure_supervised(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time one compiled GRPO step on batches with ever fewer supervised tokens."""
    running = Running(config)
    batches = {str(share): random_batch(config, args.batch, args.seq, share) for share in args.shares}
    run, facts = running.step("grpo", batches[str(args.shares[0])])
    times = in_turn({k: functools.partial(run, b) for k, b in batches.items()}, args.repeats, args.warmup)
    first = times[str(args.shares[0])]
    whole = Work(config, args.batch * args.seq, args.seq, supervised=args.shares[0]).model_flops
    rows = []
    for share in args.shares:
        found = times[str(share)]
        rates = speed(config, args, found.median, share)
        over = ratio(found, first)["median_of_pairs"]
        rows.append(
            {"supervised": share}
            | found.row()
            | rates
            | {"time_share": over, "flops_share": rates["model_flops"] / whole}
        )
    return {"rows": rows} | facts


def measure_remat(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time the GRPO step with each remat policy, in turn on the same batch."""
    running, batch = Running(config), random_batch(config, args.batch, args.seq)
    runs, facts = {}, {}
    for policy in args.policies:
        run, facts[policy] = running.step("grpo", batch, remat=policy)
        runs[policy] = functools.partial(run, batch)
    times = in_turn(runs, args.repeats, args.warmup)
    first = times[args.policies[0]]
    rows = [
        {"policy": policy, "time_share": ratio(found, first)["median_of_pairs"]}
        | found.row()
        | speed(config, args, found.median, supervised=1.0)
        | facts[policy]
        for policy, found in times.items()
    ]
    return {"rows": rows}
