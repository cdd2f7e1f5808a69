"""On-policy batches: the student's own replies with a live ghost at each prefix.

GRPO is GhostRespond Policy Optimization, not Group Relative.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cotgrpo import objectives
from cotgrpo.config import Config, ConfigError, LiveGhosts, PrivilegedSelf, TeacherModel, Teachers, TeacherServer
from cotgrpo.data.chat import ChatTemplate, generation_stop_ids
from cotgrpo.data.tokenizer import decode, load_tokenizer
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.models.huggingface.weights import load_pretrained
from cotgrpo.rollouts.feedback import FeedbackBatches
from cotgrpo.rollouts.on_policy import OnPolicyBatches, draw_with, make_draw, make_ghosts
from cotgrpo.rollouts.other_tokenizer import LocalScorer, OtherTokenizer, TwoTokenizers, check_tokenizers
from cotgrpo.rollouts.rollouts import RolloutPrompt, RolloutSettings
from cotgrpo.rollouts.served_ghosts import ServedGhostBatches, own_prompt, sample_texts
from cotgrpo.rollouts.several_teachers import SeveralTeachers, by_field
from cotgrpo.sharding import jit_eval
from cotgrpo.teacher_servers.server import Scorer, ScoringServer
from cotgrpo.teacher_servers.vocabulary import Vocabulary
from cotgrpo.terminal import say
from cotgrpo.training.batch_sources.context import BatchContext
from cotgrpo.training.batch_sources.prompts import prompt_with_feedback, rollout_prompts
from cotgrpo.training.batch_sources.teacher_models import live_teacher, with_columns_of
from cotgrpo.training.batch_sources.text import listed_tokens, text_batches
from cotgrpo.training.inputs import StageInputs
from cotgrpo.training.loop import BatchSource


def several_teachers(ghosts: Teachers, at: BatchContext) -> SeveralTeachers:
    """Return batches with one of several live teachers each.

    Raises:
        ConfigError: rows that are streamed, and a route.
        DataError, ModelError, TeacherError: a row without a teacher, or as `live_batches` does.
    """
    config = at.config
    if ghosts.route and config.data.streaming and not ghosts.prompts:
        raise ConfigError(
            "grpo.ghosts.route needs the questions in memory: set data.streaming to false, name them in "
            "grpo.ghosts.prompts, or give the teachers shares in place of a route."
        )
    questions = rollout_prompts(ghosts, at)
    named: Mapping[str, Sequence[RolloutPrompt]]
    if ghosts.route:
        named = by_field(questions, ghosts.route, {value: str(name) for value, name in ghosts.teachers.items()})
        shares = {name: float(len(rows)) for name, rows in named.items()}
        counted = ", ".join(f"{name} {len(rows):,}" for name, rows in named.items())
        say(at.console, f"questions by {ghosts.route}: {counted}")
    else:
        named, shares = dict.fromkeys(ghosts.names, questions), {n: float(v) for n, v in ghosts.teachers.items()}
    sources = {name: live_batches(ghosts.alone(name), at, rows) for name, rows in named.items()}
    return SeveralTeachers(sources, shares, seed=config.seed)


def live_batches(
    ghosts: LiveGhosts, at: BatchContext, questions: Sequence[RolloutPrompt] | None = None
) -> OnPolicyBatches:
    """Return the batches of a stage with live ghosts. A frozen `privileged_self` keeps a copy of what is trained.

    `questions` are what the student replies to; None: those of the settings.

    Raises:
        ModelError: a teacher that cannot be read, or has another tokenizer.
        DataError, ConfigError: rows that leave no room for a reply, or a mesh that does not fit the teacher.
    """
    config, inputs, weights, model = at.config, at.inputs, at.weights, at.model
    if isinstance(ghosts, TeacherServer) or (isinstance(ghosts, TeacherModel) and ghosts.has_other_tokenizer):
        return served_batches(ghosts, at, questions)
    if isinstance(ghosts, TeacherModel):
        teacher, teacher_params = live_teacher(model, str(ghosts.teacher))
    else:
        frozen = isinstance(ghosts, PrivilegedSelf) and ghosts.self == "frozen"
        teacher = model.student
        teacher_params = weights.adapted(jax.tree.map(jnp.copy, weights.trained)) if frozen else None
    is_reference = objectives.reads_teacher(config.grpo.full_objective)
    settings, top_k = live_settings(ghosts, config), listed_tokens(config, model)
    how = (ghosts.max_new_tokens, ghosts.temperature, ghosts.decode_batch_size)
    drawn: dict[str, Any] = {"drawn_ghosts": ghosts.choice == "drawn", "top_k": top_k, "reference_rows": is_reference}
    questions = rollout_prompts(ghosts, at) if questions is None else questions
    options: dict[str, Any] = {
        "seed": config.seed,
        "merged": weights.adapted,
        "forced": forced_batches(settings, at),
        "completions": at.completions_log(),
        "mesh": model.mesh,
        "teacher": with_columns_of(model, teacher, teacher_params) if is_reference else None,
        "moving": ghosts.self if isinstance(ghosts, PrivilegedSelf) else "frozen",
    }
    rest = (teacher_params, model.student, inputs.template, questions, settings)
    if isinstance(ghosts, PrivilegedSelf) and ghosts.reads_reply:
        compiled = at.compiled_sampler(*how), jit_eval(make_ghosts(teacher, **drawn), model.mesh)
        prompt_with = functools.partial(prompt_with_feedback, ghosts, inputs.template)
        return FeedbackBatches(*compiled, prompt_with, *rest, **options)
    if at.engine is not None:
        draw = draw_with(at.engine, jit_eval(make_ghosts(teacher, **drawn), model.mesh))
    else:
        draw = jit_eval(make_draw(at.student_sampler(*how), teacher, **drawn), model.mesh)
    return OnPolicyBatches(draw, *rest, **options)


def forced_batches(settings: RolloutSettings, at: BatchContext) -> BatchSource | None:
    """Return the teacher-forced rows that join each batch, or None."""
    if not settings.forced_rows:
        return None
    return text_batches(at.config, at.inputs, settings.forced_rows, console=at.console)


def live_settings(ghosts: LiveGhosts, config: Config) -> RolloutSettings:
    """Return the sizes of the batches of a live ghost."""
    forced_rows = ghosts.forced_rows(config.grpo.batch_size)
    return RolloutSettings(
        replies=config.grpo.batch_size - forced_rows,
        seq_len=config.data.seq_len,
        max_new_tokens=ghosts.max_new_tokens,
        forced_rows=forced_rows,
        updates_per_rollout=ghosts.updates_per_rollout,
        ratio_clip=ghosts.ratio_clip,
        group=ghosts.num_generations,
        when=ghosts.when,
        rewarded=config.grpo.reward_weight > 0,
    )


def served_batches(
    ghosts: TeacherServer | TeacherModel, at: BatchContext, questions: Sequence[RolloutPrompt] | None = None
) -> ServedGhostBatches:
    """Return the batches of a stage whose live ghost is on a server, or has another tokenizer than the student.

    A server is asked for a sample first.

    Raises:
        TeacherError: the server returns no log-probabilities, or has another tokenizer than expected.
        ModelError, DataError: as `live_batches` does.
        ConfigError: a teacher in this process with another tokenizer, and several processes.
    """
    config, inputs, model, console = at.config, at.inputs, at.model, at.console
    settings, top_k = live_settings(ghosts, config), listed_tokens(config, model)
    questions = rollout_prompts(ghosts, at) if questions is None else questions
    other = other_tokens(ghosts, inputs) if ghosts.has_other_tokenizer else None
    scored_top_k = min(ghosts.wanted(top_k), model.vocab_size) if isinstance(ghosts, TeacherServer) else 1
    scorer: Scorer | None = None

    def connect() -> list[float]:
        nonlocal scorer
        samples = sample_texts(questions, [example.tokens for example in inputs.train[:8]])
        if other is not None:
            texts = [decode(model.tokenizer, [*sample.context, *sample.scored]) for sample in samples]
            share = check_tokenizers(other.student, other.teacher, texts)
            say(console, f"another tokenizer: the teacher gives a ghost at about {share:.0%} of the student's contexts")
            samples = other.samples(texts)
        if isinstance(ghosts, TeacherModel):
            teacher = load_pretrained(str(ghosts.teacher), model.decoder.dtype, mesh=model.mesh)
            scorer, fingerprint = LocalScorer(teacher.student, teacher.params, model.mesh), list[float]()
        else:
            tokens = (model.tokenizer, model.vocab_size) if other is None else other.vocabulary
            warn = lambda line: say(console, line, style="yellow")
            server = ScoringServer(ghosts, Vocabulary(*tokens), scored_top_k, samples, warn)
            scorer, fingerprint = server, server.connect()
        scorer = scorer if other is None else OtherTokenizer(other.student, other.teacher, scorer)
        return fingerprint

    fingerprint = on_process_0(connect)
    return ServedGhostBatches(
        at.compiled_sampler(ghosts.max_new_tokens, ghosts.temperature, ghosts.decode_batch_size),
        scorer,
        model.student,
        inputs.template,
        questions,
        settings,
        seed=config.seed,
        drawn_ghosts=ghosts.choice == "drawn",
        scored_top_k=scored_top_k,
        top_k=top_k,
        prefetch=isinstance(ghosts, TeacherServer) and ghosts.prefetch_rollouts,
        fingerprint=fingerprint,
        context_of=own_prompt if other is None else other.context_of,
        merged=at.weights.adapted,
        forced=forced_batches(settings, at),
        completions=at.completions_log(),
        mesh=model.mesh,
    )


def other_tokens(ghosts: TeacherServer | TeacherModel, inputs: StageInputs) -> TwoTokenizers:
    """Return the student's tokens and those of a teacher with another tokenizer.

    Raises:
        ConfigError: a teacher in this process, and several processes.
    """
    if isinstance(ghosts, TeacherModel) and jax.process_count() > 1:
        raise ConfigError(
            f"grpo.ghosts.other_tokenizer true needs one process, got {jax.process_count()}: serve the teacher, and "
            "set grpo.ghosts.source teacher_server with grpo.ghosts.tokenizer."
        )
    data = inputs.model.config.data
    path = str(ghosts.teacher if isinstance(ghosts, TeacherModel) else ghosts.tokenizer)
    tokenizer, template = load_tokenizer(path), None
    if tokenizer.chat_template:
        stops = generation_stop_ids(path)
        template = ChatTemplate(tokenizer, data.reasoning, data.answer_format, data.system, more_stop_ids=stops)
    return TwoTokenizers.of(inputs.template, tokenizer, template, path)
