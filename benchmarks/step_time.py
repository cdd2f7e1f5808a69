"""Time of one GRPO (GhostRespond) step against one SFT step, on the same batch, model and optimizer.

    python benchmarks/step_time.py --shape 16m --batch 8 --seq 256

The two compiled steps run in turn (S G S G ...), so the ratio holds when the machine's speed drifts; the ratio is the median over pairs. Model FLOPs are
6 a parameter of a matrix product and token, plus causal attention, with the head counted on supervised tokens only; nothing recomputed is counted.
Needs jax, flax, optax and numpy alone. Random weights, random tokens.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
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


def compile_step(make: Any, config: DecoderConfig, batch: Any, args: argparse.Namespace) -> dict[str, Any]:
    """A compiled step with a state of its own, its compile time and its temporary memory."""
    tx = cotgrpo.make_optimizer(learning_rate=1e-4, total_steps=10_000)
    step = cotgrpo.jit_step(make(make_student(config), tx, micro_batches=args.micro_batches))
    state = cotgrpo.TrainState.create(params=init_params(config, jax.random.key(0)), tx=tx, key=0)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return {"run": compiled, "state": state, "compile_s": seconds, "temp_bytes": memory.temp_size_in_bytes}


def time_once(entry: dict[str, Any], batch: Any) -> float:
    start = time.perf_counter()
    entry["state"], metrics = entry["run"](entry["state"], batch)
    jax.block_until_ready((entry["state"], metrics))
    return time.perf_counter() - start


def measure(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    batch = random_batch(config, args.batch, args.seq, args.supervised)
    steps = {
        "sft": compile_step(cotgrpo.make_sft_step, config, batch, args),
        "grpo": compile_step(cotgrpo.make_grpo_step, config, batch, args),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(args.warmup + args.repeats):
        for name, entry in steps.items():
            seconds = time_once(entry, batch)
            if repeat >= args.warmup:
                times[name].append(seconds)
    ratios = [g / s for s, g in zip(times["sft"], times["grpo"], strict=True)]
    tokens = args.batch * args.seq
    flops = model_flops(config, args.batch, args.seq, args.supervised)
    rows = {
        name: {
            "median_s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "tokens_per_sec": tokens / statistics.median(seconds),
            "model_flops_per_sec": flops / statistics.median(seconds),
            "compile_s": steps[name]["compile_s"],
            "temp_bytes": steps[name]["temp_bytes"],
        }
        for name, seconds in times.items()
    }
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "shape": args.shape,
        "dtype": config.dtype,
        "params": config.num_params(),
        "batch": args.batch,
        "seq": args.seq,
        "supervised": args.supervised,
        "model_flops": flops,
        "steps": rows,
        "grpo_over_sft": statistics.median(ratios),
        "grpo_over_sft_range": [min(ratios), max(ratios)],
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['shape']} ({result['params'] / 1e6:.1f} M parameters, {result['dtype']}), batch {result['batch']} x {result['seq']}, "
        f"{result['supervised']:.0%} supervised, on {result['device']} with jax {result['jax']}"
    )
    print(f"model FLOPs a step: {result['model_flops']:.3e}")
    print(
        f"{'step':6}{'median s':>10}{'min':>10}{'max':>10}{'tokens/s':>12}{'GFLOP/s':>10}{'compile s':>11}{'temp MB':>10}"
    )
    for name, row in result["steps"].items():
        print(
            f"{name:6}{row['median_s']:10.4f}{row['min_s']:10.4f}{row['max_s']:10.4f}{row['tokens_per_sec']:12.0f}"
            f"{row['model_flops_per_sec'] / 1e9:10.1f}{row['compile_s']:11.1f}{row['temp_bytes'] / 1e6:10.0f}"
        )
    low, high = result["grpo_over_sft_range"]
    print(f"GRPO / SFT step time: {result['grpo_over_sft']:.3f} (median of pairs; {low:.3f} to {high:.3f})")


def main() -> None:
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
    args = parser.parse_args()
    fields = {"dtype": args.dtype, "remat": args.remat}
    result = measure(DecoderConfig(**{**SHAPES[args.shape].__dict__, **fields}), args)
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
