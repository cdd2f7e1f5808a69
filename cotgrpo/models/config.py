"""What distinguishes one decoder from another, as one frozen dataclass."""

from __future__ import annotations

import dataclasses

from cotgrpo.models.rotary import RopeScaling

REMAT_POLICIES = ("none", "dots", "full", "offload")
SAVED_NAMES = "kept"
"""Name (`jax.ad_checkpoint.checkpoint_name`) of what "dots" keeps. A policy that looks for products itself does not see into a function with its own gradient."""
ATTENTION = ("blocks", "xla", "splash")
DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder. The defaults from `activation` on make a plain Llama; families set them (`models/families.py`).

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
        remat: what the backward pass recomputes: "none" (all activations are kept), "dots" (norms, rotations and gates: all but matrix products and attention),
            "full" (everything inside a layer; only the residual stream is kept), "offload" (the same, with the residual stream kept in the host's memory).
        attention: of whole sequences: "blocks" (`models/blocks.py`) or "xla", which holds all scores (`models/attention.py`), on any device; or
            "splash", the kernel of TPUs (`models/splash.py`). Generation has its own.
        activation: of the MLP's gate: "silu", "gelu" (by the error function) or "gelu_tanh" (its approximation).
        biases: the projections that add a bias, of "query", "key", "value", "out", "gate", "up", "down".
        qk_norm: RMSNorm over H of every query and key head, before the rotation.
        post_norms: a second RMSNorm after attention and after the MLP, before each is added to the residual stream.
        norm_plus_one: RMSNorm multiplies by `1 + scale`, with `scale` starting at 0.
        embedding_scale: multiplies the embedding, or None.
        query_scale: multiplies `q k^T`; None: `H ** -0.5`.
        attention_softcap: c makes every attention score `c * tanh(score / c)`, or None.
        logit_softcap: the same for the logits, or None.
        window: a local layer's query sees the keys less than `window` positions before it (itself included); None: no local layers.
        local_layers: indices of the local layers; None: all of them, if there is a window.
        local_rope_theta: base of the rotary frequencies in local layers, which then have no scaling; None: as in the others.
        rope_scaling: how the rotary frequencies are stretched, or None.
        max_positions: the context length the model claims. Nothing is refused beyond it.
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
    remat: str = "dots"
    attention: str = "blocks"
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    post_norms: bool = False
    norm_plus_one: bool = False
    embedding_scale: float | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    local_layers: tuple[int, ...] | None = None
    local_rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    max_positions: int | None = None

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
        choices = (
            ("remat", REMAT_POLICIES),
            ("attention", ATTENTION),
            ("dtype", DTYPES),
            ("param_dtype", DTYPES),
            ("activation", ACTIVATIONS),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"DecoderConfig.{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("embedding_scale", "query_scale", "attention_softcap", "logit_softcap", "window"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"DecoderConfig.{name} must be positive or None, got {getattr(self, name)}.")
        unknown = sorted(set(self.biases) - set(self.projections))
        if unknown:
            raise ValueError(f"DecoderConfig.biases must be of {tuple(self.projections)}, got {unknown[0]!r}.")
        if self.local_layers is not None and self.window is None:
            raise ValueError(f"DecoderConfig.local_layers {self.local_layers} need a window, but window is None.")
        if self.local_rope_theta is not None and not self.num_local:
            raise ValueError("DecoderConfig.local_rope_theta is set, but there is no local layer: leave it None.")
        outside = [i for i in self.local_layers or () if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(
                f"DecoderConfig.local_layers must lie in 0..{self.num_layers - 1}, but they hold {outside[0]}."
            )

    @property
    def num_local(self) -> int:
        """The number of layers with a sliding window."""
        if self.window is None:
            return 0
        return self.num_layers if self.local_layers is None else len(set(self.local_layers))

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each matrix product of a layer."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "query": (self.width, heads),
            "key": (self.width, kv_heads),
            "value": (self.width, kv_heads),
            "out": (heads, self.width),
            "gate": (self.width, self.mlp_width),
            "up": (self.width, self.mlp_width),
            "down": (self.mlp_width, self.width),
        }

    def num_params(self) -> int:
        """The number of parameters."""
        products = sum(inputs * outputs for inputs, outputs in self.projections.values())
        biases = sum(self.projections[name][1] for name in self.biases)
        norms = self.width * (4 if self.post_norms else 2) + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocab_size * self.width * (1 if self.tied_head else 2)
        return self.num_layers * (products + biases + norms) + self.width + embeddings
