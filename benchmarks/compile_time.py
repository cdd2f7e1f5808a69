"""Compile time of one GRPO (GhostRespond) step by the number of layers.

    python benchmarks/compile_time.py --shape tiny --layers 4 32

The layers are one scanned layer, so depth should cost nothing. Each figure comes from a process of its own, without JAX's compilation cache; the depths
take turns and the least time of each counts, which is the one that other work on the machine disturbed least. Arguments are abstract: no weight exists.
Needs jax, flax, optax and numpy alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from step_time import SHAPES

import cotgrpo
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student


def lower_step(config: DecoderConfig, batch: int, seq: int) -> Any:
    """A GRPO step with AdamW, lowered for abstract arguments."""
    tx = cotgrpo.make_optimizer(learning_rate=1e-4, total_steps=10_000)
    make_state = lambda: cotgrpo.TrainState.create(params=init_params(config, jax.random.key(0)), tx=tx, key=0)
    ids: Any = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    weights: Any = jax.ShapeDtypeStruct((batch, seq), jnp.float32)
    text = cotgrpo.SftBatch(ids, ids, ids, ids, weights)
    return cotgrpo.jit_step(cotgrpo.make_grpo_step(make_student(config), tx)).lower(jax.eval_shape(make_state), text)


def measure_here(config: DecoderConfig, batch: int, seq: int) -> dict[str, Any]:
    """Lowers and compiles in this process: seconds of each, and the length of the lowered text."""
    jax.config.update("jax_enable_compilation_cache", False)
    jax.devices()  # the backend's own start is not part of a compilation
    start = time.perf_counter()
    lowered = lower_step(config, batch, seq)
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return {
        "lower_s": middle - start,
        "compile_s": end - middle,
        "text_chars": len(lowered.as_text()),
        "device": jax.devices()[0].device_kind,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    runs: dict[int, list[dict[str, Any]]] = {layers: [] for layers in args.layers}
    for _ in range(args.repeats):
        for layers, seen in runs.items():
            command = [sys.executable, __file__, "--shape", args.shape, "--dtype", args.dtype]
            command += ["--batch", str(args.batch), "--seq", str(args.seq), "--here", "--layers", str(layers)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{layers} layers did not compile:\n{done.stderr}")
            seen.append(json.loads(done.stdout.splitlines()[-1]))
    rows = [
        {
            "layers": layers,
            "total_s": min(run["lower_s"] + run["compile_s"] for run in seen),
            "lower_s": min(run["lower_s"] for run in seen),
            "compile_s": min(run["compile_s"] for run in seen),
            "text_chars": seen[0]["text_chars"],
        }
        for layers, seen in runs.items()
    ]
    return {
        "device": runs[args.layers[0]][0]["device"],
        "jax": jax.__version__,
        "shape": args.shape,
        "dtype": args.dtype,
        "batch": args.batch,
        "seq": args.seq,
        "repeats": args.repeats,
        "rows": rows,
        "last_over_first": rows[-1]["total_s"] / rows[0]["total_s"],
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['shape']} at other depths, {result['dtype']}, batch {result['batch']} x {result['seq']}, "
        f"on {result['device']} with jax {result['jax']}; least of {result['repeats']} fresh processes"
    )
    print(f"{'layers':>6}{'lower s':>10}{'compile s':>11}{'total s':>10}{'text':>12}")
    for row in result["rows"]:
        print(
            f"{row['layers']:6}{row['lower_s']:10.2f}{row['compile_s']:11.2f}{row['total_s']:10.2f}{row['text_chars']:12,}"
        )
    print(f"total, last over first: {result['last_over_first']:.3f}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute type")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each depth")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result here")
    parser.add_argument("--here", action="store_true", help="measure the first depth in this process, print JSON")
    args = parser.parse_args(argv)
    if args.here:
        config = dataclasses.replace(SHAPES[args.shape], num_layers=args.layers[0], dtype=args.dtype)
        print(json.dumps(measure_here(config, args.batch, args.seq)))
        return
    result = measure(args)
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
