"""A model folder as a teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers.commands import write_model

from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.sources import DataError
from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.teachers.endpoint import Request, TeacherReply
from cotgrpo.teachers.local import LocalTeacher


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a chat template."""
    folder = tmp_path_factory.mktemp("local")
    return write_model(folder / "model", [f"What is {n} + 1?\n#### {n + 1}" for n in range(60)])


def replies(model: Path, questions: list[str], batch_size: int) -> list[TeacherReply]:
    """Greedy replies, in the order in which they came."""
    teacher = LocalTeacher(str(model), max_tokens=6, batch_size=batch_size)
    found: list[TeacherReply] = []
    requests = [Request((text, 0), [{"role": "user", "content": text}]) for text in questions]
    teacher.ask(requests, lambda request, reply: found.append(dataclasses.replace(reply, seconds=0.0)))
    return found


def test_greedy_replies_do_not_depend_on_the_batch(model: Path) -> None:
    """Two replies at a time with a third prompt waiting, and one at a time: the same text and counts."""
    questions = ["What is 10 + 1?", "Well, what is 11 + 1?", "A much longer question, in many words: 12 + 1?"]
    together = replies(model, questions, 2)
    assert together == replies(model, questions, 1) and len(together) == 3
    template = ChatTemplate(load_tokenizer(model))
    for question, reply in zip(questions, together, strict=True):
        assert reply.prompt_tokens == len(template.prompt(question)) and 1 <= reply.completion_tokens <= 6
        assert reply.finish_reason == ("length" if reply.completion_tokens == 6 else "stop")


def test_a_folder_without_a_chat_template(model: Path, tmp_path: Path) -> None:
    made = load_tokenizer(model)
    made.chat_template = None
    made.save_pretrained(tmp_path / "plain")
    with pytest.raises(DataError, match=r"plain: .*chat_template\.jinja"):
        LocalTeacher(str(tmp_path / "plain"), max_tokens=4)
