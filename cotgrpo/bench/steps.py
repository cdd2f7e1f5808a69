"""Whole train steps: SFT beside GRPO (GhostRespond), the share of supervised tokens, what is recomputed, memory by vocabulary, compile time by depth."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cotgrpo.accelerators.mfu import matrix_rate
from cotgrpo.accelerators.roofline import Work
from cotgrpo.bench.measure import compiled, in_turn, peak_bytes, ratio
from cotgrpo.bench.workload import random_batch
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.optimizers import make_optimizer
from cotgrpo.sharding import jit_step
from cotgrpo.train_steps import make_grpo_step, make_sft_step
from cotgrpo.types import SftBatch, TrainState

MAKERS: dict[str, Any] = {"sft": make_sft_step, "grpo": make_grpo_step}


class Running:
    """A train state that several compiled steps share: each takes it from the one before, since a step donates it."""

    def __init__(self, config: DecoderConfig) -> None:
        self.config, self.tx = config, make_optimizer(learning_rate=1e-4, total_steps=1_000_000)
        self.state = TrainState.create(params=init_params(config, jax.random.key(0)), tx=self.tx, key=0)

    def step(
        self, maker: str, batch: Any, micro_batches: int = 1, remat: str | None = None
    ) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        """The compiled step `maker`, as a function of a batch, and what its compilation says; `remat`: other than the config's."""
        config = dataclasses.replace(self.config, remat=remat or self.config.remat)
        step = MAKERS[maker](make_student(config), self.tx, micro_batches=micro_batches)
        program, facts = compiled(jit_step(step), self.state, batch)

        def run(batch: Any) -> Any:
            self.state, metrics = program(self.state, batch)
            return self.state, metrics

        return run, facts


def speed(config: DecoderConfig, args: argparse.Namespace, seconds: float, supervised: float) -> dict[str, float]:
    """Tokens a second and the model's operations, for a step that takes so long."""
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
    """One SFT step and one GRPO step, teacher-forced, on the same batch in turn."""
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
    """What `measure_step` found, in words."""
    found = result["grpo_over_sft"]
    low, high = found["range"]
    cpu = f", processor seconds {found['cpu_seconds']:.3f}" if found["cpu_seconds"] else ""
    return [
        f"GRPO / SFT step time: {found['median_of_pairs']:.3f} (median of pairs; {low:.3f} to {high:.3f}), fastest {found['fastest']:.3f}{cpu}"
    ]


def measure_supervised(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """One compiled GRPO step on batches of which ever fewer tokens are supervised."""
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
    """The GRPO step with each policy of recomputation, in turn on the same batch."""
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


def abstract_step(config: DecoderConfig, batch: int, seq: int) -> Any:
    """A GRPO step with AdamW, lowered for abstract arguments: no weight exists."""
    tx = make_optimizer(learning_rate=1e-4, total_steps=1_000_000)
    state = jax.eval_shape(lambda: TrainState.create(params=init_params(config, jax.random.key(0)), tx=tx, key=0))
    ids: Any = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    weights: Any = jax.ShapeDtypeStruct((batch, seq), jnp.float32)
    return jit_step(make_grpo_step(make_student(config), tx)).lower(state, SftBatch(ids, ids, ids, ids, weights))


def measure_memory(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Memory of the compiled GRPO step by vocabulary and batch; nothing runs. A token must cost what its hidden states cost, whatever V is."""
    rows, token_bytes = [], {}
    for vocab in args.vocab:
        temps = {}
        for batch in (args.batch, 2 * args.batch):
            shape = dataclasses.replace(config, vocab_size=vocab)
            memory = abstract_step(shape, batch, args.seq).compile().memory_analysis()
            temps[batch] = memory.temp_size_in_bytes
            rows.append(
                {
                    "vocab": vocab,
                    "tokens": batch * args.seq,
                    "state_bytes": memory.argument_size_in_bytes,
                    "gradient_bytes": 4 * shape.num_params(),
                    "temp_bytes": memory.temp_size_in_bytes,
                    "logits_bytes": 4 * batch * args.seq * vocab,
                }
            )
        token_bytes[vocab] = (temps[2 * args.batch] - temps[args.batch]) / (args.batch * args.seq)
    return {"rows": rows, "bytes_of_a_further_token": token_bytes}


def memory_lines(result: dict[str, Any]) -> list[str]:
    """What `measure_memory` found, in words."""
    found = result["bytes_of_a_further_token"].items()
    return [
        "a further token costs "
        + ", ".join(f"{b / 1e3:.1f} kB at V = {v:,} (its logits {4 * v / 1e3:.0f} kB)" for v, b in found)
    ]


def compile_here(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Lowers and compiles in this process, without JAX's compilation cache: seconds of each, and the length of the lowered text."""
    jax.config.update("jax_enable_compilation_cache", False)
    jax.devices()  # the backend's own start is no part of a compilation
    start = time.perf_counter()
    lowered = abstract_step(config, args.batch, args.seq)
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return {"lower_s": middle - start, "compile_s": end - middle, "text_chars": len(lowered.as_text())}


def measure_compile(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Compile time by depth, each in a process of its own and in turn; the least counts, which other work on the machine disturbed least."""
    if args.here:
        return {"rows": [compile_here(dataclasses.replace(config, num_layers=args.layers[0]), args)]}
    seen: dict[int, list[dict[str, Any]]] = {layers: [] for layers in args.layers}
    options = ["--shape", args.shape, "--dtype", args.dtype, "--remat", args.remat]
    options += ["--batch", str(args.batch), "--seq", str(args.seq), "--here"]
    for _ in range(args.repeats):
        for layers, found in seen.items():
            command = [sys.executable, "-m", "cotgrpo.bench.command", "compile", *options, "--layers", str(layers)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{layers} layers did not compile:\n{done.stderr}")
            found.append(json.loads(done.stdout.splitlines()[-1])["rows"][0])
    rows = [
        {
            "layers": layers,
            "total_s": min(run["lower_s"] + run["compile_s"] for run in found),
            "lower_s": min(run["lower_s"] for run in found),
            "compile_s": min(run["compile_s"] for run in found),
            "text_chars": found[0]["text_chars"],
        }
        for layers, found in seen.items()
    ]
    return {"rows": rows, "last_over_first": rows[-1]["total_s"] / rows[0]["total_s"]}


def compile_lines(result: dict[str, Any]) -> list[str]:
    """What `measure_compile` found, in words."""
    return [f"total, last over first: {result['last_over_first']:.3f}"]
