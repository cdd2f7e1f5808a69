"""Live teachers in this process: how they are read, and whether they fit the student."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.models.decoder import make_student
from cotgrpo.models.huggingface.families import ModelError
from cotgrpo.models.huggingface.folder import open_folder
from cotgrpo.models.huggingface.weights import load_pretrained
from cotgrpo.rollouts.on_policy import OnPolicyBatches
from cotgrpo.training.inputs import Model
from cotgrpo.training.loop import BatchSource
from cotgrpo.training.mesh import check_model
from cotgrpo.types import Params, Student


def live_teacher(model: Model, path: str) -> tuple[Student, Params]:
    """Load the frozen teacher, in the student's compute type and on its mesh.

    Raises:
        ModelError: its tokens are not the student's.
    """
    check_same_vocabulary(model, path)
    check_model(model.config, open_folder(path).config, "the live teacher")
    teacher = load_pretrained(path, model.decoder.dtype, mesh=model.mesh)
    return make_student(teacher.config, model.vocab_size), teacher.params


def check_same_vocabulary(model: Model, path: str) -> None:
    """Raise ModelError unless every id of the student is the same token in the teacher, with a row in its embedding.

    The teacher may have more tokens. They are never drawn.
    """
    source = open_folder(path)
    theirs = {i: token for token, i in load_tokenizer(source.folder).get_vocab().items()}
    for token, i in sorted(model.tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if i < model.vocab_size and theirs.get(i) != token:
            there = f"is {theirs[i]!r}" if i in theirs else "does not exist"
            raise ModelError(
                f"The live teacher {path} has another tokenizer than the student: token {i} is {token!r} in the "
                f"student's, and {there} in the teacher's. Ghost tokens are ids, so both need the same tokens: choose "
                "a teacher of the same family, or grpo.ghosts.source privileged_self with the text of this one."
            )
    if source.config.vocab_size < model.vocab_size:
        raise ModelError(
            f"The live teacher {path} has {source.config.vocab_size} rows in its embedding, but the student's "
            f"tokenizer has {model.vocab_size} tokens: choose the model that belongs to the tokenizer."
        )


def live_teacher_of(batches: BatchSource) -> tuple[Student, Params]:
    """Return the live teacher of batches, and its parameters."""
    assert isinstance(batches, OnPolicyBatches) and batches.teacher is not None
    return batches.teacher, batches.teacher_params


def with_columns_of(model: Model, teacher: Student, params: Params) -> Student:
    """Return the teacher with as many columns in its head as the student's has. Those that are added are no tokens."""
    shape = lambda student, params: jax.eval_shape(student.head, params).shape[1]
    columns, own = shape(model.student, model.abstract_params()), shape(teacher, params)
    if columns == own:
        return teacher
    make_head = teacher.head
    assert make_head is not None

    def head(params: Params) -> jax.Array:
        head_DV = make_head(params)[:, :columns]
        return jnp.pad(head_DV, ((0, 0), (0, columns - head_DV.shape[1])))

    return dataclasses.replace(teacher, head=head)
