"""Held-out rows, and how a student does on them: exact match of its greedy answers, and the loss of those reference replies that are correct."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from rich.console import Console

from cotgrpo.evaluation.accuracy import Accuracy, ExactMatch, mean_metrics
from cotgrpo.sharding import jit_eval
from cotgrpo.train_steps import make_eval_step
from cotgrpo.training.inputs import StageInputs


@dataclasses.dataclass
class HeldOut:
    """Measures one student with several parameters, and compiles once.

    Attributes:
        setup: its held-out rows and its model.
        batch_size: packed rows at a time, for the loss.
        console: where the progress goes.
    """

    setup: StageInputs
    batch_size: int
    console: Console

    @functools.cached_property
    def exact_match(self) -> ExactMatch:
        model = self.setup.model
        return ExactMatch(
            model.decoder,
            self.setup.template,
            self.setup.test_questions,
            max_new_tokens=model.config.eval.max_new_tokens,
            batch_size=model.config.eval.batch_size,
            vocab_size=model.vocab_size,
            mesh=model.mesh,
        )

    @functools.cached_property
    def eval_step(self) -> Any:
        return jit_eval(make_eval_step(self.setup.model.student), self.setup.model.mesh)

    def loss(self, params: Any) -> dict[str, float]:
        """Mean NLL of the correct rationales and answers, with its companions; nothing where no held-out row has any."""
        if not self.setup.test:
            return {}
        metrics = mean_metrics(self.eval_step, params, self.setup.test_batches(self.batch_size))
        return {name: value for name, value in metrics.items() if not name.endswith("tokens")}

    def loss_and_accuracy(self, params: Any) -> dict[str, float]:
        """The same, and the accuracy of greedy replies."""
        return self.loss(params) | {"accuracy": self.exact_match(params).value}

    def measure(self, params: Any, when: str) -> dict[str, Any]:
        """Accuracy, loss (None where no row has a correct reply) and replies; `when` is printed before them."""
        asked, references = len(self.setup.test_questions), len(self.setup.test)
        with self.console.status(f"held-out accuracy {when}") as status:
            show = lambda done: status.update(f"held-out accuracy {when}: {done} of {asked} rows")
            accuracy: Accuracy = self.exact_match(params, show)
        loss = self.loss(params).get("loss")
        said = "no loss: no row has a correct reply that fits" if loss is None else f"loss {loss:.4f} on {references}"
        self.console.print(f"{when}: held-out accuracy {accuracy}, {said}", highlight=False, soft_wrap=True)
        return {
            "accuracy": accuracy.figures(),
            "truncated": accuracy.truncated,
            "unparsable": accuracy.unparsable,
            "loss": loss,
            "loss_rows": references,
            "replies": [dataclasses.asdict(reply) for reply in accuracy.replies],
        }
