"""Alignment of two tokenizations: hand-made tables, and real tokenizers on texts in several scripts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from helpers.small_tokenizers import byte_level, metaspace
from transformers import PreTrainedTokenizerBase

from cotgrpo.data.tokenizer import token_bytes
from cotgrpo.ghosts.other_tokenizer import (
    END,
    FirstTokens,
    align,
    next_text,
    shared_offsets,
    unfinished,
    whole_characters,
)

VOCABULARY = (b"<end>", b"What", b" is", b" 12", b"34", b" 1", b"2", b"4", b"Hello", b"He", b"llo", b" ", "é".encode())
END_ID = 0


def first_token(text: bytes) -> int | None:
    """The longest token that the text begins with."""
    return max((i for i, token in enumerate(VOCABULARY) if i and text.startswith(token)), key=known, default=None)


def known(token: int) -> int:
    return len(VOCABULARY[token])


W, IS, ONE_TWO, THREE_FOUR = (VOCABULARY.index(t) for t in (b"What", b" is", b" 12", b"34"))
TABLE: dict[str, tuple[list[bytes], list[bytes], list[bytes | None], int, list[int | None]]] = {
    "the same cuts, the teacher agrees": (
        [b"What", b" is"], [b"What", b" is"], [b"What", b" is", END], 3, [W, IS, END_ID]
    ),
    "the teacher cuts finer: its agreed choices are joined": (
        [b"What", b" 12"], [b"What", b" ", b"1", b"2"], [b"What", b" ", b"1", b"2", END], 3, [W, ONE_TWO, END_ID]
    ),
    "and end where it disagrees": (
        [b" 12", b"34"], [b" ", b"1", b"2", b"3", b"4"], [b" ", b"1", b"4", b"3", b"4", END], 3,
        [VOCABULARY.index(b" 1"), THREE_FOUR, END_ID],
    ),
    "the teacher cuts coarser: no ghost inside its token": (
        [b"He", b"llo"], [b"Hello"], [b"Hello", END], 3, [VOCABULARY.index(b"Hello"), None, END_ID]
    ),
    "a space that the teacher writes in front": (
        [b"He", b"llo"], [b" Hello"], [b" Hello", END], 3, [VOCABULARY.index(b"Hello"), None, END_ID]
    ),
    "a token for that space": (
        [b"He", b"llo"], [b" ", b"Hello"], [b"x", b"Hello", END], 3, [VOCABULARY.index(b"Hello"), None, END_ID]
    ),
    "the teacher would have ended": ([b"What", b" is"], [b"What", b" is"], [END, END, b" is"], 3, [END_ID, END_ID, IS]),
    "a reply that was cut off": ([b"What", b" is"], [b"What", b" is"], [b"What", b" is"], 2, [W, IS]),
    "a choice that is not known": ([b"What", b" is"], [b"What", b" is"], [None, b" is", END], 3, [None, IS, END_ID]),
    "fewer choices than tokens": ([b"What", b" is"], [b"What", b" is"], [b"What"], 3, [W, None, None]),
    "text without a token of the student": ([b"What"], [b"What"], [b"Zebra", END], 2, [None, END_ID]),
    "half a character": ([b"What"], [b"What"], ["é".encode()[:1], END], 2, [None, END_ID]),
    "both halves of a character": (
        ["é".encode()], ["é".encode()[:1], "é".encode()[1:]], ["é".encode()[:1], "é".encode()[1:], END], 2,
        [VOCABULARY.index("é".encode()), END_ID],
    ),
    "a teacher that changes the text": ([b"What", b" is"], [b"What", b" IS"], [b"What", b" is", END], 3, [W, IS, None]),
    "an empty reply": ([], [], [b"What"], 1, [W]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_alignments_by_hand(name: str) -> None:
    own, theirs, choices, places, wanted = TABLE[name]
    checked = lambda begun, text: first_token(whole_characters(begun + text).encode()) if not begun else None
    found = align(own, theirs, choices, checked, END_ID, places=places)
    assert [int(i) if ok else None for i, ok in zip(found.ids, found.known, strict=True)] == wanted
    assert all(found.ids[~found.known] == 0)


def test_offsets_end_where_the_texts_differ() -> None:
    assert shared_offsets([b"ab", b"cd", b"e"], b"abcde") == [0, 2, 4, 5]
    assert shared_offsets([b"ab", b"cX", b"e"], b"abcde") == [0, 2]
    assert shared_offsets([b"ab"], b"abcde") == [0, 2]
    assert shared_offsets([], b"abc") == [0]


def test_the_next_text_has_a_longest_length() -> None:
    pieces = [b"12345678"] * 100
    assert next_text(pieces, [*pieces, END], 0) == b"12345678" * 8


@pytest.mark.parametrize("text", ["", "a", "é", "ab中", "🙂"])
def test_characters_that_are_not_complete(text: str) -> None:
    whole = text.encode()
    last = len(text[-1:].encode())
    assert unfinished(whole) == b""
    for cut in range(1, last):
        assert unfinished(whole[:-cut]) == whole[len(whole) - last : -cut]


TEXTS = (
    "What is 1234 + 99? It is 1333.\n\nSo the answer is 1333.",
    "Zürich–Genève: 280 km, naïve café.",
    "答案是118。一共有三个苹果。",
    "def f(x):\n    return x ** 2  # two  spaces",
    "🙂🙂 ok",
)


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    before = tokenizer.encode("a", add_special_tokens=False)[-1]
    return [token_bytes(tokenizer, i, before) for i in ids]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("pair", ["fine/coarse", "coarse/fine", "bytes/spaces", "spaces/bytes"])
def test_a_teacher_that_agrees_gives_the_students_own_tokens(text: str, pair: str) -> None:
    """The choices are the text itself, so every ghost is the token that the student wrote."""
    kinds = {"fine": byte_level(300), "coarse": byte_level(700), "bytes": byte_level(500), "spaces": metaspace(600)}
    student, teacher = (kinds[name] for name in pair.split("/"))
    encode = lambda words: [int(i) for i in student.encode(words, add_special_tokens=False)]
    own_ids = encode(text)
    own, theirs = pieces_of(student, own_ids), pieces_of(teacher, teacher.encode(text, add_special_tokens=False))
    if b"".join(own) == b" " + text.encode():  # at the start of a text the student writes a space
        own[0] = own[0].removeprefix(b" ")
    first = FirstTokens(encode, lambda ids: pieces_of(student, ids))
    found = align(own, theirs, [*theirs, END], first, 0, places=len(own) + 1)
    assert found.known[0] and found.known[-1] and found.known.mean() > 0.25
    for n in np.flatnonzero(found.known[:-1]):
        (ghost,) = pieces_of(student, [int(found.ids[n])])
        assert b"".join(own[n:]).startswith(ghost), "a ghost is a text that the teacher would write there"
    # The first token may be the space that the student's tokenizer writes in front of a text.
    same = [int(found.ids[n]) == own_ids[n] for n in np.flatnonzero(found.known[:-1]) if n]
    assert np.mean(same) > 0.9
