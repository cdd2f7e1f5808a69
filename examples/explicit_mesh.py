"""Train on a mesh with Explicit axes, the default of `jax.make_mesh`: the types of arrays hold their layout."""

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
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
    mesh = jax.make_mesh((jax.device_count(),), ("shard",))
    tx = optax.adamw(3e-3)
    state = TrainState.create(params=init_params(config, jax.random.key(0)), tx=tx, key=0)

    # Kernels are split by their inputs and gathered where they are used (FSDP). The step needs no word about it.
    where = lambda path: P(None, "shard") if "kernel" in jax.tree_util.keystr(path) else P()
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, NamedSharding(mesh, where(path))), state
    )
    step = jax.jit(make_sft_step(make_student(config), tx), donate_argnums=0)
    losses = []
    for number in range(40):
        state, metrics = step(state, jax.device_put(count_up(number), NamedSharding(mesh, P("shard"))))
        losses.append(metrics["loss"].mean())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print("a kernel is still", jax.typeof(state.params["layers"]["up"]["kernel"]))
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
