"""The divergences against TRL's own loss on the same logits. Skipped without trl; test_divergences.py has the facts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.objectives import JensenShannon, TokenInputs

torch = pytest.importorskip("torch")
gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
server = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")

TOKENS, V = 64, 300


def logits_of_both() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(scale=3.0, size=(TOKENS, V)).astype(np.float32) for _ in range(2))  # type: ignore[return-value]


def ours(objective: JensenShannon, student: np.ndarray, teacher: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean loss over tokens, and the gradient of the sum in the logits."""

    def token(z_V: Any, teacher_V: Any) -> Any:
        extra: dict[str, Any] = {}
        if objective.top_k is not None:
            log_q, ids = jax.lax.top_k(jax.nn.log_softmax(teacher_V), objective.top_k)
            extra = {"top_ids": ids, "top_log_probs": log_q}
        inputs = TokenInputs(jnp.int32(0), jnp.float32(1.0), None, teacher_V, extra)
        (loss, _), grad = objective.value_and_grad(z_V, inputs)
        return loss, grad

    loss, grad = jax.jit(jax.vmap(token))(student, teacher)
    return float(jnp.mean(loss)), np.asarray(grad)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_exact(beta: float) -> None:
    student, teacher = logits_of_both()
    z = torch.tensor(student[None], requires_grad=True)
    labels = torch.zeros(1, TOKENS, dtype=torch.long)
    want = gold.GOLDTrainer.generalized_jsd_loss(z, torch.tensor(teacher[None]), labels, beta=beta)
    (want * TOKENS).backward()
    loss, grad = ours(JensenShannon(None, beta), student, teacher)
    np.testing.assert_allclose(loss, float(want), rtol=1e-5)
    np.testing.assert_allclose(grad, z.grad[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_top_k_with_the_rest_as_one_outcome(beta: float) -> None:
    student, teacher = logits_of_both()
    z = torch.tensor(student, requires_grad=True)
    log_q, ids = torch.log_softmax(torch.tensor(teacher), -1).topk(16)
    valid = torch.ones_like(ids, dtype=torch.bool)
    log_q, support = server._add_tail_bucket(log_q, valid)
    log_p, _ = server._add_tail_bucket(torch.log_softmax(z, -1).gather(-1, ids), valid)
    want = server._jsd_divergence(log_p, log_q, beta, support).sum(-1)
    want.sum().backward()
    loss, grad = ours(JensenShannon(16, beta), student, teacher)
    np.testing.assert_allclose(loss, float(want.mean()), rtol=1e-5)
    np.testing.assert_allclose(grad, z.grad.numpy(), atol=1e-5)
