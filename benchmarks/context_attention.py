"""Compare attention over a sequence that is split over the `context` axis: a gather of keys and values, and a ring.

    python benchmarks/context_attention.py --json benchmarks/results/cpu/context_attention.json

It runs one layer's attention in float32, forward and backward, on 2, 4 and 8 virtual CPU devices, in three ways:

    gather          the library's: one gather of keys and values, then plain attention, which materializes all scores
    gather, blocks  the same gather, read block by block with an online softmax, as a kernel reads it
    ring            Ring Attention (Liu et al. 2023, arXiv:2310.01889): the same blocks, passed between neighbours

The second and the third differ only in how the blocks arrive. Each row has the time, the bytes that a device sends and
the temporaries, both from the compiled program (`cotgrpo.planning.hlo`), and the largest difference of outputs and
gradients from attention on one device. The devices share one memory, so the bytes show a network's cost and the times
do not.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cotgrpo
from cotgrpo.models.attention import MASKED, attention, causal_segment_mask
from cotgrpo.planning.hlo import bytes_sent, collectives
from cotgrpo.sharding import constrain, traced_on

AXIS = "context"
Block = tuple[Any, Any, Any, Any]
"""Keys, values `[B, S, K, H]`, positions and segment ids `[B, S]` of the tokens of one device."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=2_048, help="tokens of the sequence")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    inputs = make_inputs(args.tokens, args.heads, args.kv_heads, args.head_dim)
    whole = jax.jit(gradients(one_device))(*inputs)
    rows = [row(way, count, inputs, whole, args.repeats) for count in args.devices for way in WAYS]
    print("| way | devices | MB sent | theory | MB of temporaries | ms, least of repeats | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['way']} | {r['devices']} | {r['sent'] / 1e6:.3f} | {r['theory'] / 1e6:.3f} "
            f"| {r['temporaries'] / 1e6:.2f} | {1e3 * r['min_s']:.0f} | {r['difference']:.1e} |"
        )
    if args.json:
        shape = {name: getattr(args, name) for name in ("tokens", "heads", "kv_heads", "head_dim")}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"jax": jax.__version__} | shape | {"rows": rows}, indent=1) + "\n")


def make_inputs(tokens: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Any, ...]:
    """Return query, key, value, positions, segment ids and the output's gradient: one sequence of two documents."""
    rng = np.random.default_rng(0)
    normal = lambda count: jnp.asarray(rng.normal(size=(1, tokens, count, head_dim)), jnp.float32)
    first = 5 * tokens // 8
    segments = np.where(np.arange(tokens) < first, 1, 2).astype(np.int32)[None]
    positions = np.where(segments == 1, np.arange(tokens), np.arange(tokens) - first).astype(np.int32)
    query, key, value, weight = normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)
    return query, key, value, jnp.asarray(positions), jnp.asarray(segments), weight


def gradients(mixed: Callable[..., Any]) -> Callable[..., Any]:
    """Return the output, and the gradients of `sum(output * weight)` in query, key and value."""

    def both(query: Any, key: Any, value: Any, positions: Any, segments: Any, weight: Any) -> Any:
        out, pull = jax.vjp(lambda *qkv: mixed(*qkv, positions, segments), query, key, value)
        return out, *pull(weight)

    return both


def row(way: str, count: int, inputs: tuple[Any, ...], whole: Any, repeats: int) -> dict[str, Any]:
    """Measure one way on the first `count` devices."""
    mesh = cotgrpo.make_mesh(context=count, devices=jax.devices()[:count])
    split = NamedSharding(mesh, P(None, AXIS))
    inputs = jax.device_put(inputs, split)
    function = traced_on(mesh, gradients(functools.partial(WAYS[way], mesh)))
    compiled = jax.jit(function, out_shardings=split).lower(*inputs).compile()
    found = jax.block_until_ready(compiled(*inputs))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - started)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    sent = sum(bytes_sent(collectives(text)).values())
    return {
        "way": way,
        "devices": count,
        "sent": sent,
        "theory": theory(way, count, inputs[1].size),
        "temporaries": memory.temp_size_in_bytes,
        "min_s": min(seconds),
        "median_s": float(np.median(seconds)),
        "difference": max(float(jnp.abs(a - b).max()) for a, b in zip(jax.device_get(found), whole, strict=True)),
    }


def theory(way: str, n: int, size: int) -> float:
    """Return the bytes that a device sends.

    The keys of the whole sequence have `size` elements, and so do the values. Positions and segments do not count.
    """
    once = 2 * 4 * size / n  # this device's keys and values
    if way == "ring":  # round once forward; round again backward, and their gradients one step further, home
        return once * ((n - 1) + (n - 1) + n)
    # The backward pass keeps the gathered keys and values. XLA for CPU sums the gradients of `gather` by an all-reduce,
    # which sends twice what a reduce-scatter does.
    return once * (3 if way == "gather" else 2) * (n - 1)


def one_device(query: Any, key: Any, value: Any, positions: Any, segments: Any) -> Any:
    return attention(query, key, value, causal_segment_mask(positions, segments, positions, segments))


def gather(mesh: Mesh, query: Any, key: Any, value: Any, positions: Any, segments: Any) -> Any:
    """Gather keys and values as `cotgrpo.models.decoder.Layer.attend` does."""
    query, key, value = constrain(query, "BTQH"), constrain(key, "BTKH"), constrain(value, "BTKH")
    return constrain(one_device(query, constrain(key, "BSKH"), constrain(value, "BSKH"), positions, segments), "BTQH")


def by_blocks(mesh: Mesh, query: Any, key: Any, value: Any, positions: Any, segments: Any, *, ring: bool) -> Any:
    """Attend block by block with an online softmax; the blocks come from a gather, or around the ring."""
    n = mesh.shape[AXIS]
    walk, walk_back = (ring_forward, ring_backward) if ring else (gather_forward, gather_backward)

    @jax.custom_vjp
    def mixed(query: Any, block: Block) -> Any:
        return walk(query, block, n)[0]

    def forward(query: Any, block: Block) -> Any:
        out, log_sum = walk(query, block, n)
        return out, (query, block, out, log_sum)

    def backward(kept: Any, d_out: Any) -> Any:
        query, block, out, log_sum = kept
        row_sum = jnp.einsum("btkgh,btkgh->bkgt", out, d_out)
        d_query, d_key, d_value = walk_back(query, block, (d_out, log_sum, row_sum), n)
        return d_query, (d_key, d_value, None, None)

    mixed.defvjp(forward, backward)

    def own(query: Any, key: Any, value: Any, positions: Any, segments: Any) -> Any:
        B, T, Q, H = query.shape
        K = key.shape[2]
        grouped = query.reshape(B, T, K, Q // K, H) * H**-0.5
        seen_by = (positions, segments)
        return mixed((grouped, *seen_by), (key, value, *seen_by)).reshape(B, T, Q, H)

    split = P(None, AXIS)
    return jax.shard_map(own, mesh=mesh, in_specs=(split,) * 5, out_specs=split, check_vma=False)(
        query, key, value, positions, segments
    )


def scores_of(query: Any, block: Block) -> Any:
    """Return `[B, K, G, T, S]`: this device's queries times one block of keys."""
    grouped, positions, segments = query
    seen = causal_segment_mask(positions, segments, block[2], block[3])
    return jnp.where(seen[:, None, None], jnp.einsum("btkgh,bskh->bkgts", grouped, block[0]), MASKED)


def start(query: Any) -> Any:
    """Return the online softmax before the first block: maximum score, sum of exponentials, weighted sum of values."""
    B, T, K, G, H = query[0].shape
    return jnp.full((B, K, G, T), MASKED), jnp.zeros((B, K, G, T)), jnp.zeros((B, K, G, T, H))


def read(state: Any, query: Any, block: Block) -> Any:
    """Return the online softmax after one more block."""
    top, total, mixed = state
    scores = scores_of(query, block)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
    mixed = mixed * shrink[..., None] + jnp.einsum("bkgts,bskh->bkgth", weights, block[1])
    return new_top, total * shrink + weights.sum(axis=-1), mixed


def finish(state: Any) -> tuple[Any, Any]:
    """Return the output `[B, T, K, G, H]` and the log of the sum of exponentials `[B, K, G, T]`."""
    top, total, mixed = state
    return jnp.moveaxis(mixed / total[..., None], 3, 1), top + jnp.log(total)


def read_back(query: Any, block: Block, above: Any) -> tuple[Any, Any, Any]:
    """Return one block's share of the gradients of query, keys and values, from recomputed scores."""
    d_out, log_sum, row_sum = above
    weights = jnp.exp(scores_of(query, block) - log_sum[..., None])
    d_value = jnp.einsum("bkgts,btkgh->bskh", weights, d_out)
    d_scores = weights * (jnp.einsum("btkgh,bskh->bkgts", d_out, block[1]) - row_sum[..., None])
    d_query = jnp.einsum("bkgts,bskh->btkgh", d_scores, block[0])
    return d_query, jnp.einsum("bkgts,btkgh->bskh", d_scores, query[0]), d_value


def passed_on(tree: Any, n: int) -> Any:
    """Return what the previous device of the ring has."""
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)]), tree)


def ring_forward(query: Any, block: Block, n: int) -> tuple[Any, Any]:
    def turn(carry: Any, _: None) -> Any:
        state, block = carry
        return (read(state, query, block), passed_on(block, n)), None

    (state, block), _ = jax.lax.scan(turn, (start(query), block), None, length=n - 1)
    return finish(read(state, query, block))


def ring_backward(query: Any, block: Block, above: Any, n: int) -> tuple[Any, Any, Any]:
    """Pass the gradients of each block around with it, and one step further back to its owner."""

    def turn(carry: Any, _: None) -> Any:
        d_query, block, d_block = carry
        more, *d_more = read_back(query, block, above)
        d_block = passed_on(jax.tree.map(jnp.add, d_block, tuple(d_more)), n)
        return (d_query + more, passed_on(block, n), d_block), None

    zeros = (jnp.zeros_like(block[0]), jnp.zeros_like(block[1]))
    carry = (jnp.zeros_like(query[0]), block, zeros)
    (d_query, block, d_block), _ = jax.lax.scan(turn, carry, None, length=n - 1)
    more, *d_more = read_back(query, block, above)
    return with_position_gradients(d_query + more), *passed_on(jax.tree.map(jnp.add, d_block, tuple(d_more)), n)


def gather_forward(query: Any, block: Block, n: int) -> tuple[Any, Any]:
    blocks = jax.lax.all_gather(block, AXIS)
    return finish(jax.lax.scan(lambda state, block: (read(state, query, block), None), start(query), blocks)[0])


def gather_backward(query: Any, block: Block, above: Any, n: int) -> tuple[Any, Any, Any]:
    def turn(d_query: Any, block: Block) -> Any:
        more, *d_block = read_back(query, block, above)
        return d_query + more, tuple(d_block)

    d_query, d_blocks = jax.lax.scan(turn, jnp.zeros_like(query[0]), jax.lax.all_gather(block, AXIS))
    return with_position_gradients(d_query), *(jax.lax.psum_scatter(d, AXIS) for d in d_blocks)


def with_position_gradients(d_query: Any) -> tuple[Any, None, None]:
    """Add the gradients of positions and segments, which are None."""
    return d_query, None, None


WAYS: dict[str, Callable[..., Any]] = {
    "gather": gather,
    "gather, blocks": functools.partial(by_blocks, ring=False),
    "ring": functools.partial(by_blocks, ring=True),
}

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
