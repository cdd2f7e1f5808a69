"""Parts of a step on their own: the head engine, attention, and generation."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cotgrpo.accelerators.mfu import matrix_rate
from cotgrpo.bench.measure import compiled, in_turn, peak_bytes
from cotgrpo.bench.workload import random_batch
from cotgrpo.models.attention import attention, causal_segment_mask
from cotgrpo.models.blockwise_attention import block_attention
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params, unstack_layers
from cotgrpo.models.splash_attention import splash_attention
from cotgrpo.objectives import Nll, Objective, Pair, TokenInputs
from cotgrpo.sampling import Prompts, SamplingSettings, make_sampler
from cotgrpo.tiled_loss import default_tile_size, tiled_loss

OBJECTIVES: dict[str, Objective] = {"nll": Nll(), "pair": Pair()}


def naive_loss(objective: Objective, hidden_ND: Any, head_DV: Any, rows: TokenInputs) -> Any:
    """All logits at once, and JAX's own gradient: what the engine is measured against."""
    logits_NV = jnp.matmul(hidden_ND, head_DV, preferred_element_type=jnp.float32)
    each = lambda logits_V, ghost, weight: objective(logits_V, TokenInputs(ghost, weight))[0]
    return jnp.sum(rows.weight * jax.vmap(each)(logits_NV, rows.ghost, rows.weight))


def engine_loss(objective: Objective, hidden_ND: Any, head_DV: Any, rows: TokenInputs) -> Any:
    """The same by the engine."""
    return tiled_loss(objective, hidden_ND, head_DV, rows)[0]


def gradient_of(loss: Callable[..., Any], name: str) -> Any:
    """The gradients of hidden rows and head, jitted."""
    return jax.jit(jax.grad(functools.partial(loss, OBJECTIVES[name]), argnums=(0, 1)))


def measure_engine(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Loss and gradients of hidden rows and head. The naive one, all logits at once, is compiled for its memory and does not run."""
    N, D, rows = args.batch * args.seq, config.width, []
    for vocab in args.vocab:
        keys = jax.random.split(jax.random.key(0), 3)
        hidden_ND = jax.random.normal(keys[0], (N, D), args.dtype)
        head_DV = 0.05 * jax.random.normal(keys[1], (D, vocab), args.dtype)
        tokens = TokenInputs(ghost=jax.random.randint(keys[2], (N,), 0, vocab), weight=jnp.ones((N,)))
        programs, facts = {}, {}
        for name in args.objectives:
            naive = compiled(gradient_of(naive_loss, name), hidden_ND, head_DV, tokens)[1]["temp_bytes"]
            program, own = compiled(gradient_of(engine_loss, name), hidden_ND, head_DV, tokens)
            programs[name] = functools.partial(program, hidden_ND, head_DV, tokens)
            facts[name] = own | {"naive_bytes": naive, "naive_over_engine": naive / own["temp_bytes"]}
        times = in_turn(programs, args.repeats, args.warmup)
        floor = 3 * 2 * N * D * vocab / matrix_rate(args.dtype)
        for name, found in times.items():
            which = {"vocab": vocab, "objective": name, "tile_size": default_tile_size(N, vocab)}
            beside = {"logits_bytes": 4 * N * vocab, "tokens_per_sec": N / found.median, "mfu": floor / found.median}
            rows.append(which | found.row() | beside | facts[name])
    return {"rows": rows}


def kernels(batch: Any) -> dict[str, Callable[..., Any]]:
    """The ways to attend over whole sequences on this platform, as functions of query, key and value."""
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
    """Forward and backward of one layer's causal attention by length, the tokens of a batch kept; `mfu` counts the pairs that are read, half of the square."""
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
            program, facts[name] = compiled(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), *qkv)
            programs[name] = functools.partial(program, *qkv)
        for name, found in in_turn(programs, args.repeats, args.warmup).items():
            which = {"seq": seq, "batch": batch, "attention": name}
            speed = {
                "tokens_per_sec": batch * seq / found.median,
                "mfu": flops / found.median / matrix_rate(args.dtype),
            }
            rows.append(which | found.row() | speed | facts[name])
    return {"rows": rows}


def copy_rate() -> float:
    """Bytes a second that the device reads and writes in adding a constant to a large array: the best of five."""
    array = jnp.zeros(2**25 if jax.default_backend() == "cpu" else 2**29, jnp.float32)
    run = jax.jit(lambda x: x + 1.0).lower(array).compile()
    return 2 * array.nbytes / min(in_turn({"copy": lambda: run(array)}, 5)["copy"].seconds)


def measure_generate(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Greedy replies that run to their end. A further token reads all weights and the cache once: `bandwidth` is the share of the measured rate of memory."""
    params, rows = unstack_layers(config, init_params(config, jax.random.key(0))), []
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    rate = copy_rate()
    for batch in args.batches:
        ids = random_batch(config, batch, args.seq).tokens
        prompts = Prompts(tokens=ids, lengths=jnp.full((batch,), args.seq, jnp.int32))
        programs, facts = {}, {}
        for new in (1, args.new_tokens):
            sample = jax.jit(make_sampler(config, SamplingSettings(max_new_tokens=new)))
            program, facts[new] = compiled(sample, params, prompts, jax.random.key(0))
            programs[str(new)] = functools.partial(program, params, prompts, jax.random.key(0))
        times = in_turn(programs, args.repeats, args.warmup)
        first, whole = times["1"].median, times[str(args.new_tokens)]
        a_token = (whole.median - first) / (args.new_tokens - 1)
        slots = batch * (args.seq + args.new_tokens)
        cache = 2 * slots * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
        speed = {"first_token_s": first, "tokens_per_sec": batch * args.new_tokens / whole.median}
        bound = {"further_token_s": a_token, "bandwidth": (weights + cache) / a_token / rate}
        rows.append(
            {"batch": batch} | whole.row() | speed | bound | facts[args.new_tokens] | {"peak_bytes": peak_bytes()}
        )
    return {"rows": rows, "copy_bytes_per_sec": rate, "weight_bytes": weights}
