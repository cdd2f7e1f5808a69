"""Chat templates in the style of each family: tokens, masks and stop tokens by hand, and every way to spoil them.

The templates are minimal ones with the behaviour that counts; `test_a_real_tokenizer` uses a real one.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers as norms
from tokenizers import pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cotgrpo.cli import main
from cotgrpo.config import Config, ConfigError, DataConfig, parse_config
from cotgrpo.data import chat_renderer
from cotgrpo.data.batches import make_examples
from cotgrpo.data.chat import DAY, ChatTemplate, generation_stop_ids
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import load_tokenizer, train_tokenizer
from cotgrpo.data.triples import DataError, Triple
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training.inputs import template_of

TRIPLE = Triple("What is 12+30?", "2+0=2\n1+3=4", "42", source="f:1")
PLAIN, THOUGHT = "2+0=2\n1+3=4\n\n#### 42", "<think>\n2+0=2\n1+3=4\n</think>\n\n42"
CONTROLS = ("<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<turn>", "</turn>")
BYTES = train_tokenizer(["What is 12+30? user assistant\n"] * 3, vocab_size=320, special_tokens=CONTROLS)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
HEADERS = (  # Llama 3: BOS in the template, contents trimmed, a date in the system turn
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}"
    "{% set ns.system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% endif %}<turn>system\n\nToday: {{ date_string }}\n\n{{ ns.system }}</turn>"
    "{% for m in messages %}{{ '<turn>' + m.role + '\n\n' + m.content | trim + '</turn>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n\n' }}{% endif %}"
)
MODEL_ROLE = (  # Gemma: no system role, the assistant is called model
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '</turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
INST = (  # Mistral: no header before the reply, a blank before it, eos behind it
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # Qwen3: thoughts of earlier turns are dropped, an empty one is written where there is to be none
    "{% for m in messages %}{% set thought = '' %}{% set said = m.content %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + thought.strip() + '\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)


def tokenizer(template: str | None, eos: str = "<|im_end|>", *, bos: bool = False, pad: str = "<pad>") -> Any:
    """A tokenizer of bytes with control tokens and two tags; with `bos`, one that prepends <bos>, as Llama's does."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=BYTES.backend_tokenizer, eos_token=eos, pad_token=pad, clean_up_tokenization_spaces=False
    )
    copy.add_tokens(["<think>", "</think>"])
    if bos:
        copy.bos_token = "<bos>"
        copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<bos> $A", special_tokens=[("<bos>", copy.bos_token_id)]
        )
    copy.chat_template = template
    return copy


def shown(template: ChatTemplate, triple: Triple = TRIPLE) -> tuple[str, str]:
    """(what is not supervised, what is) as text, after checking that the prompt of generation is the former."""
    encoded = template.encode(triple)
    assert encoded.tokens.dtype == np.int32 and encoded.supervised.dtype == bool and encoded.source == triple.source
    first = int(np.argmax(encoded.supervised))
    assert encoded.supervised[first:].all() and not encoded.supervised[:first].any()
    assert encoded.tokens[:first].tolist() == template.prompt(triple.question, triple.system).tolist()
    assert template.split_reply(encoded.tokens[first:]) == (triple.rationale, triple.answer)
    before, reply = (template.tokenizer.decode(part) for part in (encoded.tokens[:first], encoded.tokens[first:]))
    return before, reply


def chat(template: str, reasoning: Any = "plain", eos: str = "<|im_end|>", **more: Any) -> ChatTemplate:
    made = tokenizer(template, eos, bos="bos_token" in template, pad=more.pop("pad", "<pad>"))
    return ChatTemplate(made, reasoning, loss_on="completion", **more)


FAMILIES = {
    "chatml": (
        CHATML,
        "<|im_end|>",
        "<|im_start|>user\nWhat is 12+30?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "default system": (
        WITH_DEFAULT_SYSTEM,
        "<|im_end|>",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is 12+30?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "headers": (
        HEADERS,
        "<eos>",
        "<bos><turn>system\n\nToday: 26 Jul 2024\n\n</turn><turn>user\n\nWhat is 12+30?</turn><turn>assistant\n\n",
        "</turn>",
    ),
    "model role": (MODEL_ROLE, "<eos>", "<bos><turn>user\nWhat is 12+30?</turn>\n<turn>model\n", "</turn>"),
    "inst": (INST, "<eos>", "<bos>[INST] What is 12+30? [/INST]", "<eos>"),
}


@pytest.mark.parametrize(("template", "eos", "prompt", "end"), FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(("reasoning", "reply"), [("plain", PLAIN), ("think", THOUGHT)])
def test_families(template: str, eos: str, prompt: str, end: str, reasoning: Any, reply: str) -> None:
    blank = " " if template is INST else ""
    assert shown(chat(template, reasoning, eos)) == (prompt, blank + reply + blank + end)


def test_every_token_but_the_first_is_supervised_in_a_sequence() -> None:
    encoded = ChatTemplate(tokenizer(CHATML), loss_on="sequence").encode(TRIPLE)
    assert encoded.supervised.tolist() == [False] + [True] * (len(encoded.tokens) - 1)
    assert encoded.tokens.tolist() == chat(CHATML).encode(TRIPLE).tokens.tolist()


def test_tokens_are_those_of_transformers() -> None:
    """What `apply_chat_template` with its own tokenization gives, up to the end of the turn."""
    for template, eos, _, end in FAMILIES.values():
        made = chat(template, eos=eos)
        messages = [{"role": "user", "content": TRIPLE.question}, {"role": "assistant", "content": PLAIN}]
        fixed = {"date_string": "26 Jul 2024", "return_dict": False}
        whole = made.tokenizer.apply_chat_template(messages, **fixed)
        prompt = made.tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, **fixed)
        last = len(whole) - whole[::-1].index(made.tokenizer.convert_tokens_to_ids(end))
        assert made.encode(TRIPLE).tokens.tolist() == whole[:last]
        assert made.prompt(TRIPLE.question).tolist() == prompt


def test_thoughts_as_a_field_or_inline() -> None:
    assert chat(THINKING, "think").reads_field and not chat(CHATML, "think").reads_field
    before = "<|im_start|>user\nWhat is 12+30?<|im_end|>\n<|im_start|>assistant\n"
    assert shown(chat(THINKING, "think")) == (before, THOUGHT + "<|im_end|>")
    only_inline = THINKING.replace("m.reasoning_content is string", "false")
    assert shown(chat(only_inline, "think")) == (before, THOUGHT + "<|im_end|>")
    only_field = THINKING.replace("{% set thought = said.split('</think>')[0].split('<think>')[-1] %}", "")
    assert shown(chat(only_field, "think")) == (before, THOUGHT + "<|im_end|>")


def test_an_empty_thought_stays_in_the_prompt() -> None:
    """Qwen3 writes it into prompt and whole; older templates write it into the prompt alone."""
    before = "<|im_start|>user\nWhat is 12+30?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert shown(chat(THINKING)) == (before, PLAIN + "<|im_end|>")
    in_prompts_alone = THINKING.replace("m.role == 'assistant' and loop.last", "thought")
    made = chat(in_prompts_alone)
    whole = made.tokenizer.apply_chat_template(made.messages(TRIPLE, as_field=False), tokenize=False)
    assert "<think>" not in whole
    assert shown(made) == (before, PLAIN + "<|im_end|>")


def test_prompts_that_open_a_thought() -> None:
    opening = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    before, reply = shown(chat(opening, "think"))
    assert before.endswith("assistant\n<think>\n") and reply == THOUGHT.removeprefix("<think>\n") + "<|im_end|>"
    before, reply = shown(chat(opening))
    assert before.endswith("assistant\n<think>\n\n</think>\n\n") and reply == PLAIN + "<|im_end|>"
    closing = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n\n</think>\n\n'")
    with pytest.raises(DataError, match=r"prompt is not a prefix of the whole.*Try data.reasoning: plain"):
        chat(closing, "think")


def test_prompts_that_are_another_chat() -> None:
    other = "{% if add_generation_prompt %}Hello. {% endif %}" + CHATML
    with pytest.raises(
        DataError, match=r"the prompt is not a prefix of the whole.*after '' the prompt continues with 'Hello"
    ):
        chat(other)


def test_templates_that_drop_thoughts() -> None:
    """DeepSeek-R1's, say: what stands before </think> is cut, and no field is read."""
    dropping = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    untagged = (
        "{% for m in messages %}{{ (m.reasoning_content or '') + m.content.split('</think>')[-1] }}"
        "<|im_end|>{% endfor %}"
    )
    for template in (dropping, untagged):
        assert shown(chat(template, "think"))[1] == THOUGHT + "<|im_end|>"
        assert shown(chat(template))[1] == PLAIN + "<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m.content", "(m.content if m.role == 'user' else '')"),
        CHATML.replace("m.content", "m.content.upper()"),
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
    ],
)
def test_an_all_zero_mask_is_an_error(template: str) -> None:
    with pytest.raises(DataError, match="drops or changes the assistant's turn, so nothing would be supervised"):
        chat(template)


def test_generation_tags_are_not_needed_and_not_asked() -> None:
    tagged = CHATML.replace("{{ '<|im_start|>' + m.role", "{% generation %}{{ '<|im_start|>' + m.role").replace(
        "{% endfor %}", "{% endgeneration %}{% endfor %}"
    )
    assert chat(tagged).encode(TRIPLE).supervised.tolist() == chat(CHATML).encode(TRIPLE).supervised.tolist()


def test_bos_is_never_doubled() -> None:
    for template in (HEADERS, MODEL_ROLE, INST):
        made = chat(template, eos="<eos>")
        bos = made.tokenizer.bos_token_id
        assert made.tokenizer.encode("<bos>a")[:2] == [bos, bos], "this tokenizer would double it"
        assert made.encode(TRIPLE).tokens.tolist().count(bos) == 1 and made.prompt("a").tolist().count(bos) == 1
    # A template that writes none has none, as in `apply_chat_template`.
    assert ChatTemplate(tokenizer(CHATML, bos=True)).prompt("a")[0] == CONTROLS.index("<|im_start|>")
    with pytest.raises(DataError, match="writes the BOS token '<bos>' twice"):
        chat("{{ bos_token }}" + HEADERS, eos="<eos>")


def test_no_template() -> None:
    with pytest.raises(DataError, match=r"has no chat template: .*chat_template.jinja next to.*data.format: plain"):
        ChatTemplate(BYTES)
    several = tokenizer(None)
    several.chat_template = {"default": CHATML, "tool_use": "{{ raise_exception('no') }}"}
    assert ChatTemplate(several).encode(TRIPLE).tokens.tolist() == chat(CHATML).encode(TRIPLE).tokens.tolist()
    several.chat_template = {"rag": CHATML}
    with pytest.raises(DataError, match="multiple chat templates"):
        ChatTemplate(several)


def test_broken_templates() -> None:
    for broken in ("{% for m in %}", "{{ messages[7].content }}", "{{ messages[0].content + 1 }}", "{{ no_such() }}"):
        with pytest.raises(DataError, match=r"The chat template cannot render messages of user"):
            chat(broken)


@pytest.mark.parametrize("eos", ["<eos>", "<|im_end|>"])
def test_stop_tokens(eos: str) -> None:
    """Qwen's base models have eos <|endoftext|>, and turns that end in <|im_end|>."""
    made = chat(CHATML, eos=eos, more_stop_ids=(7, 4))
    end = CONTROLS.index("<|im_end|>")
    assert made.eos_id == end == made.encode(TRIPLE).tokens[-1]
    assert made.stop_ids == tuple(dict.fromkeys([end, CONTROLS.index(eos), 7, 4]))
    reply = made.tokenizer.encode(PLAIN + eos + "and so on<|im_end|>")
    assert made.decode(reply) == PLAIN and made.split_reply(reply) == (TRIPLE.rationale, "42")


def test_turns_that_never_end() -> None:
    for template in (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    ):
        with pytest.raises(
            DataError, match=r"ends an assistant's turn with .* a reply could never end. Write the eos token"
        ):
            chat(template)
    next_turn = CHATML.replace("<|im_end|>", "")
    with pytest.raises(DataError, match=r"ends an assistant's turn with .*expected a special token"):
        chat(next_turn)  # the next turn's first token ends a reply only if generation stops there
    assert shown(chat(next_turn, eos="<|im_start|>"))[1] == PLAIN + "<|im_start|>"
    with pytest.raises(DataError, match=r"with '<\|nobody_knows\|>.n': expected a special token"):
        chat(CHATML.replace("<|im_end|>", "<|nobody_knows|>"))
    with pytest.raises(DataError, match=r"with ' Over.<\|im_end\|>.n': expected a special token"):
        chat(CHATML.replace("<|im_end|>", " Over.<|im_end|>"))


def test_an_end_of_turn_that_is_no_special_token() -> None:
    """It ends a turn all the same, so no text may hold it."""
    made = tokenizer(CHATML.replace("<|im_end|>", "<|over|>"), eos="<eos>")
    made.add_tokens(["<|over|>"])
    template = ChatTemplate(made, loss_on="completion")
    assert template.eos_id == len(made) - 1 and shown(template)[1] == PLAIN + "<|over|>"
    with pytest.raises(DataError, match=r"f:3: the rationale holds the control token '<\|over\|>'"):
        template.encode(Triple("q", "r<|over|>s", "a", source="f:3"))


def test_a_stop_token_inside_the_reply() -> None:
    with pytest.raises(DataError, match="'</think>' stands inside the reply, where generation would stop"):
        chat(CHATML, "think", more_stop_ids=(tokenizer(CHATML).convert_tokens_to_ids("</think>"),))


def test_what_stands_behind_the_end_of_turn_is_left_out() -> None:
    made = chat(CHATML)
    whole = made.tokenizer.apply_chat_template(made.messages(TRIPLE, as_field=False), tokenize=False)
    assert whole.endswith("<|im_end|>\n") and made.encode(TRIPLE).tokens[-1] == made.eos_id


def test_pad_may_be_eos() -> None:
    made = chat(CHATML, pad="<|im_end|>")
    assert made.pad_id == made.eos_id and shown(made) == shown(chat(CHATML))
    assert chat(CHATML).pad_id == 0
    without = tokenizer(CHATML)
    without.pad_token = None
    assert ChatTemplate(without).pad_id == made.eos_id


def test_system_messages() -> None:
    assert shown(chat(CHATML, system="Be brief."))[0].startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
    )
    assert "Be kind" not in shown(chat(WITH_DEFAULT_SYSTEM, system="Be brief."))[0]
    assert "\n\nBe brief.</turn>" in shown(chat(HEADERS, eos="<eos>", system=" Be brief. "))[0]
    with pytest.raises(
        DataError,
        match=r"messages of system, user \(TemplateError: System role not supported\). Leave data.system out",
    ):
        chat(MODEL_ROLE, eos="<eos>", system="Be brief.")
    with pytest.raises(DataError, match=r"drops the system message. Leave data.system out"):
        chat(INST, eos="<eos>", system="Be brief.")


def test_a_system_message_that_the_template_does_not_take() -> None:
    """A row's own is part of its question then, whether the template refuses the role or drops it."""
    before, reply = shown(chat(MODEL_ROLE, "think", "<eos>"), SYSTEM_ROW)
    assert before == "<bos><turn>user\nBe brief.\n\nq</turn>\n<turn>model\n"
    assert reply == "<think>\nr\n</think>\n\n1</turn>"
    assert shown(chat(INST, eos="<eos>"), SYSTEM_ROW)[0] == "<bos>[INST] Be brief.\n\nq [/INST]"


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y"])
def test_the_date_is_always_the_same(form: str) -> None:
    """A run resumed tomorrow reads the same tokens. Llama's templates take the date, others ask the clock."""
    asking = "\n" + f"  {{% if true %}}{{{{ strftime_now('{form}') }}}}{{% endif %}}" + CHATML
    assert shown(chat(asking))[0].startswith("\n" + DAY.strftime(form) + "<|im_start|>user"), (
        "Jinja's white space must not change"
    )
    computed = "{% set form = '%H:' + '%M' %}{{ strftime_now(form) }}" + CHATML
    assert shown(chat(computed))[0].startswith("2024-07-26<|im_start|>")
    assert str(datetime.date.today().year) not in shown(chat(HEADERS, eos="<eos>"))[0]


@pytest.mark.parametrize("field", ["question", "rationale", "answer"])
@pytest.mark.parametrize("reasoning", ["plain", "think"])
def test_texts_that_hold_control_tokens(field: str, reasoning: Any) -> None:
    texts = {"question": "q", "rationale": "r", "answer": "a"}
    for token in ("<|im_end|>", "<|im_start|>", "<pad>", "<eos>"):
        with pytest.raises(DataError, match=f"f:3: the {field} holds the control token {token!r}".replace("|", r"\|")):
            chat(CHATML, reasoning, eos="<eos>").encode(Triple(**texts | {field: f"x{token}y"}, source="f:3"))


def test_texts_and_a_template_that_together_spell_a_control_token() -> None:
    with pytest.raises(DataError, match="f:3: the text and the chat template together spell a control token"):
        chat(CHATML.replace("m.content", "('<' if m.role == 'user' else '') + m.content")).encode(
            Triple("pad>", "r", "a", source="f:3")
        )


def test_texts_that_hold_the_mark_of_the_answer() -> None:
    plain, think = chat(CHATML), chat(CHATML, "think")
    assert shown(plain, Triple("q", "r\n\n#### 3. So", "a"))[1] == "r\n\n#### 3. So\n\n#### a<|im_end|>"
    for marked in (Triple("q", "r\n#### 3\ns", "4", source="f:3"), Triple("q", "r", "3\ns", source="f:3")):
        with pytest.raises(DataError, match=r"f:3: rationale and answer cannot be told apart.*must be one line"):
            plain.encode(marked)
    with pytest.raises(
        DataError, match=r"f:3: rationale and answer cannot be told apart.*the mark of the answer \('####'\)"
    ):
        plain.encode(Triple("q", "r", "a\n\n#### b", source="f:3"))
    for rationale in ("a</think>b", "<think>"):
        assert rationale == "<think>" or not shown(plain, Triple("q", rationale, "a"))[1].startswith("<think>")
    with pytest.raises(DataError, match=r"f:3: rationale and answer cannot be told apart.*\('</think>'\)"):
        think.encode(Triple("q", "a</think>b", "c", source="f:3"))
    with pytest.raises(DataError, match="f:3: rationale and answer cannot be told apart"):
        plain.encode(Triple("q", "", "c", source="f:3"))
    assert shown(think, Triple("q", "r", "a</think>b"))[1].endswith("a</think>b<|im_end|>")


def test_templates_that_change_white_space() -> None:
    """Space around a text may go; inside it none may."""
    spaced = Triple(" q\n", "\n r  s ", "\ta ", source="f:3")
    encoded = chat(MODEL_ROLE, eos="<eos>").encode(spaced)
    assert BYTES.decode(encoded.tokens) == "<bos><turn>user\nq</turn>\n<turn>model\nr  s\n\n#### a</turn>"
    squeezing = CHATML.replace("m.content", "(m.content.split(' ') | reject('equalto', '') | join(' '))")
    assert shown(chat(squeezing))[1] == PLAIN + "<|im_end|>"
    with pytest.raises(
        DataError,
        match="f:3: rationale and answer cannot be told apart in the assistant's turn, or the chat template changes",
    ):
        chat(squeezing).encode(spaced)
    with pytest.raises(DataError, match=r"f:3: the chat template drops or changes the question: .*a b"):
        chat(squeezing).encode(Triple("a  b", "r", "c", source="f:3"))


def spaced_tokenizer(*, add_prefix_space: bool) -> Any:
    """One whose words begin with their blank, with a template whose generation prompt ends in one."""
    made = train_tokenizer(["say: so say: probe say: so"] * 9, vocab_size=320, special_tokens=CONTROLS)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.chat_template = (
        "{% for m in messages %}{{ 'say: ' + m.content + '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'say: ' }}{% endif %}"
    )
    return made


def test_a_prompt_that_merges_with_the_reply() -> None:
    """`: so` is `:` and ` so` as one text. The student reads the prompt's own `: `, and writes on from there."""
    made = ChatTemplate(spaced_tokenizer(add_prefix_space=False), loss_on="completion")
    triple = Triple("q", "so", "4")
    before, reply = made.texts(triple)
    prompt = made.ids(before)
    assert made.ids(before + reply)[: len(prompt)] != prompt, "the trap is not there"
    assert shown(made, triple) == ("say: q<eos>say: ", "so\n\n#### 4<eos>")


def test_a_prompt_that_cannot_be_kept_apart() -> None:
    """A tokenizer that prepends a blank to every text, as SentencePiece's do, spells the reply alone differently."""
    with pytest.raises(
        DataError, match=r"merges the end of the prompt with the reply, and cannot write the reply apart"
    ):
        ChatTemplate(spaced_tokenizer(add_prefix_space=True))


def test_a_tokenizer_that_normalizes() -> None:
    """Qwen's makes one letter of e and its accent. What is learned is that letter; the row is good."""
    made = tokenizer(CHATML)
    made.backend_tokenizer.normalizer = norms.NFC()
    encoded = ChatTemplate(made, loss_on="completion").encode(Triple("q", "cafe\u0301", "1"))
    assert made.decode(encoded.tokens[encoded.supervised]) == "caf\u00e9\n\n#### 1<|im_end|>"


@pytest.mark.parametrize(
    ("reasoning", "answer_format", "reply"),
    [
        ("plain", r"\boxed{{answer}}", "2+0=2\n1+3=4\n\n\\boxed{42}"),
        ("plain", "The answer is {answer}.", "2+0=2\n1+3=4\n\nThe answer is 42."),
        ("plain", "{answer}", "2+0=2\n1+3=4\n\n42"),
        ("think", r"\boxed{{answer}}", "<think>\n2+0=2\n1+3=4\n</think>\n\n\\boxed{42}"),
        ("think", "#### {answer}", "<think>\n2+0=2\n1+3=4\n</think>\n\n#### 42"),
    ],
)
def test_answer_formats(reasoning: Any, answer_format: str, reply: str) -> None:
    for template in (CHATML, THINKING):
        assert shown(chat(template, reasoning, answer_format=answer_format))[1] == reply + "<|im_end|>"
    made = chat(CHATML, reasoning, answer_format=answer_format)
    assert shown(made, Triple("q", "r", "{1}."))[1].count("{1}.") == 1
    assert shown(made, Triple("q", "{answer}", "{answer}"))[1].count("{answer}") == 2


SYSTEM_ROW = Triple("q", "r", "1", source="f:3", system="Be brief.")


@pytest.mark.parametrize(
    ("template", "before", "without"),
    [
        (CHATML, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n", "<|im_start|>user\n"),
        (WITH_DEFAULT_SYSTEM, "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>system\nBe kind.<|im_end|>\n"),
        (
            HEADERS,
            "<bos><turn>system\n\nToday: 26 Jul 2024\n\nBe brief.</turn>",
            "<bos><turn>system\n\nToday: 26 Jul 2024\n\n</turn>",
        ),
        (THINKING, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n", "<|im_start|>user\n"),
    ],
)
def test_a_system_message_of_the_row(template: str, before: str, without: str) -> None:
    """It wins over data.system, which other rows keep."""
    eos = "<eos>" if "<turn>" in template else "<|im_end|>"
    row_without = dataclasses.replace(SYSTEM_ROW, system="")
    for made in (chat(template, eos=eos), chat(template, eos=eos, system="Be loud.")):
        assert shown(made, SYSTEM_ROW)[0].startswith(before)
        expected = before.replace("brief", "loud") if made.system else without
        assert shown(made, row_without)[0].startswith(expected)


def test_system_messages_that_cannot_be() -> None:
    with pytest.raises(DataError, match="f:3: the system holds the control token"):
        chat(CHATML).encode(dataclasses.replace(SYSTEM_ROW, system="x<|im_end|>"))
    squeezing = CHATML.replace("m.content", "(m.content.split(' ') | reject('equalto', '') | join(' '))")
    with pytest.raises(DataError, match="f:3: the chat template drops or changes the system: "):
        chat(squeezing).encode(dataclasses.replace(SYSTEM_ROW, system="Be  brief."))


@pytest.mark.parametrize(
    ("answer_format", "text", "expected"),
    [
        ("", "steps\n#### 12\n\nQuestion: next 99 apples", ("steps", "12")),
        ("", "steps\n\n#### 12\n\nQuestion: next\n\nmore\n\n#### 99", ("steps", "12")),
        ("", "steps\n#### 12 apples \r\n\nQuestion: next\n\n#### 99", ("steps", "12 apples")),
        ("", "#### Step 1\n\n#### 2. Add\n\n#### 12", ("#### Step 1\n\n#### 2. Add", "12")),
        ("", "#### Step one\n\nadd\n\n#### Paris", ("#### Step one\n\nadd", "Paris")),
        ("", "r\n\n#### two\nlines", ("r", "two\nlines")),
        (r"\boxed{{answer}}", "r\n\n\\boxed{12}\n\nQuestion: next 99\n\n\\boxed{7}", ("r", "12")),
        ("The answer is {answer}.", "r\nThe answer is 12.\n\nQuestion: next 99", ("r", "12")),
        ("{answer}", "9 is it\n\n42", ("9 is it", "42")),
    ],
)
def test_what_follows_the_answer_does_not_change_it(answer_format: str, text: str, expected: tuple[str, str]) -> None:
    assert chat(CHATML, answer_format=answer_format).split_reply(text) == expected


def test_replies_are_taken_apart() -> None:
    plain, think = chat(CHATML), chat(CHATML, "think", answer_format=r"\boxed{{answer}}")
    assert plain.split_reply(" 1+2=3\n\n#### 3\n") == ("1+2=3", "3")
    assert plain.split_reply("1+2=3 #### 3") == ("1+2=3 #### 3", "3")
    assert plain.split_reply("It is 3, or \\boxed{4} of 5.") == ("It is 3, or \\boxed{4} of 5.", "4")
    assert plain.split_reply("Is it?") == ("Is it?", None)
    ids = plain.tokenizer.encode("1 is 2 is 3<|im_end|>")
    assert plain.split_reply(ids)[1] == "3"
    assert plain.split_reply(ids[:-1])[1] is None, "what was cut off has not answered"
    cut_off = {"1\n\n#### 3": None, "1\n\n#### 3\n": "3", "1\n\n#### 3\n\nQuestion: 9": "3", "1\n\n#### Par": None}
    assert {text: plain.split_reply(plain.tokenizer.encode(text))[1] for text in cut_off} == cut_off
    assert plain.split_reply([]) == ("", None)
    assert think.split_reply("<think>\nr\n</think>\n\n\\boxed{3}") == ("r", "3")
    assert think.split_reply("r</think>So it is 3.") == ("r", "So it is 3.")
    assert think.split_reply("<think>1+2=3") == ("1+2=3", None)
    assert think.split_reply("<think></think>}") == ("", "}")
    starred = chat(CHATML, "think", answer_format="*{answer}*")
    assert starred.split_reply("r</think>**") == ("r", "") and starred.split_reply("r</think>*") == ("r", "*")
    assert think.split_reply(np.asarray(think.tokenizer.encode("a</think>b<|im_end|>c"))) == ("a", "b")


def test_settings_outside_their_range() -> None:
    for settings_, message in (
        ({"reasoning": "loud"}, 'reasoning must be "plain" or "think", got \'loud\''),
        ({"loss_on": "all"}, 'loss_on must be "sequence" or "completion"'),
        ({"answer_format": "42"}, "answer_format must hold {answer} once, got '42'"),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            ChatTemplate(tokenizer(CHATML), **settings_)
        assert message in str(caught.value)


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
tricky = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "#### ",
            "\n",
            "\n\n",
            " ",
            "<|im_end|>",
            "<bos>",
            "{",
            "}",
            "\\boxed{",
            "42",
            "é",
            "</turn>",
        ]
    ),
    max_size=6,
).map("".join)
texts = st.one_of(any_text, tricky, st.tuples(any_text, tricky).map("".join))
MADE = [
    chat(template, reasoning, eos)
    for template, eos in (
        (CHATML, "<eos>"),
        (HEADERS, "<eos>"),
        (MODEL_ROLE, "<eos>"),
        (INST, "<eos>"),
        (THINKING, "<|im_end|>"),
    )
    for reasoning in ("plain", "think")
]


@given(texts, texts, texts, st.sampled_from(MADE))
@example("q", "r", "a</think>b", MADE[1])
@example("q", "<think>r", "a", MADE[-1])
@example("<think></think>", "r", "a", MADE[-2])
@settings(deadline=None, max_examples=300)
def test_any_text_is_an_error_or_comes_back(question: str, rationale: str, answer: str, made: ChatTemplate) -> None:
    try:
        encoded = made.encode(Triple(question, rationale, answer, source="f:1"))
    except DataError as error:
        assert str(error).startswith("f:1: ")
        return
    prompt = made.prompt(question)
    assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
    assert encoded.supervised.tolist() == [False] * len(prompt) + [True] * (len(encoded.tokens) - len(prompt))
    supervised = encoded.tokens[encoded.supervised]
    said = made.tokenizer.decode(supervised)
    answered = made.reply_format.write_answer(answer)
    between = "\n</think>\n\n" if made.reasoning == "think" else "\n\n"
    opened = "<think>\n" if made.reasoning == "think" else ""
    assert (
        said.removesuffix(made.tokenizer.convert_ids_to_tokens(made.eos_id)).strip()
        == (opened + rationale.strip() + between + answered).strip()
    )
    assert [i for i in supervised if i in made.stop_ids] == [made.eos_id] == [supervised[-1]]
    assert made.split_reply(supervised) == (rationale.strip(), answer.strip())
    assert question.strip() in made.tokenizer.decode(prompt)


@given(tricky, tricky)
@settings(deadline=None)
def test_any_reply_is_taken_apart(text: str, more: str) -> None:
    for made in MADE:
        rationale, answer = made.split_reply(text + more)
        assert rationale.strip() == rationale and (answer is None or isinstance(answer, str))


def test_examples_of_either_template() -> None:
    for template in (chat(CHATML), Template(train_tokenizer([], vocab_size=259))):
        examples, report = make_examples([TRIPLE], template, 200)
        assert report.kept == 1 and examples[0].supervised[-1]


@pytest.mark.parametrize("separator", ["[INST]", "\n###\n", "<think>"])
def test_separators_of_the_plain_format_with_a_pretrained_tokenizer(separator: str) -> None:
    """A token of its own, or a string that it keeps apart; `<sep>` is neither here."""
    pretrained = tokenizer(CHATML)
    template = Template(pretrained, separator, "completion")
    encoded = template.encode(TRIPLE)
    assert pretrained.decode(encoded.tokens[encoded.supervised]) == f"2+0=2\n1+3=4{separator}42<|im_end|>"
    assert template.stop_ids == (template.eos_id,)


def test_generation_configs(tmp_path: Path) -> None:
    assert generation_stop_ids(tmp_path) == ()
    for stops, expected in ((7, (7,)), ([7, 3], (7, 3)), (None, ())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
        assert generation_stop_ids(tmp_path) == expected
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 5]}', encoding="utf-8")
    assert generation_stop_ids(tmp_path) == (2, 5), "a generation config without stop tokens leaves it to config.json"
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    assert generation_stop_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").unlink()
    assert generation_stop_ids(tmp_path) == (2, 5)
    for broken in ("{", "[1]", '{"eos_token_id": "<eos>"}'):
        (tmp_path / "generation_config.json").write_text(broken, encoding="utf-8")
        with pytest.raises(DataError, match=r"generation_config.json cannot be read .* Fix or remove it"):
            generation_stop_ids(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.system", "Be brief."], "data.system does not apply to data.format plain"),
        (["--data.reasoning", "think"], "data.reasoning does not apply to data.format plain"),
        (["--data.format", "chat", "--data.separator", "#"], "data.separator does not apply to data.format chat"),
        (
            ["--data.format", "chat", "--data.answer_format", "42"],
            "data.answer_format must hold {answer} once, got '42'",
        ),
    ],
)
def test_settings_that_would_have_no_effect(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(arguments)


def test_the_template_of_a_config(tmp_path: Path) -> None:
    made = tokenizer(CHATML)
    made.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 1]}', encoding="utf-8")
    arguments = [
        "--data.format",
        "chat",
        "--data.answer_format",
        "#### {answer}",
        "--data.reasoning",
        "think",
        "--data.system",
        "# Rules: few",
    ]
    config = parse_config([*arguments, "--tokenizer.path", str(tmp_path)])
    template = template_of(config, load_tokenizer(tmp_path), "completion")
    assert template.stop_ids == (4, 1)
    encoded = template.encode(TRIPLE)
    assert made.decode(encoded.tokens) == (
        "<|im_start|>system\n# Rules: few<|im_end|>\n"
        "<|im_start|>user\nWhat is 12+30?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n2+0=2\n1+3=4\n</think>\n\n#### 42<|im_end|>"
    )
    assert isinstance(template_of(Config(data=DataConfig(separator="[INST]")), made, "sequence"), Template)


@pytest.mark.slow
def test_the_commands_with_a_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sft` and `eval` of a student from scratch that reads and writes chats."""
    tokenizer(WITH_DEFAULT_SYSTEM, eos="<eos>").save_pretrained(tmp_path / "tokenizer")
    write_triples(tmp_path / "rows.jsonl", ProceduralTeacher(seed=1).draw(40))
    (tmp_path / "c.yaml").write_text(
        f"""
run_dir: {tmp_path / "run"}
student: {{width: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 16, mlp_width: 64}}
data: {{train: {tmp_path / "rows.jsonl"}, seq_len: 512, test_rows: 8, loss_on: completion}}
sft: {{steps: 2, batch_size: 2, optimizer: {{learning_rate: 1.0e-3}}}}
eval: {{rows: 8, batch_size: 8, max_new_tokens: 4}}
""",
        encoding="utf-8",
    )
    options = ["--config", str(tmp_path / "c.yaml"), "--data.format", "chat"]
    plain = train_tokenizer([], vocab_size=260)
    plain.save_pretrained(tmp_path / "plain")
    without = ["--tokenizer.path", str(tmp_path / "plain"), "--run_dir", str(tmp_path / "none")]
    assert main(["sft", *options, *without]) == 2
    assert "has no chat template" in capsys.readouterr().err
    options += ["--tokenizer.path", str(tmp_path / "tokenizer")]
    assert main(["sft", *options]) == 0
    report = json.loads((tmp_path / "run" / "sft" / "report.json").read_text(encoding="utf-8"))
    assert list(report["accuracy"]) == ["base", "sft"] and report["accuracy"]["sft"]["n"] == 8
    assert report["held_out_loss"]["sft"] < report["held_out_loss"]["base"]
    assert main(["eval", "--run_dir", str(tmp_path / "run"), "--eval.rows", "4"]) == 0
    assert json.loads((tmp_path / "run" / "sft" / "eval.json").read_text(encoding="utf-8"))["accuracy"]["n"] == 4


@pytest.mark.skipif(
    "SMOLLM2_FOLDER" not in os.environ, reason="SMOLLM2_FOLDER names no folder of SmolLM2-135M-Instruct"
)
def test_a_real_tokenizer() -> None:
    """SmolLM2's: a default system prompt, pad that is eos, bos that begins every turn."""
    folder = os.environ["SMOLLM2_FOLDER"]
    smol = load_tokenizer(folder)
    for reasoning, reply in (("plain", PLAIN), ("think", THOUGHT)):
        before, said = shown(ChatTemplate(smol, reasoning, loss_on="completion"))  # type: ignore[arg-type]
        assert before.endswith("<|im_start|>user\nWhat is 12+30?<|im_end|>\n<|im_start|>assistant\n")
        assert said == reply + "<|im_end|>"
    with pytest.raises(DataError, match="'<sep>' is ambiguous"):
        Template(smol)
    assert Template(smol, "<file_sep>").encode(TRIPLE).tokens.size > 5


ENDLESS = {
    "ranges in ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "texts in texts": "{% set s = 'x' * 99999 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "calls of calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "calls without end": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a text larger than any memory": "{{ 'x' * 10 ** 13 }}",
}


@pytest.mark.parametrize("aside", [False, True], ids=["main thread", "another thread"])
@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_never_ends(kind: str, aside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_renderer, "RENDER_SECONDS", 0.3)
    tokenizer = train_tokenizer(["a b"], vocab_size=300)
    tokenizer.chat_template = f"{ENDLESS[kind]}{{# {aside} #}}{{{{ messages[0].content }}}}"
    render = lambda: chat_renderer.ChatRenderer(tokenizer).render([{"role": "user", "content": "hi"}])
    with ThreadPoolExecutor(1) as pool, pytest.raises(DataError, match="template comp"):
        pool.submit(render).result() if aside else render()
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render() == "hi"
