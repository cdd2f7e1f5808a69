"""Train a Flax Linen model with dropout: each step gets a random key, and evaluation gets none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from cotgrpo import SftBatch, Student, TrainState, jit_step, make_eval_step, make_sft_step

V, D, B, T = 32, 64, 8, 24


class Model(nn.Module):
    """Mixes each token with the mean of those before it."""

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, deterministic: bool) -> jax.Array:
        rows = nn.Embed(V, D)(tokens)
        before = jnp.cumsum(rows, axis=1) / (positions[..., None] + 1)
        rows = nn.silu(nn.Dense(D)(jnp.concatenate([rows, before], axis=-1)))
        return nn.Dense(V)(nn.Dropout(0.1, deterministic=deterministic)(rows))


def logits(
    params: dict, tokens: jax.Array, positions: jax.Array, segments: jax.Array, key: jax.Array | None
) -> jax.Array:
    """Return the logits, with dropout if there is a key."""
    rngs = None if key is None else {"dropout": key}
    return Model().apply({"params": params}, tokens, positions, key is None, rngs=rngs)


def count_up(seed: int) -> SftBatch:
    """Return sequences that count up by one, modulo V."""
    start = np.random.default_rng(seed).integers(V, size=(B, 1))
    text = np.asarray((start + np.arange(T + 1)) % V, np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return SftBatch(text[:, :-1], text[:, 1:], places, np.ones((B, T), np.int32), np.ones((B, T), np.float32))


def main() -> tuple[float, float]:
    """Train for 30 steps. Return the first and the last loss on held-out sequences."""
    student = Student.from_logits(logits, takes_key=True)
    tx = optax.adamw(3e-3)
    step = jit_step(make_sft_step(student, tx, micro_batches=2))
    evaluate = jax.jit(make_eval_step(student))
    zeros = jnp.zeros((1, 1), jnp.int32)
    params = Model().init(jax.random.key(0), zeros, zeros, True)["params"]
    state = TrainState.create(params=params, tx=tx, key=0)
    first = evaluate(state.params, count_up(999))["loss"].mean()
    for number in range(30):
        state, metrics = step(state, count_up(number))
    last = evaluate(state.params, count_up(999))["loss"].mean()
    print(f"held-out loss {first:.3f} -> {last:.3f}, {metrics['loss'].mean():.3f} with dropout")
    return first, last


if __name__ == "__main__":
    main()
