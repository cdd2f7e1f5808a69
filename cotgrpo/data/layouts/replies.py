"""The reply of a row: a whole one, or steps and an answer; and the columns of the right answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeGuard

from cotgrpo.data.answers import answers_match, gold_answer, last_box, split_reply, split_thought
from cotgrpo.data.layouts.chats import Chat, is_chat, last_reply
from cotgrpo.data.layouts.columns import COLUMNS, Found, Named, describe_missing, fold
from cotgrpo.data.layouts.golds import is_marked, not_an_answer, states_answer
from cotgrpo.data.layouts.questions import LETTERS, chat_column, read_options
from cotgrpo.data.layouts.values import Note, empty, parse_text, squeeze
from cotgrpo.data.sources import DataError

VERDICTS = ("correctness_math_verify", "correctness_llama")
"""Lists of whether each of a row's `generations` is right."""
LONGEST_QUANTITY = 60
"""Characters of an answer with its unit."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A row's reply.

    Attributes:
        rationale, answer: the reply; empty if the row has none.
        verbatim: whether `answer` is the whole reply, to be trained as it is.
        golds: the columns of the right answer.
        prose: the text in which the answer was found without a mark; else empty.
        problem: why no triple can be made of the row; empty if one can.
        no_gold: why the answer cannot be the right answer to a question.
    """

    rationale: str = ""
    answer: str = ""
    verbatim: bool = False
    golds: tuple[Named, ...] = ()
    prose: str = ""
    problem: str = ""
    no_gold: str = ""


def read_flag(found: Found, place: str) -> bool | None:
    """Return the row's own flag of whether its reply is right. Raises DataError if it is neither true nor false."""
    flags = [flag for flag in found.all("correct") if fold(flag[0]) != "label" or isinstance(flag[1], bool)]
    flag = next(iter(flags), None)  # `label` is a flag in TRL's unpaired preferences alone
    if flag is None or isinstance(flag[1], bool):
        return None if flag is None else bool(flag[1])
    if isinstance(flag[1], str) and read_options(found):  # AQuA-RAT: the right letter
        return None
    raise DataError(f"{place}: field {flag[0]!r} must be true or false, got {flag[1]!r:.40}. Fix the row.")


def answer_columns(found: Found) -> list[Named]:
    """Return the columns of the answer, which is the reply's own, or the right one where there is a whole reply."""
    options, answers = read_options(found), found.all("answer")
    answers = [(name, "".join(value) if is_choice(value) else value) for name, value in answers]
    if options:
        letter = found.first("correct")
        answers += [letter] if letter is not None and isinstance(letter[1], str) else []
        texts = [text for _, text in options]
        for i, (name, value) in enumerate(answers):
            if type(value) is int and str(value) not in texts and 0 <= value < len(options):  # MMLU: its place
                answers[i] = name, options[value][0] or LETTERS[value]
    others = [column for column in found.all("other_answer") if type(column[1]) in (str, int, float)]
    return answers or others[:1]


def is_choice(value: object) -> TypeGuard[list[str]]:
    """Return whether an answer is a list of letters, such as ["B"] or ["A", "C"]."""
    return isinstance(value, list) and bool(value) and all(letter in tuple(LETTERS) for letter in value)


def read_reply(found: Found, chat: Chat | None, place: str, notes: list[Note]) -> Reply:
    """Return the row's reply, and which columns hold the right answer.

    A whole reply (of a chat, or in a column of its own) comes first; `answer` is then the right answer. Without one,
    `rationale` or `solution` and `answer` are the reply, or `answer` alone is a whole one.

    Raises:
        DataError: a column that is not text.
    """
    answers, golds = answer_columns(found), tuple(found.all("gold"))
    rationales, solutions = found.all("rationale"), found.all("solution")
    if wholes := whole_replies(found, chat, place):
        return whole_reply(found, chat, wholes, answers, place, notes)
    if answers and (rationales or solutions):
        return steps_and_answer(found, [*rationales, *solutions], answers, place, notes)
    if solutions:
        name, value = solutions[0]
        thought = steps_text(rationales[0], place) if rationales else ""
        text = with_thought(parse_text(value, name, place, numbers=True), thought)
        return dataclasses.replace(one_reply(text, name, place), golds=golds)
    if rationales:
        blank = found.blank("answer")
        text = empty(blank) if blank else describe_missing("answer", found.row)
        return Reply(steps_text(rationales[0], place), "", golds=golds, problem=f"{place}: {text}")
    return answer_alone(found, chat, answers, place)


def whole_reply(
    found: Found, chat: Chat | None, wholes: list[tuple[str, str]], answers: list[Named], place: str, notes: list[Note]
) -> Reply:
    """Return the first of a row's whole replies. The others are noted, and so is a `solution`.

    A `solution` that states its answer is the right answer, if no other column is (s1K).
    """
    name, text = wholes[0]
    golds, solutions = found.all("gold"), found.all("solution")
    for other, unused in [*wholes[1:], *((n, v) for n, v in solutions if isinstance(v, str))]:
        if squeeze(unused) in (squeeze(text), squeeze(split_thought(text).text)):
            continue
        if not (golds or answers) and other in dict(solutions) and states_answer(unused):
            golds = [(other, unused)]
        else:
            notes.append((f"{name} and {other} in one row: {name} is the reply, {other} is not used", place))
    golds = golds if "gold" in found.named else [*golds, *answers]
    if chat is not None and chat.context:
        problem = never_ends(name, place) if split_thought(text).unclosed else ""
        return Reply("", with_thought(text, chat.thought), True, tuple(golds), problem=problem)
    thought = (chat.thought if chat is not None else "") or paired_thought(name, found.all("rationale"), place)
    if squeeze(thought) not in squeeze(with_thought(text, thought)):
        notes.append((f"two thoughts in one row: that in {name} is used, the other is not", place))
    return dataclasses.replace(one_reply(with_thought(text, thought), name, place), golds=tuple(golds))


def whole_replies(found: Found, chat: Chat | None, place: str) -> list[tuple[str, str]]:
    """Return the whole replies of a row by column, the first choice first."""
    in_chat = chat_column(found) or found.first("completion")
    replies = [(in_chat[0], parse_text(chat.reply, in_chat[0], place))] if chat and chat.reply and in_chat else []
    for name, value in (*found.all("messages"), *found.all("completion")):
        if is_chat(value):
            other = last_reply(value, name, place)
            replies += [(name, other)] if other and name not in dict(replies) else []
        elif (name, value) in found.all("completion"):
            replies.append((name, parse_text(value, name, place)))
    generations = found.value("generations")
    if not replies and isinstance(generations, Sequence) and generations and isinstance(generations[0], str):
        verdicts = next((v for name in VERDICTS if isinstance(v := found.row.get(name), Sequence)), ())
        right = next((text for text, good in zip(generations, verdicts, strict=False) if good is True), generations[0])
        replies.append(("generations", parse_text(right, "generations", place)))
    return replies


def paired_thought(name: str, rationales: Sequence[Named], place: str) -> str:
    """Return the thought that belongs to a reply: `deepseek_...` to `deepseek_...`, else the first one."""
    for maker in ("deepseek", "gemini"):
        if fold(name).startswith(maker):
            rationales = [column for column in rationales if fold(column[0]).startswith(maker)] or rationales
    return steps_text(rationales[0], place) if rationales else ""


def steps_text(column: Named, place: str) -> str:
    """Return a column's text; a list of steps is one text, a step a line."""
    name, value = column
    if isinstance(value, list) and value and all(isinstance(step, str) for step in value):
        value = "\n".join(value)
    return parse_text(value, name, place)


def with_thought(text: str, thought: str) -> str:
    """Return a reply with its thought in marks in front, unless it has a marked one of its own."""
    if not thought.strip() or split_thought(text).marked:
        return text
    return f"<think>\n{thought.strip()}\n</think>\n\n{text}"


def one_reply(text: str, name: str, place: str) -> Reply:
    """Return a reply in one text, split into steps and answer.

    A number somewhere in prose or in code is not its answer. After a thought, the whole text then is.
    """
    rationale, answer = split_reply(text)
    thought = split_thought(text)
    marked = is_marked(thought.text)
    if not marked and (gold_answer(thought.text) is None or "```" in thought.text):
        answer = None
    if answer is None and thought.marked:
        answer = thought.text or None
    if answer and rationale == text.strip() and is_bare(text, answer):
        rationale = ""
    if rationale and answer:
        return Reply(rationale, answer, prose="" if marked or thought.text == answer else thought.text)
    if thought.unclosed:
        return Reply(rationale, "", problem=never_ends(name, place))
    if answer is None and text.endswith("####"):
        problem = f"field {name!r} is empty after '####'. Fill it in or remove the row."
    else:
        names = f"{' or '.join(COLUMNS['rationale'][:3])} or solution"
        problem = (
            f"no rationale: expected a field {names}, or a reply with '#### answer' or '</think>' in it. Add the field."
        )
    return Reply(rationale if answer is None else "", answer or "", problem=f"{place}: {problem}")


def is_bare(text: str, answer: str) -> bool:
    """Return whether a text is nothing but its answer, such as `42 apples`, and unlike `6 * 7 = 42`."""
    bare = squeeze(text).strip(" .$*")
    if is_marked(bare):
        return bare.startswith("\\boxed{") and bare.endswith("}")
    short = len(bare) <= LONGEST_QUANTITY and "=" not in bare
    return bare == squeeze(answer).strip(" .$*") or (short and answers_match(bare, answer))


def steps_and_answer(found: Found, steps: list[Named], answers: list[Named], place: str, notes: list[Note]) -> Reply:
    """Return the reply of a row with steps and an answer in columns of their own."""
    rationale = steps_text(steps[0], place)
    thought = split_thought(rationale)
    if thought.marked and thought.text:  # a whole reply
        reply = one_reply(rationale, steps[0][0], place)
        return dataclasses.replace(reply, golds=(*found.all("gold"), *answers))
    rationale = thought.thought if thought.marked else rationale
    for name, value in steps[1:]:
        if isinstance(value, str) and squeeze(value) != squeeze(rationale):
            first = steps[0][0]
            notes.append((f"{first} and {name} in one row: {first} is the rationale, {name} is not used", place))
    answer = parse_text(answers[0][1], answers[0][0], place, numbers=True)
    if is_marked(answer) or split_thought(answer).marked:  # a whole reply after the thought
        answer = gold_answer(answer) or answer
    boxed = last_box(rationale)
    if boxed is not None and not answers_match(boxed, answer):
        what = f"the box in {steps[0][0]} is not {answers[0][0]}, which is trained as the answer"
        notes.append((what, f"{place}: {boxed!r:.40}, {answer!r:.40}"))
    return Reply(rationale, answer, golds=(*found.all("gold"), *answers[1:]))


def answer_alone(found: Found, chat: Chat | None, answers: list[Named], place: str) -> Reply:
    """Return the reply of a row without steps: `answer` may be a whole reply, or only the right answer."""
    golds = (*found.all("gold"), *answers[1:])
    if not answers:
        blank = found.blank("answer", "completion")
        text = empty(blank) if blank else describe_missing("answer", found.row)
        if golds:
            text = no_reply(golds[0][0])
        elif chat is not None:
            what = "is empty" if chat.reply == "" else "is the user's"
            text = f"the last message {what}: expected a reply. Cut the chat before it."
        return Reply(golds=golds, problem=f"{place}: {text}")
    name, value = answers[0]
    text = parse_text(value, name, place, numbers=True)
    reply = one_reply(text, name, place)
    equation = found.first("equation")
    if equation is not None and "\n" not in text and not is_marked(text):
        return Reply(parse_text(equation[1], equation[0], place), text, golds=golds)
    if reply.problem and (blank := found.blank("rationale", "solution")):
        reply = dataclasses.replace(reply, problem=f"{place}: {empty(blank)}")
    if reply.problem:
        answer = gold_answer(text)
        no_gold = "" if answer else not_an_answer(name, text, place)
        return dataclasses.replace(reply, rationale="", answer=answer or "", golds=golds, no_gold=no_gold)
    return dataclasses.replace(reply, golds=golds)


def never_ends(name: str, place: str) -> str:
    """Return the complaint about a reply that was cut off in its thought."""
    return f"{place}: the thought in {name!r} never ends. Remove the row."


def no_reply(gold: str) -> str:
    """Return the complaint about a row that has a question and its right answer only."""
    return (
        f"no reply to train on: the row has a question and the right answer ({gold}) only. Let cotgrpo generate write "
        "replies, or name the column of one: --data.columns '{completion: COLUMN}'."
    )
