"""Train four seeds at once, ten steps a call: the step is a pure function, so `vmap` and `scan` take it as it is."""

import jax
import jax.numpy as jnp
import optax

from cotgrpo import SftBatch, Student, TrainState, make_sft_step

V, D, B, T, SEEDS, STEPS = 32, 48, 8, 24, 4, 10


def hidden(params: dict[str, jax.Array], tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
    """Mix each token's embedding with the mean of those before it."""
    rows = params["embedding"][tokens]
    before = jnp.cumsum(rows, axis=1) / (positions[..., None] + 1)
    return jax.nn.silu(jnp.concatenate([rows, before], axis=-1) @ params["mix"])


def init(key: jax.Array) -> dict[str, jax.Array]:
    """Return random parameters."""
    one, two, three = jax.random.split(key, 3)
    return {
        "embedding": jax.random.normal(one, (V, D)),
        "mix": jax.random.normal(two, (2 * D, D)) * D**-0.5,
        "head": jax.random.normal(three, (D, V)) * 0.05,
    }


def count_up(key: jax.Array) -> SftBatch:
    """Return sequences that count up by one, modulo V, made on the device."""
    text = (jax.random.randint(key, (B, 1), 0, V) + jnp.arange(T + 1)) % V
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    return SftBatch(text[:, :-1], text[:, 1:], places, jnp.ones((B, T), jnp.int32), jnp.ones((B, T)))


def main() -> tuple[float, float]:
    """Train for 40 steps. Return the first and the last loss, means over the seeds."""
    tx = optax.adamw(3e-3)
    step = make_sft_step(Student(hidden, lambda params: params["head"]), tx)

    @jax.jit
    @jax.vmap
    def ten_steps(state: TrainState, key: jax.Array) -> tuple[TrainState, jax.Array]:
        def one(state: TrainState, key: jax.Array) -> tuple[TrainState, jax.Array]:
            state, metrics = step(state, count_up(key))
            return state, metrics["loss"].total / metrics["loss"].weight

        return jax.lax.scan(one, state, jax.random.split(key, STEPS))

    seeds = jax.random.split(jax.random.key(0), SEEDS)
    states = jax.vmap(lambda key: TrainState.create(params=init(key), tx=tx, key=key))(seeds)
    losses = []
    for _ in range(4):
        states, loss = ten_steps(states, seeds)
        losses.append(loss)
    first, last = losses[0][:, 0], losses[-1][:, -1]
    print(f"{SEEDS} seeds, loss {first.mean():.3f} -> {last.mean():.3f}, standard deviation {last.std():.3f}")
    return float(first.mean()), float(last.mean())


if __name__ == "__main__":
    main()
