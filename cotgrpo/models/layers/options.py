"""Options of a decoder's layers that take several numbers, as frozen dataclasses: fields of `DecoderConfig`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

DELTA_CHUNK = 64
"""Tokens of a chunk of the gated delta rule."""

Products = Literal["auto", "ragged", "blocks"]
LETTERS = {"router": "DE", "router_bias": "E", "gate": "EDF", "up": "EDF", "down": "EFD"}
LETTERS |= {"gate_bias": "EF", "up_bias": "EF", "down_bias": "ED"}
"""The dimensions of each parameter of a layer, as `cotgrpo.sharding.constrain` reads them."""
IN_FLOAT32 = ("router", "router_bias")


@dataclasses.dataclass(frozen=True)
class ShortConv:
    """A gated short convolution in place of attention (`layers/short_conv.py`).

    Attributes:
        taps: tokens that it reads: the present one and those before it (`conv_L_cache`).
        bias: whether the convolution has a bias (`conv_bias`).

    Raises:
        ValueError: `taps` is below 1.
    """

    taps: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        if self.taps < 1:
            raise ValueError(f"ShortConv.taps must be at least 1, got {self.taps}.")

    def num_params(self, width: int) -> int:
        """Return the number of parameters of the convolution, with D `width`."""
        return (self.taps + self.bias) * width


@dataclasses.dataclass(frozen=True)
class PerLayerEmbeddings:
    """A second embedding, from which every layer reads a vector of its own (`layers/per_layer_embeddings.py`).

    Attributes:
        width: P, numbers per token and layer (`hidden_size_per_layer_input`).
        vocab_size: rows of the table (`vocab_size_per_layer_input`).

    Raises:
        ValueError: a size is not positive.
    """

    width: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name in ("width", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"PerLayerEmbeddings.{name} must be at least 1, got {getattr(self, name)}.")

    def num_params(self, width: int, num_layers: int) -> int:
        """Return the number of parameters outside the layers, with D `width`: table, projection and its norm."""
        return (self.vocab_size + width) * num_layers * self.width + self.width


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """A gated delta net in place of attention (`layers/delta_net.py`).

    Attributes:
        num_key_heads: K, heads of queries and keys (`linear_num_key_heads`). It divides `num_value_heads`.
        num_value_heads: heads of values, each with a state of its own (`linear_num_value_heads`).
        key_dim: A, width of a query and a key (`linear_key_head_dim`).
        value_dim: E, width of a value (`linear_value_head_dim`).
        taps: tokens that the convolution of queries, keys and values reads (`linear_conv_kernel_dim`).

    Raises:
        ValueError: a size is not positive, or the heads do not fit.
    """

    num_key_heads: int = 16
    num_value_heads: int = 32
    key_dim: int = 128
    value_dim: int = 128
    taps: int = 4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"DeltaNet.{field.name} must be at least 1, got {getattr(self, field.name)}.")
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"DeltaNet.num_value_heads ({self.num_value_heads}) must be a multiple of num_key_heads "
                f"({self.num_key_heads})."
            )

    @property
    def keys(self) -> int:
        """Return the numbers per token of all keys."""
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Return the numbers per token of all values."""
        return self.num_value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Return the numbers per token that the convolution reads: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def rule_flops(self) -> int:
        """Return the FLOPs of a token as a recurrence: three products with the state, of each value head."""
        return 6 * self.state_size

    @property
    def chunked_flops(self) -> int:
        """Return the FLOPs of a token in chunks: besides those, products and an inverse of the size of a chunk."""
        rounds = 2 * max((DELTA_CHUNK - 1).bit_length() - 1, 0)
        of_values = self.num_value_heads * 2 * DELTA_CHUNK * (2 * self.value_dim + rounds * DELTA_CHUNK)
        return self.rule_flops + of_values + self.num_key_heads * 4 * DELTA_CHUNK * self.key_dim

    @property
    def working_numbers(self) -> int:
        """Return the float32 numbers of a token that a layer has while it is computed, with a state per chunk."""
        return 3 * self.channels + 2 * self.values + self.state_size // DELTA_CHUNK

    @property
    def state_size(self) -> int:
        """Return the float32 numbers of a sequence's state in a layer."""
        return self.num_value_heads * self.key_dim * self.value_dim

    def projections(self, width: int) -> dict[str, tuple[int, int]]:
        """Return (inputs, outputs) of each matrix product, with D `width`."""
        return {
            "delta_in": (width, self.channels),
            "delta_gate": (width, self.values),
            "delta_strength": (width, self.num_value_heads),
            "delta_decay": (width, self.num_value_heads),
            "delta_out": (self.values, width),
        }

    @property
    def kept_sizes(self) -> tuple[int, int]:
        """Return the numbers per token of the products that the rule and its gate read, and of the result."""
        return self.channels + self.values + 2 * self.num_value_heads, self.values

    def num_params(self) -> int:
        """Return the number of parameters besides the matrix products: filters, decays and the norm."""
        return self.taps * self.channels + 2 * self.num_value_heads + self.value_dim


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of a layer's MLP. Names in parentheses are those of Hugging Face's config.json.

    Attributes:
        number: E, experts of a layer (`num_experts`, `num_local_experts`).
        chosen: K, experts of a token, those with the largest logits (`num_experts_per_tok`).
        width: F, inner size of an expert (`moe_intermediate_size`).
        normalized: whether the weights of a token's experts sum to 1: the softmax is over its K logits, else over all E
            (`norm_topk_prob`).
        biases: whether the router and the experts' products have biases.
        shared: whether every token also goes through the layer's own MLP of `mlp_width`, whose result is added.
        shared_gate: whether a sigmoid of a product of x scales what the shared MLP adds.
        limit: c cuts the gate off above c, and up outside [-c, c]. Then the middle is
            `gate sigmoid(gate_slope * gate) * (up + 1)` (`swiglu_limit`). None: the activation of the decoder.
        gate_slope: as above (`swiglu_alpha`).
        balance_weight: factor of the load-balancing loss in the loss of a train step. 0: it is not added.
        products: how grouped products are computed: "ragged" (`jax.lax.ragged_dot`), "blocks" (a loop over blocks of
            rows of one expert) or "auto": "ragged" on a TPU, whose compiler has a kernel for it, and "blocks"
            elsewhere, where XLA may multiply every row with every expert.

    Raises:
        ValueError: a number is out of range.
    """

    number: int
    chosen: int
    width: int
    normalized: bool = True
    biases: bool = False
    shared: bool = False
    shared_gate: bool = False
    limit: float | None = None
    gate_slope: float = 1.0
    balance_weight: float = 0.0
    products: Products = "auto"

    def __post_init__(self) -> None:
        for name in ("number", "chosen", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"Experts.{name} must be at least 1, got {getattr(self, name)}.")
        if self.chosen > self.number:
            raise ValueError(f"Experts.chosen must be at most number ({self.number}), got {self.chosen}.")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"Experts.limit must be positive or None, got {self.limit}.")
        if not (self.balance_weight >= 0 and math.isfinite(self.balance_weight)):
            raise ValueError(f"Experts.balance_weight must be at least 0, got {self.balance_weight}.")
        if self.products not in get_args(Products):
            raise ValueError(f"Experts.products must be one of {get_args(Products)}, got {self.products!r}.")
        if self.shared_gate and not self.shared:
            raise ValueError("Experts.shared_gate needs shared: there is nothing else for it to scale.")

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of a layer with a residual stream of `width`."""
        sizes = {"D": width, "E": self.number, "F": self.width}
        names = [name for name in LETTERS if self.biases or not name.endswith("_bias")]
        return {name: tuple(sizes[letter] for letter in LETTERS[name]) for name in names}

    def num_params(self, width: int) -> int:
        """Return the number of parameters of a layer, without the shared MLP's own."""
        return sum(math.prod(shape) for shape in self.shapes(width).values()) + (width if self.shared_gate else 0)

    def params_of_one(self, width: int) -> int:
        """Return the number of parameters of one expert."""
        return sum(math.prod(shape[1:]) for name, shape in self.shapes(width).items() if name not in IN_FLOAT32)

    def active_weights(self, width: int) -> int:
        """Return the number of weights in the matrix products of one token."""
        return width * self.number + self.chosen * 3 * width * self.width + (width if self.shared_gate else 0)
