"""Pairs of a right answer and a reply: the verdict a person gives, and the same one in every command."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cotgrpo.data.answers import answers_match, extract_answer, grade, split_thought
from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.questions import Question
from cotgrpo.data.rows import parse_row
from cotgrpo.data.template import AnyTemplate, Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.data.triples import Triple, triples_in
from cotgrpo.evaluation.accuracy import judge
from cotgrpo.ghosts.self_reply import SampledReply, best_reply
from cotgrpo.teachers.editing import write_pairs
from cotgrpo.teachers.endpoint import TeacherReply
from cotgrpo.teachers.filtering import Judge

LINES = (Path(__file__).parent / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
"""A line: a right answer, and replies that are right and wrong."""
PAIRS = [
    (line["gold"], reply, right)
    for line in map(json.loads, LINES)
    for right, replies in ((True, line["right"]), (False, line["wrong"]))
    for reply in replies
]
SOME_PAIRS = PAIRS[::3]
"""Those that go through every command."""
CHAT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STEPS = "Let us think.\n"
"""Before each reply: a reply of an answer alone is no triple."""


@pytest.mark.parametrize("gold", dict.fromkeys(gold for gold, _, _ in PAIRS))
def test_the_verdict_is_a_persons(gold: str) -> None:
    graded = [(reply, right, grade(reply, gold)) for other, reply, right in PAIRS if other == gold]
    assert not [pair for pair in graded if pair[2].correct != pair[1]]


def test_the_verdict_is_that_on_the_answer() -> None:
    """Extracting the answer before, or cutting off the thought, changes nothing for a reply with steps."""
    for gold, reply, _ in PAIRS:
        text = STEPS + reply
        right = grade(text, gold).correct
        assert grade(f"<think>It may be 77.</think>{text}", gold).correct == right or split_thought(text).marked, text
        answer = extract_answer(text)
        if right and answer is not None:
            assert grade(answer, gold).correct, text


FULL_WIDTH = str.maketrans("0123456789-.,", "０１２３４５６７８９－．，")
FORMS = [
    *(
        "{}",
        "{}.",
        "#### {}",
        "#### {} apples",
        r"\boxed{{{}}}",
        r"\boxed{{{}\text{{ cm}}}}",
        "The answer is {}.",
        "= {}",
    ),
    *(
        "答案是{}。",
        "答案：{}元",
        "共{}个。（共用了2步）",
        "Ответ: {}",
        "答えは{}です。",
        "정답은 {}입니다.",
        "الجواب: {}",
    ),
    *("<think>1 or 2</think>{}", "So $x = {}$.", "Answer: {} (2 ways)", "The answer is {}, as 2 is even."),
]
"""Replies with a number in them."""


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9), st.sampled_from(FORMS), st.booleans())
def test_equal_numbers_alone_match(number: int, other: int, form: str, wide: bool) -> None:
    written = str(number).translate(FULL_WIDTH) if wide else str(number)
    assume(number != other and written.strip("-") != "2")
    assert grade(form.format(written), str(number)).correct
    assert grade(form.format(written), f"{number} apples").correct or "cm" in form or "元" in form or "个" in form
    assert not grade(form.format(written), str(other)).correct


def test_right_answers_of_other_questions_do_not_match() -> None:
    """Answers of one kind differ by more than their units."""
    golds = (
        "1/2^{99}|1/2^{98}|11111_2|11111_3|5 cm|6 m|(3, 5)|(5, 3)|[3, 5)|x^2+1|x^2-1|8:30|8:45|A|B|AB|Paris|Rome|25%"
    )
    golds += (
        r"|3/4|-3|\sqrt{2}|\sqrt{3}|1, 3|1:2|2:1|a = 1, b = 2|a = 2, b = 1|10^{50}|10^{50}+1|2x|2y|巴黎|伦敦|0|1e-9"
    )
    matching = [
        (one, other)
        for one in golds.split("|")
        for other in golds.split("|")
        if one != other and answers_match(one, other)
    ]
    assert not matching


@functools.cache
def templates() -> tuple[AnyTemplate, AnyTemplate, AnyTemplate]:
    """A plain template and two chat templates, without and with a thought, of one tokenizer of bytes."""
    tokenizer = train_tokenizer([], vocab_size=260)
    tokenizer.chat_template = CHAT
    return Template(tokenizer), ChatTemplate(tokenizer), ChatTemplate(tokenizer, "think")


def evaluated(template: AnyTemplate, text: str, gold: str) -> bool:
    """The verdict of evaluation, which is also the reward of verified replies."""
    ids = np.asarray([*template.ids(text), template.eos_id], np.int32)
    return judge(template, Question("q", gold), ids, True).correct


def chosen_as_ghost(template: AnyTemplate, text: str, gold: str) -> bool:
    """The verdict on a student's own reply. One that cannot be rendered is no ghost."""
    ids = np.asarray([*template.ids(text), template.eos_id], np.int32)
    return best_reply(template, Triple("q", "r", gold), [SampledReply(ids, -1.0, True)]) is not None


def trained_on(text: str, gold: str) -> bool:
    """The verdict of `sft` on a row with a whole reply and its right answer."""
    row = parse_row({"question": "q", "response": text, "answer": gold}, "f:1")
    filler = parse_row({"question": "p", "rationale": "r", "answer": "1"}, "f:2")
    return len(triples_in([row, filler], bad_rows="drop")[0]) == 2


def left_out_of_editing(path: Path, text: str, gold: str) -> bool:
    """The verdict of `gold --rows wrong`."""
    path.unlink(missing_ok=True)
    report = write_pairs(path, [Triple("q", "r", gold), Triple("p", "r", "1")], {"q": text, "p": "no"}, rows="wrong")
    return report.dropped.get("the student is right") == 1


def test_one_verdict_in_every_command(tmp_path: Path) -> None:
    """Evaluation, rewards, generation, training rows, self-replies and `gold` agree on every pair."""
    plain, chat, think = templates()
    differing = []
    for gold, reply, _ in SOME_PAIRS:
        text = STEPS + reply
        right = grade(text, gold).correct
        found = {
            "eval, plain": evaluated(plain, f"{STEPS}<sep>{reply}", gold) == grade(reply, gold).correct,
            "eval, chat": evaluated(chat, text, gold) == right,
            "eval, thought": evaluated(think, text, gold) == right,
            "eval, after a thought": evaluated(think, f"<think>It may be 77.</think>{text}", gold) == right
            or split_thought(text).marked,
            "generate": Judge()(Question("q", gold), TeacherReply(text, finish_reason="stop")).accepted == right,
            "sft": trained_on(text, gold) == right,
            "gold": left_out_of_editing(tmp_path / "edit.jsonl", text, gold) == right,
        }
        if not split_thought(reply).marked and "####" not in reply:
            found["self-reply"] = chosen_as_ghost(plain, f"{STEPS}<sep>{reply}", gold) == grade(reply, gold).correct
        differing += [(command, gold, text, right) for command, agrees in found.items() if not agrees]
    assert not differing, "\n".join(map(str, [len(differing), *differing[:20]]))


def test_the_table_in_the_docs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "answers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (equal|not equal) \|", text, re.MULTILINE)
    assert len(rows) > 40
    wrong = [row for row in rows if grade(row[1], row[0]).correct != (row[2] == "equal")]
    assert not wrong
