"""Templates turn a triple into tokens and a mask of the supervised ones.

Here are the base class and the plain template, `question <sep> rationale <sep> answer <eos>`. The chat template is in
`cotgrpo.data.chat`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from cotgrpo.data.sources import DataError
from cotgrpo.data.triples import Triple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("a", "7", ".", "a b", "x\n", "(y)", "é")
"""Texts put on both sides of a separator to see whether the tokenizer keeps it apart."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenized document.

    Attributes:
        tokens: int32 `[n]`.
        supervised: bool `[n]`, True if the token is a target of the loss; never the first, which nothing predicts.
        source: the triple's source.
        prompt_length: tokens before the reply.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    source: str = ""
    prompt_length: int = 0


class AnyTemplate(abc.ABC):
    """The interface of the plain and the chat template.

    Attributes:
        tokenizer: a `transformers` tokenizer.
        loss_on: "sequence" supervises every token but the first (the method's own definition); "completion" only the
            reply.
    """

    tokenizer: PreTrainedTokenizerBase
    loss_on: Literal["sequence", "completion"]

    @property
    @abc.abstractmethod
    def eos_id(self) -> int:
        """The token that ends a reply in training."""

    @property
    @abc.abstractmethod
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a generated reply, `eos_id` first."""

    @abc.abstractmethod
    def encode(self, triple: Triple, prompt: np.ndarray | None = None) -> Example:
        """Return the tokens and mask of a triple; `prompt` holds its prompt's tokens if they are known.

        Raises:
            DataError: the triple's texts would not come back unchanged from the rendered text.
        """

    @abc.abstractmethod
    def prompt(self, question: str, system: str = "") -> np.ndarray:
        """Return the int32 tokens before the reply, a prefix of `encode`'s; `system` is the row's system message."""

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
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def ids(self, text: str) -> list[int]:
        """Return the token ids of the text alone, without special tokens around it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def example(self, tokens: list[int], prompt_length: int, source: str) -> Example:
        """Return tokens with the mask for `loss_on`. Raises DataError for an all-zero mask."""
        supervised = np.ones(len(tokens), bool)
        supervised[: prompt_length if self.loss_on == "completion" else 1] = False
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

    Raises:
        DataError: no eos token, or a separator that holds it or that the tokenizer merges with the text around it.
    """

    tokenizer: PreTrainedTokenizerBase
    separator: str = "<sep>"
    loss_on: Literal["sequence", "completion"] = "sequence"

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

    def encode(self, triple: Triple, prompt: np.ndarray | None = None) -> Example:
        """Return the tokens and mask of a triple; `prompt` holds its prompt's tokens if they are known.

        Raises:
            DataError: the text holds the separator or the eos token, the separator merges with this text, or no token
                would be supervised.
        """
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
        tokens = [*self.with_bos(self.ids(text)), self.eos_id]
        if self.eos_id in tokens[:-1]:
            raise DataError(
                f"{triple.source}: the text holds the eos token {self.tokenizer.eos_token!r}, and the student would "
                "learn to stop there. Remove it from the row."
            )
        prompt = self.prompt(triple.question, triple.system) if prompt is None else prompt
        if tokens[: len(prompt)] != prompt.tolist():
            raise DataError(
                f"{triple.source}: the tokenizer merges the separator {self.separator!r} with the text around it, so "
                "the prompt is not a prefix of the sequence. Use a token of the tokenizer's own as separator."
            )
        return self.example(tokens, len(prompt), triple.source)

    def prompt(self, question: str, system: str = "") -> np.ndarray:
        """Return the int32 tokens of `question <sep>`, with a system message before the question."""
        return np.asarray(self.with_bos(self.ids(with_system(question, system) + self.separator)), np.int32)

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
