"""Measure what compilation alone shows: memory by vocabulary, and compile time by depth."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.optimizers import make_optimizer
from cotgrpo.sharding import jit_step
from cotgrpo.train_steps import make_grpo_step
from cotgrpo.types import SftBatch, TrainState


def lower_step(config: DecoderConfig, batch: int, seq: int) -> jax.stages.Lowered:
    """Lower a GRPO step with AdamW for abstract arguments, without any weights."""
    tx = make_optimizer(learning_rate=1e-4, total_steps=1_000_000)
    state = jax.eval_shape(lambda: TrainState.create(params=init_params(config, jax.random.key(0)), tx=tx, key=0))
    ids: Any = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    weights: Any = jax.ShapeDtypeStruct((batch, seq), jnp.float32)
    return jit_step(make_grpo_step(make_student(config), tx)).lower(state, SftBatch(ids, ids, ids, ids, weights))


def measure_memory(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Read the memory of the compiled GRPO step by vocabulary and batch; nothing runs.

    A token must cost what its hidden states cost, whatever V is.
    """
    rows, token_bytes = [], {}
    for vocab in args.vocab:
        temps = {}
        for batch in (args.batch, 2 * args.batch):
            shape = dataclasses.replace(config, vocab_size=vocab)
            memory: Any = lower_step(shape, batch, args.seq).compile().memory_analysis()
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
    """Return the memory of one more token as a line."""
    found = result["bytes_of_a_further_token"].items()
    return [
        "a further token costs "
        + ", ".join(f"{b / 1e3:.1f} kB at V = {v:,} (its logits {4 * v / 1e3:.0f} kB)" for v, b in found)
    ]


def compile_here(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Lower and compile in this process, without JAX's compilation cache.

    Returns:
        Seconds of each, and the length of the lowered text.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    jax.devices()  # starts the backend, which does not count
    start = time.perf_counter()
    lowered = lower_step(config, args.batch, args.seq)
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return {"lower_s": middle - start, "compile_s": end - middle, "text_chars": len(lowered.as_text())}


def measure_compile(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Measure compile time by depth, each in a process of its own and in turn.

    The least counts, which other work on the machine disturbed least.
    """
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
    """Return the ratio of the last depth to the first as a line."""
    return [f"total, last over first: {result['last_over_first']:.3f}"]
