"""The question, the reply and the right answer of a row, whatever its layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from cotgrpo.data.answers import answers_match, extract_answer, gold_answer, grade, last_box, split_reply, split_thought
from cotgrpo.data.layouts.chats import Chat, ends_in_reply, is_chat, parse_chat, role_of
from cotgrpo.data.layouts.columns import COLUMNS, Found, Named, describe_missing, fold, is_blank
from cotgrpo.data.sources import DataError

Note = tuple[str, str]
"""What is noted in the report of rows, and its place with details."""
VERDICTS = ("correctness_math_verify", "correctness_llama")
"""Lists of whether each of a row's `generations` is right."""
LEAST_WORDS = 3
"""Words of a sentence."""
LONGEST_QUANTITY = 60
"""Characters of an answer with its unit."""
LETTERS = "ABCDEFGHIJ"


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


def squeeze(text: str) -> str:
    """Return the text with every run of white space as one blank."""
    return " ".join(text.split())


def parse_text(value: object, name: str, place: str, *, numbers: bool = False) -> str:
    """Return a value as stripped text, empty if it is missing.

    Raises:
        DataError: it is not text; with `numbers`, neither text nor a finite number.
    """
    if is_blank(value):
        return ""
    if numbers and (type(value) is int or (isinstance(value, float) and math.isfinite(value))):
        value = str(value)
    if not isinstance(value, str):
        inner = next(iter(value), "0") if isinstance(value, Mapping) else 0
        nested = isinstance(value, Mapping | Sequence)
        hint = f", or name a value in it with data.columns, such as {name}.{inner}." if nested else "."
        raise DataError(
            f"{place}: field {name!r} must be text, got {type(value).__name__} {value!r:.40}. Make it a string{hint}"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{place}: field {name!r} holds half a surrogate pair. Remove it.") from None
    return value.strip()


def read_chat(found: Found, place: str) -> Chat | None:
    """Return the row's chat: `messages`, or a prompt and a completion that are lists of messages; None without one.

    Raises:
        DataError: messages that cannot be read.
    """
    asked, replied = found.first("question"), found.first("completion")
    named = chat_column(found)
    if named is None:
        named = asked if asked is not None and is_chat(asked[1]) else history_column(found, place)
    if replied is not None and is_chat(replied[1]) and (named is None or not ends_in_reply(named[1])):
        prompt = list(named[1]) if named is not None and is_chat(named[1]) else []
        if not prompt and asked is not None:
            prompt = [{"role": "user", "content": asked[1]}]
        whole = any(role_of(message) == "user" for message in replied[1])  # a preference that repeats the prompt
        named = replied[0], [*([] if whole else prompt), *replied[1]]
    return None if named is None else parse_chat(named[1], found.value("tools"), place, named[0])


def history_column(found: Found, place: str) -> Named | None:
    """Return the earlier turns of a row as a chat that ends in its question: `history`, pairs of user and assistant."""
    history, asked = found.first("history"), found.first("question")
    if history is None or asked is None or not isinstance(history[1], list) or not history[1]:
        return None
    turns = history[1]
    if all(isinstance(pair, Sequence) and len(pair) == 2 for pair in turns):
        roles = ("user", "assistant")
        turns = [{"role": r, "content": text} for pair in turns for r, text in zip(roles, pair, strict=True)]
    question = with_context((asked[0], parse_text(asked[1], asked[0], place)), found, place)
    return history[0], [*turns, {"role": "user", "content": question}]


def chat_column(found: Found) -> Named | None:
    """Return the column of the row's messages. One of another name than `messages` counts if it holds a list."""
    for name, value in found.all("messages"):
        is_list = value.lstrip().startswith("[") if isinstance(value, str) else isinstance(value, Sequence | Mapping)
        if is_list or fold(name) == "messages":
            return name, value
    return None


def read_question(found: Found, chat: Chat | None, place: str, notes: list[Note]) -> str:
    """Return the question: that of the chat, else the first column that holds one, with its input and options.

    Raises:
        DataError: there is none, it is empty, or it is not text.
    """
    named = [column for column in found.all("question") if not is_chat(column[1]) and fold(column[0]) != "body"]
    named = named or [column for column in found.all("question") if fold(column[0]) == "body"]
    if not named:
        others = found.all("other_question")
        named = [column for column in others if fold(column[0]) != "source" or "target" in found.row][:1]
    texts = [(name, parse_text(value, name, place)) for name, value in named]
    if chat is not None:
        asked = [squeeze(text) for text in chat.asked]
        for name, text in texts:
            if not any(squeeze(text) in turn for turn in asked):  # a message may have an instruction around it
                notes.append((f"the chat and {name} in one row: the question is the chat's, {name} is not used", place))
        question = parse_text(chat.question, "question", place)
    else:
        for name, text in texts[1:]:
            if squeeze(text) != squeeze(texts[0][1]):
                notes.append(
                    (f"{texts[0][0]} and {name} in one row: {texts[0][0]} is the question, {name} is not used", place)
                )
        question = with_context(texts[0], found, place) if texts else ""
    if not question:
        blank = "question" if chat is not None else found.blank("question")
        raise DataError(f"{place}: {empty(blank) if blank else describe_missing('question', found.row)}")
    options = read_options(found) if chat is None else []
    if options and not all(option in question for _, option in options):
        question = "\n".join([question, *(f"{mark}. {option}" if mark else option for mark, option in options)])
    return question


def empty(name: str) -> str:
    """Return the complaint about an empty column."""
    return f"field {name!r} is empty. Fill it in or remove the row."


def with_context(question: tuple[str, str], found: Found, place: str) -> str:
    """Return a question with what it is about: Alpaca's `input`, Dolly's `context`, the `Body` of SVAMP."""
    name, text = question
    body = next((value for column, value in found.all("question") if fold(column) == "body"), None)
    if body is not None and body != text:
        return f"{parse_text(body, 'body', place)} {text}"
    about = [(n, v) for n, v in found.all("context") if n != name and isinstance(v, str)]
    if fold(name) not in ("instruction", "指令"):
        about = [(n, v) for n, v in about if fold(n) in ("context", "passage")]
    return f"{text}\n\n{parse_text(about[0][1], about[0][0], place)}" if about else text


def read_options(found: Found) -> list[tuple[str, str]]:
    """Return (letter, text) for each choice of a row; the letter is empty if the text has its own."""
    value = found.value("options")
    if isinstance(value, Mapping) and isinstance(value.get("text"), Sequence):
        labels = value.get("label") or LETTERS
        return [(str(mark), str(text)) for mark, text in zip(labels, value["text"], strict=False)]
    if isinstance(value, Mapping) and all(len(str(mark)) <= 2 for mark in value):
        return [(str(mark), str(text)) for mark, text in value.items() if text is not None]
    if isinstance(value, str):
        return [("", value.strip())]
    if isinstance(value, Sequence):
        texts = [str(text).strip() for text in value]
        own = all(text[:1] == mark or text[1:2] == mark for mark, text in zip(LETTERS, texts, strict=False))
        return [("" if own else mark, text) for mark, text in zip(LETTERS, texts, strict=False)]
    if is_blank(found.row.get("A")) or is_blank(found.row.get("B")):
        return []
    columns = [(mark, found.row.get(mark)) for mark in LETTERS]
    return [(mark, str(text).strip()) for mark, text in columns if not is_blank(text)]


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
    if options:
        letter = found.first("correct")
        answers += [letter] if letter is not None and isinstance(letter[1], str) else []
        texts = [text for _, text in options]
        for i, (name, value) in enumerate(answers):
            if type(value) is int and str(value) not in texts and 0 <= value < len(options):  # MMLU: its place
                answers[i] = name, options[value][0] or LETTERS[value]
    others = [column for column in found.all("other_answer") if type(column[1]) in (str, int, float)]
    return answers or others[:1]


def read_reply(found: Found, chat: Chat | None, place: str, notes: list[Note]) -> Reply:
    """Return the row's reply, and which columns hold the right answer.

    A whole reply (of a chat, or in a column of its own) comes first; `answer` is then the right answer. Without one,
    `rationale` or `solution` and `answer` are the reply, or `answer` alone is a whole one.

    Raises:
        DataError: a column that is not text.
    """
    answers, golds = answer_columns(found), found.all("gold")
    wholes = whole_replies(found, chat, place)
    rationales, solutions = found.all("rationale"), found.all("solution")
    if wholes:
        name, text = wholes[0]
        for other, unused in [*wholes[1:], *((n, v) for n, v in solutions if isinstance(v, str))]:
            if squeeze(unused) not in (squeeze(text), squeeze(split_thought(text).text)):
                if not (golds or answers) and other in dict(solutions) and states_answer(unused):  # s1K
                    golds = [(other, unused)]
                else:
                    notes.append((f"{name} and {other} in one row: {name} is the reply, {other} is not used", place))
        golds = golds if "gold" in found.named else [*golds, *answers]
        if chat is not None and chat.context:
            return Reply("", with_thought(text, chat.thought), True, tuple(golds))
        thought = chat.thought if chat is not None and chat.thought else paired_thought(name, rationales, place)
        if squeeze(thought) not in squeeze(with_thought(text, thought)):
            notes.append((f"two thoughts in one row: that in {name} is used, the other is not", place))
        return dataclasses.replace(one_reply(with_thought(text, thought), name, place), golds=tuple(golds))
    steps = rationales or solutions
    if steps and answers:
        return steps_and_answer(found, [*rationales, *solutions], answers, place, notes)
    if rationales and solutions:
        text = with_thought(parse_text(solutions[0][1], solutions[0][0], place), first_text(rationales[0], place))
        return dataclasses.replace(one_reply(text, solutions[0][0], place), golds=tuple(golds))
    if solutions:
        reply = one_reply(parse_text(solutions[0][1], solutions[0][0], place, numbers=True), solutions[0][0], place)
        return dataclasses.replace(reply, golds=tuple(golds))
    if steps:
        blank = found.blank("answer")
        text = empty(blank) if blank else describe_missing("answer", found.row)
        return Reply(first_text(steps[0], place), "", golds=tuple(golds), problem=f"{place}: {text}")
    return answer_alone(found, chat, answers, place)


def whole_replies(found: Found, chat: Chat | None, place: str) -> list[tuple[str, str]]:
    """Return the whole replies of a row by column, the first choice first."""
    in_chat = chat_column(found) or found.first("completion")
    replies = [(in_chat[0], parse_text(chat.reply, in_chat[0], place))] if chat and chat.reply and in_chat else []
    columns = [column for column in found.all("completion") if not is_chat(column[1])]
    replies += [(name, parse_text(value, name, place)) for name, value in columns]
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
    return first_text(rationales[0], place) if rationales else ""


def first_text(column: Named, place: str) -> str:
    """Return a column's text; of a list of texts, the first one."""
    name, value = column
    if isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], str):
        value = value[0]
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
        problem = f"the thought in {name!r} never ends. Remove the row."
    elif answer is None and text.endswith("####"):
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


def is_marked(text: str) -> bool:
    r"""Return whether a text marks its answer, in a box or after `####`."""
    return "####" in text or last_box(text) is not None


def states_answer(text: str) -> bool:
    """Return whether a text marks its answer or is nothing but an answer."""
    return is_marked(text) or gold_answer(text) == text.strip()


def steps_and_answer(found: Found, steps: list[Named], answers: list[Named], place: str, notes: list[Note]) -> Reply:
    """Return the reply of a row with steps and an answer in columns of their own."""
    rationale = first_text(steps[0], place)
    for name, value in steps[1:]:
        if isinstance(value, str) and squeeze(value) != squeeze(rationale):
            first = steps[0][0]
            notes.append((f"{first} and {name} in one row: {first} is the rationale, {name} is not used", place))
    answer = parse_text(answers[0][1], answers[0][0], place, numbers=True)
    if is_marked(answer):  # a whole reply after the thought
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


def no_reply(gold: str) -> str:
    """Return the complaint about a row that has a question and its right answer only."""
    return (
        f"no reply to train on: the row has a question and the right answer ({gold}) only. Let cotgrpo generate write "
        "replies, or name the column of one: --data.columns '{completion: COLUMN}'."
    )


def not_an_answer(name: str, text: str, place: str) -> str:
    """Return the error for a right answer that is prose without an answer."""
    return (
        f"{place}: field {name!r} is the right answer, but no answer is found in it: {text!r:.60}. Write the answer "
        "alone, or after '####' or in \\boxed{} at its end."
    )


def read_gold(golds: Sequence[Named], place: str, notes: list[Note]) -> tuple[str, str]:
    """Return the right answer, and why there is none; either may be empty.

    Raises:
        DataError: a column that is not text, or two right answers that disagree.
    """
    texts = [(name, parse_text(value, name, place, numbers=True)) for name, value in golds]
    read = [(name, text, answer) for name, text in texts if (answer := read_answer(text)) is not None]
    if not read:
        return "", not_an_answer(*texts[0], place) if texts else ""
    name, text, gold = read[0]
    for other, other_text, answer in read[1:]:
        if not (squeeze(answer) == squeeze(gold) or grade(other_text, gold).correct or grade(text, answer).correct):
            raise DataError(
                f"{place}: two right answers disagree: {name!r} has {gold!r:.40}, {other!r} has {answer!r:.40}. "
                f"Remove one, or name the right one: --data.columns '{{gold: {name}}}'."
            )
    if gold != text and not is_marked(text):
        notes.append(prose_note("gold", place, gold, text))
    return gold, ""


def read_answer(text: str) -> str | None:
    """Return the answer in a right answer: as `gold_answer`; of a sentence such as `Tom has 7 apples.`, the number."""
    answer = gold_answer(text)
    words = sum(any(map(str.isalpha, word)) for word in text.split())
    is_sentence = (text.endswith(".") and words >= LEAST_WORDS) or text.endswith("。")
    return extract_answer(text) or answer if answer == text and is_sentence else answer


def prose_note(what: str, place: str, answer: str, text: str) -> Note:
    """Return the note of an answer, or of a gold, that was found in prose."""
    return f"{what} read from prose", f"{place}: {answer!r} of {text!r:.60}"
