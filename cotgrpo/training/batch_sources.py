"""Make the batches of a stage: packed text, or the student's own replies with a live ghost.

GRPO is GhostRespond Policy Optimization, not Group Relative.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from cotgrpo import objectives
from cotgrpo.config import (
    Cached,
    Config,
    ConfigError,
    Ghosts,
    LiveGhosts,
    PrivilegedSelf,
    SelfReply,
    TeacherForced,
    TeacherModel,
    Teachers,
    TeacherServer,
    VerifiedReward,
)
from cotgrpo.data.batches import REFUSED, fits, make_batches
from cotgrpo.data.chat import ChatTemplate, generation_stop_ids
from cotgrpo.data.questions import Question, question_text, read_questions
from cotgrpo.data.rows import DropReport
from cotgrpo.data.sources import DataError
from cotgrpo.data.streaming import StreamedBatches, WindowReader, add_report
from cotgrpo.data.template import AnyTemplate
from cotgrpo.data.tokenizer import decode, load_tokenizer
from cotgrpo.data.triples import Triple, with_question
from cotgrpo.distributed.processes import on_process_0, process_rows
from cotgrpo.identity.fingerprints import tokenizer_fingerprint
from cotgrpo.logs.completions import CompletionsLog
from cotgrpo.logs.progress import PhaseProgress
from cotgrpo.models.decoder import make_student
from cotgrpo.models.huggingface.families import ModelError
from cotgrpo.models.huggingface.folder import open_folder
from cotgrpo.models.huggingface.weights import load_pretrained
from cotgrpo.rollouts.cached_ghosts import CachedBatches, check_tokenizer, read_cache, with_cached_ghosts
from cotgrpo.rollouts.feedback import FeedbackBatches
from cotgrpo.rollouts.group_relative import GroupRelativeBatches
from cotgrpo.rollouts.on_policy import OnPolicyBatches, make_draw, make_ghosts
from cotgrpo.rollouts.other_tokenizer import LocalScorer, OtherTokenizer, TwoTokenizers, check_tokenizers
from cotgrpo.rollouts.rollouts import RolloutPrompt, RolloutSettings
from cotgrpo.rollouts.self_replies import SelfReplyBatches, SelfReplySettings
from cotgrpo.rollouts.served_ghosts import ServedGhostBatches, own_prompt, sample_texts
from cotgrpo.rollouts.several_teachers import SeveralTeachers, by_field
from cotgrpo.sampling import Sampler, SamplingSettings, make_sampler
from cotgrpo.sharding import batch_sharding, jit_eval
from cotgrpo.teacher_servers.server import Scorer, ScoringServer
from cotgrpo.teacher_servers.vocabulary import Vocabulary
from cotgrpo.terminal import say
from cotgrpo.training.inputs import QUIET, Model, StageInputs
from cotgrpo.training.loop import BatchSource
from cotgrpo.training.mesh import check_model
from cotgrpo.training.steps import StageName
from cotgrpo.training.weights import StageWeights
from cotgrpo.types import Params, Student

COMPLETIONS_SHOWN = 4
"""Replies that are logged at a time."""


def make_stage_batches(
    stage: StageName,
    config: Config,
    inputs: StageInputs,
    weights: StageWeights,
    folder: Path,
    console: Console = QUIET,
) -> BatchSource:
    """Return what a stage learns from.

    Args:
        stage: "sft" or "grpo".
        config: the settings.
        inputs: rows and student.
        weights: the student's before the first step.
        folder: of the stage, for completions and replies.
        console: where the progress goes.

    Raises:
        ConfigError: ghosts that need the training rows in memory, with `data.streaming`.
    """
    ghosts = TeacherForced() if stage == "sft" else config.grpo.ghosts
    check_streaming(config, ghosts)
    if isinstance(ghosts, Teachers) and ghosts.teachers:
        return several_teachers(ghosts, config, inputs, weights, folder, console)
    if isinstance(ghosts, LiveGhosts):
        return live_batches(ghosts, config, inputs, weights, folder, console)
    if isinstance(ghosts, Cached):
        return cached_batches(ghosts, config, inputs, console)
    if isinstance(ghosts, SelfReply):
        return self_reply_batches(ghosts, config, inputs, weights, folder)
    if isinstance(ghosts, VerifiedReward):
        return group_relative_batches(ghosts, config, inputs, weights, folder, console)
    batch_size = getattr(config, stage).batch_size
    return text_batches(config, inputs, batch_size, own_rows(inputs.model, batch_size), console)


def check_streaming(config: Config, ghosts: Ghosts) -> None:
    """Raise ConfigError if the rows are streamed, and these ghosts need all of their questions in memory."""
    if config.data.streaming and isinstance(ghosts, PrivilegedSelf | SelfReply | Cached):
        raise ConfigError(
            f"grpo.ghosts.source {ghosts.source} needs the questions of all training rows in memory, which "
            "data.streaming leaves on disk. Set data.streaming to false, with fewer rows in data.train, or choose "
            "another source."
        )


def own_rows(model: Model, batch_size: int) -> Sequence[int] | None:
    """Return the rows of every batch that this process reads; None: all."""
    if model.mesh is None or jax.process_count() == 1:
        return None
    rows = process_rows(batch_sharding(model.mesh), (batch_size, model.config.data.seq_len))
    return [int(row) for row in rows]


def text_batches(
    config: Config,
    inputs: StageInputs,
    batch_size: int,
    only_rows: Sequence[int] | None = None,
    console: Console = QUIET,
) -> BatchSource:
    """Return packed batches of the training rows. Each process fills only `only_rows`.

    Streamed rows add what was left out to the reports of `inputs`, and print it after each epoch.
    """
    data = config.data
    if inputs.stream is not None:
        report = inputs.reports["training rows"] = DropReport()

        def on_epoch(epochs: int) -> None:
            text = f"epoch {epochs}: all rows are read. Rows of all epochs so far: {report}"
            say(console, text)

        return StreamedBatches(
            inputs.stream,
            batch_size=batch_size,
            seed=config.seed,
            only_rows=only_rows,
            workers=data.num_workers,
            report=report,
            on_epoch=on_epoch,
            on_other_rows=(lambda text: say(console, text)) if "data" in config.allowed_changes else None,
        )
    with PhaseProgress("packing rows", console, len(inputs.train)) as progress:
        return make_batches(
            inputs.train,
            batch_size=batch_size,
            seq_len=data.seq_len,
            seed=config.seed,
            packing=data.packing,
            only_rows=only_rows,
            progress=progress,
        )


def cached_batches(ghosts: Cached, config: Config, inputs: StageInputs, console: Console = QUIET) -> CachedBatches:
    """Return packed batches of the training rows with the teacher's distribution from a file.

    Raises:
        DataError: a file that cannot be read, or is of another tokenizer, or lacks what the objective or a row needs.
    """
    model, data, batch_size = inputs.model, config.data, config.grpo.batch_size
    cache, vocabulary = read_cache(str(ghosts.path)), Vocabulary(model.tokenizer, model.vocab_size)
    check_tokenizer(cache, vocabulary, tokenizer_fingerprint(model.tokenizer))
    examples, report = with_cached_ghosts(
        inputs.train,
        inputs.train_triples,
        cache,
        vocabulary,
        top_k=listed_tokens(config, model),
        choice=ghosts.ghost_token,
        missing=ghosts.missing,
    )
    say(console, f"{ghosts.path}: {report}")
    batches = make_batches(
        examples,
        batch_size=batch_size,
        seq_len=data.seq_len,
        seed=config.seed,
        packing=data.packing,
        only_rows=own_rows(model, batch_size),
    )
    return CachedBatches(batches, cache)


def several_teachers(
    ghosts: Teachers,
    config: Config,
    inputs: StageInputs,
    weights: StageWeights,
    folder: Path,
    console: Console = QUIET,
) -> SeveralTeachers:
    """Return batches with one of several live teachers each.

    Raises:
        ConfigError: rows that are streamed, and a route.
        DataError, ModelError, TeacherError: a row without a teacher, or as `live_batches` does.
    """
    if ghosts.route and config.data.streaming and not ghosts.prompts:
        raise ConfigError(
            "grpo.ghosts.route needs the questions in memory: set data.streaming to false, name them in "
            "grpo.ghosts.prompts, or give the teachers shares in place of a route."
        )
    questions = rollout_prompts(ghosts, config, inputs, console)
    named: Mapping[str, Sequence[RolloutPrompt]]
    if ghosts.route:
        named = by_field(questions, ghosts.route, {value: str(name) for value, name in ghosts.teachers.items()})
        shares = {name: float(len(rows)) for name, rows in named.items()}
        counted = ", ".join(f"{name} {len(rows):,}" for name, rows in named.items())
        say(console, f"questions by {ghosts.route}: {counted}")
    else:
        named, shares = dict.fromkeys(ghosts.names, questions), {n: float(v) for n, v in ghosts.teachers.items()}
    sources = {
        name: live_batches(ghosts.alone(name), config, inputs, weights, folder, console, questions=rows)
        for name, rows in named.items()
    }
    return SeveralTeachers(sources, shares, seed=config.seed)


def live_batches(
    ghosts: LiveGhosts,
    config: Config,
    inputs: StageInputs,
    weights: StageWeights,
    folder: Path,
    console: Console = QUIET,
    questions: Sequence[RolloutPrompt] | None = None,
) -> OnPolicyBatches:
    """Return the batches of a stage with live ghosts. A frozen `privileged_self` keeps a copy of what is trained.

    `questions` are what the student replies to; None: those of the settings.

    Raises:
        ModelError: a teacher that cannot be read, or has another tokenizer.
        DataError, ConfigError: rows that leave no room for a reply, or a mesh that does not fit the teacher.
    """
    model = inputs.model
    if isinstance(ghosts, TeacherServer) or (isinstance(ghosts, TeacherModel) and ghosts.has_other_tokenizer):
        return served_batches(ghosts, config, inputs, weights, folder, console, questions)
    if isinstance(ghosts, TeacherModel):
        teacher, teacher_params = live_teacher(model, str(ghosts.teacher))
    else:
        frozen = isinstance(ghosts, PrivilegedSelf) and ghosts.self == "frozen"
        teacher = model.student
        teacher_params = weights.adapted(jax.tree.map(jnp.copy, weights.trained)) if frozen else None
    is_reference = objectives.reads_teacher(config.grpo.full_objective)
    settings, top_k = live_settings(ghosts, config), listed_tokens(config, model)
    sampler = student_sampler(inputs, ghosts.max_new_tokens, ghosts.temperature, ghosts.decode_batch_size)
    drawn: dict[str, Any] = {"drawn_ghosts": ghosts.choice == "drawn", "top_k": top_k, "reference_rows": is_reference}
    questions = rollout_prompts(ghosts, config, inputs, console) if questions is None else questions
    options: dict[str, Any] = {
        "seed": config.seed,
        "merged": weights.adapted,
        "forced": text_batches(config, inputs, settings.forced_rows, console=console) if settings.forced_rows else None,
        "completions": completions_log(config, folder),
        "mesh": model.mesh,
        "teacher": with_columns_of(model, teacher, teacher_params) if is_reference else None,
        "moving": ghosts.self if isinstance(ghosts, PrivilegedSelf) else "frozen",
    }
    rest = (teacher_params, model.student, inputs.template, questions, settings)
    if isinstance(ghosts, PrivilegedSelf) and ghosts.reads_reply:
        compiled = jit_eval(sampler, model.mesh), jit_eval(make_ghosts(teacher, **drawn), model.mesh)
        prompt_with = functools.partial(prompt_with_feedback, ghosts, inputs.template)
        return FeedbackBatches(*compiled, prompt_with, *rest, **options)
    return OnPolicyBatches(jit_eval(make_draw(sampler, teacher, **drawn), model.mesh), *rest, **options)


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


def privileged_prompt(
    ghosts: PrivilegedSelf, template: AnyTemplate, triple: Triple, reply: str = "", feedback: str = ""
) -> np.ndarray:
    """Return the int32 tokens of the ghost's prompt for a row."""
    text = ghosts.privileged(triple.question, triple.rationale, triple.answer, reply, feedback)
    row = with_question(triple, text)
    return template.prompt_of(row) if triple.context else template.prompt(text, triple.system)


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


def listed_tokens(config: Config, model: Model) -> int:
    """Return how many of the ghost's likeliest tokens the objective reads. Raises ModelError if there are fewer."""
    top_k = objectives.top_k(config.grpo.full_objective)
    if top_k > model.vocab_size:
        raise ModelError(
            f"grpo.objective.top_k is {top_k}, but the student's tokenizer has {model.vocab_size} tokens: lower it."
        )
    return top_k


def served_batches(
    ghosts: TeacherServer | TeacherModel,
    config: Config,
    inputs: StageInputs,
    weights: StageWeights,
    folder: Path,
    console: Console = QUIET,
    questions: Sequence[RolloutPrompt] | None = None,
) -> ServedGhostBatches:
    """Return the batches of a stage whose live ghost is on a server, or has another tokenizer than the student.

    A server is asked for a sample first.

    Raises:
        TeacherError: the server returns no log-probabilities, or has another tokenizer than expected.
        ModelError, DataError: as `live_batches` does.
        ConfigError: a teacher in this process with another tokenizer, and several processes.
    """
    model, settings, top_k = inputs.model, live_settings(ghosts, config), listed_tokens(config, inputs.model)
    questions = rollout_prompts(ghosts, config, inputs, console) if questions is None else questions
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
        jit_eval(
            student_sampler(inputs, ghosts.max_new_tokens, ghosts.temperature, ghosts.decode_batch_size), model.mesh
        ),
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
        merged=weights.adapted,
        forced=text_batches(config, inputs, settings.forced_rows, console=console) if settings.forced_rows else None,
        completions=completions_log(config, folder),
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


def group_relative_batches(
    ghosts: VerifiedReward,
    config: Config,
    inputs: StageInputs,
    weights: StageWeights,
    folder: Path,
    console: Console = QUIET,
) -> GroupRelativeBatches:
    """Return the batches for the objective group_relative. Raises DataError as `live_batches` does."""
    model = inputs.model
    sampler = student_sampler(inputs, ghosts.max_new_tokens, 1.0, ghosts.decode_batch_size)
    return GroupRelativeBatches(
        jit_eval(sampler, model.mesh),
        inputs.template,
        rollout_prompts(ghosts, config, inputs, console),
        RolloutSettings(
            config.grpo.batch_size,
            config.data.seq_len,
            ghosts.max_new_tokens,
            updates_per_rollout=ghosts.updates_per_rollout,
        ),
        seed=config.seed,
        group=ghosts.num_generations,
        prefetch=ghosts.prefetch_rollouts,
        merged=weights.adapted,
        completions=completions_log(config, folder),
        mesh=model.mesh,
    )


def self_reply_batches(
    ghosts: SelfReply, config: Config, inputs: StageInputs, weights: StageWeights, folder: Path
) -> SelfReplyBatches:
    """Return the batches of a stage that learns from the student's own best replies."""
    data = config.data
    settings = SelfReplySettings(
        num_generations=ghosts.num_generations,
        questions=ghosts.questions,
        refresh_every=ghosts.refresh_every,
        batch_size=config.grpo.batch_size,
        seq_len=data.seq_len,
        prompt_columns=data.seq_len - ghosts.max_new_tokens,
        packing=data.packing,
    )
    decode_batch_size = ghosts.decode_batch_size or config.eval.batch_size
    samplers = [
        jit_eval(student_sampler(inputs, ghosts.max_new_tokens, t, decode_batch_size), inputs.model.mesh)
        for t in ghosts.temperatures
    ]
    return SelfReplyBatches(
        samplers,
        inputs.template,
        inputs.train_triples,
        settings,
        folder / "self_replies",
        config.seed,
        weights.adapted,
    )


def student_sampler(
    inputs: StageInputs, max_new_tokens: int, temperature: float, decode_batch_size: int | None
) -> Sampler:
    """Return the sampler of the student's replies, without jit."""
    model, template = inputs.model, inputs.template
    settings = SamplingSettings(max_new_tokens, template.stop_ids, temperature=temperature, pad_id=template.pad_id)
    return make_sampler(model.decoder, settings, model.vocab_size, decode_batch_size)


def completions_log(config: Config, folder: Path) -> CompletionsLog:
    """Return the log of the student's replies."""
    return CompletionsLog(folder, config.grpo.log_every, COMPLETIONS_SHOWN)


def rollout_prompts(
    ghosts: LiveGhosts | VerifiedReward, config: Config, inputs: StageInputs, console: Console
) -> Sequence[RolloutPrompt]:
    """Return what the student replies to: the rows of `grpo.ghosts.prompts`, or the training rows.

    For `privileged_self` each also has the prompt that holds the solution. Streamed rows are read by index.
    """
    template = inputs.template
    if isinstance(ghosts, TeacherModel | TeacherServer | VerifiedReward) and ghosts.prompts:
        questions = read_prompts(ghosts, config, inputs, console)
        return [RolloutPrompt(question, question.prompt_tokens(template)) for question in questions]
    if inputs.stream is not None:
        report = inputs.reports["prompts"] = DropReport()
        return StreamedPrompts(inputs.stream, config.data.seq_len - ghosts.max_new_tokens, report)
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


def read_prompts(
    ghosts: TeacherModel | TeacherServer | VerifiedReward, config: Config, inputs: StageInputs, console: Console
) -> list[Question]:
    """Read and tokenize the questions of `grpo.ghosts.prompts`, without those of the test.

    What was left out is added to the reports of `inputs`.
    """
    data = config.data
    with PhaseProgress("reading questions", console) as progress:
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
