"""The picture of a reply: every token once, coloured by its reward, and the ghost's tokens next to them."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from cotgrpo.reports.charts import WIDTH, standalone
from cotgrpo.reports.completions import colour_of
from cotgrpo.reports.reply_chart import reply_chart


def row(tokens: list[str], ghosts: dict[int, str], rewards: dict[int, float]) -> dict[str, Any]:
    count = range(len(tokens))
    return {
        "question": "What is 3+3+1?",
        "tokens": tokens,
        "ghosts": [ghosts.get(i) for i in count],
        "rewards": [rewards.get(i, 0.0) for i in count],
    }


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter() if text.tag.endswith("text")]


def test_tokens_colours_and_ghosts() -> None:
    chart = reply_chart(row(["3+3+1=", "9", "\n", "=9"], {1: "7"}, {1: -16.4, 3: 0.5}))
    assert texts(chart) == ["What is 3+3+1?", "3+3+1=", "9", "ghost: 7 (R = \N{MINUS SIGN}16.4)", "=9"]
    assert re.findall(r'<rect [^>]*fill="([^"]*)"', chart) == [colour_of(-16.4), colour_of(0.5)]
    assert chart.count("text-decoration: underline") == 1
    lines = {float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)"', chart)}
    assert len(lines) == 4, "question, two lines of tokens, and the ghost's text a pixel higher than its line"


@pytest.mark.parametrize(("reward", "hue"), [(-9.0, "214, 60, 50"), (9.0, "46, 160, 90"), (-0.1, "214, 60, 50")])
def test_the_colour_of_a_reward(reward: float, hue: str) -> None:
    assert colour_of(reward).startswith(f"rgba({hue}, ") and colour_of(2 * reward) >= colour_of(reward)


def test_a_long_reply_stays_inside_the_picture() -> None:
    """Lines are broken, corrections without room are left out, and markup in a token is text."""
    tokens = ["<b>word</b> "] * 30
    chart = standalone(reply_chart(row(tokens, dict.fromkeys(range(30), "a much longer proposal"), {})))
    root = ElementTree.fromstring(chart)
    assert [text for text in texts(chart) if "word" in text] == tokens
    assert not [element for element in root.iter() if element.tag.endswith("}b")]
    for element in root.iter():
        if element.tag.endswith("rect") and element.get("x") != "-14":
            assert float(element.get("x", 0)) + float(element.get("width", 0)) <= WIDTH
    for x in re.findall(r'<text x="([\d.]+)"', chart):
        assert float(x) < WIDTH
