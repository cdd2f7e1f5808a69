"""The report's page: true to its figures, whole whatever the run wrote, and asking nothing of a network."""

from __future__ import annotations

import math
import random
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.report_files import results, write_run

from cotgrpo import GhostBatch, Student, TrainState, make_grpo_step, make_optimizer
from cotgrpo.objectives import Pair
from cotgrpo.objectives.divergences import ReferenceKl
from cotgrpo.reports import charts
from cotgrpo.reports.page import METRICS
from cotgrpo.reports.report import COMPLETIONS_SHOWN, choose_replies, write_report
from cotgrpo.training.reporting import SAMPLES_SHOWN, merge_samples

VOID = {"meta", "br"}
TAGS = set(
    re.findall(
        r"\w+",
        "html head meta title style body header nav main section article h1 h2 h3 h4 p div span a i strong em code "
        "pre br dl dt dd ul li details summary svg g text tspan path line rect circle polyline polygon",
    )
)

HOSTILE = (
    "</pre></style></title></svg><script>alert(1)</script><img src='http://evil.example/x.png' onerror=\"alert(2)\">"
    " & &lt;b&gt; ]]> --> {{ 7 * 7 }} {% raw %}"
    "\x00\x1b[31m\x7f\ud800 \u202egnorw\u202c \u0645\u0631\u062d\u0628\u0627 \t{x} %s"
)
SHOWN = HOSTILE.replace("\x00", "\u2400").replace("\x1b", "\u241b")
for character in "\x7f\ud800\u202e\u202c":
    SHOWN = SHOWN.replace(character, "\ufffd")


class Page(HTMLParser):
    """The page taken apart: fails on elements that are not properly nested.

    `elements`: (tag, attributes) in order.
    `texts`: [class or tag, text] of each element, its descendants' text included.
    """

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, list[str]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[list[str]] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {[tag for tag, _ in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.texts.append([dict(attrs).get("class") or tag, ""])
            self.open.append((tag, self.texts[-1]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert any(tag == "svg" for tag, _ in self.open), f"<{tag}/> outside an SVG closes nothing"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, text in self.open:
            text[1] += data

    def of(self, name: str) -> list[str]:
        """The texts of the elements with this class, or this tag and no class."""
        return [text for kind, text in self.texts if kind == name]

    def coordinates(self) -> list[tuple[str, float]]:
        """(attribute, number) of everything that is drawn."""
        found = []
        for tag, attributes in self.elements:
            if tag in {"line", "path", "rect", "circle", "polyline", "polygon", "text", "tspan"}:
                for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "d", "points", "dx"):
                    for part in re.split(r"[ ,]|(?<=.)(?=[MVHvh])", attributes.get(name) or ""):
                        if part:
                            found.append((name, float(part.lstrip("MVHvh"))))
        return found


def log_rows(stage: str, steps: int, every: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Rows as the host loop writes them: one each `every` steps, evaluations in rows of their own."""
    noise = random.Random(seed).gauss
    rows: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        done = step / steps
        loss = (0.16 - 0.05 * done if stage == "grpo" else 0.12 + 4.2 * math.exp(-9 * done)) * math.exp(noise(0, 0.06))
        rate = 3e-3 * min(1, done / 0.08) * 0.5 * (1 + math.cos(math.pi * done))
        seconds = 0.41 * math.exp(noise(0, 0.05))
        row = {"train/loss": loss, "train/entropy": 0.8 * loss, "train/token_accuracy": math.exp(-0.8 * loss)}
        row |= {"train/grad_norm": 0.6 * loss * math.exp(noise(0, 0.3)), "train/learning_rate": rate}
        if stage == "grpo":
            row |= {"train/reward": 0.3 - loss + noise(0, 0.02), "train/ghost_prob": math.exp(-loss)}
            row |= {"train/drawn_prob": math.exp(-0.6 * loss), "train/match_rate": math.exp(-loss)}
        row |= {"train/tokens": 3900.0, "train/padded_tokens": 4096.0, "train/skipped": 0, "train/batch_crc": 12345}
        row |= {"train/step_time": seconds, "train/tokens_per_sec": 3900 / seconds}
        row |= {"train/padded_tokens_per_sec": 4096 / seconds}
        rows.append({"step": step} | row)
        if step % (10 * every) == 0 or step == steps:
            rows.append({"step": step, "eval/loss": 1.08 * loss + 0.01, "eval/entropy": loss})
    return rows


def page_of(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob("*.tmp"))
    return Page(path.read_text(encoding="utf-8"))


def both_stages() -> dict[str, list[dict[str, Any]]]:
    return {"sft": log_rows("sft", 1000), "grpo": log_rows("grpo", 300)}


def assert_drawn_inside(page: Page) -> None:
    numbers = page.coordinates()
    assert all(math.isfinite(number) for _, number in numbers)
    outside = [(name, number) for name, number in numbers if not -10 <= number <= charts.WIDTH + 10]
    assert not outside, outside[:5]


def test_figures_are_those_of_the_report(tmp_path: Path) -> None:
    report = results()
    page = page_of(write_run(tmp_path, report, both_stages()))
    rows = [report["accuracy"][name] for name in ("base", "sft", "grpo")]
    assert [float(text.rstrip("%")) / 100 for text in page.of("value")] == pytest.approx(
        [row["value"] for row in rows], abs=5.1e-4
    )
    said = [
        [float(figure) for figure in re.findall(r"([\d.]+)%|n = (\d+)", text) for figure in figure if figure]
        for text in page.of("text")
        if "n = " in text
    ]
    wanted = [[100 * row["value"], 100 * row["low"], 100 * row["high"], row["n"]] for row in rows]
    assert said == [pytest.approx(row, abs=0.051) for row in wanted]  # the chart's lines
    shown = [text for text in page.of("quiet") if "n = " in text]
    assert len(shown) == 3
    for text, row, loss in zip(shown, rows, ("6.242", "0.1235", "0.0987"), strict=True):
        low, high, n = re.match(r"([\d.]+)% to ([\d.]+)%, n = (\d+)", text).groups()  # type: ignore[union-attr]
        assert [float(low), float(high), int(n)] == pytest.approx([100 * row["low"], 100 * row["high"], 300], abs=0.051)
        assert text.endswith(f"held-out loss {loss} nats per token")
    assert page.of("number") == ["4.2 s", "3 min 53 s", "6 min 42 s", "1 min 01 s", "11 min 41 s"]


def test_the_page_from_top_to_bottom(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, results() | {"notes": ["Fewer rows than usual."]}, both_stages()))
    assert page.of("h1") == ["cotgrpo quickstart"]
    introduction = page.of("p")[0]
    assert "GhostRespond Policy Optimization, not Group Relative Policy Optimization" in introduction
    assert page.of("note") == ["Fewer rows than usual."] and not page.of("alert")
    sections = [a["id"] for tag, a in page.elements if tag == "section"]
    assert sections == ["accuracy", "curves", "answers", "data", "time", "config", "versions", "reproduce"]
    titles = [metric.title for metric in METRICS]
    drawn = [title for title in titles if title in page.of("h3")]
    assert drawn == [title for title in titles if title not in ("KL", "Reply accuracy")]  # no reference, and text
    assert len(page.of("chart")) == 1 + len(drawn)
    assert page.of("mark right") == ["\u2713 right"] * 3 and page.of("mark wrong") == ["\u2717 wrong"] * 9
    (train, tests) = page.of("reasons")
    assert train.startswith("119 left out: wrong answertrain.jsonl:14: '1,204', gold '1214'\ntrain.jsonl:88")
    assert "7 left out: duplicate" in train and tests == "Nothing was left out."
    assert "11,874 of 12,000 kept" in page.of("quiet")
    assert page.of("pre") == [results()["config"], results()["command"]]
    assert page.of("dd")[-1] == "1 x cpu"
    assert_drawn_inside(page)


def test_curves_are_of_metrics_that_a_step_reports() -> None:
    """A metric renamed in the steps would leave its chart out in silence."""
    student = Student.from_logits(lambda params, tokens, positions, segments: params["table"][tokens])
    params = {"table": jnp.zeros((7, 7))}
    ones = jnp.ones((2, 4), jnp.int32)
    batch = GhostBatch(tokens=ones, ghost_tokens=ones, positions=ones, segment_ids=ones, loss_mask=ones)
    tx = make_optimizer("adamw", total_steps=5, learning_rate=1e-3)
    step = make_grpo_step(student, tx, ReferenceKl(Pair()), reference=student)
    state = TrainState.create(params=params, tx=tx, key=0)
    reported = {f"train/{name}" for name in jax.eval_shape(step, state, batch, params)[1]}
    wanted = {key for m in METRICS for key in (m.key, m.compared) if key.startswith("train/")}
    by_the_host = {"train/tokens_per_sec", "train/accuracy"}
    assert wanted - reported == by_the_host, "the host measures time and judges replies, nobody else"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    report = results(("base", "sft"))
    for key in ("title", "command", "config"):
        report[key] = HOSTILE
    for key in ("accuracy", "held_out_loss", "wall_seconds", "versions", "data"):
        report[key][HOSTILE] = next(iter(report[key].values()))
    reply = {"text": HOSTILE + "\r\n  two  blanks\n\n" + "x" * 500, "correct": True}
    report["samples"] = [{"question": HOSTILE, "gold": HOSTILE, "replies": {"base": reply, HOSTILE: reply}}]
    report["data"]["train rows"] = {"read": 2, "kept": 1, "dropped": {HOSTILE: 1}, "examples": {HOSTILE: [HOSTILE]}}
    report["notes"] = [HOSTILE]
    page = page_of(write_run(tmp_path, report, {"sft": log_rows("sft", 50)}))
    assert {tag for tag, _ in page.elements} <= TAGS
    known = {
        "class",
        "style",
        "id",
        "href",
        "dir",
        "role",
        "aria-label",
        "lang",
        "charset",
        "content",
        "name",
        "http-equiv",
    }
    drawing = {
        "viewbox",
        "x",
        "y",
        "dx",
        "x1",
        "x2",
        "y1",
        "y2",
        "cx",
        "cy",
        "r",
        "rx",
        "d",
        "points",
        "width",
        "height",
    }
    assert {name for _, a in page.elements for name in a} <= known | drawing | {"text-anchor"}
    assert page.of("h1") == [SHOWN] and page.of("note") == [SHOWN] and page.of("pre") == [SHOWN, SHOWN]
    assert SHOWN + "\n  two  blanks\n\n" + "x" * 500 in page.of("words")
    assert all(SHOWN in page.of(kind) for kind in ("h3", "dt", "code", "span"))
    assert_drawn_inside(page)


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path, results(), both_stages())
    page = page_of(folder)
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<script|<link|\bsrc=", source)
    assert all(a["href"].startswith("#") for _, a in page.elements if "href" in a)
    (policy,) = (a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([], id="no rows"),
        pytest.param([0.5], id="one row"),
        pytest.param([None, None], id="all null"),
        pytest.param([math.nan, math.inf, 0.25, -math.inf], id="not finite"),
        pytest.param([0.0] * 4, id="all zero"),
        pytest.param([3e-4] * 4, id="all equal"),
        pytest.param([-2.0, -2.0000001], id="almost equal"),
        pytest.param([1e308, -1e308, 2.0], id="blown up"),
        pytest.param([5e-324, 1e-300, 1.0], id="vanishing"),
        pytest.param([True, "0.5", [1], 0.75], id="no numbers"),
        pytest.param([10.0**k for k in range(-20, 20)], id="forty decades"),
    ],
)
def test_any_values_make_a_page(tmp_path: Path, values: list[Any]) -> None:
    keys = [key for m in METRICS for key in (m.key, m.compared) if key]
    rows = [{"step": i + 1} | dict.fromkeys(keys, value) for i, value in enumerate(values)]
    page = page_of(write_run(tmp_path, results(("base", "sft")), {"sft": rows}))
    usable = any(isinstance(v, float) and math.isfinite(v) for v in values)
    assert len(page.of("chart")) == 1 + usable * len(METRICS)
    assert_drawn_inside(page)
    labels = [
        text
        for text in page.of("text")
        if not re.match("last|training|held|ghost|drawn|sampled|greedy|Before|After", text)
    ]
    assert not [text for text in labels if len(text) > 9], "an axis label that does not fit"


def test_one_stage(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a", results(("base", "sft")), {"sft": log_rows("sft", 100)}))
    assert "GRPO" not in page.of("name") and "SFT" in page.of("name")
    report = results() | {"wall_seconds": {"grpo": 5}}
    (tmp_path / "run").mkdir()
    page = page_of(write_run(tmp_path / "run", report, {"grpo": log_rows("grpo", 100)}, single=True))
    assert "GRPO" in page.of("name") and "SFT" not in page.of("name")
    assert page.of("p")[0].startswith("A fine-tuned student model was trained on with GRPO.")
    (tmp_path / "on_policy").mkdir()
    report = results() | {"wall_seconds": {"on_policy": 5}}
    page = page_of(write_run(tmp_path / "on_policy", report, {}))
    assert page.of("p")[0].startswith("A student model was trained: On-policy.")


def test_nothing_measured(tmp_path: Path) -> None:
    empty: dict[str, Any] = {key: {} for key in ("accuracy", "held_out_loss", "wall_seconds", "data", "versions")}
    page = page_of(write_run(tmp_path, results() | empty | {"samples": []}))
    quiet = page.of("quiet")
    assert quiet == [
        "Not measured in this run.",
        "The log of the run has no rows.",
        "The run kept no samples.",
        "No data was read.",
    ]


def test_what_is_noted_of_rows_is_shown(tmp_path: Path) -> None:
    report = results(("base",))
    rows = {"read": 3, "kept": 3, "dropped": {}, "examples": {"two golds": ["a:1", "a:2"]}, "noted": {"two golds": 2}}
    report["data"]["training rows"] = rows
    write_run(tmp_path, report, {})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "2 noted: two golds<code>a:1\na:2</code>" in page and "Nothing was left out." in page


def test_skipped_updates_stand_at_the_top(tmp_path: Path) -> None:
    stages = both_stages()
    stages["sft"][3]["train/skipped"] = 2
    stages["sft"][4]["train/skipped"] = 1
    stages["grpo"][0]["train/skipped"] = 1
    sft, grpo = page_of(write_run(tmp_path, results(), stages)).of("alert")
    assert sft.startswith("3 updates skipped in SFT.") and grpo.startswith("1 update skipped in GRPO.")


def test_a_long_log_makes_a_small_page_quickly(tmp_path: Path) -> None:
    rows = [row | {"step": i + 1} for i, row in enumerate(log_rows("grpo", 1000, every=1) * 10)]
    assert len(rows) > 10_000
    folder = write_run(tmp_path, results(), {"sft": rows})
    started = time.perf_counter()
    page = page_of(folder)
    assert time.perf_counter() - started < 10  # about one second on an idle machine
    assert (folder / "report.html").stat().st_size < 400_000
    assert len(page.of("spot")) == charts.MOST_POINTS * 11  # nine charts, two of them with two curves
    assert_drawn_inside(page)


def test_long_replies_are_folded_whole(tmp_path: Path) -> None:
    report = results(("base",))
    long, endless = "\n".join(f"  line {i}" for i in range(40)), "y" * 25_000
    texts = ["short", long, endless, ""]
    reply = lambda text: {"base": {"text": text, "correct": False}}
    report["samples"] = [{"question": "?", "gold": "1", "replies": reply(text)} for text in texts]
    page = page_of(write_run(tmp_path, report))
    whole = page.of("words")
    assert "short" in whole and long in whole and "(empty)" in page.of("quiet")
    assert page.of("words preview") == ["\n".join(long.split("\n")[:14]) + "\u2026", "y" * 700 + "\u2026"]
    assert "y" * 20_000 + "\n[5,000 more characters are in report.json]" in whole


def test_replies_that_the_ghost_corrects_are_shown_before_newer_ones() -> None:
    """The page puts the last first: here those of steps 57, 54, ... and then the newest."""
    rows = [{"step": step, "ghosts": [None, "x" if step % 3 == 0 and step < 60 else None]} for step in range(100)]
    assert [row["step"] for row in choose_replies(rows)] == [96, 97, 98, 99, *range(36, 60, 3)]
    assert (
        choose_replies(rows[:5]) == [rows[i] for i in (1, 2, 4, 0, 3)]
        and len(choose_replies(rows[1:2] * 30)) <= COMPLETIONS_SHOWN
    )


def test_answers_that_changed_between_stages_are_shown_first() -> None:
    """Training makes most answers right, so answers that a later stage corrected or broke would be lost among them."""
    right = {"base": [], "sft": [*range(0, 20), 25], "grpo": [*range(0, 18), 22, 25]}
    replies = {
        name: [{"question": f"q{n}", "gold": "1", "text": "1", "correct": n in of} for n in range(30)]
        for name, of in right.items()
    }
    chosen = [row["question"] for row in merge_samples(replies)]
    assert len(chosen) == SAMPLES_SHOWN == 12
    assert chosen[:8] == ["q18", "q19", "q22", *(f"q{n}" for n in range(5))]
    assert chosen[8:] == ["q20", "q21", "q23", "q24"]
    assert [row["question"] for row in merge_samples({"base": replies["base"], "sft": replies["sft"]})][:2] == [
        "q0",
        "q1",
    ]
