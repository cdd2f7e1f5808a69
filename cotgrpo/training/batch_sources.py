"""From a config to the batches of a GhostRespond stage: text, or the student's own replies with a live ghost. GRPO is not Group Relative here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cotgrpo import objectives
from cotgrpo.config.settings import Config
from cotgrpo.data.batches import fits, make_batches
from cotgrpo.data.questions import Question, read_questions
from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.logs.completions import CompletionsLog
from cotgrpo.models.decoder import make_student
from cotgrpo.models.huggingface.families import ModelError
from cotgrpo.models.huggingface.folder import open_folder
from cotgrpo.models.huggingface.weights import load_pretrained
from cotgrpo.rollouts.group_relative import GroupRelativeBatches
from cotgrpo.rollouts.on_policy import OnPolicyBatches, make_draw
from cotgrpo.rollouts.rollouts import RolloutPrompt, RolloutSettings
from cotgrpo.rollouts.self_replies import SelfReplyBatches, SelfReplySettings
from cotgrpo.sampling import SamplingSettings, make_sampler
from cotgrpo.sharding import jit_eval
from cotgrpo.training.inputs import Model, StageInputs
from cotgrpo.training.mesh import check_model
from cotgrpo.training.weights import StageWeights
from cotgrpo.types import Params, Student

COMPLETIONS_SHOWN = 4
"""Replies that are logged at a time."""


def text_batches(config: Config, setup: StageInputs, batch_size: int, only_rows: Any = None) -> Any:
    """Packed batches of the training rows; of several processes each makes only its rows."""
    data = config.data
    return make_batches(
        setup.train,
        batch_size=batch_size,
        seq_len=data.seq_len,
        seed=config.seed,
        packing=data.packing,
        only_rows=only_rows,
    )


def live_batches(config: Config, setup: StageInputs, weights: StageWeights, folder: Path) -> OnPolicyBatches:
    """The batches of a stage whose `grpo.ghosts.source` is live.

    Args:
        config: the settings.
        setup: rows and student.
        weights: the student's before the stage, which `privileged_self` keeps.
        folder: of the stage, for the completions.

    Raises:
        ModelError, DataError, ConfigError: a teacher with another tokenizer, or that cannot be read; rows that leave no room for a reply.
    """
    ghosts, model, template = config.grpo.ghosts, setup.model, setup.template
    if ghosts.source == "teacher_model":
        teacher, teacher_params = live_teacher(model, str(ghosts.teacher))
    else:
        teacher, teacher_params = model.student, jax.tree.map(jnp.copy, weights.merged())
    top_k = objectives.top_k(config.grpo.objective.build())
    if top_k > model.vocab_size:
        raise ModelError(
            f"grpo.objective.top_k is {top_k}, but the student's tokenizer has {model.vocab_size} tokens: lower it."
        )
    forced_rows = ghosts.forced_rows(config.grpo.batch_size)
    settings = RolloutSettings(
        replies=config.grpo.batch_size - forced_rows,
        seq_len=config.data.seq_len,
        max_new_tokens=ghosts.max_new_tokens,
        forced_rows=forced_rows,
        updates_per_rollout=ghosts.updates_per_rollout,
        ratio_clip=ghosts.ratio_clip,
    )
    sampling = SamplingSettings(
        ghosts.max_new_tokens, template.stop_ids, temperature=ghosts.temperature, pad_id=template.pad_id
    )
    draw = make_draw(
        make_sampler(model.decoder, sampling, model.vocab_size, ghosts.decode_batch_size),
        teacher,
        drawn_ghosts=ghosts.choice == "drawn",
        top_k=top_k,
    )
    return OnPolicyBatches(
        jit_eval(draw, model.mesh),
        teacher_params,
        model.student,
        template,
        asked_in(config, setup),
        settings,
        seed=config.seed,
        merged=weights.merged,
        forced=text_batches(config, setup, forced_rows) if forced_rows else None,
        completions=CompletionsLog(folder, config.grpo.log_every, COMPLETIONS_SHOWN),
        mesh=model.mesh,
    )


def group_relative_batches(
    config: Config, setup: StageInputs, weights: StageWeights, folder: Path
) -> GroupRelativeBatches:
    """The batches of a stage whose objective is group_relative. Raises DataError as `live_batches` does."""
    ghosts, model, template = config.grpo.ghosts, setup.model, setup.template
    sampling = SamplingSettings(ghosts.max_new_tokens, template.stop_ids, temperature=1.0, pad_id=template.pad_id)
    return GroupRelativeBatches(
        jit_eval(make_sampler(model.decoder, sampling, model.vocab_size, ghosts.decode_batch_size), model.mesh),
        template,
        asked_in(config, setup),
        RolloutSettings(
            config.grpo.batch_size,
            config.data.seq_len,
            ghosts.max_new_tokens,
            updates_per_rollout=ghosts.updates_per_rollout,
        ),
        seed=config.seed,
        group=ghosts.num_generations,
        ahead=ghosts.prefetch_rollouts,
        merged=weights.merged,
        completions=CompletionsLog(folder, config.grpo.log_every, COMPLETIONS_SHOWN),
        mesh=model.mesh,
    )


def asked_in(config: Config, setup: StageInputs) -> list[RolloutPrompt]:
    """What the student replies to: `grpo.ghosts.prompts`, or the training rows; for `privileged_self` with the prompt that holds the solution."""
    ghosts, template = config.grpo.ghosts, setup.template
    if ghosts.prompts:
        return [RolloutPrompt(q, template.prompt(q.question, q.system)) for q in prompts_in(config, setup)]
    found: dict[str, RolloutPrompt] = {}
    for triple in setup.train_triples:
        reads = None
        if ghosts.source == "privileged_self":
            told = ghosts.privileged(triple.question, triple.rationale, triple.answer)
            reads = template.prompt(told, triple.system)
        question = Question(triple.question, triple.answer, triple, triple.source, triple.system)
        prompt = template.prompt(triple.question, triple.system)
        found.setdefault(f"{triple.system}\n{triple.question}", RolloutPrompt(question, prompt, reads))
    return list(found.values())


def prompts_in(config: Config, setup: StageInputs) -> list[Question]:
    """The questions of `grpo.ghosts.prompts` that are not asked in the test; what was left out is among the setup's reports."""
    data, ghosts, template = config.data, config.grpo.ghosts, setup.template
    questions, report = read_questions(ghosts.prompts, split=data.train_split, bad_rows=data.bad_rows)
    setup.reports["prompts"] = report
    columns, held_out = data.seq_len - ghosts.max_new_tokens, {q.question for q in setup.test_questions}
    kept = []
    for question in questions:
        if question.question in held_out:
            report.drop("question is in the test set", question.source)
            continue
        positions = len(template.prompt(question.question, question.system))
        if fits(question.source, positions, columns, data.too_long, report, "prompt"):
            kept.append(question)
    return kept


def self_reply_batches(config: Config, setup: StageInputs, weights: StageWeights, folder: Path) -> SelfReplyBatches:
    """The batches of a stage that learns from the student's own best replies."""
    ghosts, model, template = config.grpo.ghosts, setup.model, setup.template
    settings = SelfReplySettings(
        candidates=ghosts.num_generations,
        questions=ghosts.questions,
        refresh_every=ghosts.refresh_every,
        batch_size=config.grpo.batch_size,
        seq_len=config.data.seq_len,
        prompt_columns=config.data.seq_len - ghosts.max_new_tokens,
        packing=config.data.packing,
    )
    samplers = [
        jit_eval(
            make_sampler(
                model.decoder,
                SamplingSettings(ghosts.max_new_tokens, template.stop_ids, temperature=t, pad_id=template.pad_id),
                model.vocab_size,
                ghosts.decode_batch_size or config.eval.batch_size,
            ),
            model.mesh,
        )
        for t in ghosts.temperatures
    ]
    return SelfReplyBatches(
        samplers, template, setup.train_triples, settings, folder / "self_replies", config.seed, weights.merged
    )


def live_teacher(model: Model, path: str) -> tuple[Student, Params]:
    """The frozen teacher, in the student's compute type and on its mesh. Raises ModelError where its tokens are not the student's."""
    check_same_vocabulary(model, path)
    check_model(model.config, open_folder(path).config, "the live teacher")
    teacher = load_pretrained(path, model.decoder.dtype, mesh=model.mesh)
    return make_student(teacher.config, model.vocab_size), teacher.params


def check_same_vocabulary(model: Model, path: str) -> None:
    """Raises ModelError unless every id of the student's tokenizer is the same token in the teacher's, and has a row in its embedding.

    The teacher may know tokens beyond: they are never said.
    """
    source = open_folder(path)
    theirs = {i: token for token, i in load_tokenizer(source.folder).get_vocab().items()}
    for token, i in sorted(model.tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if i < model.vocab_size and theirs.get(i) != token:
            there = f"is {theirs[i]!r}" if i in theirs else "does not exist"
            raise ModelError(
                f"The live teacher {path} has another tokenizer than the student: token {i} is {token!r} in the student's, and {there} in the teacher's. "
                "Ghost tokens are ids, so both need the same tokens: choose a teacher of the same family, or grpo.ghosts.source privileged_self "
                "with the text of this one."
            )
    if source.config.vocab_size < model.vocab_size:
        raise ModelError(
            f"The live teacher {path} has {source.config.vocab_size} rows in its embedding, but the student's tokenizer has {model.vocab_size} tokens: "
            "choose the model that belongs to the tokenizer."
        )
