"""Tokens and masks by hand, separators that a tokenizer spoils, and text that must come back as it went in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cotgrpo.data.batches import make_batches, make_examples
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import load_tokenizer, train_tokenizer
from cotgrpo.data.triples import DataError, Triple

TEXTS = ["What is 12+30? 2+0=2", "How many figs has Ana now?", "Ana has 47 figs.\nAna finds 85 figs."] * 3
TRAINED = train_tokenizer(TEXTS, vocab_size=320)
TRIPLE = Triple("What is 12+30?", "2+0=2\n1+3=4", "42", source="f:1")
WORDS = ("[PAD]", "[EOS]", "[BOS]", "[SEP]", "What", "is", "1", "+", "2", "?", "=", "3")
any_text = st.text(st.characters(exclude_categories=["Cs"]))


def word_tokenizer(bos: bool = True, **special: Any) -> Any:
    """One token a word, ids as in WORDS; with a [BOS] that it puts in front itself, as Llama's does."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("[BOS] $A", special_tokens=[("[BOS]", 2)])
    special = {"eos_token": "[EOS]", "bos_token": "[BOS]", "extra_special_tokens": ["[SEP]"]} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


WORD_TRIPLE = Triple("What is 1+2?", "1+2=3", "3", source="f:9")


@pytest.mark.parametrize(
    ("loss_on", "supervised"),
    [("sequence", [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]), ("completion", [0] * 8 + [1] * 8)],
)
def test_tokens_and_mask(loss_on: Any, supervised: list[int]) -> None:
    """[BOS] What is 1 + 2 ? [SEP] | 1 + 2 = 3 [SEP] 3 [EOS]: the bar is where a completion starts."""
    template = Template(word_tokenizer(), "[SEP]", loss_on)
    encoded = template.encode(WORD_TRIPLE)
    assert encoded.tokens.tolist() == [2, 4, 5, 6, 7, 8, 9, 3, 6, 7, 8, 10, 11, 3, 11, 1]
    assert encoded.tokens.dtype == np.int32 and encoded.supervised.dtype == bool and encoded.source == "f:9"
    np.testing.assert_array_equal(encoded.supervised, supervised)
    assert template.prompt(WORD_TRIPLE.question).tolist() == [2, 4, 5, 6, 7, 8, 9, 3]


def test_bos_only_where_the_tokenizer_puts_it_and_once() -> None:
    assert Template(word_tokenizer(bos=False), "[SEP]").prompt("is").tolist() == [5, 3]
    template = Template(word_tokenizer(), "[SEP]")
    assert template.prompt("is").tolist() == [2, 5, 3]
    assert template.prompt("[BOS] is").tolist() == [2, 5, 3]
    assert Template(TRAINED).prompt("a").tolist() == [*TRAINED.encode("a"), TRAINED.convert_tokens_to_ids("<sep>")]


def test_eos_and_pad() -> None:
    template = Template(TRAINED)
    assert (template.pad_id, template.eos_id) == (0, 1)
    assert Template(word_tokenizer(), "[SEP]").pad_id == 1  # eos, where there is no pad
    assert Template(word_tokenizer(pad_token="[PAD]"), "[SEP]").pad_id == 0
    with pytest.raises(DataError, match=r"no eos token.*set tokenizer.eos_token"):
        Template(word_tokenizer(eos_token=None), "[SEP]")


@pytest.mark.parametrize("separator", ["<sep>", " ### ", "<pad>", "=>"])
@pytest.mark.parametrize("loss_on", ["sequence", "completion"])
def test_prompts_are_prefixes(separator: str, loss_on: Any) -> None:
    template = Template(TRAINED, separator, loss_on)
    encoded, prompt = template.encode(TRIPLE), template.prompt(TRIPLE.question)
    np.testing.assert_array_equal(encoded.tokens[: len(prompt)], prompt)
    text = f"What is 12+30?{separator}2+0=2\n1+3=4{separator}42<eos>"
    assert TRAINED.decode(encoded.tokens) == text
    first = len(prompt) if loss_on == "completion" else 1
    np.testing.assert_array_equal(encoded.supervised, np.arange(len(encoded.tokens)) >= first)
    assert template.split_reply(encoded.tokens[len(prompt) :]) == (TRIPLE.rationale, TRIPLE.answer)


def test_a_separator_that_merges_with_the_text() -> None:
    merging = train_tokenizer(["a##. b##(y)"] * 20, vocab_size=300)
    with pytest.raises(DataError, match=r"'##' is ambiguous.*becomes \[.*such as '<sep>', or add the separator to its"):
        Template(merging, "##")
    merging.add_tokens(["##"], special_tokens=True)
    assert Template(merging, "##").encode(TRIPLE).tokens.tolist().count(merging.convert_tokens_to_ids("##")) == 2
    plain = train_tokenizer(["a##. b##(y)"] * 20, vocab_size=300, special_tokens=("<pad>", "<eos>"))
    with pytest.raises(DataError, match="Use a token of the tokenizer's own, or add"):
        Template(plain, "##")


def test_a_separator_that_merges_with_this_text_alone() -> None:
    """The probes of the template cannot know every merge: here `|!` is one token."""
    template = Template(train_tokenizer(["a|!"] * 50, vocab_size=300), "|")
    assert template.encode(Triple("q", "r!", "a")).tokens.size == 7
    with pytest.raises(DataError, match=r"f:1: the tokenizer merges the separator '\|'.*prompt is not a prefix"):
        template.encode(Triple("q", "!r", "a", source="f:1"))


@pytest.mark.parametrize("field", ["question", "rationale", "answer"])
def test_text_that_holds_the_separator_or_eos(field: str) -> None:
    template = Template(TRAINED)
    texts = {"question": "q", "rationale": "r", "answer": "a"}
    with pytest.raises(DataError, match=f"f:3: the {field} holds the separator '<sep>'.*Choose another separator"):
        template.encode(Triple(**texts | {field: "x<sep>y"}, source="f:3"))
    with pytest.raises(DataError, match=r"f:3: the text holds the eos token '<eos>'.*Remove it"):
        template.encode(Triple(**texts | {field: "x<eos>y"}, source="f:3"))


def test_text_that_ends_like_the_separator_starts() -> None:
    """`2#` and `##` side by side are `2###`, which splits before the first #, not after it."""
    template = Template(TRAINED, "##")
    assert template.split_reply("r###1") == ("r", "#1") and template.encode(Triple("q", "r", "#1")).tokens.size > 0
    for triple in (Triple("q", "2#", "a", source="f:3"), Triple("q#", "2", "a", source="f:3")):
        with pytest.raises(DataError, match=r"f:3: the text holds the separator '##' \(or a part of it, at an edge\)"):
            template.encode(triple)


def test_separators_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="separator is empty"):
        Template(TRAINED, "")
    with pytest.raises(DataError, match="holds the eos token"):
        Template(TRAINED, "<eos>")


def test_split_reply() -> None:
    template = Template(TRAINED)
    assert template.split_reply("1+2=3 <sep> 3 ") == ("1+2=3", "3")
    assert template.split_reply("1+2=3") == ("1+2=3", None)
    assert template.split_reply("<sep>") == ("", "")
    assert template.split_reply("a<sep>b<sep>c") == ("a", "b<sep>c")
    ids = TRAINED.encode("1 + 2 . 3 ' s<sep>3<eos>after<sep>that")
    assert template.split_reply(np.asarray(ids)) == ("1 + 2 . 3 ' s", "3")
    assert template.split_reply([]) == ("", None)


def test_long_documents_are_an_error_or_counted() -> None:
    template = Template(TRAINED)
    short, long = TRIPLE, Triple("How many?", "1+1=2\n" * 50, "2", source="f:2")
    needed = len(template.encode(long).tokens) - 1
    with pytest.raises(
        DataError, match=f"f:2: needs {needed} positions, .* has {needed - 1}. Raise seq_len, or set too_"
    ):
        make_examples([short, long], template, needed - 1)
    examples, report = make_examples([short, long], template, needed)
    assert len(examples) == 2 and report.dropped == {}
    examples, report = make_examples([short, long], template, needed - 1, too_long="drop")
    assert [e.source for e in examples] == ["f:1"] and report.kept == 1
    assert report.dropped == {"too long": 1} and report.examples == {"too long": [f"f:2: {needed} positions"]}
    with pytest.raises(DataError, match=r"No document fits into 2 positions. 0 of 1 rows kept"):
        make_examples([short], template, 2, too_long="drop")
    with pytest.raises(DataError, match="No document fits"):
        make_examples([], template, 512)


@given(any_text)
@example("<sep> <eos> <pad>")
@example("\x00\ufeff\u200b e\u0301 \U0001f469\u200d\U0001f469 \u0627\r\n\t 　")
@example("Ġ Ċ ▁ 12 345 ٣")
def test_every_text_survives(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text), skip_special_tokens=False) == text


part = any_text.map(str.strip).filter(lambda text: text and "<" not in text)


@given(part, part, part)
@settings(deadline=None)
def test_every_triple_survives(question: str, rationale: str, answer: str) -> None:
    template = Template(TRAINED)
    encoded, prompt = template.encode(Triple(question, rationale, answer)), template.prompt(question)
    assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
    assert TRAINED.decode(prompt) == question + "<sep>"
    assert template.split_reply(encoded.tokens[len(prompt) :]) == (rationale, answer)
    assert encoded.tokens.min() >= 0 and encoded.tokens.max() < len(TRAINED)
    (batch,) = make_batches([encoded], batch_size=1, seq_len=len(encoded.tokens) - 1, num_epochs=1)
    assert batch.targets[0].tolist() == encoded.tokens[1:].tolist()


def test_digits_are_tokens_of_their_own() -> None:
    assert TRAINED.convert_ids_to_tokens(TRAINED.encode("47+85")) == ["4", "7", "+", "8", "5"]


def test_train_tokenizer_bounds() -> None:
    assert len(train_tokenizer([], vocab_size=259)) == 259
    assert len(train_tokenizer(["ab " * 9], vocab_size=5000)) < 265
    with pytest.raises(ValueError, match=r"vocab_size must be at least 259 \(256 bytes .*, got 258"):
        train_tokenizer(TEXTS, vocab_size=258)
    with pytest.raises(ValueError, match=r'must hold "<pad>" and "<eos>", got \[.<eos>.\]'):
        train_tokenizer(TEXTS, vocab_size=300, special_tokens=["<eos>"])


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    TRAINED.save_pretrained(tmp_path)
    template = Template(load_tokenizer(tmp_path))
    assert template.encode(TRIPLE).tokens.tolist() == Template(TRAINED).encode(TRIPLE).tokens.tolist()
    assert (template.pad_id, template.eos_id) == (0, 1)


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    for content in (None, "{", '{"version": "1.0", "model": {"type": "None such"}}'):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=r"No tokenizer in .*expected a folder with tokenizer.json, or a hub id"):
            load_tokenizer(tmp_path)
