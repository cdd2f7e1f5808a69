"""Train a model from a Hugging Face folder with an optax chain of your own: frozen embedding, muon, moving average.

python examples/huggingface_student.py [FOLDER_OR_HUB_ID]    # without one: a small random model
"""

import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cotgrpo import Pair, SftBatch, TrainState, jit_step, make_grpo_step, make_optimizer
from cotgrpo.models import load_pretrained, save_pretrained
from cotgrpo.models.decoder import DecoderConfig, init_params
from cotgrpo.optimizers import param_labels

SMALL = DecoderConfig(vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64)
V, B, T = 64, 4, 32


def count_up(seed: int) -> SftBatch:
    """Return sequences that count up by one, modulo V. The loss is on the second half."""
    text = np.asarray((np.random.default_rng(seed).integers(V, size=(B, 1)) + np.arange(T + 1)) % V, np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return SftBatch(text[:, :-1], text[:, 1:], places, np.ones((B, T), np.int32), np.float32(places >= T // 2))


def which(params: Any) -> Any:
    """Name the optimizer of each parameter: the embedding and the head stay as they are."""
    return jax.tree.map(lambda label: "frozen" if label == "embedding" else "muon", param_labels(params))


def main(folder: str) -> tuple[float, float]:
    """Train for 40 steps, and save the moving average of the parameters. Return the first and the last loss."""
    model = load_pretrained(folder)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"muon": make_optimizer("muon", learning_rate=2e-2, total_steps=40), "frozen": optax.set_to_zero()}, which
        ),
    )
    step = jit_step(make_grpo_step(model.student, tx, Pair(beta=0.5, negatives="calibrated")))
    state = TrainState.create(params=model.params, tx=tx, key=0)
    average, losses = jax.tree.map(jnp.copy, state.params), []  # a copy: the step overwrites its state
    for number in range(40):
        state, metrics = step(state, count_up(number))
        average = optax.incremental_update(state.params, average, 0.1)
        losses.append(metrics["loss"].mean() - metrics["loss_floor"].mean())
    with tempfile.TemporaryDirectory() as out:
        save_pretrained(f"{out}/student", model.config, average)
    print(f"loss above its floor {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as small:
        if not sys.argv[1:]:
            save_pretrained(f"{small}/model", SMALL, init_params(SMALL, jax.random.key(0)))
        main(*sys.argv[1:] or [f"{small}/model"])
