"""Measure a student on held-out rows: exact match of greedy answers, and the loss of correct reference replies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console

from cotgrpo.evaluation.accuracy import Accuracy, ExactMatch, mean_metrics
from cotgrpo.terminal import say
from cotgrpo.types import Metrics, Params, SftBatch


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Measures one student with several parameters, and compiles once.

    Attributes:
        exact_match: asks the held-out questions.
        eval_step: `eval_step(params, batch)`, from `make_eval_step`, compiled by `jit_eval`.
        reference_batches: makes batches that hold every correct reference reply once.
        num_references: how many replies these are, maybe 0.
        console: where the result is printed.
        phase: `with phase(title, rows) as progress` shows the progress; `progress` is called with the rows done.
    """

    exact_match: ExactMatch
    eval_step: Callable[[Params, SftBatch], Metrics]
    reference_batches: Callable[[], Iterable[SftBatch]]
    num_references: int
    console: Console
    phase: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = lambda title, rows: nullcontext(
        lambda done: None
    )

    @property
    def verify(self) -> dict[str, str]:
        """The user's own functions that judge the replies, by setting."""
        return self.exact_match.template.verifier.names

    def loss(self, params: Params, progress: Callable[[int], None] = lambda done: None) -> dict[str, float]:
        """Return the mean NLL of the reference replies and its companion metrics; nothing if there are none."""
        if not self.num_references:
            return {}
        metrics = mean_metrics(self.eval_step, params, counted_batches(self.reference_batches(), progress))
        return {name: value for name, value in metrics.items() if not name.endswith("tokens")}

    def loss_and_accuracy(self, params: Params) -> dict[str, float]:
        """Return the metrics of `loss`, and the accuracy of greedy replies."""
        accuracy = self.exact_match(params)
        reward = {} if accuracy.reward is None else {"reply_reward": accuracy.reward}
        return self.loss(params) | {"accuracy": accuracy.value} | reward

    def measure(self, params: Params, when: str) -> dict[str, Any]:
        """Return accuracy, loss (None without a correct reference) and replies, and print them with `when` in front."""
        asked = len(self.exact_match.questions)
        with self.phase(f"{when}: held-out accuracy", asked) as progress:
            accuracy: Accuracy = self.exact_match(params, progress)
        with self.phase(f"{when}: held-out loss", self.num_references) as progress:
            loss = self.loss(params, progress).get("loss")
        shown = (
            f"loss {loss:.4f} on {self.num_references}"
            if loss is not None
            else ("no loss: no row has a correct reply that fits")
        )
        reward = "" if accuracy.reward is None else f", mean reward {accuracy.reward:.4g}"
        say(self.console, f"{when}: held-out accuracy {accuracy}{reward}, {shown}")
        own = {"verify": self.verify} if self.verify else {}
        return (
            {
                "accuracy": accuracy.figures(),
                "truncated": accuracy.truncated,
                "unparsable": accuracy.unparsable,
                "loss": loss,
                "loss_rows": self.num_references,
                "replies": [reply.to_dict() for reply in accuracy.replies],
            }
            | own
            | ({} if accuracy.reward is None else {"reward": accuracy.reward})
        )


def counted_batches(batches: Iterable[SftBatch], progress: Callable[[int], None]) -> Iterator[SftBatch]:
    """Yield the batches, and call `progress` with the number of documents in those that were used."""
    done = 0
    for batch in batches:
        yield batch
        done += int(batch.segment_ids.max(axis=1).sum())
        progress(done)
