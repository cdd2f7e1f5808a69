"""What every command builds from a config before it can train or evaluate: rows, tokenizer, template, model shape."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cotgrpo.config import Config, ConfigError, save_config
from cotgrpo.data.batches import make_batches, make_examples
from cotgrpo.data.template import Example, Template
from cotgrpo.data.tokenizer import load_tokenizer, train_tokenizer
from cotgrpo.data.triples import DataError, DropReport, Triple, read_triples
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.types import Student

TOKENIZER_FOLDER = "tokenizer"


@dataclasses.dataclass(frozen=True)
class Setup:
    """A config made real.

    Attributes:
        config: where it came from.
        template: renders rows, with the tokenizer.
        decoder: the student's shape.
        train, test: tokenized rows.
        test_triples: the held-out rows, for exact match.
        reports: what was left out while reading and tokenizing, by name.
    """

    config: Config
    template: Template
    decoder: DecoderConfig
    train: list[Example]
    test: list[Example]
    test_triples: list[Triple]
    reports: dict[str, DropReport]

    @property
    def vocab_size(self) -> int:
        return len(self.template.tokenizer)

    @property
    def student(self) -> Student:
        return make_student(self.decoder, self.vocab_size)

    def init_params(self) -> Any:
        """Fresh parameters, from the config's seed."""
        return init_params(self.decoder, jax.random.key(self.config.seed))

    def test_batches(self, batch_size: int) -> Any:
        """Every held-out row once, packed as in training."""
        data = self.config.data
        return make_batches(
            self.test, batch_size=batch_size, seq_len=data.seq_len, packing=data.packing, shuffle=False, num_epochs=1
        )


def set_up(config: Config) -> Setup:
    """Reads the rows, holds some out, makes or loads the tokenizer, and tokenizes.

    The tokenizer of a run lies in `run_dir/tokenizer`, is trained once, and serves every stage.

    Raises:
        DataError, ConfigError: what is wrong with the data or the settings.
    """
    train, test, reports = read_rows(config)
    template = Template(tokenizer_of(config, train), config.data.separator, config.data.loss_on)
    examples, too_long = make_examples(train, template, config.data.seq_len, too_long=config.data.too_long)
    test_examples, test_too_long = make_examples(test, template, config.data.seq_len, too_long=config.data.too_long)
    fitting = {example.source for example in test_examples}
    return Setup(
        config=config,
        template=template,
        decoder=config.student.decoder(len(template.tokenizer)),
        train=examples,
        test=test_examples,
        test_triples=[triple for triple in test if triple.source in fitting],
        reports=reports | {"train tokens": too_long, "test tokens": test_too_long},
    )


def read_rows(config: Config) -> tuple[list[Triple], list[Triple], dict[str, DropReport]]:
    """(training rows, held-out rows, reports). Without test files, `test_rows` rows drawn by the seed are held out."""
    data = config.data
    options: dict[str, Any] = {"bad_rows": data.bad_rows}
    train, train_report = read_triples(
        data.train, split=data.train_split, keep_incorrect=data.keep_incorrect, **options
    )
    reports = {"train rows": train_report}
    if data.test:
        test, reports["test rows"] = read_triples(data.test, split=data.test_split, **options)
        asked = {triple.question for triple in test}
        clean = [triple for triple in train if triple.question not in asked]
        for triple in train:
            if triple.question in asked:
                train_report.drop("question is in the test set", triple.source)
        train = clean
    else:
        if not 0 < data.test_rows < len(train):
            raise ConfigError(
                f"data.test_rows must leave rows to train on: expected 1 to {len(train) - 1}, got {data.test_rows}."
            )
        order = np.random.default_rng(config.seed).permutation(len(train))
        held_out = {int(i) for i in order[: data.test_rows]}
        test = [triple for i, triple in enumerate(train) if i in held_out]
        train = [triple for i, triple in enumerate(train) if i not in held_out]
    if not train:
        raise DataError("No row is left to train on: every question is in the test set.")
    return train, test[: config.eval.rows], reports


def tokenizer_of(config: Config, train: list[Triple]) -> Any:
    """The tokenizer that `tokenizer.path` names, or the run's own, trained on the training rows when first needed."""
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path)
    folder = Path(config.run_dir) / TOKENIZER_FOLDER
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    texts = (f"{t.question}\n{t.rationale}\n{t.answer}" for t in train)
    tokenizer = train_tokenizer(texts, vocab_size=config.tokenizer.vocab_size)
    tokenizer.save_pretrained(folder)
    return tokenizer


def claim_folder(folder: Path, config: Config, stage: str) -> None:
    """Makes the run folder and writes its `config.yaml`, or checks that the one there is the same run's.

    Settings that do not change what is learned (how often to log, evaluate and save; the other stage) may differ.

    Raises:
        ConfigError: the folder holds another run; names the settings that differ.
    """
    from cotgrpo.config import load_config

    path = folder / "config.yaml"
    if path.is_file():
        before, now = (flat(identity(c, stage)) for c in (load_config(path, []), config))
        differing = [
            f"{key} ({before.get(key)!r} there, {now.get(key)!r} now)" for key in now if before.get(key) != now[key]
        ]
        if differing:
            raise ConfigError(
                f"{folder} holds a run with another config: {'; '.join(differing)}. "
                "Choose another run_dir, or give the same settings to go on with that run."
            )
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, path)


def identity(config: Config, stage: str) -> dict[str, Any]:
    """The settings that decide what a stage learns."""
    whole = dataclasses.asdict(config)
    kept = {name: whole[name] for name in ("seed", "student", "tokenizer", "data", stage)}
    for name in ("log_every", "eval_every"):
        kept[stage].pop(name, None)
    return kept


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
