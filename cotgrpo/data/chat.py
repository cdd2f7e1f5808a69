"""Triples as chats: rendered by the tokenizer's own chat template, and masked by rendering the prompt alone.

`{% generation %}` tags are never asked: stock templates lack them, and then give a mask of zeros in silence. What a template does to a text
is found by rendering one (`PROBE`) when it is loaded, so that a template that cannot serve is an error before the first row is read.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cotgrpo.data.answers import begins_with_number, extract_answer
from cotgrpo.data.template import AnyTemplate, Example, with_system
from cotgrpo.data.tokenizer import transformers
from cotgrpo.data.triples import DataError, Triple

PROBE = Triple("probe question 7351", "probe rationale 7352", "probe answer 7353", source="the chat template")
PROBE_WITH_SYSTEM = dataclasses.replace(PROBE, system="probe system 7350")
ANSWER_FORMATS = {"plain": "#### {answer}", "think": "{answer}"}
DAY = datetime.date(2024, 7, 26)
"""What templates that write today's date are told, so that a run that goes on tomorrow reads the same tokens; Llama's own falls back to it."""
FIXED_DATE = "{% macro strftime_now(format) %}{{ cotgrpo_dates.get(format, cotgrpo_dates.iso) }}{% endmacro %}\n"
"""Put before a template, it hides the clock that `transformers` offers; Jinja, as set there, drops the newline."""
DATE_FORMAT = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1""")
NO_THOUGHT = re.compile(r"\s*(<think>\s*)?</think>\s*")
"""What a template may write into a prompt, and not into an assistant's turn, where the reply is to have no thought."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate(AnyTemplate):
    r"""Renders a triple as a user's turn (the question) and an assistant's (rationale and answer), by `tokenizer.chat_template`.

    A sequence is the prompt as generation starts from it (`add_generation_prompt=True`), the reply, and the end-of-turn token: the first
    token of the vocabulary's own that the template writes behind the reply. What the template writes behind that (a newline in ChatML) is
    left out, since a student that generates has stopped by then. A BOS is there where the template writes it, and is never added.

    Attributes:
        tokenizer: a `transformers` tokenizer with a chat template.
        reasoning: "plain": the reply is the rationale, a blank line and the answer in `answer_format`; "think": the rationale goes into
            `<think>...</think>` (as `reasoning_content` where the template reads that), and the answer follows in `answer_format`.
        answer_format: text with `{answer}` in it, such as `\boxed{{answer}}`; empty: `#### {answer}` for "plain", `{answer}` for "think".
        system: text of a system message, for rows that have none of their own; empty: none, and what the template itself puts there stays.
            A row's own, where the template takes none (Gemma 2), stands before its question.
        loss_on: "sequence" supervises every token but the first; "completion" only the reply and its end-of-turn token.
        more_stop_ids: further tokens that end a generated reply (of the model's generation config).

    Raises:
        ValueError: a setting outside its range.
        DataError: no chat template, or one that drops or changes texts, refuses the system message, doubles the BOS, never ends a turn,
            or whose prompt is no prefix of the whole.
    """

    tokenizer: Any
    reasoning: Literal["plain", "think"] = "plain"
    answer_format: str = ""
    system: str = ""
    loss_on: Literal["sequence", "completion"] = "sequence"
    more_stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.reasoning not in ANSWER_FORMATS:
            raise ValueError(f'reasoning must be "plain" or "think", got {self.reasoning!r}.')
        if self.loss_on not in ("sequence", "completion"):
            raise ValueError(f'loss_on must be "sequence" or "completion", got {self.loss_on!r}.')
        if self.phrase.count("{answer}") != 1:
            raise ValueError(f"answer_format must hold {{answer}} once, got {self.phrase!r}.")
        if not self.tokenizer.chat_template:
            raise DataError(
                "The tokenizer has no chat template: take that of the instruction-tuned model, put its chat_template.jinja beside "
                "tokenizer.json, or use the plain format (data.format: plain)."
            )
        prompt = self.prompt(PROBE.question).tolist()
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt[:2] == [bos, bos]:
            raise DataError(
                f"The chat template writes the BOS token {self.tokenizer.bos_token!r} twice. Remove one from the template."
            )
        if self.system.strip() not in self.render(self.asked(PROBE.question), prompt=True):
            raise DataError(
                "The chat template drops the system message. Leave data.system out, and put its text into the questions."
            )
        self.encode(PROBE)

    @property
    def phrase(self) -> str:
        return self.answer_format or ANSWER_FORMATS[self.reasoning]

    @property
    def eos_id(self) -> int:
        """The end-of-turn token, which need not be the tokenizer's eos."""
        return self.end[1]

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The end-of-turn token, the tokenizer's eos where there is one, and `more_stop_ids`."""
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([self.eos_id, *([] if eos is None else [int(eos)]), *self.more_stop_ids]))

    def encode(self, triple: Triple) -> Example:
        """Tokens and mask of one triple.

        Raises:
            DataError: the template changes the text so that rationale and answer do not come back, the text holds a control token, or the
                prompt is no prefix of the whole.
        """
        before, reply = self.texts(triple)
        said = reply.removesuffix(self.end[0])
        if said == reply or self.split_reply(said) != (triple.rationale.strip(), triple.answer.strip()):
            raise DataError(
                f"{triple.source}: rationale and answer cannot be told apart in the assistant's turn, or the chat template changes them: "
                f"{reply!r:.200}. Remove what marks the answer ({self.mark.strip() or 'a blank line'!r}) from the row's texts; "
                "an answer that begins with a number must be one line."
            )
        for field in ("system", "question"):
            if getattr(triple, field).strip() not in before:
                raise DataError(f"{triple.source}: the chat template drops or changes the {field}: {before!r:.200}.")
        prompt = self.ids(before)
        tokens = self.joined(prompt, before + reply, reply, triple.source)
        if self.controls(tokens) != (self.controls_with_system if triple.system else self.expected_controls):
            raise DataError(f"{triple.source}: {self.held_control(triple)}")
        tokens = tokens[: tokens.index(self.eos_id, len(prompt)) + 1]
        early = set(self.stop_ids).intersection(tokens[len(prompt) : -1])
        if early:
            raise DataError(
                f"{triple.source}: {self.tokenizer.convert_ids_to_tokens(min(early))!r} stands inside the reply, where generation would stop."
            )
        return self.example(tokens, len(prompt), triple.source)

    def prompt(self, question: str, system: str = "") -> np.ndarray:
        """int32 tokens of the chat up to where the assistant's reply begins; a row's own `system` counts before that of the template."""
        return np.asarray(self.ids(self.render(self.asked(question, system), prompt=True)), np.int32)

    def split_reply(self, reply: str | Sequence[int] | np.ndarray) -> tuple[str, str | None]:
        r"""(rationale, answer) of a generated reply, text or token ids up to a stop token.

        "think": the answer is what follows `</think>`, without the words of `answer_format`; None where no `</think>` came. "plain": the
        first whole line in `answer_format` whose answer begins with a number (`#### 12`), whatever the student writes after it; without
        one, what follows the last blank line and the first words of `answer_format`; where they did not come, what `extract_answer` finds
        (`\boxed{}`, `####`, the last number), so that a student that was never trained on the format has answers too. Ids that were cut off
        have only an answer whose line has ended.
        """
        text = reply if isinstance(reply, str) else self.decode(reply)
        cut_off = not isinstance(reply, str) and not set(self.stop_ids).intersection(map(int, reply))
        if self.reasoning == "plain" and (line := self.answer_line(text)) is not None:
            rationale, answer, rest = line
            return rationale.strip(), None if cut_off and not rest else answer
        text = text.strip()
        if self.reasoning == "think":
            rationale, found, answer = text.partition(self.mark)
            rationale, answer = rationale.removeprefix("<think>"), answer.strip()
            within = self.within_phrase(answer)
            answer = answer if within is None else within
        else:
            rationale, found, answer = text.rpartition(self.mark)
            answer = answer.strip().removesuffix(self.phrase.partition("{answer}")[2].strip())
            if not found or cut_off:
                return (rationale if found else text).strip(), None if cut_off else extract_answer(text)
        return rationale.strip(), answer.strip() if found else None

    def answer_line(self, text: str) -> tuple[str, str, str] | None:
        """(what stands before, answer, what follows its end) of the first line in `answer_format` whose answer begins with a number, or None.

        A format that begins with the answer marks no line.
        """
        if self.phrase.startswith("{answer}"):
            return None
        start = 0
        for line in text.split("\n"):
            answer, end = self.within_phrase(line.strip()), start + len(line)
            if answer is not None and begins_with_number(answer):
                return text[:start], answer, text[end:]
            start = end + 1
        return None

    def within_phrase(self, words: str) -> str | None:
        """The answer in a text that is `answer_format` with an answer in it; None where it is not."""
        first, last = (part.strip() for part in self.phrase.split("{answer}"))
        if len(words) < len(first) + len(last) or not (words.startswith(first) and words.endswith(last)):
            return None
        return words[len(first) : len(words) - len(last)].strip()

    @property
    def mark(self) -> str:
        """The text between rationale and answer."""
        return "</think>" if self.reasoning == "think" else "\n\n" + self.phrase.partition("{answer}")[0]

    def texts(self, triple: Triple) -> tuple[str, str]:
        """(prompt, reply with its end of turn), as text.

        Where the template writes an empty thought into a prompt and not into an assistant's turn, it stays in the prompt, as in generation.

        Raises:
            DataError: the prompt is no prefix of the whole in another way.
        """
        asked, answered = self.asked(triple.question, triple.system), self.answered(triple, self.reads_field)
        before, whole = self.render(asked, prompt=True), self.render([*asked, answered])
        if whole.startswith(before):
            return before, whole[len(before) :]
        start = whole.rfind(answered["content"].strip() + self.end[0])
        header = whole[: max(start, 0)]
        if self.reasoning == "plain" and before.startswith(header) and NO_THOUGHT.fullmatch(before[len(header) :]):
            return before, whole[start:]
        same = next(i for i, (a, b) in enumerate(zip(before, whole + "\0", strict=False)) if a != b)
        other = "think" if self.reasoning == "plain" else "plain"
        raise DataError(
            f"{triple.source}: the prompt is no prefix of the whole chat, so where the reply begins cannot be known: after "
            f"{whole[max(same - 40, 0) : same]!r} the prompt goes on with {before[same : same + 40]!r}, the whole with "
            f"{whole[same : same + 40]!r}. Try data.reasoning: {other}, or mend the template."
        )

    def joined(self, prompt: list[int], whole: str, reply: str, source: str) -> list[int]:
        """Tokens of the whole, which start with the prompt's.

        Where the tokenizer merges text across the border (a prompt that ends in a blank, say), the reply gets tokens of its own, since
        that is what a student that reads the prompt can write.

        Raises:
            DataError: tokens of its own spell another text.
        """
        tokens = self.ids(whole)
        if tokens[: len(prompt)] == prompt:
            return tokens
        apart = prompt + self.ids(reply)
        spelled, wanted = (self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (apart, tokens))
        if spelled != wanted:
            raise DataError(
                f"{source}: the tokenizer merges the end of the prompt with the reply, and cannot write the reply apart: expected "
                f"{wanted!r:.200}, got {spelled!r:.200}. End the template's generation prompt with a token of the tokenizer's own."
            )
        return apart

    @functools.cached_property
    def reads_field(self) -> bool:
        """Whether the template writes a message's `reasoning_content`. Raises DataError where it drops a thought in either form."""
        if self.reasoning == "plain":
            return False
        thought = re.compile(f"<think>.*{PROBE.rationale}.*</think>.*{PROBE.answer}", re.DOTALL)
        for as_field in (True, False):
            whole = self.render([*self.asked(PROBE.question), self.answered(PROBE, as_field)])
            if thought.search(whole):
                return as_field
        raise DataError(
            "The chat template drops <think> text (and reasoning_content) from an assistant's turn, or writes no <think>...</think> around "
            f"it: {whole[-200:]!r}. Use data.reasoning: plain, or a template that keeps it."
        )

    @functools.cached_property
    def end(self) -> tuple[str, int]:
        """What the template writes behind a reply, and the end-of-turn token in it.

        Raises:
            DataError: the template drops the reply, or writes no token behind it that could end a turn.
        """
        whole = self.render([*self.asked(PROBE.question), self.answered(PROBE, self.reads_field)])
        _, found, tail = whole.rpartition(self.phrase.replace("{answer}", PROBE.answer).strip())
        if not found:
            raise DataError(
                f"The chat template drops or changes the assistant's turn, so nothing would be supervised: {whole!r:.200}."
            )
        own = {*self.tokenizer.added_tokens_decoder, self.tokenizer.eos_token_id}
        end = next((i for i in self.ids(tail) if i in own), None)
        words = tail if end is None else tail.partition(self.tokenizer.convert_ids_to_tokens(end))[0]
        if end is None or words.strip():
            raise DataError(
                f"The chat template ends an assistant's turn with {tail!r}, where the first thing must be a special token of the tokenizer's: "
                f"a reply could never end. Write the eos token ({self.tokenizer.eos_token!r}) there, or add the template's token to the tokenizer."
            )
        return tail, int(end)

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that only the template may write."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset({i for i, token in added if token.special} | set(self.stop_ids))

    @functools.cached_property
    def expected_controls(self) -> list[int]:
        """The control tokens of every chat whose row has no system message of its own, in order."""
        return self.controls_of(PROBE)

    @functools.cached_property
    def controls_with_system(self) -> list[int]:
        """The same where the row has one."""
        return self.controls_of(PROBE_WITH_SYSTEM)

    def controls_of(self, triple: Triple) -> list[int]:
        before, reply = self.texts(triple)
        return self.controls(self.joined(self.ids(before), before + reply, reply, triple.source))

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system message, and does not refuse or drop it."""
        text = PROBE_WITH_SYSTEM.system
        try:
            return text in self.render(
                [{"role": "system", "content": text}, *self.asked(PROBE.question)[-1:]], prompt=True
            )
        except DataError:
            return False

    def controls(self, tokens: Sequence[int]) -> list[int]:
        return [i for i in tokens if i in self.control_ids]

    def held_control(self, triple: Triple) -> str:
        """An error message for a triple whose text holds control tokens."""
        for field in ("system", "question", "rationale", "answer"):
            found = self.controls(self.ids(getattr(triple, field)))
            if found:
                name = self.tokenizer.convert_ids_to_tokens(found[0])
                return f"the {field} holds the control token {name!r}, which only the chat template may write. Remove it from the row."
        return "the text and the chat template together spell a control token. Remove what looks like one from the row."

    def asked(self, question: str, system: str = "") -> list[dict[str, str]]:
        """The messages before the reply. A row's own system message counts before `self.system`, and is part of the question where it must be."""
        if system and not self.takes_system:
            return [{"role": "user", "content": with_system(question, system)}]
        text = system or self.system
        before = [{"role": "system", "content": text}] if text else []
        return [*before, {"role": "user", "content": question}]

    def answered(self, triple: Triple, as_field: bool) -> dict[str, str]:
        """The assistant's message; `as_field`: with the rationale as `reasoning_content`."""
        rationale, answer = triple.rationale.strip(), self.phrase.replace("{answer}", triple.answer.strip())
        if self.reasoning == "plain":
            return {"role": "assistant", "content": f"{rationale}\n\n{answer}"}
        if as_field:
            return {"role": "assistant", "content": answer, "reasoning_content": rationale}
        return {"role": "assistant", "content": f"<think>\n{rationale}\n</think>\n\n{answer}"}

    def render(self, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        """The chat as text; `prompt`: followed by what begins an assistant's turn. Raises DataError where the template refuses it."""
        import jinja2

        thinking = self.reasoning == "think"
        try:
            source = self.tokenizer.get_chat_template()
            formats = [match[1] for match in DATE_FORMAT.findall(source)]
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=FIXED_DATE + source if "strftime_now" in source else source,
                tokenize=False,
                add_generation_prompt=prompt,
                # Settings that templates read, each under its own name; the others do not look.
                enable_thinking=thinking,
                thinking=thinking,
                cotgrpo_dates={"iso": DAY.isoformat()} | {form: DAY.strftime(form) for form in formats},
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            roles = ", ".join(message["role"] for message in messages)
            fix = " Leave data.system out, and put its text into the questions." if self.system else ""
            raise DataError(
                f"The chat template cannot render messages of {roles} ({type(error).__name__}: {error}).{fix}"
            ) from error


def generation_stop_ids(path_or_id: str | Path) -> tuple[int, ...]:
    """The stop tokens of a local folder or a hub id: `eos_token_id` of its generation config, else, as in `transformers`, of its config.json.

    None where it has neither file, or neither names any.

    Raises:
        DataError: a file is there and cannot be read.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            file = transformers().utils.cached_file(str(path_or_id), name, _raise_exceptions_for_missing_entries=False)
            stops = None if file is None else json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id")
            found = tuple(int(s) for s in (stops if isinstance(stops, list) else [stops]) if s is not None)
        except Exception as error:  # a broken file or a broken connection, which raise many kinds
            raise DataError(
                f"{path_or_id}/{name} cannot be read ({type(error).__name__}: {error}). Mend or remove it."
            ) from error
        if found:
            return found
    return ()
