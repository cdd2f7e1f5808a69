"""The columns of public data sets: a table from each field of a row to the names that may hold it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

Named = tuple[str, object]
"""A column's name and its value."""

NAMES = {
    "messages": "messages conversations conversation dialogue dialog chat turns 对话",
    "question": "question prompt problem query instruction body user_prompt 问题 题目 提问 题干 指令",
    "other_question": "input question_chinese question_zh original_text 输入 source",
    "context": "input context passage 输入",
    "options": "options choices answer_option_list 选项",
    "rationale": "rationale reasoning reasoning_content thinking thinking_trajectories thought thoughts complex_cot "
    "deepseek_thinking_trajectory gemini_thinking_trajectory deepseek_reasoning chain_of_thought cot think "
    "推理过程 思考过程 推理 思考",
    "solution": "solution explanation answer_analysis analysis 解析 解答 解题过程 解题思路",
    "equation": "equation formula 算式",
    "completion": "completion response generated_solution output generation chosen llm_response model_output "
    "deepseek_attempt deepseek_solution gemini_attempt attempt r1_solution_1 r1_solution_2 r1_solution_3 content "
    "回答 回复 输出",
    "generations": "generations",
    "answer": "answer final_answer ans answer_number answer_only short_answer answer_value answer_key correct_option "
    "答案 最终答案 answer_latex",
    "other_answer": "target result",
    "gold": "gold golden gold_answer expected_answer ground_truth reference_answer correct_answer "
    "reward_model.ground_truth extra_info.answer verification_info.ground_truth gold_standard_solution "
    "ground_truth_solution 正确答案 标准答案 参考答案",
    "system": "system system_prompt system_message 系统 系统提示",
    "history": "history 历史",
    "image": "image images",
    "tools": "tools functions",
    "correct": "correct is_correct label",
    "split": "split",
    "id": "id",
}
"""Field -> the columns that may hold it; the first one that is filled counts.

Case, spaces, `-` and `_` in a name make no difference; a dot leads into an object. `completion` is a whole reply in one
text, `rationale` the steps or the thought before it, `solution` a text that may be either.
"""
COLUMNS = {field: tuple(names.split()) for field, names in NAMES.items()}
OWN_NAMES = tuple(
    ["question", "rationale", "answer", "completion", "gold", "system", "messages", "tools", "correct", "split", "id"]
)
"""The fields that the setting `data.columns` may name."""
SAME_MEANING = (
    {"question", "other_question", "context", "options", "messages"},
    {"rationale", "solution", "equation", "answer", "other_answer", "completion", "generations", "messages"},
)
"""A field that `data.columns` names replaces what is found for the others of its group."""


@functools.lru_cache(maxsize=4096)
def fold(name: str) -> str:
    """Return a column's name without case, spaces, `-` and `_`."""
    return re.sub(r"[\s_-]+", "", name).casefold()


FIELDS_OF: dict[str, list[tuple[str, int]]] = {}
"""Folded name -> the fields that it may hold, each with its rank there."""
for _field, _names in COLUMNS.items():
    for _rank, _name in enumerate(_names):
        FIELDS_OF.setdefault(fold(_name), []).append((_field, _rank))
NESTED = {fold(name.partition(".")[0]): name for names in COLUMNS.values() for name in names if "." in name}


def is_blank(value: object) -> bool:
    """Return whether a row has nothing here: None, or white space."""
    return value is None or (isinstance(value, str) and not value.strip())


class Found:
    """The columns of one row by field.

    Attributes:
        row: the row.
        named: the fields whose column the user named.
    """

    def __init__(self, row: Mapping[str, object], named: Iterable[str] = ()) -> None:
        self.row = row
        self.named = frozenset(named)
        self._filled: dict[str, list[tuple[int, Named]]] = {}
        self._blank: dict[str, str] = {}
        for name, value in row.items():
            folded = fold(str(name))
            self._add(folded, str(name), value)
            if folded in NESTED:
                inner = dig(row, f"{name}.{NESTED[folded].partition('.')[2]}")
                self._add(fold(NESTED[folded]), NESTED[folded], unwrap(inner))
        for found in self._filled.values():
            found.sort(key=lambda ranked: ranked[0])

    def _add(self, folded: str, name: str, value: object) -> None:
        if value is None:
            return
        blank = is_blank(value)
        for field, rank in FIELDS_OF.get(folded, ()):
            if blank:
                self._blank[field] = name
            else:
                self._filled.setdefault(field, []).append((rank, (name, value)))

    def all(self, field: str) -> list[Named]:
        """Return the filled columns of a field, the first choice first."""
        return [named for _, named in self._filled.get(field, ())]

    def first(self, field: str) -> Named | None:
        """Return the first choice of a field."""
        found = self._filled.get(field)
        return found[0][1] if found else None

    def value(self, field: str) -> object:
        """Return the value of the first choice of a field, or None."""
        found = self._filled.get(field)
        return found[0][1][1] if found else None

    def blank(self, *fields: str) -> str:
        """Return the name of a column of these fields that is there and blank, or an empty text."""
        return next((self._blank[field] for field in fields if field in self._blank), "")


def dig(row: Mapping[str, object], path: str) -> object:
    """Return the value at a dotted path, or None. A column whose own name has the dots comes first.

    A text that holds a JSON object is read as one.
    """
    if path in row:
        return row[path]
    value: object = row
    for part in path.split("."):
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = parse_json(value)
        if isinstance(value, Sequence) and not isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", part):
            value = value[int(part)] if -len(value) <= int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def unwrap(value: object) -> object:
    """Return the text in a list of one text, also of a list that is written as JSON; other values as they are."""
    listed = parse_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    return listed[0] if isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], str) else value


def parse_json(text: str) -> object:
    """Return the JSON value in a text; the text itself if it is not JSON."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value


def map_columns(row: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """Return the row with the columns that `data.columns` names under our names.

    What the row has for the same meaning under other names is left out. A column that this row lacks changes nothing.
    """
    mapped = {ours: value for ours, theirs in columns.items() if (value := dig(row, theirs)) is not None}
    replaced = set(mapped).union(*(group for group in SAME_MEANING if not group.isdisjoint(mapped)))
    return mapped | {name: value for name, value in kept_columns(row, replaced) if name not in mapped}


def kept_columns(row: Mapping[str, object], replaced: set[str]) -> Iterator[Named]:
    """Yield the columns that mean none of the replaced fields."""
    for name, value in row.items():
        folded = fold(str(name))
        meanings = {field for field, _ in FIELDS_OF.get(folded, ())}
        if folded in NESTED:
            meanings |= {field for field, _ in FIELDS_OF[fold(NESTED[folded])]}
        if meanings.isdisjoint(replaced):
            yield name, value


def describe_missing(field: str, row: Mapping[str, object]) -> str:
    """Return what a row without a field has, and the setting that names its columns."""
    others = ", ".join(COLUMNS[field][1:6])
    has = ", ".join(map(str, row)) or "nothing"
    return f"missing field {field!r} (or {others}, ...); the row has {has}. Add it.{suggest_columns(row)}"


def suggest_columns(row: Mapping[str, object]) -> str:
    """Return the setting that maps the text columns of a row of an unknown layout, as far as they can be guessed."""
    texts = [str(name) for name, value in row.items() if isinstance(value, str | int | float | dict) and value != ""]
    if texts == ["text"]:
        return " One column 'text' does not say where the reply begins: split it with data.row_function."
    found = Found(row)
    guesses: dict[str, str] = {}
    for field in ("question", "answer"):
        known = found.first(field) or (found.first("completion") if field == "answer" else None)
        free = [name for name in texts if name not in guesses.values() and not FIELDS_OF.get(fold(name))]
        close = [name for name in free if any(known in fold(name) for known in map(fold, COLUMNS[field]))]
        guess = [known[0]] if known else close or (free[:1] if field == "question" else free[-1:])
        guesses[field] = guess[0] if guess else "COLUMN"
    setting = f"--data.columns '{{question: {guesses['question']}, answer: {guesses['answer']}}}'"
    return f" If it has another name, say so: {setting} (for generate and gold: --columns)."
