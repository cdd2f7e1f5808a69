"""Read a stage's inputs from its config: rows, tokenizer, template, the student's shape, and the run folder."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
from rich.console import Console

from cotgrpo.config import Config, ConfigError, differences, flat, load_config, save_config, tree_of
from cotgrpo.data.batches import make_batches, make_examples
from cotgrpo.data.chat import ChatTemplate, generation_stop_ids
from cotgrpo.data.questions import Question, make_held_out, question_text, read_questions
from cotgrpo.data.reply_format import ReplyFormat
from cotgrpo.data.rows import DropReport
from cotgrpo.data.sources import DataError, as_list, files_of
from cotgrpo.data.streaming import StreamedTriples, WindowReader
from cotgrpo.data.template import AnyTemplate, Example, Template, with_system
from cotgrpo.data.tokenizer import find_tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from cotgrpo.data.triples import Triple
from cotgrpo.evaluation.accuracy import ExactMatch, SampledMatch
from cotgrpo.evaluation.held_out import HeldOut, QuestionSet
from cotgrpo.evaluation.replies import Draws
from cotgrpo.identity.checks import check_inputs, check_measured, make_record, save_inputs
from cotgrpo.identity.known import find_known
from cotgrpo.identity.record import InputsRecord
from cotgrpo.identity.rows import StageRows, read_stage_rows, read_test_alone, train_files
from cotgrpo.identity.rows import read_test_rows as read_test_rows
from cotgrpo.identity.split import draw_split
from cotgrpo.logs.progress import PhaseProgress
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.models.huggingface.config import check_exportable
from cotgrpo.models.huggingface.families import ModelError
from cotgrpo.models.huggingface.folder import ModelFolder
from cotgrpo.models.huggingface.pinned import keep_student, keep_tokenizer, reopen, reopen_tokenizer
from cotgrpo.models.huggingface.weights import read_weights
from cotgrpo.models.lora import with_adapters
from cotgrpo.models.quantized.kernel import Quantization
from cotgrpo.models.quantized.quantize import check_blocks, require_qwix
from cotgrpo.sharding import jit_eval
from cotgrpo.teachers.endpoint import ConnectionSettings
from cotgrpo.terminal import say
from cotgrpo.train_steps import make_eval_step
from cotgrpo.training.mesh import abstract_on_mesh, check_model, init_on_mesh, run_mesh
from cotgrpo.types import Params, Student

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECTIONS_OF_A_RUN = ("seed", "student", "lora", "tokenizer", "data")
"""Sections of a config that decide what a stage learns, together with the stage's own section."""
FREE_SETTINGS = ("log_every", "eval_every", "eval_accuracy", "max_entropy_growth", "reward_gain")
"""Settings of a stage that do not change what it learns."""
FREE_DATA_SETTINGS = ("num_workers",)
"""The same of its rows."""
CONNECTION = tuple(field.name for field in dataclasses.fields(ConnectionSettings))
FREE_SERVER_SETTINGS = (
    *(f"grpo.ghosts.{name}" for name in CONNECTION),
    *(f"grpo.rollouts.{name}" for name in (*CONNECTION, "folder", "largest_gap")),
)
"""The same of a live ghost on a server: how it is reached. It is known by what it answers."""
TOKENIZER_ROWS, TOKENIZER_CHARACTERS = 50_000, 10_000_000
"""Most rows and characters that a tokenizer is trained on if the rows are streamed."""
MEMORY_OF_A_BYTE = 6
"""Memory that a byte of a file of rows takes, about: as text and as tokens."""
QUIET = Console(quiet=True)

LossOn = Literal["sequence", "completion"]


@dataclasses.dataclass(frozen=True)
class Model:
    """The student of a config, without its rows.

    Attributes:
        config: the settings it comes from.
        tokenizer: its tokenizer.
        decoder: its shape, and how it is stored and computed.
        vocab_size: the ids that the tokenizer uses. Higher ids, of a padded embedding, are never drawn.
        source: the folder of a pretrained student, or None for one from scratch.
        tokenizer_from: folder or hub id of its tokenizer, if `tokenizer.path` names it.
    """

    config: Config
    tokenizer: PreTrainedTokenizerBase
    decoder: DecoderConfig
    vocab_size: int
    source: ModelFolder | None = None
    tokenizer_from: str | None = None

    @property
    def student(self) -> Student:
        return with_adapters(make_student(self.decoder, self.vocab_size))

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        return run_mesh(self.config)

    def abstract_params(self) -> Params:
        """Return shapes, types and shardings of the parameters. No weights are read."""
        shapes = jax.eval_shape(functools.partial(init_params, self.decoder), jax.random.key(0))
        return abstract_on_mesh(shapes, self.mesh)

    def first_params(self, quantization: Quantization | None = None) -> Params:
        """Return the pretrained weights, or random ones from the config's seed. An adapter's are left out.

        Args:
            quantization: how the kernels are quantized while they are read; None: they are not.

        Raises:
            ModelError: weights that cannot be read.
        """
        if self.source is None:
            check_exportable(self.decoder)
            init = functools.partial(init_params, self.decoder)
            return init_on_mesh(self.mesh, init, jax.random.key(self.config.seed))
        c = self.decoder
        types: Any = {"dtype": c.param_dtype, "compute_dtype": c.dtype, "remat": c.remat}
        return read_weights(self.source, mesh=self.mesh, quantization=quantization, **types).params

    def template(self, loss_on: LossOn) -> AnyTemplate:
        stops_from = self.tokenizer_from if self.source is None else self.source.folder
        return template_of(self.config, self.tokenizer, loss_on, stops_from)


@dataclasses.dataclass(frozen=True)
class StageInputs:
    """What a stage reads.

    Attributes:
        model: the student.
        template: renders rows with the tokenizer.
        train: tokenized training rows; empty if a model is only measured.
        train_triples: the same rows as text.
        test: tokenized correct replies of held-out rows, supervised on rationale and answer. There may be none.
        test_questions: all held-out rows, for exact match.
        reports: what was left out while reading and tokenizing, by name.
        stream: reads the training rows during the training, if `data.streaming` is set; `train` is then empty.
        rows: the rows as they were read, and how they were held out.
        record: what the run records of the inputs.
        prompts: further questions that the student replies to, once they are read.
        sets: the questions of further test sets, by name.
    """

    model: Model
    template: AnyTemplate
    train: list[Example]
    train_triples: list[Triple]
    test: list[Example]
    test_questions: list[Question]
    reports: dict[str, DropReport]
    stream: WindowReader | None = None
    rows: StageRows | None = None
    record: InputsRecord | None = None
    prompts: list[Question] = dataclasses.field(default_factory=list)
    sets: dict[str, list[Question]] = dataclasses.field(default_factory=dict)

    @property
    def split_text(self) -> str:
        """How the held-out rows were chosen, in one line."""
        return "" if self.rows is None else self.rows.split_text

    def held_out(self, batch_size: int, console: Console) -> HeldOut:
        """Return what measures the student on the held-out rows. The loss takes `batch_size` packed rows at a time."""
        model, data = self.model, self.model.config.data
        asked = self.question_set(self.test_questions)
        reference_batches = functools.partial(
            make_batches,
            self.test,
            batch_size=batch_size,
            seq_len=data.seq_len,
            packing=data.packing,
            shuffle=False,
            num_epochs=1,
        )
        eval_step = jit_eval(make_eval_step(model.student), model.mesh)
        phase = lambda title, rows: PhaseProgress(title, console, rows)
        sets = {name: self.question_set(questions) for name, questions in self.sets.items()}
        return HeldOut(
            asked.exact_match, eval_step, reference_batches, len(self.test), console, phase, asked.sampled, sets
        )

    def question_set(self, questions: list[Question]) -> QuestionSet:
        """Return what asks the student these questions, as the section `eval` has it."""
        model, settings = self.model, self.model.config.eval
        asked = (model.decoder, self.template, questions)
        sizes: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "batch_size": settings.batch_size,
            "vocab_size": model.vocab_size,
            "mesh": model.mesh,
        }
        draws = Draws(settings.samples, settings.temperature, settings.top_p, settings.seed)
        sampled = SampledMatch(*asked, draws, settings.ks, **sizes) if settings.samples else None
        return QuestionSet(ExactMatch(*asked, **sizes), sampled)


def load_inputs(config: Config, folder: Path, origin: Path | None, console: Console = QUIET) -> StageInputs:
    """Read the rows, hold some out, train or load the tokenizer, and tokenize.

    Args:
        config: the settings.
        folder: the stage's folder, which keeps a tokenizer that was trained.
        origin: the folder of the stage that the student comes from; None if it is pretrained or from scratch.
        console: where the progress goes.

    Raises:
        DataError, ConfigError, ModelError: problems of the data, the settings or the pretrained student.
    """
    data = config.data
    say(console, f"reading {', '.join(map(str, as_list(train_files(config))))}")
    known = find_known(config, folder, origin)
    if not data.streaming:
        warn_of_memory(train_files(config), data.train_split, console)
    rows = read_stage_rows(config, console, known)
    # A tokenizer for streamed rows is trained on the first rows of the first epoch.
    sample = rows.train if rows.stream is None else streamed_sample(rows.stream, config.seed)
    model = model_of(config, folder, origin, sample, console)
    record = make_record(config, known, rows, model.tokenizer, model.decoder, model.source, origin)
    for line in check_inputs(config, known, rows, record):
        say(console, line, style="yellow")
    template = model.template(data.loss_on)
    inputs = StageInputs(model, template, [], [], [], [], rows.reports, rows=rows, record=record)
    if rows.stream is not None:
        stream = WindowReader(rows.stream, template, data.seq_len, data.too_long, data.packing)
        return with_test_rows(dataclasses.replace(inputs, stream=stream), rows.test, console)
    with PhaseProgress("tokenizing rows", console, len(rows.train)) as progress:
        examples, rows.reports["training sequences"] = make_examples(
            rows.train,
            template,
            data.seq_len,
            too_long=data.too_long,
            bad_rows=data.bad_rows,
            progress=progress,
            workers=data.num_workers,
        )
    fitting = {example.source for example in examples}
    triples = [triple for triple in rows.train if triple.source in fitting]
    return with_test_rows(dataclasses.replace(inputs, train=examples, train_triples=triples), rows.test, console)


def streamed_sample(stream: StreamedTriples, seed: int) -> Iterator[Triple]:
    """Return the rows that a tokenizer is trained on."""
    return stream.sample(seed, rows=TOKENIZER_ROWS, characters=TOKENIZER_CHARACTERS)


def warn_of_memory(names: list[str] | str, split: str | None, console: Console) -> None:
    """Print that the files may not fit into this machine's memory, and what to do, if so."""
    files = [file for name in as_list(names) for file in files_of(name, split) if isinstance(file, Path)]
    needed, there = MEMORY_OF_A_BYTE * sum(file.stat().st_size for file in files), physical_memory()
    if needed > there / 2:
        say(
            console,
            f"These rows may take {needed / 1e9:.1f} GB of memory, of {there / 1e9:.1f} GB: data.streaming true reads "
            "them during the training instead.",
        )


def physical_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load_eval_inputs(
    config: Config, console: Console = QUIET, folder: Path | None = None, origin: Path | None = None
) -> StageInputs:
    """Read the held-out rows only, for the model at `student.path` or the student of a run.

    These are the rows of `data.test`, or those that a run would hold out.

    Args:
        config: the settings.
        console: where the progress goes.
        folder: the folder of a stage whose student is measured; None: the model at `student.path`.
        origin: as in `load_inputs`.

    Raises:
        DataError, ConfigError, ModelError: as `load_inputs` does.
    """
    if not (config.data.test or config.data.train):
        raise ConfigError(
            "data.test is empty: name at least one .jsonl or .parquet file of held-out rows, or a hub id."
        )
    known = find_known(config, folder, origin)
    rows = (read_test_alone if config.data.test else read_stage_rows)(config, console, known)
    model = pretrained_model(config) if folder is None else model_of(config, folder, origin, [])
    record = make_record(config, known, rows, model.tokenizer, model.decoder, model.source, None)
    for line in [*check_measured(config, known, rows, record), rows.split_text]:
        say(console, line)
    template = model.template(config.data.loss_on)
    inputs = StageInputs(model, template, [], [], [], [], rows.reports, rows=rows, record=record)
    return with_test_rows(inputs, rows.test, console)


def with_test_rows(inputs: StageInputs, test: list[Question], console: Console) -> StageInputs:
    """Return the inputs with the held-out rows that fit into the window, at most `eval.rows`."""
    test = test[: inputs.model.config.eval.rows]
    model, data = inputs.model, inputs.model.config.data
    with PhaseProgress("tokenizing held-out rows", console, len(test)) as progress:
        questions, replies, reports = make_held_out(
            test,
            model.template("completion"),
            data.seq_len,
            too_long=data.too_long,
            bad_rows=data.bad_rows,
            progress=progress,
        )
    sets, set_reports = read_sets(inputs, console)
    reports = inputs.reports | reports | set_reports
    return dataclasses.replace(inputs, test=replies, test_questions=questions, reports=reports, sets=sets)


def read_sets(inputs: StageInputs, console: Console) -> tuple[dict[str, list[Question]], dict[str, DropReport]]:
    """Return the questions of the test sets in `eval.sets` by name, at most `eval.rows` each, and the reports.

    Raises:
        DataError: a set that cannot be read, or has no question with a right answer. The message names it.
    """
    config, sets, reports = inputs.model.config, dict[str, list[Question]](), dict[str, DropReport]()
    data, template = config.data, inputs.model.template("completion")
    for name, files in config.eval.sets.items():
        try:
            with PhaseProgress(f"reading {name}", console) as progress:
                read, report = read_questions(
                    files,
                    split=data.test_split,
                    bad_rows=data.bad_rows,
                    columns=data.columns,
                    row_function=data.row_function,
                    require_columns=False,
                    folder_split="test",
                    progress=progress,
                )
            # Without their references: the held-out loss is that of data.test.
            asked = [dataclasses.replace(question, reference=None) for question in read[: config.eval.rows]]
            sets[name], _, found = make_held_out(
                asked, template, data.seq_len, too_long=data.too_long, bad_rows=data.bad_rows
            )
        except DataError as error:
            raise DataError(f"eval.sets.{name}: {error}") from error
        reports |= {f"test set {name}": report, f"test set {name}, questions": found["held-out questions"]}
    return sets, reports


def read_train_and_test(
    config: Config, console: Console = QUIET
) -> tuple[list[Triple], list[Question], dict[str, DropReport]]:
    """Return training rows, held-out rows and reports.

    Without test files, the run's split holds rows out. If the run has none, it is drawn as its first stage would.
    """
    rows = read_stage_rows(config, console, find_known(config))
    return rows.train, rows.test[: config.eval.rows], rows.reports


def draw_test_rows(questions: list[Question], count: int, seed: int) -> list[Question]:
    """Hold out `count` of the questions by a salted hash of their texts, and keep their order.

    Rows that ask the same question are held out together. Questions with a wrong reply are drawn as often as others.

    Raises:
        ConfigError: none would be left to train on.
    """
    split = draw_split(questions, count, seed)
    return [question for question in questions if question_text(question) in split]


def model_of(
    config: Config,
    folder: Path,
    origin: Path | None,
    train: Iterable[Triple],
    console: Console = QUIET,
    *,
    copy: bool = False,
) -> Model:
    """Return the student that a config describes. Arguments are those of `load_inputs` and `tokenizer_of`.

    A pretrained student is the one that the stage or its origin has pinned. With `copy`, config and tokenizer are the
    copies in the run, and the originals are not looked at.
    """
    stages = [folder] if origin is None else [folder, origin]
    if config.student.path is not None:
        return pretrained_model(config, stages, copy=copy)
    tokenizer_from = None
    if config.tokenizer.path is not None:
        tokenizer_from = reopen_tokenizer(config.tokenizer.path, stages, copy=copy)
        tokenizer = load_tokenizer(tokenizer_from)
    else:
        tokenizer = tokenizer_of(config, folder, origin, train, console)
    decoder = config.student.computed(config.student.decoder(len(tokenizer)), jax.default_backend())
    check_model(config, decoder)
    model = Model(config, tokenizer, decoder, len(tokenizer), tokenizer_from=tokenizer_from)
    if not copy:
        check_quantization(model)
    return model


def pretrained_model(config: Config, stages: Sequence[Path] = (), *, copy: bool = False) -> Model:
    """Return the model at `student.path`, as one of these stages has pinned it. No weights are read.

    Its tokenizer is that of its folder, unless `tokenizer.path` names another.

    Raises:
        ModelError, DataError: not a model folder, no tokenizer, or a tokenizer of another model.
    """
    settings, path = config.student, config.tokenizer.path
    assert settings.path is not None
    source = reopen(settings.path, stages, copy=copy)
    tokenizer_from = None if path is None else reopen_tokenizer(path, stages, copy=copy)
    tokenizer = load_tokenizer(source.tokenizer_folder if tokenizer_from is None else tokenizer_from)
    if path is not None and (source.tokenizer_folder / "tokenizer.json").is_file():
        check_same_tokens(tokenizer, load_tokenizer(source.tokenizer_folder), path, settings.path)
    decoder = settings.computed(source.config, jax.default_backend())
    check_model(config, decoder)
    size = source.vocab_size(tokenizer.get_vocab(), settings.path if path is None else path)
    model = Model(config, tokenizer, decoder, size, source, tokenizer_from)
    if not copy:
        check_quantization(model)
    return model


def check_quantization(model: Model) -> None:
    """Raise ConfigError unless the frozen kernels can be quantized as `lora` has it."""
    lora = model.config.lora
    if lora is None or lora.quantization is None:
        return
    if model.decoder.experts is not None:
        raise ConfigError(
            f"lora.quantize_base {lora.quantize_base} quantizes projections and not experts, which are most of this "
            "student's weights. Set it to none, or take a student without experts."
        )
    try:
        require_qwix()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        check_blocks(model.abstract_params(), lora.quantization)
    except ValueError as error:
        raise ConfigError(f"lora.block_size: {error}") from error


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, path: str, model: str) -> None:
    """Raise ModelError if an id is another token than in the model's own tokenizer. Control tokens may be renamed."""
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    for token, i in own.get_vocab().items():
        if tokens.get(i, token) != token and i not in own.added_tokens_decoder:
            raise ModelError(
                f"The tokenizer in {path} is that of another model: its token {i} is {tokens[i]!r}, and {token!r} in "
                f"that of {model}. Leave tokenizer.path out, or name one that was made from the model's own."
            )


def tokenizer_of(
    config: Config, folder: Path, origin: Path | None, train: Iterable[Triple], console: Console = QUIET
) -> PreTrainedTokenizerBase:
    """Return the first tokenizer that exists: of `tokenizer.path`, of the stage, of its origin. Otherwise train one.

    Raises:
        ConfigError: the student comes from a folder that keeps no tokenizer.
    """
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path)
    if (folder / "config.yaml").is_file() and (own := find_tokenizer(folder / "tokenizer")) is not None:
        return own
    if origin is None and train != []:
        chat, reply_format = config.data.format == "chat", ReplyFormat(config.data.reasoning, config.data.answer_format)
        answer = reply_format.write_answer if chat else str
        texts = (f"{with_system(t.question, t.system)}\n{t.rationale}\n{answer(t.answer)}" for t in train)
        total = len(train) if isinstance(train, list) else None
        with PhaseProgress("training a tokenizer", console, total) as progress:
            return train_tokenizer(progress.over(texts), vocab_size=config.tokenizer.vocab_size, chat=chat)
    origin = folder if origin is None else origin
    if (kept := find_tokenizer(origin / "tokenizer")) is not None:
        return kept
    raise ConfigError(
        f"{origin} keeps no tokenizer that can be read: run `cotgrpo sft` with this run_dir, which makes a lost one "
        "again, or name the student's folder in init_from and its tokenizer in tokenizer.path."
    )


def template_of(
    config: Config, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, stops_from: str | Path | None = None
) -> AnyTemplate:
    """Return the template that `data.format` names. Raises DataError if it does not work with the tokenizer.

    The stop tokens of a chat are those of the model at `stops_from`; None: of `student.path` or `tokenizer.path`.
    """
    data, verifier = config.data, config.verify.verifier
    if data.format == "plain":
        return Template(tokenizer, data.separator, loss_on, verifier)
    path = stops_from or config.student.path or config.tokenizer.path
    stops = () if path is None else generation_stop_ids(path)
    return ChatTemplate(
        tokenizer, data.reasoning, data.answer_format, data.system, loss_on, stops, data.turns, verifier
    )


def check_same_run(folder: Path, config: Config, stage: str) -> None:
    """Check that the stage's folder is free, or holds the same run.

    Settings that do not change what is learned may differ: how often to log, evaluate and save, and the other stage.

    Raises:
        ConfigError: the folder holds another run. The message names the settings that differ.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return
    before, now = (run_identity(c, stage) for c in (load_config(path), config))
    differing = differences(before, now)
    if differing:
        raise ConfigError(
            f"{folder} holds a run with another config: {'; '.join(differing)}. "
            "Choose another run_dir, or give the same settings to resume that run."
        )


def run_identity(config: Config, stage: str) -> dict[str, Any]:
    """Return the settings that decide what a stage learns, by dotted key."""
    whole = tree_of(config)
    own = {key: value for key, value in whole[stage].items() if key not in FREE_SETTINGS}
    data = {key: value for key, value in whole["data"].items() if key not in FREE_DATA_SETTINGS}
    sections = {name: whole[name] for name in SECTIONS_OF_A_RUN} | {"data": data, stage: own}
    if stage == "grpo":  # it may learn from verdicts
        sections["verify"] = whole["verify"]
    settings = flat(sections, leaves=("data.columns", "grpo.objective.options", "grpo.ghosts.teachers"))
    return {key: value for key, value in settings if key not in FREE_SERVER_SETTINGS}


def claim_folder(folder: Path, inputs: StageInputs) -> None:
    """Make the folder this run's: write the record of its inputs, its own tokenizer if it has one, and `config.yaml`.

    Of a pretrained student, all but the weights is copied.

    Called only after the rows and the student were read without an error. A command with a corrected setting is then
    not another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = inputs.model
    if inputs.record is not None and inputs.rows is not None:
        save_inputs(inputs.record.with_trained(inputs.prompts), inputs.rows, folder)
    if model.config.tokenizer.path is None and model.source is None:
        save_tokenizer(model.tokenizer, folder / "tokenizer")
    if model.source is not None:
        keep_student(folder, str(model.config.student.path), model.source)
    if model.config.tokenizer.path is not None:
        keep_tokenizer(folder, model.config.tokenizer.path)
    save_config(dataclasses.replace(model.config, allow_changed=[]), folder / "config.yaml")
