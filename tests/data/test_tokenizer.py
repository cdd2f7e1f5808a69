"""Tokenizers: pieces of whole characters, digits of any script, and chats of a tokenizer that is trained here."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import (
    CHAT_TOKENS,
    SPECIAL_TOKENS,
    UNDECODABLE,
    Piece,
    cut_long_words,
    decode_text,
    joined_pieces,
    train_tokenizer,
    transformers,
)
from cotgrpo.teachers.procedural import ProceduralTeacher

TEXT = "小明有47个苹果。你好世界 hello world café 한국어 日本語\n"
FAMILY = "\U0001f469\u200d\U0001f467"
"""A woman, a joiner and a girl: one picture of three characters, eleven bytes."""


@cache
def byte_level() -> Any:
    """GPT-2's kind: a token is any bytes."""
    return train_tokenizer([TEXT] * 3, vocab_size=300)


@cache
def byte_fallback() -> Any:
    """Llama 2's kind: a character outside the vocabulary is a token for each byte, and a word begins with a mark."""
    words = [
        "▁",
        "小",
        "明",
        *"helo",
        "he",
        "ll",
        "hell",
        "hello",
        "▁h",
        "▁he",
        "▁hell",
        "▁hello",
        "苹",
        "果",
        "\ufffd",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = ["h e", "l l", "he ll", "hell o", "▁ hello"]
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        [tuple(merge.split()) for merge in merges],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def word_piece() -> Any:
    """BERT's kind: a token inside a word has a mark."""
    tokens = ["[UNK]", "[SEP]", *"abc小明47.,é", *(f"##{letter}" for letter in "abc小明47é"), "ab", "##bc", "\ufffd"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return wrapped(tokenizer, eos_token="[SEP]", unk_token="[UNK]")


def wrapped(tokenizer: Tokenizer, **special: str) -> Any:
    return transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )


KINDS = [byte_level, byte_fallback, word_piece]
TEXTS = st.text() | st.text("小明苹果47 héab.c\ufffd" + FAMILY)


def whole(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@given(TEXTS)
def test_pieces_add_up_to_the_text(kind: Any, text: str) -> None:
    """None of them has U+FFFD, unless it is in the text itself."""
    tokenizer = kind()
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = joined_pieces(tokenizer, ids)
    assert "".join(piece.text for piece in pieces) == whole(tokenizer, ids) == decode_text(tokenizer, ids)
    assert [i for piece in pieces for i in range(piece.start, piece.end)] == list(range(len(ids)))
    assert all(piece.end > piece.start for piece in pieces)
    for mark in {"\ufffd", UNDECODABLE} - set(text):
        assert not any(mark in piece.text for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_any_tokens_have_pieces(kind: Any, data: Any) -> None:
    """As an untrained student writes them: bytes in any order."""
    tokenizer = kind()
    genuine = [i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i) == "\ufffd"]
    ids = data.draw(st.lists(st.sampled_from([i for i in range(len(tokenizer)) if i not in genuine])))
    pieces = joined_pieces(tokenizer, ids)
    text = "".join(piece.text for piece in pieces)
    assert text == decode_text(tokenizer, ids)
    assert text.count("\ufffd") <= len(ids) // 3  # the three bytes of a U+FFFD, drawn in order
    assert [i for piece in pieces for i in range(piece.start, piece.end)] == list(range(len(ids)))
    assert (UNDECODABLE in text) <= ("\ufffd" in whole(tokenizer, ids))


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_a_reply_that_is_cut_off_inside_a_character(kind: Any) -> None:
    tokenizer = kind()
    ids = tokenizer.encode("小龙", add_special_tokens=False)
    for cut in (1, 2):
        short = ids[:-cut]
        assert "\ufffd" in whole(tokenizer, short)
        assert decode_text(tokenizer, short) == f"小{UNDECODABLE}"
        *_, last = joined_pieces(tokenizer, short)
        assert last == Piece(UNDECODABLE, len(ids) - 3, len(short))


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("小", [1]),  # merged in training
        ("龙", [3]),
        ("龙龙", [3, 3]),
        ("\ufffd", [3]),
        ("ab", [1, 1]),
        (FAMILY, [4, 3, 4]),
        ("e\u0301", [1, 2]),
    ],
)
def test_tokens_of_one_character_are_joined_and_no_others(text: str, sizes: list[int]) -> None:
    tokenizer = train_tokenizer(["小"] * 9, vocab_size=261)
    pieces = joined_pieces(tokenizer, tokenizer.encode(text))
    assert [piece.end - piece.start for piece in pieces] == sizes
    assert "".join(piece.text for piece in pieces) == text


@pytest.mark.parametrize(
    ("text", "longest"),
    [("x" * 2500, 1000), ("答" * 2500, 1000), ("=-_" * 1500, 1000), ("word " * 900, 4), ("é" * 999, 999)],
)
def test_long_words_are_cut_before_a_tokenizer_is_trained(text: str, longest: int) -> None:
    cut = cut_long_words(text)
    assert cut.replace(" ", "") == text.replace(" ", "") and max(map(len, cut.split())) == longest
    assert (cut == text) == (len(text) < 1000 or " " in text)
    made = train_tokenizer([text], vocab_size=300)
    assert made.decode(made.encode(text)) == text


def test_a_word_keeps_its_space() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.encode("hello hello", add_special_tokens=False)
    assert [piece.text for piece in joined_pieces(tokenizer, ids)] == ["hello", " hello"]
    tokenizer = word_piece()
    ids = tokenizer.encode("ab c, abc", add_special_tokens=False)
    assert [piece.text for piece in joined_pieces(tokenizer, ids)] == ["ab", " c", ",", " ab", "##c"[2:]]


@pytest.mark.parametrize("digits", ["123", "１２３", "٣٤", "४५", "²³"])
def test_numbers_of_any_script_are_split_into_digits(digits: str) -> None:
    tokenizer = train_tokenizer([f"一共{digits}元。"] * 9, vocab_size=320)
    pieces = joined_pieces(tokenizer, tokenizer.encode(f"共{digits}元"))
    assert [piece.text for piece in pieces if piece.text in digits] == list(digits)


def test_chinese_punctuation_does_not_merge_with_what_is_around_it() -> None:
    """A separator or a prompt's end next to it stays what it is."""
    rows = ProceduralTeacher(seed=1, language="zh").draw(50)
    tokenizer = train_tokenizer((f"{t.question}\n{t.rationale}" for t in rows), vocab_size=500)
    template = Template(tokenizer, loss_on="completion")
    for row in rows:
        example = template.encode(row)
        assert template.prompt(row.question).tolist() == example.tokens[: example.prompt_length].tolist()
        assert template.split_reply(example.tokens[example.prompt_length :]) == (row.rationale, row.answer)
    ids = tokenizer.encode("苹果，苹果。")
    assert [piece.text for piece in joined_pieces(tokenizer, ids)] == ["苹果", "，", "苹果", "。"]


def test_the_tokenizer_of_a_plain_run_has_no_chat() -> None:
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    assert tokenizer.chat_template is None
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == list(SPECIAL_TOKENS)
    assert not set(CHAT_TOKENS) & set(tokenizer.get_vocab())


@pytest.mark.parametrize("system", ["", "你是老师。"])
@pytest.mark.parametrize("reasoning", ["plain", "think"])
def test_a_tokenizer_that_is_trained_for_chats(reasoning: Any, system: str) -> None:
    rows = ProceduralTeacher(seed=1, language="zh").draw(20)
    tokenizer = train_tokenizer((f"{t.question}\n{t.rationale}" for t in rows), vocab_size=400, chat=True)
    template = ChatTemplate(tokenizer, reasoning, "", system, "completion")
    for row in rows:
        example = template.encode(row)
        assert example.tokens[-1] == tokenizer.eos_token_id == template.eos_id
        prompt, reply = example.tokens[: example.prompt_length], example.tokens[example.prompt_length :]
        start = f"<|system|>{system}<eos>" if system else ""
        assert tokenizer.decode(prompt) == f"{start}<|user|>{row.question}<eos><|assistant|>"
        assert template.split_reply(reply) == (row.rationale, row.answer)


def test_a_chat_of_several_turns_and_tools() -> None:
    tokenizer = train_tokenizer([TEXT], vocab_size=300, chat=True)
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "developer", "content": "简短"},
        {"role": "user", "content": "一加一？"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    called = '[{"function": {"name": "add", "arguments": {"a": 1}}}]'
    assert text == (f"<|system|>简短<eos><|user|>一加一？<eos><|assistant|>{called}<eos><|tool|>2<eos><|assistant|>")
    tools = [{"type": "function", "function": {"name": "加"}}]
    with_tools = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert with_tools.startswith('<|system|>[{"type": "function", "function": {"name": "加"}}]<eos><|system|>')


def test_a_vocabulary_that_has_no_room_for_a_chat() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 263"):
        train_tokenizer([], vocab_size=262, chat=True)
