"""Triples as chats: rendered by the tokenizer's own chat template, and masked by rendering the prompt alone.

`{% generation %}` tags are not used: stock templates lack them and then give a silent mask of zeros. A probe triple is
rendered when the template is loaded, so an unusable template is an error before the first row is read.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cotgrpo.data.reply_format import ReplyFormat
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate, Example, with_system
from cotgrpo.data.tokenizer import transformers
from cotgrpo.data.triples import Triple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = Triple("probe question 7351", "probe rationale 7352", "probe answer 7353", source="the chat template")
PROBE_WITH_SYSTEM = dataclasses.replace(PROBE, system="probe system 7350")
DAY = datetime.date(2024, 7, 26)
"""The date for templates that write today's, so a run resumed tomorrow reads the same tokens."""
FIXED_DATE = "{% macro strftime_now(format) %}{{ cotgrpo_dates.get(format, cotgrpo_dates.iso) }}{% endmacro %}\n"
"""Prepended to a template, it hides the clock that `transformers` offers; Jinja drops the newline there."""
DATE_FORMAT = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1""")
NO_THOUGHT = re.compile(r"\s*(<think>\s*)?</think>\s*")
"""The empty thought that a template may write into a prompt, and not into an assistant's turn."""


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

    def prompt_messages(self, question: str, system: str = "") -> list[dict[str, str]]:
        """Return the messages before the reply.

        A row's own system message replaces `self.system`. If the template takes none, it stands before the question.
        """
        if system and not self.takes_system:
            return [{"role": "user", "content": with_system(question, system)}]
        text = system or self.system
        before = [{"role": "system", "content": text}] if text else []
        return [*before, {"role": "user", "content": question}]

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system message, and neither refuses nor drops it."""
        text, question = PROBE_WITH_SYSTEM.system, PROBE.question
        try:
            return text in self.render(
                [{"role": "system", "content": text}, {"role": "user", "content": question}], prompt=True
            )
        except DataError:
            return False

    def render(self, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        """Return the chat as text; `prompt` adds the start of an assistant's turn.

        Raises:
            DataError: the template refuses the messages.
        """
        import jinja2

        try:
            source = self.tokenizer.get_chat_template()
            formats = [match[1] for match in DATE_FORMAT.findall(source)]
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=FIXED_DATE + source if "strftime_now" in source else source,
                tokenize=False,
                add_generation_prompt=prompt,
                # Each template reads one of these two names.
                enable_thinking=self.thinking,
                thinking=self.thinking,
                cotgrpo_dates={"iso": DAY.isoformat()} | {form: DAY.strftime(form) for form in formats},
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            roles = ", ".join(message["role"] for message in messages)
            fix = " Leave data.system out, and put its text into the questions." if self.system else ""
            raise DataError(
                f"The chat template cannot render messages of {roles} ({type(error).__name__}: {error}).{fix}"
            ) from error
        return str(text)


@dataclasses.dataclass(frozen=True)
class ChatTemplate(AnyTemplate):
    r"""Renders a triple as a user's turn (the question) and an assistant's turn (rationale and answer).

    A sequence is the prompt (`add_generation_prompt=True`), the reply, and the end-of-turn token: the first special
    token that the template writes after the reply. Text after that token (a newline in ChatML) is left out: a student
    that generates has stopped by then. A BOS is there if the template writes it, and is never added.

    Attributes:
        tokenizer: a `transformers` tokenizer with a chat template.
        reasoning: "plain": the reply is the rationale, a blank line and the answer in `answer_format`. "think": the
            rationale is inside `<think>...</think>` (as `reasoning_content` if the template reads that), and the answer
            follows in `answer_format`.
        answer_format: text with `{answer}` in it, as in `ReplyFormat`.
        system: system message of rows without their own; empty: none, and the template's default stays.
        loss_on: "sequence" supervises every token but the first; "completion" only the reply and its end-of-turn token.
        more_stop_ids: further tokens that end a generated reply (of the model's generation config).

    Raises:
        ValueError: a setting outside its range.
        DataError: no chat template, or one that drops or changes texts, refuses the system message, doubles the BOS,
            never ends a turn, or whose prompt is not a prefix of the whole.
    """

    tokenizer: PreTrainedTokenizerBase
    reasoning: Literal["plain", "think"] = "plain"
    answer_format: str = ""
    system: str = ""
    loss_on: Literal["sequence", "completion"] = "sequence"
    more_stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.loss_on not in ("sequence", "completion"):
            raise ValueError(f'loss_on must be "sequence" or "completion", got {self.loss_on!r}.')
        _ = self.reply_format  # checks its settings
        if not self.tokenizer.chat_template:
            raise DataError(
                "The tokenizer has no chat template: take that of the instruction-tuned model and put its "
                "chat_template.jinja next to tokenizer.json, or use the plain format (data.format: plain)."
            )
        prompt = self.prompt(PROBE.question).tolist()
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt[:2] == [bos, bos]:
            raise DataError(
                f"The chat template writes the BOS token {self.tokenizer.bos_token!r} twice. Remove one from it."
            )
        if self.system.strip() not in self.prompt_text(PROBE.question):
            raise DataError(
                "The chat template drops the system message. Leave data.system out, and put its text into the "
                "questions."
            )
        self.encode(PROBE)

    @functools.cached_property
    def reply_format(self) -> ReplyFormat:
        return ReplyFormat(self.reasoning, self.answer_format)

    @functools.cached_property
    def renderer(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer, self.reasoning == "think", self.system)

    @property
    def eos_id(self) -> int:
        """The end-of-turn token, which may differ from the tokenizer's eos."""
        return self.end[1]

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The end-of-turn token, the tokenizer's eos if it has one, and `more_stop_ids`."""
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([self.eos_id, *([] if eos is None else [int(eos)]), *self.more_stop_ids]))

    def encode(self, triple: Triple, prompt: np.ndarray | None = None) -> Example:
        """Return the tokens and mask of a triple; `prompt` holds its prompt's tokens if they are known.

        Raises:
            DataError: rationale and answer would not come back from the rendered text, a text holds a control token, or
                the prompt is not a prefix of the whole.
        """
        before, reply = self.texts(triple)
        self.check_texts(triple, before, reply)
        start = self.ids(before) if prompt is None else prompt.tolist()
        tokens = self.joined(start, before, reply, triple.source)
        if self.controls(tokens) != (self.controls_with_system if triple.system else self.expected_controls):
            raise DataError(f"{triple.source}: {self.held_control(triple)}")
        tokens = tokens[: tokens.index(self.eos_id, len(start)) + 1]
        early = set(self.stop_ids).intersection(tokens[len(start) : -1])
        if early:
            token = self.tokenizer.convert_ids_to_tokens(min(early))
            raise DataError(f"{triple.source}: {token!r} stands inside the reply, where generation would stop.")
        return self.example(tokens, len(start), triple.source)

    def check_texts(self, triple: Triple, before: str, reply: str) -> None:
        """Raise DataError unless every text of the triple comes back from the rendered chat."""
        text = reply.removesuffix(self.end[0])
        if text == reply or self.split_reply(text) != (triple.rationale.strip(), triple.answer.strip()):
            raise DataError(
                f"{triple.source}: rationale and answer cannot be told apart in the assistant's turn, or the chat "
                f"template changes them: {reply!r:.200}. Remove the mark of the answer "
                f"({self.reply_format.mark.strip() or 'a blank line'!r}) from the row's texts; an answer that begins "
                "with a number must be one line."
            )
        for field in ("system", "question"):
            if getattr(triple, field).strip() not in before:
                raise DataError(f"{triple.source}: the chat template drops or changes the {field}: {before!r:.200}.")

    def prompt(self, question: str, system: str = "") -> np.ndarray:
        """Return the int32 tokens of the chat before the reply; a row's own `system` replaces the template's."""
        return np.asarray(self.ids(self.prompt_text(question, system)), np.int32)

    def prompt_text(self, question: str, system: str = "") -> str:
        """Return the chat up to the start of the reply."""
        return self.renderer.render(self.renderer.prompt_messages(question, system), prompt=True)

    def split_reply(self, reply: str | Sequence[int] | np.ndarray) -> tuple[str, str | None]:
        """Split a generated reply, text or token ids up to a stop token, as `ReplyFormat.split` does."""
        if isinstance(reply, str):
            return self.reply_format.split(reply)
        cut_off = not set(self.stop_ids).intersection(map(int, reply))
        return self.reply_format.split(self.decode(reply), cut_off=cut_off)

    def messages(self, triple: Triple, *, as_field: bool) -> list[dict[str, str]]:
        """Return the whole chat; `as_field` puts a thought into `reasoning_content`."""
        reply = self.reply_format.message(triple.rationale, triple.answer, as_field=as_field)
        return [*self.renderer.prompt_messages(triple.question, triple.system), reply]

    def texts(self, triple: Triple) -> tuple[str, str]:
        """Return the prompt and the reply with its end of turn, as text.

        Some templates write an empty thought into a prompt but not into an assistant's turn. It stays in the prompt, as
        in generation.

        Raises:
            DataError: the prompt is not a prefix of the whole in another way.
        """
        before = self.prompt_text(triple.question, triple.system)
        messages = self.messages(triple, as_field=self.reads_field)
        whole = self.renderer.render(messages)
        if whole.startswith(before):
            return before, whole[len(before) :]
        start = whole.rfind(messages[-1]["content"].strip() + self.end[0])
        header = whole[: max(start, 0)]
        if self.reasoning == "plain" and before.startswith(header) and NO_THOUGHT.fullmatch(before[len(header) :]):
            return before, whole[start:]
        same = next(i for i, (a, b) in enumerate(zip(before, whole + "\0", strict=False)) if a != b)
        other = "think" if self.reasoning == "plain" else "plain"
        raise DataError(
            f"{triple.source}: the prompt is not a prefix of the whole chat, so the start of the reply is unknown: "
            f"after {whole[max(same - 40, 0) : same]!r} the prompt continues with {before[same : same + 40]!r}, the "
            f"whole with {whole[same : same + 40]!r}. Try data.reasoning: {other}, or fix the template."
        )

    def joined(self, prompt: list[int], before: str, reply: str, source: str) -> list[int]:
        """Return the tokens of the whole chat, which start with the prompt's.

        If the tokenizer merges text across the border (a prompt that ends in a blank, say), the reply is tokenized
        alone: that is what a student that reads the prompt can write.

        Raises:
            DataError: the reply's own tokens spell another text.
        """
        tokens = self.ids(before + reply)
        if tokens[: len(prompt)] == prompt:
            return tokens
        apart = prompt + self.ids(reply)
        spelled, wanted = (self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (apart, tokens))
        if spelled != wanted:
            raise DataError(
                f"{source}: the tokenizer merges the end of the prompt with the reply, and cannot write the reply "
                f"apart: expected {wanted!r:.200}, got {spelled!r:.200}. End the template's generation prompt with a "
                "token of the tokenizer's own."
            )
        return apart

    @functools.cached_property
    def reads_field(self) -> bool:
        """Whether the template writes a message's `reasoning_content`.

        Raises:
            DataError: it drops a thought in either form.
        """
        if self.reasoning == "plain":
            return False
        thought = re.compile(f"<think>.*{PROBE.rationale}.*</think>.*{PROBE.answer}", re.DOTALL)
        for as_field in (True, False):
            whole = self.renderer.render(self.messages(PROBE, as_field=as_field))
            if thought.search(whole):
                return as_field
        raise DataError(
            "The chat template drops <think> text (and reasoning_content) from an assistant's turn, or writes no "
            f"<think>...</think> around it: {whole[-200:]!r}. Use data.reasoning: plain, or a template that keeps it."
        )

    @functools.cached_property
    def end(self) -> tuple[str, int]:
        """The text that the template writes after a reply, and the end-of-turn token in it.

        Raises:
            DataError: the template drops the reply, or writes no special token after it.
        """
        whole = self.renderer.render(self.messages(PROBE, as_field=self.reads_field))
        _, found, tail = whole.rpartition(self.reply_format.write_answer(PROBE.answer).strip())
        if not found:
            raise DataError(
                "The chat template drops or changes the assistant's turn, so nothing would be supervised: "
                f"{whole!r:.200}."
            )
        own = {*self.tokenizer.added_tokens_decoder, self.tokenizer.eos_token_id}
        end = next((i for i in self.ids(tail) if i in own), None)
        words = tail if end is None else tail.partition(str(self.tokenizer.convert_ids_to_tokens(end)))[0]
        if end is None or words.strip():
            raise DataError(
                f"The chat template ends an assistant's turn with {tail!r}: expected a special token of the tokenizer "
                "first, else a reply could never end. Write the eos token there "
                f"({self.tokenizer.eos_token!r}), or add the template's token to the tokenizer."
            )
        return tail, int(end)

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that only the template may write."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset({i for i, token in added if token.special} | set(self.stop_ids))

    @functools.cached_property
    def expected_controls(self) -> list[int]:
        """The control tokens, in order, of a chat whose row has no system message."""
        return self.controls_of(PROBE)

    @functools.cached_property
    def controls_with_system(self) -> list[int]:
        """The control tokens, in order, of a chat whose row has a system message."""
        return self.controls_of(PROBE_WITH_SYSTEM)

    def controls_of(self, triple: Triple) -> list[int]:
        before, reply = self.texts(triple)
        return self.controls(self.joined(self.ids(before), before, reply, triple.source))

    def controls(self, tokens: Sequence[int]) -> list[int]:
        return [i for i in tokens if i in self.control_ids]

    def held_control(self, triple: Triple) -> str:
        """Return an error message for a triple whose text holds control tokens."""
        for field in ("system", "question", "rationale", "answer"):
            found = self.controls(self.ids(getattr(triple, field)))
            if found:
                name = self.tokenizer.convert_ids_to_tokens(found[0])
                return (
                    f"the {field} holds the control token {name!r}, which only the chat template may write. "
                    "Remove it from the row."
                )
        return "the text and the chat template together spell a control token. Remove what looks like one from the row."


def generation_stop_ids(path_or_id: str | Path) -> tuple[int, ...]:
    """Return the stop tokens of a local folder or hub id, maybe none.

    As in `transformers`, that is `eos_token_id` of the generation config, else of config.json.

    Raises:
        DataError: a file that cannot be read.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            file = transformers().utils.cached_file(str(path_or_id), name, _raise_exceptions_for_missing_entries=False)
            stops = None if file is None else json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id")
            found = tuple(int(s) for s in (stops if isinstance(stops, list) else [stops]) if s is not None)
        except Exception as error:  # a broken file or a broken connection, which raise many kinds
            raise DataError(
                f"{path_or_id}/{name} cannot be read ({type(error).__name__}: {error}). Fix or remove it."
            ) from error
        if found:
            return found
    return ()
