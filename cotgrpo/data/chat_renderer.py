"""Chats as text: messages rendered by the tokenizer's own chat template."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from cotgrpo.data.sources import DataError
from cotgrpo.data.template import PromptRow, with_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, Any]
"""One message of a chat, as JSON: role, content, and maybe reasoning_content or tool_calls."""
DAY = datetime.date(2024, 7, 26)
"""The date for templates that write today's, so a run resumed tomorrow reads the same tokens."""
FIXED_DATE = "{% macro strftime_now(format) %}{{ cotgrpo_dates.get(format, cotgrpo_dates.iso) }}{% endmacro %}\n"
"""Prepended to a template, it hides the clock that `transformers` offers; Jinja drops the newline there."""
DATE_FORMAT = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1""")


@dataclasses.dataclass(frozen=True)
class ChatRenderer:
    """Renders messages as text with `tokenizer.chat_template`.

    Attributes:
        tokenizer: a `transformers` tokenizer with a chat template.
        thinking: whether the template is to leave room for a thought.
        system: the system message of chats without their own; empty: none, and the template's default stays.
    """

    tokenizer: PreTrainedTokenizerBase
    thinking: bool = False
    system: str = ""

    def prompt_messages(self, question: str, system: str = "", context: Sequence[Message] = ()) -> list[dict[str, Any]]:
        """Return the messages before the reply.

        A row's own system message replaces `self.system`. If the template takes none, it stands before the first
        message of the user.

        Args:
            question: the question.
            system: the row's own system message; empty: none.
            context: every message before the reply, if there are several; the question is the last of them.
        """
        chat = [dict(message) for message in context] or [{"role": "user", "content": question}]
        if system and not self.takes_system:
            first = next((m for m in chat if m.get("role") == "user" and isinstance(m.get("content"), str)), chat[0])
            first["content"] = with_system(str(first.get("content") or ""), system)
            return chat
        text = system or self.system
        return [{"role": "system", "content": text}, *chat] if text else chat

    def row_messages(self, row: PromptRow) -> list[dict[str, Any]]:
        """Return the messages before a row's reply."""
        return self.prompt_messages(row.question, row.system, row.context)

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system message, and neither refuses nor drops it."""
        probe = {"role": "system", "content": "probe system 7350"}
        try:
            return probe["content"] in self.render([probe, {"role": "user", "content": "probe 7351"}], prompt=True)
        except DataError:
            return False

    def render(self, messages: Sequence[Message], *, prompt: bool = False, tools: Sequence[Message] = ()) -> str:
        """Return the chat as text.

        Args:
            messages: the chat. If the template cannot read a message, its other forms are tried (`message_forms`).
            prompt: add the start of an assistant's turn.
            tools: JSON schemas of the tools.

        Raises:
            DataError: the template refuses the messages.
        """
        import jinja2

        refusal: Exception | None = None
        for form in message_forms(messages):
            try:
                return self.apply([form], prompt, tools)[0]
            except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
                refusal = refusal or error
        roles = ", ".join(str(message.get("role")) for message in messages)
        fix = " Leave data.system out, and put its text into the questions." if self.system else ""
        raise DataError(
            f"The chat template cannot render messages of {roles} ({type(refusal).__name__}: {refusal}).{fix}"
        ) from refusal

    def render_all(self, chats: Sequence[Sequence[Message]], *, prompt: bool = False) -> list[str | DataError]:
        """Return every chat as text, or the error of `render`; chats without tools."""
        import jinja2

        try:
            return list(self.apply(chats, prompt, ()))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            rendered: list[str | DataError] = []
            for chat in chats:
                try:
                    rendered.append(self.render(chat, prompt=prompt))
                except DataError as error:
                    rendered.append(error)
            return rendered

    def apply(self, chats: Sequence[Sequence[Message]], prompt: bool, tools: Sequence[Message]) -> list[str]:
        """Call `apply_chat_template` on several chats at once."""
        if not chats:
            return []
        source = self.source(with_tools=bool(tools))
        formats = [match[1] for match in DATE_FORMAT.findall(source)]
        texts = self.tokenizer.apply_chat_template(
            [[dict(message) for message in chat] for chat in chats],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=FIXED_DATE + source if "strftime_now" in source else source,
            tokenize=False,
            add_generation_prompt=prompt,
            # Each template reads one of these two names.
            enable_thinking=self.thinking,
            thinking=self.thinking,
            cotgrpo_dates={"iso": DAY.isoformat()} | {form: DAY.strftime(form) for form in formats},
        )
        return [str(text) for text in texts]

    def source(self, *, with_tools: bool = False) -> str:
        """Return the template itself; a tokenizer may have another one for chats with tools."""
        return str(self.tokenizer.get_chat_template(tools=[{}] if with_tools else None))


def message_forms(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Yield the forms in which templates may read these messages, the usual one first.

    The arguments of a tool call may be JSON text or an object, and a message without content may lack it or hold an
    empty text. A content of text parts is always joined.
    """
    if all(isinstance(message.get("content"), str) and not message.get("tool_calls") for message in messages):
        yield messages
        return
    usual = [with_arguments(with_text(message), as_text=False) for message in messages]
    yield usual
    yield [{**message, "content": message.get("content") or ""} for message in usual]
    as_text = [with_arguments(message, as_text=True) for message in usual]
    yield as_text
    yield [{**message, "content": message.get("content") or ""} for message in as_text]


def with_text(message: Message) -> Message:
    """Return the message with its content's text parts joined."""
    parts = message.get("content")
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        return message
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    joined = [text for text in texts if isinstance(text, str)]
    return {**message, "content": "".join(joined)} if len(joined) == len(texts) else message


def with_arguments(message: Message, *, as_text: bool) -> Message:
    """Return the message with the arguments of its tool calls as JSON text, or as objects."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        return message
    return {**message, "tool_calls": [converted_call(call, as_text) for call in calls]}


def converted_call(call: Message, as_text: bool) -> Message:
    """Return one tool call with its arguments converted; arguments that are no JSON stay."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": converted_call(call["function"], as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        try:
            return {**call, "arguments": json.loads(arguments)}
        except ValueError:
            return call
    return call


def texts_in(value: object) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from texts_in(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from texts_in(part)


def lost_message(messages: Sequence[Message], text: str) -> Message | None:
    """Return the first message of the user or of a tool that the rendered text lacks; None if it has all.

    A template may write a tool's answer as JSON text.
    """
    for message in messages:
        content = with_text(message).get("content")
        if message.get("role") == "assistant" or not isinstance(content, str):
            continue
        forms = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
        if not any(form.strip() in text for form in forms):
            return message
    return None
