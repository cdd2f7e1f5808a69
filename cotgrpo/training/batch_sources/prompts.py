"""What the student replies to: the rows of `grpo.ghosts.prompts`, or the training rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from typing import overload

import numpy as np

from cotgrpo.config import LiveGhosts, PrivilegedSelf, TeacherModel, TeacherServer, VerifiedReward
from cotgrpo.data.batches import REFUSED, fits
from cotgrpo.data.questions import Question, question_text, read_questions
from cotgrpo.data.rows import DropReport
from cotgrpo.data.sources import DataError
from cotgrpo.data.streaming import WindowReader, add_report
from cotgrpo.data.template import AnyTemplate
from cotgrpo.data.triples import Triple, with_question
from cotgrpo.logs.progress import PhaseProgress
from cotgrpo.rollouts.rollouts import RolloutPrompt
from cotgrpo.training.batch_sources.context import BatchContext


def rollout_prompts(ghosts: LiveGhosts | VerifiedReward, at: BatchContext) -> Sequence[RolloutPrompt]:
    """Return what the student replies to: the rows of `grpo.ghosts.prompts`, or the training rows.

    For `privileged_self` each also has the prompt that holds the solution. Streamed rows are read by index.
    """
    inputs, template = at.inputs, at.inputs.template
    if isinstance(ghosts, TeacherModel | TeacherServer | VerifiedReward) and ghosts.prompts:
        questions = read_prompts(ghosts, at)
        return [RolloutPrompt(question, question.prompt_tokens(template)) for question in questions]
    if inputs.stream is not None:
        report = inputs.reports["prompts"] = DropReport()
        return StreamedPrompts(inputs.stream, at.config.data.seq_len - ghosts.max_new_tokens, report)
    found: dict[str, RolloutPrompt] = {}
    prompts = {example.source: example.tokens[: example.prompt_length] for example in inputs.train}
    for triple in inputs.train_triples:
        teacher_prompt = None
        if isinstance(ghosts, PrivilegedSelf) and not ghosts.reads_reply:
            teacher_prompt = privileged_prompt(ghosts, template, triple)
        asked = f"{triple.system}\n{triple.asked}"
        found.setdefault(asked, RolloutPrompt(asked_by(triple), prompts[triple.source], teacher_prompt))
    return list(found.values())


def asked_by(triple: Triple) -> Question:
    """Return the question of a training row, whose answer is the right one."""
    return Question(
        triple.question,
        triple.answer,
        triple,
        triple.source,
        triple.system,
        row=triple.row,
        context=triple.context,
        tools=triple.tools,
    )


def privileged_prompt(
    ghosts: PrivilegedSelf, template: AnyTemplate, triple: Triple, reply: str = "", feedback: str = ""
) -> np.ndarray:
    """Return the int32 tokens of the ghost's prompt for a row."""
    text = ghosts.privileged(triple.question, triple.rationale, triple.answer, reply, feedback)
    row = with_question(triple, text)
    return template.prompt_of(row) if triple.context else template.prompt(text, triple.system)


def prompt_with_feedback(
    ghosts: PrivilegedSelf, template: AnyTemplate, question: RolloutPrompt, reply: str, feedback: str
) -> np.ndarray:
    """Return the ghost's prompt with a reply and what the verifier says of it.

    A reply that the template cannot hold, since it has its marks, is left out.
    """
    assert question.question.reference is not None
    try:
        return privileged_prompt(ghosts, template, question.question.reference, reply, feedback)
    except DataError:
        return privileged_prompt(ghosts, template, question.question.reference)


class StreamedPrompts(Sequence[RolloutPrompt]):
    """What the student replies to, read by the row's number. In place of a row that is left out comes the next one.

    Args:
        stream: reads the rows.
        columns: longest prompt.
        report: counts the rows that were read and left out.

    Raises:
        DataError: from an index: a bad row, a document or prompt that does not fit, or no row that can be used.
    """

    def __init__(self, stream: WindowReader, columns: int, report: DropReport) -> None:
        self.stream, self.columns, self.report = stream, columns, report
        self[0]  # an error of the first row comes before the run begins

    def __len__(self) -> int:
        return len(self.stream.triples.files)

    @overload
    def __getitem__(self, number: int) -> RolloutPrompt: ...
    @overload
    def __getitem__(self, number: slice) -> list[RolloutPrompt]: ...
    def __getitem__(self, number: int | slice) -> RolloutPrompt | list[RolloutPrompt]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        for step in range(len(self)):
            examples, triples, report = self.stream.encode([(number + step) % len(self)])
            add_report(self.report, report)
            for example, triple in zip(examples[-1:], triples, strict=False):
                prompt = example.tokens[: example.prompt_length]
                if fits(triple.source, len(prompt), self.columns, self.stream.too_long, self.report, "prompt"):
                    return RolloutPrompt(asked_by(triple), prompt)
        raise DataError(f"No training row can be used as a prompt. {self.report}")


def read_prompts(ghosts: TeacherModel | TeacherServer | VerifiedReward, at: BatchContext) -> list[Question]:
    """Read and tokenize the questions of `grpo.ghosts.prompts`, without those of the test.

    What was left out is added to the reports of `inputs`.
    """
    inputs, data = at.inputs, at.config.data
    with PhaseProgress("reading questions", at.console) as progress:
        questions, report = read_questions(
            ghosts.prompts,
            split=data.train_split,
            bad_rows=data.bad_rows,
            columns=data.columns,
            row_function=data.row_function,
            progress=progress,
        )
    inputs.reports["prompts"] = report
    columns = data.seq_len - ghosts.max_new_tokens
    held_out: Container[str] = () if inputs.rows is None else inputs.rows.asked
    kept = []
    for question, prompt in zip(questions, inputs.template.prompts_of(questions), strict=True):
        if question_text(question) in held_out:
            report.drop("question is in the test set", question.source)
        elif isinstance(prompt, DataError):
            if data.bad_rows == "error":
                raise prompt
            report.drop(REFUSED, str(prompt))
        elif fits(question.source, len(prompt), columns, data.too_long, report, "prompt"):
            kept.append(dataclasses.replace(question, prompt=prompt))
            inputs.prompts.append(question)
    return kept
