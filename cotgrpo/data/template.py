"""The plain template: `question <sep> rationale <sep> answer <eos>` as tokens, with the mask of what is supervised."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from cotgrpo.data.triples import DataError, Triple

PROBES = ("a", "7", ".", "a b", "x\n", "(y)", "é")
"""Texts put on both sides of a separator to see whether the tokenizer keeps it apart."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One document as the student reads it.

    Attributes:
        tokens: int32 `[n]`.
        supervised: bool `[n]`, True where the token is a target of the loss; never the first, which nothing predicts.
        source: the triple's source.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Template:
    """Renders triples with a separator, tokenizes the whole, and finds the mask by rendering the prefix.

    Attributes:
        tokenizer: a `transformers` tokenizer with an eos token.
        separator: text between the three parts; best a token of its own (`<sep>` of a tokenizer trained here).
        loss_on: "sequence" supervises every token but the first (the method's own definition); "completion" only what follows the
            first separator.

    Raises:
        DataError: no eos token, or a separator that the tokenizer merges with the text beside it.
    """

    tokenizer: Any
    separator: str = "<sep>"
    loss_on: Literal["sequence", "completion"] = "sequence"

    def __post_init__(self) -> None:
        if self.loss_on not in ("sequence", "completion"):
            raise ValueError(f'loss_on must be "sequence" or "completion", got {self.loss_on!r}.')
        if not self.separator:
            raise ValueError("The separator is empty: expected a token of the tokenizer or some text.")
        if self.tokenizer.eos_token_id is None:
            raise DataError("The tokenizer has no eos token, so a reply could never end: set tokenizer.eos_token.")
        for left in PROBES:
            for right in PROBES:
                whole, prefix = self.ids(left + self.separator + right), self.ids(left + self.separator)
                if whole[: len(prefix)] != prefix or self.ids(left) != prefix[: len(self.ids(left))]:
                    raise DataError(
                        f"The separator {self.separator!r} is ambiguous: this tokenizer merges it with the text beside it "
                        f"({left + self.separator + right!r} becomes {self.pieces(whole)}). Use a token of the tokenizer's "
                        f"own, such as {self.suggestion()!r}, or add the separator to its special tokens."
                    )

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """The pad token, or eos where there is none. Padding is told apart by its segment id, never by this id."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else int(pad)

    def encode(self, triple: Triple) -> Example:
        """Tokens and mask of one triple.

        Raises:
            DataError: the text holds the separator, the separator merges with this text, or nothing would be supervised.
        """
        for field in ("question", "rationale", "answer"):
            if self.separator in getattr(triple, field):
                raise DataError(
                    f"{triple.source}: the {field} holds the separator {self.separator!r}, so the parts could not be told "
                    "apart. Choose another separator."
                )
        text = self.separator.join((triple.question, triple.rationale, triple.answer))
        tokens = [*self.with_bos(self.ids(text)), self.eos_id]
        prompt = self.prompt(triple.question).tolist()
        if tokens[: len(prompt)] != prompt:
            raise DataError(
                f"{triple.source}: the tokenizer merges the separator {self.separator!r} with the text beside it, so the prompt is "
                "no prefix of the sequence. Use a token of the tokenizer's own as separator."
            )
        supervised = np.ones(len(tokens), bool)
        supervised[: len(prompt) if self.loss_on == "completion" else 1] = False
        if not supervised.any():
            raise DataError(f"{triple.source}: no token is supervised (an all-zero loss mask). The row has no reply.")
        return Example(np.asarray(tokens, np.int32), supervised, triple.source)

    def prompt(self, question: str) -> np.ndarray:
        """int32 tokens of `question <sep>`: what the student reads before it replies."""
        return np.asarray(self.with_bos(self.ids(question + self.separator)), np.int32)

    def split_reply(self, reply: str | Sequence[int] | np.ndarray) -> tuple[str, str | None]:
        """(rationale, answer) of a generated reply, text or token ids; the answer is None when no separator came."""
        if not isinstance(reply, str):
            ids = [int(i) for i in reply]
            ids = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
            reply = self.tokenizer.decode(ids, skip_special_tokens=False)
        rationale, mark, answer = reply.partition(self.separator)
        return rationale.strip(), answer.strip() if mark else None

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def with_bos(self, ids: list[int]) -> list[int]:
        """Puts the bos token in front where the tokenizer's own convention does, and never twice."""
        bos = self.tokenizer.bos_token_id
        wanted = bos is not None and self.tokenizer.encode("a")[:1] == [bos]
        return [bos, *ids] if wanted and ids[:1] != [bos] else ids

    def pieces(self, ids: list[int]) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(ids)

    def suggestion(self) -> str:
        special = [t for t in self.tokenizer.all_special_tokens if t != self.tokenizer.eos_token]
        return special[0] if special else "<sep>"
