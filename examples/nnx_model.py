"""Train a Flax NNX model: split it into a graph and parameters, and merge them inside the student."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cotgrpo import SftBatch, Student, TrainState, jit_step, make_sft_step

V, D, B, T = 32, 64, 8, 24


class Model(nnx.Module):
    """Mixes each token with the mean of those before it. Returns hidden rows, so that the loss can tile the head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.mix = nnx.Linear(2 * D, D, rngs=rngs)
        self.head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        rows = self.embed(tokens)
        before = jnp.cumsum(rows, axis=1) / (positions[..., None] + 1)
        return nnx.silu(self.mix(jnp.concatenate([rows, before], axis=-1)))


def count_up(seed: int) -> SftBatch:
    """Return sequences that count up by one, modulo V."""
    start = np.random.default_rng(seed).integers(V, size=(B, 1))
    text = np.asarray((start + np.arange(T + 1)) % V, np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return SftBatch(text[:, :-1], text[:, 1:], places, np.ones((B, T), np.int32), np.ones((B, T), np.float32))


def main() -> tuple[float, float]:
    """Train for 30 steps. Return the first and the last loss."""
    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    student = Student(
        hidden=lambda params, tokens, positions, segments: nnx.merge(graph, params)(tokens, positions),
        head=lambda params: params.head.kernel[...],
    )
    tx = optax.adamw(3e-3)
    step = jit_step(make_sft_step(student, tx))
    state = TrainState.create(params=params, tx=tx, key=0)
    losses = []
    for number in range(30):
        state, metrics = step(state, count_up(number))
        losses.append(metrics["loss"].mean())
    trained = nnx.merge(graph, state.params)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {trained.head.kernel.shape} head")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
