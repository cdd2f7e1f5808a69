"""Draws depend on the seed, the question and their number alone; what is made of them; when a measurement is whole."""

from __future__ import annotations

import io

import pytest
from helpers.commands import write_model
from rich.console import Console

from cotgrpo.data.questions import Question
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.evaluation.accuracy import ExactMatch, SampledAccuracy, SampledMatch, draws_of
from cotgrpo.evaluation.held_out import HeldOut, QuestionSet, table_lines
from cotgrpo.evaluation.replies import Draws, Reply, ReplyWriter
from cotgrpo.models import Pretrained, load_pretrained
from cotgrpo.sharding import make_mesh

QUESTIONS = [Question(f"What is {a}+{a * a}?", str(a + a * a)) for a in range(1, 8)]
DRAWS = Draws(3, temperature=1.5, top_p=0.95, seed=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretrained, Template]:
    folder = write_model(tmp_path_factory.mktemp("model") / "model", [q.question for q in QUESTIONS])
    return load_pretrained(folder), Template(load_tokenizer(folder))


def writer(
    model: tuple[Pretrained, Template],
    questions: list[Question] = QUESTIONS,
    draws: Draws | None = DRAWS,
    **more: object,
) -> ReplyWriter:
    sizes = {"max_new_tokens": 6, "batch_size": 4} | more
    return ReplyWriter(model[0].config, model[1], questions, draws=draws, **sizes)  # type: ignore[arg-type]


def texts(replies: list[list[Reply]]) -> list[list[str]]:
    return [[reply.text for reply in several] for several in replies]


def test_draws_do_not_depend_on_what_is_drawn_with_them(model: tuple[Pretrained, Template]) -> None:
    params = model[0].params
    first = texts(writer(model)(params))
    assert len({text for several in first for text in several}) > len(QUESTIONS)  # they do differ
    # Other batches, another order, fewer questions, and more replies to each.
    other = texts(writer(model, QUESTIONS[:2:-1], Draws(5, 1.5, 0.95, 4), batch_size=3)(params))
    assert [several[:3] for several in other[::-1]] == first[3:]
    assert texts(writer(model, draws=Draws(3, 1.5, 0.95, 5))(params)) != first


def test_draws_do_not_depend_on_the_devices(model: tuple[Pretrained, Template]) -> None:
    first = texts(writer(model)(model[0].params))
    assert texts(writer(model, mesh=make_mesh(data=4, tensor=2))(model[0].params)) == first


def test_draws_without_temperature_are_the_greedy_replies(model: tuple[Pretrained, Template]) -> None:
    greedy = texts(writer(model, draws=None)(model[0].params))
    assert texts(writer(model, draws=Draws(1, temperature=0.0))(model[0].params)) == greedy


def reply(answer: str | None, correct: bool, finished: bool = True) -> Reply:
    return Reply("q", "1", f"so {answer}", answer, correct, finished)


REPLIES = [
    [reply("1", True), reply("1.0", True), reply("2", False), reply(None, False, finished=False)],
    [reply("3", False), reply("3", False), reply("1", True), reply("4", False)],
]
"""Two right of four, which win the vote of four; one right of four, which loses it."""


def test_the_estimates_of_drawn_replies() -> None:
    found = SampledAccuracy.of(Draws(4, 0.7), [1, 2, 4], REPLIES)
    assert {k: share.value for k, share in found.pass_at_k.items()} == pytest.approx(
        {1: 3 / 8, 2: (5 / 6 + 1 / 2) / 2, 4: 1}
    )
    # Of six pairs: {1, 1.0} is right, {1, 2} and {1.0, 2} are ties, {1, None} and {1.0, None} right, {2, None} wrong.
    # And {3, 3} and three pairs of a tie with one right answer in each of two: {3, 1} twice, {1, 4}.
    assert found.maj_at_k[2].value == pytest.approx(((1 + 2 * 0.5 + 2) / 6 + (3 * 0.5) / 6) / 2)
    assert found.maj_at_k[4].value == 0.5
    assert (found.truncated, found.unparsable) == (1, 1)
    figures = found.figures()
    assert list(figures)[:7] == ["samples", "temperature", "top_p", "seed", "pass@1", "pass@2", "pass@4"]
    assert "maj@1" not in figures and draws_of(figures) == Draws(4, 0.7)
    assert figures["pass@4"]["n"] == 2 and figures["maj@4"] == {"value": 0.5, "n": 2, "low": 0.0, "high": 1.0}
    assert str(found).endswith("maj@4 50.0% (0.0% to 100.0%): 4 replies to each question, temperature 0.7, seed 0")


def test_a_measurement_has_every_test_set_and_is_whole_for_the_same_settings(
    model: tuple[Pretrained, Template],
) -> None:
    pretrained, template = model

    def question_set(questions: list[Question], draws: Draws | None) -> QuestionSet:
        asked, sizes = (pretrained.config, template, questions), {"max_new_tokens": 4, "batch_size": 8}
        sampled = None if draws is None else SampledMatch(*asked, draws, [1, 2], **sizes)
        return QuestionSet(ExactMatch(*asked, **sizes), sampled)

    out = io.StringIO()

    def held_out(draws: Draws | None, **sets: list[Question]) -> HeldOut:
        own = question_set(QUESTIONS[:2], draws)
        console = Console(file=out, width=200)
        further = {name: question_set(questions, draws) for name, questions in sets.items()}
        return HeldOut(
            own.exact_match, lambda params, batch: {}, lambda: [], 0, console, sampled=own.sampled, sets=further
        )

    draws = Draws(2, 1.0)
    found = held_out(draws, other=QUESTIONS[3:]).measure(pretrained.params, "now")
    assert list(found["sets"]) == ["other"] and found["sets"]["other"]["accuracy"]["n"] == 4
    assert [len(row["samples"]) for row in found["sets"]["other"]["replies"]] == [2] * 4
    lines = out.getvalue().splitlines()
    assert lines[-3:] == [f"  {line}" for line in table_lines({"held-out": found, "other": found["sets"]["other"]})]
    assert lines[-4] == "now: test sets" and lines[-1].startswith("  other     4     0.0% (0.0% to")
    assert held_out(draws, other=QUESTIONS[3:]).is_whole(found)
    for other in (
        held_out(None, other=QUESTIONS[3:]),
        held_out(draws),
        held_out(draws, other=QUESTIONS[4:]),
        held_out(draws, another=QUESTIONS[3:]),
        held_out(Draws(2, 0.5), other=QUESTIONS[3:]),
        held_out(Draws(2, 1.0, seed=1), other=QUESTIONS[3:]),
    ):
        assert not other.is_whole(found)
    greedy = held_out(None).measure(pretrained.params, "now")
    assert held_out(None).is_whole(greedy) and not {"sampled", "sets"} & set(greedy)
