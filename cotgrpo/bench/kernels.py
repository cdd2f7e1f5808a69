"""Measure the head with its loss, and attention, on their own."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from cotgrpo.accelerators.mfu import matrix_rate
from cotgrpo.bench.measure import compile_timed, in_turn
from cotgrpo.bench.workload import random_batch
from cotgrpo.models.attention import attention, causal_segment_mask
from cotgrpo.models.blockwise_attention import block_attention
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.splash_attention import splash_attention
from cotgrpo.objectives import Nll, Objective, Pair, TokenInputs
from cotgrpo.tiled_loss import default_tile_size, tiled_loss
from cotgrpo.types import SftBatch

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float

OBJECTIVES: dict[str, Objective] = {"nll": Nll(), "pair": Pair()}


def naive_loss(
    objective: Objective, hidden_ND: Float[Array, "N D"], head_DV: Float[Array, "D V"], inputs: TokenInputs
) -> Float[Array, ""]:
    """Return the loss with all logits at once, whose gradient is JAX's own: the baseline."""
    logits_NV = jnp.matmul(hidden_ND, head_DV, preferred_element_type=jnp.float32)
    each = lambda logits_V, ghost, weight: objective(logits_V, TokenInputs(ghost, weight))[0]
    return jnp.sum(inputs.weight * jax.vmap(each)(logits_NV, inputs.ghost, inputs.weight))


def engine_loss(
    objective: Objective, hidden_ND: Float[Array, "N D"], head_DV: Float[Array, "D V"], inputs: TokenInputs
) -> Float[Array, ""]:
    """Return the same loss over tiles."""
    return tiled_loss(objective, hidden_ND, head_DV, inputs)[0]


def gradient_of(loss: Callable[..., Float[Array, ""]], name: str) -> jax.stages.Wrapped:
    """Return the gradients in hidden rows and head, jitted."""
    return jax.jit(jax.grad(functools.partial(loss, OBJECTIVES[name]), argnums=(0, 1)))


def measure_engine(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time the loss with its gradients in hidden rows and head.

    The baseline, with all logits at once, is compiled for its memory and does not run.
    """
    N, D, rows = args.batch * args.seq, config.width, []
    for vocab in args.vocab:
        keys = jax.random.split(jax.random.key(0), 3)
        hidden_ND = jax.random.normal(keys[0], (N, D), args.dtype)
        head_DV = 0.05 * jax.random.normal(keys[1], (D, vocab), args.dtype)
        tokens = TokenInputs(ghost=jax.random.randint(keys[2], (N,), 0, vocab), weight=jnp.ones((N,)))
        programs, facts = {}, {}
        for name in args.objectives:
            naive = compile_timed(gradient_of(naive_loss, name), hidden_ND, head_DV, tokens)[1]["temp_bytes"]
            program, own = compile_timed(gradient_of(engine_loss, name), hidden_ND, head_DV, tokens)
            programs[name] = functools.partial(program, hidden_ND, head_DV, tokens)
            facts[name] = own | {"naive_bytes": naive, "naive_over_engine": naive / own["temp_bytes"]}
        times = in_turn(programs, args.repeats, args.warmup)
        floor = 3 * 2 * N * D * vocab / matrix_rate(args.dtype)
        for name, found in times.items():
            which = {"vocab": vocab, "objective": name, "tile_size": default_tile_size(N, vocab)}
            rates = {"logits_bytes": 4 * N * vocab, "tokens_per_sec": N / found.median, "mfu": floor / found.median}
            rows.append(which | found.row() | rates | facts[name])
    return {"rows": rows}


def kernels(batch: SftBatch) -> dict[str, Callable[..., Any]]:
    """Return this platform's attention implementations, as functions of query, key and value."""
    positions, segments = jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids)
    mask = causal_segment_mask(positions, segments, positions, segments)
    own: dict[str, Callable[..., Any]] = {
        "xla": lambda q, k, v: attention(q, k, v, mask),
        "blocks": lambda q, k, v: block_attention(q, k, v, positions, segments),
    }
    if jax.default_backend() == "tpu":
        own["splash"] = lambda q, k, v: splash_attention(q, k, v, segments, (None,), None)
    return own


def measure_attention(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time one layer's causal attention, forward and backward, by length at a constant number of tokens.

    `mfu` counts the pairs of positions that are read, half of the square.
    """
    c, rows = config, []
    for seq in args.lengths:
        batch = max(args.batch * args.seq // seq, 1)
        keys = jax.random.split(jax.random.key(0), 3)
        heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        qkv = [jax.random.normal(k, (batch, seq, n, c.head_dim), args.dtype) for k, n in zip(keys, heads, strict=True)]
        flops = 3 * 2 * 2 * c.num_heads * c.head_dim * batch * seq * seq / 2
        programs, facts = {}, {}
        for name, kernel in kernels(random_batch(c, batch, seq)).items():
            loss = lambda q, k, v, kernel=kernel: jnp.sum(jnp.square(kernel(q, k, v).astype(jnp.float32)))
            program, facts[name] = compile_timed(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), *qkv)
            programs[name] = functools.partial(program, *qkv)
        for name, found in in_turn(programs, args.repeats, args.warmup).items():
            which = {"seq": seq, "batch": batch, "attention": name}
            speed = {
                "tokens_per_sec": batch * seq / found.median,
                "mfu": flops / found.median / matrix_rate(args.dtype),
            }
            rows.append(which | found.row() | speed | facts[name])
    return {"rows": rows}
