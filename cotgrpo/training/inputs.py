"""What every command builds from a config before it can train or evaluate: rows, tokenizer, template, model shape, and the folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cotgrpo.config.files import flat, load_config, save_config
from cotgrpo.config.settings import Config, ConfigError
from cotgrpo.data.batches import make_batches, make_examples
from cotgrpo.data.chat import ChatTemplate, generation_stop_ids
from cotgrpo.data.questions import Question, make_held_out, questions_in, read_questions
from cotgrpo.data.sources import as_list, rows_of
from cotgrpo.data.template import AnyTemplate, Example, Template, with_system
from cotgrpo.data.tokenizer import load_tokenizer, train_tokenizer
from cotgrpo.data.triples import DataError, DropReport, Triple, check_usable, triples_in
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.models.huggingface.families import ModelError
from cotgrpo.models.huggingface.folder import ModelFolder, open_folder
from cotgrpo.models.huggingface.weights import load_pretrained
from cotgrpo.training.mesh import check_model, laid_out, made_on, run_mesh
from cotgrpo.types import Student

IDENTITY = ("seed", "student", "lora", "tokenizer", "data")
"""Sections of a config that decide, with the stage's own, what a stage learns."""
FREE = ("log_every", "eval_every", "max_entropy_growth")
"""Settings of a stage that do not."""


@dataclasses.dataclass(frozen=True)
class Model:
    """The student of a config, its rows aside.

    Attributes:
        config: where it came from.
        tokenizer: its tokenizer.
        decoder: its shape, and how it is stored and computed.
        vocab_size: the ids that the tokenizer uses; those beyond, of a padded embedding, are never drawn.
        source: the folder of a pretrained student, or None for one from scratch.
    """

    config: Config
    tokenizer: Any
    decoder: DecoderConfig
    vocab_size: int
    source: ModelFolder | None = None

    @property
    def student(self) -> Student:
        return make_student(self.decoder, self.vocab_size)

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        return run_mesh(self.config)

    def abstract_params(self) -> Any:
        """Shapes, types and places of the parameters, for which no weights are read."""
        shapes = jax.eval_shape(functools.partial(init_params, self.decoder), jax.random.key(0))
        return laid_out(shapes, self.mesh)

    def first_params(self) -> Any:
        """The pretrained weights, or fresh ones from the config's seed. Raises ModelError for weights that cannot be read."""
        if self.source is None:
            make = functools.partial(init_params, self.decoder)
            return made_on(self.mesh, make, jax.random.key(self.config.seed))
        c = self.decoder
        return load_pretrained(
            self.source.folder, c.param_dtype, mesh=self.mesh, compute_dtype=c.dtype, remat=c.remat
        ).params

    def template(self, loss_on: Any) -> AnyTemplate:
        return template_of(self.config, self.tokenizer, loss_on)


@dataclasses.dataclass(frozen=True)
class StageInputs:
    """A config made real.

    Attributes:
        model: the student.
        template: renders rows, with the tokenizer.
        train: tokenized training rows; none where a model is only measured.
        train_triples: the same rows as text.
        test: tokenized correct replies of held-out rows, supervised on rationale and answer; maybe none.
        test_questions: all held-out rows, for exact match.
        reports: what was left out while reading and tokenizing, by name.
    """

    model: Model
    template: AnyTemplate
    train: list[Example]
    train_triples: list[Triple]
    test: list[Example]
    test_questions: list[Question]
    reports: dict[str, DropReport]

    def test_batches(self, batch_size: int) -> Any:
        """Every correct held-out reply once, packed as in training."""
        data = self.model.config.data
        return make_batches(
            self.test, batch_size=batch_size, seq_len=data.seq_len, packing=data.packing, shuffle=False, num_epochs=1
        )


def load_inputs(config: Config, folder: Path, origin: Path | None) -> StageInputs:
    """Reads the rows, holds some out, makes or loads the tokenizer, and tokenizes.

    Args:
        config: the settings.
        folder: the stage's folder, which keeps a tokenizer that was trained.
        origin: the folder of the stage that the student comes from, or None for one from scratch or pretrained.

    Raises:
        DataError, ConfigError, ModelError: what is wrong with the data, the settings or the pretrained student.
    """
    data = config.data
    train, test, reports = read_rows(config)
    model = model_of(config, folder, origin, train)
    template = model.template(data.loss_on)
    examples, reports["training sequences"] = make_examples(train, template, data.seq_len, too_long=data.too_long)
    fitting = {example.source for example in examples}
    triples = [triple for triple in train if triple.source in fitting]
    return with_test_rows(StageInputs(model, template, examples, triples, [], [], reports), test)


def load_eval_inputs(config: Config) -> StageInputs:
    """The held-out rows alone, for the model at `student.path` as it is: those of `data.test`, or those that a run would hold out.

    Raises:
        DataError, ConfigError, ModelError: as `load_inputs` does.
    """
    if config.data.test:
        test, report = read_test_rows(config)
        test, reports = test[: config.eval.rows], {"held-out rows": report}
    elif config.data.train:
        _, test, reports = read_rows(config)
    else:
        raise ConfigError(
            "data.test is empty: name at least one .jsonl or .parquet file of held-out rows, or a hub id."
        )
    model = pretrained_model(config)
    return with_test_rows(StageInputs(model, model.template(config.data.loss_on), [], [], [], [], reports), test)


def with_test_rows(setup: StageInputs, test: list[Question]) -> StageInputs:
    """The setup with the held-out rows that fit into the window."""
    model, data = setup.model, setup.model.config.data
    questions, replies, reports = make_held_out(
        test, model.template("completion"), data.seq_len, too_long=data.too_long
    )
    return dataclasses.replace(setup, test=replies, test_questions=questions, reports=setup.reports | reports)


def read_test_rows(config: Config) -> tuple[list[Question], DropReport]:
    """The rows of `data.test`, and what was left out."""
    data = config.data
    return read_questions(data.test, split=data.test_split, bad_rows=data.bad_rows)


def read_rows(config: Config) -> tuple[list[Triple], list[Question], dict[str, DropReport]]:
    """(training rows, held-out rows, reports). Without test files, `test_rows` rows drawn by the seed are held out."""
    data = config.data
    if not data.train:
        raise ConfigError("data.train is empty: name at least one .jsonl or .parquet file, or a hub id.")
    names, split = as_list(data.train), data.train_split
    rows = list(rows_of(names, split))
    train, report = triples_in(rows, split=split, bad_rows=data.bad_rows, keep_incorrect=data.keep_incorrect)
    check_usable(train, names, report)
    reports = {"training rows": report}
    if data.test:
        test, reports["held-out rows"] = read_test_rows(config)
    else:
        # A bad row is an error by now; one with a wrong reply may lack the right answer.
        questions, _ = questions_in(rows, split=split, bad_rows="drop")
        test = drawn(questions, data.test_rows, config.seed)
        reports["held-out rows"] = DropReport(read=len(test))
        train = left_out(train, {q.source for q in test}, lambda t: t.source, "held out for testing", report)
    asked = {question.question for question in test}
    train = left_out(train, asked, lambda t: t.question, "question is in the test set", report)
    if not train:
        raise DataError("No row is left to train on: every question is in the test set.")
    return train, test[: config.eval.rows], reports


def drawn(questions: list[Question], count: int, seed: int) -> list[Question]:
    """So many of the questions, those with a wrong reply too, in their order. Raises ConfigError where none would be left."""
    if not 0 < count < len(questions):
        raise ConfigError(
            f"data.test_rows must leave rows to train on: expected 1 to {len(questions) - 1}, got {count}."
        )
    order = np.random.default_rng(seed).permutation(len(questions))
    chosen = {int(i) for i in order[:count]}
    return [question for i, question in enumerate(questions) if i in chosen]


def left_out(
    triples: list[Triple], known: set[str], text: Callable[[Triple], str], reason: str, report: DropReport
) -> list[Triple]:
    """The triples whose text is not a known one; the others are counted in the report."""
    for triple in triples:
        if text(triple) in known:
            report.drop(reason, triple.source)
    return [triple for triple in triples if text(triple) not in known]


def model_of(config: Config, folder: Path, origin: Path | None, train: list[Triple]) -> Model:
    """The student that a config describes; arguments as in `load_inputs` and `tokenizer_of`."""
    if config.student.path is not None:
        return pretrained_model(config)
    tokenizer = tokenizer_of(config, folder, origin, train)
    decoder = config.student.computed(config.student.decoder(len(tokenizer)), jax.default_backend())
    check_model(config, decoder)
    return Model(config, tokenizer, decoder, len(tokenizer))


def pretrained_model(config: Config) -> Model:
    """The model at `student.path`, with the tokenizer of its folder unless `tokenizer.path` names another. No weights are read.

    Raises:
        ModelError, DataError: a folder that is none, no tokenizer, or one of another model.
    """
    settings, path = config.student, config.tokenizer.path
    assert settings.path is not None
    source = open_folder(settings.path)
    tokenizer = load_tokenizer(source.folder if path is None else path)
    if path is not None and (source.folder / "tokenizer.json").is_file():
        check_same_tokens(tokenizer, load_tokenizer(source.folder), path, settings.path)
    decoder = settings.computed(source.config, jax.default_backend())
    check_model(config, decoder)
    size = source.vocab_size(tokenizer.get_vocab(), settings.path if path is None else path)
    return Model(config, tokenizer, decoder, size, source)


def check_same_tokens(tokenizer: Any, own: Any, path: str, model: str) -> None:
    """Raises ModelError where a tokenizer gives an id another token than the model's own does; control tokens may have other names."""
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    for token, i in own.get_vocab().items():
        if tokens.get(i, token) != token and i not in own.added_tokens_decoder:
            raise ModelError(
                f"The tokenizer in {path} is that of another model: its token {i} is {tokens[i]!r}, and {token!r} in that of {model}. "
                "Leave tokenizer.path out, or name one that was made from the model's own."
            )


def tokenizer_of(config: Config, folder: Path, origin: Path | None, train: list[Triple]) -> Any:
    """The tokenizer that `tokenizer.path` names; else the stage's own; else that of the student's origin; else one trained here.

    Raises:
        ConfigError: the student comes from a folder that keeps no tokenizer.
    """
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path)
    if (folder / "config.yaml").is_file() and (folder / "tokenizer" / "tokenizer.json").is_file():
        return load_tokenizer(folder / "tokenizer")
    if origin is None:
        texts = (f"{with_system(t.question, t.system)}\n{t.rationale}\n{t.answer}" for t in train)
        return train_tokenizer(texts, vocab_size=config.tokenizer.vocab_size)
    if (origin / "tokenizer" / "tokenizer.json").is_file():
        return load_tokenizer(origin / "tokenizer")
    raise ConfigError(
        f"{origin} keeps no tokenizer: run `cotgrpo sft` with this run_dir first, or name the student's folder in init_from "
        "and its tokenizer in tokenizer.path."
    )


def template_of(config: Config, tokenizer: Any, loss_on: Any) -> AnyTemplate:
    """The template that `data.format` names. Raises DataError where the tokenizer cannot serve it."""
    data = config.data
    if data.format == "plain":
        return Template(tokenizer, data.separator, loss_on)
    path = config.student.path or config.tokenizer.path
    stops = () if path is None else generation_stop_ids(path)
    return ChatTemplate(tokenizer, data.reasoning, data.answer_format, data.system, loss_on, stops)


def check_folder(folder: Path, config: Config, stage: str) -> None:
    """Whether the stage's folder is free, or holds the same run.

    Settings that do not change what is learned (how often to log, evaluate and save; the other stage) may differ.

    Raises:
        ConfigError: the folder holds another run; names the settings that differ.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return
    before, now = (identity(c, stage) for c in (load_config(path), config))
    differing = [f"{key} ({before.get(key)!r} there, {now[key]!r} now)" for key in now if before.get(key) != now[key]]
    if differing:
        raise ConfigError(
            f"{folder} holds a run with another config: {'; '.join(differing)}. "
            "Choose another run_dir, or give the same settings to go on with that run."
        )


def claim_folder(folder: Path, model: Model) -> None:
    """Makes the folder this run's: writes the tokenizer, where it is nobody else's, and then `config.yaml`.

    Only once the rows and the student are known to be good: the command with a setting mended is not another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model.config.tokenizer.path is None and model.source is None:
        model.tokenizer.save_pretrained(folder / "tokenizer")
    save_config(model.config, folder / "config.yaml")


def identity(config: Config, stage: str) -> dict[str, Any]:
    """The settings that decide what a stage learns, by dotted key."""
    whole = dataclasses.asdict(config)
    own = {key: value for key, value in whole[stage].items() if key not in FREE}
    return dict(flat({name: whole[name] for name in IDENTITY} | {stage: own}))
