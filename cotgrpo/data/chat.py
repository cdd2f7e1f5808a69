"""Triples as chats: rendered by the tokenizer's own chat template, and masked by rendering the prompt alone.

`{% generation %}` tags are not used: stock templates lack them and then give a silent mask of zeros. A probe triple is
rendered when the template is loaded, so an unusable template is an error before the first row is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from cotgrpo.data.answers import split_thought
from cotgrpo.data.answers.thoughts import MARKS
from cotgrpo.data.chat_renderer import DAY as DAY
from cotgrpo.data.chat_renderer import ChatRenderer, Message, lost_message, texts_in, with_text
from cotgrpo.data.reply_format import ReplyFormat
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate, Example, PromptRow, attempt, or_raise
from cotgrpo.data.tokenizer import transformers
from cotgrpo.data.triples import Triple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = Triple("probe question 7351", "probe rationale 7352", "probe answer 7353", source="the chat template")
PROBE_WITH_SYSTEM = dataclasses.replace(PROBE, system="probe system 7350")


class Turn(NamedTuple):
    """One reply of a chat, as text.

    Attributes:
        before: the prompt that a student reads.
        reply: what the student is to write, its end-of-turn token included.
    """

    before: str
    reply: str


@dataclasses.dataclass(frozen=True)
class Chat:
    """One sequence, as text: supervised turns of a triple. Each is a prefix of the next one's prompt."""

    triple: Triple
    turns: tuple[Turn, ...]

    @property
    def text(self) -> str:
        return self.turns[-1].before + self.turns[-1].reply


@dataclasses.dataclass(frozen=True)
class ChatTemplate(AnyTemplate):
    r"""Renders a triple as a user's turn (the question) and an assistant's turn (rationale and answer).

    A sequence is the prompt (`add_generation_prompt=True`), the reply, and the end-of-turn token: the first special
    token that the template writes after the reply. Text after that token (a newline in ChatML) is left out: a student
    that generates has stopped by then. A BOS is there if the template writes it, and is never added.

    A triple with a `context` is a chat of several turns. Its earlier messages are rendered as they are. `turns="all"`
    supervises every reply of the assistant. A reply and its prompt are always what a student reads and writes at that
    turn. If the template renders an earlier turn in another way later on (it drops thoughts from the history, say), the
    turns become several sequences.

    Attributes:
        tokenizer: a `transformers` tokenizer with a chat template.
        reasoning: "plain": the reply is the rationale, a blank line and the answer in `answer_format`. A template that
            opens a thought in the prompt gets an empty one there. "think": the rationale is inside
            `<think>...</think>`, or the template's own marks, and the answer follows in `answer_format`. If the
            template drops the thought, it is put between the prompt and the answer.
        answer_format: text with `{answer}` in it, as in `ReplyFormat`.
        system: system message of rows without their own; empty: none, and the template's default stays.
        loss_on: "sequence" supervises every token but the first; "completion" only the replies and their end-of-turn
            tokens.
        more_stop_ids: further tokens that end a generated reply (of the model's generation config).
        turns: "last": one sequence a triple, and "completion" supervises its last reply; "all": every reply.

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
    turns: Literal["last", "all"] = "last"

    def __post_init__(self) -> None:
        if self.loss_on not in ("sequence", "completion"):
            raise ValueError(f'loss_on must be "sequence" or "completion", got {self.loss_on!r}.')
        if self.turns not in ("last", "all"):
            raise ValueError(f'turns must be "last" or "all", got {self.turns!r}.')
        _ = ReplyFormat(self.reasoning, self.answer_format)  # checks its settings
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
    def renderer(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer, self.reasoning == "think", self.system)

    # Forms of a reply.

    @functools.cached_property
    def marks(self) -> tuple[str, str]:
        """The marks of a thought that the template knows."""
        source = self.renderer.source()
        return next((marks for marks in MARKS if marks[0] in source), MARKS[0])

    @functools.cached_property
    def message_format(self) -> ReplyFormat:
        """Writes replies as messages."""
        return ReplyFormat(self.reasoning, self.answer_format, self.marks)

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
        if self.reasoning == "plain":
            return "none"
        before = self.prompt_text(PROBE.question)
        opening, closing = map(re.escape, self.marks)
        thought = re.compile(f"{opening}.*{PROBE.rationale}.*{closing}.*{PROBE.answer}", re.DOTALL)
        for form in ("field", "inline"):
            whole = attempt(self.renderer.render, self.messages(PROBE, as_field=form == "field"))
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
        if self.reasoning == "think":
            return ""
        return self.texts(PROBE).reply.partition(PROBE.rationale)[0].strip()

    def messages(self, triple: Triple, *, as_field: bool) -> list[dict[str, Any]]:
        """Return the whole chat; `as_field` puts a thought into `reasoning_content`."""
        reply = self.message_format.message(triple.rationale, triple.answer, as_field=as_field)
        return [*self.renderer.row_messages(triple), dict(reply)]

    def last_message(self, triple: Triple) -> dict[str, Any]:
        """Return the message of a triple's last reply, without its thought if that is built here."""
        if triple.verbatim:
            return {"role": "assistant", "content": triple.answer}
        if self.thought_form == "built":
            return {"role": "assistant", "content": self.message_format.write_answer(triple.answer)}
        return dict(self.message_format.message(triple.rationale, triple.answer, as_field=self.reads_field))

    def split_reply(self, reply: str | Sequence[int] | np.ndarray) -> tuple[str, str | None]:
        """Split a generated reply, text or token ids up to a stop token, as `ReplyFormat.split` does."""
        if isinstance(reply, str):
            return self.reply_format.split(reply.strip().removeprefix(self.lead) if self.lead else reply)
        cut_off = not set(self.stop_ids).intersection(map(int, reply))
        text = self.decode(reply)
        return self.reply_format.split(text.strip().removeprefix(self.lead) if self.lead else text, cut_off=cut_off)

    # Prompts.

    def prompt(self, question: str, system: str = "") -> np.ndarray:
        """Return the int32 tokens of the chat before the reply; a row's own `system` replaces the template's."""
        return np.asarray(self.ids(self.prompt_text(question, system)), np.int32)

    def prompt_text(self, question: str, system: str = "") -> str:
        """Return the chat up to the start of the reply."""
        return or_raise(
            self.prompt_end(self.renderer.render(self.renderer.prompt_messages(question, system), prompt=True))
        )

    def prompt_end(self, before: str | DataError) -> str | DataError:
        """Close the thought that a prompt opens, if replies have none. An error stays."""
        if isinstance(before, DataError) or self.reasoning == "think" or not before.rstrip().endswith(self.marks[0]):
            return before
        return before + self.built_thought(before, "")

    def prompts_of(self, rows: Sequence[PromptRow]) -> list[np.ndarray | DataError]:
        """Return the int32 tokens of each row's chat before the (last) reply.

        An error stands for a row that the template cannot render, or whose text holds a control token.
        """
        texts = self.prompt_texts(rows)
        found = iter(self.ids_batch([text for text in texts if isinstance(text, str)]))
        return [
            text if isinstance(text, DataError) else attempt(self.checked_prompt, row, next(found))
            for row, text in zip(rows, texts, strict=True)
        ]

    def checked_prompt(self, row: PromptRow, ids: list[int]) -> np.ndarray:
        """Return a row's prompt. Raises DataError if the row's text holds a control token."""
        tokens = np.asarray(ids, np.int32)
        if is_long(row):
            self.check_context(row)
        elif self.controls(tokens) != self.expected_controls[bool(row.system)][0]:
            raise DataError(f"{row.source}: {self.held_control(row)}")
        return tokens

    def prompt_texts(self, rows: Sequence[PromptRow]) -> list[str | DataError]:
        """Return each row's chat up to the start of the (last) reply, or the error."""
        single = [self.renderer.row_messages(row) for row in rows if not is_long(row)]
        rendered = iter(self.renderer.render_all(single, prompt=True))
        return [
            placed(attempt(self.row_prompt, row) if is_long(row) else self.prompt_end(next(rendered)), row)
            for row in rows
        ]

    def row_prompt(self, row: PromptRow) -> str | DataError:
        """Return the chat of several turns or with tools up to the start of the last reply."""
        return self.prompt_end(self.renderer.render(self.renderer.row_messages(row), prompt=True, tools=row.tools))

    # Turns.

    def encode_batch(
        self, triples: Sequence[Triple], prompts: Sequence[np.ndarray | None] | None = None
    ) -> list[list[Example] | DataError]:
        """Return the tokens and masks of triples, as `AnyTemplate` says.

        An error stands for a triple whose rationale and answer would not come back from the rendered text, whose text
        holds a control token, which the template cannot render or drops a message of, or whose prompt is not a prefix
        of the whole.
        """
        chats = self.chats(triples)
        tokenized = iter(
            self.tokenized([chat for found in chats if not isinstance(found, DataError) for chat in found])
        )
        return [
            found if isinstance(found, DataError) else attempt(self.all_masked, found, [next(tokenized) for _ in found])
            for found in chats
        ]

    def tokenized(self, chats: Sequence[Chat]) -> list[tuple[list[int], list[list[int]] | None]]:
        """Return the tokens of each sequence, and of each turn's prompt; None if `found_spans` can tell them."""
        if self.borders_merge:
            prompts = self.ids_batch([chat.turns[0].before for chat in chats])
            replies = self.ids_batch([chat.turns[0].reply for chat in chats])
            return [(prompt + reply, [prompt]) for prompt, reply in zip(prompts, replies, strict=True)]
        tokens = self.ids_batch([chat.text for chat in chats])
        if self.prompt_tail is not None:
            return [(ids, None) for ids in tokens]
        before = iter(self.ids_batch([turn.before for chat in chats for turn in chat.turns]))
        return [(ids, [next(before) for _ in chat.turns]) for ids, chat in zip(tokens, chats, strict=True)]

    def chats(self, triples: Sequence[Triple]) -> list[list[Chat] | DataError]:
        """Return the sequences of each triple as text, or the error."""
        single = [triple for triple in triples if not is_long(triple)]
        befores = iter(self.prompt_texts(single))
        chats = ([*self.renderer.row_messages(triple), self.last_message(triple)] for triple in single)
        wholes = iter(self.renderer.render_all(list(chats)))
        return [
            attempt(self.long_chats, triple)
            if is_long(triple)
            else attempt(self.single_chat, triple, next(befores), next(wholes))
            for triple in triples
        ]

    def single_chat(self, triple: Triple, before: str | DataError, whole: str | DataError) -> list[Chat]:
        """Return the sequence of a question and its reply. Raises DataError if the texts would not come back."""
        if triple.verbatim:
            self.check_context(triple)
        turn = self.turn(triple, or_raise(before), or_raise(placed(whole, triple)))
        self.check_texts(triple, turn)
        return [Chat(triple, (turn,))]

    def long_chats(self, triple: Triple) -> list[Chat]:
        """Return the sequences of a chat of several turns or with tools.

        A turn shares the sequence of the last turn whose prompt begins with it.

        Raises:
            DataError: the texts would not come back, or the template refuses or drops a message.
        """
        self.check_context(triple)
        messages = self.renderer.row_messages(triple)
        replies = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        turns = [self.turn_at(triple, messages[:i], messages[i]) for i in replies if self.turns == "all"]
        last = self.turn_at(triple, messages, self.last_message(triple), last=True)
        self.check_texts(triple, last)
        sequences: list[list[Turn]] = []
        for turn in [last, *reversed(turns)]:
            begins = turn.before + turn.reply
            may_share = [] if self.borders_merge else sequences
            shared = next((sequence for sequence in may_share if sequence[0].before.startswith(begins)), None)
            if shared is None:
                sequences.append([turn])
            else:
                shared.insert(0, turn)
        return [Chat(triple, tuple(sequence)) for sequence in reversed(sequences)]

    def turn_at(self, triple: Triple, messages: Sequence[Message], message: Message, *, last: bool = False) -> Turn:
        """Return the turn of one message of the assistant after the others."""
        rendered = self.prompt_end(attempt(self.renderer.render, messages, prompt=True, tools=triple.tools))
        before = or_raise(placed(rendered, triple))
        whole = attempt(self.renderer.render, [*messages, message], tools=triple.tools)
        lost = lost_message(messages, before)
        if lost is not None:
            raise DataError(
                f"{triple.source}: the chat template drops or changes a message of the {lost.get('role')}: "
                f"{lost.get('content')!r:.100}. Leave the row out, or use a template that writes it."
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
            thought = thought_of(message) if self.reasoning == "think" else ""
            reply = self.reply_after(before, whole, thought, triple.source)
        found = self.stop_pattern.search(reply)
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
            if not (opened or (closed and self.reasoning == "plain")) or not whole.startswith(header):
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
        other = "think" if self.reasoning == "plain" else "plain"
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
        elif text == turn.reply or self.split_reply(text) != (triple.rationale.strip(), triple.answer.strip()):
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

    # Tokens.

    def all_masked(
        self, chats: Sequence[Chat], tokenized: Sequence[tuple[list[int], list[list[int]] | None]]
    ) -> list[Example]:
        """Return the examples of a triple's sequences."""
        return [example for chat, found in zip(chats, tokenized, strict=True) for example in self.masked(chat, *found)]

    def masked(self, chat: Chat, ids: list[int], prompts: list[list[int]] | None) -> list[Example]:
        """Return the example of a sequence, or one for each turn if the tokenizer merges text across their borders.

        Args:
            chat: the sequence as text.
            ids: its tokens.
            prompts: the tokens of each turn's prompt, if they are known.
        """
        tokens = np.asarray(ids, np.int32)
        spans = self.found_spans(chat, tokens) if prompts is None else None
        if spans is None:
            prompts = [self.ids(turn.before) for turn in chat.turns] if prompts is None else prompts
            if len(chat.turns) > 1 and not self.turns_keep_apart(chat, ids, prompts):
                apart = [Chat(chat.triple, (turn,)) for turn in chat.turns]
                parts = zip(apart, prompts, strict=True)
                return [e for one, prompt in parts for e in self.masked(one, self.ids(one.text), [prompt])]
            *earlier, start = [len(prompt) for prompt in prompts]
            ids = self.joined(prompts[-1], ids, chat.turns[-1], chat.triple.source)
            tokens = np.asarray(ids, np.int32)
            ends = [length + self.end_of_turn(ids[length:]) for length in earlier]
            spans = [*zip(earlier, ends, strict=True), (start, len(ids))]
        self.check_tokens(chat, tokens, spans)
        *others, (start, _) = spans
        return [self.example(tokens, start, chat.triple.source, [slice(*span) for span in others])]

    def found_spans(self, chat: Chat, tokens: np.ndarray) -> list[tuple[int, int]] | None:
        """Find each reply among the tokens of the sequence; None if only the prompt's own tokens can show it.

        A tokenizer cuts text at its added tokens first, so the tokens on either side do not depend on each other. Each
        prompt ends with the text of `prompt_tail`: an added token, and a few tokens that must be the same here.
        """
        if self.prompt_tail is None:
            return None
        (mark, words), after = self.prompt_tail
        at = np.flatnonzero(self.is_added[np.minimum(tokens, len(self.is_added) - 1)]).tolist()
        in_prompt, in_whole = self.expected_added[bool(chat.triple.system)]
        if not is_long(chat.triple) and not chat.triple.verbatim and len(at) == in_whole:
            numbers = [(in_prompt - 1, in_whole - 1)]  # no text of the row holds an added token
        else:
            ends = [found.end() for found in self.added_pattern.finditer(chat.text)]
            places = {end: number for number, end in enumerate(ends)}
            borders = [(len(turn.before) - len(words), len(turn.before) + len(turn.reply)) for turn in chat.turns]
            if len(ends) != len(at) or not all(end in places for border in borders for end in border):
                return None
            numbers = [(places[start], places[end]) for start, end in borders]
        spans = [(at[first] + 1 + len(after), at[last] + 1) for first, last in numbers]
        same = (tokens[start - len(after) : start].tolist() == after for start, _ in spans)
        whole = spans[-1][1] == len(tokens) and all(turn.before.endswith(mark + words) for turn in chat.turns)
        return spans if whole and all(same) else None

    def turns_keep_apart(self, chat: Chat, ids: list[int], prompts: list[list[int]]) -> bool:
        """Return whether each turn's prompt and reply, tokenized alone, are a prefix of the sequence."""
        pairs = zip(chat.turns, prompts, strict=True)
        return all(
            ids[: len(prompt)] == prompt
            and (turn is chat.turns[-1] or (whole := self.ids(turn.before + turn.reply)) == ids[: len(whole)])
            for turn, prompt in pairs
        )

    def end_of_turn(self, ids: Sequence[int]) -> int:
        """Return the number of tokens up to the first stop token, which is one of them."""
        return next((i + 1 for i, token in enumerate(ids) if token in self.stop_ids), len(ids))

    def check_tokens(self, chat: Chat, tokens: np.ndarray, spans: Sequence[tuple[int, int]]) -> None:
        """Raise DataError if a text holds a control token, or a reply a stop token before its end."""
        triple = chat.triple
        usual = not (is_long(triple) or triple.verbatim)
        if usual and self.controls(tokens) != self.expected_controls[bool(triple.system)][1]:
            raise DataError(f"{triple.source}: {self.held_control(triple)}")
        for start, end in spans:
            early = set(self.stop_ids).intersection(self.controls(tokens[start : end - 1]))
            if early:
                token = self.tokenizer.convert_ids_to_tokens(min(early))
                raise DataError(f"{triple.source}: {token!r} stands inside the reply, where generation would stop.")

    def joined(self, prompt: list[int], tokens: list[int], turn: Turn, source: str) -> list[int]:
        """Return the tokens of the whole chat, which start with the prompt's.

        If the tokenizer merges text across the border (a prompt that ends in a blank, say), the reply is tokenized
        alone: that is what a student that reads the prompt can write. Then no turns share a sequence.

        Args:
            prompt: the prompt's tokens.
            tokens: the whole's.
            turn: the last turn, as text.
            source: the row's place.

        Raises:
            DataError: the reply's own tokens spell another text.
        """
        if tokens[: len(prompt)] == prompt:
            return tokens
        apart = prompt + self.ids(turn.reply)
        spelled, wanted = (self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (apart, tokens))
        if spelled != wanted:
            raise DataError(
                f"{source}: the tokenizer merges the end of the prompt with the reply, and cannot write the reply "
                f"apart: expected {wanted!r:.200}, got {spelled!r:.200}. End the template's generation prompt with a "
                "token of the tokenizer's own."
            )
        return apart

    # The template's own tokens, from a probe.

    def texts(self, triple: Triple) -> Turn:
        """Return the prompt and the reply of a triple without a context, unchecked."""
        chat = [*self.renderer.row_messages(triple), self.last_message(triple)]
        before = self.prompt_text(triple.question, triple.system)
        return self.turn(triple, before, self.renderer.render(chat))

    @property
    def eos_id(self) -> int:
        """The end-of-turn token, which may differ from the tokenizer's eos."""
        return self.end[1]

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The end-of-turn token, the tokenizer's eos if it has one, and `more_stop_ids`."""
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([self.eos_id, *([] if eos is None else [int(eos)]), *self.more_stop_ids]))

    @functools.cached_property
    def end(self) -> tuple[str, int]:
        """The text that the template writes after a reply, and the end-of-turn token in it.

        Raises:
            DataError: the template drops the reply, or writes no special token after it.
        """
        whole = self.renderer.render([*self.renderer.row_messages(PROBE), self.last_message(PROBE)])
        _, found, tail = whole.rpartition(self.message_format.write_answer(PROBE.answer).strip())
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
    def end_text(self) -> str:
        """The text after a reply, up to and with the end-of-turn token."""
        tail, end = self.end
        name = str(self.tokenizer.convert_ids_to_tokens(end))
        return tail.partition(name)[0] + name

    @functools.cached_property
    def prompt_tail(self) -> tuple[tuple[str, str], list[int]] | None:
        """How every prompt ends: an added token and the text after it, and that text's tokens; None if they differ."""
        before = self.prompt_text(PROBE.question)
        found = [*self.added_pattern.finditer(before)]
        if not found or PROBE.question in before[found[-1].start() :]:
            return None
        ids = self.ids(before)
        places = [place for place, i in enumerate(ids) if self.is_added[min(i, len(self.is_added) - 1)]]
        if len(places) != len(found):
            return None
        return (found[-1].group(), before[found[-1].end() :]), ids[places[-1] + 1 :]

    @functools.cached_property
    def borders_merge(self) -> bool:
        """Whether the tokenizer merges the end of a prompt with the reply, so that replies are tokenized alone."""
        before, reply = self.texts(PROBE)
        prompt = self.ids(before)
        return self.ids(before + reply)[: len(prompt)] != prompt

    @functools.cached_property
    def expected_added(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """How many of `added_tokens` a prompt and a sequence have: without and with a row's system message."""
        counts = []
        for probe in (PROBE, PROBE_WITH_SYSTEM):
            before, reply = self.texts(probe)
            prompt, whole = (np.asarray(self.ids(text), np.int32) for text in (before, before + reply))
            prompt, whole = (np.minimum(ids, len(self.is_added) - 1) for ids in (prompt, whole))
            counts.append((int(self.is_added[prompt].sum()), int(self.is_added[whole].sum())))
        return counts[0], counts[1]

    @functools.cached_property
    def added_tokens(self) -> dict[int, str]:
        """The tokenizer's added tokens, without those of white space."""
        return {i: str(t) for i, t in self.tokenizer.added_tokens_decoder.items() if str(t).strip()}

    @functools.cached_property
    def is_added(self) -> np.ndarray:
        """Bool `[vocabulary + 1]`: whether a token is one of `added_tokens`. The last entry is False."""
        table = np.zeros(max(self.added_tokens, default=0) + 2, bool)
        table[list(self.added_tokens)] = True
        return table

    @functools.cached_property
    def added_pattern(self) -> re.Pattern[str]:
        return any_of(self.added_tokens.values())

    @functools.cached_property
    def stop_pattern(self) -> re.Pattern[str]:
        return any_of(str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.stop_ids)

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that only the template may write."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset({i for i, token in added if token.special} | set(self.stop_ids))

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str]:
        return any_of(str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.control_ids)

    @functools.cached_property
    def is_control(self) -> np.ndarray:
        """Bool `[vocabulary + 1]`: whether a token is one of `control_ids`. The last entry is False."""
        table = np.zeros(max(self.control_ids) + 2, bool)
        table[list(self.control_ids)] = True
        return table

    @functools.cached_property
    def expected_controls(self) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
        """The control tokens, in order, of the prompt and of the sequence: without and with a row's system message."""
        return self.controls_of(PROBE), self.controls_of(PROBE_WITH_SYSTEM)

    def controls_of(self, triple: Triple) -> tuple[list[int], list[int]]:
        """Return the control tokens, in order, of a triple's prompt and sequence."""
        turn = self.texts(triple)
        prompt = self.ids(turn.before)
        tokens = self.joined(prompt, self.ids(turn.before + turn.reply), turn, triple.source)
        return self.controls(np.asarray(prompt, np.int32)), self.controls(np.asarray(tokens, np.int32))

    def controls(self, tokens: np.ndarray) -> list[int]:
        """Return the control tokens among the tokens."""
        found: list[int] = tokens[self.is_control[np.minimum(tokens, len(self.is_control) - 1)]].tolist()
        return found

    def held_control(self, row: PromptRow) -> str:
        """Return an error message for a row whose text holds control tokens."""
        for field in ("system", "question", "rationale", "answer"):
            found = self.controls(np.asarray(self.ids(getattr(row, field, "")), np.int32))
            if found:
                name = self.tokenizer.convert_ids_to_tokens(found[0])
                return (
                    f"the {field} holds the control token {name!r}, which only the chat template may write. "
                    "Remove it from the row."
                )
        return "the text and the chat template together spell a control token. Remove what looks like one from the row."

    def check_context(self, row: PromptRow) -> None:
        """Raise DataError if a text of a chat of several turns holds a control token, apart from a thought's marks."""
        for field in ("system", "question", "context", "tools", "rationale", "answer"):
            marks = self.marks if field in ("context", "answer") else ()
            for text in texts_in(getattr(row, field, "")):
                bare = functools.reduce(lambda left, mark: left.replace(mark, ""), marks, text)
                found = self.control_pattern.search(bare)
                if found:
                    raise DataError(
                        f"{row.source}: the {field} holds the control token {found.group()!r}, which only the chat "
                        "template may write. Remove it from the row."
                    )


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
    calls = message.get("tool_calls") or ()
    names = [str((call.get("function") or call).get("name")) for call in calls if isinstance(call, Mapping)]
    if not (words or names) or not all(text in turn.reply for text in (words, *names)):
        raise DataError(
            f"{source}: the chat template drops or changes a reply of the assistant, or it is empty: "
            f"{turn.reply!r:.200}. Leave the row out, or use a template that writes it."
        )


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
