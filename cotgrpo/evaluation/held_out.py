"""Measure a student on held-out rows and further test sets: greedy and drawn replies, and the held-out loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console

from cotgrpo.evaluation.accuracy import Accuracy, ExactMatch, SampledAccuracy, SampledMatch, mean_metrics
from cotgrpo.terminal import say
from cotgrpo.types import Metrics, Params, SftBatch

Phase = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""`with phase(title, rows) as progress` shows the progress; `progress` is called with the rows done."""


def no_phase(title: str, rows: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show nothing."""
    return nullcontext(lambda done: None)


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Questions that are asked.

    Attributes:
        exact_match: asks each question once, greedily.
        sampled: draws several replies to each; None: only the greedy one.
    """

    exact_match: ExactMatch
    sampled: SampledMatch | None = None

    def measure(self, params: Params, title: str, phase: Phase) -> tuple[Accuracy, SampledAccuracy | None]:
        """Return the accuracy of greedy replies, and the estimates of drawn ones."""
        with phase(f"{title} accuracy", len(self.exact_match.questions)) as progress:
            accuracy = self.exact_match(params, progress)
        if self.sampled is None:
            return accuracy, None
        with phase(f"{title} drawn replies", self.sampled.num_replies) as progress:
            return accuracy, self.sampled(params, progress)

    def asked(self) -> list[list[str]]:
        """Return each question with its right answer."""
        return [[question.question, question.gold] for question in self.exact_match.questions]


def measured_set(accuracy: Accuracy, sampled: SampledAccuracy | None) -> dict[str, Any]:
    """Return what a measurement keeps of one test set."""
    found: dict[str, Any] = {
        "accuracy": accuracy.figures(),
        "truncated": accuracy.truncated,
        "unparsable": accuracy.unparsable,
        "replies": [reply.to_dict() for reply in accuracy.replies],
    }
    if accuracy.reward is not None:
        found["reward"] = accuracy.reward
    if sampled is not None:
        found["sampled"] = sampled.figures()
        for row, several in zip(found["replies"], sampled.replies, strict=True):
            drawn = [reply.to_dict() for reply in several]
            row["samples"] = [{k: v for k, v in each.items() if k not in ("question", "gold")} for each in drawn]
    return found


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Measures one student with several parameters, and compiles once.

    Attributes:
        exact_match: asks the held-out questions.
        eval_step: `eval_step(params, batch)`, from `make_eval_step`, compiled by `jit_eval`.
        reference_batches: makes batches that hold every correct reference reply once.
        num_references: how many replies these are, maybe 0.
        console: where the result is printed.
        phase: shows the progress.
        sampled: draws several replies to each held-out question; None: only the greedy one.
        sets: further test sets, by name.
    """

    exact_match: ExactMatch
    eval_step: Callable[[Params, SftBatch], Metrics]
    reference_batches: Callable[[], Iterable[SftBatch]]
    num_references: int
    console: Console
    phase: Phase = no_phase
    sampled: SampledMatch | None = None
    sets: Mapping[str, QuestionSet] = dataclasses.field(default_factory=dict)

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
        """Return accuracy, loss (None without a correct reference) and replies, and print them with `when` in front.

        The result has `sampled` too, with the estimates of drawn replies, and `sets`, with each further test set.
        """
        accuracy, sampled = QuestionSet(self.exact_match, self.sampled).measure(params, f"{when}: held-out", self.phase)
        with self.phase(f"{when}: held-out loss", self.num_references) as progress:
            loss = self.loss(params, progress).get("loss")
        shown = (
            f"loss {loss:.4f} on {self.num_references}"
            if loss is not None
            else ("no loss: no row has a correct reply that fits")
        )
        reward = "" if accuracy.reward is None else f", mean reward {accuracy.reward:.4g}"
        say(
            self.console,
            f"{when}: held-out accuracy {accuracy.value:.1%} of {accuracy.n}\n"
            f"  95 % interval {accuracy.low:.1%} to {accuracy.high:.1%}{reward}, {shown}",
        )
        if sampled is not None:
            say(self.console, f"{when}: held-out {sampled}")
        measured = measured_set(accuracy, sampled)
        found = {name: measured.pop(name) for name in ("accuracy", "truncated", "unparsable")}
        found |= {"loss": loss, "loss_rows": self.num_references} | measured
        if self.verify:
            found["verify"] = self.verify
        if self.sets:
            found["sets"] = {
                name: measured_set(*each.measure(params, f"{when}: {name}", self.phase))
                for name, each in self.sets.items()
            }
            lines = table_lines({"held-out": found} | found["sets"])
            say(self.console, "\n  ".join([f"{when}: test sets", *lines]))
        return found

    def is_whole(self, found: Mapping[str, Any]) -> bool:
        """Return whether a measurement on the held-out rows has all that `measure` would return now."""
        draws = {} if self.sampled is None else dataclasses.asdict(self.sampled.draws)
        names = [] if self.sampled is None else [f"pass@{k}" for k in self.sampled.ks]
        sets = found.get("sets", {})
        drawn = [found.get("sampled", {}), *(each.get("sampled", {}) for each in sets.values())]
        same = all(bool(each) == bool(draws) and {name: each.get(name) for name in draws} == draws for each in drawn)
        asked = {name: [[r["question"], r["gold"]] for r in each["replies"]] for name, each in sets.items()}
        return (
            same
            and all(name in each for each in drawn for name in names)
            and asked == {name: each.asked() for name, each in self.sets.items()}
        )


def set_figures(found: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the figures of one measured test set by name: accuracy, then pass@k and maj@k."""
    sampled = found.get("sampled", {})
    return {"accuracy": found["accuracy"]} | {n: share for n, share in sampled.items() if isinstance(share, Mapping)}


def table_lines(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a table of test sets: one line each, below a line of headings."""
    rows = [["test set", "rows"]]
    for name, found in sets.items():
        figures = set_figures(found)
        if len(rows[0]) == 2:
            rows[0] += [*figures]
        cells = [f"{f['value']:.1%} ({f['low']:.1%} to {f['high']:.1%})" for f in figures.values()]
        rows.append([name, str(found["accuracy"]["n"]), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def counted_batches(batches: Iterable[SftBatch], progress: Callable[[int], None]) -> Iterator[SftBatch]:
    """Yield the batches, and call `progress` with the number of documents in those that were used."""
    done = 0
    for batch in batches:
        yield batch
        done += int(batch.segment_ids.max(axis=1).sum())
        progress(done)
