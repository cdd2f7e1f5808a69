"""The student: a decoder-only transformer in Flax linen, driven by one frozen `DecoderConfig`.

RMSNorm before each block, rotary positions, grouped-query attention, a gated MLP, and a head that may be tied to the
embedding. The layers are one scanned layer with stacked parameters, so compile time does not grow with depth. If some
layers have a sliding window, both views of the sequence are made once and each layer picks its own.

The same module serves training (`make_student`) and generation (`init_cache`, `decode`). With a cache the layers are
unrolled, each with arrays of its own (`unstack_layers`). Compile time then grows with depth, but no token copies
weights or cache.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from cotgrpo.models.attention import attention, attention_by_head, causal_segment_mask
from cotgrpo.models.blockwise_attention import block_attention
from cotgrpo.models.config import (
    ATTENTION_RESULT,
    LAYER_INPUT,
    QKV,
    RESULT_NAMES,
    SAVED_NAMES,
    DecoderConfig,
    parse_remat,
)
from cotgrpo.models.config import REMAT_POLICIES as REMAT_POLICIES
from cotgrpo.models.layers.causal_conv import ConvWindow
from cotgrpo.models.layers.delta_net import DeltaCache, GatedDeltaNet
from cotgrpo.models.layers.experts import IN_FLOAT32, LOAD, ExpertMlp, load_and_loss
from cotgrpo.models.layers.pattern import Block, Run
from cotgrpo.models.layers.per_layer_embeddings import PerLayerInputs
from cotgrpo.models.layers.short_conv import GatedShortConv
from cotgrpo.models.matmul import project_tokens
from cotgrpo.models.norm_and_gate import broadcast_last, gated, relu_squared, rms_norm, xielu
from cotgrpo.models.quantized.kernel import QUANTIZED_PARTS
from cotgrpo.models.rotary import RopeScaling, rotate, rotate_by_product, rotation
from cotgrpo.models.splash_attention import splash_attention
from cotgrpo.sharding import constrain, look_up, vary_alike, with_types_as_layout
from cotgrpo.types import Params, Student
from cotgrpo.xla_cpu import project_few_tokens

if TYPE_CHECKING:
    from cotgrpo.types import Array, Bool, Float, Int, PRNGKeyArray, PyTree

    # Global layers may have heads of their own, so K and H (with _) are those of a layer.
    KeysAndValues = tuple[Float[Array, "B _K _H S"], Float[Array, "B _K S _H"]]
    LayerCache = KeysAndValues | tuple[None, None] | ConvWindow | DeltaCache
    NewKeys = tuple[Float[Array, "B _ _ _"], Float[Array, "B _ _ _"]]  # B S K H, of local or of global layers
    HandedOn = dict[str, NewKeys]
    LayerInputs = tuple[Bool[Array, "..."] | None, Bool[Array, "..."] | None, Float[Array, "... B T P"] | None]


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
    """What each layer keeps of the tokens read so far: keys and values, or a state.

    Attributes:
        keys: of each layer `[B, K, H, S]` in the compute dtype, already rotated. None: a layer without attention.
        values: of each layer `[B, K, S, H]` in the compute dtype, or None.
        positions: int32 `[B, S]`, the position of the token in each column.
        segment_ids: int32 `[B, S]`, the segment of the token in each column. -1 marks an empty column, which no query
            matches.
        states: of each layer without attention, such as a `ConvWindow`. None: a layer with attention. Empty: all layers
            have attention.
    """

    keys: tuple[Float[Array, "B _K _H S"] | None, ...]
    values: tuple[Float[Array, "B _K S _H"] | None, ...]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    states: tuple[PyTree, ...] = ()

    @classmethod
    def of_layers(
        cls, layers: Sequence[LayerCache], positions: Int[Array, "B S"], segment_ids: Int[Array, "B S"]
    ) -> KvCache:
        """Return the cache of what each layer keeps."""
        pairs = [own if isinstance(own, tuple) else (None, None) for own in layers]
        states = tuple(None if isinstance(own, tuple) else own for own in layers)
        keys, values = (tuple(pair[i] for pair in pairs) for i in (0, 1))
        return cls(keys, values, positions, segment_ids, states if any(own is not None for own in states) else ())

    def of_layer(self, index: int) -> LayerCache:
        """Return what a layer keeps."""
        key, value = self.keys[index], self.values[index]
        return self.states[index] if key is None or value is None else (key, value)


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
        hands_on: whether to return the keys and values in place of a cache, for layers that share them.
    """

    config: DecoderConfig
    transposed: bool = False
    hands_on: bool = False

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
        shared: NewKeys | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | NewKeys | None]:
        """Return the residual stream after the layer, and `cached` after the new tokens.

        New keys and values are written from `column` on.
        With two views, the global and the local one, `is_local` picks this layer's. If `is_rotated` is given and
        False, this layer rotates nothing. `per_layer` is this layer's part of the per-layer embeddings.
        `shared` are the keys and values of an earlier layer. With a cache, `cached` is that layer's.
        """
        c = self.config
        x = checkpoint_name(constrain(x, "BTD"), LAYER_INPUT)
        view = views[0] if len(views) == 1 else jax.tree.map(functools.partial(jnp.where, is_local), *views[::-1])
        if is_rotated is not None and view.cos is not None and view.sin is not None:
            view = view.replace(cos=jnp.where(is_rotated, view.cos, 1.0), sin=jnp.where(is_rotated, view.sin, 0.0))
        h = self.norm("attention_norm")(x) if c.pre_norms else x
        if c.mixer == "conv":
            mixed, cached = self.convolve(h, view, cast("ConvWindow | None", cached))
        elif c.mixer == "delta":
            mixed, cached = self.mix_by_delta_rule(h, view, cast("DeltaCache | None", cached))
        else:
            pair = cast("KeysAndValues | None", cached)
            mixed, kept = self.mix_by_attention(h, view, is_local, pair, column, shared)
            cached = cast("LayerCache | None", kept)
        x = x + self.added("post_attention_norm", constrain(mixed, "BTD"))
        h = self.norm("mlp_norm")(x) if c.pre_norms else x
        x = x + self.added("post_mlp_norm", self.after_mlp(h, view))
        if per_layer is not None:
            x = x + self.from_per_layer(x, per_layer)
        if c.layer_scale:
            scale = self.param("layer_scale", nn.initializers.ones, (1,), jnp.dtype(c.param_dtype))
            x = x * jax.lax.stop_gradient(scale).astype(x.dtype)[None, None, :]
        return x, cached

    def from_per_layer(self, x: Float[Array, "B T D"], per_layer: Float[Array, "B T P"]) -> Float[Array, "B T D"]:
        """Return what the per-layer embeddings add to the residual stream."""
        h = gated(self.config.activation, self.dense("per_layer_gate")(x), per_layer)
        return self.norm("post_per_layer_norm")(constrain(self.dense("per_layer_out", to_residual=True)(h), "BTD"))

    def mix_by_attention(
        self,
        h: Float[Array, "B T D"],
        view: View,
        is_local: Bool[Array, ""] | None,
        cached: KeysAndValues | None,
        column: int | Int[Array, ""],
        shared: NewKeys | None,
    ) -> tuple[Float[Array, "B T D"], KeysAndValues | NewKeys | None]:
        """Return what attention adds to the residual stream, and `cached` with the new keys and values."""
        c = self.config
        query, gate = self.queries(h, view)
        kept: KeysAndValues | NewKeys | None = cached
        own = None if c.shared_keys else self.keys_and_values(h, view)
        if cached is None or view.mask is None:
            pair = shared if own is None else own
            if pair is None:
                raise ValueError("DecoderConfig.shared_keys needs layer_kinds with an earlier layer that has keys.")
            key, value = pair
            mixed = self.attend(query, key, value, view, is_local)
            kept = pair if self.hands_on else cached
        else:
            kept = keys, values = cached if own is None else append_to_cache(cached, *own, column)
            sinks = self.head_sinks()
            mixed = attention_by_head(query, keys, values, view.mask, c.query_scale, c.attention_softcap, sinks)
        mixed = constrain(mixed, "BTQH")
        if gate is not None:
            mixed = mixed * jax.nn.sigmoid(constrain(gate, "BTQH"))
        mixed = mixed.reshape(*mixed.shape[:2], c.num_heads * c.head_dim)
        return self.dense("out", to_residual=True)(mixed), kept

    def convolve(
        self, h: Float[Array, "B T D"], view: View, window: ConvWindow | None
    ) -> tuple[Float[Array, "B T D"], ConvWindow | None]:
        """Return what a short convolution adds to the residual stream, and the window after the new tokens."""
        c = self.config
        assert c.short_conv is not None
        conv = GatedShortConv(c.short_conv, jnp.dtype(c.param_dtype), c.init_scale, name="conv")
        mixed, window = conv(self.dense("conv_in")(h), view.segment_ids, window)
        return self.dense("conv_out", to_residual=True)(mixed), window

    def mix_by_delta_rule(
        self, h: Float[Array, "B T D"], view: View, cache: DeltaCache | None
    ) -> tuple[Float[Array, "B T D"], DeltaCache | None]:
        """Return what a gated delta net adds to the residual stream, and its cache after the new tokens."""
        c = self.config
        assert c.delta_net is not None
        names = ("delta_in", "delta_gate", "delta_strength", "delta_decay")
        inputs, gate, strength, decay = (self.dense(name)(h) for name in names)
        param_dtype = jnp.dtype(c.param_dtype)
        net = GatedDeltaNet(c.delta_net, c.norm_eps, param_dtype, c.init_scale, ATTENTION_RESULT, name="delta")
        mixed, cache = net(inputs, gate, strength, decay, view.segment_ids, cache)
        return self.dense("delta_out", to_residual=True)(mixed), cache

    def added(self, norm: str, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return what a block adds to the residual stream: its result, with the norm after it if there is one."""
        y = self.norm(norm)(y) if self.config.post_norms else y
        scale = self.config.residual_scale
        return y if scale is None else y * jnp.asarray(scale, y.dtype)

    def after_mlp(self, h: Float[Array, "B T D"], view: View) -> Float[Array, "B T D"]:
        """Return the result of the MLP, of the experts, or of both."""
        c, y = self.config, None
        if c.dense_mlp:
            y = constrain(self.activated(h), "BTF")
            y = constrain(self.dense("down", to_residual=True)(y), "BTD")
        if c.mlp == "experts":
            y = constrain(ExpertMlp(c, name="experts")(h, view.segment_ids, y), "BTD")
        assert y is not None
        return y

    def activated(self, h: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Return the middle of the MLP."""
        c = self.config
        if c.gated_mlp:
            return gated(c.activation, self.dense("gate")(h), self.dense("up")(h))
        up = self.dense("up")(h)
        return relu_squared(up) if c.activation == "relu2" else Xielu(jnp.dtype(c.param_dtype), name="xielu")(up)

    def queries(
        self, h: Float[Array, "B T D"], view: View
    ) -> tuple[Float[Array, "B T Q H"], Float[Array, "B T Q H"] | None]:
        """Return the normed and rotated queries, and the gate of attention's result if there is one."""
        c = self.config
        query, gate = self.dense("query")(h).reshape(*h.shape[:2], c.num_heads, -1), None
        if c.attention_gate:
            query, gate = jnp.split(query, 2, axis=-1)
        query = self.normed_and_rotated("query_norm", query, view)
        if view.query_factors is not None:
            query = query * view.query_factors[:, :, None, None].astype(query.dtype)
        return constrain(query, "BTQH"), gate

    def keys_and_values(self, h: Float[Array, "B T D"], view: View) -> NewKeys:
        """Return the normed and rotated keys, and the values."""
        c = self.config
        heads = (*h.shape[:2], c.num_kv_heads, c.head_dim)
        key = self.dense("key")(h).reshape(heads)
        value = key if c.key_is_value else self.dense("value")(h).reshape(heads)
        key = self.normed_and_rotated("key_norm", key, view)
        if c.value_norm:
            value = rms_norm(*vary_alike(value, jnp.ones(c.head_dim, jnp.float32)), c.norm_eps)
        key, value = constrain(key, "BTKH"), constrain(value, "BTKH")
        # A shard of the tokens reads all keys. If tokens are sharded, keys and values are gathered here, once: remat
        # policies that keep products keep them too.
        key, value = (checkpoint_name(constrain(x, "BSKH"), QKV) for x in (key, value))
        return key, value

    def normed_and_rotated(self, norm: str, x: Float[Array, "B T heads H"], view: View) -> Float[Array, "B T heads H"]:
        """Return queries or keys with their norm and rotation, in the config's order."""
        c = self.config
        x = self.norm_heads(norm, x) if c.qk_norm and not c.qk_norm_rotated else x
        if view.cos is not None and view.sin is not None:
            x = (rotate_by_product if c.attention == "splash" else rotate)(x, view.cos, view.sin)
        return self.norm_heads(norm, x) if c.qk_norm and c.qk_norm_rotated else x

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
        c, sinks = self.config, self.head_sinks()
        softmax = (c.query_scale, c.attention_softcap)
        if view.mask is not None:
            return attention(query, key, value, view.mask, *softmax, sinks)
        if c.attention == "blocks":
            return block_attention(query, key, value, view.positions, view.segment_ids, view.window, *softmax, sinks)
        windows = (None, c.window) if is_local is not None else (c.window if c.num_local else None,)
        return splash_attention(query, key, value, view.segment_ids, windows, is_local, *softmax, sinks=sinks)

    def head_sinks(self) -> Float[Array, "Q"] | None:
        """Return the attention sinks of the heads in float32, if there are some."""
        c = self.config
        if not c.sinks:
            return None
        own = self.param("sinks", nn.initializers.normal(c.init_scale), (c.num_heads,), jnp.dtype(c.param_dtype))
        return own.astype(jnp.float32)

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
                saved_name=RESULT_NAMES[name],
                head_dim=c.head_dim if by_head else None,
            ),
        )


def append_to_cache(
    cached: KeysAndValues, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], column: int | Int[Array, ""]
) -> KeysAndValues:
    """Return a layer's cache with T new keys and values from `column` on."""
    keys = jax.lax.dynamic_update_slice_in_dim(cached[0], jnp.moveaxis(key, 1, 3), column, axis=3)
    values = jax.lax.dynamic_update_slice_in_dim(cached[1], jnp.swapaxes(value, 1, 2), column, axis=2)
    return keys, values


def make_norm(config: DecoderConfig, name: str) -> RMSNorm:
    """Return the RMSNorm of this name with the config's options. The last one divides the logits too."""
    divisor = config.logit_divisor if name == "final_norm" else None
    return RMSNorm(config.norm_eps, jnp.dtype(config.param_dtype), config.norm_plus_one, divisor, name=name)


def layer_with_remat(config: DecoderConfig, in_loop: bool = True) -> type[Layer]:
    """Return `Layer`, wrapped in the config's remat policy. A loop of one turn is none, as XLA unrolls it."""
    remat = parse_remat(config.remat)
    if remat is None:
        return Layer
    names = [name for name in remat.on_device if name != LAYER_INPUT]  # an argument, which is kept in any case
    if config.remat == "dots":
        names.append(SAVED_NAMES)
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=names,
        names_which_can_be_offloaded=list(remat.on_host),
        offload_src="device",
        offload_dst="pinned_host",
    )
    # Inside a scan, XLA cannot merge the recomputation with the forward pass, so CSE need not be prevented.
    return nn.remat(Layer, policy=policy, prevent_cse=not in_loop)


class Pattern(nn.Module):
    """One repeat of a run: the layers of its blocks."""

    config: DecoderConfig
    run: Run

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B T D"], HandedOn],
        inputs: tuple[LayerInputs, ...],
        views: tuple[View, ...],
        shared: HandedOn,
    ) -> tuple[tuple[Float[Array, "B T D"], HandedOn], None]:
        """Return the residual stream after the layers, and the keys and values that they hand on.

        Args:
            carry: both before the layers.
            inputs: those of each block's layers.
            views: what a layer reads of the sequence.
            shared: keys and values that earlier runs handed on.
        """
        for index, (block, own_inputs) in enumerate(zip(self.run.blocks, inputs, strict=True)):
            own, seen = self.of_block(index, block, views)
            name = side_of(self.config, self.run.layers_of(index)[0])
            hands_on = not own.shared_keys and name in carry[1] and own.mixer == "attention"
            in_loop = self.run.repeats > 1 or block.count > 1
            layer = layer_with_remat(own, in_loop)(own, hands_on=hands_on, name=f"block_{index}")
            step = functools.partial(self.step, name)
            if block.count > 1:
                step = nn.scan(
                    step,
                    variable_axes={"params": 0, LOAD: 0},
                    split_rngs={"params": True},
                    in_axes=(0, 0, nn.broadcast, 0, nn.broadcast),
                    length=block.count,
                )
            is_local, is_rotated, per_layer = own_inputs
            carry, _ = step(layer, carry, is_local, is_rotated, seen, per_layer, shared)
        return carry, None

    @staticmethod
    def step(
        name: str,
        layer: Layer,
        carry: tuple[Float[Array, "B T D"], HandedOn],
        is_local: Bool[Array, ""] | None,
        is_rotated: Bool[Array, ""] | None,
        views: tuple[View, ...],
        per_layer: Float[Array, "B T P"] | None,
        shared: HandedOn,
    ) -> tuple[tuple[Float[Array, "B T D"], HandedOn], None]:
        """Return the carry after one layer, which is "local" or "global"."""
        x, handed_on = carry
        given = (shared | handed_on)[name] if layer.config.shared_keys else None
        x, new = layer(x, is_local, is_rotated, views, per_layer, None, 0, given)
        return (x, handed_on | {name: cast("NewKeys", new)} if layer.hands_on else handed_on), None

    def of_block(self, index: int, block: Block, views: tuple[View, ...]) -> tuple[DecoderConfig, tuple[View, ...]]:
        """Return the config of a block's layers, and what they read. Of two views they read one if all are alike."""
        c = self.config
        own, layers = c.of_kind(block.kind), self.run.layers_of(index)
        if c.local_layers is not None and (local := same(layers, c.local_layers)) is not None:
            own = dataclasses.replace(own, local_layers=None) if local else without_window(own)
            views = views[-1:] if local else views[:1]
        if same(layers, c.unrotated_layers):
            views = tuple(view.replace(cos=None, sin=None) for view in views)
        return own, views


def same(layers: Sequence[int], among: Collection[int]) -> bool | None:
    """Return whether all layers are among some, or None if only a part is."""
    found = {layer in among for layer in layers}
    return None if len(found) == 2 else found.pop()


def without_window(config: DecoderConfig) -> DecoderConfig:
    """Return the config of layers without a window."""
    return dataclasses.replace(config, window=None, local_layers=None, local_rope_theta=None)


def side_of(config: DecoderConfig, layer: int) -> str:
    """Return the name of the keys and values that a layer hands on or reads."""
    return "local" if config.is_local(layer) else "global"


class UnlikeLayers(nn.Module):
    """All layers of a stack of unlike ones: one scan for each of `DecoderConfig.runs`.

    The parameters of each block of a run are stacked over all its layers.

    Keys and values that later layers share are part of the carry of the run that computes them, and constants of the
    runs that read them: the backward pass keeps one pair, and sums its gradient in place.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], views: tuple[View, ...], per_layer: Float[Array, "L B T P"] | None
    ) -> Float[Array, "B T D"]:
        handed_on: HandedOn = {}
        for index, run in enumerate(self.config.runs):
            new = self.handed_on_by(run, x_BTD.shape[:2])
            inputs = tuple(self.inputs_of(run, block, len(views), per_layer) for block in range(len(run.blocks)))
            pattern = nn.scan(
                Pattern,
                variable_axes={"params": 0, LOAD: 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=run.repeats,
            )
            counts = {f"block_{block}": own.count for block, own in enumerate(run.blocks)}
            pattern = nn.map_variables(
                pattern,
                "params",
                trans_in_fn=functools.partial(split_repeats, counts),
                trans_out_fn=functools.partial(join_repeats, counts),
                init=self.is_initializing(),
                mutable=self.is_initializing(),
            )
            carry = x_BTD, {name: handed_on.get(name, start) for name, start in new.items()}
            shared = {name: pair for name, pair in handed_on.items() if name not in new}
            (x_BTD, new), _ = pattern(self.config, run, name=f"run_{index}")(carry, inputs, views, shared)
            handed_on |= new
        return x_BTD

    def handed_on_by(self, run: Run, batch: tuple[int, ...]) -> HandedOn:
        """Return zeros in place of the keys and values that a run hands on to layers that share them."""
        c, found = self.config, {}
        for block in range(len(run.blocks)):
            for layer in set(run.layers_of(block)) & set(c.key_sources):
                zeros = jnp.zeros((*batch, *c.layers[layer].kv_shape), jnp.dtype(c.dtype))
                found[side_of(c, layer)] = (constrain(zeros, "BSKH"),) * 2
        return found

    def inputs_of(self, run: Run, block: int, num_views: int, per_layer: Float[Array, "L B T P"] | None) -> LayerInputs:
        """Return what the layers of a block read besides the views: `[repeats, count, ...]`, or None if alike."""
        c, layers, count = self.config, run.layers_of(block), run.blocks[block].count
        by_repeat = lambda x: x.reshape(run.repeats, *((count,) if count > 1 else ()), *x.shape[1:])
        flags = lambda among: by_repeat(jnp.array([layer in among for layer in layers]))
        mixed = lambda among: same(layers, among) is None
        return (
            flags(c.local_layers or ()) if num_views > 1 and mixed(c.local_layers or ()) else None,
            ~flags(c.unrotated_layers) if mixed(c.unrotated_layers) else None,
            None if per_layer is None else by_repeat(per_layer[jnp.array(layers)]),
        )


def split_repeats(counts: Mapping[str, int], variables: Params) -> Params:
    """Return the parameters of a run's blocks by repeat and layer, `[repeats, count, ...]`."""
    split = lambda x, count: x.reshape(-1, count, *x.shape[1:])
    return on_blocks(lambda x, count: x if count == 1 else split(x, count), counts, variables)


def join_repeats(counts: Mapping[str, int], variables: Params) -> Params:
    """Return the parameters of a run's blocks by layer: the inverse of `split_repeats`."""
    return on_blocks(lambda x, count: x if count == 1 else x.reshape(-1, *x.shape[2:]), counts, variables)


def on_blocks(change: Callable[[Any, int], Any], counts: Mapping[str, int], variables: Params) -> Params:
    """Return the parameters of a run after a change of each leaf, which depends on its block's count."""
    changed = {
        name: jax.tree.map(lambda leaf, count=counts[name]: change(leaf, count), own)
        for name, own in variables.get("params", {}).items()
    }
    return {"params": changed} if changed else {}


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
        per_layer = None
        if c.per_layer_embeddings is not None:
            per_layer = PerLayerInputs(c, name="per_layer")(tokens, x_BTD, gather=cache is not None)
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
        if c.runs:
            return UnlikeLayers(c, name="layers")(x_BTD, views, per_layer)
        is_local = None if len(views) == 1 else jnp.isin(jnp.arange(c.num_layers), jnp.array(c.local_layers))
        own = c.layers[0]
        some = 0 < c.num_rotated < c.num_layers
        is_rotated = ~jnp.isin(jnp.arange(c.num_layers), jnp.array(c.unrotated_layers)) if some else None
        layers = nn.scan(
            layer_with_remat(own),
            variable_axes={"params": 0, LOAD: 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, 0),
            length=c.num_layers,
        )
        return layers(own, name="layers")(x_BTD, is_local, is_rotated, views, per_layer)[0]

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
        cached: list[LayerCache] = []
        for index, own in enumerate(c.layers):
            view = views[-1:] if index in (c.local_layers or ()) else views[:1]
            if index in c.unrotated_layers:
                view = (view[0].replace(cos=None, sin=None),)
            layer = Layer(own, transposed=True, name=f"layer_{index}")
            part, source = None if per_layer is None else per_layer[index], c.key_sources[index]
            before = cache.of_layer(index) if source is None else cached[source]
            x_BTD, new = layer(x_BTD, None, None, view, part, before, column)
            cached.append(cast("LayerCache", new) if source is None else (None, None))
        return x_BTD, KvCache.of_layers(cached, key_positions, key_segments)

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
            rotated = rotation(positions, theta, c.rotated_dim(window is not None), scaling)
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

    has_experts = any(layer.mlp == "experts" for layer in config.layers)

    def apply(params: Params, *contexts: Int[Array, "B T"]) -> PyTree:
        if not has_experts:
            return Decoder(config).apply({"params": params}, *contexts)[0]
        (rows, _), sown = Decoder(config).apply({"params": params}, *contexts, mutable=[LOAD])
        assert config.experts is not None
        return rows, load_and_loss(config.experts, sown)

    def hidden(
        params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> PyTree:
        return with_types_as_layout(apply, params, tokens, positions, segment_ids)

    padded = vocab_size is not None and vocab_size < config.vocab_size
    return Student(
        hidden=hidden,
        head=lambda params: head_of(config, params),
        softcap=config.logit_softcap,
        vocab_size=vocab_size if padded else None,
        has_aux=has_experts,
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
        if name == "experts":
            return {key: x if key in IN_FLOAT32 else x.astype(dtype) for key, x in own.items()}
        if name not in config.projections:
            return own
        own = {key: x if key in QUANTIZED_PARTS else x.astype(dtype) for key, x in own.items()}
        return own if "kernel" not in own else {"transposed": jnp.swapaxes(own.pop("kernel"), 1, 2), **own}

    stacked: dict[tuple[str, ...], Params] = {}
    unstacked = {}
    for index, place in enumerate(config.layer_places):
        if place.path not in stacked:
            own = functools.reduce(operator.getitem, place.path[1:], layers)
            stacked[place.path] = {name: transpose(name, leaves) for name, leaves in own.items()}
        unstacked[f"layer_{index}"] = jax.tree.map(lambda x, at=place.index: x[at], stacked[place.path])
    return unstacked


def init_cache(config: DecoderConfig, batch: int, length: int) -> KvCache:
    """Return an empty cache of `length` columns for `batch` rows."""
    return KvCache.of_layers(
        [init_layer_cache(layer, batch, length) for layer in config.layers],
        positions=jnp.zeros((batch, length), jnp.int32),
        segment_ids=jnp.full((batch, length), -1, jnp.int32),
    )


def init_layer_cache(config: DecoderConfig, batch: int, length: int) -> LayerCache:
    """Return what one of a decoder's `layers` keeps of no tokens."""
    if config.shared_keys:
        return None, None
    K, H, dtype = config.num_kv_heads, config.head_dim, jnp.dtype(config.dtype)
    if config.mixer == "conv":
        assert config.short_conv is not None
        window = ConvWindow.empty(batch, config.short_conv.taps, config.width, dtype)
        return window.replace(inputs=constrain(window.inputs, "BNF"))
    if config.mixer == "delta":
        assert config.delta_net is not None
        return DeltaCache.empty(batch, config.delta_net, dtype)
    keys = constrain(jnp.zeros((batch, K, H, length), dtype), "BKHS")
    return keys, constrain(jnp.zeros((batch, K, length, H), dtype), "BKSH")


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
