"""What every command builds from a config before it can train or evaluate: rows, tokenizer, template, model shape, and the folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cotgrpo.config import Config, ConfigError, flat, load_config, save_config
from cotgrpo.data.batches import make_batches, make_examples
from cotgrpo.data.chat import ChatTemplate, generation_stop_ids
from cotgrpo.data.template import AnyTemplate, Example, Template
from cotgrpo.data.tokenizer import load_tokenizer, train_tokenizer
from cotgrpo.data.triples import DataError, DropReport, Triple, read_triples
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.types import Student

IDENTITY = ("seed", "student", "tokenizer", "data")
"""Sections of a config that decide, with the stage's own, what a stage learns."""
FREE = ("log_every", "eval_every")
"""Settings of a stage that do not."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """A config made real.

    Attributes:
        config: where it came from.
        template: renders rows, with the tokenizer.
        decoder: the student's shape.
        train: tokenized training rows.
        test: tokenized held-out rows, supervised on rationale and answer.
        test_triples: the same rows as text, for exact match.
        reports: what was left out while reading and tokenizing, by name.
    """

    config: Config
    template: AnyTemplate
    decoder: DecoderConfig
    train: list[Example]
    test: list[Example]
    test_triples: list[Triple]
    reports: dict[str, DropReport]

    @property
    def student(self) -> Student:
        return make_student(self.decoder, len(self.template.tokenizer))

    def init_params(self) -> Any:
        """Fresh parameters, from the config's seed."""
        return init_params(self.decoder, jax.random.key(self.config.seed))

    def test_batches(self, batch_size: int) -> Any:
        """Every held-out row once, packed as in training."""
        data = self.config.data
        return make_batches(
            self.test, batch_size=batch_size, seq_len=data.seq_len, packing=data.packing, shuffle=False, num_epochs=1
        )


def set_up(config: Config, folder: Path, origin: Path | None) -> Setup:
    """Reads the rows, holds some out, makes or loads the tokenizer, and tokenizes.

    Args:
        config: the settings.
        folder: the stage's folder, which keeps the tokenizer.
        origin: the folder of the stage that the student comes from, or None for one from scratch.

    Raises:
        DataError, ConfigError: what is wrong with the data or the settings.
    """
    data = config.data
    train, test, reports = read_rows(config)
    tokenizer = tokenizer_of(config, folder, origin, train)
    template, held_out = (template_of(config, tokenizer, loss_on) for loss_on in (data.loss_on, "completion"))
    examples, reports["training sequences"] = make_examples(train, template, data.seq_len, too_long=data.too_long)
    test_examples, reports["held-out sequences"] = make_examples(test, held_out, data.seq_len, too_long=data.too_long)
    fitting = {example.source for example in test_examples}
    return Setup(
        config=config,
        template=template,
        decoder=config.student.decoder(len(tokenizer)),
        train=examples,
        test=test_examples,
        test_triples=[triple for triple in test if triple.source in fitting],
        reports=reports,
    )


def read_rows(config: Config) -> tuple[list[Triple], list[Triple], dict[str, DropReport]]:
    """(training rows, held-out rows, reports). Without test files, `test_rows` rows drawn by the seed are held out."""
    data = config.data
    if not data.train:
        raise ConfigError("data.train is empty: name at least one .jsonl or .parquet file, or a hub id.")
    train, report = read_triples(
        data.train, split=data.train_split, keep_incorrect=data.keep_incorrect, bad_rows=data.bad_rows
    )
    reports = {"training rows": report}
    if data.test:
        test, reports["held-out rows"] = read_triples(data.test, split=data.test_split, bad_rows=data.bad_rows)
    else:
        if not 0 < data.test_rows < len(train):
            raise ConfigError(
                f"data.test_rows must leave rows to train on: expected 1 to {len(train) - 1}, got {data.test_rows}."
            )
        order = np.random.default_rng(config.seed).permutation(len(train))
        chosen = {int(i) for i in order[: data.test_rows]}
        test = [triple for i, triple in enumerate(train) if i in chosen]
        reports["held-out rows"] = DropReport(read=len(test))
        for triple in test:
            report.drop("held out for testing", triple.source)
        train = [triple for i, triple in enumerate(train) if i not in chosen]
    asked = {triple.question for triple in test}
    for triple in train:
        if triple.question in asked:
            report.drop("question is in the test set", triple.source)
    train = [triple for triple in train if triple.question not in asked]
    if not train:
        raise DataError("No row is left to train on: every question is in the test set.")
    return train, test[: config.eval.rows], reports


def tokenizer_of(config: Config, folder: Path, origin: Path | None, train: list[Triple]) -> Any:
    """The tokenizer that `tokenizer.path` names; else the stage's own; else that of the student's origin; else one trained here.

    Raises:
        ConfigError: the student comes from a folder that keeps no tokenizer.
    """
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path)
    own = folder / "tokenizer"
    if (own / "tokenizer.json").is_file():
        return load_tokenizer(own)
    if origin is None:
        texts = (f"{t.question}\n{t.rationale}\n{t.answer}" for t in train)
        tokenizer = train_tokenizer(texts, vocab_size=config.tokenizer.vocab_size)
    elif (origin / "tokenizer" / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(origin / "tokenizer")
    else:
        raise ConfigError(
            f"{origin} keeps no tokenizer: run `cotgrpo sft` with this run_dir first, or name the student's folder in init_from "
            "and its tokenizer in tokenizer.path."
        )
    tokenizer.save_pretrained(own)
    return tokenizer


def template_of(config: Config, tokenizer: Any, loss_on: Any) -> AnyTemplate:
    """The template that `data.format` names. Raises DataError where the tokenizer cannot serve it."""
    data = config.data
    if data.format == "plain":
        return Template(tokenizer, data.separator, loss_on)
    path = config.tokenizer.path
    stops = () if path is None else generation_stop_ids(path)
    return ChatTemplate(tokenizer, data.reasoning, data.answer_format, data.system, loss_on, stops)


def claim_folder(folder: Path, config: Config, stage: str) -> None:
    """Makes the stage's folder and writes its `config.yaml`, or checks that the one there is the same run's.

    Settings that do not change what is learned (how often to log, evaluate and save; the other stage) may differ.

    Raises:
        ConfigError: the folder holds another run; names the settings that differ.
    """
    path = folder / "config.yaml"
    if path.is_file():
        before, now = (identity(c, stage) for c in (load_config(path), config))
        differing = [
            f"{key} ({before.get(key)!r} there, {now[key]!r} now)" for key in now if before.get(key) != now[key]
        ]
        if differing:
            raise ConfigError(
                f"{folder} holds a run with another config: {'; '.join(differing)}. "
                "Choose another run_dir, or give the same settings to go on with that run."
            )
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, path)


def identity(config: Config, stage: str) -> dict[str, Any]:
    """The settings that decide what a stage learns, by dotted key."""
    whole = dataclasses.asdict(config)
    own = {key: value for key, value in whole[stage].items() if key not in FREE}
    return dict(flat({name: whole[name] for name in IDENTITY} | {stage: own}))
