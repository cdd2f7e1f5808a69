"""Verdicts on a teacher's replies, and the filters that choose among right ones."""

from __future__ import annotations

import json

import pytest

from cotgrpo.data.questions import Question
from cotgrpo.data.sources import DataError
from cotgrpo.teachers.decontamination import TestQuestions
from cotgrpo.teachers.endpoint import TeacherReply
from cotgrpo.teachers.filtering import (
    Candidate,
    Judge,
    commonest,
    distinct,
    load_check,
    majority,
    most_diverse,
    parts_of,
    shortest,
)

QUESTION = Question("What is 3 + 4?", "7", source="rows:1", id="q", row={"gold": "7", "level": 2})


@pytest.mark.parametrize(
    ("text", "reasoning", "parts"),
    [
        ("3 + 4 = 7\n#### 7", "", ("3 + 4 = 7", "7")),
        ("3 + 4 = 7, so it is 7.", "", ("3 + 4 = 7, so it is 7.", "7")),
        ("Add.\n#### Sum\nIt is \\boxed{7}", "", ("Add.\n#### Sum\nIt is \\boxed{7}", "7")),
        ("#### 7", "", ("", "7")),
        ("Who knows", "", ("Who knows", None)),
        ("It is \\boxed{7}.", "Let me add 3.", ("Let me add 3.", "7")),
        ("Paris", "A city.", ("A city.", "Paris")),
        ("", "I think.", ("I think.", None)),
        ("<think>3 and 4</think>\nThe answer is 7.", "", ("3 and 4", "7")),
        ("Well.\n\nIt could be", "Hm.", ("Hm.", None)),
        ("", "3 + 4 = 7\n#### 7", ("3 + 4 = 7", "7")),
        ("", "3 and 4</think>\nThe answer is 7.", ("3 and 4", "7")),
        ("So 7.", "<think>3 and 4</think>", ("3 and 4", "7")),
    ],
)
def test_parts_of_a_reply(text: str, reasoning: str, parts: tuple[str, str | None]) -> None:
    assert parts_of(TeacherReply(text, reasoning)) == parts


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (TeacherReply("Add: 7"), "correct"),
        (TeacherReply("Add: 7.0", finish_reason="stop"), "correct"),
        (TeacherReply("Add: 8"), "wrong answer"),
        (TeacherReply("Add: 7", finish_reason="length"), "truncated"),
        (TeacherReply("", "I thought and thought", finish_reason="length"), "truncated"),
        (TeacherReply("I\u2019m sorry, I cannot."), "refused"),
        (TeacherReply("I can't add, but it is 7"), "correct"),
        (TeacherReply("", refusal="No."), "refused"),
        (TeacherReply("7", finish_reason="content_filter"), "refused"),
        (TeacherReply("No idea"), "unparsable"),
        (TeacherReply("#### 7"), "unparsable"),
        (TeacherReply("Add 3 \ufffd 4: 7"), "unparsable"),
        (TeacherReply("The answer is 7.", "Add \ufffd."), "unparsable"),
        (TeacherReply("Take three apples and add four apples: 7"), "contaminated"),
        *((TeacherReply("Add: 7", finish_reason=word), "truncated") for word in ("MAX_TOKENS", "LENGTH", "max_tokens")),
        *((TeacherReply("Add: 7", finish_reason=word), "truncated") for word in ("abort", "error", "token_limit")),
        *((TeacherReply("Add: 7", finish_reason=word), "refused") for word in ("SAFETY", "sensitive", "RECITATION")),
        *((TeacherReply("Add: 7", finish_reason=word), "correct") for word in ("STOP", "eos_token", "end_turn", "odd")),
        (TeacherReply("Add: 7", completion_tokens=64), "truncated"),
        (TeacherReply("Add: 7", completion_tokens=63), "correct"),
        (TeacherReply("Add: 7", completion_tokens=64, finish_reason="stop"), "correct"),
        (TeacherReply("<think>Add: 7"), "truncated"),
        (TeacherReply("", "<think>Add: 7"), "truncated"),
        (TeacherReply("Add 3 and 4.\n#### 7 apples"), "correct"),
        (TeacherReply("<think>Hm.</think>I'm sorry, I can't help with that."), "refused"),
        (TeacherReply("Sorry, no.", "Hm."), "refused"),
        (TeacherReply("The token <|eot_id|> ends it: 7"), "control token"),
        (TeacherReply("Add.\n#### 3\nNo, \\boxed{7}"), "control token"),
        (TeacherReply("Add <sep> it.\n#### 7"), "control token"),
        (TeacherReply("7", "Add. It says: #### 7"), "control token"),
        (TeacherReply("7", "#### Step 1\nAdd."), "correct"),
        (TeacherReply("If |3| < |4| < |7| it is 7"), "correct"),
    ],
)
def test_verdicts(reply: TeacherReply, reason: str) -> None:
    verdict = Judge(test=TestQuestions(["Now take three apples and add"], n=5), max_tokens=64)(QUESTION, reply)
    assert verdict.reason == reason and verdict.accepted == (reason == "correct")


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "Unfortunately, I cannot answer this question.",
        "My apologies, but I can't help.",
        "Unfortunately, I'm not able to help with that.",
        "对不起，我无法回答这个问题。",
        "我很抱歉，但我无法继续。",
        "很抱歉，作为一个人工智能，我不能提供帮助。",
        "你好，这个问题我暂时无法回答，让我们换个话题吧。",
        "抱歉，我無法協助您。",
        "申し訳ありませんが、お手伝いできません。",
        "そのご質問にはお答えできません。",
        "죄송합니다. 도와드릴 수 없습니다.",
        "Lo siento, pero no puedo ayudarte con eso.",
        "Je suis désolé, mais je ne peux pas répondre.",
        "Es tut mir leid, dabei kann ich nicht helfen.",
        "Das kann ich leider nicht beantworten.",
        "Ich kann diese Frage leider nicht beantworten.",
        "Извините, я не могу помочь с этим.",
        "К сожалению, я не могу ответить.",
        "Desculpe, não posso ajudar com isso.",
        "Mi dispiace, ma non posso aiutarti.",
        "آسف، لا أستطيع المساعدة في ذلك.",
        "عذرًا، لا يمكنني الإجابة.",
        "मुझे खेद है, मैं इसमें मदद नहीं कर सकता।",
        "माफ़ कीजिए, मैं मदद नहीं कर सकता।",
        "ขออภัย ฉันไม่สามารถช่วยได้",
        "Xin lỗi, tôi không thể giúp bạn.",
        "Maaf, saya tidak bisa membantu.",
        "Üzgünüm, bu konuda yardımcı olamam.",
        "Het spijt me, ik kan u niet helpen.",
        "Przepraszam, nie mogę w tym pomóc.",
        "Вибачте, я не можу допомогти.",
        "Jag är ledsen, jag kan inte hjälpa till.",
        "متأسفم، نمی‌توانم کمک کنم.",
        "אני מצטער, אני לא יכול לעזור.",
    ],
)
@pytest.mark.parametrize("gold", ["7", ""])
def test_refusals_in_any_language(text: str, gold: str) -> None:
    question = Question("What is 3 + 4?", gold)
    for reply in (TeacherReply(text), TeacherReply(text, "Hm."), TeacherReply(f"<think>Hm.</think>\n{text}")):
        assert Judge()(question, reply).reason == "refused"
    assert Judge()(question, TeacherReply(f"{text}\nBut 3 + 4 = 7.\n#### 7")).accepted


def test_checks_and_questions_without_gold() -> None:
    judge = Judge()
    other = Question(QUESTION.question, "")
    assert judge(other, TeacherReply("Add: 7")).reason == "unverified"
    judge = Judge(lambda row, rationale, answer: len(rationale) > 1 / (row["level"] - 2 + len(answer) - 1))
    assert judge(QUESTION, TeacherReply("Sum: 70")).reason == "correct"
    assert judge(QUESTION, TeacherReply("7 + 0 =\n#### 7")).reason == "check failed"
    assert judge(QUESTION, TeacherReply("7 + 0 =\n#### 7")).detail == "ZeroDivisionError: division by zero"


def test_the_fingerprint_of_a_verdict() -> None:
    """It depends on the right answer, the test set and the longest reply. With a check, there is none."""
    test = TestQuestions(["a b c"], n=2)
    judges = [Judge(), Judge(test=test), Judge(max_tokens=8), Judge(test=TestQuestions(["a b c"], n=3))]
    prints = {judge.fingerprint(question) for judge in judges for question in (QUESTION, Question("", "8"))}
    assert len(prints) == 8 and Judge().fingerprint(QUESTION) in prints
    assert Judge(lambda row, rationale, answer: True).fingerprint(QUESTION) == ""


def test_load_check() -> None:
    assert load_check("json:dumps") is json.dumps
    for name, message in (
        ("no_such_module:f", "no_such_module"),
        ("json:no", "no attribute"),
        ("json:__doc__", "must be a function"),
    ):
        with pytest.raises(DataError, match=message):
            load_check(name)


def test_distinct() -> None:
    candidates = [Candidate(0, "Add:  it", "7"), Candidate(1, "Add: it", "7"), Candidate(2, "Add: it", "8")]
    assert [c.number for c in distinct(candidates)] == [0, 2]


def test_majority() -> None:
    for answers, chosen in (
        (["5", "7", "5.0", "6"], [0, 2]),
        ([], []),
        (["5"], []),
        (["5", "5", "7", "7.0"], []),
        (["1", "1", "1"], [0, 1, 2]),
    ):
        candidates = [Candidate(number, "so", answer) for number, answer in enumerate(answers)]
        assert [c.number for c in majority(candidates)] == chosen


def test_shortest_and_most_diverse() -> None:
    texts = ["a b c d e f g", "a b c d e f", "a b c d e h", "x y z u v w q p"]
    candidates = [Candidate(number, text, "1") for number, text in enumerate(texts)]
    assert [c.number for c in shortest(candidates, 2)] == [1, 2]
    # Trigrams in common with the shortest (1): of 0, 4 of 5; of 2, 3 of 5; of 3, none.
    assert [c.number for c in most_diverse(candidates, 4)] == [1, 3, 2, 0]
    texts = ["先算苹果的总数再加上梨", "先算苹果的总数再减去梨", "设梨有若干个列方程求解它"]
    candidates = [Candidate(number, text, "1") for number, text in enumerate(texts)]
    assert [c.number for c in most_diverse(candidates, 2)] == [0, 2]
    assert most_diverse(candidates[:1], 3) == candidates[:1] and most_diverse([], 2) == []


def test_commonest() -> None:
    pairs = [("a", ""), ("b", "x"), ("b", "y"), ("c", ""), ("a", "late"), ("a", "")]
    assert commonest(pairs, 2) == ["3 x a (late)", "2 x b (x)"]
