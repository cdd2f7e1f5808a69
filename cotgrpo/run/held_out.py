"""Held-out rows, and how a student does on them: exact match of its greedy answers, and the loss of the reference replies."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from rich.console import Console

from cotgrpo.run.evaluate import Accuracy, ExactMatch, mean_metrics
from cotgrpo.run.setup import Setup
from cotgrpo.train_steps import make_eval_step


@dataclasses.dataclass
class HeldOut:
    """Measures one student with several parameters, and compiles once.

    Attributes:
        setup: its held-out rows and its model.
        batch_size: packed rows at a time, for the loss.
        console: where the progress goes.
    """

    setup: Setup
    batch_size: int
    console: Console

    @functools.cached_property
    def exact_match(self) -> ExactMatch:
        model = self.setup.model
        return ExactMatch(
            model.decoder,
            self.setup.template,
            self.setup.test_triples,
            max_new_tokens=model.config.eval.max_new_tokens,
            batch_size=model.config.eval.batch_size,
            vocab_size=model.vocab_size,
        )

    @functools.cached_property
    def eval_step(self) -> Any:
        return jax.jit(make_eval_step(self.setup.model.student))

    def loss(self, params: Any) -> dict[str, float]:
        """Mean NLL of the rationales and answers, with its companions."""
        metrics = mean_metrics(self.eval_step, params, self.setup.test_batches(self.batch_size))
        return {name: value for name, value in metrics.items() if not name.endswith("tokens")}

    def measure(self, params: Any, when: str) -> dict[str, Any]:
        """Accuracy, loss and replies; `when` is printed before them."""
        with self.console.status(f"held-out accuracy {when}") as status:
            total = len(self.setup.test_triples)
            show = lambda done: status.update(f"held-out accuracy {when}: {done} of {total} rows")
            accuracy: Accuracy = self.exact_match(params, show)
        loss = self.loss(params)["loss"]
        self.console.print(f"{when}: held-out accuracy {accuracy}, loss {loss:.4f}", highlight=False, soft_wrap=True)
        return {
            "accuracy": accuracy.figures(),
            "truncated": accuracy.truncated,
            "unparsable": accuracy.unparsable,
            "loss": loss,
            "replies": [dataclasses.asdict(reply) for reply in accuracy.replies],
        }
