"""Layouts of public data sets, each read as it is; what is noted of rows with two sources of one field; own columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cotgrpo.cli import main
from cotgrpo.config import Config, ConfigError, DataConfig, GenerateConfig, parse_config, parse_settings, save_config
from cotgrpo.data.layouts.chats import parse_chat
from cotgrpo.data.layouts.own import OwnLayout
from cotgrpo.data.questions import question_of, read_questions
from cotgrpo.data.rows import parse_row
from cotgrpo.data.sources import DataError
from cotgrpo.data.triples import read_triples, triple_of
from cotgrpo.training.inputs import check_same_run

Q, S = "A hen lays 3 eggs a day. How many in 4 days?", "3 eggs times 4 days is 3*4=12 eggs."
BOX, THOUGHT = S + " So $\\boxed{12}$.", f"<think>\n{S}\n</think>\n\n"
ZH_Q, ZH_S = "一只母鸡每天下3个蛋，4天一共下多少个？", "3×4=12，所以一共下12个蛋。"
USER, GPT = {"from": "human", "value": Q}, "gpt"


def chat(*contents: object, **reply: object) -> list[dict[str, object]]:
    """A chat of user and assistant in turns; the last message has the fields of `reply` too."""
    messages: list[dict[str, object]] = [
        {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)
    ]
    messages[-1] |= reply
    return messages


LAYOUTS: dict[str, tuple[dict[str, Any], tuple[str, str, str, str]]] = {
    "GSM8K": ({"question": Q, "answer": f"{S}\n#### 12"}, (Q, S, "12", "")),
    "MATH": ({"problem": Q, "level": "Level 1", "type": "Algebra", "solution": BOX}, (Q, BOX, "12", "")),
    "MATH-500": (
        {"problem": Q, "solution": BOX, "answer": "12", "subject": "Algebra", "level": 2, "unique_id": "a/1.json"},
        (Q, BOX, "12", ""),
    ),
    "NuminaMath-CoT": ({"source": "cn", "problem": Q, "solution": BOX, "messages": chat(Q, BOX)}, (Q, BOX, "12", "")),
    "NuminaMath-1.5": (
        {"problem": Q, "solution": S, "answer": "12", "question_type": "word", "source": "cn", "synthetic": False},
        (Q, S, "12", ""),
    ),
    "OpenR1-Math": (
        {"problem": Q, "solution": S, "answer": "12", "messages": chat(Q, f"{THOUGHT}So \\boxed{{12}}")},
        (Q, S, "12", "12"),
    ),
    "OpenR1-Math generations": (
        {
            "problem": Q,
            "answer": "12",
            "generations": ["<think>3+4</think>\\boxed{7}", f"{THOUGHT}So \\boxed{{12}}"],
            "correctness_math_verify": [False, True],
        },
        (Q, S, "12", "12"),
    ),
    "OpenThoughts": (
        {
            "system": "",
            "conversations": [
                {"from": "user", "value": Q},
                {
                    "from": "assistant",
                    "value": f"<|begin_of_thought|>\n\n{S}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nIt is "
                    "\\boxed{12}.\n\n<|end_of_solution|>",
                },
            ],
        },
        (Q, S, "12", ""),
    ),
    "OpenThoughts metadata": (
        {
            "problem": Q,
            "deepseek_reasoning": S,
            "deepseek_solution": "So \\boxed{12}",
            "ground_truth_solution": BOX,
            "domain": "math",
            "source": "cn",
        },
        (Q, S, "12", "12"),
    ),
    "ShareGPT": (
        {"id": "1", "conversations": [USER, {"from": "gpt", "value": f"{THOUGHT}12"}]},
        (Q, S, "12", ""),
    ),
    "Firefly": ({"conversation": [{"human": Q, "assistant": f"{S}\n#### 12"}]}, (Q, S, "12", "")),
    "LIMA": ({"conversations": [Q, f"{S}\n#### 12"]}, (Q, S, "12", "")),
    "OpenMathInstruct-1": (
        {"question": Q, "generated_solution": BOX, "expected_answer": "12", "is_correct": True, "dataset": "gsm8k"},
        (Q, BOX, "12", "12"),
    ),
    "OpenMathInstruct-2": (
        {"problem": Q, "generated_solution": BOX, "expected_answer": "12", "problem_source": "math"},
        (Q, BOX, "12", "12"),
    ),
    "OpenMathReasoning": (
        {"problem": Q, "generated_solution": f"{THOUGHT}\\boxed{{12}}", "expected_answer": "12", "pass_rate": "0.9"},
        (Q, S, "12", "12"),
    ),
    "s1K": (
        {"solution": "12", "question": Q, "cot": None, "thinking_trajectories": [S], "attempt": "The answer is 12."},
        (Q, S, "12", "12"),
    ),
    "s1K-1.1": (
        {
            "solution": BOX,
            "question": Q,
            "deepseek_thinking_trajectory": S,
            "deepseek_attempt": "So \\boxed{12}.",
            "gemini_thinking_trajectory": "Other.",
        },
        (Q, S, "12", "12"),
    ),
    "Alpaca": ({"instruction": Q, "input": "", "output": f"{S}\n#### 12"}, (Q, S, "12", "")),
    "Alpaca with input": (
        {"instruction": "Multiply.", "input": "3 and 4", "output": f"{S}\n#### 12"},
        ("Multiply.\n\n3 and 4", S, "12", ""),
    ),
    "MetaMathQA": (
        {"type": "GSM_Rephrased", "query": Q, "original_question": "Hens?", "response": f"{S} The answer is: 12"},
        (Q, f"{S} The answer is: 12", "12", ""),
    ),
    "Orca-Math": ({"question": Q, "answer": f"{S} The hen lays 12 eggs."}, (Q, f"{S} The hen lays 12 eggs.", "12", "")),
    "DAPO-Math": (
        {
            "data_source": "math_dapo",
            "prompt": chat(Q),
            "ability": "MATH",
            "reward_model": {"ground_truth": "12", "style": "rule"},
            "extra_info": {"index": "9"},
        },
        (Q, "", "", "12"),
    ),
    "verl GSM8K": (
        {
            "prompt": chat(Q),
            "reward_model": {"style": "rule", "ground_truth": "12"},
            "extra_info": {"answer": f"{S}\n#### 12", "index": 0, "question": Q, "split": "train"},
        },
        (Q, "", "", "12"),
    ),
    "ape210k": (
        {"id": "7", "segmented_text": "一 只", "original_text": ZH_Q, "ans": "12", "equation": "x=3*4"},
        (ZH_Q, "x=3*4", "12", ""),
    ),
    "Calc-ape210k": (
        {"id": "7", "question": Q, "question_chinese": ZH_Q, "result": "12", "equation": "x=3*4"},
        (Q, "x=3*4", "12", ""),
    ),
    "Math23K": ({"id": "1", "original_text": ZH_Q, "equation": "x=3*4", "ans": "12"}, (ZH_Q, "x=3*4", "12", "")),
    "BELLE": ({"instruction": ZH_Q, "input": "", "output": ZH_S}, (ZH_Q, ZH_S, "12", "")),
    "CMATH": ({"question": ZH_Q, "golden": "12", "reasoning_step": 1, "grade": 3}, (ZH_Q, "", "", "12")),
    "Chinese R1": (
        {"input": ZH_Q, "reasoning_content": ZH_S, "content": "答案是 \\boxed{12}。", "score": 10},
        (ZH_Q, ZH_S, "12", ""),
    ),
    "Chinese names": ({"题目": ZH_Q, "解析": ZH_S, "答案": "12"}, (ZH_Q, ZH_S, "12", "")),
    "Chinese names with a reply": (
        {"问题": ZH_Q, "思考过程": ZH_S, "回答": "所以是\\boxed{12}", "答案": "12"},
        (ZH_Q, ZH_S, "12", "12"),
    ),
    "C-Eval": (
        {"id": 0, "question": Q, "A": "7", "B": "12", "C": "34", "D": "43", "answer": "B", "explanation": S},
        (f"{Q}\nA. 7\nB. 12\nC. 34\nD. 43", S, "B", ""),
    ),
    "TAL-SCQ": (
        {
            "problem": Q,
            "answer_option_list": [[{"aoVal": "A", "content": "7 "}], [{"aoVal": "B", "content": "12 "}]],
            "answer_analysis": [S],
            "answer_value": "B",
        },
        (f"{Q}\nA. 7\nB. 12", S, "B", ""),
    ),
    "GAOKAO-Bench": (
        {"question": f"{Q}\nA. 7 B. 12", "answer": ["B"], "analysis": S, "score": 5},
        (f"{Q}\nA. 7 B. 12", S, "B", ""),
    ),
    "AQuA-RAT": (
        {"question": Q, "options": ["A)7", "B)12", "C)34"], "rationale": S, "correct": "B"},
        (f"{Q}\nA)7\nB)12\nC)34", S, "B", ""),
    ),
    "ARC": (
        {"question": Q, "choices": {"text": ["seven", "twelve"], "label": ["A", "B"]}, "answerKey": "B"},
        (f"{Q}\nA. seven\nB. twelve", "", "B", ""),
    ),
    "MMLU": (
        {"question": Q, "choices": ["seven", "twelve", "ten", "one"], "answer": 1},
        (f"{Q}\nA. seven\nB. twelve\nC. ten\nD. one", "", "B", ""),
    ),
    "SVAMP": (
        {"ID": "c-1", "Body": "A hen lays 3 eggs.", "Question": "In 4 days?", "Equation": "( 3 * 4 )", "Answer": "12"},
        ("A hen lays 3 eggs. In 4 days?", "( 3 * 4 )", "12", ""),
    ),
    "ASDiv": (
        {"body": "A hen lays 3 eggs.", "question": "In 4 days?", "answer": "12 (eggs)", "formula": "3*4=12"},
        ("A hen lays 3 eggs. In 4 days?", "3*4=12", "12 (eggs)", ""),
    ),
    "CoT-Collection": ({"source": Q, "target": "12", "rationale": S, "task": "gsm8k"}, (Q, S, "12", "")),
    "Dolly": (
        {"instruction": "How many?", "context": Q, "response": S, "category": "qa"},
        (f"How many?\n\n{Q}", S, "12", ""),
    ),
    "DeepMath": (
        {"question": Q, "final_answer": "12", "topic": "x", "r1_solution_1": f"{THOUGHT}\\boxed{{12}}"},
        (Q, S, "12", "12"),
    ),
    "Dolphin-R1": (
        {"messages": [{"role": "system", "content": "s"}, *chat(Q)], "reasoning": S, "answer": "So \\boxed{12}."},
        (Q, S, "12", ""),
    ),
    "TRL text": ({"prompt": Q, "completion": f"{THOUGHT}12"}, (Q, S, "12", "")),
    "TRL messages": (
        {"prompt": chat(Q), "completion": [{"role": "assistant", "content": f"{THOUGHT}12"}]},
        (Q, S, "12", ""),
    ),
    "TRL preference": ({"prompt": Q, "chosen": f"{S}\n#### 12", "rejected": "7"}, (Q, S, "12", "")),
    "TRL preference of chats": ({"chosen": chat(Q, f"{S}\n#### 12"), "rejected": chat(Q, "7")}, (Q, S, "12", "")),
    "content parts": (
        {
            "messages": chat(
                [{"type": "text", "text": Q}], [{"type": "thinking", "thinking": S}, {"type": "text", "text": "12"}]
            )
        },
        (Q, S, "12", ""),
    ),
    **{
        f"message with {field}": ({"messages": chat(Q, "It is 12.", **{field: S})}, (Q, S, "12", ""))
        for field in ("reasoning_content", "reasoning", "thinking")
    },
    "case and separators": ({"QUESTION": Q, "Reasoning Content": S, "final-answer": 12}, (Q, S, "12", "")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_load_as_they_are(name: str) -> None:
    row, (question, rationale, answer, gold) = LAYOUTS[name]
    parsed = parse_row(row, "f:1")
    assert (parsed.question, parsed.rationale, parsed.answer, parsed.gold) == (question, rationale, answer, gold)
    asked = question_of(parsed)
    assert asked.gold == (gold or answer) and parsed.grade.correct and not parsed.context
    if rationale:
        assert triple_of(parsed).rationale == rationale and asked.reference == triple_of(parsed)
    else:
        with pytest.raises(DataError, match=r"f:1: no (rationale|reply to train on): "):
            triple_of(parsed)


def test_a_layout_through_a_file(tmp_path: Path) -> None:
    """All of them in one file, since rows of one file may differ."""
    rows = [row for row, (_, rationale, _, _) in LAYOUTS.values() if rationale]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    triples, report = read_triples(path, deduplicate=False)
    assert len(triples) == len(rows) == report.kept and not any(t.verbatim or t.context for t in triples)
    questions, _ = read_questions(path)
    assert {question.gold for question in questions} == {"12", "B", "12 (eggs)"}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


NOTED: list[tuple[dict[str, Any], str]] = [
    (
        {"problem": Q, "solution": "Human.", "answer": "12", "messages": chat(Q, f"{THOUGHT}12")},
        "messages and solution in one row: messages is the reply, solution is not used",
    ),
    (
        {"problem": "Other?", "messages": chat(Q, f"{THOUGHT}12")},
        "the chat and problem in one row: the question is the chat's, problem is not used",
    ),
    ({"question": Q, "prompt": "x", "answer": "r #### 1"}, "question and prompt in one row: question is the question"),
    ({"question": Q, "response": "r #### 1", "output": "s #### 2"}, "response is the reply, output is not used"),
    (
        {"messages": chat(Q, "r #### 1"), "conversations": [USER, {"from": "gpt", "value": "s #### 2"}]},
        "messages and conversations in one row: messages is the reply",
    ),
    (
        {"messages": chat(Q, "r #### 1"), "chosen": [{"role": "assistant", "content": "s #### 2"}]},
        "messages and chosen in one row: messages is the reply",
    ),
    ({"question": Q, "answer": "r #### 1", "image": {"path": "x.png"}}, "an image in the row, which is not read"),
    ({"question": Q, "rationale": S, "solution": "t", "answer": "12"}, "rationale is the rationale, solution is not"),
    ({"question": Q, "solution": BOX, "answer": "13"}, "the box in solution is not answer, which is trained"),
    ({"question": Q, "reasoning": "Other.", "response": f"{THOUGHT}12"}, "two thoughts in one row: that in response"),
    ({"system": "a", "messages": [{"role": "system", "content": "b"}, *chat(Q, "r #### 1")]}, "two system messages"),
    ({"question": Q, "response": "r #### 12", "answer": f"{S}\nIt is 12 eggs."}, "gold read from prose"),
    ({"question": Q, "response": f"{S} It is 12 eggs."}, "answer read from prose"),
]


@pytest.mark.parametrize(("row", "what"), NOTED)
def test_two_sources_of_one_field_are_counted_and_named(row: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", row, LAYOUTS["GSM8K"][0], row | {"id": "2"})
    _, report = read_triples(path, deduplicate=False)
    (noted,) = report.noted
    assert what in noted and report.noted[noted] == 2 and report.kept == 3
    assert [place.startswith(f"{path}:{line}") for place, line in zip(report.examples[noted], (1, 3), strict=True)]
    assert f"2 noted, {noted}: {path}:1" in str(report) and report.to_dict()["noted"] == report.noted


def test_an_answer_that_is_not_the_gold_is_noted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"question": Q, "answer": "7", "gold": "12"})
    (question,), report = read_questions(path)
    assert question.gold == "12" and report.noted == {"answer and gold differ: gold is the right answer": 1}


SILENT: list[dict[str, Any]] = [
    {"messages": chat(Q, "r #### 1"), "conversations": [USER, {"from": "gpt", "value": "r #### 1 "}], "images": []},
    {"prompt": Q, "chosen": chat(Q, "r #### 1"), "messages": chat(Q, "r #### 1"), "rejected": chat(Q, "no")},
    LAYOUTS["NuminaMath-CoT"][0],
    {"prompt": Q, "messages": chat(Q, "12 it is", "And twice?", "24")},
    {"question": Q, "problem": f" {Q}", "answer": "r #### 1", "gold": "1.0"},
    {"question": Q, "solution": BOX, "answer": "12.0"},
]


@pytest.mark.parametrize("row", SILENT)
def test_equal_sources_are_not_noted(row: dict[str, Any]) -> None:
    assert parse_row(row, "f:1").notes == ()


def test_a_right_answer_beside_a_reply(tmp_path: Path) -> None:
    """The reply's own answer never replaces it, so a mistake is known as one."""
    for reply in ({"response": "<think>3 and 4.</think>7"}, {"messages": chat(Q, "<think>3 and 4.</think>7")}):
        for right in (
            {"answer": "12"},
            {"gold": 12},
            {"reward_model": {"ground_truth": "12"}},
            {"Expected Answer": "12"},
        ):
            path = jsonl(tmp_path / "rows.jsonl", {"question": Q} | reply | right, LAYOUTS["GSM8K"][0])
            triples, report = read_triples(path)
            assert [t.answer for t in triples] == ["12"] and report.dropped == {"wrong answer": 1}
            assert report.examples["wrong answer"][0].startswith(f"{path}:1: '7', gold ")
            (mistake, _), _ = read_triples(path, keep_incorrect=True)
            (question, _), _ = read_questions(path)
            assert mistake.answer == "7" and question.gold == "12" and question.reference is None


def test_right_answers_that_disagree(tmp_path: Path) -> None:
    row = {"question": Q, "response": "r #### 12", "answer": "13", "gold": "12"}
    path = jsonl(tmp_path / "rows.jsonl", row, row | {"answer": "12.0"})
    message = "rows.jsonl:1: two right answers disagree: 'gold' has '12', 'answer' has '13'.*{gold: gold}"
    with pytest.raises(DataError, match=message):
        read_triples(path)
    assert read_triples(path, bad_rows="drop")[1].dropped == {"bad row": 1}
    assert len(read_triples(path, columns={"gold": "gold"}, deduplicate=False)[0]) == 2


def test_a_right_answer_that_is_prose(tmp_path: Path) -> None:
    solution = "We add 11 and 20 first.\nThen the sum of both is 31. Therefore the answer is 31."
    path = jsonl(tmp_path / "rows.jsonl", {"question": "11 + 20?", "answer": solution})
    (question,), report = read_questions(path)
    assert question.gold == "31" and report.noted == {"gold read from prose": 1}
    assert f"1 noted, gold read from prose: {path}:1: '31' of 'We add 11 and 20" in str(report)
    for text, gold in (
        ("A hen lays 12 eggs.", "12"),
        ("It is 12 in all.", "12"),
        ("Paris", "Paris"),
        ("It is in Paris.", "It is in Paris."),
    ):
        jsonl(path, {"question": Q, "response": f"{S}\n#### {gold}", "answer": text})
        (question,), _ = read_questions(path)
        assert question.gold == gold and question.reference is not None
    proof = "Let the sum be even. " * 20 + "\nThen the claim follows."
    for row in ({"answer": proof}, {"gold": proof}, {"response": "r #### 12", "answer": proof}):
        jsonl(path, {"question": Q} | row)
        (question,), _ = read_questions(path, need_gold=False)
        assert (
            question.gold == "" and f"{path}:1: field '{list(row)[-1]}' is the right answer, but no" in question.no_gold
        )
        with pytest.raises(DataError, match=r"no answer is found in it: 'Let the sum .*Write the answer alone"):
            read_questions(path)
        with pytest.raises(DataError, match=r"rows.jsonl:1: "):
            read_triples(path)


def test_a_number_in_prose_or_code_is_not_the_answer() -> None:
    code = "Use this:\n```python\nprint(7)\n```\nIt runs in O(n^2)."
    advice = "There are 3 good reasons to do so.\nThey are cheap, they are quick and they last.\nTry them at once."
    for text in (code, advice):
        triple = triple_of(parse_row({"question": Q, "response": f"{THOUGHT}{text}"}, "f:1"))
        assert (triple.rationale, triple.answer) == (S, text)
        assert "f:1: no rationale" in parse_row({"question": Q, "response": text}, "f:1").not_a_triple


def test_history_is_context() -> None:
    row = {"instruction": "And in 5 days?", "input": "", "output": "15.", "system": "s", "history": [[Q, "12"]]}
    triple = triple_of(parse_row(row, "f:1"))
    assert triple.context == tuple(chat(Q, "12", "And in 5 days?")) and triple.verbatim and triple.system == "s"
    assert parse_row(row | {"history": [], "output": "r #### 15"}, "f:1").context == ()


def test_messages_in_other_forms() -> None:
    """As JSON text, and as one list a field; a column of another kind with such a name is not a chat."""
    said = chat(Q, f"{S}\n#### 12")
    for messages in (json.dumps(said), {"role": ["user", "assistant"], "content": [m["content"] for m in said]}):
        assert parse_row({"messages": messages}, "f:1").answer == "12"
    assert (
        parse_row(LAYOUTS["GSM8K"][0] | {"turns": 2, "chat": "no", "options": {"temperature": 1}}, "f:1").question == Q
    )


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["Ants", "Bees"], "A. Ants\nB. Bees"),
        (["A. ants", "B. bees"], "A. ants\nB. bees"),
        (["(A) ants", "(B) bees"], "(A) ants\n(B) bees"),
        ({"A": "ants", "B": "bees"}, "A. ants\nB. bees"),
        ("A) ants B) bees", "A) ants B) bees"),
        ([str(i) for i in range(12)], "\n".join(f"{mark}. {i}" for i, mark in enumerate("ABCDEFGHIJKL"))),
    ],
)
def test_options_are_lines_of_the_question(options: Any, lines: str) -> None:
    row = {"question": "Which?", "options": options, "answer": "B"}
    assert parse_row(row, "f:1").question == f"Which?\n{lines}"
    assert parse_row(row | {"question": f"Which?\n{lines}\n"}, "f:1").question == f"Which?\n{lines}"


@pytest.mark.parametrize(
    "row",
    [
        {"reasoning": S, "answer": "<think>Again.</think>12"},
        {"rationale": f"<think>{S}</think>", "answer": "12"},
        {"solution": f"{THOUGHT}So \\boxed{{12}}", "answer": "12"},
        {"reasoning": S, "solution": "So \\boxed{12}."},
        {"reasoning": S, "response": f"{THOUGHT}12"},
    ],
)
def test_marks_of_a_thought_are_never_trained_as_text(row: dict[str, Any]) -> None:
    triple = triple_of(parse_row({"question": Q} | row, "f:1"))
    assert (triple.rationale, triple.answer) == (S, "12")


def test_half_a_character_in_an_earlier_turn(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl")
    path.write_text(json.dumps({"messages": chat("a\ud83d", "b", Q, "12")}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:1: 'messages' holds half a surrogate pair"):
        read_triples(path)


def test_steps_in_a_list_are_lines() -> None:
    assert parse_row({"question": Q, "thoughts": ["3*4", "= 12"], "answer": "12"}, "f:1").rationale == "3*4\n= 12"


TURNS = chat("Hi", "Hello!", Q, f"{THOUGHT}12 eggs, I think.")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}


def test_chats_of_several_turns() -> None:
    row = parse_row({"messages": [{"role": "developer", "content": "Be kind."}, *TURNS]}, "f:1")
    triple = triple_of(row)
    assert (triple.system, triple.question, triple.rationale) == ("Be kind.", Q, "")
    assert triple.verbatim and triple.answer == TURNS[-1]["content"] and triple.context == tuple(TURNS[:-1])
    question = question_of(row)
    assert question.context == triple.context and question.reference == triple
    prompt = question_of(parse_row({"prompt": TURNS[:-1], "answer": "12"}, "f:1"))
    assert (prompt.context, prompt.question, prompt.gold) == (triple.context, Q, "12")


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "reasoning_details"])
def test_a_thought_in_a_field_of_a_last_turn(field: str) -> None:
    for thought in (S, [S], [{"type": "reasoning.text", "text": S}]):
        row = parse_row({"messages": chat("Hi", "Hello!", Q, "12", **{field: thought})}, "f:1")
        assert row.answer == f"{THOUGHT}12" and row.verbatim


def test_a_last_turn_that_never_ends_its_thought(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"messages": chat("Hi", "Hello!", Q, "<think>3 times")}, {"messages": TURNS})
    with pytest.raises(DataError, match=r"rows.jsonl:1: the thought in 'messages' never ends"):
        read_triples(path)
    assert len(read_triples(path, bad_rows="drop")[0]) == 1


def test_a_last_turn_without_an_answer_is_held_out_as_a_whole(tmp_path: Path) -> None:
    """A corpus of chats can be trained: some of it is held out for the loss."""
    talk = "You could take a walk in the park, since the weather is good. Or you read.\nTell me which you like more."
    path = jsonl(tmp_path / "rows.jsonl", {"messages": chat("Hi", "Hello!", "What now?", talk)})
    (question,), report = read_questions(path)
    assert question.gold == talk and question.reference is not None
    assert report.noted == {"a reply without a final answer is compared as a whole": 1}
    assert read_questions(path, need_gold=False)[0][0].gold == ""
    jsonl(path, {"question": "What now?", "response": f"{THOUGHT}{talk}"})
    (question,), report = read_questions(path)
    assert question.gold == talk and len(report.noted) == 1


def test_tools_are_context() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    said = [{"role": "user", "content": Q}, CALL, {"role": "tool", "content": "12", "name": "f"}]
    for given in (tools, json.dumps(tools)):
        triple = triple_of(
            parse_row({"messages": [*said, {"role": "assistant", "content": "12"}], "tools": given}, "f:1")
        )
        assert triple.tools == tuple(tools) and triple.context[1] == CALL | {"content": ""} and triple.verbatim
        assert [m["role"] for m in triple.context] == ["user", "assistant", "tool"]
    one = triple_of(parse_row({"messages": chat(Q, "Done."), "tools": tools}, "f:1"))
    assert one.context == tuple(chat(Q)) and one.verbatim and one.answer == "Done."
    assert parse_row({"messages": chat(Q, "r #### 1"), "tools": []}, "f:1").context == ()
    with pytest.raises(DataError, match="f:1: the last message of 'messages' calls a tool"):
        parse_row({"messages": [said[0], CALL]}, "f:1")
    with pytest.raises(DataError, match="f:1: 'tools' must be a list of JSON schemas"):
        parse_row({"messages": chat(Q, "12"), "tools": "f"}, "f:1")


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("user", "human", "Human", "prompter", "USER"), "user"),
        (("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
        (("tool", "function", "observation", "ipython"), "tool"),
        (("system", "developer"), "system"),
    ],
)
def test_roles(names: tuple[str, ...], role: str) -> None:
    for name in names:
        for keys in (("role", "content"), ("from", "value")):
            turns = [dict(zip(keys, pair, strict=True)) for pair in (("user", "a"), (name, "b"), ("user", "c"))]
            assert parse_chat(turns, None, "f:1").context[1] == {"role": role, "content": "b"}


def test_calls_of_a_chat_of_from_and_value() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [("human", Q), ("function_call", json.dumps(call)), ("observation", "12"), ("gpt", "It is 12.")]
    chat = parse_chat([{"from": a, "value": b} for a, b in turns], None, "f:1")
    calls = [{"type": "function", "function": call}]
    assert chat.context[1] == {"role": "assistant", "content": "", "tool_calls": calls}
    assert chat.context[2] == {"role": "tool", "content": "12"} and chat.reply == "It is 12."


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "audio"}, 5])
def test_parts_that_are_not_text(part: object) -> None:
    with pytest.raises(DataError, match=r"f:1: 'messages' message 1: a part of type .* without text: only text"):
        parse_row({"messages": chat([{"type": "text", "text": "See"}, part], "12")}, "f:1")


UNKNOWN = {"q": Q, "meta": {"steps": S, "results": ["7", "12"]}, "note": "n"}
COLUMNS = {"question": "q", "rationale": "meta.steps", "answer": "meta.results.1"}


def test_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", UNKNOWN, {"question": Q, "answer": f"{S}!\n#### 12"})
    (mapped, known), _ = read_triples(path, columns=COLUMNS)
    assert (mapped.question, mapped.rationale, mapped.answer, known.answer) == (Q, S, "12", "12")
    (one, _), _ = read_questions(path, columns=COLUMNS)
    assert one.gold == "12" and one.row == UNKNOWN
    with pytest.raises(DataError, match=r"data.columns.rationale: no row has a column 'stepz'; .*q, meta, note"):
        read_triples(path, columns=COLUMNS | {"rationale": "stepz"}, bad_rows="drop")
    with pytest.raises(DataError, match=r"data.columns.gold: no row has a column 'nota'.*Did you mean 'note'"):
        read_questions(path, columns=COLUMNS | {"gold": "nota"})
    with pytest.raises(DataError, match=r"columns maps 'anwser': expected one of .*Did you mean 'answer'"):
        read_triples(path, columns={"anwser": "note"})


def test_columns_replace_what_means_the_same() -> None:
    row = {
        "question": "no",
        "solution": "no",
        "messages": chat("no", "no"),
        "text": Q,
        "why": S,
        "what": "12",
        "gold": 12,
    }
    parsed = parse_row(row, "f:1", OwnLayout({"question": "text", "rationale": "why", "answer": "what"}, ""))
    assert (parsed.question, parsed.rationale, parsed.answer, parsed.gold, parsed.notes) == (Q, S, "12", "12", ())


def test_an_unknown_layout_shows_the_setting(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"my_q": Q, "steps": S, "the_final": "12"})
    with pytest.raises(DataError, match="the row has my_q, steps, the_final") as error:
        read_triples(path)
    setting = str(error.value).partition("--data.columns '")[2].partition("'")[0]
    assert setting == "{question: my_q, answer: the_final}"
    (question,), _ = read_questions(path, columns=parse_config(["--data.columns", setting]).data.columns)
    assert (question.question, question.gold) == (Q, "12")
    with pytest.raises(DataError, match=r"One column 'text' does not say where the reply begins.*data.row_function"):
        read_triples(jsonl(path, {"text": f"{Q} {S}"}))


FUNCTIONS = """
def read(row):
    if row["kind"] == "skip":
        return None
    return {"question": row["x"]["q"], "answer": row["x"]["a"]}

def fail(row):
    return row["none"]

def text(row):
    return "text"

number = 5
"""


def test_row_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rows_of_a_test.py").write_text(FUNCTIONS, encoding="utf-8")
    rows = [{"kind": "a", "x": {"q": Q, "a": f"{S}\n#### 12"}}, {"kind": "skip"}, {"kind": "a", "split": "test"}]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    (triple,), report = read_triples(path, split="train", row_function="own_rows_of_a_test:read")
    assert (triple.question, triple.answer, triple.source) == (Q, "12", f"{path}:1")
    assert report.dropped == {"row_function returned None": 1, "other split": 1}
    for name, message in (
        ("fail", r"rows.jsonl:1: data.row_function own_rows_of_a_test:fail failed \(KeyError: 'none'\)"),
        ("text", r"rows.jsonl:1: data.row_function .* must return a row \(a dict\) or None, got str"),
        ("number", "data.row_function: own_rows_of_a_test:number must be a function, got a int"),
        ("none", "data.row_function: own_rows_of_a_test:none cannot be loaded"),
    ):
        with pytest.raises(DataError, match=message):
            read_triples(path, row_function=f"own_rows_of_a_test:{name}")
    with pytest.raises(DataError, match=r"data.row_function: no_such_module_of_a_test:f cannot be loaded"):
        read_triples(path, row_function="no_such_module_of_a_test:f")


def test_settings(tmp_path: Path) -> None:
    """From the command line and from YAML, for a run and for `generate`."""
    given: Mapping[str, str] = {"question": "q", "gold": "reward.truth"}
    config = parse_config(["--data.columns", "{question: q, gold: reward.truth}", "--data.row_function", "a.b:c"])
    assert config.data.columns == given and config.data.row_function == "a.b:c"
    save_config(config, tmp_path / "run.yaml")
    assert parse_config(["--config", str(tmp_path / "run.yaml")]) == config != Config()
    generate = parse_settings(["--columns", "{question: q, gold: reward.truth}"], GenerateConfig())
    assert generate.columns == given
    save_config(generate, tmp_path / "generate.yaml")
    assert parse_settings(["--config", str(tmp_path / "generate.yaml")], GenerateConfig()) == generate
    for arguments, message in (
        (["--data.columns", "{quest: q}"], "data.columns maps 'quest': expected one of .*Did you mean 'question'"),
        (["--data.columns", "{question: ''}"], "data.columns.question is empty"),
        (["--data.columns", "q"], "data.columns"),
        (["--data.row_function", "f"], "data.row_function must be package.module:function, got 'f'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(arguments)


def test_own_columns_are_part_of_a_run(tmp_path: Path) -> None:
    """A mapping with a name less is another run too."""
    columns = {"question": "q", "answer": "a"}
    before, after = (Config(data=DataConfig(columns=given)) for given in (columns, {"question": "q"}))
    (tmp_path / "sft").mkdir()
    save_config(before, tmp_path / "sft" / "config.yaml")
    check_same_run(tmp_path / "sft", before, "sft")
    with pytest.raises(ConfigError, match=r"another config: data.columns \({'question': 'q', 'answer': 'a'} there"):
        check_same_run(tmp_path / "sft", after, "sft")


def test_gold_reads_own_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ghosts = jsonl(tmp_path / "ghosts.jsonl", UNKNOWN)
    student = tmp_path / "eval.json"
    student.write_text(json.dumps({"replies": [{"question": Q, "text": "it is 7"}]}), encoding="utf-8")
    arguments = ["gold", "--student", str(student), "--ghosts", str(ghosts), "--out", str(tmp_path / "edit.jsonl")]
    assert main(arguments) == 2 and "missing field 'question'" in capsys.readouterr().err
    columns = "{question: q, rationale: meta.steps, answer: meta.results.1}"
    assert main([*arguments, "--columns", columns]) == 0
    assert json.loads((tmp_path / "edit.jsonl").read_text(encoding="utf-8"))["answer"] == "12"
