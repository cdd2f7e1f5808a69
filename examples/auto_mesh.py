"""Train on a mesh of your own, with Auto axes of any name, by `jax.jit` alone: XLA lays out the model as its inputs."""

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cotgrpo import SftBatch, TrainState, make_sft_step
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student

V, B, T = 32, 16, 24


def count_up(seed: int) -> SftBatch:
    """Return sequences that count up by one, modulo V."""
    rng = np.random.default_rng(seed)
    text = np.asarray((rng.integers(V, size=(B, 1)) + np.arange(T + 1)) % V, np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones = np.ones((B, T), np.int32)
    return SftBatch(text[:, :-1], text[:, 1:], places, ones, ones.astype(np.float32))


def main() -> tuple[float, float]:
    """Train for 40 steps. Return the first and the last loss."""
    config = DecoderConfig(vocab_size=V, width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, mlp_width=96)
    tp = 2 if jax.device_count() % 2 == 0 else 1
    mesh = jax.make_mesh((jax.device_count() // tp, tp), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    tx = optax.adamw(3e-3)
    state = TrainState.create(params=init_params(config, jax.random.key(0)), tx=tx, key=0)

    # The embedding is the head too (it is tied), so its rows are the vocabulary. All else is whole on each device.
    where = lambda path, leaf: P("tp") if "embedding" in jax.tree_util.keystr(path) else P()
    of_state = jax.tree_util.tree_map_with_path(lambda *at: NamedSharding(mesh, where(*at)), state)
    of_batch = NamedSharding(mesh, P("dp"))
    step = jax.jit(
        make_sft_step(make_student(config), tx),
        in_shardings=(of_state, of_batch),
        out_shardings=(of_state, None),
        donate_argnums=0,
    )
    state = jax.device_put(state, of_state)
    losses = []
    for number in range(40):
        state, metrics = step(state, count_up(number))
        losses.append(metrics["loss"].mean())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} on {dict(mesh.shape)}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
