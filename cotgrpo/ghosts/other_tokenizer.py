"""Ghost tokens from a teacher with another tokenizer, aligned where both tokenizers have a boundary.

GRPO here is GhostRespond Policy Optimization, not Group Relative. The student's reply is one text, cut in two ways:

    student   |What| is| 12|34|          teacher   |What| is| |1|2|3|4|

The teacher can be asked at its own boundaries only. A context of the student is supervised if it ends at one of them.
The ghost's next text there is cut by the student's tokenizer, and its first token is y*. So y* is a token of the
student, and reward and objective are what they are with one tokenizer.

The ghost's next text is the token that the teacher chooses. While the reply goes on as the teacher chose, its next
choices belong to that text too. They come from the same forward pass. What is lost:

    - contexts inside a token of the teacher, which are not supervised;
    - a longer token of the student, if the ghost's text ends after the first part of it: y* is the token of that part;
    - the teacher's distribution: only its choice can be cut anew, so objectives that read more need one tokenizer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cotgrpo.types import Bool, Int

END = b""
"""The choice of a teacher that ends the reply."""
LONGEST_TEXT = 64
"""Bytes of the ghost's next text that are enough for a token of the student."""
ANCHORS = ("\n", "a", ".")
"""Characters before a text, for tokenizers that write a space in front of a text that stands alone."""


@dataclasses.dataclass(frozen=True)
class AlignedGhosts:
    """Ghost tokens of one reply.

    Attributes:
        ids: int32 `[N]`, the ghost token at each place of the reply; 0 where there is none.
        known: bool `[N]`, where there is one.
    """

    ids: Int[np.ndarray, "N"]
    known: Bool[np.ndarray, "N"]


def align(
    own: Sequence[bytes],
    theirs: Sequence[bytes],
    choices: Sequence[bytes | None],
    first_token: Callable[[bytes, bytes], int | None],
    end_id: int,
    *,
    places: int,
) -> AlignedGhosts:
    """Return the ghost tokens of a reply that student and teacher cut in two ways.

    Args:
        own: bytes of the student's tokens, without the end.
        theirs: bytes of the teacher's tokens of the same text.
        choices: bytes of the teacher's choice before each of its tokens, and after the last one: at most
            `len(theirs) + 1` of them. `END` ends the reply. None: not known.
        first_token: `first_token(begun, text)` returns the student's first token of a text, or None if there is none.
            `begun` are the bytes of a character that the tokens before it have begun.
        end_id: the student's token that ends a reply.
        places: places of the reply: `len(own)`, and one more if it has an end.
    """
    ids, known = np.zeros(places, np.int32), np.zeros(places, bool)
    text = b"".join(own)
    space = b" " if b"".join(theirs).startswith(b" ") and not text.startswith(b" ") else b""
    boundaries = {offset: token for token, offset in enumerate(shared_offsets(theirs, space + text))}
    offset = 0
    for place, piece in enumerate([*own, END][:places]):
        token = boundaries.get(offset + len(space), None if offset else 0)
        offset += len(piece)
        following = None if token is None else next_text(theirs, choices, token)
        if following is None:
            continue
        following = following.removeprefix(space) if token == 0 else following
        begun = unfinished(text[: offset - len(piece)])
        found = end_id if following == END else first_token(begun, following)
        if found is not None:
            ids[place], known[place] = found, True
    return AlignedGhosts(ids, known)


def shared_offsets(pieces: Sequence[bytes], text: bytes) -> list[int]:
    """Return the offset in `text` at which each token begins, and that of the end, as far as they are the same text."""
    whole = b"".join(pieces)
    differ = (place for place, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b)
    same = next(differ, min(len(whole), len(text)))
    offsets = [0]
    for piece in pieces:
        if offsets[-1] + len(piece) > same:
            break
        offsets.append(offsets[-1] + len(piece))
    return offsets


def next_text(theirs: Sequence[bytes], choices: Sequence[bytes | None], token: int) -> bytes | None:
    """Return the teacher's next text before its token number `token`; None if it is not known, `END` for the end.

    If the reply goes on as the teacher chose, the teacher's choice after that is a part of the text.
    """
    text, first = b"", True
    while token < len(choices):
        choice = choices[token]
        if choice is None:
            return None if first else text
        text, first = text + choice, False
        agrees = choice != END and token < len(theirs) and theirs[token] == choice
        if not agrees or len(text) >= LONGEST_TEXT:
            return text
        token += 1
    return None if first else text


def unfinished(text: bytes) -> bytes:
    """Return the bytes at the end of a text that begin a character and do not complete it."""
    for count in range(1, min(3, len(text)) + 1):
        byte = text[-count]
        if byte >= 0xC0:
            size = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return text[-count:] if size > count else b""
        if byte < 0x80:
            break
    return b""


def whole_characters(text: bytes) -> str:
    """Return the characters at the start of a text that are complete."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start].decode()


class FirstTokens:
    """The student's first token of a text, by its tokenizer. Calls are cached.

    Args:
        encode: returns the ids of a text, without tokens that a tokenizer adds by itself.
        pieces: returns the bytes of each token of ids.
    """

    def __init__(self, encode: Callable[[str], list[int]], pieces: Callable[[Sequence[int]], Sequence[bytes]]) -> None:
        self.encode, self.pieces = encode, pieces
        self.find = functools.lru_cache(maxsize=100_000)(self.find_first)

    def __call__(self, begun: bytes, text: bytes) -> int | None:
        """Return the token, or None: no complete character, or a tokenizer that changes the text.

        `begun` are the bytes of a character that the tokens before have begun.
        """
        return self.find(whole_characters(begun + text), len(begun))

    def find_first(self, text: str, begun: int) -> int | None:
        """Return the token of a text after so many bytes of it. There must be a boundary."""
        whole = text.encode()
        for anchor in ("", *ANCHORS):
            before, ids = self.encode(anchor) if anchor else [], self.encode(anchor + text)
            if ids[: len(before)] != before:
                continue
            offset = 0
            for token, piece in zip(ids[len(before) :], self.pieces(ids)[len(before) :], strict=True):
                if not piece or whole[offset : offset + len(piece)] != piece or offset > begun:
                    break
                if offset == begun:
                    return token
                offset += len(piece)
        return None
