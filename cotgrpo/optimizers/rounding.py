"""Updates of bfloat16 parameters that are not rounded away: `with_rounding`, and the share that would be.

A bfloat16 weight w has 8 bits. An update that is smaller than half of its last bit, |w| / 512 to |w| / 256, does not
change it: the sum is rounded back to w. Fine-tuning updates are often smaller: of 100 updates at the rate 5e-6, weights
with a deviation of 0.02 keep a change whose cosine to the one asked for is 0.37 (adafactor), and 14 % of them change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float32, Int, Int16, PRNGKeyArray, UInt32

    from cotgrpo.types import Params, PyTree

Rounding = Literal["nearest", "stochastic", "compensated"]


class RoundingState(NamedTuple):
    """State of `with_rounding`.

    Attributes:
        updates: number of updates so far. It seeds stochastic rounding.
        carry: compensated: the lower 16 bits of each bfloat16 parameter, int16; None for other parameters and modes.
        inner: the state of the wrapped optimizer.
    """

    updates: Int[Array, ""]
    carry: PyTree
    inner: optax.OptState


def with_rounding(
    tx: optax.GradientTransformation, rounding: Rounding, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Return `tx` for parameters that are stored in bfloat16, so that small updates arrive.

    The optimizer gets gradients and parameters in float32, so its own state is float32 too. Its updates come out such
    that `optax.apply_updates` gives the rounded parameter exactly. Parameters of other types are left alone.

        nearest       the nearest bfloat16 value. Small updates are lost.
        stochastic    up or down at random, by the distance. Every update arrives in the mean, with noise of the size of
                      the last bit: a cosine of 0.82 after those 100 updates, 0.98 after 1,000. No memory.
        compensated   the nearest value, and the 16 bits that are cut off are kept for the next update. The sum is that
                      of float32, bit by bit: 0.99 and 1.00 for the upper bits. 2 bytes a parameter.

    `benchmarks/rounding.py` measures them. Put it around the whole chain, clipping included.

    Args:
        tx: any optax transformation.
        rounding: how sums are rounded.
        seed: of stochastic rounding. Its bits depend on the seed, the number of updates, and the place in the tree.

    Raises:
        ValueError: an unknown kind of rounding.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be one of {get_args(Rounding)}, got {rounding!r}.")
    inner = optax.with_extra_args_support(tx)

    def init(params: Params) -> RoundingState:
        carry = None
        if rounding == "compensated":
            carry = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.int16) if is_bfloat16(p) else None, params)
        return RoundingState(jnp.zeros((), jnp.int32), carry, inner.init(jax.tree.map(widened, params)))

    def update(
        updates: Params, state: RoundingState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, RoundingState]:
        if params is None:
            raise ValueError("with_rounding needs the parameters: call tx.update(updates, state, params).")
        if "grad" in extra:
            extra["grad"] = jax.tree.map(widened, extra["grad"])
        tree: Any = jax.tree.structure(params)
        leaves: list[Any] = jax.tree.leaves(params)
        lower = [None] * len(leaves) if state.carry is None else tree.flatten_up_to(state.carry)
        wide = [widened(p) if low is None else join(p, low) for p, low in zip(leaves, lower, strict=True)]
        asked, inner_state = inner.update(jax.tree.map(widened, updates), state.inner, tree.unflatten(wide), **extra)
        key = jax.random.fold_in(jax.random.key(seed), state.updates)
        moves: list[Any] = tree.flatten_up_to(asked)
        for place, (p, w, move) in enumerate(zip(leaves, wide, moves, strict=True)):
            if rounding == "nearest" or move is None or not is_bfloat16(p):
                continue
            exact = w + move
            if rounding == "stochastic":
                rounded = round_stochastically(exact, jax.random.fold_in(key, place))
            else:
                rounded, lower[place] = split(exact)
            moves[place] = jnp.where(jnp.isfinite(exact), rounded - widened(p), move)
        carry = None if state.carry is None else tree.unflatten(lower)
        return tree.unflatten(moves), RoundingState(state.updates + 1, carry, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def is_bfloat16(leaf: Any) -> bool:
    """Return whether a leaf is stored in bfloat16."""
    return getattr(leaf, "dtype", None) == jnp.bfloat16


def widened(leaf: Any) -> Any:
    """Return a bfloat16 leaf in float32, and any other leaf as it is."""
    return leaf.astype(jnp.float32) if is_bfloat16(leaf) else leaf


def round_stochastically(x: Float32[Array, "..."], key: PRNGKeyArray) -> Float32[Array, "..."]:
    """Return x rounded up or down to a bfloat16 value, with probabilities that make x the mean.

    Adding random bits to the 16 that are cut off carries into the others as often as it should. A finite value stays
    finite.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return finite_or(bits + (random_bits(key, x.shape) >> 16), bits)


def random_bits(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Return random bits of an array, each a hash of the key and its own position.

    They are the same under any sharding. `jax.random.bits` is too, but takes 60 operations a number, and 16 bytes of
    temporary memory on a CPU. This takes 20, and is fused with its use.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    position, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return mix(mix(position ^ first) + second)


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Return a hash of 32 bits in which every bit depends on every bit of x: the finalizer `lowbias32`."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def split(x: Float32[Array, "..."]) -> tuple[Float32[Array, "..."], Int16[Array, "..."]]:
    """Return the nearest bfloat16 value of x, and what `join` needs to give x back. Ties are rounded up."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    top = finite_or(bits + 0x8000, bits)
    rest = jax.lax.bitcast_convert_type(bits - jax.lax.bitcast_convert_type(top, jnp.uint32), jnp.int32)
    return top, jnp.where(jnp.isfinite(x), jnp.minimum(rest, 0x7FFF), 0).astype(jnp.int16)


def join(top: BFloat16[Array, "..."], rest: Int16[Array, "..."]) -> Float32[Array, "..."]:
    """Return the float32 value that `split` took apart."""
    bits = jax.lax.bitcast_convert_type(top.astype(jnp.float32), jnp.int32)
    return jax.lax.bitcast_convert_type(bits + rest.astype(jnp.int32), jnp.float32)


def finite_or(bits: UInt32[Array, "..."], otherwise: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    """Return the float32 values of the upper 16 bits, or those of `otherwise` if they are infinite."""
    upper = lambda bits: jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(upper(bits)), upper(bits), upper(otherwise))


def lost_share(params: Params, size: float) -> float:
    """Return the share of updates of this size that rounding to nearest loses, over the bfloat16 parameters.

    An update of a weight in [2^e, 2^(e+1)) is lost if it is smaller than half of the last bit, `2^(e - 8)`.
    """
    leaves = [leaf for leaf in jax.tree.leaves(params) if is_bfloat16(leaf)]
    total = sum(leaf.size for leaf in leaves)
    return sum(float(lost_share_of(leaf, size)) * leaf.size for leaf in leaves) / total if total else 0.0


@jax.jit
def lost_share_of(leaf: BFloat16[Array, "..."], size: float | Float32[Array, ""]) -> Float32[Array, ""]:
    """Return the share of the weights of one leaf that an update of this size does not change."""
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    power = jax.lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)  # 2^e; 0 of a weight of 0
    return jnp.mean((size < power * 2.0**-8).astype(jnp.float32))
