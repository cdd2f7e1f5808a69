"""Charts as SVG text: curves over steps, and accuracies with intervals.

A chart needs neither a plotting library nor a network. Colours come from `templates/charts.css`, which follows the
reader's light or dark scheme. A chart carries its numbers as tooltips (`<title>`) and as a sentence for screen readers.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from markupsafe import Markup

from cotgrpo.reports.formats import escape_text, format_number, format_percent

STAGES = {"base": "Before", "sft": "SFT", "grpo": "GRPO", "on_policy": "On-policy"}
"""Stages with a colour of their own, and their names in a chart."""
MOST_POINTS = 100
"""A longer curve is drawn as the means of this many segments, over a band from their lowest to their highest value."""
POINTS_WITH_DOTS = 30
LOG_FROM = 30.0
"""Positive values that span at least this factor go on a logarithmic axis, if the chart allows one."""
LARGEST = 1e30
"""Larger values are drawn here, so that a loss that blew up does not overflow the arithmetic of the axis."""

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 48, 40
NARROWEST_STAGE = 0.3
LETTER = 6.6
"""Approximate width of a letter of the charts' text, which places what follows it."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """One stage's values of one metric.

    Attributes:
        stage: "sft", "grpo", or any other; curves of one stage share its part of the axis.
        label: what the values are, if a chart has several kinds; else "".
        points: at least one `(step, value)`, steps ascending from 0 or more, values finite.
        second: whether it is drawn dashed, and in the colour of comparisons unless it has its own.
        colour: the colour of this stage in place of its own; empty: by the stage.
    """

    stage: str
    label: str
    points: Sequence[tuple[float, float]]
    second: bool = False
    colour: str = ""

    @property
    def style(self) -> str:
        return series_style(self.colour or ("other" if self.second else self.stage))


@dataclasses.dataclass(frozen=True)
class Segment:
    """Neighbouring points of a curve, drawn as one."""

    step: float
    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Scale:
    """The vertical axis; `place` maps `bottom` to 0 and `top` to 1."""

    bottom: float
    top: float
    ticks: Sequence[float]
    log: bool = False

    def place(self, value: float) -> float:
        warp = math.log if self.log else float
        return (warp(value) - warp(self.bottom)) / (warp(self.top) - warp(self.bottom))


def curve_chart(
    title: str, curves: Sequence[Curve], *, percent: bool = False, log: bool = False, last_values: bool = True
) -> Markup:
    """Draw the curves as an SVG. Each stage has its own part of the axis of steps, after the one before.

    Args:
        title: start of the description for screen readers.
        curves: at least one.
        percent: whether values are fractions, shown as percentages.
        log: whether a logarithmic axis may be used. It is used if the values span a factor of `LOG_FROM`.
        last_values: whether the legend has the last value of each kind of curve: there is room for a few.
    """
    show = format_percent if percent else format_number
    curves = [dataclasses.replace(c, points=[(s, min(max(v, -LARGEST), LARGEST)) for s, v in c.points]) for c in curves]
    scale = scale_of([value for curve in curves for _, value in curve.points], log, 1.0 if percent else math.inf)
    parts = [*legend(curves, show if last_values else None), *horizontal_rules(scale, show)]
    described = []
    for stage, (start, end) in stage_places(curves).items():
        own = [curve for curve in curves if curve.stage == stage]
        last_step = max(curve.points[-1][0] for curve in own) or 1.0
        x = lambda step, start=start, end=end, last=last_step: start + (end - start) * step / last
        y = lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * scale.place(value)
        parts += stage_axis(stage, start, end, last_step)
        for curve in own:
            parts += draw_curve(curve, x, y, show)
            (first, was), (last, is_now) = curve.points[0], curve.points[-1]
            named = " ".join(filter(None, (stage_label(stage), curve.label)))
            described.append(f"{named}: {show(was)} at step {first:g}, {show(is_now)} at step {last:g}")
    return svg(HEIGHT, f"{title}. {'; '.join(described)}.", parts)


def stage_places(curves: Sequence[Curve]) -> dict[str, tuple[float, float]]:
    """Return where on the axis each stage starts and ends.

    Widths are in proportion to steps, but a short stage is widened so that it can be read.
    """
    steps: dict[str, float] = {}
    for curve in curves:
        steps[curve.stage] = max(steps.get(curve.stage, 1.0), curve.points[-1][0])
    shares = [max(count / sum(steps.values()), NARROWEST_STAGE) for count in steps.values()]
    edges = [LEFT + (WIDTH - LEFT - RIGHT) * at / sum(shares) for at in itertools.accumulate(shares, initial=0.0)]
    return dict(zip(steps, itertools.pairwise(edges), strict=True))


def legend(curves: Sequence[Curve], show: Callable[[float], str] | None) -> list[str]:
    """Draw each kind of curve in a row at the top, with its last value if `show` writes it.

    A kind that goes through several stages shows their colours.
    """
    parts, left = [], 2.0
    for label in dict.fromkeys(curve.label for curve in curves):
        own = [curve for curve in curves if curve.label == label]
        for curve in own if label else ():
            line = f'<path class="{line_class(curve)}" style="{curve.style}" d="M{left:.1f} 12h14"/>'
            parts.append(line)
            left += 18
        last = "" if show is None else show(own[-1].points[-1][1])
        named = label or "last"
        parts.append(
            f'<text x="{left:.1f}" y="16">{escape_text(named)} <tspan class="strong">{escape_text(last)}</tspan></text>'
        )
        left += LETTER * (len(named) + len(last) + 1) + (22 if last else 4)
    return parts


def horizontal_rules(scale: Scale, show: Callable[[float], str]) -> list[str]:
    """Draw the ticks of the vertical axis with their lines."""
    parts = []
    for tick in scale.ticks:
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * scale.place(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{show(tick)}</text>')
    if scale.log:
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">log scale</text>')
    return parts


def stage_axis(stage: str, start: float, end: float, last_step: float) -> list[str]:
    """Draw a stage's name above its part of the axis, and its own steps below."""
    first_stage = start == LEFT
    parts = []
    if not first_stage:
        parts.append(f'<path class="rule" d="M{start:.1f} {TOP - 20}V{HEIGHT - BOTTOM}"/>')
    else:
        parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    name = f'<text class="name" x="{(start + end) / 2:.1f}" y="{TOP - 10}" text-anchor="middle">'
    parts.append(f'<g style="{series_style(stage)}">{name}{escape_text(stage_label(stage))}</text></g>')
    ticks = axis(0.0, last_step, count=max(1, int((end - start) / 56)))[2]
    ticks = [tick for tick in ticks if 0 < tick <= last_step and tick == round(tick)] or [last_step]
    # A later stage's 0 would stand on the end of the one before.
    for tick in [0.0, *ticks] if first_stage else ticks:
        x = start + (end - start) * tick / last_step
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{format_number(tick)}</text>')
    return parts


def draw_curve(
    curve: Curve, x: Callable[[float], float], y: Callable[[float], float], show: Callable[[float], str]
) -> list[str]:
    """Draw the line through a curve's segments, the band around them, and a dot or spot with a tooltip at each."""
    segments = downsample(curve.points)
    parts = [f'<g style="{curve.style}">']
    if len(segments) < len(curve.points):
        edge = [f"{x(s.step):.1f},{y(s.high):.1f}" for s in segments]
        edge += [f"{x(s.step):.1f},{y(s.low):.1f}" for s in reversed(segments)]
        parts.append(f'<polygon class="band" points="{" ".join(edge)}"/>')
    line = " ".join(f"{x(s.step):.1f},{y(s.mean):.1f}" for s in segments)
    parts.append(f'<polyline class="{line_class(curve)}" points="{line}"/>')
    kind, radius = ("dot", 2.5) if len(segments) <= POINTS_WITH_DOTS else ("spot", 5)
    named = f"{curve.label}, " if curve.label else ""
    for s in segments:
        tooltip = f"<title>{escape_text(named)}step {s.step:g}: {show(s.mean)}</title>"
        parts.append(
            f'<circle class="{kind}" cx="{x(s.step):.1f}" cy="{y(s.mean):.1f}" r="{radius}">{tooltip}</circle>'
        )
    return [*parts, "</g>"]


def downsample(points: Sequence[tuple[float, float]]) -> list[Segment]:
    """Return the points, or the means of `MOST_POINTS` segments of about equal length if there are more points.

    A segment stands at its last step.
    """
    pieces = min(len(points), MOST_POINTS)
    bounds = [len(points) * i // pieces for i in range(pieces + 1)]
    segments = []
    for start, end in itertools.pairwise(bounds):
        values = [value for _, value in points[start:end]]
        segments.append(Segment(points[end - 1][0], sum(values) / len(values), min(values), max(values)))
    return segments


def interval_chart(title: str, rows: Sequence[tuple[str, str, Mapping[str, Any] | None]]) -> Markup:
    """Draw fractions with their intervals as an SVG: a line of text, a bar, a dot and a whisker for each row.

    Args:
        title: start of the description for screen readers.
        rows: `(stage, label, {"value", "low", "high", "n"} or None)`; None is shown as not measured.
    """
    highest = max((row["high"] for _, _, row in rows if row), default=1.0)
    limit = min(1.0, axis(0.0, max(highest, 0.02), count=4)[1])
    left, right, each = 8, 20, 54
    letters = (WIDTH - left) / LETTER  # of a line at full size
    bottom = 8 + each * len(rows)
    x = lambda fraction: left + (WIDTH - left - right) * fraction / limit
    parts, described = [], []
    for tick in axis(0.0, limit, count=4)[2]:
        anchor = "middle" if tick else "start"
        parts.append(f'<path class="rule" d="M{x(tick):.1f} 6V{bottom}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="{anchor}">{format_percent(tick)}</text>')
    for i, (stage, label, row) in enumerate(rows):
        top = 8 + each * i
        figures = "not measured"
        if row is not None:
            figures = f"{row['value']:.1%} ({row['low']:.1%} to {row['high']:.1%}, n = {row['n']:,})"
        described.append(f"{label}: {figures}")
        name, length = escape_text(label), len(label) + len(figures)
        smaller = f' style="font-size: {12 * letters / length:.1f}px"' if length > letters else ""
        parts.append(
            f'<g style="{series_style(stage)}"><title>{name}: {figures}</title>'
            f'<text x="{left}" y="{top + 15}"{smaller}>'
        )
        parts.append(f'<tspan class="name">{name}</tspan><tspan class="figures" dx="8">{figures}</tspan></text>')
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
    """Return the chart as an SVG file of its own, with style, size, background and XML namespace."""
    margin = 14
    width, height = (int(side) + 2 * margin for side in re.findall(r'viewBox="0 0 (\d+) (\d+)"', chart)[0])
    box = f'viewBox="{-margin} {-margin} {width} {height}"'
    root = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {box} '
    ground = f'<rect x="{-margin}" y="{-margin}" width="{width}" height="{height}" rx="8" fill="var(--paper)"/>'
    chart = re.sub(r'<svg (.*?)viewBox="[^"]*" ', lambda found: root + found[1], chart, count=1)
    return chart.replace(">", f"><style>{read_style()}</style>{ground}", 1)


def read_style() -> str:
    """Return the charts' CSS."""
    return resources.files("cotgrpo.reports").joinpath("templates/charts.css").read_text(encoding="utf-8")


def svg(height: int, description: str, parts: Sequence[str]) -> Markup:
    """Return the SVG element around its parts."""
    described = f'role="img" aria-label="{escape_text(description)}"'
    return Markup(f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" {described}>{"".join(parts)}</svg>')


def series_style(stage: str) -> str:
    """Return the CSS that sets the colour of what belongs to a stage."""
    return f"--series: var(--{stage if stage in STAGES else 'other'})"


def stage_label(stage: str) -> str:
    """Return a stage's name as charts show it."""
    return STAGES.get(stage, stage)


def line_class(curve: Curve) -> str:
    """Return the CSS class of a curve's line."""
    return "line dashed" if curve.second else "line"


def scale_of(values: Sequence[float], log: bool = False, most: float = math.inf) -> Scale:
    """Return the axis for the values, which are at most `most`.

    It is logarithmic if `log` allows it, all values are positive, and they span a factor of `LOG_FROM`.
    """
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
    """Return `(bottom, top, ticks)` around `[low, high]`.

    Ticks are about `count` multiples of 1, 2, 2.5 or 5 times a power of ten.
    Values that spread over less than half a percent of their size make a level line, from half of it to one and a half.
    That axis ends at `most`, and at 0 if no value is negative.
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
