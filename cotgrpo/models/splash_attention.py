"""Attention by the TPU kernel "splash" (block-sparse flash attention, `jax.experimental.pallas.ops.tpu.splash_attention`).

It computes what `cotgrpo.models.attention` computes, for whole sequences: no `[B, T, S]` scores or mask exist, and blocks that a causal mask or
a sliding window hides are skipped. Where the rule there compares positions, this one compares places in the row. That is the same for
documents that lie in one piece with positions that count up, as packing writes them; what padding reads differs, and no one reads padding.

A kernel cannot be partitioned by the compiler, so on the ambient mesh (`jax.set_mesh`) it runs inside `shard_map`: sequences over `data` and
`fsdp`, heads over `tensor`, queries over `context` with keys and values gathered. An axis that does not divide its dimension does not split it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cotgrpo.models.config import SAVED_NAMES

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int

LANES = 128
"""Rows of a block are a multiple of this; shorter sequences are padded."""
BLOCKS = (512, 384, 256, 128)
"""Rows of a block, the first that divides the sequence. 512 x 512 float32 scores are 1 MiB of the 16 or more that a core has of fast memory."""


def splash_attention(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    windows: tuple[int | None, ...] = (None,),
    is_local: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T Q H"]:
    """Causal grouped-query attention inside segments, `softmax(cap(q k^T * scale) + mask) v`; scores and softmax in float32.

    Args:
        query, key, value: any float type, heads and groups as in `attention`.
        segment_ids: a query reads keys of its own segment alone.
        windows: the window of every layer, or (that of global layers, that of local ones); None: all keys before the query.
        is_local: bool scalar, which of two windows is this layer's.
        scale: None: `1 / sqrt(H)`.
        softcap: as in `attention`.
        interpret: run the kernel's program step by step, on any platform, for tests.
    """
    T, H = query.shape[1], query.shape[3]
    layout = Layout.of_ambient_mesh(query.shape[0], key.shape[2])
    query = query * (H**-0.5 if scale is None else scale)
    rows = LANES * layout.parts(layout.queries)
    padded = lambda x: jnp.pad(x, ((0, 0), (0, -T % rows)) + ((0, 0),) * (x.ndim - 2))
    inputs = (*(jnp.swapaxes(padded(x), 1, 2) for x in (query, key, value)), padded(segment_ids))
    run = functools.partial(run_kernel, layout=layout, softcap=softcap, interpret=interpret)
    # A window that holds the whole sequence hides nothing.
    windows = tuple(dict.fromkeys(None if window is None or window >= T else window for window in windows))
    if len(windows) == 1:
        mixed = run(*inputs, window=windows[0])
    else:
        mixed = jax.lax.cond(
            is_local, functools.partial(run, window=windows[1]), functools.partial(run, window=windows[0]), *inputs
        )
    return jnp.swapaxes(mixed, 1, 2)[:, :T]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the dimensions lie on a mesh.

    Attributes:
        mesh: the mesh in use, with axes that no `shard_map` around has taken; None: there is none.
        batch, heads, queries: the axes that split each, as in a `PartitionSpec`.
    """

    mesh: Any = None
    batch: tuple[str, ...] = ()
    heads: str | None = None
    queries: str | None = None

    @classmethod
    def of_ambient_mesh(cls, batch: int, num_kv_heads: int) -> Layout:
        """An axis that does not divide the sequences or the key/value heads does not split them."""
        mesh = jax.sharding.get_abstract_mesh()
        free = {} if mesh.empty else {axis: mesh.shape[axis] for axis in mesh.auto_axes}
        if not free:
            return cls()
        split: tuple[str, ...] = ()
        for axis in ("data", "fsdp"):
            if axis in free and batch % math.prod(free[name] for name in (*split, axis)) == 0:
                split = (*split, axis)
        divides = num_kv_heads % free.get("tensor", 1) == 0
        return cls(
            mesh, split, "tensor" if "tensor" in free and divides else None, "context" if "context" in free else None
        )

    def parts(self, axis: str | None) -> int:
        return 1 if axis is None else self.mesh.shape[axis]


def run_kernel(
    query: Any,
    key: Any,
    value: Any,
    segment_ids: Any,
    *,
    layout: Layout,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> Any:
    """The kernel on `[B, heads, T, H]`, split over the mesh."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    heads, length = query.shape[1] // layout.parts(layout.heads), query.shape[2]
    kernel = make_kernel(heads, length, layout.parts(layout.queries), window, softcap, interpret)

    def shard(kernel: Any, query: Any, key: Any, value: Any, query_segments: Any, key_segments: Any) -> Any:
        one = lambda q, k, v, qs, ks: kernel(q, k, v, segment_ids=SegmentIds(qs, ks))
        return jax.vmap(one)(query, key, value, query_segments, key_segments)

    if layout.mesh is None:
        return shard(kernel, query, key, value, segment_ids, segment_ids)
    of_queries, of_keys = (P(layout.batch, layout.heads, part, None) for part in (layout.queries, None))
    mapped: Callable[..., Any] = jax.shard_map(
        shard,
        in_specs=(
            kernel.manual_sharding_spec(NamedSharding(layout.mesh, P(None, layout.queries))),
            *(of_queries, of_keys, of_keys),
            *(P(layout.batch, layout.queries), P(layout.batch, None)),
        ),
        out_specs=of_queries,
        axis_names=set(layout.mesh.auto_axes),
        check_vma=False,  # a kernel's outputs do not say over which axes they vary
    )
    return mapped(kernel, query, key, value, segment_ids, segment_ids)


def make_kernel(
    num_heads: int, length: int, query_shards: int, window: int | None, softcap: float | None, interpret: bool
) -> Any:
    """The kernel for the query heads of one device; its tables of blocks are those of all `query_shards`."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), offset=0)
    block_q = next(rows for rows in BLOCKS if length // query_shards % rows == 0)
    block_kv = next(rows for rows in BLOCKS if length % rows == 0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            *(block_q, block_kv, block_kv), *(block_q, block_kv, block_kv), *(block_q, block_kv)
        ),
        head_shards=1,
        q_seq_shards=query_shards,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED_NAMES,
        interpret=interpret,
    )
