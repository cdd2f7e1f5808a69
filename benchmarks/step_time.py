"""Time of one GRPO (GhostRespond) step against one SFT step, on the same batch, model and optimizer.

    python benchmarks/step_time.py --shape 16m --batch 8 --seq 256

The two compiled steps run in turn (S G S G ...) on one state, so the ratio holds when the machine's speed drifts. Three ratios are given: the median over
pairs; that of the fastest step of each; and on a CPU that of the processor seconds spent, which other programs on the machine disturb least.
Model FLOPs are 6 a parameter of a matrix product and token, plus causal attention, with the head counted on supervised tokens only; nothing recomputed
is counted. `floor` is the time that these FLOPs take at the rate of a large square matrix product, measured here, as a share of the step's time.
Needs jax, flax, optax and numpy alone. Random weights, random tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cotgrpo
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student

SHAPES = {
    "tiny": DecoderConfig(512, 64, 2, 4, 2, 16, 192),
    "16m": DecoderConfig(8_192, 384, 8, 6, 2, 64, 1_024),
    "smollm2-135m": DecoderConfig(49_152, 576, 30, 9, 3, 64, 1_536),
    "qwen2.5-0.5b": DecoderConfig(151_936, 896, 24, 14, 2, 64, 4_864),
    "llama-3.2-1b": DecoderConfig(128_256, 2_048, 16, 32, 8, 64, 8_192),
}


def random_batch(config: DecoderConfig, batch: int, seq: int, supervised: float, seed: int = 0) -> cotgrpo.SftBatch:
    """Full rows of random tokens, of which the last `supervised` share carries a loss."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (batch, seq + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(seq, dtype=np.int32), (batch, seq))
    mask = (positions >= round(seq * (1 - supervised))).astype(np.float32)
    return cotgrpo.SftBatch(
        tokens=jnp.asarray(ids[:, :-1]),
        targets=jnp.asarray(ids[:, 1:]),
        positions=jnp.asarray(positions),
        segment_ids=jnp.ones((batch, seq), jnp.int32),
        loss_mask=jnp.asarray(mask),
    )


def model_flops(config: DecoderConfig, batch: int, seq: int, supervised: float) -> float:
    """Floating-point operations of one training step: forward 2 and backward 4 a weight and token."""
    c = config
    layer = c.width * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) + 3 * c.width * c.mlp_width
    tokens = batch * seq
    # Scores and mixing: 2 products of 2 Q H operations a pair of positions, half of the pairs, times 3 for the backward pass.
    attention = 3 * tokens * c.num_layers * 2 * 2 * c.num_heads * c.head_dim * (seq + 1) / 2
    return 6 * tokens * c.num_layers * layer + 6 * tokens * supervised * c.width * c.vocab_size + attention


def matrix_rate(dtype: str) -> float:
    """Floating-point operations a second of a chain of large square matrix products, the best of five tries."""
    size, chain = (1_024, 8) if jax.default_backend() == "cpu" else (8_192, 16)
    square = jnp.full((size, size), 1 / size, dtype)
    run = jax.jit(lambda x: jax.lax.fori_loop(0, chain, lambda _, y: y @ square, x)).lower(square).compile()
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        run(square).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return chain * 2 * size**3 / min(seconds[1:])


def peak_bytes() -> int | None:
    """The most device memory in use so far in this process, or None where the backend does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def compile_step(make: Any, config: DecoderConfig, tx: Any, state: Any, batch: Any, micro_batches: int) -> Any:
    """A compiled step, and what is known of it before it runs."""
    step = cotgrpo.jit_step(make(make_student(config), tx, micro_batches=micro_batches))
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    return compiled, {"compile_s": seconds, "temp_bytes": compiled.memory_analysis().temp_size_in_bytes}


def time_once(run: Any, state: Any, batch: Any) -> tuple[Any, float, float]:
    """The state after one step, its seconds on the clock, and its processor seconds (all threads of this process)."""
    start, start_cpu = time.perf_counter(), time.process_time()
    state, metrics = run(state, batch)
    jax.block_until_ready((state, metrics))
    return state, time.perf_counter() - start, time.process_time() - start_cpu


def measure(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    batch = random_batch(config, args.batch, args.seq, args.supervised)
    tx = cotgrpo.make_optimizer(learning_rate=1e-4, total_steps=10_000)
    state = cotgrpo.TrainState.create(params=init_params(config, jax.random.key(0)), tx=tx, key=0)
    runs, rows = {}, {}
    for name, make in (("sft", cotgrpo.make_sft_step), ("grpo", cotgrpo.make_grpo_step)):
        runs[name], rows[name] = compile_step(make, config, tx, state, batch, args.micro_batches)
        state, *_ = time_once(runs[name], state, batch)
        rows[name]["peak_bytes_so_far"] = peak_bytes()
    clock: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.warmup + args.repeats):
        for name, run in runs.items():
            state, seconds, cpu_seconds = time_once(run, state, batch)
            if repeat >= args.warmup:
                clock[name].append(seconds)
                cpu[name].append(cpu_seconds)
    flops = model_flops(config, args.batch, args.seq, args.supervised)
    rate = matrix_rate(args.dtype)
    for name, row in rows.items():
        median = statistics.median(clock[name])
        row |= {
            "median_s": median,
            "min_s": min(clock[name]),
            "max_s": max(clock[name]),
            "cpu_s": statistics.median(cpu[name]),
            "tokens_per_sec": args.batch * args.seq / median,
            "model_flops_per_sec": flops / median,
            "floor": flops / rate / median,
        }
    return describe(config, args) | {
        "model_flops": flops,
        "matrix_flops_per_sec": rate,
        "steps": rows,
        "grpo_over_sft": ratios(clock, cpu),
    }


def describe(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "shape": args.shape,
        "dtype": config.dtype,
        "remat": config.remat,
        "params": config.num_params(),
        "batch": args.batch,
        "seq": args.seq,
        "supervised": args.supervised,
        "micro_batches": args.micro_batches,
        "repeats": args.repeats,
    }


def ratios(clock: dict[str, list[float]], cpu: dict[str, list[float]]) -> dict[str, Any]:
    pairs = [g / s for s, g in zip(clock["sft"], clock["grpo"], strict=True)]
    on_cpu = jax.default_backend() == "cpu"
    return {
        "median_of_pairs": statistics.median(pairs),
        "range": [min(pairs), max(pairs)],
        "fastest": min(clock["grpo"]) / min(clock["sft"]),
        "cpu_seconds": statistics.median(cpu["grpo"]) / statistics.median(cpu["sft"]) if on_cpu else None,
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['shape']} ({result['params'] / 1e6:.1f} M parameters, {result['dtype']}), batch {result['batch']} x {result['seq']}, "
        f"{result['supervised']:.0%} supervised, remat {result['remat']}, on {result['device']} with jax {result['jax']}"
    )
    print(
        f"model FLOPs a step: {result['model_flops']:.3e}; matrix products: {result['matrix_flops_per_sec'] / 1e9:.0f} GFLOP/s"
    )
    print(
        f"{'step':6}{'median s':>10}{'min':>10}{'max':>10}{'tokens/s':>12}{'GFLOP/s':>10}{'floor':>7}{'compile s':>11}{'temp MB':>10}{'peak MB':>10}"
    )
    for name, row in result["steps"].items():
        peak = row["peak_bytes_so_far"]
        print(
            f"{name:6}{row['median_s']:10.4f}{row['min_s']:10.4f}{row['max_s']:10.4f}{row['tokens_per_sec']:12.0f}"
            f"{row['model_flops_per_sec'] / 1e9:10.1f}{row['floor']:7.2f}{row['compile_s']:11.1f}"
            f"{row['temp_bytes'] / 1e6:10.0f}{'-' if peak is None else format(peak / 1e6, '.0f'):>10}"
        )
    ratio = result["grpo_over_sft"]
    low, high = ratio["range"]
    print(
        f"GRPO / SFT step time: {ratio['median_of_pairs']:.3f} (median of pairs; {low:.3f} to {high:.3f}), fastest {ratio['fastest']:.3f}"
        + (f", processor seconds {ratio['cpu_seconds']:.3f}" if ratio["cpu_seconds"] else "")
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="16m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--supervised", type=float, default=1.0, help="share of tokens with a loss")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute type")
    parser.add_argument("--remat", choices=["nothing", "dots", "block"], default="nothing")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path, help="also write the result here")
    args = parser.parse_args(argv)
    result = measure(dataclasses.replace(SHAPES[args.shape], dtype=args.dtype, remat=args.remat), args)
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
