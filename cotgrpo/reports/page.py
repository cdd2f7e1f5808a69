"""The page of a run's report: one HTML text, which needs no network and no script.

GRPO here is GhostRespond Policy Optimization, not Group Relative; the page tells its reader so.

What comes from the run (samples, config, file names) is text and stays text: it goes through `charts.clean`, and the page's own policy forbids
it everything but its style.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cotgrpo.reports.charts import (
    CHART_STYLE,
    STAGES,
    Curve,
    clean,
    curve_chart,
    format_number,
    interval_chart,
    series_style,
)
from cotgrpo.reports.completions_page import COMPLETIONS_STYLE, completions, mark

MOMENTS = {"base": "Before training", "sft": "After SFT", "grpo": "After GRPO", "on_policy": "After on-policy GRPO"}
TRAINED = ("sft", "grpo", "on_policy")

CURVES: tuple[tuple[str, str, str, str, dict[str, bool]], ...] = (
    ("Loss", "nats per supervised token", "train/loss", "eval/loss", {"log": True}),
    ("Reward", "log p(ghost) \N{MINUS SIGN} log p(drawn), nats", "train/reward", "", {}),
    ("Ghost and drawn tokens", "their mean probability", "train/ghost_prob", "train/drawn_prob", {"percent": True}),
    ("Match rate", "drawn token is the ghost token", "train/match_rate", "", {"percent": True}),
    ("Token accuracy", "the likeliest token is the right one", "train/token_accuracy", "", {"percent": True}),
    ("Reply accuracy", "sampled in training, else greedy", "train/accuracy", "eval/accuracy", {"percent": True}),
    ("Entropy", "of the next token, nats", "train/entropy", "", {"log": True}),
    ("KL", "to the frozen reference, nats", "train/kl", "", {"log": True}),
    ("Gradient norm", "before clipping", "train/grad_norm", "", {"log": True}),
    ("Learning rate", "by the schedule", "train/learning_rate", "", {}),
    ("Throughput", "real tokens per second", "train/tokens_per_sec", "", {}),
)
"""Title, what is measured, metric, metric to compare it with, options of `curve_chart`."""
LEGENDS = {
    "train/loss": "training",
    "eval/loss": "held out",
    "train/accuracy": "sampled",
    "eval/accuracy": "greedy",
    "train/ghost_prob": "ghost",
    "train/drawn_prob": "drawn",
}

FOLDED_LINES, FOLDED_CHARACTERS = 14, 700
LONGEST_TEXT = 20_000
"""Of a longer reply the page shows this many characters, and says so."""

GRPO_MEANS = (
    "In cotgrpo <strong>GRPO</strong> always means <strong>GhostRespond Policy Optimization</strong>, not Group Relative Policy Optimization: "
    "token by token, it compares what the student would write with an ideal <em>ghost</em> reply."
)
SKIPPED = (
    "Their loss or gradient was not finite, so the student did not learn from them. "
    "Lower the learning rate or clip harder, and check the data."
)

STYLE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 1240px; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 0 0 .3rem; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 0 0 .6rem; max-width: 76ch; overflow-wrap: anywhere; }
section { margin-top: 3rem; padding-top: 1.6rem; border-top: 1px solid var(--rule); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin-top: 1.2rem; font-size: .95rem; }
a { color: var(--sft); text-underline-offset: .2em; }
.quiet { color: var(--quiet); font-size: .92rem; }
.note, .alert { margin: 1.1rem 0 0; padding: .75rem 1rem; border-radius: 6px; border: 1px solid var(--rule); border-left: 4px solid var(--sft); max-width: 82ch; }
.alert { border-color: var(--grpo); border-left-width: 4px; }
.note p:last-child, .alert p:last-child { margin: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 1fr)); gap: 1rem; margin-top: 1.2rem; }
.card { border: 1px solid var(--rule); border-radius: 8px; padding: 1rem 1.1rem; margin: 0; min-width: 0; break-inside: avoid; }
.card svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
.result { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 1rem 2.5rem; align-items: center; margin-top: 1.2rem; }
.result svg { width: 100%; max-width: 540px; height: auto; }
.moments { display: grid; gap: 1.1rem; margin: 0; }
.moments dt { color: var(--series); font-weight: 600; }
.moments dd { margin: 0; font-variant-numeric: tabular-nums; }
.moments .value { font-size: 2.7rem; font-weight: 650; line-height: 1.1; letter-spacing: -.03em; }
.sample { margin-top: 1rem; }
.replies { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: 1rem; margin-top: .9rem; }
.replies > div { border-top: 3px solid var(--series); padding-top: .5rem; min-width: 0; }
.replies h4 { display: flex; justify-content: space-between; gap: .6rem; margin: 0 0 .5rem; font-size: .92rem; }
.mark { align-self: flex-start; border: 1px solid; border-radius: 99px; padding: 0 .6rem; font-weight: 600; white-space: nowrap; }
.right { color: var(--right); }
.wrong { color: var(--wrong); border-style: dashed; }
.words { display: block; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.replies .words, pre { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-variant-ligatures: none; tab-size: 4; }
.gold .words { display: inline; }
.fold summary { cursor: pointer; list-style: none; }
.fold summary::-webkit-details-marker { display: none; }
.fold .more, .fold .less { color: var(--sft); text-decoration: underline; text-underline-offset: .2em; font-size: .85rem; }
.fold[open] .more, .fold[open] .preview, .fold:not([open]) .less { display: none; }
.reasons { margin: .7rem 0 0; padding: 0; list-style: none; }
.reasons li { margin-top: .5rem; }
.reasons code { display: block; color: var(--quiet); font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.meter { height: 6px; margin: .35rem 0; border-radius: 3px; background: var(--rule); overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--sft); border-radius: 3px; }
.times { display: grid; grid-template-columns: fit-content(40%) minmax(40px, 420px) max-content; overflow-wrap: anywhere; gap: .45rem 1.1rem; align-items: center; margin-top: 1.1rem;
  font-variant-numeric: tabular-nums; }
.times .number { text-align: right; }
pre { margin: 1rem 0; padding: 1rem 1.1rem; border: 1px solid var(--rule); border-radius: 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
.versions { display: grid; grid-template-columns: fit-content(45%) 1fr; overflow-wrap: anywhere; gap: .25rem 1.4rem; margin: 1.1rem 0 0; }
.versions dt { color: var(--quiet); }
.versions dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
:root { --right: #17693a; --wrong: #a8261d; }
@media screen and (prefers-color-scheme: dark) { :root { --right: #6fd39a; --wrong: #ff9a90; } }
@media (max-width: 760px) { .result { grid-template-columns: minmax(0, 1fr); } body { padding-top: 1.5rem; } }
@media print { html { font-size: 11px; print-color-adjust: exact; } body { font-size: 1rem; padding: 0; max-width: none; } nav, .more { display: none; }
  section { margin-top: 1.5rem; } h2, h2 + p { break-after: avoid; } .result { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); } }
"""


def render(
    report: Mapping[str, Any],
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
    replies: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page.

    Args:
        report: the content of `report.json`.
        stages: stage -> rows of its log.
        replies: rows of `completions.jsonl`; none, and the page has no such section.
    """
    sections = {
        "Accuracy": accuracy(report),
        "Curves": curves(stages),
        "Answers": samples(report["samples"]),
        **({"Completions": completions(replies)} if replies else {}),
        "Data": data(report["data"]),
        "Time": times(report["wall_seconds"]),
        "Config": f"<h2>Config</h2><pre>{clean(report['config'])}</pre>",
        "Versions": f'<h2>Versions</h2><dl class="versions">{pairs(report["versions"])}</dl>',
        "Reproduce": reproduce(report["command"]),
    }
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections)
    body = "".join(f'<section id="{name.lower()}">{content}</section>\n' for name, content in sections.items())
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{clean(report['title'])}</title><style>{CHART_STYLE}{STYLE}{COMPLETIONS_STYLE}</style></head>\n<body>"
        f"<header><h1>{clean(report['title'])}</h1>{introduction(report, stages)}<nav>{links}</nav></header>\n"
        f"<main>{body}</main></body></html>\n"
    )


def introduction(report: Mapping[str, Any], stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What was run and what GRPO means, then the run's notes and its skipped updates."""
    ran = [stage for stage in TRAINED if stage in stages or stage in report["wall_seconds"]]
    told = {
        (): "A student model was measured.",
        ("sft",): "A student model learned from a teacher's step-by-step answers, by supervised fine-tuning (SFT).",
        ("grpo",): "A fine-tuned student model was trained on with GRPO.",
        (
            "sft",
            "grpo",
        ): "A student model learned from a teacher's step-by-step answers, first by supervised fine-tuning (SFT), then with GRPO.",
        TRAINED: "A student model learned from a teacher's step-by-step answers, first by supervised fine-tuning (SFT), then with GRPO, once on the teacher's "
        "text (teacher-forced) and once on its own replies (on-policy).",
    }[tuple(ran)]
    parts = [f"<p>{told} {GRPO_MEANS}</p>"]
    for stage, rows in stages.items():
        skipped = round(sum(value for _, value in points(rows, "train/skipped")))
        if skipped:
            updates = f"{skipped:,} {'update' if skipped == 1 else 'updates'}"
            parts.append(
                f'<div class="alert" role="alert"><p><strong>{updates} skipped in {clean(STAGES.get(stage, stage))}.</strong> {SKIPPED}</p></div>'
            )
    if report.get("notes"):
        parts.append(f'<div class="note">{"".join(f"<p>{clean(note)}</p>" for note in report["notes"])}</div>')
    return "".join(parts)


def in_order(names: Mapping[str, Any]) -> list[str]:
    """Moments of a run in time: those of `MOMENTS`, then any others."""
    return [name for name in MOMENTS if name in names] + [name for name in names if name not in MOMENTS]


def accuracy(report: Mapping[str, Any]) -> str:
    """Accuracy before and after each stage, in figures and as a chart."""
    measured, losses = report["accuracy"], report["held_out_loss"]
    heading = "<h2>Accuracy on held-out questions</h2>"
    if not measured:
        return f'{heading}<p class="quiet">Not measured in this run.</p>'
    items = []
    for name in in_order(measured):
        row = measured[name]
        interval = f"{row['low']:.1%} to {row['high']:.1%}, n = {row['n']:,}"
        loss = f"<br>held-out loss {number(losses[name])} nats per token" if name in losses else ""
        items.append(
            f'<div style="{series_style(name)}"><dt>{clean(MOMENTS.get(name, name))}</dt><dd class="value">{row["value"]:.1%}</dd>'
            f'<dd class="quiet">{interval}{loss}</dd></div>'
        )
    rows = report["held_out_rows"]
    counted = (
        f"The loss is that of the {rows['loss']:,} of {rows['accuracy']:,} with a correct reference reply."
        if rows["loss"]
        else "There is no loss: no question has a correct reference reply."
    )
    chart = interval_chart("Accuracy", [(name, MOMENTS.get(name, name), measured[name]) for name in in_order(measured)])
    return (
        f'{heading}<p class="quiet">The share of questions whose final answer is right, with its 95 % interval (Wilson). {counted}</p>'
        f'<div class="result"><dl class="moments">{"".join(items)}</dl>{chart}</div>'
    )


def curves(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A chart for each metric that the logs hold."""
    cards = []
    for title, unit, key, other, options in CURVES:
        drawn = []
        for metric, second in ((key, False), (other, True)):
            for stage, rows in stages.items():
                found = points(rows, metric)
                if found:
                    drawn.append(Curve(stage, LEGENDS.get(metric, ""), found, second))
        if drawn:
            cards.append(
                f'<div class="card"><h3>{title}</h3><div class="quiet">{unit}</div>{curve_chart(title, drawn, **options)}</div>'
            )
    if not cards:
        return '<h2>Curves</h2><p class="quiet">The log of the run has no rows.</p>'
    explained = "Each stage counts its own steps. Where a curve is long, the line is the mean of neighbouring rows of the log, over a band from the lowest to the highest. The figure above each curve is its last value."
    if "grpo" in stages:
        explained += " In GRPO the training loss is the objective's value; the held-out loss is \N{MINUS SIGN}log p of the held-out text throughout."
    return f'<h2>Curves</h2><p class="quiet">{explained}</p><div class="cards">{"".join(cards)}</div>'


def points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """`(step, value)` of the rows that hold a finite number under the key."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [(float(step), float(v)) for step, v in found if isinstance(v, (int, float)) and math.isfinite(v)]


def samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """Questions with the student's replies side by side."""
    heading = "<h2>Answers before and after</h2>"
    if not rows:
        return f'{heading}<p class="quiet">The run kept no samples.</p>'
    cards = []
    for row in rows:
        replies = []
        for name in in_order(row["replies"]):
            reply = row["replies"][name]
            replies.append(
                f'<div style="{series_style(name)}"><h4><span>{clean(MOMENTS.get(name, name))}</span>{mark(reply["correct"])}</h4>{folded(reply["text"])}</div>'
            )
        cards.append(
            f'<article class="card sample"><h3>{folded(row["question"])}</h3><div class="quiet gold">Right answer: {folded(row["gold"])}</div>'
            f'<div class="replies">{"".join(replies)}</div></article>'
        )
    explained = "Held-out questions; those answered right after one stage and wrong after another come first, so this is no random choice."
    return f'{heading}<p class="quiet">{explained}</p>{"".join(cards)}'


def folded(text: str) -> str:
    """A text with its white space; of a long one the beginning, which opens to the whole."""
    if not text:
        return '<span class="quiet">(empty)</span>'
    shown = text[:LONGEST_TEXT]
    if len(shown) < len(text):
        shown += f"\n[{len(text) - len(shown):,} more characters are in report.json]"
    preview = "\n".join(shown.split("\n")[:FOLDED_LINES])[:FOLDED_CHARACTERS]
    if len(preview) == len(shown):
        return f'<span class="words" dir="auto">{clean(shown)}</span>'
    return (
        f'<details class="fold"><summary><span class="words preview" dir="auto">{clean(preview)}\N{HORIZONTAL ELLIPSIS}</span>'
        f'<span class="more">Show all {len(text):,} characters</span><span class="less">Show less</span></summary>'
        f'<span class="words" dir="auto">{clean(shown)}</span></details>'
    )


def data(reports: Mapping[str, Any]) -> str:
    """What was read, kept and left out, with reasons."""
    heading = "<h2>Data</h2>"
    if not reports:
        return f'{heading}<p class="quiet">No data was read.</p>'
    cards = []
    for name, report in reports.items():
        reasons = [
            f"<li>{count:,} left out: {clean(reason)}<code>{clean(chr(10).join(report['examples'].get(reason, [])))}</code></li>"
            for reason, count in sorted(report["dropped"].items(), key=lambda item: -item[1])
        ]
        kept = f"{report['kept']:,} of {report['read']:,} kept"
        listed = "".join(reasons) or '<li class="quiet">Nothing was left out.</li>'
        cards.append(
            f'<div class="card"><h3>{clean(name)}</h3><div class="quiet">{kept}</div>'
            f'{meter(report["kept"], report["read"])}<ul class="reasons">{listed}</ul></div>'
        )
    return f'{heading}<p class="quiet">Rows read and kept, and why others were left out, with the first few places.</p><div class="cards">{"".join(cards)}</div>'


def times(seconds: Mapping[str, Any]) -> str:
    """Wall time of each part of the run."""
    longest = max((s for name, s in seconds.items() if name != "total" and math.isfinite(s)), default=0.0)
    rows = []
    for name, s in seconds.items():
        label = f"<strong>{clean(name)}</strong>" if name == "total" else clean(STAGES.get(name, name))
        strip = "<span></span>" if name == "total" else meter(s, longest)
        rows.append(f'<span>{label}</span>{strip}<span class="number">{duration(s)}</span>')
    return f'<h2>Wall time</h2><div class="times">{"".join(rows)}</div>'


def meter(part: int | float, whole: int | float) -> str:
    """A bar that is filled as far as the part goes."""
    share = min(max(part / whole, 0.0), 1.0) if whole > 0 and math.isfinite(part) else 0.0
    return f'<div class="meter"><i style="width:{share:.1%}"></i></div>'


def duration(seconds: int | float) -> str:
    """`1 h 02 min`, `3 min 20 s` or `4.2 s`."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: int | float) -> str:
    """A number, or what to say where there is none."""
    return format_number(float(value)) if math.isfinite(value) else "not finite"


def pairs(values: Mapping[str, str]) -> str:
    """Terms and their descriptions."""
    return "".join(f"<dt>{clean(name)}</dt><dd>{clean(value)}</dd>" for name, value in values.items())


def reproduce(command: str) -> str:
    """How to run it again."""
    return (
        f"<h2>How to reproduce</h2><pre>{clean(command)}</pre>"
        "<p>With the versions and the device above it gives the same numbers, but for times; on others, they may differ a little. "
        "Choose a new <code>run_dir</code>: in a finished run's folder the command only shows the old result.</p>"
    )
