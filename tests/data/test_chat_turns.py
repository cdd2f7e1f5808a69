"""Chats of several turns and with tools: which tokens are supervised, for the templates of each family."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from helpers.chat_templates import FAMILIES, TOOL_FAMILIES, family_template, family_tokenizer, made_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from cotgrpo.data.batches import make_examples
from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.questions import Question, make_held_out
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import Example, Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.data.triples import Triple, read_triples, with_question, write_triples

REASONING = ("plain", "think")
FIRST = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "It is 4."},
]
CHAT = Triple(
    "And 3+3?", "3+3=6", "6", source="f:1", context=(*FIRST, {"role": "user", "content": "And 3+3?"}), system=""
)
SPOKEN = ["It is 2.", "It is 4.", "6"]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 5, "b": 7}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
WITH_TOOLS = Triple(
    "What is 5+7?",
    "",
    "The sum is 12.",
    source="f:2",
    context=(
        {"role": "user", "content": "What is 5+7?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": 'the "sum": 12'},
    ),
    tools=(TOOL,),
    verbatim=True,
)


def template(name: str, reasoning: Any, turns: Any = "all", loss_on: Any = "completion") -> ChatTemplate:
    return family_template(name, reasoning, loss_on=loss_on, turns=turns)


def spans(example: Example) -> list[tuple[int, int]]:
    """Where the supervised tokens of an example stand."""
    edges = np.flatnonzero(np.diff(np.r_[False, example.supervised, False].astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def check_spans(made: ChatTemplate, triple: Triple, spoken: list[str]) -> list[Example]:
    """Check each reply and its prompt against what a student reads and writes at that turn."""
    examples = made.encode_all(triple)
    found = [(example, span) for example in examples for span in spans(example)]
    context = [*triple.context, {"role": "assistant"}]
    turns = [i for i, message in enumerate(context) if message["role"] == "assistant"]
    assert len(found) == len(turns) == len(spoken)
    for (example, (start, end)), turn, words in zip(found, turns, spoken, strict=True):
        prompt = made.prompt_of(dataclasses.replace(triple, context=tuple(context[:turn])))
        assert example.tokens[:start].tolist() == prompt.tolist()
        reply = example.tokens[start:end].tolist()
        assert [i for i in reply if i in made.stop_ids] == reply[-1:], "it ends where generation stops"
        assert words in made.tokenizer.decode(reply)
    assert all(example.prompt_length == spans(example)[-1][0] for example in examples)
    assert examples[-1].tokens.tolist() == made.encode(triple).tokens.tolist()
    return examples


@pytest.mark.parametrize("reasoning", REASONING)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_is_what_a_student_reads_and_writes(name: str, reasoning: Any) -> None:
    made = template(name, reasoning)
    examples = check_spans(made, CHAT, SPOKEN)
    assert (len(examples) == 1) == FAMILIES[name].one_sequence[reasoning == "think"]


@pytest.mark.parametrize("reasoning", REASONING)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_turn_alone(name: str, reasoning: Any) -> None:
    """It is the last of all turns; the others are context."""
    made = template(name, reasoning, "last")
    (example,) = made.encode_all(CHAT)
    ((start, end),) = spans(example)
    assert end == len(example.tokens) and example.tokens[:start].tolist() == made.prompt_of(CHAT).tolist()
    assert made.split_reply(example.tokens[start:]) == ("3+3=6", "6")
    assert example.tokens.tolist() == template(name, reasoning).encode(CHAT).tokens.tolist()
    (whole,) = template(name, reasoning, "last", "sequence").encode_all(CHAT)
    assert whole.supervised.tolist() == [False] + [True] * (len(whole.tokens) - 1)


@pytest.mark.parametrize("reasoning", REASONING)
@pytest.mark.parametrize("name", TOOL_FAMILIES)
@pytest.mark.parametrize("arguments", [{"a": 5, "b": 7}, '{"a": 5, "b": 7}'])
def test_tools_are_context_and_calls_are_replies(name: str, reasoning: Any, arguments: Any) -> None:
    """The arguments of a call may be an object, or text as servers send it."""
    call = {**CALL, "function": {"name": "add", "arguments": arguments}}
    asked, _, answered = WITH_TOOLS.context
    context = (asked, {"role": "assistant", "content": None, "tool_calls": [call]}, answered)
    made = template(name, reasoning)
    examples = check_spans(made, dataclasses.replace(WITH_TOOLS, context=context), ["add", "The sum is 12."])
    said = [made.tokenizer.decode(e.tokens[start:end]) for e in examples for start, end in spans(e)]
    assert '"a": 5' in said[0] and "sum" not in said[0]
    assert '\\"a\\"' not in said[0], "the arguments are an object once"
    silent = "".join(made.tokenizer.decode(e.tokens[~e.supervised]) for e in examples)
    assert "sum" in silent and "The sum is 12." not in silent


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TOOL_FAMILIES])
@pytest.mark.parametrize("turns", ["last", "all"])
def test_templates_without_tools(name: str, turns: Any) -> None:
    """They refuse the row, or would drop a part of it in silence."""
    reasons = (
        r"cannot render messages of user, assistant",
        r"drops or changes a message of the (tool: 'the \"sum\": 12'|assistant: (None|''), with a call of add)\.",
        r"drops or changes a reply of the assistant, or it is empty: (None|''), with a call of add becomes '",
        r"does not end the assistant's turn",
    )
    with pytest.raises(DataError, match=rf"f:2: .*({'|'.join(reasons)})"):
        template(name, "plain", turns).encode_all(WITH_TOOLS)


def test_all_in_one_sequence_by_hand() -> None:
    made = template("chatml", "plain")
    (example,) = made.encode_all(CHAT)
    text = "".join(
        made.tokenizer.decode(example.tokens[start:end]).join("[]")
        if supervised
        else made.tokenizer.decode(example.tokens[start:end])
        for start, end, supervised in runs(example)
    )
    assert text == (
        "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n[It is 2.<|im_end|>]\n"
        "<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n[It is 4.<|im_end|>]\n"
        "<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n[3+3=6\n\n#### 6<|im_end|>]"
    )


def runs(example: Example) -> list[tuple[int, int, bool]]:
    """The runs of supervised and other tokens, in order."""
    edges = [0, *(np.flatnonzero(np.diff(example.supervised.astype(int))) + 1).tolist(), len(example.tokens)]
    return [(a, b, bool(example.supervised[a])) for a, b in itertools.pairwise(edges)]


THOUGHTFUL = dataclasses.replace(
    CHAT,
    context=(
        FIRST[0],
        {"role": "assistant", "content": "It is 2.", "reasoning_content": "one and one"},
        FIRST[2],
        {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\nIt is 4."},
        CHAT.context[-1],
    ),
)


@pytest.mark.parametrize("name", ["qwen3", "r1", "r1 bare", "r1 no break", "v3.1"])
def test_thoughts_that_the_history_drops(name: str) -> None:
    """Each turn has its own sequence: it writes its thought, and reads earlier turns without theirs."""
    made = template(name, "think")
    examples = check_spans(made, THOUGHTFUL, SPOKEN)
    assert len(examples) == 3
    written = [made.tokenizer.decode(e.tokens[e.supervised]) for e in examples]
    read = [made.tokenizer.decode(e.tokens[~e.supervised]) for e in examples]
    for thought, reply in zip(("one and one", "two and two", "3+3=6"), written, strict=True):
        assert f"{thought}\n</think>\n\n" in reply and not any(thought in text for text in read)
    with pytest.raises(DataError, match=r"f:1: a reply .* has a thought, which the chat template leaves out.*think"):
        template(name, "plain").encode_all(dataclasses.replace(THOUGHTFUL, context=THOUGHTFUL.context[:3]))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("reply", ["It is 6.", "<think>\n3+3=6\n</think>\n\nIt is 6.", "3+3=6\n</think>\n\nIt is 6."])
def test_whole_replies(name: str, reply: str) -> None:
    """They are trained as they are, with a thought wherever the family has room for one."""
    row = dataclasses.replace(CHAT, rationale="", answer=reply, verbatim=True)
    made = template(name, "think", "last")
    example = made.encode(row)
    said = made.tokenizer.decode(example.tokens[example.supervised])
    assert "It is 6." in said and ("3+3=6" in said) == ("3+3=6" in reply)
    alone = made.encode(dataclasses.replace(row, context=()))
    assert made.tokenizer.decode(alone.tokens[alone.supervised]) == said
    with pytest.raises(DataError, match="f:1: the answer holds the control token '<eos>'"):
        made.encode(dataclasses.replace(row, answer="a<eos>b"))


def test_texts_of_the_context_that_hold_control_tokens() -> None:
    made = template("hermes", "plain")
    bad = {
        "context": dataclasses.replace(CHAT, context=({"role": "user", "content": "a<|im_end|>"}, *CHAT.context[1:])),
        "tools": dataclasses.replace(WITH_TOOLS, tools=({"function": {"name": "<|im_end|>"}},)),
        "system": dataclasses.replace(CHAT, system="<|im_end|>"),
        "answer": dataclasses.replace(CHAT, answer="6<|im_end|>"),
    }
    for field, row in bad.items():
        with pytest.raises(DataError, match=rf"the {field} holds the control token '<\|im_end\|>'"):
            made.encode_all(row)
        if field != "answer":
            with pytest.raises(DataError, match=rf"the {field} holds the control token '<\|im_end\|>'"):
                made.prompt_of(row)


def test_other_rows_that_are_refused() -> None:
    user, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": ""}
    made = template("gemma", "plain")
    with pytest.raises(DataError, match=r"f:1: The chat template cannot render messages of user, user.*must alternate"):
        made.encode_all(dataclasses.replace(CHAT, context=(user, user)))
    with pytest.raises(
        DataError, match="f:1: the chat template drops or changes a reply of the assistant, or it is empty"
    ):
        made.encode_all(dataclasses.replace(CHAT, context=(user, reply, user)))
    assert template("gemma", "plain", "last").encode_all(dataclasses.replace(CHAT, context=(user, reply, user)))
    with pytest.raises(DataError, match="f:1: the chat template drops or changes a message of the user: 'a  b'"):
        squeezing = FAMILIES["chatml"].template.replace(
            "m.content", "(m.content.split(' ') | reject('equalto', '') | join(' '))"
        )
        ChatTemplate(made_tokenizer(squeezing)).encode_all(
            dataclasses.replace(CHAT, context=({"role": "user", "content": "a  b"}, FIRST[1], user))
        )


def test_a_system_message_that_the_template_does_not_take() -> None:
    """It stands before the first message of the user."""
    example = template("gemma", "plain").encode(dataclasses.replace(CHAT, system="Be brief."))
    assert (
        family_tokenizer("gemma")
        .decode(example.tokens)
        .startswith("<bos><start_of_turn>user\nBe brief.\n\nWhat is 1+1?<end_of_turn>")
    )


MOVED = (  # Mistral-Nemo: the system message is in the last message of the user, so only a prompt has it
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST]' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_a_system_message_that_the_template_moves() -> None:
    tokenizer = made_tokenizer(MOVED, "<eos>")
    made = ChatTemplate(tokenizer, loss_on="completion", turns="all")
    (example,) = made.encode_all(dataclasses.replace(CHAT, system="Be brief."))
    text = tokenizer.decode(example.tokens)
    assert text.startswith("<bos>[INST]Be brief.\n\nWhat is 1+1?[/INST]It is 2.<eos>[INST]And")
    single = made.encode(Triple("What is 1+1?", "1+1=2", "2", system="Be brief."))
    assert tokenizer.decode(single.tokens) == "<bos>[INST]Be brief.\n\nWhat is 1+1?[/INST]1+1=2\n\n#### 2<eos>"
    with pytest.raises(DataError, match=r"moves the system message .*\. Leave data.system out"):
        ChatTemplate(tokenizer, system="Be brief.")


OTHER_MARKS = {
    "OpenThoughts": "<|begin_of_thought|>{}<|end_of_thought|>\n\n<|begin_of_solution|>{}<|end_of_solution|>",
    "words": "<thought>\n{}\n</thought>\n{}",
    "triangles": "\u25c1think\u25b7{}\u25c1/think\u25b7{}",
}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "magistral"])
@pytest.mark.parametrize("marks", OTHER_MARKS)
def test_thoughts_in_marks_of_another_model(name: str, marks: str) -> None:
    """They are written as those in the template's own marks are."""
    made, form = template(name, "think"), OTHER_MARKS[marks]
    opening, closing = made.renderer.marks

    def row(form: str) -> Triple:
        first, _, second, _ = FIRST
        said = [{"role": "assistant", "content": form.format(f"thought {i}", f"It is {i}.")} for i in (2, 4)]
        context = (first, said[0], second, said[1], CHAT.context[-1])
        return dataclasses.replace(
            CHAT, context=context, rationale="", answer=form.format("thought 6", "It is 6."), verbatim=True
        )

    found = made.encode_all(row(form))
    written = "".join(made.tokenizer.decode(e.tokens[e.supervised]) for e in found)
    assert all(written.count(f"thought {i}") == 1 and written.count(f"It is {i}.") == 1 for i in (2, 4, 6))
    assert "begin_of" not in written and "\u25c1" not in written
    if name != "gpt-oss":  # its own marks are channels, which no content may hold
        expected = made.encode_all(row(f"{opening}\n{{}}\n{closing}\n\n{{}}"))
        assert [e.tokens.tolist() for e in found] == [e.tokens.tolist() for e in expected]


@pytest.mark.parametrize("name", ["chatml", "r1", "qwen3"])
def test_earlier_replies_that_are_not_supervised(name: str) -> None:
    """A greeting answers nothing, and `weight: 0` is the user's word."""
    context = (
        {"role": "assistant", "content": "Good day."},
        FIRST[0],
        {"role": "assistant", "content": "It is 3.", "weight": 0},
        FIRST[2],
        {"role": "assistant", "content": "It is 4.", "weight": 1},
        CHAT.context[-1],
    )
    made = template(name, "plain")
    examples = made.encode_all(dataclasses.replace(CHAT, context=context))
    written = "".join(made.tokenizer.decode(e.tokens[e.supervised]) for e in examples)
    read = made.tokenizer.decode(examples[-1].tokens)
    for text, is_written in (("Good day.", False), ("It is 3.", False), ("It is 4.", True), ("3+3=6", True)):
        assert (text in written) == is_written and text in read


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]
    row = dataclasses.replace(CHAT, context=({"role": "user", "content": parts}, *CHAT.context[1:]))
    made = template("chatml", "plain")
    assert made.encode(row).tokens.tolist() == made.encode(CHAT).tokens.tolist()


def test_the_plain_format_has_one_turn() -> None:
    made = Template(train_tokenizer([], vocab_size=259))
    for row in (CHAT, dataclasses.replace(CHAT, context=(), tools=(TOOL,))):
        with pytest.raises(
            DataError, match=r"f:1: several turns or tools need a chat template. Set data.format: chat."
        ):
            made.encode(row)
        with pytest.raises(DataError, match="f:1: several turns or tools need a chat template"):
            made.prompt_of(row)
    with pytest.raises(DataError, match=r"f:1: no rationale and answer in the reply"):
        made.encode(Triple("q", "", "a whole reply", source="f:1", verbatim=True))


def test_chats_are_kept_or_dropped_as_a_whole() -> None:
    """In batches, too: all of a chat's sequences fit, or it is counted once."""
    made = template("r1", "think")
    single = Triple("q", "r", "a", source="f:3")
    lengths = [len(example.tokens) - 1 for example in made.encode_all(CHAT)]
    examples, report = make_examples([CHAT, single], made, max(lengths), too_long="drop")
    assert [e.source for e in examples] == ["f:1"] * 3 + ["f:3"] and report.kept == 2
    examples, report = make_examples([CHAT, single], made, max(lengths) - 1, too_long="drop")
    assert [e.source for e in examples] == ["f:3"] and report.dropped == {"too long": 1}


def test_held_out_questions_of_several_turns() -> None:
    made = template("qwen3", "think")
    question = Question("And 3+3?", "6", CHAT, "f:1", context=CHAT.context)
    (kept,), examples, _ = make_held_out([question], made, 500)
    assert kept.prompt is not None and kept.prompt.tolist() == made.prompt_of(CHAT).tolist()
    assert kept.prompt_tokens(made) is kept.prompt and question.prompt_tokens(made).tolist() == kept.prompt.tolist()
    assert examples[-1].tokens[: len(kept.prompt)].tolist() == kept.prompt.tolist()


def test_another_question_in_a_chat() -> None:
    row = with_question(CHAT, "And 9+9?")
    assert row.question == "And 9+9?" == row.context[-1]["content"] and row.context[:-1] == CHAT.context[:-1]
    assert with_question(Triple("q", "r", "a"), "p") == Triple("p", "r", "a")


def test_chats_are_written_and_read_back(tmp_path: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    context = (WITH_TOOLS.context[0], call, WITH_TOOLS.context[2])
    rows = [dataclasses.replace(WITH_TOOLS, system="Be brief.", context=context), Triple("q", "r", "1")]
    write_triples(tmp_path / "rows.jsonl", rows)
    assert "messages" in json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8").split("\n")[0])
    read, _ = read_triples(tmp_path / "rows.jsonl")
    assert [dataclasses.replace(row, source="", id=None) for row in read] == [
        dataclasses.replace(row, source="") for row in rows
    ]


words = st.text(st.sampled_from("ab \n#<>/|.é答1"), min_size=1, max_size=12).map(str.strip).filter(bool)


@given(
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(REASONING),
    st.lists(st.tuples(words, words), min_size=1, max_size=3),
    words,
    words,
)
@settings(deadline=None, max_examples=150)
def test_any_chat(name: str, reasoning: Any, earlier: list[tuple[str, str]], rationale: str, answer: str) -> None:
    """It is refused, or every reply is what a student reads and writes."""
    context = [
        {"role": role, "content": text}
        for pair in earlier
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    row = Triple("q?", rationale, answer, source="f:1", context=(*context, {"role": "user", "content": "q?"}))
    made = template(name, reasoning)
    try:
        made.encode_all(row)
    except DataError as error:
        assert str(error).startswith("f:1: ")
        return
    check_spans(made, row, [*(reply for _, reply in earlier), answer])
