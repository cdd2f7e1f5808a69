"""The student: one decoder-only transformer in Flax linen, driven by one frozen `DecoderConfig`.

RMSNorm before each block, rotary positions, grouped-query attention, a gated MLP, and a head that may be tied to the embedding. The layers
are one scanned layer with stacked parameters, so compile time does not grow with depth and the state is a few large arrays.

The same module serves training (`make_student`) and generation (`init_cache`, `decode`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from cotgrpo.models.attention import attention, causal_segment_mask, rotate
from cotgrpo.types import Params, Student

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int, PRNGKeyArray

REMAT_POLICIES = ("nothing", "dots", "block")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder.

    Attributes:
        vocab_size: V, rows of the embedding and columns of the head.
        width: D, the size of the residual stream.
        num_layers: L.
        num_heads: Q, query heads.
        num_kv_heads: K, key/value heads; divides `num_heads`.
        head_dim: H, even.
        mlp_width: F, the size of the gated MLP's middle.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square in RMSNorm.
        tied_head: the head is the transposed embedding.
        init_scale: standard deviation of the initial weights; projections back into the residual stream are divided by `sqrt(2 L)`.
        dtype: compute type, "float32" or "bfloat16". Norms, softmax and logits are float32 either way.
        param_dtype: storage type of the parameters.
        remat: what the backward pass recomputes: "nothing" (all activations are kept), "dots" (all but matrix products),
            "block" (everything inside a layer; only the residual stream is kept).
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = True
    init_scale: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "nothing"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"DecoderConfig.{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig.num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim must be even for rotary positions, got {self.head_dim}.")
        for name, allowed in (("remat", REMAT_POLICIES), ("dtype", DTYPES), ("param_dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"DecoderConfig.{name} must be one of {allowed}, got {getattr(self, name)!r}.")

    def num_params(self) -> int:
        """The number of parameters."""
        attention_params = self.width * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention_params + 3 * self.width * self.mlp_width + 2 * self.width
        return self.num_layers * layer + self.width + self.vocab_size * self.width * (1 if self.tied_head else 2)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale_D.astype(jnp.float32)[None, None, :]).astype(x.dtype)


class KvCache(flax.struct.PyTreeNode):
    """Keys and values of the tokens read so far, for all layers.

    Attributes:
        keys, values: `[L, B, S, K, H]` in the compute dtype, keys already rotated.
        positions: int32 `[B, S]`, the position of the token in each slot.
        segment_ids: int32 `[B, S]`, the segment of the token in each slot; -1 marks an empty slot, which no query matches.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]


class Layer(nn.Module):
    """One transformer layer: attention and a gated MLP, each added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, carry: tuple[Any, Any, Any], positions: Any, mask: Any, slot: Any) -> tuple[Any, None]:
        """`carry` is (residual stream, index of this layer, None or the keys and values of all layers).

        The cache travels in the scan's carry, not as a scanned input, so that XLA updates it in place.
        """
        c = self.config
        x, index, cached = carry
        mixed, cached = self.attend(x, index, cached, positions, mask, slot)
        x = x + self.dense("out", c.width, to_residual=True)(mixed)
        h = RMSNorm(c.norm_eps, jnp.dtype(c.param_dtype), name="mlp_norm")(x)
        gate, up = self.dense("gate", c.mlp_width)(h), self.dense("up", c.mlp_width)(h)
        x = x + self.dense("down", c.width, to_residual=True)(nn.silu(gate) * up)
        return (x, index + 1, cached), None

    def attend(self, x: Any, index: Any, cached: Any, positions: Any, mask: Any, slot: Any) -> tuple[Any, Any]:
        c = self.config
        B, T, _ = x.shape
        h = RMSNorm(c.norm_eps, jnp.dtype(c.param_dtype), name="attention_norm")(x)
        query = self.dense("query", c.num_heads * c.head_dim)(h).reshape(B, T, c.num_heads, c.head_dim)
        key = self.dense("key", c.num_kv_heads * c.head_dim)(h).reshape(B, T, c.num_kv_heads, c.head_dim)
        value = self.dense("value", c.num_kv_heads * c.head_dim)(h).reshape(B, T, c.num_kv_heads, c.head_dim)
        query, key = rotate(query, positions, c.rope_theta), rotate(key, positions, c.rope_theta)
        if cached is not None:
            at = (index, 0, slot, 0, 0)
            cached = tuple(
                jax.lax.dynamic_update_slice(old, new[None], at) for old, new in zip(cached, (key, value), strict=True)
            )
            key, value = (jax.lax.dynamic_index_in_dim(both, index, keepdims=False) for both in cached)
        return attention(query, key, value, mask).reshape(B, T, c.num_heads * c.head_dim), cached

    def dense(self, name: str, features: int, to_residual: bool = False) -> nn.Dense:
        c = self.config
        scale = c.init_scale / (2 * c.num_layers) ** 0.5 if to_residual else c.init_scale
        return nn.Dense(
            features,
            use_bias=False,
            name=name,
            dtype=jnp.dtype(c.dtype),
            param_dtype=jnp.dtype(c.param_dtype),
            kernel_init=nn.initializers.normal(scale),
        )


class Decoder(nn.Module):
    """Token ids to the rows that the head reads (after the last norm)."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, tokens: Any, positions: Any, segment_ids: Any, cache: KvCache | None = None, slot: Any = 0
    ) -> tuple[Any, KvCache | None]:
        c = self.config
        embedding_VD = self.param(
            "embedding", nn.initializers.normal(c.init_scale), (c.vocab_size, c.width), jnp.dtype(c.param_dtype)
        )
        if not c.tied_head:
            self.param("head", nn.initializers.normal(c.init_scale), (c.width, c.vocab_size), jnp.dtype(c.param_dtype))
        x_BTD = embedding_VD[tokens].astype(jnp.dtype(c.dtype))
        if cache is None:
            key_positions, key_segments, cached = positions, segment_ids, None
        else:
            key_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, slot, axis=1)
            key_segments = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, slot, axis=1)
            cached = (cache.keys, cache.values)
        mask = causal_segment_mask(positions, segment_ids, key_positions, key_segments)
        layers = nn.scan(
            self.rematted_layer(),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, name="layers")
        (x_BTD, _, cached), _ = layers((x_BTD, jnp.int32(0), cached), positions, mask, slot)
        x_BTD = RMSNorm(c.norm_eps, jnp.dtype(c.param_dtype), name="final_norm")(x_BTD)
        if cache is None:
            return x_BTD, None
        return x_BTD, KvCache(cached[0], cached[1], key_positions, key_segments)

    def rematted_layer(self) -> Any:
        if self.config.remat == "nothing":
            return Layer
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.config.remat == "dots" else None
        # Inside a scan the loop itself keeps the recomputation from being merged away, so CSE need not be prevented.
        return nn.remat(Layer, policy=policy, prevent_cse=False)


def init_params(config: DecoderConfig, key: PRNGKeyArray) -> Params:
    """Fresh parameters: a nested dict of arrays, layers stacked on axis 0."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(Decoder(config).init)(key, ids, ids, ids)["params"]


def head_of(config: DecoderConfig, params: Params) -> Float[Array, "D V"]:
    """The head in the compute dtype: the transposed embedding when tied."""
    head_DV = params["embedding"].T if config.tied_head else params["head"]
    return head_DV.astype(jnp.dtype(config.dtype))


def make_student(config: DecoderConfig, vocab_size: int | None = None) -> Student:
    """The decoder as the pure functions that train steps take.

    Args:
        config: the decoder's shape.
        vocab_size: the tokenizer's size when `config.vocab_size` is padded beyond it; padded ids are never drawn.
    """
    if vocab_size is not None and vocab_size > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {vocab_size} tokens but the model's vocabulary holds {config.vocab_size}: "
            "use the tokenizer that belongs to the model, or enlarge the embedding."
        )

    def hidden(params: Params, tokens: Any, positions: Any, segment_ids: Any) -> Any:
        return Decoder(config).apply({"params": params}, tokens, positions, segment_ids)[0]

    padded = vocab_size is not None and vocab_size < config.vocab_size
    return Student(
        hidden=hidden, head=lambda params: head_of(config, params), vocab_size=vocab_size if padded else None
    )


def init_cache(config: DecoderConfig, batch: int, length: int) -> KvCache:
    """An empty cache of `length` slots for `batch` rows."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return KvCache(
        keys=jnp.zeros(shape, jnp.dtype(config.dtype)),
        values=jnp.zeros(shape, jnp.dtype(config.dtype)),
        positions=jnp.zeros((batch, length), jnp.int32),
        segment_ids=jnp.full((batch, length), -1, jnp.int32),
    )


def decode(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    cache: KvCache,
    slot: int | Int[Array, ""],
) -> tuple[Float[Array, "B T D"], KvCache]:
    """Reads T more tokens a row, written to cache slots `[slot, slot + T)`, the same for every row.

    Each query attends to all filled slots of its own segment whose position is not after its own, so rows of different
    length are left-padded with segment 0 and agree with the unpadded forward pass.

    Returns:
        The rows that the head reads, and the cache with the new tokens.
    """
    out: Any = Decoder(config).apply({"params": params}, tokens, positions, segment_ids, cache, slot)
    return out
