"""Temporary memory of the token engine against the step that holds all logits `[N, V]`, as compiled; nothing runs.

    python benchmarks/engine_memory.py --vocab 32768 49152 131072 262144

Both take the gradient of the same objective with respect to the hidden rows and the head. The naive one is `objective` mapped over `hidden @ head` with
JAX's own gradient. What counts is `temp_size_in_bytes` of the compiled program: everything but its arguments and results.
Needs jax, flax, optax and numpy alone.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cotgrpo.objectives import Nll, Objective, Pair, TokenRow
from cotgrpo.token_engine import TokenRows, default_tile_size, token_loss

OBJECTIVES: dict[str, Objective] = {"nll": Nll(), "pair": Pair()}


def naive_loss(objective: Objective, hidden_ND: Any, head_DV: Any, rows: TokenRows) -> Any:
    """All logits at once."""
    logits_NV = jnp.matmul(hidden_ND, head_DV, preferred_element_type=jnp.float32)
    each = lambda logits_V, ghost, weight: objective(logits_V, TokenRow(ghost, None, weight))[0]
    return jnp.sum(rows.weight * jax.vmap(each)(logits_NV, rows.ghost, rows.weight))


def engine_loss(objective: Objective, hidden_ND: Any, head_DV: Any, rows: TokenRows) -> Any:
    return token_loss(objective, hidden_ND, head_DV, rows)[0]


def temporaries(loss: Any, objective: Objective, args: argparse.Namespace, vocab: int) -> int:
    """Bytes of temporary memory of the compiled gradient of `loss`."""
    array: Any = jax.ShapeDtypeStruct
    gradient = jax.jit(jax.grad(lambda h, w, rows: loss(objective, h, w, rows), argnums=(0, 1)))
    compiled: Any = gradient.lower(
        array((args.tokens, args.width), args.dtype),
        array((args.width, vocab), args.dtype),
        TokenRows(ghost=array((args.tokens,), jnp.int32), weight=array((args.tokens,), jnp.float32)),
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for vocab in args.vocab:
        for name in args.objectives:
            naive, engine = (temporaries(loss, OBJECTIVES[name], args, vocab) for loss in (naive_loss, engine_loss))
            rows.append(
                {
                    "vocab": vocab,
                    "objective": name,
                    "logits_bytes": 4 * args.tokens * vocab,
                    "tile_size": default_tile_size(args.tokens, vocab),
                    "naive_bytes": naive,
                    "engine_bytes": engine,
                    "naive_over_engine": naive / engine,
                }
            )
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "tokens": args.tokens,
        "width": args.width,
        "dtype": args.dtype,
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['tokens']} tokens, width {result['width']}, {result['dtype']}, "
        f"compiled for {result['device']} with jax {result['jax']}"
    )
    print(f"{'vocab':>8} {'objective':10}{'logits MB':>10}{'naive MB':>10}{'engine MB':>10}{'ratio':>8}{'tile':>6}")
    for row in result["rows"]:
        logits, naive, engine = (row[name] / 1e6 for name in ("logits_bytes", "naive_bytes", "engine_bytes"))
        print(
            f"{row['vocab']:8} {row['objective']:10}{logits:10.0f}{naive:10.0f}{engine:10.0f}"
            f"{row['naive_over_engine']:8.1f}{row['tile_size']:6}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_768, 49_152, 131_072, 262_144])
    parser.add_argument("--objectives", choices=sorted(OBJECTIVES), nargs="+", default=sorted(OBJECTIVES))
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of rows and head")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result here")
    args = parser.parse_args(argv)
    result = measure(args)
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
