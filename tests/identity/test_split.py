"""The held-out split: a property of each question's text, whatever happens to the rows."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from helpers.stage_inputs import begin, small_config, sum_row, write_jsonl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cotgrpo.config import ConfigError
from cotgrpo.data.questions import Question, question_text
from cotgrpo.data.triples import Triple
from cotgrpo.identity.split import HeldOutQuestions, HeldOutSplit, draw_split, extend_split, list_split, text_hash
from cotgrpo.training.inputs import draw_test_rows

Rows = list[dict[str, Any]]
QUESTIONS = [Question(f"Wie groß ist {n}?", "1") for n in range(50)]


def test_a_split_is_a_function_of_the_text() -> None:
    split = draw_split(QUESTIONS, 10, seed=3)
    held_out = [question for question in QUESTIONS if question_text(question) in split]
    assert len(held_out) == 10 == len(split.of(QUESTIONS * 2)) and split.of(QUESTIONS) == held_out
    assert draw_split(QUESTIONS[::-1] * 2, 10, seed=3) == split != draw_split(QUESTIONS, 10, seed=4)
    assert draw_test_rows(QUESTIONS, 10, 3) == held_out
    more = draw_split([*QUESTIONS, *(Question(f"{n}", "1") for n in range(500))], 60, seed=3)
    assert {q.question for q in draw_split(QUESTIONS, 20, 3).of(QUESTIONS)} > {q.question for q in held_out}
    assert more.salt == split.salt


@pytest.mark.parametrize(
    "variant",
    [
        lambda text: f"  {text}\n",
        lambda text: text.replace(" ", "\t\u00a0"),
        lambda text: text.replace(" ", "\r\n"),
        lambda text: unicodedata.normalize("NFD", text.replace("ß", "é")),
    ],
)
def test_variants_of_a_text_ask_the_same(variant: Callable[[str], str]) -> None:
    first = "Wie groß ist\u00e9 1?".replace("ß", "é")
    plain = question_text(Question(first, "1"))
    assert question_text(Question(variant(first), "2")) == plain == question_text(Triple(variant(first), "r", "a"))


def test_a_chat_is_the_whole_of_what_comes_before_the_reply() -> None:
    chat = (
        {"role": "user", "content": "a  b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    )
    same = (
        {"content": "a\nb", "role": "user"},
        {"role": "assistant", "content": " c"},
        {"role": "user", "content": "d"},
    )
    other = (*chat[:2], {"role": "user", "content": "e"})
    texts = [question_text(Question("d", "1", context=context)) for context in (chat, same, other, ())]
    assert texts[0] == texts[1] and len(set(texts)) == 3


@pytest.mark.parametrize("count", [0, 50, 51])
def test_some_rows_must_be_left_to_train_on(count: int) -> None:
    with pytest.raises(ConfigError, match=r"data\.test_rows must leave rows to train on: expected 1 to 49"):
        draw_split(QUESTIONS, count, 0)


def test_a_split_as_json() -> None:
    drawn = list_split(QUESTIONS[:3], 5, 7, "list")
    for split in (draw_split(QUESTIONS, 10, 3), drawn, extend_split(drawn, QUESTIONS[3:], set(), 2, 0)):
        assert HeldOutSplit.from_dict(json.loads(json.dumps(split.to_dict()))) == split
    for broken in ({}, {"salt": 1}, drawn.to_dict() | {"listed": []}, drawn.to_dict() | {"threshold": "x"}):
        with pytest.raises(ValueError, match="not a held-out split"):
            HeldOutSplit.from_dict(broken)


def test_what_was_trained_on_is_never_held_out_later() -> None:
    trained = {text_hash(question_text(question)) for question in QUESTIONS[:40]}
    split = extend_split(None, QUESTIONS, trained, 20, seed=0)
    assert split.of(QUESTIONS) == QUESTIONS[40:]
    with pytest.raises(ConfigError, match=r"trained on all of them. Name held-out rows in data\.test"):
        extend_split(None, QUESTIONS[:40], trained, 20, seed=0)
    both = HeldOutQuestions(split, frozenset({question_text(QUESTIONS[0])}))
    assert [question_text(q) in both for q in (QUESTIONS[0], QUESTIONS[1], QUESTIONS[41])] == [True, False, True]


def changed(rows: Rows, what: str, rng: random.Random, number: int) -> Rows:
    """Return rows after a change of a file that takes nothing away, or only whole rows."""
    new = [sum_row(number + i) for i in range(rng.randrange(1, 12))]
    some = rng.sample(rows, min(len(rows), 6))
    if what == "append":
        return [*rows, *new]
    if what == "insert":
        return [*new, *rows]
    if what == "shuffle":
        return rng.sample(rows, len(rows))
    if what == "duplicate":
        return [*rows, *some]
    if what == "respace":  # the same questions, and maybe the whole row, with other white space
        return [*({**row, "question": f" {row['question']}".replace(" ", "  ")} for row in some), *rows]
    if what == "another reply":
        return [*rows, *({**row, "rationale": f"{row['rationale']} So."} for row in some)]
    assert what == "remove"
    return [row for row in rows if row not in some[:3]]


CHANGES = ("append", "insert", "shuffle", "duplicate", "respace", "another reply", "remove")


@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "streaming"])
@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3),
    between=st.lists(st.sampled_from(CHANGES), min_size=1, max_size=3),
    later=st.lists(st.sampled_from(CHANGES), min_size=1, max_size=3),
    test_rows=st.tuples(st.integers(1, 15), st.integers(1, 60)),
)
def test_no_held_out_question_is_ever_trained_on(
    tmp_path_factory: pytest.TempPathFactory,
    streaming: bool,
    seeds: list[int],
    between: list[str],
    later: list[str],
    test_rows: tuple[int, int],
) -> None:
    """Rows appended, inserted, shuffled, copied, respaced or removed; other seeds, sizes and stages; and a resume."""
    folder, rng = tmp_path_factory.mktemp("split"), random.Random(seeds[0])
    rows = [sum_row(n) for n in range(40)]
    path = write_jsonl(folder / "rows.jsonl", rows)
    sft = folder / "run" / "sft"
    # A removed row is an error without this, which other tests hold.
    options: dict[str, Any] = {"allow_changed": "data,held_out", "streaming": streaming}
    first = begin(small_config(folder, seed=seeds[0], test_rows=test_rows[0], **options), "sft")
    assert len(first.held_out) == test_rows[0] and not first.held_out & first.trained
    stages = [first]
    for number, changes in enumerate((between, later)):
        for change in changes:
            rows = changed(rows, change, rng, 1_000 * (number + 1) + 20 * len(rows))
        write_jsonl(path, rows)
        config = small_config(folder, seed=seeds[1], test_rows=test_rows[1], **options)
        stages.append(begin(config, "grpo", sft))
    held_out = set.union(*(stage.held_out for stage in stages))
    trained = set.union(*(stage.trained for stage in stages))
    assert not held_out & trained
    there = {question_text(Triple(row["question"], "", "")) for row in rows}
    assert stages[1].held_out >= first.held_out & there or "remove" in (*between, *later)
    if "remove" not in later:
        assert stages[2].train == stages[1].train and stages[2].held_out == stages[1].held_out
    else:
        assert stages[2].trained >= stages[1].trained & there
