"""Templates turn a triple into tokens and a mask of the supervised ones.

Here are the base class and the plain template, `question <sep> rationale <sep> answer <eos>`. The chat template is in
`cotgrpo.data.chat`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, runtime_checkable

import numpy as np

from cotgrpo.data.own.verifier import EXACT_MATCH, Verifier
from cotgrpo.data.sources import DataError
from cotgrpo.data.tokenizer import decode_text
from cotgrpo.data.triples import Triple

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

P = ParamSpec("P")
T = TypeVar("T")
PROBES = ("a", "7", ".", "a b", "x\n", "(y)", "é")
"""Texts put on both sides of a separator to see whether the tokenizer keeps it apart."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenized document.

    Attributes:
        tokens: int32 `[n]`.
        supervised: bool `[n]`, True if the token is a target of the loss; never the first, which nothing predicts.
        source: the triple's source.
        prompt_length: tokens before the last reply.
        extra: further arrays `[n - 1, ...]` of the targets, by name; all examples of a batch have the same.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    source: str = ""
    prompt_length: int = 0
    extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@runtime_checkable
class PromptRow(Protocol):
    """What a prompt is made of: a `Triple` or a `Question`, which explain the fields."""

    @property
    def question(self) -> str: ...
    @property
    def system(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def context(self) -> tuple[Mapping[str, Any], ...]: ...
    @property
    def tools(self) -> tuple[Mapping[str, Any], ...]: ...


class AnyTemplate(abc.ABC):
    """The interface of the plain and the chat template.

    Attributes:
        tokenizer: a `transformers` tokenizer.
        loss_on: "sequence" supervises every token but the first (the method's own definition); "completion" only the
            reply.
        verifier: judges replies.
    """

    tokenizer: PreTrainedTokenizerBase
    loss_on: Literal["sequence", "completion"]
    verifier: Verifier

    def __getstate__(self) -> dict[str, object]:
        """Return the settings alone, for another process, which renders rows and judges no reply."""
        cached = functools.cached_property
        state = {name: v for name, v in vars(self).items() if not isinstance(getattr(type(self), name, None), cached)}
        state.pop("verifier", None)
        return state

    @property
    @abc.abstractmethod
    def eos_id(self) -> int:
        """The token that ends a reply in training."""

    @property
    @abc.abstractmethod
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a generated reply, `eos_id` first."""

    @abc.abstractmethod
    def encode_batch(
        self, triples: Sequence[Triple], prompts: Sequence[np.ndarray | None] | None = None
    ) -> list[list[Example] | DataError]:
        """Return the tokens and masks of triples; in place of a triple that cannot be rendered, the error.

        Args:
            triples: rows.
            prompts: their prompts' tokens if they are known, as `prompt_of` gives them.

        Returns:
            For each triple its examples in the order of the turns: one, unless several turns are supervised that cannot
            share a sequence.
        """

    @abc.abstractmethod
    def prompts_of(self, rows: Sequence[PromptRow]) -> list[np.ndarray | DataError]:
        """Return the int32 tokens before the (last) reply of each row, or the error."""

    @abc.abstractmethod
    def prompt(self, question: str, system: str = "") -> np.ndarray:
        """Return the int32 tokens before the reply to a question; `system` is the row's system message."""

    def prompt_of(self, row: PromptRow) -> np.ndarray:
        """Return the int32 tokens before the (last) reply of a row, a prefix of `encode`'s.

        Raises:
            DataError: the row cannot be rendered.
        """
        return or_raise(self.prompts_of([row])[0])

    def encode_all(self, triple: Triple, prompt: np.ndarray | None = None) -> list[Example]:
        """Return the examples of a triple, as `encode_batch` does.

        Raises:
            DataError: the triple's texts would not come back unchanged from the rendered text.
        """
        return or_raise(self.encode_batch([triple], [prompt])[0])

    def encode(self, triple: Triple, prompt: np.ndarray | None = None) -> Example:
        """Return the tokens and mask of a triple, of its last turn if its turns do not share a sequence.

        Args:
            triple: the row.
            prompt: its prompt's tokens if they are known.

        Raises:
            DataError: the triple's texts would not come back unchanged from the rendered text.
        """
        return self.encode_all(triple, prompt)[-1]

    @abc.abstractmethod
    def split_reply(self, reply: str | Sequence[int] | np.ndarray) -> tuple[str, str | None]:
        """Split a generated reply, text or token ids, into rationale and answer (None if there is none)."""

    @property
    def pad_id(self) -> int:
        """The pad token, else `eos_id`. Padding is recognized by its segment id, never by this id."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else int(pad)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids up to the first stop token; special tokens and spaces stay."""
        ids = [int(i) for i in tokens]
        end = next((place for place, i in enumerate(ids) if i in self.stop_ids), len(ids))
        return decode_text(self.tokenizer, ids[:end])

    def ids(self, text: str) -> list[int]:
        """Return the token ids of the text alone, without special tokens around it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def ids_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `ids` of each text. The tokenizer's threads share the work."""
        if not texts:
            return []
        if self.batch_tokenizer is not None:
            encodings = self.batch_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return found

    @functools.cached_property
    def batch_tokenizer(self) -> Tokenizer | None:
        """The tokenizer's own Rust object, which skips offsets and masks; None if it may give other tokens."""
        wanted = [self.ids(text) for text in PROBES]  # this also resets truncation and padding of the Rust object
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or backend.truncation is not None or backend.padding is not None:
            return None
        same = wanted == [e.ids for e in backend.encode_batch_fast(list(PROBES), add_special_tokens=False)]
        return backend if same else None

    def example(
        self, tokens: Sequence[int] | np.ndarray, prompt_length: int, source: str, earlier: Sequence[slice] = ()
    ) -> Example:
        """Return tokens with the mask for `loss_on`.

        Args:
            tokens: the document.
            prompt_length: tokens before the last reply.
            source: the row's place.
            earlier: where earlier replies stand that are supervised too.

        Raises:
            DataError: an all-zero mask.
        """
        supervised = np.ones(len(tokens), bool)
        supervised[: prompt_length if self.loss_on == "completion" else 1] = False
        for span in earlier:
            supervised[span] = True
        if not supervised.any():
            raise DataError(f"{source}: no token is supervised (an all-zero loss mask). The row has no reply.")
        return Example(np.asarray(tokens, np.int32), supervised, source, prompt_length)


@dataclasses.dataclass(frozen=True)
class Template(AnyTemplate):
    """Renders triples with a separator, and finds the mask by rendering the prompt alone.

    Attributes:
        tokenizer: a `transformers` tokenizer with an eos token.
        separator: text between the three parts, best a token of its own (`<sep>` of a tokenizer trained here).
        loss_on: "sequence" supervises every token but the first (the method's own definition); "completion" only the
            tokens after the first separator.
        verifier: judges replies.

    Raises:
        DataError: no eos token, or a separator that holds it or that the tokenizer merges with the text around it.
    """

    tokenizer: PreTrainedTokenizerBase
    separator: str = "<sep>"
    loss_on: Literal["sequence", "completion"] = "sequence"
    verifier: Verifier = EXACT_MATCH

    def __post_init__(self) -> None:
        if self.loss_on not in ("sequence", "completion"):
            raise ValueError(f'loss_on must be "sequence" or "completion", got {self.loss_on!r}.')
        if not self.separator:
            raise ValueError("The separator is empty: expected a token of the tokenizer or some text.")
        if self.tokenizer.eos_token_id is None:
            raise DataError("The tokenizer has no eos token, so a reply could never end: set tokenizer.eos_token.")
        if self.eos_id in self.ids(self.separator):
            raise DataError(
                f"The separator {self.separator!r} holds the eos token, which ends a reply. Choose another separator."
            )
        for left in PROBES:
            for right in PROBES:
                whole, prefix = self.ids(left + self.separator + right), self.ids(left + self.separator)
                if whole[: len(prefix)] != prefix or self.ids(left) != prefix[: len(self.ids(left))]:
                    raise DataError(
                        f"The separator {self.separator!r} is ambiguous: this tokenizer merges it with the text "
                        f"around it ({left + self.separator + right!r} becomes "
                        f"{self.tokenizer.convert_ids_to_tokens(whole)}). Use a token of the tokenizer's "
                        f"own{self.suggestion()}, or add the separator to its special tokens."
                    )

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    def encode_batch(
        self, triples: Sequence[Triple], prompts: Sequence[np.ndarray | None] | None = None
    ) -> list[list[Example] | DataError]:
        """Return the tokens and masks of triples, as `AnyTemplate` says.

        An error stands for a triple whose text holds the separator or the eos token, whose separator merges with the
        text, or that has several turns.
        """
        texts = [attempt(self.text, triple) for triple in triples]
        found = iter(self.ids_batch([text for text in texts if isinstance(text, str)]))
        known = [None] * len(triples) if prompts is None else prompts
        return [
            text if isinstance(text, DataError) else attempt(self.masked, triple, next(found), prompt)
            for triple, text, prompt in zip(triples, texts, known, strict=True)
        ]

    def text(self, triple: Triple) -> str:
        """Return the triple as text, without bos and eos. Raises DataError if its parts could not be told apart."""
        check_single_turn(triple)
        if triple.verbatim:
            raise DataError(
                f"{triple.source}: no rationale and answer in the reply, which the plain format puts a separator "
                "between. Use data.format: chat, or give the row both."
            )
        parts = {
            "question": with_system(triple.question, triple.system),
            "rationale": triple.rationale,
            "answer": triple.answer,
        }
        text = self.separator.join(parts.values())
        if text.split(self.separator) != list(parts.values()):
            holders = [field for field, part in parts.items() if self.separator in part]
            raise DataError(
                f"{triple.source}: the {holders[0] if holders else 'text'} holds the separator {self.separator!r} "
                "(or a part of it, at an edge), so the parts could not be told apart. Choose another separator."
            )
        return text

    def masked(self, triple: Triple, ids: list[int], prompt: np.ndarray | None) -> list[Example]:
        """Return the example of a triple whose text has these ids."""
        tokens = [*self.with_bos(ids), self.eos_id]
        if tokens.index(self.eos_id) + 1 < len(tokens):
            raise DataError(
                f"{triple.source}: the text holds the eos token {self.tokenizer.eos_token!r}, and the student would "
                "learn to stop there. Remove it from the row."
            )
        if self.separator_id is not None:
            start = tokens.index(self.separator_id) + 1
        else:
            before = (self.prompt_of(triple) if prompt is None else prompt).tolist()
            start = len(before)
            if tokens[:start] != before:
                raise DataError(
                    f"{triple.source}: the tokenizer merges the separator {self.separator!r} with the text around it, "
                    "so the prompt is not a prefix of the sequence. Use a token of the tokenizer's own as separator."
                )
        return [self.example(tokens, start, triple.source)]

    @functools.cached_property
    def separator_id(self) -> int | None:
        """The separator as one added token, at which the tokenizer cuts every text first; None if it is not one."""
        found = self.ids(self.separator)
        return found[0] if len(found) == 1 and found[0] in self.tokenizer.added_tokens_decoder else None

    def prompt(self, question: str, system: str = "") -> np.ndarray:
        """Return the int32 tokens of `question <sep>`, with a system message before the question."""
        return np.asarray(self.with_bos(self.ids(with_system(question, system) + self.separator)), np.int32)

    def prompts_of(self, rows: Sequence[PromptRow]) -> list[np.ndarray | DataError]:
        """Return the int32 tokens of `question <sep>` for each row, or the error."""
        found = self.ids_batch([with_system(row.question, row.system) + self.separator for row in rows])
        return [attempt(self.checked_prompt, row, ids) for row, ids in zip(rows, found, strict=True)]

    def checked_prompt(self, row: PromptRow, ids: list[int]) -> np.ndarray:
        """Return a row's prompt. Raises DataError if its text holds the separator or eos, or for several turns."""
        check_single_turn(row)
        if self.separator in with_system(row.question, row.system) or self.eos_id in ids:
            raise DataError(
                f"{row.source}: the question holds the separator {self.separator!r} or the eos token "
                f"{self.tokenizer.eos_token!r}. Remove it from the row, or choose another separator."
            )
        return np.asarray(self.with_bos(ids), np.int32)

    def split_reply(self, reply: str | Sequence[int] | np.ndarray) -> tuple[str, str | None]:
        """Split a generated reply, text or token ids up to eos, at the separator; without one the answer is None."""
        text = reply if isinstance(reply, str) else self.decode(reply)
        rationale, mark, answer = text.partition(self.separator)
        return rationale.strip(), answer.strip() if mark else None

    def with_bos(self, ids: list[int]) -> list[int]:
        """Prepend the bos token if the tokenizer's own convention does, and never twice."""
        return [self.bos_id, *ids] if self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    @functools.cached_property
    def bos_id(self) -> int | None:
        """The token that the tokenizer itself prepends to a text, or None."""
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None and self.tokenizer.encode("a")[:1] == [bos] else None

    def suggestion(self) -> str:
        """Return, for an error message, an unused added token that could be the separator."""
        taken = {self.tokenizer.eos_token, self.tokenizer.bos_token, self.tokenizer.pad_token, self.tokenizer.unk_token}
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        free = [token for token in added if token not in taken]
        return f", such as {'<sep>' if '<sep>' in free else free[0]!r}" if free else ""


def with_system(question: str, system: str) -> str:
    """Return the question after the system message, if any, and a blank line."""
    return f"{system}\n\n{question}" if system else question


def check_single_turn(row: PromptRow) -> None:
    """Raise DataError for a chat of several turns or with tools."""
    if row.context or row.tools:
        raise DataError(f"{row.source}: several turns or tools need a chat template. Set data.format: chat.")


def attempt(make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | DataError:
    """Return what `make` returns, or the DataError that it raises."""
    try:
        return make(*args, **kwargs)
    except DataError as error:
        return error


def or_raise(found: T | DataError) -> T:
    """Return what was found, or raise it if it is an error."""
    if isinstance(found, DataError):
        raise found
    return found
