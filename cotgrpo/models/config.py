"""The shape and options of a decoder, as one frozen dataclass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar, get_args

from cotgrpo.models.layers.options import DeltaNet, Experts, PerLayerEmbeddings, ShortConv
from cotgrpo.models.layers.pattern import LayerKind, LayerPlace, Run, places_of, runs_of
from cotgrpo.models.rotary import RopeScaling

Result = TypeVar("Result")
Dtype = Literal["float32", "bfloat16"]
RematPolicy = str
"""One of `REMAT_POLICIES`, or names of `KEPT_NAMES`, as `parse_remat` reads them."""
SAVED_NAMES = "kept"
"""Name (`jax.ad_checkpoint.checkpoint_name`) of a result without a name of its own that the remat policy "dots" keeps.

A policy that looks for matrix products does not see into functions with their own gradient.
"""
LAYER_INPUT, QKV, ATTENTION_RESULT = "layer_input", "qkv_proj", "attention"
PROJECTION_NAMES = {"query": QKV, "key": QKV, "value": QKV} | {name: f"{name}_proj" for name in ("out", "gate", "up")}
PROJECTION_NAMES |= {"down": "down_proj"}
"""The name of `KEPT_NAMES` of each matrix product of attention and its MLP."""
RESULT_NAMES = PROJECTION_NAMES | {"conv_in": QKV, "conv_out": "out_proj", "delta_out": "out_proj"}
RESULT_NAMES |= dict.fromkeys(("delta_in", "delta_gate", "delta_strength", "delta_decay"), QKV)
RESULT_NAMES |= dict.fromkeys(("per_layer_gate", "per_layer_out"), "per_layer_proj")
"""The same for the products of every kind of layer."""
KEPT_NAMES = (LAYER_INPUT, QKV, ATTENTION_RESULT, "out_proj", "gate_proj", "up_proj", "down_proj", "per_layer_proj")
"""Results of a layer that a remat policy can keep, in the order in which the layer computes them."""
OFFLOAD = "offload:"
"""Prefix of a name that is kept in host memory."""
REMAT_LISTS = {
    "dots": ",".join(KEPT_NAMES),
    "minimal": ",".join(name for name in KEPT_NAMES if name != ATTENTION_RESULT),
    "full": LAYER_INPUT,
    "offload": OFFLOAD + LAYER_INPUT,
}
"""What each remat policy with a name of its own keeps; "none" keeps everything."""
REMAT_POLICIES = ("none", *REMAT_LISTS)
ATTENTION = ("blocks", "xla", "splash")
MIXERS = ("attention", "conv", "delta")
"""What can mix the tokens in a layer: attention, a short convolution, or a gated delta net."""
MLPS = ("dense", "experts")
"""What can follow it: an MLP, or a mixture of experts."""
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
UNGATED_ACTIVATIONS = ("relu2", "xielu")
"""Activations of an MLP without a gate: `down(activation(up(x)))`."""


class remembered(Generic[Result]):
    """A property whose results are kept for equal owners.

    `functools.cached_property` keeps them among the fields, where `vars` finds them.
    """

    def __init__(self, method: Callable[[Any], Result]) -> None:
        self.method = functools.lru_cache(maxsize=256)(method)
        self.__doc__ = method.__doc__

    def __get__(self, owner: Any, kind: type) -> Result:
        return self.method(owner)


@dataclasses.dataclass(frozen=True)
class Remat:
    """What a remat policy keeps of a layer for the backward pass, by `KEPT_NAMES`. The rest is computed again.

    Attributes:
        on_device: names that are kept in the device's memory.
        on_host: names that are kept in the host's memory.
    """

    on_device: tuple[str, ...]
    on_host: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[str, ...]:
        """Return the names that are kept anywhere."""
        return self.on_device + self.on_host


def parse_remat(policy: RematPolicy) -> Remat | None:
    """Return what a remat policy keeps; None if it keeps everything.

    Args:
        policy: one of `REMAT_POLICIES`, or names of `KEPT_NAMES` with commas between, each with `offload:` before it if
            it is kept in host memory, as "qkv_proj,offload:gate_proj".

    Raises:
        ValueError: a name is unknown, or given twice.
    """
    if policy == "none":
        return None
    names = [name.strip() for name in REMAT_LISTS.get(policy, policy).split(",")]
    plain = [name.removeprefix(OFFLOAD) for name in names]
    unknown = [name for name, own in zip(names, plain, strict=True) if own not in KEPT_NAMES]
    if unknown:
        part = f" in {policy!r}" if len(names) > 1 else ""
        raise ValueError(
            f"DecoderConfig.remat must be one of {REMAT_POLICIES}, or names of {KEPT_NAMES} with commas between, each "
            f"with {OFFLOAD!r} before it for host memory, got {unknown[0]!r}{part}."
        )
    twice = [name for name in plain if plain.count(name) > 1]
    if twice:
        raise ValueError(f"DecoderConfig.remat must have each name once, got {twice[0]!r} twice in {policy!r}.")
    on_host = tuple(name for name in KEPT_NAMES if OFFLOAD + name in names)
    # The layer's input is kept in any case: it is what a layer is computed again from.
    on_device = tuple(name for name in KEPT_NAMES if name in (LAYER_INPUT, *names) and name not in on_host)
    return Remat(on_device, on_host)


def check_remat(policy: RematPolicy, attention: str) -> None:
    """Raise ValueError if `parse_remat` does, or if the policy names a result that this attention lacks."""
    remat = parse_remat(policy)
    if remat is not None and policy not in REMAT_POLICIES and attention == "xla" and ATTENTION_RESULT in remat.kept:
        raise ValueError(
            f"DecoderConfig.remat {policy!r} keeps the result of attention, which attention 'xla' does not keep: "
            "leave the name out, or choose another attention."
        )


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The size of a decoder's vocabulary, which comes with its tokenizer.

    Attributes:
        vocab_size: V, rows of the embedding and columns of the head (`vocab_size`).
    """

    vocab_size: int


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """The shape of a decoder that is trained from scratch.

    Names in parentheses are those of Hugging Face's config.json.

    Attributes:
        width: D, size of the residual stream (`hidden_size`).
        num_layers: L (`num_hidden_layers`).
        num_heads: Q, query heads (`num_attention_heads`).
        num_kv_heads: K, key/value heads (`num_key_value_heads`). It divides `num_heads`.
        head_dim: H, even (`head_dim`).
        mlp_width: F, inner size of the gated MLP (`intermediate_size`).
        rope_theta: base of the rotary frequencies (`rope_theta`).
        tied_head: whether the head is the transposed embedding (`tie_word_embeddings`).
        init_scale: standard deviation of the initial weights (`initializer_range`). Projections into the residual
            stream are divided by `sqrt(2 L)`.
    """

    width: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    mlp_width: int = 768
    rope_theta: float = 10_000.0
    tied_head: bool = True
    init_scale: float = 0.02

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"DecoderConfig.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("rope_theta", "init_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"DecoderConfig.{name} must be positive, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig.num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim must be even for rotary positions, got {self.head_dim}.")


@dataclasses.dataclass(frozen=True)
class DecoderPrecision:
    """The number types of a decoder, and what its backward pass recomputes.

    Attributes:
        dtype: compute type, "float32" or "bfloat16". Norms, softmax and logits are always float32.
        param_dtype: storage type of the parameters. In bfloat16, small updates are lost unless the optimizer's rounding
            is `stochastic` or `compensated`.
        remat: what the backward pass recomputes: `none`, `dots` (norms, rotations, gates), `minimal` (attention too),
            `full` (whole layers), `offload` (the same, with the layers' inputs kept in host memory), or names of what
            to keep, as `qkv_proj,out_proj,offload:gate_proj`. A name keeps this many numbers of `dtype` per token and
            layer: layer_input D (always kept), qkv_proj (Q + 2 K) H (with query and key norms, K H more), attention
            Q H and Q float32 (so `xla` attention lacks it), out_proj D, gate_proj F, up_proj F, down_proj D (0 without
            norms after the blocks, as nothing reads it), per_layer_proj P + D (0 without per-layer embeddings).
            `offload:` before a name keeps it in host memory.
    """

    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    remat: RematPolicy = "dots"


@dataclasses.dataclass(frozen=True)
class DecoderConfig(DecoderPrecision, DecoderShape, Vocabulary):
    """The shape of a decoder. With the defaults it is a plain Llama; families of models set the other options.

    Attributes:
        norm_eps: added to the mean square in RMSNorm (`rms_norm_eps`).
        attention: implementation for training: "blocks" (blockwise, any device), "xla" (materializes all scores) or
            "splash" (TPU kernel). Generation has its own.
        activation: of the MLP's gate: "silu", "gelu" (exact) or "gelu_tanh" (approximation) (`hidden_act`). "relu2" and
            "xielu" belong to an MLP without a gate, `down(activation(up(x)))`.
        biases: projections with a bias, of "query", "key", "value", "out", "gate", "up", "down".
        qk_norm: RMSNorm of the queries and keys, before the rotation.
        qk_norm_over: what that norm is over: "head", the H values of each head, or "width", all heads together.
        qk_norm_rotated: the norm of the queries and keys comes after the rotation.
        value_norm: RMSNorm of the values of each head, without a scale.
        key_is_value: the product of the keys, before their norm and rotation, is that of the values too
            (`attention_k_eq_v`).
        shared_keys: the layer has no keys and values of its own. It reads those of the last earlier layer that has some
            and that is local or global as it is (`num_kv_shared_layers`).
        pre_norms: RMSNorm before attention and before the MLP.
        post_norms: RMSNorm after attention and after the MLP, before each is added to the residual stream.
        norm_plus_one: RMSNorm multiplies by `1 + scale`, and `scale` starts at 0.
        embedding_scale: factor of the embedding, or None.
        residual_scale: factor of what attention and the MLP add to the residual stream, or None
            (`residual_multiplier`).
        logit_divisor: divides the logits, before they are capped (`logits_scaling`), or None.
        query_scale: factor of `q k^T` (`query_pre_attn_scalar ** -0.5`). None: `H ** -0.5`.
        attention_softcap: c maps each score to `c * tanh(score / c)` (`attn_logit_softcapping`), or None.
        logit_softcap: the same for the logits (`final_logit_softcapping`), or None.
        window: a query of a local layer sees keys at most `window - 1` positions before it (`sliding_window`).
            None: no local layers.
        local_layers: indices of the local layers. None: all layers, if there is a window.
        local_rope_theta: base of the rotary frequencies in local layers, without scaling. None: as in the other layers.
        rope_scaling: how the rotary frequencies are scaled, or None.
        rotary_dim: values of each head that are rotated, the first ones, even (`partial_rotary_factor`). None: all.
        unrotated_layers: indices of the layers without rotary positions (`no_rope_layers`).
        mixer: what mixes the tokens in a layer: "attention", "conv" (a short convolution) or "delta" (a gated delta
            net).
        short_conv: the short convolution of the layers that have one, or None.
        delta_net: the gated delta net of the layers that have one, or None.
        attention_gate: attention's result is multiplied by the sigmoid of a second half of the query projection, the H
            values after the query of each head (`attn_output_gate`).
        mlp: "dense", or "experts" for a mixture of experts.
        experts: the experts of the layers that have some, or None.
        sinks: each query head has an attention sink: a score of its own, of a key whose value is 0.
        layer_kinds: what each layer is, if layers differ in shape (`layer_types`). None: all are alike.
        per_layer_embeddings: a second embedding, of which every layer reads a part of its own, or None.
        layer_scale: the residual stream is multiplied by a number of each layer's own after the layer. Training leaves
            it as it is (`layer_scalar`).
        max_positions: context length (`max_position_embeddings`). It is not enforced.

    Raises:
        ValueError: a size or option is out of range.
    """

    norm_eps: float = 1e-5
    attention: str = "blocks"
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    qk_norm_over: str = "head"
    qk_norm_rotated: bool = False
    value_norm: bool = False
    key_is_value: bool = False
    shared_keys: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    norm_plus_one: bool = False
    embedding_scale: float | None = None
    residual_scale: float | None = None
    logit_divisor: float | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    local_layers: tuple[int, ...] | None = None
    local_rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    unrotated_layers: tuple[int, ...] = ()
    mixer: str = "attention"
    short_conv: ShortConv | None = None
    delta_net: DeltaNet | None = None
    attention_gate: bool = False
    mlp: str = "dense"
    experts: Experts | None = None
    sinks: bool = False
    layer_kinds: tuple[LayerKind, ...] | None = None
    per_layer_embeddings: PerLayerEmbeddings | None = None
    layer_scale: bool = False
    max_positions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 1:
            raise ValueError(f"DecoderConfig.vocab_size must be at least 1, got {self.vocab_size}.")
        choices = (
            ("attention", ATTENTION),
            ("dtype", DTYPES),
            ("param_dtype", DTYPES),
            ("activation", (*ACTIVATIONS, *UNGATED_ACTIVATIONS)),
            ("qk_norm_over", ("head", "width")),
            ("mixer", MIXERS),
            ("mlp", MLPS),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"DecoderConfig.{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        check_remat(self.remat, self.attention)
        positive = ("embedding_scale", "query_scale", "attention_softcap", "logit_softcap", "window")
        for name in (*positive, "residual_scale", "logit_divisor"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"DecoderConfig.{name} must be positive or None, got {getattr(self, name)}.")
        unknown = sorted(set(self.biases) - set(self.projections))
        if unknown:
            raise ValueError(f"DecoderConfig.biases must be of {tuple(self.projections)}, got {unknown[0]!r}.")
        if self.local_layers is not None and self.window is None:
            raise ValueError(f"DecoderConfig.local_layers {self.local_layers} need a window, but window is None.")
        if self.local_rope_theta is not None and not self.num_local:
            raise ValueError("DecoderConfig.local_rope_theta is set, but there is no local layer: leave it None.")
        self.check_layers_and_rotation()
        self.check_kinds()

    def check_kinds(self) -> None:
        """Raise ValueError if `layer_kinds` does not fit, or a layer lacks the options of its kind."""
        kinds = self.layer_kinds
        if kinds is not None and len(kinds) != self.num_layers:
            raise ValueError(
                f"DecoderConfig.layer_kinds must name each of the {self.num_layers} layers, got {len(kinds)}."
            )
        mlps = {self.mlp} if kinds is None else {self.of_kind(kind).mlp for kind in kinds}
        if "experts" in mlps and self.experts is None:
            raise ValueError("DecoderConfig.mlp 'experts' needs experts, but it is None.")
        if "experts" in mlps and not self.gated_mlp:
            raise ValueError(f"DecoderConfig.experts have a gate, which the activation {self.activation!r} lacks.")
        for local in (True, False):
            found = self.head_dims(local)
            if kinds is not None and len(found) > 1:
                raise ValueError(
                    f"DecoderConfig.layer_kinds: {'local' if local else 'global'} layers must have one head_dim, got "
                    f"{', '.join(map(str, sorted(found)))}."
                )
        for index, layer in enumerate(self.layers if kinds is not None else ()):
            source = self.key_sources[index]
            if layer.shared_keys and (source is None or self.layers[source].kv_shape != layer.kv_shape):
                raise ValueError(
                    f"DecoderConfig.layer_kinds: layer {index} has shared_keys, but no "
                    f"{'local' if self.is_local(index) else 'global'} layer before it has keys of its own with "
                    f"{layer.kv_shape[0]} heads of {layer.kv_shape[1]}."
                )
        mixers = {self.mixer} if kinds is None else {self.of_kind(kind).mixer for kind in kinds}
        if "conv" in mixers and self.short_conv is None:
            raise ValueError("DecoderConfig.mixer 'conv' needs short_conv, but it is None.")
        if "delta" in mixers and self.delta_net is None:
            raise ValueError("DecoderConfig.mixer 'delta' needs delta_net, but it is None.")

    def check_layers_and_rotation(self) -> None:
        """Raise ValueError if an option names a layer that does not exist, or a rotation that is not possible."""
        for name in ("local_layers", "unrotated_layers"):
            outside = [i for i in getattr(self, name) or () if not 0 <= i < self.num_layers]
            if outside:
                raise ValueError(
                    f"DecoderConfig.{name} must lie in 0..{self.num_layers - 1}, but they hold {outside[0]}."
                )
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ValueError(
                f"DecoderConfig.rotary_dim must be even and lie in 2..{self.head_dim}, got {self.rotary_dim}."
            )
        scaling, pairs = self.rope_scaling, (self.rotary_dim or self.head_dim) // 2
        if scaling is not None and scaling.kind == "longrope":
            for factors in (scaling.short_factors, scaling.long_factors):
                if len(factors) != pairs:
                    raise ValueError(
                        f"RopeScaling.short_factors and long_factors must have {pairs} numbers, one for each rotated "
                        f"pair, got {len(factors)}."
                    )
        if not (self.pre_norms or self.post_norms):
            raise ValueError("DecoderConfig needs pre_norms, post_norms or both, got neither.")

    def for_length(self, length: int) -> DecoderConfig:
        """Return the decoder of sequences of up to `length` positions, whose rotation is the same in all calls."""
        if self.rope_scaling is None:
            return self
        return dataclasses.replace(self, rope_scaling=self.rope_scaling.for_length(length))

    @functools.cache  # noqa: B019
    def of_kind(self, kind: LayerKind) -> DecoderConfig:
        """Return the config of the layers of a kind."""
        own = {field.name: getattr(kind, field.name) for field in dataclasses.fields(kind)}
        given = {name: value for name, value in own.items() if value is not None and name != "is_local"}
        alone = dataclasses.replace(self, layer_kinds=None, biases=(), **given)
        return dataclasses.replace(alone, biases=tuple(name for name in self.biases if name in alone.projections))

    @remembered
    def layers(self) -> tuple[DecoderConfig, ...]:
        """Return the config of each layer."""
        if self.layer_kinds is None:
            return (self,) * self.num_layers
        return tuple(self.of_kind(kind) for kind in self.layer_kinds)

    @remembered
    def stacked_kinds(self) -> tuple[LayerKind, ...]:
        """Return what sets the layers apart in a stack. Those that share keys and values are local or global."""
        kinds = self.layer_kinds or ()
        if not any(kind.shared_keys for kind in kinds):
            return kinds
        return tuple(dataclasses.replace(kind, is_local=self.is_local(i)) for i, kind in enumerate(kinds))

    def is_local(self, index: int) -> bool:
        """Return whether a layer has the window."""
        return self.window is not None and (self.local_layers is None or index in self.local_layers)

    @remembered
    def key_sources(self) -> tuple[int | None, ...]:
        """Return for each layer with shared keys the layer that they are of, and None for the others."""
        last: dict[bool, int] = {}
        sources: list[int | None] = []
        for index, layer in enumerate(self.layers):
            sources.append(last.get(self.is_local(index)) if layer.shared_keys else None)
            if layer.has_keys:
                last[self.is_local(index)] = index
        return tuple(sources)

    def head_dims(self, local: bool) -> set[int]:
        """Return the widths of the heads of local layers, or of global ones."""
        layers = [layer for i, layer in enumerate(self.layers) if self.is_local(i) == local]
        return {layer.head_dim for layer in layers if layer.mixer == "attention"}

    def rotated_dim(self, local: bool) -> int:
        """Return how many values of each head are rotated in local layers, or in global ones."""
        return self.rotary_dim or next(iter(self.head_dims(local)), self.head_dim)

    @remembered
    def runs(self) -> tuple[Run, ...]:
        """Return the loops over unlike layers; none if all layers are alike."""
        kinds = self.stacked_kinds
        return () if len(set(kinds)) <= 1 else runs_of(kinds)

    @remembered
    def layer_places(self) -> tuple[LayerPlace, ...]:
        """Return where the parameters of each layer are."""
        if self.runs:
            return places_of(self.stacked_kinds)
        return tuple(LayerPlace(("layers",), index) for index in range(self.num_layers))

    @property
    def has_keys(self) -> bool:
        """Return whether a layer has keys and values of its own."""
        return self.mixer == "attention" and not self.shared_keys

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Return the number of key/value heads, and their size."""
        return self.num_kv_heads, self.head_dim

    @property
    def input_width(self) -> int:
        """Return how many numbers of each token all layers read from per-layer embeddings."""
        return 0 if self.per_layer_embeddings is None else self.num_layers * self.per_layer_embeddings.width

    @property
    def gated_mlp(self) -> bool:
        """Return whether the MLP has a gate."""
        return self.activation not in UNGATED_ACTIVATIONS

    @property
    def dense_mlp(self) -> bool:
        """Return whether a layer has an MLP that every token goes through."""
        return self.mlp == "dense" or (self.experts is not None and self.experts.shared)

    @property
    def num_rotated(self) -> int:
        """Return the number of layers with rotary positions."""
        return self.num_layers - len(set(self.unrotated_layers))

    @property
    def num_attention(self) -> int:
        """Return the number of layers with attention."""
        return sum(layer.mixer == "attention" for layer in self.layers)

    @property
    def num_local(self) -> int:
        """Return the number of layers with a sliding window."""
        if self.window is None:
            return 0
        return self.num_layers if self.local_layers is None else len(set(self.local_layers))

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Return (inputs, outputs) of each matrix product of a layer; of all kinds together if layers differ."""
        if self.layer_kinds is not None:
            return {name: p for kind in dict.fromkeys(self.layers) for name, p in kind.projections.items()}
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mixers = {
            "attention": {
                "query": (self.width, heads * (1 + self.attention_gate)),
                "key": (self.width, kv_heads),
                "value": (self.width, kv_heads),
                "out": (heads, self.width),
            },
            "conv": {"conv_in": (self.width, 3 * self.width), "conv_out": (self.width, self.width)},
            "delta": {} if self.delta_net is None else self.delta_net.projections(self.width),
        }
        if self.shared_keys or self.key_is_value:
            mixers["attention"].pop("value")
        if self.shared_keys:
            mixers["attention"].pop("key")
        projections = mixers[self.mixer]
        if self.dense_mlp:
            projections |= {
                "gate": (self.width, self.mlp_width),
                "up": (self.width, self.mlp_width),
                "down": (self.mlp_width, self.width),
            }
        if self.per_layer_embeddings is not None:
            own = self.per_layer_embeddings.width
            projections |= {"per_layer_gate": (self.width, own), "per_layer_out": (own, self.width)}
        return projections if self.gated_mlp else {name: p for name, p in projections.items() if name != "gate"}

    @property
    def kept_sizes(self) -> dict[str, int]:
        """Return how many numbers per token a layer keeps under each name of `KEPT_NAMES`. `layers` has the layers.

        A normed key or value is kept before its norm too, which the norm's gradient reads. Only a norm reads the result
        of down.
        """
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        pairs = 0 if self.shared_keys else 2 + max(self.qk_norm + self.value_norm - self.key_is_value, 0)
        softmax = self.num_heads * (1 if self.dtype == "float32" else 2)  # a float32 of each head
        of_mixer = {
            "attention": (heads * (1 + self.attention_gate) + pairs * kv_heads, heads + softmax),
            "conv": (3 * self.width, 0),
            "delta": (0, 0) if self.delta_net is None else self.delta_net.kept_sizes,
        }
        middle = self.mlp_width if self.dense_mlp else 0
        if self.mlp == "experts" and self.experts is not None:
            middle += self.experts.chosen * self.experts.width
        sizes = (
            self.width,
            *of_mixer[self.mixer],
            self.width,
            middle if self.gated_mlp else 0,
            middle,
            self.width if self.post_norms and self.dense_mlp else 0,
            0 if self.per_layer_embeddings is None else self.per_layer_embeddings.width + self.width,
        )
        return dict(zip(KEPT_NAMES, sizes, strict=True))

    @property
    def recomputed_products(self) -> tuple[str, ...]:
        """Return the matrix products of a layer that the backward pass computes again."""
        remat = parse_remat(self.remat)
        if remat is None:
            return ()
        of_experts = ("gate", "up", "down") if self.mlp == "experts" else ()
        products = tuple(dict.fromkeys((*self.projections, *of_experts)))
        if remat.kept == (LAYER_INPUT,):
            return products
        unread = () if self.post_norms else ("down",)
        return tuple(n for n in products if RESULT_NAMES[n] not in remat.kept and n not in unread)

    def num_active_params(self) -> int:
        """Return the number of parameters that one token uses: of the experts, those of its own."""
        unused = sum(
            (layer.experts.number - layer.experts.chosen) * layer.experts.params_of_one(self.width)
            for layer in self.layers
            if layer.mlp == "experts" and layer.experts is not None
        )
        return self.num_params() - unused

    def num_params(self) -> int:
        """Return the number of parameters."""
        embeddings = self.vocab_size * self.width * (1 if self.tied_head else 2)
        if self.per_layer_embeddings is not None:
            embeddings += self.per_layer_embeddings.num_params(self.width, self.num_layers)
        return sum(layer.params_of_a_layer for layer in self.layers) + self.width + embeddings

    @remembered
    def params_of_a_layer(self) -> int:
        """Return the number of parameters of one of `layers`."""
        products = sum(inputs * outputs for inputs, outputs in self.projections.values())
        biases = sum(self.projections[name][1] for name in self.biases if name in self.projections)
        norms = self.width * 2 * (self.pre_norms + self.post_norms)
        if self.mixer == "attention" and self.qk_norm:
            heads = (1, 1) if self.qk_norm_over == "head" else (self.num_heads, self.num_kv_heads)
            norms += (heads[0] if self.shared_keys else sum(heads)) * self.head_dim
        if self.mixer == "conv" and self.short_conv is not None:
            norms += self.short_conv.num_params(self.width)
        if self.mixer == "delta" and self.delta_net is not None:
            norms += self.delta_net.num_params()
        if self.mixer == "attention" and self.sinks:
            norms += self.num_heads
        if self.mlp == "experts" and self.experts is not None:
            products += self.experts.num_params(self.width)
        if self.per_layer_embeddings is not None:
            norms += self.width
        activation = 2 if self.activation == "xielu" else 0
        return products + biases + norms + activation + self.layer_scale
