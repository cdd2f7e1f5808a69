"""The HTML page of a run's report: data for the templates in `templates/`.

The page needs neither a network nor a script, and its content security policy forbids both.
The templates escape every value. What comes from the run (samples, config, file names) is shown as text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from cotgrpo.reports.charts import Curve, curve_chart, interval_chart, series_style, stage_label
from cotgrpo.reports.completions import read_completion
from cotgrpo.reports.formats import escape_text, format_duration, format_number

MOMENTS = {"base": "Before training", "sft": "After SFT", "grpo": "After GRPO", "on_policy": "After on-policy GRPO"}
TRAINED = ("sft", "grpo", "on_policy")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One chart of the page.

    Attributes:
        title: heading of the chart.
        unit: what is measured.
        key: name in the log.
        compared: name in the log of a second curve, drawn dashed; "" for none.
        third: the same of a third one, in the colours of the stages.
        percent: whether values are fractions, shown as percentages.
        log: whether a logarithmic axis may be used.
    """

    title: str
    unit: str
    key: str
    compared: str = ""
    third: str = ""
    percent: bool = False
    log: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The names in the log of all its curves."""
        return tuple(filter(None, (self.key, self.compared, self.third)))


METRICS = (
    Metric("Loss", "nats per supervised token", "train/loss", "eval/loss", log=True),
    Metric("Reward", "log p(ghost) \N{MINUS SIGN} log p(drawn), nats", "train/reward"),
    Metric("Ghost and drawn tokens", "their mean probability", "train/ghost_prob", "train/drawn_prob", percent=True),
    Metric("Match rate", "drawn token is the ghost token", "train/match_rate", percent=True),
    Metric(
        "Accuracy",
        "Training: the likeliest token. Reply accuracy: sampled, or greedy held out",
        "train/token_accuracy",
        "train/accuracy",
        "eval/accuracy",
        percent=True,
    ),
    Metric("Entropy", "of the next token, nats", "train/entropy", log=True),
    Metric("KL", "to the frozen reference, nats", "train/kl", log=True),
    Metric("Gradient norm", "before clipping", "train/grad_norm", log=True),
    Metric("Learning rate", "by the schedule", "train/learning_rate"),
    Metric("Throughput", "real tokens per second", "train/tokens_per_sec"),
)
VALUES_IN_A_LEGEND = 2
"""A chart with more kinds of curves has no room for their last values."""
LEGENDS = {
    "train/loss": "training",
    "eval/loss": "held out",
    "train/token_accuracy": "training",
    "train/accuracy": "sampled",
    "eval/accuracy": "greedy",
    "train/ghost_prob": "ghost",
    "train/drawn_prob": "drawn",
}

FOLDED_LINES, FOLDED_CHARACTERS = 14, 700
LONGEST_TEXT = 20_000
"""The page shows this many characters of a longer text, and how many are left out."""


def render(
    report: Mapping[str, Any],
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
    replies: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the page as HTML text.

    Args:
        report: the content of `report.json`.
        stages: rows of the log by stage.
        replies: rows of `completions.jsonl`, shown from the last to the first. If empty, the page lacks that section.
    """
    seconds = report["wall_seconds"]
    parts = [s for name, s in seconds.items() if name != "total" and math.isfinite(s)]
    measured = report["accuracy"]
    moments = [
        {"name": name, "row": measured[name], "loss": report["held_out_loss"].get(name)} for name in in_order(measured)
    ]
    skipped = [
        (stage, round(sum(value for _, value in points(rows, "train/skipped")))) for stage, rows in stages.items()
    ]
    sections = ["accuracy", "curves", "answers", "completions", "data", "time", "config", "versions", "reproduce"]
    template = environment().get_template("report.html.j2")
    return template.render(
        report={"notes": [], "evaluations": []} | dict(report),
        figures=list(dict.fromkeys(name for row in report.get("evaluations", []) for name in row["figures"])),
        sections=[name for name in sections if name != "completions" or replies],
        stages=stages,
        ran=[stage for stage in TRAINED if stage in stages or stage in seconds],
        skipped_updates=[(stage, count) for stage, count in skipped if count],
        moments=moments,
        accuracy_chart=interval_chart("Accuracy", [(m["name"], moment_label(m["name"]), m["row"]) for m in moments]),
        charts=list(drawn_charts(stages)),
        completions=[read_completion(row) for row in reversed(replies)],
        longest_seconds=max(parts, default=0.0),
    )


@functools.cache
def environment() -> jinja2.Environment:
    """Return the templates, with filters for the page's numbers and names."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("cotgrpo.reports"),
        autoescape=True,
        finalize=lambda value: escape_text(value if isinstance(value, str) else str(value)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "count": "{:,}".format,
        "percent": "{:.1%}".format,
        "number": format_number,
        "duration": format_duration,
        "fold": fold,
        "in_order": in_order,
        "moment_label": moment_label,
        "series_style": series_style,
        "share_of": share_of,
        "stage_label": stage_label,
    }
    return templates


def in_order(names: Iterable[str]) -> list[str]:
    """Sort moments of a run by time: those of `MOMENTS`, then any others."""
    names = list(names)
    return [name for name in MOMENTS if name in names] + [name for name in names if name not in MOMENTS]


def moment_label(name: str) -> str:
    """Return a moment's name as the page shows it."""
    return MOMENTS.get(name, name)


def drawn_charts(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[tuple[Metric, str]]:
    """Yield a chart for each metric that the logs hold."""
    for metric in METRICS:
        curves = [
            Curve(
                stage,
                LEGENDS.get(key, ""),
                found,
                second=key != metric.key,
                colour=stage if key == metric.third else "",
            )
            for key in metric.keys
            for stage, rows in stages.items()
            if (found := points(rows, key))
        ]
        if curves:
            few = len({curve.label for curve in curves}) <= VALUES_IN_A_LEGEND
            yield metric, curve_chart(metric.title, curves, percent=metric.percent, log=metric.log, last_values=few)


def points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return `(step, value)` of the rows that hold a finite number under the key."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [(float(step), float(v)) for step, v in found if isinstance(v, (int, float)) and math.isfinite(v)]


@dataclasses.dataclass(frozen=True)
class FoldedText:
    """A text of the page: what it shows, and the beginning that it shows while folded."""

    shown: str
    preview: str


def fold(text: str) -> FoldedText:
    """Cut a text to what the page shows of it. A short one is its own preview."""
    shown = text[:LONGEST_TEXT]
    if len(shown) < len(text):
        shown += f"\n[{len(text) - len(shown):,} more characters are in report.json]"
    return FoldedText(shown, "\n".join(shown.split("\n")[:FOLDED_LINES])[:FOLDED_CHARACTERS])


def share_of(part: int | float, whole: int | float) -> float:
    """Return `part / whole` in [0, 1], and 0 if that is not a number."""
    return min(max(part / whole, 0.0), 1.0) if whole > 0 and math.isfinite(part) else 0.0
