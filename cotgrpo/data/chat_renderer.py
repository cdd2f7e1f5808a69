"""Chats as text: messages, and each turn's prompt and reply, rendered by the tokenizer's own chat template."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from cotgrpo.data.answers import split_reply, split_thought
from cotgrpo.data.answers.thoughts import MARKS
from cotgrpo.data.reply_format import ReplyFormat
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import PromptRow, attempt, or_raise, with_system
from cotgrpo.data.triples import Triple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, Any]
"""One message of a chat, as JSON: role, content, and maybe reasoning_content or tool_calls."""
PROBE = Triple("probe question 7351", "probe rationale 7352", "probe answer 7353", source="the chat template")
PROBE_WITH_SYSTEM = dataclasses.replace(PROBE, system="probe system 7350")
DAY = datetime.date(2024, 7, 26)
"""The date for templates that write today's, so a run resumed tomorrow reads the same tokens."""
FIXED_DATE = "{% macro strftime_now(format) %}{{ cotgrpo_dates.get(format, cotgrpo_dates.iso) }}{% endmacro %}\n"
"""Prepended to a template, it hides the clock that `transformers` offers; Jinja drops the newline there."""
DATE_FORMAT = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1""")


RENDER_SECONDS, SECONDS_OF_A_CHAT = 5.0, 0.05
"""Processor time that a template may take, and what each chat of a call adds. Usual ones take under a millisecond."""
LONGEST_TEXT = 100_000_000
"""Characters of a rendered chat."""


class EndlessTemplate(DataError):
    """Raised for a chat template that computes for too long, or writes too much."""


class RenderWatch:
    """Ends renderings that take too long, in any thread: loops inside loops would go on for years.

    Jinja's sandbox bounds one range, and no more. A thread looks at those that are going on, and raises EndlessTemplate
    in theirs, as soon as they are between two instructions of Python.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends: dict[int, float] = {}  # of the processor time of each thread that renders
        self.refused: set[str] = set()
        self.thread: threading.Thread | None = None

    @contextlib.contextmanager
    def limit(self, source: str, seconds: float) -> Iterator[None]:
        """Limit what the block, which renders the template `source`, takes. One that has failed so fails at once."""
        if source in self.refused:
            raise self.error(seconds)
        ident = threading.get_ident()
        with self.lock:
            self.ends[ident] = processor_time(ident) + seconds
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self.watch, name="chat templates", daemon=True)
                self.thread.start()
        try:
            yield
        except EndlessTemplate:
            self.refused.add(source)
            raise self.error(seconds) from None
        finally:
            with self.lock:
                if self.ends.pop(ident, None) is None:  # the error may not have arrived yet
                    raise_in(ident, None)

    def watch(self) -> None:
        """Look at the renderings that are going on, several times a second."""
        while True:
            time.sleep(0.2)
            with self.lock:
                for ident in [ident for ident, end in self.ends.items() if processor_time(ident) > end]:
                    del self.ends[ident]
                    raise_in(ident, EndlessTemplate)

    def error(self, seconds: float) -> EndlessTemplate:
        """Return the error, with what to do."""
        return EndlessTemplate(
            f"The chat template computes for more than {seconds:.0f} s, so it may never end. Use the template of the "
            "model's own publisher, or data.format plain."
        )


WATCH = RenderWatch()


def processor_time(ident: int) -> float:
    """Return the processor time that a thread has taken."""
    return time.clock_gettime(time.pthread_getcpuclockid(ident))


def raise_in(ident: int, error: type[Exception] | None) -> None:
    """Raise an exception in a thread at its next instruction. None takes back one that has not arrived."""
    raised = ctypes.py_object() if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), raised)


class Turn(NamedTuple):
    """One reply of a chat, as text.

    Attributes:
        before: the prompt that a student reads.
        reply: what the student is to write, its end-of-turn token included.
    """

    before: str
    reply: str


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

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system message, and neither refuses nor drops it.

        Some write it into the last message of the user: then it is in a prompt, and not in the whole chat.
        """
        system, asked, said = (
            {"role": role, "content": text}
            for role, text in (
                ("system", PROBE_WITH_SYSTEM.system),
                ("user", PROBE.question),
                ("assistant", PROBE.answer),
            )
        )
        try:
            prompt, whole = self.render([system, asked], prompt=True), self.render([system, asked, said])
        except DataError:
            return False
        return system["content"] in prompt and system["content"] in whole

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
            except EndlessTemplate:
                raise
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
        except EndlessTemplate:
            raise
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
        with WATCH.limit(source, RENDER_SECONDS + SECONDS_OF_A_CHAT * len(chats)):
            try:
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
            except (RecursionError, MemoryError, OverflowError) as error:
                raise DataError(f"The chat template computes too much ({type(error).__name__}).") from error
        rendered = [str(text) for text in texts]
        if any(len(text) > LONGEST_TEXT for text in rendered):
            raise DataError(f"The chat template writes more than {LONGEST_TEXT:,} characters for a chat.")
        return rendered

    def source(self, *, with_tools: bool = False) -> str:
        """Return the template itself; a tokenizer may have another one for chats with tools."""
        return str(self.tokenizer.get_chat_template(tools=[{}] if with_tools else None))


@dataclasses.dataclass(frozen=True)
class TurnRenderer(ChatRenderer):
    """Renders turns: what a student reads before a reply, and the reply that it is to write.

    Attributes:
        tokenizer, system: as in `ChatRenderer`.
        thinking: whether replies have a thought. The template is to leave room for it.
        answer_format: text with `{answer}` in it, as in `ReplyFormat`.
        more_stop_ids: further tokens that end a generated reply.
    """

    answer_format: str = ""
    more_stop_ids: tuple[int, ...] = ()

    @functools.cached_property
    def marks(self) -> tuple[str, str]:
        """The marks of a thought that the template knows."""
        source = self.source()
        return next((marks for marks in MARKS if marks[0] in source), MARKS[0])

    def row_messages(self, row: PromptRow) -> list[dict[str, Any]]:
        """Return the messages before a row's reply."""
        return [self.in_own_marks(m) for m in self.prompt_messages(row.question, row.system, row.context)]

    def in_own_marks(self, message: Message) -> dict[str, Any]:
        """Return the message with its thought as the template reads it, if it has the marks of another model."""
        content = with_text(message).get("content")
        if message.get("role") != "assistant" or not isinstance(content, str):
            return dict(message)
        thought = split_thought(content)
        if not thought.marked or thought.unclosed or self.marks[1] in content:
            return dict(message)
        opening, closing = self.marks
        if "<|channel|>" in opening:  # gpt-oss: marks that only the template may write
            return {**message, "content": thought.text, "reasoning_content": thought.thought}
        return {**message, "content": f"{opening}\n{thought.thought}\n{closing}\n\n{thought.text}"}

    @functools.cached_property
    def message_format(self) -> ReplyFormat:
        """Writes replies as messages."""
        return ReplyFormat("think" if self.thinking else "plain", self.answer_format, self.marks)

    @functools.cached_property
    def reply_format(self) -> ReplyFormat:
        """Splits replies, with the marks that the template writes around a thought."""
        if self.thought_form == "built":
            return self.message_format
        reply = self.texts(PROBE).reply
        opening, _, rest = reply.partition(PROBE.rationale)
        closing = rest.partition(self.message_format.write_answer(PROBE.answer))[0]
        return dataclasses.replace(self.message_format, marks=(opening.strip() or self.marks[0], closing.strip()))

    @functools.cached_property
    def thought_form(self) -> Literal["none", "field", "inline", "built"]:
        """How a reply's thought reaches the rendered text.

        In the message's `reasoning_content`, or inside its content, or not at all, so it is built here.
        """
        if not self.thinking:
            return "none"
        before = self.prompt_text(PROBE.question)
        opening, closing = map(re.escape, self.marks)
        thought = re.compile(f"{opening}.*{PROBE.rationale}.*{closing}.*{PROBE.answer}", re.DOTALL)
        for form in ("field", "inline"):
            whole = attempt(self.render, self.messages(PROBE, as_field=form == "field"))
            if isinstance(whole, str) and whole.startswith(before) and thought.search(whole):
                return form
        return "built"

    @property
    def reads_field(self) -> bool:
        """Whether the template writes the `reasoning_content` of a message as its thought."""
        return self.thought_form == "field"

    @functools.cached_property
    def lead(self) -> str:
        """What the template writes before a plain reply, apart from white space (the channel of gpt-oss)."""
        if self.thinking:
            return ""
        return self.texts(PROBE).reply.partition(PROBE.rationale)[0].strip()

    def messages(self, triple: Triple, *, as_field: bool) -> list[dict[str, Any]]:
        """Return the whole chat; `as_field` puts a thought into `reasoning_content`."""
        reply = self.message_format.message(triple.rationale, triple.answer, as_field=as_field)
        return [*self.row_messages(triple), dict(reply)]

    def last_message(self, triple: Triple) -> dict[str, Any]:
        """Return the message of a triple's last reply, without its thought if that is built here."""
        if triple.verbatim:
            return self.in_own_marks({"role": "assistant", "content": triple.answer})
        if self.thought_form == "built":
            return {"role": "assistant", "content": self.message_format.write_answer(triple.answer)}
        return dict(self.message_format.message(triple.rationale, triple.answer, as_field=self.reads_field))

    def split(self, reply: str, *, cut_off: bool = False) -> tuple[str, str | None]:
        """Split a generated reply into rationale and answer, as `ReplyFormat.split` does.

        A finished reply without the closing mark of a thought is split as any other, unless the prompt opens a thought.
        """
        reply = reply.strip().removeprefix(self.lead) if self.lead else reply
        if self.thinking and not cut_off and self.marks[1] not in reply and not self.opens_thought:
            return split_reply(reply)
        return self.reply_format.split(reply, cut_off=cut_off)

    @functools.cached_property
    def opens_thought(self) -> bool:
        """Whether the prompt opens the thought, so that a reply without its closing mark is all thought."""
        return self.prompt_text(PROBE.question).rstrip().endswith(self.marks[0])

    def prompt_text(self, question: str, system: str = "") -> str:
        """Return the chat up to the start of the reply."""
        return or_raise(self.prompt_end(self.render(self.prompt_messages(question, system), prompt=True)))

    def prompts(self, rows: Sequence[PromptRow]) -> list[str | DataError]:
        """Return each row's chat up to the start of the (last) reply, or the error."""
        single = [self.row_messages(row) for row in rows if not is_long(row)]
        rendered = iter(self.render_all(single, prompt=True))
        return [
            placed(attempt(self.row_prompt, row) if is_long(row) else self.prompt_end(next(rendered)), row)
            for row in rows
        ]

    def row_prompt(self, row: PromptRow) -> str | DataError:
        """Return the chat of several turns or with tools up to the start of the last reply."""
        return self.prompt_end(self.render(self.row_messages(row), prompt=True, tools=row.tools))

    def prompt_end(self, before: str | DataError) -> str | DataError:
        """Close the thought that a prompt opens, if replies have none. An error stays."""
        if isinstance(before, DataError) or self.thinking or not before.rstrip().endswith(self.marks[0]):
            return before
        return before + self.built_thought(before, "")

    def texts(self, triple: Triple) -> Turn:
        """Return the prompt and the reply of a triple without a context, unchecked."""
        chat = [*self.row_messages(triple), self.last_message(triple)]
        before = self.prompt_text(triple.question, triple.system)
        return self.turn(triple, before, self.render(chat))

    def turn_at(self, triple: Triple, messages: Sequence[Message], message: Message, *, last: bool = False) -> Turn:
        """Return the turn of one message of the assistant after the others."""
        rendered = self.prompt_end(attempt(self.render, messages, prompt=True, tools=triple.tools))
        before = or_raise(placed(rendered, triple))
        whole = attempt(self.render, [*messages, message], tools=triple.tools)
        lost = lost_message(messages, before)
        if lost is not None:
            raise DataError(
                f"{triple.source}: the chat template drops or changes a message of the {lost.get('role')}: "
                f"{described(lost)}. Leave the row out, or use a template that writes it."
            )
        turn = self.turn(
            triple, before, or_raise(placed(whole, triple)), None if last and not triple.verbatim else message
        )
        if not last or triple.verbatim:
            check_written(message, turn, triple.source)
        return turn

    def turn(self, triple: Triple, before: str, whole: str, message: Message | None = None) -> Turn:
        """Return a turn from its rendered prompt and whole.

        Args:
            triple: the row.
            before: the prompt.
            whole: the chat with the reply.
            message: the reply as it stands in the row; None: the triple's rationale and answer.
        """
        if message is None and not triple.verbatim:
            thought = triple.rationale.strip() if self.thought_form == "built" else ""
            reply = self.reply_after(before, whole, thought, triple.source)
            tail, end = self.end[0], self.end_text
            if reply.endswith(tail):
                return Turn(before, reply.removesuffix(tail) + end)
        else:
            message = self.last_message(triple) if message is None else message
            thought = thought_of(message) if self.thinking else ""
            reply = self.reply_after(before, whole, thought, triple.source)
        found = self.stop_pattern.search(reply)
        if found is None and self.end_text not in self.end[0] and not (message and message.get("tool_calls")):
            return Turn(before, reply.rstrip() + self.end_text)
        if found is None:
            raise DataError(f"{triple.source}: the chat template does not end the assistant's turn: {reply!r:.200}.")
        return Turn(before, reply[: found.end()])

    def reply_after(self, before: str, whole: str, thought: str, source: str) -> str:
        """Return what follows the prompt in the whole chat.

        A prompt may open a thought, or close an empty one, and the template may leave the thought out of a reply. Then
        the reply is built: the thought, its closing mark and the rest.

        Args:
            before: the prompt.
            whole: the chat with the reply.
            thought: the thought that the reply must have.
            source: the row's place.

        Raises:
            DataError: the prompt is not a prefix of the whole in another way.
        """
        opening, closing = self.marks
        bare = before.rstrip()
        opened, closed = bare.endswith(opening), bare.endswith(closing)
        if whole.startswith(before):
            reply = whole[len(before) :]
            if not (thought or opened) or (closing in reply and thought in reply):
                return reply
            if closed:
                raise DataError(
                    f"{source}: the prompt closes the thought ({before[-40:]!r}), so a reply cannot have one. "
                    "Try data.reasoning: plain, or fix the template."
                )
        else:
            header = bare.removesuffix(closing).rstrip().removesuffix(opening).rstrip()
            if not (opened or (closed and not self.thinking)) or not whole.startswith(header):
                raise self.not_a_prefix(before, whole, source)
            reply = whole[len(header) :]
        reply = reply.lstrip()
        rest = reply.removeprefix(opening).lstrip()
        if opened and closing in rest and not rest.startswith(closing) and rest != reply:
            return rest  # the thought of the template, after other white space
        if rest.startswith(closing) or (rest != reply and closing in rest):
            rest = rest.partition(closing)[2].lstrip()
        return self.built_thought(before, thought) + rest if opened or thought else rest

    def built_thought(self, before: str, thought: str) -> str:
        """Return a thought and its closing mark, as they follow a prompt that may have opened it."""
        opening, closing = self.marks
        lead = opening + "\n"
        if before.rstrip().endswith(opening):
            lead = "" if before[-1:].isspace() else "\n"
        return f"{lead}{thought}\n{closing}\n\n"

    def not_a_prefix(self, before: str, whole: str, source: str) -> DataError:
        """Return the error for a prompt that is another text than the start of the whole chat."""
        same = next(i for i, (a, b) in enumerate(zip(before, whole + "\0", strict=False)) if a != b)
        other = "plain" if self.thinking else "think"
        return DataError(
            f"{source}: the prompt is not a prefix of the whole chat, so the start of the reply is unknown: "
            f"after {whole[max(same - 40, 0) : same]!r} the prompt continues with {before[same : same + 40]!r}, the "
            f"whole with {whole[same : same + 40]!r}. Try data.reasoning: {other}, or fix the template."
        )

    def check_texts(self, triple: Triple, turn: Turn) -> None:
        """Raise DataError unless every text of the triple comes back from the rendered chat."""
        text = turn.reply.removesuffix(self.end_text)
        if triple.verbatim:
            check_written(self.last_message(triple), turn, triple.source)
        elif text == turn.reply or self.split(text) != (triple.rationale.strip(), triple.answer.strip()):
            raise DataError(
                f"{triple.source}: rationale and answer cannot be told apart in the assistant's turn, or the chat "
                f"template changes them: {turn.reply!r:.200}. Remove the mark of the answer "
                f"({self.reply_format.mark.strip() or 'a blank line'!r}) from the row's texts; an answer that begins "
                "with a number must be one line."
            )
        for field in ("system", "question"):
            if getattr(triple, field).strip() not in turn.before and not (triple.context and field == "question"):
                raise DataError(
                    f"{triple.source}: the chat template drops or changes the {field}: {turn.before!r:.200}."
                )

    @functools.cached_property
    def end(self) -> tuple[str, int]:
        """The text that the template writes after a reply, and the end-of-turn token in it.

        Raises:
            DataError: the template drops the reply, or writes no special token after it.
        """
        whole = self.render([*self.row_messages(PROBE), self.last_message(PROBE)])
        _, found, tail = whole.rpartition(self.message_format.write_answer(PROBE.answer).strip())
        if not found:
            raise DataError(
                "The chat template drops or changes the assistant's turn, so nothing would be supervised: "
                f"{whole!r:.200}."
            )
        end, words = self.first_added(tail)
        if end is None and not words.strip():
            end = self.end_by_next_turn()
        if end is None or words.strip():
            raise DataError(
                f"The chat template ends an assistant's turn with {tail!r}: expected a special token of the tokenizer "
                "first, else a reply could never end. Write the eos token there "
                f"({self.tokenizer.eos_token!r}), or add the template's token to the tokenizer."
            )
        return tail, end

    def first_added(self, text: str) -> tuple[int | None, str]:
        """Return the first of the tokenizer's added tokens in a text, or None, and the text before it."""
        own = {*self.tokenizer.added_tokens_decoder, self.tokenizer.eos_token_id}
        found = next((int(i) for i in self.tokenizer.encode(text, add_special_tokens=False) if i in own), None)
        name = None if found is None else str(self.tokenizer.convert_ids_to_tokens(found))
        return found, text if name is None else text.partition(name)[0]

    def end_by_next_turn(self) -> int | None:
        """Return the token that starts the next turn of the user, if it ends replies too, as with GLM's templates."""
        asked = {"role": "user", "content": PROBE.question}
        whole = self.render([*self.row_messages(PROBE), self.last_message(PROBE), asked])
        end, words = self.first_added(whole.rpartition(PROBE.answer)[2])
        stops = (self.tokenizer.eos_token_id, *self.more_stop_ids)
        return end if end in stops and not words.strip() else None

    @functools.cached_property
    def end_text(self) -> str:
        """The text after a reply, up to and with the end-of-turn token."""
        tail, end = self.end
        name = str(self.tokenizer.convert_ids_to_tokens(end))
        return (tail.partition(name)[0] if name in tail else "") + name

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The end-of-turn token, the tokenizer's eos if it has one, and `more_stop_ids`."""
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([self.end[1], *([] if eos is None else [int(eos)]), *self.more_stop_ids]))

    @functools.cached_property
    def stop_pattern(self) -> re.Pattern[str]:
        return any_of(str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.stop_ids)


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
    """Return the first message that the rendered text lacks; None if it has all.

    A template may write a tool's answer as JSON text. Of the assistant's messages only calls of tools are looked for:
    their thoughts may be left out.
    """
    for message in messages:
        content = with_text(message).get("content")
        if message.get("role") == "assistant":
            found = all(name in text for name in called_tools(message))
        elif isinstance(content, str):
            forms = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
            found = any(form.strip() in text for form in forms)
        else:
            found = True
        if not found:
            return message
    return None


def called_tools(message: Message) -> list[str]:
    """Return the names of the tools that a message calls."""
    calls = message.get("tool_calls") or ()
    return [str((call.get("function") or call).get("name")) for call in calls if isinstance(call, Mapping)]


def described(message: Message) -> str:
    """Return what a message says, for an error: the start of its content, and the tools that it calls."""
    tools = ", ".join(called_tools(message))
    return f"{message.get('content')!r:.100}" + (f", with a call of {tools}" if tools else "")


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds the longest of the texts at the first place where one of them stands."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def is_long(row: PromptRow) -> bool:
    """Return whether a row is a chat of several turns or with tools."""
    return bool(row.context or row.tools)


def placed(text: str | DataError, row: PromptRow) -> str | DataError:
    """Return the text, or an error with the row's place in front of it."""
    return text if isinstance(text, str) or not row.source else DataError(f"{row.source}: {text}")


def thought_of(message: Message) -> str:
    """Return the thought of an assistant's message, from its own field or from marks in its content; maybe empty."""
    field = next((message[name] for name in ("reasoning_content", "reasoning", "thinking") if message.get(name)), None)
    if field is None:
        content = message.get("content")
        field = split_thought(content).thought if isinstance(content, str) else ""
    return str(field).strip()


def check_written(message: Message, turn: Turn, source: str) -> None:
    """Raise DataError if the template drops or changes what an assistant's message says."""
    if thought_of(message) not in turn.reply:
        raise DataError(
            f"{source}: a reply of the assistant has a thought, which the chat template leaves out. Remove the "
            "thought, or set data.reasoning: think."
        )
    content = with_text(message).get("content")
    words = split_thought(content).text.strip() if isinstance(content, str) else ""
    names = called_tools(message)
    if not (words or names) or not all(text in turn.reply for text in (words, *names)):
        raise DataError(
            f"{source}: the chat template drops or changes a reply of the assistant, or it is empty: "
            f"{described(message)} becomes {turn.reply!r:.200}. Leave the row out, or use a template that writes it."
        )
