"""Save and restore a train state with Orbax. The restored run goes on to the bit."""

import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from cotgrpo import SftBatch, TrainState, jit_step, make_sft_step
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student

V, B, T = 32, 8, 24
CONFIG = DecoderConfig(vocab_size=V, width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, mlp_width=96)


def count_up(seed: int) -> SftBatch:
    """Return sequences that count up by one, modulo V."""
    start = np.random.default_rng(seed).integers(V, size=(B, 1))
    text = np.asarray((start + np.arange(T + 1)) % V, np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return SftBatch(text[:, :-1], text[:, 1:], places, np.ones((B, T), np.int32), np.ones((B, T), np.float32))


def main() -> tuple[float, float]:
    """Train for 20 steps with a restart after 10. Return the first and the last loss."""
    tx = optax.adamw(3e-3)
    step = jit_step(make_sft_step(make_student(CONFIG), tx))
    state = TrainState.create(params=init_params(CONFIG, jax.random.key(0)), tx=tx, key=0)
    losses = []
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        path = Path(folder) / "step_10"
        for number in range(20):
            state, metrics = step(state, count_up(number))
            losses.append(metrics["loss"].mean())
            if number == 9:
                checkpointer.save(path, state)
                checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        again = checkpointer.restore(path, like)
        for number in range(10, 20):  # a batch is a function of its number, so the data is at its place too
            again, metrics = step(again, count_up(number))
            assert metrics["loss"].mean() == losses[number]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; ten steps after the restart are equal to the bit")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
