"""Charts as SVG text, for a report that needs neither a plotting library nor a network: curves over steps, and accuracies with intervals.

Colours come from `CHART_STYLE`, which follows the reader's light or dark scheme. A chart carries its numbers as tooltips (`<title>`) and as a
sentence for screen readers.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

CHART_STYLE = """
:root {
  color-scheme: light dark; --paper: #ffffff; --ink: #1a1d21; --quiet: #596069; --rule: #dde1e6;
  --base: #616975; --sft: #0b62a8; --grpo: #b0420a; --on_policy: #0f7263; --other: #6d3fb0;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e9ecef; --quiet: #a5adb7; --rule: #343a42;
    --base: #a8afb9; --sft: #6fb6f5; --grpo: #f5a05f; --on_policy: #57c9b4; --other: #c3a1f7;
  }
}
.chart { overflow: visible; }
.chart text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--quiet); font-variant-numeric: tabular-nums;
  paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
.chart .strong { fill: var(--ink); font-weight: 600; }
.chart .rule { stroke: var(--rule); stroke-width: 1; }
.chart .line { fill: none; stroke: var(--series); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .dashed { stroke-dasharray: 5 4; }
.chart .band { fill: var(--series); opacity: .2; }
.chart .track { fill: var(--rule); opacity: .55; }
.chart .bar { fill: var(--series); opacity: .4; }
.chart .whisker { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.chart .dot, .chart .name { fill: var(--series); }
.chart .name { font-weight: 600; }
.chart .spot { fill: transparent; }
.chart .spot:hover { fill: var(--series); }
"""

STAGES = {"base": "Before", "sft": "SFT", "grpo": "GRPO", "on_policy": "On-policy"}
"""Stages that have a colour of their own, as they are called in a chart."""
MOST_POINTS = 100
"""A longer curve is drawn as the means of this many stretches, over a band from their lowest to their highest value."""
POINTS_WITH_DOTS = 30
LOG_FROM = 30.0
"""Positive values whose highest is this many times the lowest go on a logarithmic axis, where the chart allows one."""
LARGEST = 1e30
"""Larger values are drawn here: what is beyond has blown up, and must not spoil the arithmetic of the axis."""

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 48, 40
NARROWEST_STAGE = 0.3
LETTER = 6.6
"""About the width of a letter of the charts' text, to place what follows it."""

UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One stage's values of one metric.

    Attributes:
        stage: "sft", "grpo", or any other; curves of one stage share its part of the axis.
        label: what the values are, where a chart has several kinds; else "".
        points: at least one `(step, value)`, steps ascending from 0 or more, values finite.
        second: drawn dashed and in the colour of comparisons, beside the stage's main curve.
    """

    stage: str
    label: str
    points: Sequence[tuple[float, float]]
    second: bool = False

    @property
    def style(self) -> str:
        return series_style("other" if self.second else self.stage)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Neighbouring points of a curve drawn as one."""

    step: float
    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Scale:
    """The vertical axis: `place` of a value is 0 at `bottom`, 1 at `top`."""

    bottom: float
    top: float
    ticks: Sequence[float]
    log: bool = False

    def place(self, value: float) -> float:
        warp = math.log if self.log else float
        return (warp(value) - warp(self.bottom)) / (warp(self.top) - warp(self.bottom))


def curve_chart(title: str, curves: Sequence[Curve], *, percent: bool = False, log: bool = False) -> str:
    """An SVG of the curves; each stage has its own part of the axis of steps, after the one before.

    Args:
        title: named in the description for screen readers.
        curves: at least one.
        percent: values are fractions, shown as percentages.
        log: a logarithmic axis may be used; it is where the values span a factor of `LOG_FROM`.
    """
    show = format_percent if percent else format_number
    curves = [dataclasses.replace(c, points=[(s, min(max(v, -LARGEST), LARGEST)) for s, v in c.points]) for c in curves]
    scale = scale_of([value for curve in curves for _, value in curve.points], log, 1.0 if percent else math.inf)
    parts = [*legend(curves, show), *horizontal_rules(scale, show)]
    described = []
    for stage, (start, end) in stage_places(curves).items():
        own = [curve for curve in curves if curve.stage == stage]
        last_step = max(curve.points[-1][0] for curve in own) or 1.0
        x = lambda step, start=start, end=end, last=last_step: start + (end - start) * step / last
        y = lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * scale.place(value)
        parts += stage_axis(stage, start, end, last_step)
        for curve in own:
            parts += drawn_curve(curve, x, y, show)
            (first, was), (last, is_now) = curve.points[0], curve.points[-1]
            named = " ".join(filter(None, (stage_label(stage), curve.label)))
            described.append(f"{named}: {show(was)} at step {first:g}, {show(is_now)} at step {last:g}")
    return svg(HEIGHT, f"{title}. {'; '.join(described)}.", parts)


def stage_places(curves: Sequence[Curve]) -> dict[str, tuple[float, float]]:
    """Where on the axis each stage starts and ends: widths in proportion to steps, but a short stage is widened so that it can be read."""
    steps: dict[str, float] = {}
    for curve in curves:
        steps[curve.stage] = max(steps.get(curve.stage, 1.0), curve.points[-1][0])
    shares = [max(count / sum(steps.values()), NARROWEST_STAGE) for count in steps.values()]
    edges = [LEFT + (WIDTH - LEFT - RIGHT) * at / sum(shares) for at in itertools.accumulate(shares, initial=0.0)]
    return dict(zip(steps, itertools.pairwise(edges), strict=True))


def legend(curves: Sequence[Curve], show: Callable[[float], str]) -> list[str]:
    """Each kind of curve with its last value, in a row at the top; a kind that goes through several stages shows their colours."""
    parts, left = [], 2.0
    for label in dict.fromkeys(curve.label for curve in curves):
        own = [curve for curve in curves if curve.label == label]
        for curve in own if label else ():
            line = f'<path class="{line_class(curve)}" style="{curve.style}" d="M{left:.1f} 12h14"/>'
            parts.append(line)
            left += 18
        last = show(own[-1].points[-1][1])
        named = label or "last"
        parts.append(f'<text x="{left:.1f}" y="16">{clean(named)} <tspan class="strong">{clean(last)}</tspan></text>')
        left += LETTER * (len(named) + len(last) + 1) + 22
    return parts


def horizontal_rules(scale: Scale, show: Callable[[float], str]) -> list[str]:
    """The ticks of the vertical axis with their lines."""
    parts = []
    for tick in scale.ticks:
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * scale.place(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{show(tick)}</text>')
    if scale.log:
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">log scale</text>')
    return parts


def stage_axis(stage: str, start: float, end: float, last_step: float) -> list[str]:
    """A stage's name above its part of the axis, and its own steps below."""
    first_stage = start == LEFT
    parts = []
    if not first_stage:
        parts.append(f'<path class="rule" d="M{start:.1f} {TOP - 20}V{HEIGHT - BOTTOM}"/>')
    else:
        parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    name = f'<text class="name" x="{(start + end) / 2:.1f}" y="{TOP - 10}" text-anchor="middle">'
    parts.append(f'<g style="{series_style(stage)}">{name}{clean(stage_label(stage))}</text></g>')
    ticks = axis(0.0, last_step, count=max(1, int((end - start) / 56)))[2]
    ticks = [tick for tick in ticks if 0 < tick <= last_step and tick == round(tick)] or [last_step]
    # A later stage's 0 would stand on the end of the one before.
    for tick in [0.0, *ticks] if first_stage else ticks:
        x = start + (end - start) * tick / last_step
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{format_number(tick)}</text>')
    return parts


def drawn_curve(
    curve: Curve, x: Callable[[float], float], y: Callable[[float], float], show: Callable[[float], str]
) -> list[str]:
    """The line through a curve's stretches, the band around them, and a dot or spot with a tooltip at each."""
    stretches = stretched(curve.points)
    parts = [f'<g style="{curve.style}">']
    if len(stretches) < len(curve.points):
        edge = [f"{x(s.step):.1f},{y(s.high):.1f}" for s in stretches]
        edge += [f"{x(s.step):.1f},{y(s.low):.1f}" for s in reversed(stretches)]
        parts.append(f'<polygon class="band" points="{" ".join(edge)}"/>')
    line = " ".join(f"{x(s.step):.1f},{y(s.mean):.1f}" for s in stretches)
    parts.append(f'<polyline class="{line_class(curve)}" points="{line}"/>')
    kind, radius = ("dot", 2.5) if len(stretches) <= POINTS_WITH_DOTS else ("spot", 5)
    named = f"{curve.label}, " if curve.label else ""
    for s in stretches:
        tooltip = f"<title>{clean(named)}step {s.step:g}: {show(s.mean)}</title>"
        parts.append(
            f'<circle class="{kind}" cx="{x(s.step):.1f}" cy="{y(s.mean):.1f}" r="{radius}">{tooltip}</circle>'
        )
    return [*parts, "</g>"]


def stretched(points: Sequence[tuple[float, float]]) -> list[Stretch]:
    """The points, or the means of `MOST_POINTS` stretches of about equal length where there are more, each at its last step."""
    pieces = min(len(points), MOST_POINTS)
    bounds = [len(points) * i // pieces for i in range(pieces + 1)]
    stretches = []
    for start, end in itertools.pairwise(bounds):
        values = [value for _, value in points[start:end]]
        stretches.append(Stretch(points[end - 1][0], sum(values) / len(values), min(values), max(values)))
    return stretches


def interval_chart(title: str, rows: Sequence[tuple[str, str, Mapping[str, Any] | None]]) -> str:
    """An SVG of fractions with their intervals: for each row a line of text, and a bar with a dot at the value and a whisker.

    Args:
        title: named in the description for screen readers.
        rows: `(stage, label, {"value", "low", "high", "n"} or None)`; None is shown as not measured.
    """
    highest = max((row["high"] for _, _, row in rows if row), default=1.0)
    limit = min(1.0, axis(0.0, max(highest, 0.02), count=4)[1])
    left, right, each = 8, 20, 54
    bottom = 8 + each * len(rows)
    x = lambda fraction: left + (WIDTH - left - right) * fraction / limit
    parts, described = [], []
    for tick in axis(0.0, limit, count=4)[2]:
        anchor = "middle" if tick else "start"
        parts.append(f'<path class="rule" d="M{x(tick):.1f} 6V{bottom}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="{anchor}">{format_percent(tick)}</text>')
    for i, (stage, label, row) in enumerate(rows):
        top = 8 + each * i
        said = "not measured"
        if row is not None:
            said = f"{row['value']:.1%} ({row['low']:.1%} to {row['high']:.1%}, n = {row['n']:,})"
        described.append(f"{label}: {said}")
        parts.append(f'<g style="{series_style(stage)}"><title>{clean(label)}: {said}</title>')
        parts.append(
            f'<text x="{left}" y="{top + 15}"><tspan class="name">{clean(label)}</tspan><tspan dx="8">{said}</tspan></text>'
        )
        box = f'x="{left}" y="{top + 23}" height="16" rx="3"'
        parts.append(f'<rect class="track" {box} width="{WIDTH - left - right}"/>')
        if row is not None:
            middle, low, high = top + 31, x(row["low"]), x(row["high"])
            whisker = f"M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10M{low:.1f} {middle}H{high:.1f}"
            parts.append(f'<rect class="bar" {box} width="{x(row["value"]) - left:.1f}"/>')
            parts.append(f'<path class="whisker" d="{whisker}"/>')
            parts.append(f'<circle class="dot" cx="{x(row["value"]):.1f}" cy="{middle}" r="5"/>')
        parts.append("</g>")
    return svg(bottom + 24, f"{title}. {'; '.join(described)}.", parts)


def standalone(chart: str) -> str:
    """The chart as a file of its own, for a README: with its style, its size, a ground with a margin, and an XML name space."""
    margin = 14
    width, height = (int(side) + 2 * margin for side in re.findall(r'viewBox="0 0 (\d+) (\d+)"', chart)[0])
    box = f'viewBox="{-margin} {-margin} {width} {height}"'
    root = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {box} '
    ground = f'<rect x="{-margin}" y="{-margin}" width="{width}" height="{height}" rx="8" fill="var(--paper)"/>'
    chart = re.sub(r'<svg (.*?)viewBox="[^"]*" ', lambda found: root + found[1], chart, count=1)
    return chart.replace(">", f"><style>{CHART_STYLE}</style>{ground}", 1)


def svg(height: int, description: str, parts: Sequence[str]) -> str:
    """The SVG element around its parts."""
    described = f'role="img" aria-label="{clean(description)}"'
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" {described}>{"".join(parts)}</svg>'


def series_style(stage: str) -> str:
    """Sets the colour of what belongs to a stage."""
    return f"--series: var(--{stage if stage in STAGES else 'other'})"


def stage_label(stage: str) -> str:
    """A stage as it is called in a chart."""
    return STAGES.get(stage, stage)


def line_class(curve: Curve) -> str:
    """The class of a curve's line."""
    return "line dashed" if curve.second else "line"


def scale_of(values: Sequence[float], log: bool = False, most: float = math.inf) -> Scale:
    """The axis for the values, which are at most `most`: logarithmic where that is allowed, all are positive, and they span a factor of `LOG_FROM`."""
    low, high = min(values), max(values)
    if not (log and low > 1 / LARGEST and high >= LOG_FROM * low):
        return Scale(*axis(low, high, most=most))
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    marks = [float(f"{digit}e{power}") for power in decades for digit in (1, 2, 5)]
    first, last = bisect.bisect_right(marks, low) - 1, bisect.bisect_left(marks, high)
    inside = marks[first : last + 1]
    if len(inside) > 7:
        whole = [float(f"1e{power}") for power in decades if inside[0] <= float(f"1e{power}") <= inside[-1]]
        return Scale(inside[0], inside[-1], whole[:: math.ceil(len(whole) / 6)], log=True)
    return Scale(inside[0], inside[-1], inside, log=True)


def axis(low: float, high: float, count: int = 5, most: float = math.inf) -> tuple[float, float, list[float]]:
    """`(bottom, top, ticks)` around `[low, high]`, ticks at multiples of 1, 2, 2.5 or 5 times a power of ten, about `count` of them.

    What spreads over less than half a percent of its size is drawn as a level line, between half of it and one and a half, but not beyond `most`, nor below 0 if it is not.
    """
    size = max(abs(low), abs(high))
    if high - low <= 5e-3 * size:
        pad = size / 2 if size > 1e-12 else 0.5
        low, high = max(low - pad, 0.0 if low >= 0 else -math.inf), min(high + pad, most)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    # An entropy of -1e-8, which rounding makes of 0, lies on the tick.
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def format_number(value: float) -> str:
    """At most four significant digits: `0.5`, `12k`, `3e-4`."""
    value = float(f"{value:.4g}")
    shown = f"{value:g}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if max(size, 1e4) <= abs(value) < 1e12:
            shown = f"{value / size:g}{letter}"
            break
    else:
        if value and not 1e-2 <= abs(value) < 1e12:
            mantissa, exponent = f"{value:.3e}".split("e")
            shown = f"{float(mantissa):g}e{int(exponent)}"
    return shown.replace("-", "\N{MINUS SIGN}")


def format_percent(fraction: float) -> str:
    """At most three significant digits: `2.5%`."""
    return format_number(float(f"{100 * fraction:.3g}")) + "%"


def clean(text: Any) -> str:
    """Text for HTML and XML: escaped; what a browser does not show, or obeys (control characters, half surrogates, overrides of direction), as a mark."""
    mark = lambda found: chr(0x2400 + ord(found[0])) if ord(found[0]) < 0x20 else "\N{REPLACEMENT CHARACTER}"
    return escape(UNSHOWN.sub(mark, str(text).replace("\r\n", "\n")), quote=True)
