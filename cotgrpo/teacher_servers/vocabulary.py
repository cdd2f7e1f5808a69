"""The student's tokens as a server writes them: as ids, or as pieces of text."""

from __future__ import annotations

import collections
import contextlib
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cotgrpo.data.tokenizer import decode, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Token = int | str
"""A token's id, or its text if a server does not give the id."""

WRITTEN_ID = re.compile(r"token_id:(\d+)")
"""How vLLM writes an id in place of a token's text, if it is asked to."""


class Vocabulary:
    """The tokens of the student.

    Args:
        tokenizer: the student's tokenizer.
        size: the number of its tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without tokens that the tokenizer adds by itself."""
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        return decode(self.tokenizer, ids)

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token of a text."""
        return [token_bytes(self.tokenizer, i, before) for before, i in zip([None, *ids], ids, strict=False)]

    def piece(self, token: Token) -> str:
        """Return a token's text for a message."""
        return token if isinstance(token, str) else repr(self.text([token]) if token < self.size else f"<{token}>")

    def id_of(self, token: Token) -> int | None:
        """Return the id of a token that a server names, or None: a text that no token has, or several."""
        if isinstance(token, int):
            return token
        written = WRITTEN_ID.fullmatch(token)
        return int(written[1]) if written else self.ids_by_text.get(token)

    def id_of_bytes(self, piece: bytes) -> int | None:
        """Return the id of the token with these bytes, or None if no token has them, or several."""
        return self.ids_by_bytes.get(piece)

    @functools.cached_property
    def ids_by_bytes(self) -> dict[bytes, int]:
        """The id of all bytes that one token alone has."""
        before = next(iter(self.encode("a")[-1:]), None)
        found: dict[bytes, list[int]] = collections.defaultdict(list)
        for i in range(self.size):
            found[token_bytes(self.tokenizer, i, before)].append(i)
        return {piece: ids[0] for piece, ids in found.items() if len(ids) == 1}

    @functools.cached_property
    def ids_by_text(self) -> dict[str, int]:
        """The id of each text that one token alone has. A part of a character has no text."""
        found: dict[str, int] = {}
        for piece, i in self.ids_by_bytes.items():
            with contextlib.suppress(UnicodeDecodeError):
                found[piece.decode()] = i
        return found


def cut_differently(vocabulary: Vocabulary, own: Sequence[int], theirs: Sequence[Token | None]) -> str | None:
    """Return where a server cuts a text into other tokens than the student, in words; None: nowhere.

    None in place of the first token is one that the server does not name. A token that it puts before each text does
    not count.
    """
    if len(theirs) == len(own) + 1 and list(theirs[1:]) == list(own):
        theirs = theirs[1:]
    if theirs and theirs[0] is None:
        theirs = [*own[:1], *theirs[1:]]
    return first_difference(vocabulary, own, [token for token in theirs if token is not None])


def first_difference(vocabulary: Vocabulary, own: Sequence[int], theirs: Sequence[Token]) -> str | None:
    """Return where a server cuts a text into other tokens than the student, in words; None: nowhere.

    A token that the server names by a text is compared by its text.
    """
    pieces = vocabulary.pieces(own)
    for place in range(max(len(own), len(theirs))):
        if place >= len(own) or place >= len(theirs):
            more = "student" if place < len(own) else "server"
            return f"it has {len(own)} tokens in the student's, and {len(theirs)} in the server's (more: the {more}'s)"
        token = theirs[place]
        same = token == own[place] or (isinstance(token, str) and vocabulary.id_of(token) == own[place])
        if isinstance(token, str) and not same and vocabulary.id_of(token) is None:
            same = token == pieces[place].decode("utf-8", "replace") or "\ufffd" in token
        if not same:
            shown = f"token {token} {vocabulary.piece(token)}" if isinstance(token, int) else repr(token)
            return (
                f"its token {place + 1} is {own[place]} {vocabulary.piece(own[place])} in the student's, and {shown} "
                "in the server's"
            )
    return None
