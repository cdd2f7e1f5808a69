"""Train an Equinox model: its arrays are the parameters, and the rest is closed over."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cotgrpo import SftBatch, Student, TrainState, jit_step, make_sft_step

V, D, B, T = 32, 64, 8, 24


class Model(eqx.Module):
    """Read one sequence. The batch is a `vmap` in the student."""

    embed: eqx.nn.Embedding
    mix: eqx.nn.Linear
    head: jax.Array

    def __init__(self, key: jax.Array) -> None:
        one, two, three = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(V, D, key=one)
        self.mix = eqx.nn.Linear(2 * D, D, key=two)
        self.head = 0.05 * jax.random.normal(three, (D, V))

    def __call__(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        rows = jax.vmap(self.embed)(tokens)
        before = jnp.cumsum(rows, axis=0) / (positions[:, None] + 1)
        return jax.nn.silu(jax.vmap(self.mix)(jnp.concatenate([rows, before], axis=-1)))


def count_up(seed: int) -> SftBatch:
    """Return sequences that count up by one, modulo V."""
    start = np.random.default_rng(seed).integers(V, size=(B, 1))
    text = np.asarray((start + np.arange(T + 1)) % V, np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return SftBatch(text[:, :-1], text[:, 1:], places, np.ones((B, T), np.int32), np.ones((B, T), np.float32))


def main() -> tuple[float, float]:
    """Train for 30 steps. Return the first and the last loss."""
    params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_inexact_array)
    student = Student(
        hidden=lambda params, *arrays: jax.vmap(eqx.combine(params, static))(*arrays),
        head=lambda params: params.head,
    )
    tx = optax.adamw(3e-3)
    step = jit_step(make_sft_step(student, tx))
    state = TrainState.create(params=params, tx=tx, key=0)
    losses = []
    for number in range(30):
        state, metrics = step(state, count_up(number))
        losses.append(metrics["loss"].mean())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {eqx.combine(state.params, static).head.shape} head")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
