"""Chats: messages in the forms of public data sets, brought into the one form that chat templates read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from cotgrpo.data.layouts.columns import fold, is_blank, parse_json
from cotgrpo.data.sources import DataError

Message = Mapping[str, object]

ROLES: dict[str, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "instruction", "question", "用户"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatgpt", "ai", "response", "answer", "助手"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response", "tool_result"),
    "call": ("function_call", "tool_call", "function-call", "tool_calls"),
}
"""Role of a chat template -> its names in data sets. A `call` is an assistant's message that calls a tool."""
ROLE_KEYS = ("role", "from", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "reasoning_details")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning", "reasoning_content", "thought")
ROLE_OF = {fold(name): role for role, names in ROLES.items() for name in names}


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat: what the student reads, and the last reply.

    Attributes:
        question: text of the last user message before the reply.
        reply: content of the last message if it is the assistant's; else None.
        thought: the reply's own field of reasoning.
        system: the system messages at the start.
        context: every message before the reply, without those; empty if that is one user message, and no tools.
        tools: the tools, as JSON schemas.
        asked: the texts of all user messages.
    """

    question: str
    reply: str | None
    thought: str = ""
    system: str = ""
    context: tuple[Message, ...] = ()
    tools: tuple[Message, ...] = ()
    asked: tuple[str, ...] = ()


def is_chat(value: object) -> TypeGuard[Sequence[Message]]:
    """Return whether a value is a list of messages, by its first one."""
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], Mapping)


def role_of(message: object) -> str | None:
    """Return a message's role as chat templates name it; None if it has none that is known."""
    said = next((message[key] for key in ROLE_KEYS if key in message), None) if isinstance(message, Mapping) else None
    return ROLE_OF.get(fold(said)) if isinstance(said, str) else None


def ends_in_reply(messages: object) -> bool:
    """Return whether the last of some messages is the assistant's."""
    return is_chat(messages) and role_of(messages[-1]) == "assistant"


def split_turn(message: object) -> list[object]:
    """Return the messages in a pair such as {"human": ..., "assistant": ...}; another message as it is."""
    if not isinstance(message, Mapping) or any(key in message for key in ROLE_KEYS):
        return [message]
    named = [(str(key), value) for key, value in message.items() if fold(str(key)) in ROLE_OF and value]
    return [{"role": name, "content": value} for name, value in named] or [message]


def last_reply(messages: Sequence[Message], name: str, place: str) -> str:
    """Return the text of the last message if it is the assistant's, else an empty text."""
    last = normalize(split_turn(messages[-1])[-1], f"{place}: {name!r} message {len(messages)}", place, name)
    return str(last["content"]).strip() if last["role"] == "assistant" else ""


def parse_chat(messages: object, tools: object, place: str, name: str = "messages") -> Chat:
    """Parse a chat of one or several turns.

    Args:
        messages: objects with role and content, or `from` and `value`; or texts by turns, the user's first.
        tools: the tools, as a list or as its JSON; None: no tools.
        place: the row's place, for errors.
        name: the chat's column, for errors.

    Raises:
        DataError: something else; an unknown role; an image or another part that is not text; no user message.
    """
    if isinstance(messages, str):
        messages = parse_json(messages)
    if isinstance(messages, Mapping) and all(isinstance(column, list) for column in messages.values()):
        names = list(messages)  # one list a field, as some Parquet files have them
        messages = [dict(zip(names, values, strict=True)) for values in zip(*messages.values(), strict=False)]
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise bad_messages(place, name)
    if messages and all(isinstance(message, str) for message in messages):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    messages = [turn for message in messages for turn in split_turn(message)]
    turns = [normalize(message, f"{place}: {name!r} message {i}", place, name) for i, message in enumerate(messages, 1)]
    start = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    system = "\n\n".join(text for turn in turns[:start] if (text := str(turn["content"]).strip()))
    turns = turns[start:]
    last = turns.pop() if turns and turns[-1]["role"] == "assistant" else None
    asked = tuple(str(turn["content"]) for turn in turns if turn["role"] == "user")
    if not asked:
        roles = ", ".join(str(turn["role"]) for turn in (*turns, *([last] if last else []))) or "none"
        raise DataError(
            f"{place}: expected a user message in {name!r} before the assistant's, got {roles}. Fix the row."
        )
    if last is not None and is_blank(last["content"]) and last.get("tool_calls"):
        raise DataError(
            f"{place}: the last message of {name!r} calls a tool: expected the assistant's text. Cut the chat there."
        )
    schemas = parse_tools(tools, place)
    try:
        json.dumps([turns, schemas], ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{place}: {name!r} holds half a surrogate pair. Remove it.") from None
    return Chat(
        question=asked[-1],
        reply=None if last is None else str(last["content"]),
        thought="" if last is None else str(last.get("reasoning_content", "")),
        system=system,
        context=tuple(turns) if len(turns) > 1 or schemas else (),
        tools=schemas,
        asked=asked,
    )


def bad_messages(place: str, name: str) -> DataError:
    """Return the error for a chat of another form."""
    return DataError(
        f"{place}: {name!r} must be a list of objects with role and content (or from and value). Fix the row."
    )


def normalize(message: object, where: str, place: str, name: str) -> dict[str, object]:
    """Return a message with `role`, `content` as text, and `reasoning_content` if it has reasoning.

    Its other fields, such as `tool_calls`, stay as they are; those that are null are left out.
    """
    if not isinstance(message, Mapping):
        raise bad_messages(place, name)
    fields = {str(key): value for key, value in message.items() if value is not None}
    role_key = next((key for key in ROLE_KEYS if key in fields), None)
    if role_key is None:
        raise bad_messages(place, name)
    said = fields.pop(role_key)
    role = ROLE_OF.get(fold(said)) if isinstance(said, str) else None
    if role is None:
        known = ", ".join(names[0] for names in ROLES.values())
        raise DataError(f"{where}: unknown role {said!r:.40}: expected one of {known}. Rename it.")
    content_key = next((key for key in CONTENT_KEYS if key in fields), None)
    content = "" if content_key is None else fields.pop(content_key)
    reasoning = next((texts_in(fields.pop(key)) for key in REASONING_KEYS if texts_in(fields.get(key))), "")
    text, thought = read_content(content, where)
    turn: dict[str, object] = {"role": role, "content": text, **fields}
    if role == "call":
        turn |= {"role": "assistant", **call_in(text)}
    if not is_blank(reasoning) or not is_blank(thought):
        turn["reasoning_content"] = str(thought if is_blank(reasoning) else reasoning)
    return turn


def texts_in(reasoning: object) -> str:
    """Return the text of a field of reasoning: a text, or a list of texts or of parts with one."""
    if isinstance(reasoning, str):
        return reasoning
    parts = reasoning if isinstance(reasoning, list) else []
    found = [part.get("text") or part.get("thinking") if isinstance(part, Mapping) else part for part in parts]
    return "\n".join(text for text in found if isinstance(text, str))


def read_content(content: object, where: str) -> tuple[str, str]:
    """Return the text and the reasoning in a message's content: a text, or a list of parts."""
    if isinstance(content, str):
        return content, ""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        raise DataError(f"{where}: content must be text or a list of parts, got {type(content).__name__}. Fix the row.")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        keys = (kind, "text", "content") if kind in REASONING_PARTS else ("text", "content", "value")
        found = (
            next((part[key] for key in keys if isinstance(part.get(key), str)), None)
            if kind in (*TEXT_PARTS, *REASONING_PARTS)
            else None
        )
        if found is None:
            raise DataError(f"{where}: a part of type {kind!r:.40} without text: only text can be read. Remove it.")
        (thoughts if kind in REASONING_PARTS else texts).append(found)
    return "".join(texts), "\n".join(thoughts)


def call_in(text: str) -> dict[str, object]:
    """Return the content and `tool_calls` of a call: JSON with name and arguments, or another text."""
    parsed = parse_json(text)
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        return {"content": text}
    return {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def parse_tools(tools: object, place: str) -> tuple[Message, ...]:
    """Return the tools of a chat: a list of objects, or its JSON."""
    if is_blank(tools):
        return ()
    parsed = parse_json(tools) if isinstance(tools, str) else tools
    if not isinstance(parsed, Sequence) or isinstance(parsed, str) or not all(isinstance(t, Mapping) for t in parsed):
        raise DataError(f"{place}: 'tools' must be a list of JSON schemas, got {json.dumps(tools, default=str)[:40]}.")
    return tuple(parsed)
