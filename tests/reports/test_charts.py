"""Charts: geometry on cases worked out by hand, colours that can be read, files that are XML."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from cotgrpo.reports import charts
from cotgrpo.reports.charts import Curve, axis, curve_chart, downsample, interval_chart
from cotgrpo.reports.formats import escape_text, format_duration, format_number, format_percent

SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(charts.standalone(chart))


def points_of(chart: str) -> list[list[tuple[float, float]]]:
    """The corners of each polyline."""
    lines = [line.attrib["points"].split() for line in drawn(chart).iter(f"{SVG}polyline")]
    return [[tuple(map(float, corner.split(","))) for corner in line] for line in lines]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("low", "high", "count", "bottom", "top", "ticks"),
    [
        (0.0, 10.0, 5, 0, 10, [0, 2, 4, 6, 8, 10]),
        (0.3, 9.1, 5, 0, 10, [0, 2, 4, 6, 8, 10]),
        (0.0, 1000.0, 4, 0, 1000, [0, 250, 500, 750, 1000]),
        (-0.13, 0.24, 5, -0.2, 0.3, [-0.2, -0.1, 0, 0.1, 0.2, 0.3]),
        (0.0, 3e-4, 3, 0, 3e-4, [0, 1e-4, 2e-4, 3e-4]),
        (4.0, 4.0, 5, 2, 6, [2, 3, 4, 5, 6]),  # level: half to one and a half
        (-1e-8, 4.1, 5, 0, 5, [0, 1, 2, 3, 4, 5]),  # rounding below 0
        (0.0, 0.0, 5, 0, 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (-4.0, -3.99, 5, -6, -1, [-6, -5, -4, -3, -2, -1]),
    ],
)
def test_axis(low: float, high: float, count: int, bottom: float, top: float, ticks: list[float]) -> None:
    found = axis(low, high, count)
    assert found[:2] == pytest.approx((bottom, top), abs=1e-12) and found[2] == pytest.approx(ticks, abs=1e-12)


def test_axis_labels_all_differ() -> None:
    for low, high in itertools.product(
        (-7e5, -1.003, -0.2, 0.0, 3e-7, 0.998, 9.96, 9999.0), (1e-9, 0.004, 0.02, 1.0, 77.0)
    ):
        bottom, top, ticks = axis(low, low + high)
        labels = [format_number(tick) for tick in ticks]
        assert len(set(labels)) == len(labels) and bottom <= low and low + high <= top, labels


def test_a_level_share_lies_between_none_and_all() -> None:
    assert [axis(share, share, most=1.0)[:2] for share in (0.0, 1.0)] == [(0.0, 0.5), (0.5, 1.0)]


def test_log_axis() -> None:
    scale = charts.scale_of([0.03, 4.0], log=True)
    assert scale.log
    assert (scale.bottom, scale.top) == (0.02, 5) and list(scale.ticks) == [0.1, 1]
    assert scale.place(0.02) == 0 and scale.place(5.0) == 1
    assert scale.place(0.1**0.5) == pytest.approx(0.5)  # the geometric mean of 0.02 and 5
    assert list(charts.scale_of([0.1, 4.0], log=True).ticks) == [0.1, 0.2, 0.5, 1, 2, 5]
    assert not charts.scale_of([0.03, 4.0]).log
    assert not charts.scale_of([0.0, 4.0], log=True).log
    assert not charts.scale_of([1.0, 29.0], log=True).log


def test_segment_means() -> None:
    points = [(float(step), float(step)) for step in range(1, 1001)]
    segments = downsample(points)
    assert len(segments) == charts.MOST_POINTS == 100
    assert segments[0] == charts.Segment(10, 5.5, 1, 10)  # 1 .. 10
    assert segments[-1] == charts.Segment(1000, 995.5, 991, 1000)
    few = [(1.0, 5.0), (7.0, -1.0)]
    assert downsample(few) == [charts.Segment(1, 5, 5, 5), charts.Segment(7, -1, -1, -1)]
    uneven = downsample(points[:101])
    assert len(uneven) == 100 and uneven[-1] == charts.Segment(101, 100.5, 100, 101)


def test_curves_are_where_their_values_are() -> None:
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    (line,) = points_of(curve_chart("Loss", [Curve("sft", "", [(0.0, 10.0), (50.0, 0.0), (100.0, 5.0)])]))
    assert [x for x, _ in line] == pytest.approx([left, (left + right) / 2, right], abs=0.051)
    assert [y for _, y in line] == pytest.approx([top, bottom, (top + bottom) / 2], abs=0.051)


def test_stages_stand_one_after_the_other() -> None:
    left, width = charts.LEFT, charts.WIDTH - charts.LEFT - charts.RIGHT
    sft = Curve("sft", "training", [(1.0, 0.0), (600.0, 1.0)])
    held_out = Curve("sft", "held out", [(300.0, 0.5)], second=True)
    grpo = Curve("grpo", "training", [(400.0, 1.0)])
    lines = points_of(curve_chart("Loss", [sft, grpo, held_out]))
    assert [line[-1][0] for line in lines] == pytest.approx(
        [left + 0.6 * width, left + 0.3 * width, left + width], abs=0.051
    )
    places = charts.stage_places([sft, Curve("grpo", "", [(1.0, 0.0)])])  # one step against 600: a readable share
    assert places["grpo"] == pytest.approx((left + width / (600 / 601 + 0.3) * 600 / 601, left + width))


def test_intervals_are_where_their_figures_are() -> None:
    row = {"value": 0.5, "low": 0.4, "high": 0.75, "n": 1200}
    root = drawn(interval_chart("Accuracy", [("sft", "After SFT", row), ("grpo", "After GRPO", None)]))
    rects = [(r.get("class"), float(r.attrib["width"])) for r in root.iter(f"{SVG}rect") if r.get("class")]
    (_, track), (_, bar) = rects[:2]
    assert bar == pytest.approx(track * 0.5 / 0.8, abs=0.051)  # the axis ends at 80 %
    whisker = next(p.attrib["d"] for p in root.iter(f"{SVG}path") if p.get("class") == "whisker")
    low, high = (float(x) for x in re.findall(r"M([\d.]+) \d+v", whisker))
    assert (high - low) / track == pytest.approx(0.35 / 0.8, abs=1e-3)
    assert root.attrib["aria-label"] == (
        "Accuracy. After SFT: 50.0% (40.0% to 75.0%, n = 1,200); After GRPO: not measured."
    )


def test_a_long_line_of_text_is_smaller() -> None:
    short, long = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 20}, {"value": 1.0, "low": 0.992, "high": 1.0, "n": 500}
    root = drawn(interval_chart("", [("sft", "After SFT", short), ("on_policy", "After on-policy GRPO", long)]))
    assert [text.get("style") for text in root.iter(f"{SVG}text") if text.find(f"{SVG}tspan") is not None] == [
        None,
        "font-size: 11.4px",
    ]


def test_a_chart_as_a_file_of_its_own() -> None:
    chart = interval_chart("A > B & \"C\" < 'D'", [("base", "<before>", None)])
    root = drawn(chart)
    assert root.tag == f"{SVG}svg" and root.attrib["aria-label"].startswith(
        "A > B & \"C\" < 'D'. <before>: not measured"
    )
    box, ground = root.attrib["viewBox"].split(), next(root.iter(f"{SVG}rect"))
    assert box == [ground.attrib[name] for name in ("x", "y", "width", "height")] == ["-14", "-14", "368", "114"]
    assert (root.attrib["width"], root.attrib["height"]) == ("368", "114")
    assert "prefers-color-scheme" in (root.findtext(f"{SVG}style") or "")


def test_colours_can_be_read() -> None:
    """Contrast to the ground of at least 4.5 to 1 (WCAG 2 AA), in both schemes."""
    folder = Path(charts.__file__).parent / "templates"
    style = [(folder / name).read_text().split("@media screen") for name in ("charts.css", "report.css")]
    for chart_part, page_part in zip(*style, strict=True):
        scheme = dict(re.findall(r"--(\w+): (#\w{6})", chart_part + page_part))
        assert scheme.keys() == {"paper", "ink", "quiet", "rule", *charts.STAGES, "other", "right", "wrong"}
        paper = luminance(scheme["paper"])
        for name in scheme.keys() - {"paper", "rule"}:  # a rule carries no text
            dark, light = sorted((paper, luminance(scheme[name])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.5, "0.5"),
        (-0.12345, "\N{MINUS SIGN}0.1235"),
        (9999.4, "9999"),
        (12_000.0, "12k"),
        (999_950.0, "1M"),
        (-2.5e9, "\N{MINUS SIGN}2.5G"),
        (3e-4, "3e\N{MINUS SIGN}4"),
        (1e15, "1e15"),
    ],
)
def test_numbers(value: float, shown: str) -> None:
    assert format_number(value) == shown


def test_durations() -> None:
    shown = [format_duration(seconds) for seconds in (4.21, 59.96, 233.4, 3_725, float("inf"))]
    assert shown == ["4.2 s", "1 min 00 s", "3 min 53 s", "1 h 02 min", "unknown"]


def test_percentages() -> None:
    assert [format_percent(f) for f in (0.0, 0.025, 0.8, 1.0)] == ["0%", "2.5%", "80%", "100%"]


def test_marks_for_what_cannot_be_shown() -> None:
    assert (
        escape_text("a\r\nb\tc\x00\x1b\ud800\u202e\ufffe<&\"'")
        == "a\nb\tc\u2400\u241b\ufffd\ufffd\ufffd&lt;&amp;&#34;&#39;"
    )
    assert escape_text("\x80\x9f") == "\u2426\u2426"  # what an untrained student writes is often a C1 control
    for kept in ("\N{ZERO WIDTH JOINER}", "\u3000", "\N{NO-BREAK SPACE}", "\U0001f9d1\U0001f3fd"):
        assert escape_text(kept) == kept
