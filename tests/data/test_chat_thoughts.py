"""Thoughts in chats of each family of templates, and batches of rows: the same tokens as one text at a time."""

from __future__ import annotations

import dataclasses
import pickle
import unicodedata
from typing import Any

import numpy as np
import pytest
from helpers.chat_templates import FAMILIES, QWEN3, R1, family_template, family_tokenizer, made_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from cotgrpo.data.batches import REFUSED, encode_fitting, make_examples
from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.questions import Question, make_held_out
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate, Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.data.triples import Triple

TRIPLE = Triple("What is 12+30?", "2+0=2\n1+3=4", "42", source="f:1")
PLAIN = "2+0=2\n1+3=4\n\n#### 42"
INSIDE = "<think>\n2+0=2\n1+3=4\n</think>\n\n42"
REPLIES = {  # family: (end of the plain prompt, plain reply, end of the thinking prompt, reply with a thought)
    "chatml": ("assistant\n", PLAIN + "<|im_end|>", "assistant\n", INSIDE + "<|im_end|>"),
    "hermes": ("assistant\n", PLAIN + "<|im_end|>", "assistant\n", INSIDE + "<|im_end|>"),
    "llama": ("<|/head|>\n\n", PLAIN + "<|eot|>", "<|/head|>\n\n", INSIDE + "<|eot|>"),
    "gemma": ("model\n", PLAIN + "<end_of_turn>", "model\n", INSIDE + "<end_of_turn>"),
    "mistral": (" [/INST]", " " + PLAIN + "<eos>", " [/INST]", " " + INSIDE + "<eos>"),
    "qwen3": ("assistant\n<think>\n\n</think>\n\n", PLAIN + "<|im_end|>", "assistant\n", INSIDE + "<|im_end|>"),
    "r1": (
        "<｜Assistant｜><think>\n\n</think>\n\n",
        PLAIN + "<eos>",
        "<｜Assistant｜><think>\n",
        INSIDE.removeprefix("<think>\n") + "<eos>",
    ),
    "r1 bare": ("<｜Assistant｜>", PLAIN + "<eos>", "<｜Assistant｜>", INSIDE + "<eos>"),
    "r1 no break": (
        "<｜Assistant｜><think>\n\n</think>\n\n",
        PLAIN + "<eos>",
        "<｜Assistant｜><think>",
        INSIDE.removeprefix("<think>") + "<eos>",
    ),
    "v3.1": (
        "<｜Assistant｜></think>",
        PLAIN + "<eos>",
        "<｜Assistant｜><think>",
        INSIDE.removeprefix("<think>") + "<eos>",
    ),
    "smol3": ("assistant\n<think>\n\n</think>\n", PLAIN + "<|im_end|>", "assistant\n", INSIDE + "<|im_end|>"),
    "phi": ("assistant<|/head|>", PLAIN + "<|end|>", "assistant<|/head|>", INSIDE + "<|end|>"),
    "gpt-oss": (
        "<|start|>assistant",
        f"<|channel|>final<|message|>{PLAIN}<|return|>",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>2+0=2\n1+3=4<|end|><|start|>assistant<|channel|>final<|message|>42<|return|>",
    ),
    "magistral": ("<|/head|>", PLAIN + "<eos>", "<|/head|>", "[THINK]\n2+0=2\n1+3=4\n[/THINK]\n\n42<eos>"),
    "glm": (
        "/nothink<|assistant|>\n<think></think>",
        f"\n{PLAIN}<|user|>",
        "<|user|>\nWhat is 12+30?<|assistant|>",
        "\n<think>2+0=2\n1+3=4</think>\n42<|user|>",
    ),
    "seed": ("assistant\n", PLAIN + "<eos>", "assistant\n", "<seed:think>2+0=2\n1+3=4</seed:think>42<eos>"),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("reasoning", ["plain", "think"])
def test_replies_of_each_family(name: str, reasoning: Any) -> None:
    """The prompt is what a sampler reads, and what it would write there splits into the row's own texts."""
    made = family_template(name, reasoning)
    encoded = made.encode(TRIPLE)
    prompt, reply = np.split(encoded.tokens, [encoded.prompt_length])
    assert prompt.tolist() == made.prompt(TRIPLE.question).tolist() == made.prompt_of(TRIPLE).tolist()
    ending, wanted = REPLIES[name][:2] if reasoning == "plain" else REPLIES[name][2:]
    assert made.tokenizer.decode(prompt).endswith(ending) and made.tokenizer.decode(reply) == wanted
    assert (
        made.split_reply(reply)
        == made.split_reply(wanted.removesuffix(made.renderer.end_text))
        == ("2+0=2\n1+3=4", "42")
    )
    assert made.split_reply(reply[:-1])[0].startswith("2+0=2")


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_that_hold_the_mark_of_their_end(name: str) -> None:
    made = family_template(name, "think")
    mark = made.reply_format.mark
    with pytest.raises(DataError, match=r"f:1: (rationale and answer cannot be told apart|the rationale holds the)"):
        made.encode(dataclasses.replace(TRIPLE, rationale=f"a{mark}b"))


def test_templates_that_always_close_the_thought() -> None:
    """Then a reply has none, and the error's own advice works."""
    closing = QWEN3.replace("{% if enable_thinking is defined and enable_thinking is false %}", "{% if true %}")
    tokenizer = made_tokenizer(closing)
    with pytest.raises(DataError, match=r"the prompt closes the thought .*Try data.reasoning: plain"):
        ChatTemplate(tokenizer, "think")
    assert ChatTemplate(tokenizer, "plain").encode(TRIPLE).supervised.any()


def test_templates_that_always_open_and_keep_the_thought() -> None:
    """As Qwen3's thinking models do."""
    opening = QWEN3.replace(
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
        "{{ '<think>\n' }}",
    )
    assert opening != QWEN3
    for reasoning, reply in (("plain", PLAIN), ("think", INSIDE.removeprefix("<think>\n"))):
        made = ChatTemplate(made_tokenizer(opening), reasoning, loss_on="completion")  # type: ignore[arg-type]
        encoded = made.encode(TRIPLE)
        assert made.tokenizer.decode(encoded.tokens[encoded.supervised]) == reply + "<|im_end|>"
        assert encoded.tokens[: encoded.prompt_length].tolist() == made.prompt(TRIPLE.question).tolist()


def test_white_space_around_a_thought_of_the_template() -> None:
    """A whole chat may write more or less of it than the prompt. The prompt is what is read."""
    spaced = R1.replace("m.content.split('</think>')[-1]", "'<think>' + m.content.split('<think>')[-1].lstrip('\n')")
    made = ChatTemplate(made_tokenizer(spaced, "<eos>"), "think", loss_on="completion")
    encoded = made.encode(TRIPLE)
    assert made.tokenizer.decode(encoded.tokens[encoded.supervised]) == INSIDE.removeprefix("<think>\n") + "<eos>"


def test_answer_formats_and_system_messages_of_thinking_templates() -> None:
    for name in ("r1", "qwen3", "v3.1"):
        made = family_template(name, "think", answer_format=r"\boxed{{answer}}")
        encoded = made.encode(TRIPLE)
        assert made.tokenizer.decode(encoded.tokens[encoded.supervised]).endswith(
            "</think>\n\n\\boxed{42}" + made.renderer.end_text
        )
        assert made.split_reply(encoded.tokens[encoded.prompt_length :]) == ("2+0=2\n1+3=4", "42")
        with_system = dataclasses.replace(TRIPLE, system="Be brief.")
        assert "Be brief." in made.tokenizer.decode(made.encode(with_system).tokens)


# Batches.

NASTY = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(
        st.sampled_from(
            [
                *(
                    "<think>",
                    "</think>",
                    "#### ",
                    "\n",
                    "\n\n",
                    " ",
                    "<|im_end|>",
                    "<eos>",
                    "<tool_call>",
                    "[THINK]",
                    "42",
                ),
                *("a", "é", "e\u0301", "答", "\\boxed{", "}", "<sep>", "<｜User｜>", "assistant\n"),
            ]
        ),
        max_size=5,
    ).map("".join),
)


def nasty_tokenizers() -> dict[str, Any]:
    """Tokenizers that look at the text around a border."""
    rstrip = made_tokenizer(FAMILIES["phi"].template, "<|end|>")
    rstrip.add_tokens([AddedToken("<|/head|>", rstrip=True, special=True, normalized=False)], special_tokens=True)
    composing = made_tokenizer(FAMILIES["chatml"].template)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    words = made_tokenizer(FAMILIES["mistral"].template, "<eos>")
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {"rstrip": rstrip, "composing": composing, "words": words}


MADE: list[AnyTemplate] = [
    *(family_template(name, reasoning) for name in FAMILIES for reasoning in ("plain", "think")),
    *(ChatTemplate(made, loss_on="completion") for made in nasty_tokenizers().values()),
    Template(train_tokenizer([], vocab_size=259), loss_on="completion"),
    Template(family_tokenizer("chatml"), "\n###\n", loss_on="completion"),
]


@given(
    st.sampled_from(MADE), st.lists(st.tuples(NASTY, NASTY, NASTY, st.sampled_from(["", "s"])), min_size=1, max_size=6)
)
@example(MADE[0], [("q", "a", "1", ""), ("<|im_end|>", "a", "1", ""), ("q", "a", "2", "s")])
@example(MADE[8], [("<think>", "a", "1", ""), ("q", "</think>", "1", ""), ("q", "<tool_call>", "2", "s")])
@settings(deadline=None, max_examples=250)
def test_batches_are_what_the_tokenizer_gives_for_each_text(made: AnyTemplate, rows: list[tuple[str, ...]]) -> None:
    """A batch finds the prompt in the whole's tokens. Here the tokenizer reads prompt and whole, each alone."""
    triples = [Triple(q, r, a, source=f"f:{n}", system=s) for n, (q, r, a, s) in enumerate(rows)]
    for triple, found in zip(triples, made.encode_batch(triples), strict=True):
        try:
            alone = made.encode_all(triple)
        except DataError as error:
            assert str(found) == str(error) and str(error).startswith(triple.source)
            continue
        assert not isinstance(found, DataError)
        ((one,), (encoded,)) = alone, found
        assert one.tokens.tolist() == encoded.tokens.tolist() and one.source == encoded.source == triple.source
        start, tokens = encoded.prompt_length, encoded.tokens.tolist()
        assert encoded.supervised.tolist() == [False] * start + [True] * (len(tokens) - start)
        prompt = made.prompt(triple.question, triple.system).tolist()
        assert tokens[:start] == prompt
        whole = made.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        again = made.tokenizer(whole, add_special_tokens=False)["input_ids"]
        if again[:start] == prompt:  # else the border merges, and the reply was tokenized alone
            assert again == tokens
        wanted = tuple(unicodedata.normalize("NFC", text.strip()) for text in (triple.rationale, triple.answer))
        assert tuple(unicodedata.normalize("NFC", str(t)) for t in made.split_reply(encoded.tokens[start:])) == wanted


def test_settings_of_the_rust_tokenizer_are_left_out() -> None:
    """A tokenizer.json may say to truncate or pad. Neither reaches a batch."""
    tokenizer = made_tokenizer(FAMILIES["chatml"].template)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    made = ChatTemplate(tokenizer)
    assert (
        made.encode(TRIPLE).tokens.tolist() == ChatTemplate(family_tokenizer("chatml")).encode(TRIPLE).tokens.tolist()
    )
    tokenizer.backend_tokenizer.enable_truncation(4)
    again = ChatTemplate(tokenizer)
    assert len(again.encode(TRIPLE).tokens) == len(made.encode(TRIPLE).tokens)


def test_a_template_goes_to_another_process() -> None:
    for made in (family_template("r1", "think"), MADE[-1]):
        made.encode(TRIPLE)
        sent = pickle.loads(pickle.dumps(made))
        assert sent.encode(TRIPLE).tokens.tolist() == made.encode(TRIPLE).tokens.tolist()
        # Functions of the user's own stay: nobody judges replies there.
        fields = {field.name for field in dataclasses.fields(made)} - {"verifier"}  # type: ignore[arg-type]
        assert set(sent.__getstate__()) == fields


# Rows that the template refuses.

REFUSALS = {
    "control token": (dataclasses.replace(TRIPLE, rationale="a<|im_end|>b", source="f:2"), "control token"),
    "control token in the question": (dataclasses.replace(TRIPLE, question="<eos>?", source="f:2"), "control token"),
    "number line": (
        dataclasses.replace(TRIPLE, rationale="s\n#### 10\nso 10", answer="10", source="f:2"),
        "told apart",
    ),
    "mark in the answer": (dataclasses.replace(TRIPLE, answer="4\n\n#### 2", source="f:2"), "told apart"),
    "no rationale": (dataclasses.replace(TRIPLE, rationale="", answer="c", source="f:2"), "told apart"),
    "the template raises": (dataclasses.replace(TRIPLE, question="raise", source="f:2"), "cannot render"),
}
RAISING = FAMILIES["chatml"].template.replace(
    "m.content", "(raise_exception('no') if m.content == 'raise' else m.content)"
)


@pytest.mark.parametrize(("bad", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_refused_rows_are_errors_or_counted(bad: Triple, reason: str) -> None:
    made = ChatTemplate(made_tokenizer(RAISING))
    other = dataclasses.replace(TRIPLE, source="f:3")
    with pytest.raises(DataError, match=rf"f:2: .*{reason}"):
        make_examples([TRIPLE, bad, other], made, 400)
    examples, report = make_examples([TRIPLE, bad, other], made, 400, bad_rows="drop")
    assert [found.source for found in examples] == ["f:1", "f:3"]
    assert report.read == 3 and report.kept == 2 and report.dropped == {REFUSED: 1}
    (place,) = report.examples[REFUSED]
    assert place.startswith("f:2: ") and reason in place


def test_refused_rows_of_the_plain_format() -> None:
    made = Template(train_tokenizer([], vocab_size=259))
    bad = [dataclasses.replace(TRIPLE, **{field: "a<sep>b"}) for field in ("question", "rationale", "answer")]
    bad += [dataclasses.replace(TRIPLE, rationale="<eos>"), dataclasses.replace(TRIPLE, context=({},))]
    examples, report = encode_fitting([*bad, TRIPLE], made, 400, too_long="error", bad_rows="drop")
    assert len(examples) == 1 and report.dropped == {REFUSED: 5}


@pytest.mark.parametrize("made", [ChatTemplate(family_tokenizer("chatml")), MADE[-2]])
def test_refused_held_out_rows(made: AnyTemplate) -> None:
    """A question whose reply is refused stays for exact match. A question that is refused goes."""
    good = Question("What is 12+30?", "42", TRIPLE, "f:1")
    bad_reply = dataclasses.replace(good, reference=dataclasses.replace(TRIPLE, rationale="a<eos>b<sep>", source="f:2"))
    bad_question = dataclasses.replace(good, question="a<eos>b<sep>", source="f:3", reference=None)
    for bad in (bad_reply, bad_question):
        with pytest.raises(DataError, match=r"f:[23]: "):
            make_held_out([good, bad], made, 400)
    questions, examples, reports = make_held_out([good, bad_reply, bad_question], made, 400, bad_rows="drop")
    assert len(questions) == 2 and len(examples) == 1
    assert reports["held-out questions"].dropped == reports["held-out replies"].dropped == {REFUSED: 1}
    with pytest.raises(DataError, match=r"(?s)No held-out question fits .* 1 dropped, refused by the template: f:3"):
        make_held_out([bad_question], made, 400, bad_rows="drop")


def test_progress_of_encoding() -> None:
    done: list[int] = []
    make_examples([TRIPLE] * 3, MADE[0], 400, progress=done.append)
    assert done == [3]
