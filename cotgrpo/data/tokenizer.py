"""Tokenizers: one trained on the data at hand for from-scratch students, or a pretrained model's own."""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cotgrpo.atomic_files import is_special, sync, whole_folder
from cotgrpo.data.sources import DataError
from cotgrpo.disk_errors import explain_disk_errors
from cotgrpo.models.huggingface.folder import split_revision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

UNDECODABLE = "\N{SYMBOL FOR SUBSTITUTE FORM TWO}"
"""Stands for bytes that are no character: the end of a reply that was cut off inside one, or what a student made up.

It has no digits, so it never becomes part of an answer. A U+FFFD that a text holds itself stays.
"""
ONE_BYTE = re.compile("<0x([0-9A-F]{2})>")
"""The token of a single byte in a vocabulary with byte fallback."""

LONG_WORD = re.compile(r"[^\W\d_]{1000}|(?:[^\w\s]|_){1000}")
"""The start of a word, as the tokenizer cuts texts before it merges, that is too long to learn from."""

TOKENIZER_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
"""A hub id, maybe with a revision."""

SPECIAL_TOKENS = ("<pad>", "<eos>", "<sep>")
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
"""Further special tokens of a tokenizer that is trained for chats: each starts a turn, and "<eos>" ends it."""
CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<eos>{% endif %}"
    "{% for message in messages %}"
    "<|{{ 'system' if message.role == 'developer' else message.role }}|>{{ message.content or '' }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<eos>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The chat template of a tokenizer that is trained for chats."""


def cut_long_words(text: str) -> str:
    """Return the text with a blank after every 1,000 letters, or other marks, in a row.

    The trainer's time grows with the square of a word's length: a megabyte of Base64 or of one letter takes hours.
    """
    return LONG_WORD.sub(r"\g<0> ", text)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS, chat: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits numbers into single digits.

    Every text survives encoding and decoding unchanged: the vocabulary holds all 256 bytes.

    Args:
        texts: the training text.
        vocab_size: most tokens, at least 256 and the special ones. A text with few pairs to merge gives fewer.
        special_tokens: must hold "<pad>" and "<eos>".
        chat: add `CHAT_TOKENS` and `CHAT_TEMPLATE`, so the tokenizer renders chats.

    Raises:
        DataError: `vocab_size` too small.
        ValueError: a special token is missing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not {"<pad>", "<eos>"} <= set(special_tokens):
        raise ValueError(f'special_tokens must hold "<pad>" and "<eos>", got {list(special_tokens)}.')
    special_tokens = [*special_tokens, *(CHAT_TOKENS if chat else ())]
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise DataError(
            f"tokenizer.vocab_size must be at least {least} (256 bytes and the special tokens), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(cut_long_words, texts), trainer)
    return transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        **({"chat_template": CHAT_TEMPLATE} if chat else {}),
    )


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder or hub id through `transformers`, without remote code.

    A hub id may be `owner/name@revision`, with a branch, tag or commit.

    Raises:
        DataError: it cannot be loaded.
    """
    folder = Path(path_or_id)
    special = [path for path in folder.iterdir() if is_special(path)] if folder.is_dir() else []
    is_path = folder.exists() or folder.is_symlink() or not TOKENIZER_ID.fullmatch(str(path_or_id))
    if special or (is_path and not folder.is_dir()):
        found = f" ({special[0].name} is a device, pipe or socket)" if special else ""
        raise DataError(f"No tokenizer in {path_or_id}{found}: expected a folder with tokenizer.json, or a hub id.")
    try:
        name, revision = split_revision(str(path_or_id))
        return transformers().AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # a broken file raises many kinds, the Rust library's bare Exception among them
        raise DataError(
            f"No tokenizer in {path_or_id}: expected a folder with tokenizer.json, or a hub id "
            f"({type(error).__name__}: {error})."
        ) from error


def find_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that a run keeps in a folder; None if it is missing or cannot be read."""
    whole = all((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    try:
        return load_tokenizer(folder) if whole else None
    except DataError:
        return None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer to a folder, atomically. If the folder holds these very files, it stays as it is.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    new = folder.with_name(f"{folder.name}.new")
    with explain_disk_errors(folder):
        remove(new)
        with whole_folder(new) as partial:
            tokenizer.save_pretrained(partial)
        if contents(new) == contents(folder):
            remove(new)
            return
        remove(folder)
        os.replace(new, folder)
        sync(folder.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return what the files of a folder hold, by name."""
    if not folder.is_dir():
        return {}
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


class Piece(NamedTuple):
    """Tokens that make up whole characters.

    Attributes:
        text: their text.
        start: place of the first token.
        end: place after the last token.
    """

    text: str
    start: int
    end: int


def joined_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray) -> list[Piece]:
    """Split token ids into the smallest pieces of whole characters. The pieces' texts add up to `decode_text(ids)`.

    A token of a byte-level vocabulary, or of one with byte fallback, may be a part of a character. Alone it would be
    U+FFFD. It is joined with the tokens of the same character.
    """
    places = [int(i) for i in ids]
    tokens = [token_bytes(tokenizer, token, before) for before, token in zip([None, *places], places, strict=False)]
    text = b"".join(tokens)
    inside = {place for start, end in characters(text) for place in range(start + 1, end)}
    pieces: list[Piece] = []
    first = offset = begin = 0
    for number, token in enumerate(tokens, 1):
        offset += len(token)
        if offset not in inside:
            pieces.append(Piece(decode_bytes(text[begin:offset]), first, number))
            first, begin = number, offset
    return pieces


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray) -> str:
    """Return the text of token ids, with special tokens and spaces, and `UNDECODABLE` for bytes that are no character.

    `tokenizer.decode` writes U+FFFD for these bytes.
    """
    text = decode(tokenizer, ids)
    return text if "\ufffd" not in text else "".join(piece.text for piece in joined_pieces(tokenizer, ids))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray) -> str:
    """Return the text of token ids as the tokenizer writes it, with special tokens and all spaces."""
    ids = [int(i) for i in ids]
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int, before: int | None) -> bytes:
    """Return the bytes of a token that follows the token `before`, or None for the first token of a text."""
    alone, name = decode(tokenizer, [token]), str(tokenizer.convert_ids_to_tokens(token))
    table, found = byte_alphabet(), b""
    if one := ONE_BYTE.fullmatch(name):
        found = bytes([int(one[1], 16)])
    elif "\ufffd" in alone and all(letter in table for letter in name):
        found = bytes(table[letter] for letter in name)
    # What the token is alone tells half a character from a text that looks like one. A space at the start may be lost.
    if found and alone in ((text := found.decode(errors="replace")), text.removeprefix(" ")):
        return found.lstrip() if before is None and not alone else found
    if before is None:
        return alone.encode()
    # Some tokenizers write a space before a token, except at the start.
    prefix, both = decode(tokenizer, [before]), decode(tokenizer, [before, token])
    return (both.removeprefix(prefix) if both.startswith(prefix) else alone).encode()


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte of each letter in the tokens of a byte-level vocabulary, as GPT-2 and its kin write them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def characters(text: bytes) -> Iterator[tuple[int, int]]:
    """Yield the places of each character of several bytes, and of each longest part of a broken one."""
    start = 0
    while start < len(text):
        try:
            good, broken = text[start:].decode(), (0, 0)
        except UnicodeDecodeError as error:
            good, broken = text[start : start + error.start].decode(), (start + error.start, start + error.end)
        for letter in good:
            size = len(letter.encode())
            yield start, start + size
            start += size
        if broken[1]:
            yield broken
            start = broken[1]


def decode_bytes(text: bytes) -> str:
    """Return the text of bytes, with `UNDECODABLE` for each longest part of a broken character."""
    parts = (text[start:end] for start, end in characters(text))
    return "".join(map(decode_character, parts))


def decode_character(text: bytes) -> str:
    """Return a character, or `UNDECODABLE`."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return UNDECODABLE


def transformers() -> ModuleType:
    """Import `transformers` without its notice that PyTorch is missing: only its tokenizers are used here."""
    missing = lambda record: "PyTorch was not found" not in record.getMessage()
    logger = logging.getLogger("transformers")
    logger.addFilter(missing)
    try:
        import transformers
    finally:
        logger.removeFilter(missing)
    return transformers
