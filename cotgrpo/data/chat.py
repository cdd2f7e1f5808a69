"""Triples as chats: rendered by the tokenizer's own chat template, and masked by rendering the prompt alone.

`{% generation %}` tags are not used: stock templates lack them and then give a silent mask of zeros. A probe triple is
rendered when the template is loaded, so an unusable template is an error before the first row is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cotgrpo.data.chat_renderer import DAY as DAY
from cotgrpo.data.chat_renderer import PROBE, PROBE_WITH_SYSTEM, Turn, TurnRenderer, any_of, is_long, placed, texts_in
from cotgrpo.data.own.verifier import EXACT_MATCH, Verifier
from cotgrpo.data.reply_format import ReplyFormat
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate, Example, PromptRow, attempt, or_raise
from cotgrpo.data.tokenizer import transformers
from cotgrpo.data.triples import Triple
from cotgrpo.models.huggingface.folder import split_revision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    token that the template writes after the reply, or the first one of the next turn if generation stops there (GLM).
    Text after that token (a newline in ChatML) is left out: a student that generates has stopped by then. A BOS is
    there if the template writes it, and is never added.

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
        turns: "last": one sequence a triple, and "completion" supervises its last reply; "all": every reply, apart
            from a greeting before the first message of the user, and from earlier ones with `weight: 0`.
        verifier: judges replies.

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
    verifier: Verifier = EXACT_MATCH

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
        prompt_text = self.renderer.prompt_text(PROBE.question)
        prompt = self.ids(prompt_text)
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt[:2] == [bos, bos]:
            raise DataError(
                f"The chat template writes the BOS token {self.tokenizer.bos_token!r} twice. Remove one from it."
            )
        if self.system.strip() not in prompt_text:
            raise DataError(
                "The chat template drops the system message. Leave data.system out, and put its text into the "
                "questions."
            )
        if self.system and not self.renderer.takes_system:
            raise DataError(
                "The chat template moves the system message into the last message of the user, so a prompt would not "
                "be the start of the whole chat. Leave data.system out, and put its text into the questions."
            )
        self.encode(PROBE)

    @functools.cached_property
    def renderer(self) -> TurnRenderer:
        """The text of prompts and replies."""
        thinking = self.reasoning == "think"
        return TurnRenderer(self.tokenizer, thinking, self.system, self.answer_format, self.more_stop_ids)

    @property
    def reply_format(self) -> ReplyFormat:
        """Splits replies, with the marks that the template writes around a thought."""
        return self.renderer.reply_format

    @property
    def reads_field(self) -> bool:
        """Whether the template writes the `reasoning_content` of a message as its thought."""
        return self.renderer.reads_field

    @property
    def eos_id(self) -> int:
        """The end-of-turn token, which may differ from the tokenizer's eos."""
        return self.renderer.end[1]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The end-of-turn token, the tokenizer's eos if it has one, and `more_stop_ids`."""
        return self.renderer.stop_ids

    def messages(self, triple: Triple, *, as_field: bool) -> list[dict[str, Any]]:
        """Return the whole chat; `as_field` puts a thought into `reasoning_content`."""
        return self.renderer.messages(triple, as_field=as_field)

    def texts(self, triple: Triple) -> Turn:
        """Return the prompt and the reply of a triple without a context, unchecked."""
        return self.renderer.texts(triple)

    def split_reply(self, reply: str | Sequence[int] | np.ndarray) -> tuple[str, str | None]:
        """Split a generated reply, text or token ids up to a stop token, as `ReplyFormat.split` does."""
        if isinstance(reply, str):
            return self.renderer.split(reply)
        cut_off = not set(self.stop_ids).intersection(map(int, reply))
        return self.renderer.split(self.decode(reply), cut_off=cut_off)

    # Prompts.

    def prompt(self, question: str, system: str = "") -> np.ndarray:
        """Return the int32 tokens of the chat before the reply; a row's own `system` replaces the template's."""
        return np.asarray(self.ids(self.renderer.prompt_text(question, system)), np.int32)

    def prompts_of(self, rows: Sequence[PromptRow]) -> list[np.ndarray | DataError]:
        """Return the int32 tokens of each row's chat before the (last) reply.

        An error stands for a row that the template cannot render, or whose text holds a control token.
        """
        texts = self.renderer.prompts(rows)
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
        befores = iter(self.renderer.prompts(single))
        chats = ([*self.renderer.row_messages(triple), self.renderer.last_message(triple)] for triple in single)
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
        turn = self.renderer.turn(triple, or_raise(before), or_raise(placed(whole, triple)))
        self.renderer.check_texts(triple, turn)
        return [Chat(triple, (turn,))]

    def long_chats(self, triple: Triple) -> list[Chat]:
        """Return the sequences of a chat of several turns or with tools.

        A turn shares the sequence of the last turn whose prompt begins with it.

        Raises:
            DataError: the texts would not come back, or the template refuses or drops a message.
        """
        self.check_context(triple)
        messages = self.renderer.row_messages(triple)
        replies = supervised_replies(messages) if self.turns == "all" else []
        turns = [self.renderer.turn_at(triple, messages[:i], messages[i]) for i in replies]
        last = self.renderer.turn_at(triple, messages, self.renderer.last_message(triple), last=True)
        self.renderer.check_texts(triple, last)
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

    @functools.cached_property
    def prompt_tail(self) -> tuple[tuple[str, str], list[int]] | None:
        """How every prompt ends: an added token and the text after it, and that text's tokens; None if they differ."""
        before = self.renderer.prompt_text(PROBE.question)
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
            marks = self.renderer.marks if field in ("context", "answer") else ()
            for text in texts_in(getattr(row, field, "")):
                bare = functools.reduce(lambda left, mark: left.replace(mark, ""), marks, text)
                found = self.control_pattern.search(bare)
                if found:
                    raise DataError(
                        f"{row.source}: the {field} holds the control token {found.group()!r}, which only the chat "
                        "template may write. Remove it from the row."
                    )


def supervised_replies(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the places of the earlier replies that are supervised.

    A greeting before the first message of the user answers nothing. A message with `weight: 0` is not to be trained.
    """
    roles = [message.get("role") for message in messages]
    first = roles.index("user") if "user" in roles else len(roles)
    return [
        i
        for i, (role, message) in enumerate(zip(roles, messages, strict=True))
        if role == "assistant" and i > first and message.get("weight", 1) != 0
    ]


def generation_stop_ids(path_or_id: str | Path) -> tuple[int, ...]:
    """Return the stop tokens of a local folder, `owner/name` or `owner/name@revision`, maybe none.

    As in `transformers`, that is `eos_token_id` of the generation config, else of config.json.

    Raises:
        DataError: a file that cannot be read.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            hub_id, revision = split_revision(str(path_or_id))
            find = functools.partial(transformers().utils.cached_file, hub_id, name, revision=revision)
            file = find(_raise_exceptions_for_missing_entries=False)
            stops = None if file is None else json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id")
            found = tuple(int(s) for s in (stops if isinstance(stops, list) else [stops]) if s is not None)
        except Exception as error:  # a broken file or a broken connection, which raise many kinds
            raise DataError(
                f"{path_or_id}/{name} cannot be read ({type(error).__name__}: {error}). Fix or remove it."
            ) from error
        if found:
            return found
    return ()
