"""Charts as SVG text, for a report that needs neither a plotting library nor a network: curves over steps, and accuracies with intervals.

Colours come from `CHART_STYLE`, which follows the reader's light or dark scheme. A chart carries its numbers as tooltips (`<title>`) and as a
sentence for screen readers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

CHART_STYLE = """
.chart { --ink: #1c1f23; --quiet: #5b626b; --rule: #dfe2e6; --base: #6b7280; --sft: #0b62a8; --grpo: #b8460b; --other: #6d3fb0; }
@media (prefers-color-scheme: dark) {
  .chart { --ink: #eceef0; --quiet: #a7aeb7; --rule: #363b42; --base: #a3a9b2; --sft: #6fb6f5; --grpo: #f5a05f; --other: #c3a1f7; }
}
.chart text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--quiet); font-variant-numeric: tabular-nums; }
.chart .strong { fill: var(--ink); font-weight: 600; }
.chart .rule { stroke: var(--rule); stroke-width: 1; }
.chart .line { fill: none; stroke: var(--series); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .band { fill: var(--series); opacity: .18; }
.chart .track { fill: var(--rule); opacity: .55; }
.chart .bar { fill: var(--series); opacity: .38; }
.chart .whisker { stroke: var(--ink); stroke-width: 1.5; }
.chart .dot, .chart .name { fill: var(--series); }
.chart .name { font-weight: 600; }
.chart .spot { fill: transparent; }
.chart .spot:hover { fill: var(--series); }
"""

KNOWN_SERIES = ("base", "sft", "grpo")
MOST_POINTS = 120
"""A longer curve is drawn as the means of this many stretches, over a band from their lowest to their highest value."""

WIDTH, HEIGHT = 400, 232
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 42
SPOTS_WITH_DOTS = 30


@dataclasses.dataclass(frozen=True)
class Curve:
    """One stage's values of one metric.

    Attributes:
        name: "sft", "grpo", or any other; it chooses the colour.
        label: shown above the curve.
        points: `(step, value)`, steps ascending, values finite.
    """

    name: str
    label: str
    points: Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Neighbouring points of a curve drawn as one."""

    step: float
    mean: float
    low: float
    high: float


def curve_chart(title: str, curves: Sequence[Curve], *, percent: bool = False) -> str:
    """An SVG of the curves, one stage after the other along the axis of steps.

    Args:
        title: named in the description for screen readers.
        curves: at least one, none empty.
        percent: values are fractions, shown as percentages.
    """
    show = format_percent if percent else format_number
    values = [value for curve in curves for _, value in curve.points]
    bottom, top, ticks = axis(min(values), max(values))
    spans = [max(curve.points[-1][0], 1) for curve in curves]
    starts = [sum(spans[:i]) for i in range(len(spans))]
    total = sum(spans)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / total

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - bottom) / (top - bottom)

    parts = []
    for tick in ticks:
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{show(tick)}</text>')
    for tick in axis(0, total, count=5)[2]:
        if 0 <= tick <= total:
            parts.append(
                f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{format_number(tick)}</text>'
            )
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">steps</text>')
    for curve, start, span in zip(curves, starts, spans, strict=True):
        if start:
            parts.append(
                f'<line class="rule" x1="{x(start):.1f}" x2="{x(start):.1f}" y1="{TOP - 16}" y2="{HEIGHT - BOTTOM}"/>'
            )
        parts.append(f'<g style="{series_colour(curve.name)}">')
        parts.append(
            f'<text class="name" x="{x(start + span / 2):.1f}" y="{TOP - 10}" text-anchor="middle">{clean(curve.label)}</text>'
        )
        parts.extend(drawn_curve(curve, lambda step, start=start: x(start + step), y, show))
        parts.append("</g>")
    described = "; ".join(
        f"{c.label}: {show(c.points[0][1])} at step {c.points[0][0]:g}, {show(c.points[-1][1])} at step {c.points[-1][0]:g}"
        for c in curves
    )
    return svg(WIDTH, HEIGHT, f"{title}. {described}.", parts)


def drawn_curve(curve: Curve, x: Any, y: Any, show: Any) -> list[str]:
    stretches = stretched(curve.points)
    parts = []
    if len(stretches) < len(curve.points):
        edge = [f"{x(s.step):.1f},{y(s.high):.1f}" for s in stretches]
        edge += [f"{x(s.step):.1f},{y(s.low):.1f}" for s in reversed(stretches)]
        parts.append(f'<polygon class="band" points="{" ".join(edge)}"/>')
    line = " ".join(f"{x(s.step):.1f},{y(s.mean):.1f}" for s in stretches)
    parts.append(f'<polyline class="line" points="{line}"/>')
    visible = len(stretches) <= SPOTS_WITH_DOTS
    for s in stretches:
        spot = "dot" if visible else "spot"
        tooltip = f"<title>{clean(curve.label)}, step {s.step:g}: {show(s.mean)}</title>"
        parts.append(
            f'<circle class="{spot}" cx="{x(s.step):.1f}" cy="{y(s.mean):.1f}" r="{2.5 if visible else 5}">{tooltip}</circle>'
        )
    return parts


def stretched(points: Sequence[tuple[float, float]]) -> list[Stretch]:
    """The points, or the means of `MOST_POINTS` stretches of about equal length where there are more."""
    pieces = min(len(points), MOST_POINTS)
    bounds = [len(points) * i // pieces for i in range(pieces + 1)]
    stretches = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        values = [value for _, value in points[start:end]]
        stretches.append(Stretch(points[end - 1][0], sum(values) / len(values), min(values), max(values)))
    return stretches


def interval_chart(title: str, rows: Sequence[tuple[str, str, Mapping[str, Any] | None]]) -> str:
    """An SVG of fractions with their intervals: for each row a line of text, and a bar with a dot at the value and a whisker.

    Args:
        title: named in the description for screen readers.
        rows: `(name, label, {"value", "low", "high", "n"} or None)`; None is shown as not measured.
    """
    highest = max((row["high"] for _, _, row in rows if row), default=1.0)
    limit = min(1.0, axis(0.0, max(highest, 0.02))[1])
    left, right, each = 12, 16, 54
    bottom = 8 + each * len(rows)
    x = lambda fraction: left + (WIDTH - left - right) * fraction / limit
    parts, described = [], []
    for tick in axis(0.0, limit, count=4)[2]:
        parts.append(f'<line class="rule" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="6" y2="{bottom}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{format_percent(tick)}</text>')
    for i, (name, label, row) in enumerate(rows):
        top = 8 + each * i
        said = "not measured"
        if row is not None:
            said = f"{row['value']:.1%} ({row['low']:.1%} to {row['high']:.1%}, n = {row['n']:,})"
        described.append(f"{label}: {said}")
        parts.append(f'<g style="{series_colour(name)}"><title>{clean(label)}: {said}</title>')
        parts.append(
            f'<text x="{left}" y="{top + 15}"><tspan class="name">{clean(label)}</tspan><tspan dx="8">{said}</tspan></text>'
        )
        parts.append(
            f'<rect class="track" x="{left}" y="{top + 23}" width="{WIDTH - left - right}" height="16" rx="3"/>'
        )
        if row is not None:
            middle = top + 31
            parts.append(
                f'<rect class="bar" x="{left}" y="{top + 23}" width="{x(row["value"]) - left:.1f}" height="16" rx="3"/>'
            )
            low, high = x(row["low"]), x(row["high"])
            whisker = f"M{low:.1f} {middle - 5}V{middle + 5}M{high:.1f} {middle - 5}V{middle + 5}M{low:.1f} {middle}H{high:.1f}"
            parts.append(f'<path class="whisker" fill="none" d="{whisker}"/>')
            parts.append(f'<circle class="dot" cx="{x(row["value"]):.1f}" cy="{middle}" r="5"/>')
        parts.append("</g>")
    return svg(WIDTH, bottom + 24, f"{title}. {'; '.join(described)}.", parts)


def standalone(chart: str) -> str:
    """The chart as a file of its own (for a README): with its style, and an XML name space."""
    return chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{CHART_STYLE}</style>", 1
    )


def svg(width: int, height: int, description: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{clean(description)}">'
        + "".join(parts)
        + "</svg>"
    )


def series_colour(name: str) -> str:
    return f"--series: var(--{name if name in KNOWN_SERIES else 'other'})"


def axis(low: float, high: float, count: int = 5) -> tuple[float, float, list[float]]:
    """`(bottom, top, ticks)` around `[low, high]`, ticks at multiples of 1, 2, 2.5 or 5 times a power of ten, about `count` of them."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def format_number(value: float) -> str:
    """At most four significant digits: `0.5`, `12k`, `3e-4`."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 1e4:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.3g}{letter}"
    if abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def format_percent(fraction: float) -> str:
    return f"{100 * fraction:.3g}%"


def clean(text: Any) -> str:
    """Text for HTML: escaped, and what a browser cannot show (control characters, half surrogates) as a visible mark."""
    shown = "".join(
        c if c.isprintable() or c in "\n\t\N{NO-BREAK SPACE}" else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    )
    return escape(shown, quote=True)
