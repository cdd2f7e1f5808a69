"""Small chat templates with the structure of each family of models, and tokenizers that know their control tokens.

They are written here: what counts is where the prompt ends, what a turn ends with, and what becomes of earlier turns.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.tokenizer import train_tokenizer

SPECIAL = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "<|eom|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|channel|>",
    "<|message|>",
    "<|start|>",
    "<|end|>",
    "<|return|>",
    "[THINK]",
    "[/THINK]",
    "<sop>",
    "<|user|>",
    "<|assistant|>",
)
PLAIN_ADDED = ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "<tool_call>", "</tool_call>")
"""Added tokens that are not special, as in R1's and Qwen3's tokenizers."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL_CALLS = (
    "{% for call in m.tool_calls or [] %}{% set f = call.function or call %}"
    '{{ \'\n<tool_call>\n{"name": "\' + f.name + '
    '\'", "arguments": \' }}{{ f.arguments if f.arguments is string else f.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}"
)
HERMES = (  # ChatML with tools: their schemas in the system turn, answers in turns of the user
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}"
    "{% endif %}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    + TOOL_CALLS
    + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (  # BOS, a date, contents trimmed; the answer of a tool is JSON, a call is the only one of its turn
    "{{ bos_token }}{% set day = strftime_now('%d %b %Y') %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}{% else %}"
    "{% set system = '' %}{% endif %}"
    "{{ '<|head|>system<|/head|>\n\nToday: ' + day + '\n\n' }}{% for t in tools or [] %}"
    "{{ t | tojson + '\n\n' }}{% endfor %}"
    "{{ system + '<|eot|>' }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|head|>ipython<|/head|>\n\n' }}"
    "{{ m.content | tojson if m.content is mapping or m.content is iterable else m.content }}{{ '<|eot|>' }}"
    "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}"
    '{{ \'<|head|>assistant<|/head|>\n\n{"name": "\' + f.name + \'", "parameters": \' }}'
    "{{ f.arguments | tojson }}{{ '}<|eot|>' }}"
    "{% else %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
GEMMA = (  # no system role, the assistant is called model, turns take turns
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}"
    "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (  # no header before the reply; a blank before it; eos after it; [INST] is text
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (  # thoughts stay only after the last question; an empty one closes the prompt without thinking
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% if messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% set said = m.content if m.content is string else '' %}{% set thought = '' %}"
    "{% if m.role == 'assistant' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}{% else %}{{ said }}{% endif %}"
    + TOOL_CALLS
    + "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'user' %}{{ '<|im_start|>user\n' + said + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
R1 = (  # the prompt opens a thought, and no turn keeps its own; arguments of calls are text
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}{{ '<｜Assistant｜>' }}{% for call in m.tool_calls %}"
    "{{ '<tool_call>' + call.function.name + '\n' + call.function.arguments + '</tool_call>' }}{% endfor %}"
    "{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '<tool_response>' + m.content + '</tool_response>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
R1_BARE = R1.replace("<｜Assistant｜><think>\n", "<｜Assistant｜>")  # the first version: the student opens the thought
R1_NO_BREAK = R1.replace("<think>\n", "<think>")
V31 = (  # the prompt opens or closes a thought; turns have only the closing mark
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜></think>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}"
    "{% endif %}"
)
SMOL3 = (  # a date; without thinking each turn begins with an empty thought
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '\n' }}{% if messages[0].role == 'system' %}"
    "{{ messages[0].content }}{% endif %}{{ '<|im_end|>\n' }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}"
)
GPT_OSS = (  # channels: the analysis of the last turn only; a final turn ends otherwise than one in the history
    "{{ '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% if loop.last and m.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MAGISTRAL = (  # the marks of a thought are control tokens
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ 'Think in [THINK]...[/THINK]. ' + m.content }}"
    "{% elif m.role == 'user' %}{{ '<|head|>' + m.content + '<|/head|>' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
SEED = (
    "{% for m in messages %}{{ bos_token + m.role + '\n' }}{% if m.role == 'assistant' and m.reasoning_content %}"
    "{{ '<seed:think>' + m.reasoning_content + '</seed:think>' }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)


GLM = (  # no token ends a turn: the next one's first token does; thoughts stay only after the last question
    "{{ '<sop>' }}{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|user|>\n' + m.content + ('/nothink' if not enable_thinking else '') }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n<think>' }}"
    "{% if loop.index0 > ns.last and m.reasoning_content %}{{ m.reasoning_content.strip() }}{% endif %}"
    "{{ '</think>\n' + m.content.split('</think>')[-1].strip() }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{{ '\n<think></think>' if not enable_thinking }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A template and what it can do.

    Attributes:
        template: the Jinja text.
        eos: the tokenizer's eos.
        tools: whether it writes calls and answers of tools.
        one_sequence: for "plain" and for "think", whether a later turn's prompt holds the earlier turns as the student
            read and wrote them.
        stops: tokens that end a reply by the model's generation config.
    """

    template: str
    eos: str = "<|im_end|>"
    tools: bool = False
    one_sequence: tuple[bool, bool] = (True, True)
    stops: tuple[str, ...] = ()


FAMILIES = {
    "chatml": Family(CHATML),
    "hermes": Family(HERMES, tools=True),
    "llama": Family(LLAMA, "<|eot|>", tools=True),
    "gemma": Family(GEMMA, "<eos>"),
    "mistral": Family(MISTRAL, "<eos>"),
    "qwen3": Family(QWEN3, tools=True, one_sequence=(False, False)),
    "r1": Family(R1, "<eos>", tools=True, one_sequence=(False, False)),
    "r1 bare": Family(R1_BARE, "<eos>", tools=True),
    "r1 no break": Family(R1_NO_BREAK, "<eos>", tools=True, one_sequence=(False, False)),
    "v3.1": Family(V31, "<eos>", one_sequence=(True, False)),
    "smol3": Family(SMOL3),
    "phi": Family(PHI, "<|end|>"),
    "gpt-oss": Family(GPT_OSS, "<|return|>", one_sequence=(False, False)),
    "magistral": Family(MAGISTRAL, "<eos>"),
    "seed": Family(SEED, "<eos>"),
    "glm": Family(GLM, "<eos>", stops=("<|user|>",)),
}


TOOL_FAMILIES = [name for name, family in FAMILIES.items() if family.tools]


@functools.cache
def bytes_tokenizer() -> Any:
    return train_tokenizer(["What is 12+30? user assistant\n"] * 3, vocab_size=340, special_tokens=SPECIAL)


def made_tokenizer(template: str, eos: str = "<|im_end|>") -> Any:
    """Return a tokenizer of bytes with a template."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_tokenizer().backend_tokenizer,
        bos_token="<bos>",
        eos_token=eos,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED])
    made.chat_template = template
    return made


@functools.cache
def family_tokenizer(name: str) -> Any:
    """Return a tokenizer of bytes with the template of a family."""
    return made_tokenizer(FAMILIES[name].template, FAMILIES[name].eos)


def family_template(name: str, reasoning: Any, **settings: Any) -> ChatTemplate:
    """Return the chat template of a family, with the loss on replies unless the settings say another."""
    made = family_tokenizer(name)
    stops = tuple(made.convert_tokens_to_ids(stop) for stop in FAMILIES[name].stops)
    return ChatTemplate(made, reasoning, **{"loss_on": "completion", "more_stop_ids": stops} | settings)
