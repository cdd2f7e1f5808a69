"""Answers in replies: where they stand, when two are the same, and that no reply, however nasty, takes long."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotgrpo.data.answers import answers_match, extract_answer, grade
from cotgrpo.data.answers.formulas import may_be_formula
from cotgrpo.data.answers.numerals import numbers
from cotgrpo.data.questions import Question
from cotgrpo.data.rows import parse_row
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.data.triples import Triple, read_triples, triples_in
from cotgrpo.evaluation.accuracy import judge
from cotgrpo.ghosts.self_reply import SampledReply, best_reply
from cotgrpo.teachers.editing import write_pairs
from cotgrpo.teachers.endpoint import TeacherReply
from cotgrpo.teachers.filtering import Judge

SHARED = Path(__file__).parents[3] / "shared" / "data"
FORMULAS = [
    (r"(x+1)^2", r"x^2+2x+1"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\frac{\pi}{2}", r"\pi/2"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("10^2", "100"),
    ("x=5", "5"),
    (r"90^\circ", "90"),
    ("(a+b)^{60}", "(a+b)^{59}(a+b)"),
]
NO_MATCHES = [(r"(x+1)^2", r"x^2+1"), (r"\sqrt{8}", "3"), ("(1,2)", "(2,1)"), (r"\sin(x)", r"\cos(x)")]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # boxes first, the last that is closed and not empty
        (r"So 7. \boxed{42} #### 5 and 3.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed{a{b{c}}d}", "a{b{c}}d"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{5}\boxed{}", "5"),
        (r"\boxed{} 5", "5"),
        (r"\boxed{5", "5"),
        (r"\boxed 5", "5"),
        # then hashes, the last with something behind
        ("1 and 2\n#### 42\nI am 90% sure.", "42"),
        ("####42", "42"),
        ("#### -1,250.50 ", "-1,250.50"),
        ("#### Paris\n", "Paris"),
        ("#### 5\n####\n 7", "5"),
        ("#### 5 #### 6", "5"),
        ("steps\n#### 12\n\nQuestion: next 99 apples", "12"),
        ("steps\n#### 12 apples.\n\nQuestion: next\n#### 99", "12 apples."),
        ("#### $-3\n#### 99", "$-3"),
        ("#### Step 1\nadd\n#### 2. Then\n#### 3) take\n#### .5\n#### 99", ".5"),
        ("#### First, add\n#### Paris\n", "Paris"),
        ("#### \n so 3", "3"),
        # then the last number
        ("The answer is 1,000.", "1,000"),
        ("It costs $1,234.56!", "1,234.56"),
        ("100,000,000 people", "100,000,000"),
        ("1, 2, 3", "3"),
        ("x = -5", "-5"),
        ("(-5)", "-5"),
        ("\N{MINUS SIGN}5", "\N{MINUS SIGN}5"),
        ("-$3.50", "-$3.50"),
        ("5-3", "3"),
        ("5 - 3", "3"),
        ("x-5", "5"),
        ("12%", "12%"),
        (r"12\%", r"12\%"),
        ("50 % of it", "50 %"),
        ("3/4", "3/4"),
        ("1 3/4 cups", "1 3/4"),
        ("1/2/3", "3"),
        ("0.5.", "0.5"),
        ("about .5", ".5"),
        ("1e-3", "1e-3"),
        ("007", "007"),
        ("x = \N{ARABIC-INDIC DIGIT THREE}", "\N{ARABIC-INDIC DIGIT THREE}"),
        # and nothing
        ("no number", None),
        ("", None),
        ("#### #", None),
        (r"\boxed{}", None),
        ("\N{VULGAR FRACTION ONE HALF}", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("predicted", "gold"),
    [
        ("42", "42"),
        ("1,000", "1000.0"),
        ("$1,000", "1000"),
        (r"\$5", "5"),
        ("5€", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("+5", "5"),
        ("0", "-0"),
        ("007", "7"),
        ("5.", "5"),
        ("$5$", "5"),
        (r"\(5\)", "5"),
        ("1/2", "0.5"),
        ("3/6", "1/2"),
        (r"\frac{1}{2}", "0.5"),
        (r"-\dfrac{1}{2}", "-1/2"),
        ("1 1/2", "1.5"),
        (r"1\frac{1}{2}", "3/2"),
        ("25%", "25"),
        ("25%", "0.25"),
        (r"25\%", "25 %"),
        ("1e3", "1000"),
        ("0." + "3" * 400, "0." + "3" * 400 + "0"),
        ("Paris.", " paris"),
        (r"\text{Paris}", "Paris"),
        ("(A)", "a"),
        ("yes  it is", "Yes it is"),
        ("1/0", "1/0"),
    ],
)
def test_answers_that_match(predicted: str, gold: str) -> None:
    assert answers_match(predicted, gold)
    assert answers_match(gold, predicted)


@pytest.mark.parametrize(
    ("predicted", "gold"),
    [
        ("41", "42"),
        ("-5", "5"),
        ("0.33", "1/3"),
        ("25%", "2500%"),
        ("25%", "2500"),
        ("1,00", "100"),
        ("9007199254740993", "9007199254740992"),
        ("", ""),
        (" ", " "),
        ("", "42"),
        ("on", "no"),
        ("true", "yes"),
        ("1/0", "0"),
        ("nan", "42"),
        (r"\Delta", r"\delta"),
        ("5 apples", "6 apples"),
    ],
)
def test_answers_that_do_not_match(predicted: str, gold: str) -> None:
    assert not answers_match(predicted, gold)
    assert not answers_match(gold, predicted)


def test_no_answer_matches_nothing() -> None:
    assert not answers_match(None, "None") and not answers_match(None, "")


@pytest.mark.parametrize(
    ("reply", "gold", "correct", "answer"),
    [
        ("42", "42.0", True, "42"),
        ("The answer is 42.", "42", True, "42"),
        ("It is 7.\n#### 42\nNext question: 9", "42", True, "42"),
        ("Paris", "paris", True, "Paris"),
        ("41", "42", False, "41"),
        ("The answer is 42", "43", False, "42"),
        ("No idea", "42", False, None),
        (None, "None", False, None),
    ],
)
def test_grades(reply: str | None, gold: str, correct: bool, answer: str | None) -> None:
    graded = grade(reply, gold)
    assert (graded.correct, graded.answer) == (correct, answer)
    assert correct or reply is None or all(repr(text) in graded.why for text in (answer or reply, gold))


@pytest.mark.parametrize(("answer", "correct"), [("The answer is 42", True), ("42.0", True), ("It is 41", False)])
def test_one_grade_everywhere(answer: str, correct: bool, tmp_path: Path) -> None:
    """Evaluation, generation, self-replies, edited ghosts and row reading agree on a reply."""
    template = Template(train_tokenizer([], vocab_size=260))
    question, triple = Question("q", "42"), Triple("q", "r", "42")
    ids = np.asarray([*template.ids(f"so<sep>{answer}"), template.eos_id], np.int32)
    assert judge(template, question, ids, True).correct == correct
    assert Judge()(question, TeacherReply(answer, "so")).accepted == correct
    assert (best_reply(template, triple, [SampledReply(ids, -1.0, True)]) is not None) == correct
    row = {"question": "q", "rationale": "r", "answer": answer, "gold": "42"}
    triples, report = triples_in([parse_row(row, "f:1"), parse_row({**row, "question": "p", "correct": True}, "f:2")])
    assert (len(triples) == 2) == correct and report.dropped == ({} if correct else {"wrong answer": 1})
    ghosts = [triple, Triple("p", "r", "1")]
    report = write_pairs(tmp_path / "edit.jsonl", ghosts, {"q": answer, "p": "no"}, rows="wrong")
    assert report.dropped == ({"the student is right": 1} if correct else {})


@given(st.text(max_size=200), st.text(max_size=30))
def test_any_text_raises_nothing(text: str, other: str) -> None:
    answer = extract_answer(text)
    assert answer is None or (answer == answer.strip() != "")
    assert answers_match(text, text) == answers_match(text, text + " ")
    assert answers_match(text, other) in (True, False)


@given(st.integers(-(10**12), 10**12), st.integers(0, 999))
def test_numbers_are_read_as_python_writes_them(whole: int, thousandths: int) -> None:
    for form in (f"{whole}", f"{whole:,}", f"{whole}.{thousandths:03}", f"{whole:,}.{thousandths:03}"):
        reply = f"First 12, then 7: the answer is {form}."
        assert extract_answer(reply) == form
        plain = form.replace(",", "")
        assert numbers(form) == numbers(plain) and float(numbers(form)[0]) == float(plain)
        assert answers_match(extract_answer(reply), plain)


LENGTH = 100_000
NASTY = {
    unit if len(unit) < 20 else f"{unit[:9]}...{len(unit)}": (unit * LENGTH)[:LENGTH]
    for unit in [
        *"1 ,./-+$%#\\{}()[]^'\"e\n",
        *("1,", "1/", "1 ", "1.", ".1", "-1", "1e", "1e9", "1^", "$-", "100,", "1 1/1 ", "#### ", "a#", "\\$", "1%"),
        *("**", "**1** ", "is **a", " since", "between 1 and ", "not 1", "1 to ", "两个半", "三分之", "0.\\bar{1}"),
        *(r"\boxed{", r"\boxed{1}", r"\boxed ", r"\frac{1}{2}", r"\text{", r"\boxed" + " " * 300, r"\frac" + " " * 300),
        *("####" + " " * 500, "####a" + " " * 500, "\N{MINUS SIGN}", "\N{ARABIC-INDIC DIGIT THREE}"),
    ]
} | {
    "boxes in boxes": r"\boxed{" * 12_000 + "}" * 12_000,
    "a broken group at the end": "100," * 25_000 + "1000",
    "one large box": r"\boxed{" + "1" * LENGTH + "}",
    "in dollars": "$" + "a" * LENGTH + "$",
    "a long fraction": "1/" + "1" * LENGTH,
}


@pytest.mark.parametrize("kind", NASTY)
def test_long_replies_are_fast(kind: str) -> None:
    text = NASTY[kind]
    extract_answer("7"), answers_match("x^2", "x+1")  # what is loaded once
    start = time.perf_counter()
    answer = extract_answer(text)
    answers_match(answer, "42")
    answers_match(text, "42")
    answers_match(text, text[:-1])
    assert time.perf_counter() - start < 2  # 0.2 s at most on an idle core


@pytest.mark.parametrize(("predicted", "gold"), FORMULAS)
def test_formulas(predicted: str, gold: str) -> None:
    assert answers_match(predicted, gold)
    assert answers_match(rf"\({predicted}\)", f"${gold}$")


@pytest.mark.parametrize(("predicted", "gold"), NO_MATCHES)
def test_other_formulas(predicted: str, gold: str) -> None:
    assert not answers_match(predicted, gold)


def in_a_thread(predicted: str, gold: str, seconds: float) -> bool:
    """What `answers_match` says off the main thread, where no signal can stop it."""
    results: list[bool | BaseException] = []

    def work() -> None:
        try:
            results.append(answers_match(predicted, gold))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"{predicted!r} took more than {seconds} s"
    assert isinstance(results[0], bool), results[0]
    return results[0]


def test_off_the_main_thread() -> None:
    for pairs, expected in ((FORMULAS, True), (NO_MATCHES, False)):
        for predicted, gold in pairs:
            assert in_a_thread(predicted, gold, 20) is expected, (predicted, gold)


@pytest.mark.parametrize(
    "formula",
    [
        "9^9^9^9",
        "9^{9^{9}}",
        "(99^{999})^{99}",
        "(a+b+c+d)^{200}",
        "(a+b+c)^{9}(d+f+g)^{9}",
        r"\frac{1}{x+" * 20 + "2" + "}" * 20,
        "".join(f"1/({letter}+" for letter in "abcdfghjk") + "y" + ")" * 9,
        "1000!",
        "99!!",
        "(" * 99 + "1" + ")" * 99,
        r"\sqrt{2+" * 20 + "2" + "}" * 20,
        r"\sum_{n=1}^{99999999} n",
        r"\binom{99999}{5000}",
        r"\int_0^1 x^x dx",
        "1 1/1 " * 30,
    ],
)
def test_hostile_formulas_end(formula: str) -> None:
    """Off the main thread no timeout stops them: what could take hours is never worked out."""
    assert in_a_thread(formula, "x^2+1", 20) is False


def test_prose_is_no_formula() -> None:
    for text in ("the answer is 5", "Paris", r"\text{five} apples", "", "x" * 300):
        assert not may_be_formula(text)
    for text in ("x+1", r"\frac{a}{b}", "2", r"\sin(x)", "log(x)", r"5\text{ metres}"):
        assert may_be_formula(text)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")
@pytest.mark.parametrize("name", ["gsm8k_train", "svamp_palm540b", "svamp_llama3_chatqa_8b", "mwp_train"])
def test_real_answers(name: str) -> None:
    """Every answer of a teacher against the gold one says what the file's `correct` says."""
    rows = [json.loads(line) for line in (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    for row in rows:
        predicted = None if row["answer"] is None else str(row["answer"])
        gold = str(row["gold"])
        assert answers_match(predicted, gold) == grade(predicted, gold).correct == row["correct"], row


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")
def test_real_replies() -> None:
    """The answer is found in a whole reply, written after hashes, in a box, or as the last words."""
    triples, _ = read_triples(SHARED / "gsm8k_train.jsonl")
    for t in triples:
        for end in (f"\n#### {t.answer}", rf" So it is $\boxed{{{t.answer}}}$.", f" The answer is {t.answer}."):
            assert answers_match(extract_answer(t.rationale + end), t.answer), (t.source, end)
