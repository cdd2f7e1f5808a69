"""The question of a row: its chat, its text with what it is about, its options."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from cotgrpo.data.layouts.chats import CONTENT_KEYS, Chat, ends_in_reply, is_chat, parse_chat, role_of
from cotgrpo.data.layouts.columns import Found, Named, describe_missing, fold, is_blank
from cotgrpo.data.layouts.values import Note, empty, parse_text, squeeze
from cotgrpo.data.sources import DataError

LETTERS = string.ascii_uppercase


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
    if found.value("image"):
        notes.append(("an image in the row, which is not read", place))
    options = read_options(found) if chat is None else []
    if options and not all(option in question for _, option in options):
        question = "\n".join([question, *(f"{mark}. {option}" if mark else option for mark, option in options)])
    return question


def with_context(question: tuple[str, str], found: Found, place: str) -> str:
    """Return a question with what it is about: Alpaca's `input`, Dolly's `context`, the `Body` of SVAMP."""
    name, text = question
    body = next((value for column, value in found.all("question") if fold(column) == "body"), None)
    if body is not None and body != text:
        return f"{parse_text(body, 'body', place)} {text}"
    about = [(n, v) for n, v in found.all("context") if n != name and isinstance(v, str)]
    if fold(name) not in ("instruction", "指令"):
        about = [(n, v) for n, v in about if fold(n) in ("context", "passage")]
    about = [(n, v) for n, v in about if squeeze(v) not in squeeze(text)]
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
        value = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in value]
        if value and all(isinstance(item, Mapping) for item in value):  # TAL-SCQ: {"aoVal": "A", "content": ...}
            texts = [next((item[key] for key in CONTENT_KEYS if key in item), item) for item in value]
            return [(mark, str(text).strip()) for mark, text in zip(LETTERS, texts, strict=False)]
        texts = [str(text).strip() for text in value]
        own = all(text.lstrip("(")[:1] == mark for mark, text in zip(LETTERS, texts, strict=False))
        own = own and not any(text.lstrip("(")[1:2].isalnum() for text in texts)
        return [("" if own else mark, text) for mark, text in zip(LETTERS, texts, strict=False)]
    if is_blank(found.row.get("A")) or is_blank(found.row.get("B")):
        return []
    columns = [(mark, found.row.get(mark)) for mark in LETTERS]
    return [(mark, str(text).strip()) for mark, text in columns if not is_blank(text)]
