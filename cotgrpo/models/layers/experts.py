"""A mixture of experts: an MLP of many parts, each token sent to a few (Shazeer et al. 2017, arXiv:1701.06538).

    y_n = sum_{e in top-K of the router's logits} w_ne down_e(activation(gate_e(x_n)) * up_e(x_n))

The tokens are sorted by expert, and each product is one grouped product over the sorted rows. No token is dropped,
whatever the load. The weights w multiply the middle of the MLP, not its result, so the backward pass need not keep
the K results of every token.

Dimensions besides those of `cotgrpo.types`: N tokens, K experts of a token, E experts, and M rows: one for each pair of
a token and its expert, in the order of the experts, and empty ones.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from cotgrpo.models.layers.options import IN_FLOAT32 as IN_FLOAT32
from cotgrpo.models.layers.options import LETTERS as LETTERS
from cotgrpo.models.layers.options import Experts as Experts
from cotgrpo.models.layers.options import Products as Products
from cotgrpo.models.norm_and_gate import ACTIVATIONS, broadcast_last
from cotgrpo.sharding import ambient_param_spec, dimension_axes, open_axes, partition_spec, vary_alike

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cotgrpo.models.config import DecoderConfig
    from cotgrpo.types import Array, Bool, Float, Int, PyTree

KEPT = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""What remat policies call the result of each product."""
LOAD = "load"
"""Flax's collection of what the layers sow about their load."""
SMALLEST_BLOCK, LARGEST_BLOCK = 8, 256
"""Rows of a block of "blocks"."""


class Plan(NamedTuple):
    """Where the pairs of a token and its expert lie in the order of the experts.

    Attributes:
        rows: int32 `[N, K]`, the row of each pair; M for a pair without one, whose expert is on another device.
        pairs: int32 `[M]`, the pair `n K + k` of each row; N K for an empty row.
        expert_of_row: int32 `[M]`, the expert of each row that is not empty. A block has one expert, that of its first
            row.
        sizes: int32 `[E]`, rows of each expert, empty ones included. They follow each other from row 0 on.
    """

    rows: Int[Array, "N K"]
    pairs: Int[Array, "M"]
    expert_of_row: Int[Array, "M"]
    sizes: Int[Array, "E"]


class Load(NamedTuple):
    """What the router did with real tokens, summed over them.

    Attributes:
        tokens: float32 `[E]`, tokens that each expert got.
        probabilities: float32 `[E]`, sums of the softmax of the router's logits.
    """

    tokens: Float[Array, "E"]
    probabilities: Float[Array, "E"]


def route(
    experts: Experts, x: Float[Array, "N D"], router: Float[Array, "D E"], bias: Float[Array, "E"] | None
) -> tuple[Float[Array, "N E"], Float[Array, "N K"], Int[Array, "N K"]]:
    """Return the router's logits, and the weights and numbers of each token's experts, all in float32.

    Of equal logits, the experts of lower numbers are chosen.
    """
    logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision="highest")
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[None, :]
    top, chosen = jax.lax.top_k(logits, experts.chosen)
    if experts.normalized:
        return logits, jax.nn.softmax(top, axis=-1), chosen
    return logits, jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), chosen


def make_plan(chosen: Int[Array, "N K"], number: int, block: int) -> Plan:
    """Return the order of the pairs by expert. Those with an expert outside `0..number - 1` get no row."""
    N, K = chosen.shape
    flat = chosen.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < number), flat, number)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=number + 1).astype(jnp.int32)
    sizes = -(-counts[:number] // block) * block
    starts = jnp.cumsum(counts) - counts
    # The row of a pair is the first one of its expert, and its rank among the expert's pairs.
    firsts = jnp.append(jnp.cumsum(sizes) - sizes, 0)
    by_expert = flat[order]
    rows = firsts[by_expert] + jnp.arange(N * K, dtype=jnp.int32) - starts[by_expert]
    # A token has each expert at most once, so more than `number` pairs of it have no row.
    most = N * min(K, number) + min(number, N * K) * (block - 1)
    total = -(-most // block) * block
    rows = jnp.where(by_expert == number, total, rows).astype(jnp.int32)
    pairs = jnp.full(total, N * K, jnp.int32).at[rows].set(order.astype(jnp.int32), mode="drop")
    return Plan(
        rows=jnp.zeros(N * K, jnp.int32).at[order].set(rows, unique_indices=True).reshape(N, K),
        pairs=pairs,
        expert_of_row=jnp.take(flat, pairs, mode="fill", fill_value=number - 1).astype(jnp.int32),
        sizes=sizes,
    )


@jax.custom_vjp
def to_experts(x: Float[Array, "N D"], rows: Int[Array, "N K"], pairs: Int[Array, "M"]) -> Float[Array, "M D"]:
    """Return the token of each row, and zeros in empty rows. `rows` and `pairs` are those of a `Plan`."""
    return jnp.take(x, pairs // rows.shape[1], axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def from_experts(y: Float[Array, "M D"], rows: Int[Array, "N K"], pairs: Int[Array, "M"]) -> Float[Array, "N D"]:
    """Return the sum of each token's rows: the transpose of `to_experts`. Sums are float32."""
    own = jnp.take(y, rows, axis=0, mode="fill", fill_value=0)
    return jnp.sum(own.astype(jnp.float32), axis=1).astype(y.dtype)


# Each is the other's gradient, so none of the two scatters.
to_experts.defvjp(
    lambda x, rows, pairs: (to_experts(x, rows, pairs), (rows, pairs)),
    lambda plan, dy: (from_experts(dy, *plan), None, None),
)
from_experts.defvjp(
    lambda y, rows, pairs: (from_experts(y, rows, pairs), (rows, pairs)),
    lambda plan, dx: (to_experts(dx, *plan), None, None),
)


def row_weights(weights: Float[Array, "N K"], plan: Plan) -> Float[Array, "M"]:
    """Return the weight of each row, 0 in empty ones."""
    return jnp.take(weights.reshape(-1), plan.pairs, mode="fill", fill_value=0)


def grouped_product(
    x: Float[Array, "M D"], kernel: Float[Array, "E D F"], plan: Plan, block: int | None
) -> Float[Array, "M F"]:
    """Return the product of each row with its expert's matrix. Rows after the last expert's are undefined.

    `block` is of how many rows the sizes of `plan` are multiples. None: any, which a kernel of the platform reads.
    """
    if block is None:
        return jax.lax.ragged_dot(x, kernel, plan.sizes, preferred_element_type=x.dtype)
    return block_product(block, *vary_alike(x, kernel, plan.expert_of_row[::block], jnp.sum(plan.sizes) // block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def block_product(
    block: int,
    x: Float[Array, "M D"],
    kernel: Float[Array, "E D F"],
    expert_of_block: Int[Array, "N"],
    used: Int[Array, ""],
) -> Float[Array, "M F"]:
    """Return the product of each of the first `used` blocks of rows with its expert's matrix. The others are zeros."""

    def one(index: Array, y: Array) -> Array:
        own = jax.lax.dynamic_slice_in_dim(x, index * block, block)
        own = jnp.matmul(own, kernel[expert_of_block[index]], preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(y, own.astype(y.dtype), index * block, axis=0)

    y, _ = vary_alike(jnp.zeros((len(x), kernel.shape[2]), x.dtype), x)
    # A device that has some of the experts reads no more blocks than its own need.
    return jax.lax.fori_loop(0, used, one, y)


def block_product_forward(
    block: int,
    x: Float[Array, "M D"],
    kernel: Float[Array, "E D F"],
    expert_of_block: Int[Array, "N"],
    used: Int[Array, ""],
) -> tuple[Float[Array, "M F"], tuple[Array, ...]]:
    """Return the product and what its gradient needs."""
    return block_product(block, x, kernel, expert_of_block, used), (x, kernel, expert_of_block, used)


def block_product_backward(
    block: int, kept: tuple[Array, ...], dy: Float[Array, "M F"]
) -> tuple[Float[Array, "M D"], Float[Array, "E D F"], None, None]:
    """Return `dx = dy W_e^T`, and `dW_e = sum x^T dy` over the expert's rows in float32."""
    x, kernel, expert_of_block, used = kept

    def one(index: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        dx, dkernel = sums
        rows, slopes = (jax.lax.dynamic_slice_in_dim(whole, index * block, block) for whole in (x, dy))
        expert = expert_of_block[index]
        own = jnp.matmul(slopes, kernel[expert].T, preferred_element_type=jnp.float32).astype(dx.dtype)
        dkernel = dkernel.at[expert].add(jnp.matmul(rows.T, slopes, preferred_element_type=jnp.float32))
        return jax.lax.dynamic_update_slice_in_dim(dx, own, index * block, axis=0), dkernel

    dx, dkernel, _ = vary_alike(jnp.zeros_like(x), jnp.zeros(kernel.shape, jnp.float32), dy)
    dx, dkernel = jax.lax.fori_loop(0, used, one, (dx, dkernel))
    return dx, dkernel.astype(kernel.dtype), None, None


block_product.defvjp(block_product_forward, block_product_backward)


def middle(
    experts: Experts, activation: str, gate: Float[Array, "M F"], up: Float[Array, "M F"], weights: Float[Array, "M"]
) -> Float[Array, "M F"]:
    """Return the middle of the MLP times the weight of each row. It is 0 in empty rows, whatever they hold."""
    if experts.limit is None:
        h = ACTIVATIONS[activation](gate) * up
    else:
        gate = jnp.minimum(gate, experts.limit)
        up = jnp.clip(up, -experts.limit, experts.limit)
        h = gate * jax.nn.sigmoid(experts.gate_slope * gate) * (up + 1)
    weights = weights[:, None]
    return jnp.where(weights == 0, 0, h.astype(jnp.float32) * weights).astype(up.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_middle(
    experts: Experts, activation: str, gate: Float[Array, "M F"], up: Float[Array, "M F"], weights: Float[Array, "M"]
) -> Float[Array, "M F"]:
    """Return `middle`. The gradient keeps its arguments and nothing computed from them."""
    return middle(experts, activation, gate, up, weights)


def weighted_middle_backward(
    experts: Experts, activation: str, kept: tuple[Array, Array, Array], dy: Float[Array, "M F"]
) -> tuple[Array, ...]:
    """Return autodiff's gradients."""
    gate, up, weights = kept
    used = weights[:, None] != 0
    gate, up = jnp.where(used, gate, 0), jnp.where(used, up, 0)
    return jax.vjp(functools.partial(middle, experts, activation), gate, up, weights)[1](dy)


weighted_middle.defvjp(
    lambda experts, activation, gate, up, weights: (
        weighted_middle(experts, activation, gate, up, weights),
        (gate, up, weights),
    ),
    weighted_middle_backward,
)


def through_experts(
    experts: Experts,
    activation: str,
    params: Mapping[str, Array],
    x: Float[Array, "N D"],
    weights: Float[Array, "N K"],
    chosen: Int[Array, "N K"],
) -> Float[Array, "N D"]:
    """Return the weighted sum of the results of each token's experts, of those that `params` hold.

    Args:
        experts: what they are.
        activation: of the gate.
        params: `gate`, `up`, `down` and their biases, in the compute type. They may be the experts of one device.
        x: the tokens.
        weights, chosen: of `route`, with the numbers of experts counted from the first one in `params`.
    """
    number = len(params["gate"])
    products = experts.products if experts.products != "auto" else auto_products()
    block = None if products == "ragged" else block_rows(chosen.size, experts.number)
    plan = make_plan(chosen, number, block or 1)
    x, weights, plan, params = vary_alike(x, weights, plan, dict(params))

    def product(name: str, rows: Float[Array, "M inputs"], factor: Float[Array, "M"] | None = None) -> Array:
        y = grouped_product(rows, params[name], plan, block)
        if f"{name}_bias" in params:
            bias = params[f"{name}_bias"][plan.expert_of_row]
            y = y + (bias if factor is None else (bias * factor[:, None]).astype(y.dtype))
        return checkpoint_name(y, KEPT[name])

    own = row_weights(weights, plan)
    rows = to_experts(x, plan.rows, plan.pairs)
    h = weighted_middle(experts, activation, product("gate", rows), product("up", rows), own)
    return from_experts(product("down", h, own), plan.rows, plan.pairs)


def auto_products() -> str:
    """Return how this platform computes grouped products."""
    return "ragged" if jax.default_backend() == "tpu" else "blocks"


def block_rows(pairs: int, number: int) -> int:
    """Return the rows of a block: at most half of what an expert gets on average, so that few rows are empty."""
    rows = SMALLEST_BLOCK
    while rows * 2 <= LARGEST_BLOCK and rows * 4 <= pairs // number:
        rows *= 2
    return rows


def load_of(logits: Float[Array, "N E"], chosen: Int[Array, "N K"], real: Bool[Array, "N"]) -> Load:
    """Return the load of the experts by real tokens. The gradient goes through the probabilities."""
    number = logits.shape[1]
    counted = jnp.broadcast_to(real[:, None], chosen.shape).reshape(-1).astype(jnp.float32)
    tokens = jnp.zeros(number, jnp.float32).at[chosen.reshape(-1)].add(counted)
    return Load(tokens, jnp.sum(jnp.where(real[:, None], jax.nn.softmax(logits, axis=-1), 0), axis=0))


class ExpertLayout(NamedTuple):
    """Which axes of the ambient mesh split what in a mixture of experts.

    Attributes:
        batch, length: of the tokens.
        number, width: of the experts and of their inner size.
        inputs: of the residual stream in the parameters as they lie, which are gathered over these.
    """

    batch: tuple[str, ...]
    length: tuple[str, ...]
    number: tuple[str, ...]
    width: tuple[str, ...]
    inputs: tuple[str, ...]

    @classmethod
    def of_ambient_mesh(cls, experts: Experts, shape: tuple[int, ...]) -> ExpertLayout:
        """Return the layout for tokens of this shape `[B, T, D]`."""
        batch, length, _ = dimension_axes(partition_spec("BTD", shape))
        kernel = experts.shapes(shape[2])["gate"]
        number, _, width = dimension_axes(partition_spec("EDF", kernel))
        taken = {*number, *width}
        inputs = dimension_axes(ambient_param_spec("experts/gate", kernel))[1]
        return cls(batch, length, number, width, tuple(axis for axis in inputs if axis not in taken))

    def spec(self, letters: str) -> PartitionSpec:
        """Return the layout of a parameter."""
        axes = {"E": self.number, "F": self.width, "D": self.inputs}
        return PartitionSpec(*(axes[letter] or None for letter in letters))


def mixture_of_experts(
    experts: Experts, activation: str, params: Mapping[str, Array], x: Float[Array, "B T D"], real: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Load]:
    """Return what the experts add to the residual stream, and their load. Nothing is dropped.

    On a mesh every device sorts its own tokens. If the axis `expert` splits the experts, the tokens of its devices are
    gathered, each device computes what its experts add to all of them, and the sums go back (reduce-scatter). With P
    devices a device receives 2 (P - 1) N D numbers in each pass, N its own tokens. An all-to-all of the pairs would
    receive 2 K N D (P - 1) / P, which is more if P < K, and it needs rows for the worst case too.

    Args:
        experts: what they are.
        activation: of the gate.
        params: as in `Experts.shapes`, the router's in float32 and the others in the compute type.
        x: the normed residual stream.
        real: False for padding, which does not count in the load.
    """
    B, T, D = x.shape
    if not open_axes():
        y, load = on_one_device(experts, activation, params, x.reshape(B * T, D), real.reshape(B * T))
        return y.reshape(x.shape), load
    layout = ExpertLayout.of_ambient_mesh(experts, x.shape)
    of_tokens = PartitionSpec(layout.batch or None, layout.length or None)
    specs = {name: layout.spec(LETTERS[name]) for name in params if name not in IN_FLOAT32}
    specs |= {name: PartitionSpec() for name in params if name in IN_FLOAT32}

    def shard(params: dict[str, Array], x: Array, real: Array) -> tuple[Array, Load]:
        own = x.reshape(-1, D)
        y, load = on_one_device(experts, activation, params, own, real.reshape(-1), layout)
        return y.reshape(x.shape), load

    mapped: Any = jax.shard_map(
        shard,
        in_specs=(specs, of_tokens, of_tokens),
        out_specs=(of_tokens, PartitionSpec()),
        axis_names=set(jax.sharding.get_abstract_mesh().auto_axes),
    )
    return mapped(dict(params), x, real)


def on_one_device(
    experts: Experts,
    activation: str,
    params: Mapping[str, Array],
    x: Float[Array, "N D"],
    real: Bool[Array, "N"],
    layout: ExpertLayout | None = None,
) -> tuple[Float[Array, "N D"], Load]:
    """Return one device's part of `mixture_of_experts`: of its tokens, and of its experts if there is a layout."""
    logits, weights, chosen = route(experts, x, params["router"], params.get("router_bias"))
    load = load_of(logits, chosen, real)
    kernels = {name: value for name, value in params.items() if name not in IN_FLOAT32}
    if layout is None:
        return through_experts(experts, activation, kernels, x, weights, chosen), load
    tokens = layout.batch + layout.length
    load = jax.lax.psum(load, tokens) if tokens else load
    if layout.inputs:
        kernels = {name: gather_inputs(name, value, layout.inputs) for name, value in kernels.items()}
    # Tokens that differ among the devices of an axis are gathered; others are there already.
    spread = tuple(axis for axis in layout.number if axis in tokens)
    if spread:
        x, weights, chosen = (jax.lax.all_gather(part, spread, tiled=True) for part in (x, weights, chosen))
    if layout.number:
        chosen = chosen - jax.lax.axis_index(layout.number) * len(kernels["gate"])
    if "down_bias" in kernels and layout.width:
        # Every part of the width would add it.
        first = jax.lax.axis_index(layout.width) == 0
        kernels["down_bias"] = jnp.where(first, kernels["down_bias"], 0)
    y = through_experts(experts, activation, kernels, x, weights, chosen)
    if spread:
        y = jax.lax.psum_scatter(y, spread, tiled=True)
    summed = layout.width + tuple(axis for axis in layout.number if axis not in spread)
    return (jax.lax.psum(y, summed) if summed else y), load


def gather_inputs(name: str, kernel: Array, axes: tuple[str, ...]) -> Array:
    """Return a parameter with its residual dimension whole. Its gradient is summed into the shards (reduce-scatter)."""
    if "D" not in LETTERS[name]:
        return kernel
    return jax.lax.all_gather(kernel, axes, axis=LETTERS[name].index("D"), tiled=True)


def balance_loss(experts: Experts, tokens_LE: Float[Array, "L E"], probabilities_LE: Float[Array, "L E"]) -> Array:
    """Return the load-balancing loss of all layers together (Fedus et al. 2021, arXiv:2101.03961, eq. 4).

        E sum_e f_e p_e

    f_e is the mean number of a token's choices that fall on expert e, over the tokens of all layers, and p_e the mean
    probability. It is K if the load is even. This is what `transformers` computes.
    """
    count = jnp.maximum(jnp.sum(tokens_LE) / experts.chosen, 1.0)
    f, p = jnp.sum(tokens_LE, axis=0) / count, jnp.sum(probabilities_LE, axis=0) / count
    return experts.number * jnp.sum(jax.lax.stop_gradient(f) * p)


def load_metrics(tokens_LE: Float[Array, "L E"]) -> dict[str, Float[Array, ""]]:
    """Return how even the load is, as means over the layers.

    Returns:
        expert_share_max: share of a layer's choices that fall on its busiest expert; `1 / E` if the load is even.
        expert_entropy: entropy of the load over its maximum `ln E`: 1 if the load is even, 0 if one expert gets all.
    """
    number = tokens_LE.shape[1]
    share = tokens_LE / jnp.maximum(jnp.sum(tokens_LE, axis=1, keepdims=True), 1.0)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0), axis=1)
    most = math.log(number) if number > 1 else 1.0
    return {"expert_share_max": jnp.mean(jnp.max(share, axis=1)), "expert_entropy": jnp.mean(entropy) / most}


class ExpertMlp(nn.Module):
    """`mixture_of_experts` with its parameters. It sows the load as `tokens` and `probabilities` of `LOAD`."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], shared: Float[Array, "B T D"] | None
    ) -> Float[Array, "B T D"]:
        """Return what the experts add to the residual stream, with what the shared MLP adds, if there is one."""
        c, experts = self.config, self.config.experts
        assert experts is not None
        dtype, stored = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        params = {}
        for name, shape in experts.shapes(c.width).items():
            scale = c.init_scale / (2 * c.num_layers) ** 0.5 if name == "down" else c.init_scale
            start = nn.initializers.zeros if name.endswith("_bias") else nn.initializers.normal(scale)
            value: Array = self.param(name, start, shape, stored)
            params[name] = value.astype(jnp.float32 if name in IN_FLOAT32 else dtype)
        y, load = mixture_of_experts(experts, c.activation, params, x, segment_ids > 0)
        for name, value in load._asdict().items():
            self.sow(LOAD, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        if shared is None:
            return y
        if experts.shared_gate:
            gate_D = self.param("shared_gate", nn.initializers.normal(c.init_scale), (c.width,), stored).astype(dtype)
            shared = shared * jax.nn.sigmoid(jnp.sum(x * broadcast_last(gate_D, x), axis=-1, keepdims=True))
        return y + shared


def load_and_loss(experts: Experts, sown: Mapping[str, PyTree]) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the auxiliary loss of all layers and its metrics, from what `ExpertMlp` sows.

    Returns:
        `balance_weight` times the load-balancing loss, and `load_metrics` with the loss itself as `expert_balance`.
    """
    by_name: dict[str, list[Array]] = {name: [] for name in Load._fields}
    for path, value in jax.tree_util.tree_leaves_with_path(sown[LOAD]):
        by_name[str(getattr(path[-1], "key", path[-1]))].append(value.reshape(-1, experts.number))
    tokens_LE, probabilities_LE = (jnp.concatenate(by_name[name]) for name in Load._fields)
    balance = balance_loss(experts, tokens_LE, probabilities_LE)
    metrics = load_metrics(tokens_LE) | {"expert_balance": balance}
    return experts.balance_weight * balance, metrics
