"""The student: a decoder-only transformer in Flax linen, driven by one frozen `DecoderConfig`.

RMSNorm before each block, rotary positions, grouped-query attention, a gated MLP, and a head that may be tied to the
embedding. The layers are one scanned layer with stacked parameters, so compile time does not grow with depth. If some
layers have a sliding window, both views of the sequence are made once and each layer picks its own.

The same module serves training (`make_student`) and generation (`init_cache`, `decode`). With a cache the layers are
unrolled, each with arrays of its own (`unstack_layers`). Compile time then grows with depth, but no token copies
weights or cache.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from cotgrpo.models.attention import attention, attention_by_head, causal_segment_mask
from cotgrpo.models.blockwise_attention import block_attention
from cotgrpo.models.config import LAYER_INPUT, PROJECTION_NAMES, QKV, SAVED_NAMES, DecoderConfig, parse_remat
from cotgrpo.models.config import REMAT_POLICIES as REMAT_POLICIES
from cotgrpo.models.layers.per_layer_embeddings import PerLayerInputs
from cotgrpo.models.matmul import project_tokens
from cotgrpo.models.norm_and_gate import broadcast_last, gated, relu_squared, rms_norm, xielu
from cotgrpo.models.rotary import RopeScaling, rotate, rotate_by_product, rotation
from cotgrpo.models.splash_attention import splash_attention
from cotgrpo.sharding import constrain, look_up, vary_alike, with_types_as_layout
from cotgrpo.types import Params, Student
from cotgrpo.xla_cpu import project_few_tokens

if TYPE_CHECKING:
    from cotgrpo.types import Array, Bool, Float, Int, PRNGKeyArray

    LayerCache = tuple[Float[Array, "B K H S"], Float[Array, "B K S H"]]


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    With `plus_one` the factor is `1 + scale`. The result is divided by `divisor`.
    """

    eps: float
    param_dtype: DTypeLike
    plus_one: bool = False
    divisor: float | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale_D = self.param("scale", start, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        if self.plus_one:
            scale_D = 1.0 + scale_D
        if self.divisor is not None:
            scale_D = scale_D / self.divisor
        return rms_norm(*vary_alike(x, scale_D), self.eps)


class TransposedDense(nn.Module):
    """`x W^T + b`: what `nn.Dense` computes, from a kernel `[outputs, inputs]` as `unstack_layers` stores it."""

    features: int
    use_bias: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
        zeros = nn.initializers.zeros
        kernel_FD = self.param("transposed", zeros, (self.features, x.shape[-1]), self.dtype)
        y = project_few_tokens(x.astype(self.dtype), kernel_FD, self.dtype)
        return y + broadcast_last(self.param("bias", zeros, (self.features,), self.dtype), y) if self.use_bias else y


class Xielu(nn.Module):
    """The activation `xielu` with its two parameters."""

    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
        # The inverse softplus of what the paper starts from: 0.8, and 0.8 less the 0.5 that xielu adds.
        start = lambda key, value: jnp.log(jnp.expm1(jnp.full((1,), value))).astype(self.param_dtype)
        alphas = self.param("alpha_p", start, 0.8), self.param("alpha_n", start, 0.3)
        return xielu(*vary_alike(x, *alphas))


class KvCache(flax.struct.PyTreeNode):
    """Keys and values of the tokens read so far, of all layers.

    Attributes:
        keys: of each layer `[B, K, H, S]` in the compute dtype, already rotated.
        values: of each layer `[B, K, S, H]` in the compute dtype.
        positions: int32 `[B, S]`, the position of the token in each column.
        segment_ids: int32 `[B, S]`, the segment of the token in each column. -1 marks an empty column, which no query
            matches.
    """

    keys: tuple[Float[Array, "B K H S"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]


class View(flax.struct.PyTreeNode):
    """What a layer reads of the sequence besides the residual stream.

    Attributes:
        cos, sin: float32 `[B, T, H/2]`, the rotation of each query and new key. None: no rotation.
        query_factors: float32 `[B, T]`, factors of the queries, or None.
        mask: bool `[B, T, S]`, True where a query sees a key. None: attention computes it from the other fields.
        positions, segment_ids: int32 `[B, T]`, of the queries.
        window: int32 scalar, as in `causal_segment_mask`. None: no layer has a window.
    """

    cos: Float[Array, "B T half"] | None
    sin: Float[Array, "B T half"] | None
    query_factors: Float[Array, "B T"] | None
    mask: Bool[Array, "B T S"] | None
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    window: Int[Array, ""] | None


class Layer(nn.Module):
    """One transformer layer: attention and a gated MLP, each added to the residual stream.

    Attributes:
        transposed: whether the matrices are stored as `unstack_layers` returns them.
    """

    config: DecoderConfig
    transposed: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        is_local: Bool[Array, ""] | None,
        is_rotated: Bool[Array, ""] | None,
        views: tuple[View, ...],
        per_layer: Float[Array, "B T P"] | None = None,
        cached: LayerCache | None = None,
        column: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Return the residual stream after the layer, and `cached` with the new keys and values from `column` on.

        With two views, the global and the local one, `is_local` picks this layer's. If `is_rotated` is given and
        False, this layer rotates nothing. `per_layer` is this layer's part of the per-layer embeddings.
        """
        c = self.config
        x = checkpoint_name(constrain(x, "BTD"), LAYER_INPUT)
        view = views[0] if len(views) == 1 else jax.tree.map(functools.partial(jnp.where, is_local), *views[::-1])
        if is_rotated is not None and view.cos is not None and view.sin is not None:
            view = view.replace(cos=jnp.where(is_rotated, view.cos, 1.0), sin=jnp.where(is_rotated, view.sin, 0.0))
        query, key, value = self.query_key_value(x, view)
        if cached is None or view.mask is None:
            mixed = self.attend(query, key, value, view, is_local)
        else:
            cached = append_to_cache(cached, key, value, column)
            mixed = attention_by_head(query, *cached, view.mask, c.query_scale, c.attention_softcap)
        mixed = constrain(mixed, "BTQH")
        mixed = mixed.reshape(*mixed.shape[:2], c.num_heads * c.head_dim)
        mixed = constrain(self.dense("out", to_residual=True)(mixed), "BTD")
        x = x + self.added("post_attention_norm", mixed)
        h = self.norm("mlp_norm")(x) if c.pre_norms else x
        h = constrain(self.activated(h), "BTF")
        h = constrain(self.dense("down", to_residual=True)(h), "BTD")
        x = x + self.added("post_mlp_norm", h)
        if per_layer is not None:
            x = x + self.from_per_layer(x, per_layer)
        if c.layer_scale:
            scale = self.param("layer_scale", nn.initializers.ones, (1,), jnp.dtype(c.param_dtype))
            x = x * broadcast_last(jax.lax.stop_gradient(scale).astype(x.dtype), x)
        return x, cached

    def from_per_layer(self, x: Float[Array, "B T D"], per_layer: Float[Array, "B T P"]) -> Float[Array, "B T D"]:
        """Return what the per-layer embeddings add to the residual stream."""
        h = gated(self.config.activation, self.dense("per_layer_gate")(x), per_layer)
        return self.norm("post_per_layer_norm")(constrain(self.dense("per_layer_out", to_residual=True)(h), "BTD"))

    def added(self, norm: str, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return what a block adds to the residual stream: its result, with the norm after it if there is one."""
        y = self.norm(norm)(y) if self.config.post_norms else y
        scale = self.config.residual_scale
        return y if scale is None else y * jnp.asarray(scale, y.dtype)

    def activated(self, h: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Return the middle of the MLP."""
        c = self.config
        if c.gated_mlp:
            return gated(c.activation, self.dense("gate")(h), self.dense("up")(h))
        up = self.dense("up")(h)
        return relu_squared(up) if c.activation == "relu2" else Xielu(jnp.dtype(c.param_dtype), name="xielu")(up)

    def query_key_value(
        self, x: Float[Array, "B T D"], view: View
    ) -> tuple[Float[Array, "B T Q H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Return the rotated queries and keys, and the values."""
        c = self.config
        B, T, _ = x.shape
        h = self.norm("attention_norm")(x) if c.pre_norms else x
        query = self.dense("query")(h).reshape(B, T, c.num_heads, c.head_dim)
        key = self.dense("key")(h).reshape(B, T, c.num_kv_heads, c.head_dim)
        value = self.dense("value")(h).reshape(B, T, c.num_kv_heads, c.head_dim)
        if c.qk_norm and not c.qk_norm_rotated:
            query, key = self.norm_heads("query_norm", query), self.norm_heads("key_norm", key)
        if c.value_norm:
            value = rms_norm(*vary_alike(value, jnp.ones(c.head_dim, jnp.float32)), c.norm_eps)
        if view.cos is not None and view.sin is not None:
            turn = rotate_by_product if c.attention == "splash" else rotate
            query, key = turn(query, view.cos, view.sin), turn(key, view.cos, view.sin)
        if c.qk_norm and c.qk_norm_rotated:
            query, key = self.norm_heads("query_norm", query), self.norm_heads("key_norm", key)
        if view.query_factors is not None:
            query = query * view.query_factors[:, :, None, None].astype(query.dtype)
        query, key, value = constrain(query, "BTQH"), constrain(key, "BTKH"), constrain(value, "BTKH")
        # A shard of the tokens reads all keys. If tokens are sharded, keys and values are gathered here, once: remat
        # policies that keep products keep them too.
        key, value = (checkpoint_name(constrain(x, "BSKH"), QKV) for x in (key, value))
        return query, key, value

    def norm_heads(self, name: str, x: Float[Array, "B T heads H"]) -> Float[Array, "B T heads H"]:
        """Return the norm of queries or keys: of each head, or of all together."""
        if self.config.qk_norm_over == "head":
            return self.norm(name)(x)
        return self.norm(name)(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def attend(
        self,
        query: Float[Array, "B T Q H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        view: View,
        is_local: Bool[Array, ""] | None,
    ) -> Float[Array, "B T Q H"]:
        """Return the attention of whole sequences, by the implementation that the config names."""
        c = self.config
        softmax = (c.query_scale, c.attention_softcap)
        if view.mask is not None:
            return attention(query, key, value, view.mask, *softmax)
        if c.attention == "blocks":
            return block_attention(query, key, value, view.positions, view.segment_ids, view.window, *softmax)
        windows = (None, c.window) if is_local is not None else (c.window if c.num_local else None,)
        return splash_attention(query, key, value, view.segment_ids, windows, is_local, *softmax)

    def norm(self, name: str) -> RMSNorm:
        """Return the layer's norm of this name."""
        return make_norm(self.config, name)

    def dense(self, name: str, to_residual: bool = False) -> nn.Module:
        """Return the layer's projection of this name."""
        c = self.config
        if self.transposed:
            return TransposedDense(c.projections[name][1], name in c.biases, jnp.dtype(c.dtype), name=name)
        scale = c.init_scale / (2 * c.num_layers) ** 0.5 if to_residual else c.init_scale
        by_head = c.attention == "splash" and name in ("query", "key", "value", "out")
        return nn.Dense(
            c.projections[name][1],
            use_bias=name in c.biases,
            name=name,
            dtype=jnp.dtype(c.dtype),
            param_dtype=jnp.dtype(c.param_dtype),
            kernel_init=nn.initializers.normal(scale),
            dot_general=functools.partial(
                project_tokens,
                letters="FD" if to_residual else "DF",
                saved_name=PROJECTION_NAMES[name],
                head_dim=c.head_dim if by_head else None,
            ),
        )


def append_to_cache(
    cached: LayerCache, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], column: int | Int[Array, ""]
) -> LayerCache:
    """Return a layer's cache with T new keys and values from `column` on."""
    keys = jax.lax.dynamic_update_slice_in_dim(cached[0], jnp.moveaxis(key, 1, 3), column, axis=3)
    values = jax.lax.dynamic_update_slice_in_dim(cached[1], jnp.swapaxes(value, 1, 2), column, axis=2)
    return keys, values


def make_norm(config: DecoderConfig, name: str) -> RMSNorm:
    """Return the RMSNorm of this name with the config's options. The last one divides the logits too."""
    divisor = config.logit_divisor if name == "final_norm" else None
    return RMSNorm(config.norm_eps, jnp.dtype(config.param_dtype), config.norm_plus_one, divisor, name=name)


class Decoder(nn.Module):
    """Token ids to the hidden rows that the head reads (after the last norm)."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: KvCache | None = None,
        column: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], KvCache | None]:
        c = self.config
        embedding_VD = self.param(
            "embedding", nn.initializers.normal(c.init_scale), (c.vocab_size, c.width), jnp.dtype(c.param_dtype)
        )
        if not c.tied_head:
            self.param("head", nn.initializers.normal(c.init_scale), (c.width, c.vocab_size), jnp.dtype(c.param_dtype))
        x_BTD = look_up(embedding_VD, tokens, jnp.dtype(c.dtype), gather=cache is not None)
        if c.embedding_scale is not None:
            x_BTD = x_BTD * jnp.asarray(c.embedding_scale, x_BTD.dtype)
        per_layer = PerLayerInputs(c, name="per_layer")(tokens, x_BTD) if c.per_layer_embeddings is not None else None
        if cache is None:
            x_BTD = self.scan_layers(x_BTD, positions, segment_ids, per_layer)
        else:
            x_BTD, cache = self.unrolled_layers(x_BTD, positions, segment_ids, per_layer, cache, column)
        return make_norm(c, "final_norm")(x_BTD), cache

    def scan_layers(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        per_layer: Float[Array, "L B T P"] | None,
    ) -> Float[Array, "B T D"]:
        """Return the residual stream after all layers, for whole sequences."""
        c = self.config
        views = self.views(positions, segment_ids, (positions, segment_ids) if c.attention == "xla" else None)
        is_local = None if len(views) == 1 else jnp.isin(jnp.arange(c.num_layers), jnp.array(c.local_layers))
        some = 0 < c.num_rotated < c.num_layers
        is_rotated = ~jnp.isin(jnp.arange(c.num_layers), jnp.array(c.unrotated_layers)) if some else None
        layers = nn.scan(
            self.layer_with_remat(),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, 0),
            length=c.num_layers,
        )
        return layers(c, name="layers")(x_BTD, is_local, is_rotated, views, per_layer)[0]

    def unrolled_layers(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        per_layer: Float[Array, "L B T P"] | None,
        cache: KvCache,
        column: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], KvCache]:
        """Return the residual stream after all layers, and the cache with the new tokens."""
        c = self.config
        key_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, column, axis=1)
        key_segments = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, column, axis=1)
        views = self.views(positions, segment_ids, (key_positions, key_segments))
        cached = []
        for index, own in enumerate(zip(cache.keys, cache.values, strict=True)):
            view = views[-1:] if index in (c.local_layers or ()) else views[:1]
            if index in c.unrotated_layers:
                view = (view[0].replace(cos=None, sin=None),)
            layer = Layer(c, transposed=True, name=f"layer_{index}")
            x_BTD, new = layer(x_BTD, None, None, view, None if per_layer is None else per_layer[index], own, column)
            cached.append(new)
        keys, values = zip(*cached, strict=True)
        return x_BTD, KvCache(keys, values, key_positions, key_segments)

    def views(
        self,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        keys: tuple[Int[Array, "B S"], Int[Array, "B S"]] | None,
    ) -> tuple[View, ...]:
        """Return the global view, the local one, or both in this order: those that some layer uses.

        Args:
            positions, segment_ids: of the queries.
            keys: positions and segments of the keys, for a mask. None: no mask.
        """
        c = self.config

        def view(theta: float, scaling: RopeScaling | None, window: int | None) -> View:
            rotated = rotation(positions, theta, c.rotary_dim or c.head_dim, scaling)
            cos, sin = rotated if c.num_rotated else (None, None)
            factors = None if c.rope_scaling is None else c.rope_scaling.query_factors(positions)
            mask = None if keys is None else causal_segment_mask(positions, segment_ids, *keys, window)
            # If layers differ, the program picks a layer's window: there, "no window" is one that holds all tokens.
            reach = jnp.int32(positions.shape[1] if window is None else window) if c.num_local else None
            return View(cos, sin, factors, mask, positions, segment_ids, reach)

        views = []
        if c.num_local < c.num_layers:
            views.append(view(c.rope_theta, c.rope_scaling, None))
        if c.num_local:
            own = c.local_rope_theta
            views.append(view(own or c.rope_theta, None if own else c.rope_scaling, c.window))
        return tuple(views)

    def layer_with_remat(self) -> type[Layer]:
        """Return `Layer`, wrapped in the config's remat policy."""
        remat = parse_remat(self.config.remat)
        if remat is None:
            return Layer
        names = [name for name in remat.on_device if name != LAYER_INPUT]  # an argument, which is kept in any case
        if self.config.remat == "dots":
            names.append(SAVED_NAMES)
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=names,
            names_which_can_be_offloaded=list(remat.on_host),
            offload_src="device",
            offload_dst="pinned_host",
        )
        # Inside a scan, XLA cannot merge the recomputation with the forward pass, so CSE need not be prevented.
        return nn.remat(Layer, policy=policy, prevent_cse=False)


def init_params(config: DecoderConfig, key: PRNGKeyArray) -> Params:
    """Return fresh parameters: a nested dict of arrays, layers stacked on axis 0."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(Decoder(config).init)(key, ids, ids, ids)["params"]


def head_of(config: DecoderConfig, params: Params) -> Float[Array, "D V"]:
    """Return the head in the compute dtype: the transposed embedding if tied."""
    head_DV = params["embedding"].T if config.tied_head else params["head"]
    return head_DV.astype(jnp.dtype(config.dtype))


def make_student(config: DecoderConfig, vocab_size: int | None = None) -> Student:
    """Return the decoder as the pure functions that train steps take.

    Args:
        config: the decoder's shape.
        vocab_size: the tokenizer's size if `config.vocab_size` is padded. Padded ids are never drawn.

    Raises:
        ValueError: `vocab_size` is above `config.vocab_size`.
    """
    if vocab_size is not None and vocab_size > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {vocab_size} tokens but the model's vocabulary holds {config.vocab_size}: "
            "use the tokenizer that belongs to the model, or enlarge the embedding."
        )

    def hidden(
        params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        apply = lambda params, *contexts: Decoder(config).apply({"params": params}, *contexts)[0]
        return with_types_as_layout(apply, params, tokens, positions, segment_ids)

    padded = vocab_size is not None and vocab_size < config.vocab_size
    return Student(
        hidden=hidden,
        head=lambda params: head_of(config, params),
        softcap=config.logit_softcap,
        vocab_size=vocab_size if padded else None,
    )


def unstack_layers(config: DecoderConfig, params: Params) -> Params:
    """Return the parameters as `decode` reads them. Parameters in this form already are returned as they are.

    Each layer has arrays of its own; its matrices are transposed and in the compute dtype. A loop over stacked layers
    copies each layer out of the stack, and a decode loop would do so for every token. Unstacking before the loop costs
    one copy of the layers, in time and memory.
    """
    if "layers" not in params:
        return params
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | slice_layers(config, params["layers"])


@functools.partial(jax.jit, static_argnums=0)
def slice_layers(config: DecoderConfig, layers: Params) -> Params:
    """Return `{"layer_0": ..., ...}` of stacked layers. Outside one program, each slice would compile separately."""
    dtype = jnp.dtype(config.dtype)

    def transpose(name: str, own: Params) -> Params:
        if name not in config.projections:
            return own
        own = {key: x.astype(dtype) for key, x in own.items()}
        return {"transposed": jnp.swapaxes(own.pop("kernel"), 1, 2), **own}

    stacked = {name: transpose(name, own) for name, own in layers.items()}
    return {f"layer_{index}": jax.tree.map(lambda x, at=index: x[at], stacked) for index in range(config.num_layers)}


def init_cache(config: DecoderConfig, batch: int, length: int) -> KvCache:
    """Return an empty cache of `length` columns for `batch` rows."""
    K, H, dtype = config.num_kv_heads, config.head_dim, jnp.dtype(config.dtype)
    layers = range(config.num_layers)
    return KvCache(
        keys=tuple(constrain(jnp.zeros((batch, K, H, length), dtype), "BKHS") for _ in layers),
        values=tuple(constrain(jnp.zeros((batch, K, length, H), dtype), "BKSH") for _ in layers),
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
    column: int | Int[Array, ""],
) -> tuple[Float[Array, "B T D"], KvCache]:
    """Run the decoder on T more tokens per row and write them to columns `[column, column + T)` of the cache.

    Each query attends to all filled columns of its own segment whose position is not after its own. So rows of
    different length, left-padded with segment 0, agree with the unpadded forward pass.

    Args:
        params: the student's, or the result of `unstack_layers`. Pass the latter if you call this in a loop.
        tokens, positions, segment_ids: of the new tokens; `cache` holds those before them.
        column: first column to write, the same for every row. `column + T` must not exceed the cache's length.

    Returns:
        The rows that the head reads, and the cache with the new tokens.
    """
    rows_and_cache: Any = Decoder(config).apply(
        {"params": unstack_layers(config, params)}, tokens, positions, segment_ids, cache, column
    )
    return rows_and_cache
