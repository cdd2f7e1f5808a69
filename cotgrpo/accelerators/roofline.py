"""The roofline of a train step: what it has to compute, read and send, by arithmetic, and the time that takes at least.

The model FLOPs of a token, as MFU counts them, are the sum of these terms.

- Layers: 6 for each weight of their matrix products, 2 forward and 4 backward.
- Attention: q k^T and weights v, each over min(T / 2, window) keys on average.
- Gated delta rule: 18 A E for each value head, whatever the length.
- Head: 6 D V, for supervised tokens only.

Recomputation (`remat`) and a frozen reference are hardware FLOPs, not model FLOPs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping

from cotgrpo.accelerators.chips import Topology
from cotgrpo.models.blockwise_attention import KEY_LENGTH_BUCKETS
from cotgrpo.models.config import ATTENTION_RESULT, LAYER_INPUT, DecoderConfig, parse_remat
from cotgrpo.models.layers.options import DeltaNet

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
SPLASH_PRODUCTS = 9
"""Matrix products of a tile of scores in the TPU's kernels: two forward, seven backward (the scores twice)."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one train step, all devices together.

    Attributes:
        decoder: the student.
        tokens: positions of a batch, B * T.
        seq_len: T.
        micro_batches: passes over the parameters.
        supervised: share of tokens with a loss, in [0, 1].
        reference: whether a frozen copy of the student reads the batch too.
        frozen: whether adapters are trained and the student's own weights are not.
        dequantized: whether these are quantized, and dequantized for each product.
    """

    decoder: DecoderConfig
    tokens: int
    seq_len: int
    micro_batches: int = 1
    supervised: float = 1.0
    reference: bool = False
    frozen: bool = False
    dequantized: bool = False

    @functools.cached_property
    def kinds(self) -> tuple[tuple[DecoderConfig, int], ...]:
        """Return the config of each kind of layer, and how many there are."""
        return tuple(Counter(self.decoder.layers).items())

    @property
    def layer_weights(self) -> int:
        """Number of weights in the layers' matrix products."""
        return self.input_weights + sum(n * weights_of(kind) for kind, n in self.kinds)

    @property
    def expert_weights(self) -> int:
        """Number of weights of all experts of all layers, of which a token uses some."""
        return sum(n * all_experts(kind) for kind, n in self.kinds)

    @property
    def dense_weights(self) -> int:
        """Number of weights in the layers' matrix products that every token uses."""
        dense = sum(n * weights_of(kind, kind.projections, experts=False) for kind, n in self.kinds)
        return self.input_weights + dense

    @property
    def input_weights(self) -> int:
        """Number of weights in the product that makes the layers' inputs, with per-layer embeddings."""
        return self.decoder.width * self.decoder.input_width

    @property
    def recomputed_weights(self) -> int:
        """Number of weights in the layers' matrix products that the backward pass computes again."""
        return sum(n * weights_of(kind, kind.recomputed_products) for kind, n in self.kinds)

    @property
    def head_weights(self) -> int:
        return self.decoder.width * self.decoder.vocab_size

    @property
    def seen_keys(self) -> float:
        """Mean number of keys that a query reads, summed over the layers. A row is one document."""
        return sum(n * self.seen_in(local) for (_, local), n in self.attention_layers.items())

    def seen_in(self, local: bool) -> float:
        """Return the mean number of keys that a query reads in a local layer, or in a global one."""
        window, T = self.decoder.window, self.seq_len
        return T / 2 if not local or window is None or window >= T else window - window**2 / (2 * T)

    @functools.cached_property
    def attention_layers(self) -> Counter[tuple[int, bool]]:
        """Return how many layers have attention, by the width of all their heads and whether they are local."""
        c = self.decoder
        layers = [(i, layer) for i, layer in enumerate(c.layers) if layer.mixer == "attention"]
        return Counter((layer.num_heads * layer.head_dim, c.is_local(i)) for i, layer in layers)

    @property
    def score_flops(self) -> float:
        """FLOPs of one matrix product of attention per token, over all layers: `2 Q H` for each key that is read."""
        return 2 * sum(n * width * self.seen_in(local) for (width, local), n in self.attention_layers.items())

    def rule_flops(self, chunked: bool) -> int:
        """Return the FLOPs per token of the forward pass of all gated delta rules, as a recurrence or in chunks."""
        return sum(n * (net.chunked_flops if chunked else net.rule_flops) for net, n in self.delta_nets)

    @property
    def delta_nets(self) -> list[tuple[DeltaNet, int]]:
        """Return the options of each kind of gated delta net, and how many layers have it."""
        return [(kind.delta_net, n) for kind, n in self.kinds if kind.mixer == "delta" and kind.delta_net is not None]

    @property
    def model_flops(self) -> float:
        """FLOPs of one forward and one backward pass. Frozen weights get no gradient of their own."""
        passes = 4 if self.frozen else 6
        layers = passes * self.layer_weights + 6 * self.score_flops + 3 * self.rule_flops(chunked=False)
        return self.tokens * (layers + self.supervised * passes * self.head_weights)

    @property
    def hardware_flops(self) -> float:
        """FLOPs that run: with recomputation, and with masked scores unless the attention kernel skips them."""
        remat = parse_remat(self.decoder.remat)
        scores_again = int(remat is not None)
        # A policy that keeps attention's result runs the kernel's forward pass once.
        attention_again = int(self.recomputes_attention)
        # Number of attention's matrix products, and computed scores over scores that are read.
        products, masked = {
            "xla": (6 + 2 * scores_again, self.masked),
            # The backward pass recomputes the scores: the kernel does so in each of its two parts.
            "blocks": (7 + 2 * attention_again, self.masked * (KEY_LENGTH_BUCKETS + 1) / (2 * KEY_LENGTH_BUCKETS)),
            "splash": (SPLASH_PRODUCTS + 2 * attention_again, 1),
        }[self.decoder.attention]
        extra = 2 * self.recomputed_weights + (products * masked - 6) * self.score_flops
        # The backward pass computes each chunk again, and the states before it if layers are computed again.
        extra += (4 + scores_again) * self.rule_flops(chunked=True) - 3 * self.rule_flops(chunked=False)
        if self.reference:
            extra += 2 * self.layer_weights + 2 * masked * self.score_flops + self.rule_flops(chunked=True)
            extra += 2 * self.supervised * self.head_weights
        return self.model_flops + self.tokens * extra

    @property
    def kernel_flops(self) -> float:
        """FLOPs of attention per token that run in kernels of their own, on all layers."""
        again = 2 * int(self.recomputes_attention)
        return (SPLASH_PRODUCTS + again) * self.score_flops if self.decoder.attention == "splash" else 0.0

    @property
    def recomputes_attention(self) -> bool:
        """Whether the remat policy computes attention's result again."""
        remat = parse_remat(self.decoder.remat)
        return remat is not None and ATTENTION_RESULT not in remat.kept

    @property
    def masked(self) -> float:
        """Scores that plain attention computes over scores that are read."""
        whole = 2 * sum(n * width * self.seq_len for (width, _), n in self.attention_layers.items())
        return whole / self.score_flops if whole else 1.0

    def hbm_bytes(self, state_bytes: float, mesh: Mapping[str, int]) -> float:
        """Return the bytes that one device reads and writes.

        They are weights, activations, the head's logits, gradients and the optimizer's update.

        Args:
            state_bytes: parameters and optimizer state on the device.
            mesh: sizes of the axes.
        """
        c = self.decoder
        tensor = mesh.get("tensor", 1)
        shards, expert = shards_of(mesh), mesh.get("expert", 1)
        number = DTYPE_BYTES[c.dtype]
        passes = 2 + self.recomputed_weights / self.layer_weights + self.reference
        # A dequantized kernel is written before it is read.
        of_layers = passes * ((1 + self.dequantized) * self.dense_weights + self.expert_weights / expert)
        weights = number * (of_layers + 2 * self.head_weights) * self.micro_batches / tensor
        read_and_written = sum(n * numbers_of(kind) for kind, n in self.kinds)
        read_and_written += c.width + c.input_width if c.input_width else 0
        activations = number * (passes + 1) * read_and_written / tensor
        logits = (3 * 4 + 3 * number) * self.supervised * c.vocab_size / tensor
        own = c.num_params() - self.expert_weights * (1 - 1 / expert)
        gradients = 0 if self.frozen else 2 * 4 * own / (tensor * mesh.get("fsdp", 1))
        return (
            weights + (activations + logits) * self.tokens / shards + gradients * self.micro_batches + 2 * state_bytes
        )

    def sent_bytes(self, mesh: Mapping[str, int]) -> float:
        """Estimate the bytes that one device has to send, over all axes."""
        return sum(self.sent_by_axis(mesh).values())

    def sent_by_axis(self, mesh: Mapping[str, int]) -> dict[str, float]:
        """Estimate the bytes that one device has to send along each axis.

        fsdp and data: weights are gathered in each pass, and gradients summed.
        tensor: activations are summed twice per layer and pass.
        context: keys and values are gathered.
        expert: the tokens are gathered before the experts, and the sums go back; other gradients are summed.
        """
        c = self.decoder
        data, fsdp, tensor, context = (mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor", "context"))
        expert = mesh.get("expert", 1)
        number, share = DTYPE_BYTES[c.dtype], lambda n: (n - 1) / n
        passes = 2 + self.recomputed_weights / self.layer_weights + self.reference
        shared = (self.dense_weights + self.head_weights) / tensor
        weights = shared + self.expert_weights / expert / tensor
        gathered = passes * number * weights * share(fsdp)
        gradients = 0 if self.frozen else 4 * weights
        tokens = self.tokens / shards_of(mesh)
        stream = 2 * (passes + 1) * 2 * number * c.width * c.num_layers * tokens * share(tensor)
        read: float = sum(n * kind.num_kv_heads * kind.head_dim for kind, n in self.kinds if kind.has_keys)
        # Of a gated delta net, what its convolution reads is gathered.
        read += sum(n * net.channels for net, n in self.delta_nets) / 2
        keys = (passes + 1) * 2 * number * read * tokens * (context - 1) / tensor
        sent = {
            "data": self.micro_batches * gradients * 2 * share(data) / fsdp,
            "fsdp": self.micro_batches * (gathered + gradients * share(fsdp)),
            "tensor": stream,
            "context": keys,
        }
        if expert == 1:
            return sent
        sparse = sum(n for kind, n in self.kinds if kind.mlp == "experts")
        exchanged = passes * 2 * (expert - 1) * number * c.width * sparse * tokens
        summed = 0 if self.frozen else 4 * shared * 2 * share(expert) / fsdp
        return sent | {"expert": exchanged + self.micro_batches * summed}

    def activation_bytes(self, mesh: Mapping[str, int]) -> float:
        """Estimate the peak of one device's activations in a micro-batch.

        It is what the forward pass keeps for the backward pass, plus one layer, the head's tile and gathered weights.
        """
        c = self.decoder
        tensor = mesh.get("tensor", 1)
        tokens, expert = self.tokens / self.micro_batches / shards_of(mesh), mesh.get("expert", 1)
        number = DTYPE_BYTES[c.dtype]
        whole = {kind: self.whole_layer(kind, number, tensor, expert) for kind, _ in self.kinds}
        remat = parse_remat(c.remat)
        of_stream = (LAYER_INPUT, "out_proj", "down_proj")  # not split over tensor
        part = lambda kind, name: number * kept_of(kind, name, expert) / (1 if name in of_stream else tensor)
        kept = sum(
            n * (whole[kind] if remat is None else sum(part(kind, name) for name in remat.on_device))
            for kind, n in self.kinds
        )
        dense = lambda kind: weights_of(kind, kind.projections, experts=False)
        layer = number * max(dense(kind) + all_experts(kind) / expert for kind, _ in self.kinds) / tensor
        head = (4 + number) * self.head_weights / tensor
        tile = min(tokens, 2**30 / (4 * c.vocab_size)) * c.vocab_size * 12 / tensor
        inputs = 2 * number * c.input_width  # of the layers, and the copy that each run of layers reads
        return tokens * (inputs + kept + 2 * max(whole.values())) + 2 * layer + head + tile

    def whole_layer(self, kind: DecoderConfig, number: int, tensor: int, expert: int = 1) -> float:
        """Return the bytes of a token that a layer has on one device while it is computed."""
        outputs = number * sum(outputs for _, outputs in kind.projections.values()) / tensor
        plain = kind.attention == "xla" and kind.mixer == "attention"
        scores = (4 + number) * kind.num_heads * self.seq_len / tensor if plain else 0
        middle = number * (kind.mlp_width if kind.dense_mlp else 0) / tensor
        if kind.mlp == "experts" and kind.experts is not None:
            rows = rows_of_a_token(kind, expert)
            middle += number * rows * (3 * kind.experts.width / tensor + 2 * kind.width)
        if kind.mixer == "delta" and kind.delta_net is not None:
            middle += DTYPE_BYTES["float32"] * kind.delta_net.working_numbers / tensor
        return 4 * number * kind.width + outputs + middle + scores


def shards_of(mesh: Mapping[str, int]) -> int:
    """Return over how many devices the tokens are spread."""
    return math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "context", "expert"))


def weights_of(layer: DecoderConfig, names: Collection[str] | None = None, *, experts: bool = True) -> int:
    """Return the number of weights in these matrix products of a layer that a token uses. None: in all."""
    dense = sum(i * o for name, (i, o) in layer.projections.items() if names is None or name in names)
    if not experts or layer.mlp != "experts" or layer.experts is None:
        return dense
    own = layer.experts
    if names is None:
        return dense + own.active_weights(layer.width)
    return dense + own.chosen * layer.width * own.width * sum(name in names for name in ("gate", "up", "down"))


def all_experts(layer: DecoderConfig) -> int:
    """Return the number of weights in the matrix products of all experts of a layer."""
    if layer.mlp != "experts" or layer.experts is None:
        return 0
    return 3 * layer.experts.number * layer.width * layer.experts.width


def numbers_of(layer: DecoderConfig) -> int:
    """Return how many numbers of a token the matrix products of a layer read and write."""
    dense = sum(map(sum, layer.projections.values()))
    if layer.mlp != "experts" or layer.experts is None:
        return dense
    return dense + layer.experts.chosen * 3 * (layer.width + layer.experts.width)


def rows_of_a_token(layer: DecoderConfig, expert: int) -> int:
    """Return the rows of experts per token of one device, in the worst case, which memory is for.

    If the experts are split over `expert` devices, all tokens of these may choose the experts of one.
    """
    assert layer.experts is not None
    own = layer.experts
    return expert * min(own.chosen, -(-own.number // expert))


def kept_of(layer: DecoderConfig, name: str, expert: int) -> float:
    """Return how many numbers per token a layer keeps under a name, as `rows_of_a_token` counts them."""
    size = layer.kept_sizes[name]
    if layer.mlp != "experts" or layer.experts is None or name not in ("gate_proj", "up_proj"):
        return size
    return size + (rows_of_a_token(layer, expert) - layer.experts.chosen) * layer.experts.width


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Least seconds of one step, by what limits it.

    Attributes:
        compute: hardware FLOPs over the peak.
        memory: bytes read and written over HBM's bandwidth.
        network: bytes sent over the links' bandwidth.
    """

    compute: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        """Seconds if all three overlap, the lower bound."""
        return max(self.compute, self.memory, self.network)

    @property
    def in_turn(self) -> float:
        """Seconds if nothing overlaps."""
        return self.compute + self.memory + self.network


def step_time(
    work: Work, topology: Topology, state_bytes: float, sent_bytes: float, mesh: Mapping[str, int]
) -> StepTime:
    """Return the roofline of a step; `state_bytes` and `sent_bytes` are those of one device."""
    chip = topology.chip
    return StepTime(
        compute=work.hardware_flops / (topology.num_chips * chip.flops),
        memory=work.hbm_bytes(state_bytes, mesh) / (chip.hbm_bandwidth / chip.devices),
        network=sent_bytes / topology.network_bandwidth,
    )
