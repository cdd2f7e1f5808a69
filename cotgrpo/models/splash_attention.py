"""Attention by the TPU kernel "splash": block-sparse flash attention.

The kernel is `jax.experimental.pallas.ops.tpu.splash_attention`. It computes what `cotgrpo.models.attention` computes
for whole sequences. No `[B, T, S]` scores or mask exist, and blocks that a causal mask or a sliding window hides are
skipped. The rule there compares positions; this one compares places in the row. Both agree if every document is
contiguous and its positions count up, as in packed rows. Rows of padding differ, and nothing reads them.

XLA cannot partition a kernel, so on the ambient mesh (`jax.set_mesh`) it runs inside `shard_map`. Sequences are split
over `data`, `fsdp` and `expert`, heads over `tensor`, and queries over `context`, with keys and values gathered. An
axis that does not divide its dimension does not split it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cotgrpo.models.config import ATTENTION_RESULT
from cotgrpo.sharding import DIMENSIONS

if TYPE_CHECKING:
    from cotgrpo.types import Array, Bool, Float, Int

LANES = 128
"""The length of a sequence is padded to a multiple of this."""
BLOCKS = (512, 384, 256, 128)
"""Rows of a block: the first of these that divides the sequence.

512 x 512 float32 scores take 1 MiB. A core has at least 16 MiB of fast memory.
"""


def splash_attention(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    windows: tuple[int | None, ...] = (None,),
    is_local: Bool[Array, ""] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
    sinks: Float[Array, "Q"] | None = None,
) -> Float[Array, "B T Q H"]:
    """Return `softmax(cap(q k^T * scale) + mask) v`: causal grouped-query attention inside segments.

    Scores and softmax are float32.

    Args:
        query, key, value: any float type. Heads and groups are those of `attention`.
        segment_ids: a query sees keys of its own segment only.
        windows: the window of every layer, or (that of global layers, that of local ones). None: all keys before.
        is_local: bool scalar, whether this layer's window is the second one.
        scale: None: `1 / sqrt(H)`.
        softcap: as in `attention`.
        interpret: interpret the kernel's program, on any platform, for tests.
        sinks: as in `attention`.
    """
    T, H = query.shape[1], query.shape[3]
    layout = Layout.of_ambient_mesh(query.shape[0], key.shape[2])
    query = query * (H**-0.5 if scale is None else scale)
    rows = LANES * layout.parts(layout.queries)
    padded = lambda x: jnp.pad(x, ((0, 0), (0, -T % rows)) + ((0, 0),) * (x.ndim - 2))
    inputs = (*(jnp.swapaxes(padded(x), 1, 2) for x in (query, key, value)), padded(segment_ids))
    run = functools.partial(run_kernel, sinks=sinks, layout=layout, softcap=softcap, interpret=interpret)
    # A window as long as the sequence hides nothing.
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
    """How the dimensions are sharded.

    Attributes:
        mesh: the ambient mesh, or None.
        batch, heads, queries: mesh axes that split each dimension, as in a `PartitionSpec`.
    """

    mesh: AbstractMesh | None = None
    batch: tuple[str, ...] = ()
    heads: str | None = None
    queries: str | None = None

    @classmethod
    def of_ambient_mesh(cls, batch: int, num_kv_heads: int) -> Layout:
        """Return the layout on the ambient mesh, with axes that no enclosing `shard_map` uses.

        An axis that does not divide the sequences or the key/value heads does not split them.
        """
        mesh = jax.sharding.get_abstract_mesh()
        free = {} if mesh.empty else {axis: mesh.shape[axis] for axis in mesh.auto_axes}
        if not free:
            return cls()
        split: tuple[str, ...] = ()
        for axis in DIMENSIONS["B"]:
            if axis in free and batch % math.prod(free[name] for name in (*split, axis)) == 0:
                split = (*split, axis)
        divides = num_kv_heads % free.get("tensor", 1) == 0
        return cls(
            mesh, split, "tensor" if "tensor" in free and divides else None, "context" if "context" in free else None
        )

    def parts(self, axis: str | None) -> int:
        """Return the number of shards over a mesh axis."""
        return 1 if axis is None or self.mesh is None else self.mesh.shape[axis]


def run_kernel(
    query: Float[Array, "B Q T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"],
    *,
    sinks: Float[Array, "Q"] | None,
    layout: Layout,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> Float[Array, "B Q T H"]:
    """Run the kernel on the mesh."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    heads, length = query.shape[1] // layout.parts(layout.heads), query.shape[2]
    kernel = make_kernel(heads, length, layout.parts(layout.queries), window, softcap, interpret)

    def shard(
        kernel: Callable[..., Array],
        query: Float[Array, "B Q T H"],
        key: Float[Array, "B K S H"],
        value: Float[Array, "B K S H"],
        query_segments: Int[Array, "B T"],
        key_segments: Int[Array, "B S"],
        sinks: Float[Array, "Q"] | None,
    ) -> Float[Array, "B Q T H"]:
        one = lambda q, k, v, qs, ks: kernel(q, k, v, segment_ids=SegmentIds(qs, ks), sinks=sinks)
        return jax.vmap(one)(query, key, value, query_segments, key_segments)

    if layout.mesh is None:
        return shard(kernel, query, key, value, segment_ids, segment_ids, sinks)
    of_queries, of_keys = (P(layout.batch, layout.heads, part, None) for part in (layout.queries, None))
    mapped: Callable[..., Any] = jax.shard_map(
        shard,
        in_specs=(
            kernel.manual_sharding_spec(NamedSharding(layout.mesh, P(None, layout.queries))),
            *(of_queries, of_keys, of_keys),
            *(P(layout.batch, layout.queries), P(layout.batch, None)),
            None if sinks is None else P(layout.heads),
        ),
        out_specs=of_queries,
        axis_names=set(layout.mesh.auto_axes),
        check_vma=False,  # a kernel's outputs have no type that names the axes they vary over
    )
    return mapped(kernel, query, key, value, segment_ids, segment_ids, sinks)


def make_kernel(
    num_heads: int, length: int, query_shards: int, window: int | None, softcap: float | None, interpret: bool
) -> Any:
    """Build the kernel for the query heads of one device: a pytree of block tables that can be called.

    The tables cover all `query_shards`.
    """
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
        residual_checkpoint_name=ATTENTION_RESULT,
        interpret=interpret,
    )
