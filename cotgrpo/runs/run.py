"""A run folder with its settings: train, measure, load and save, from Python as from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cotgrpo.config import Config, flat, tree_of
from cotgrpo.config.files import checked_settings, given_in, settings_parser
from cotgrpo.config.sections import DataclassInstance, Given, build, dependent, settings_in
from cotgrpo.config.settings import OBJECTIVES
from cotgrpo.data.own.loading import path_of
from cotgrpo.disk_errors import explain_disk_errors
from cotgrpo.models.huggingface.folder import ModelFolder
from cotgrpo.runs.given import keep, place_of
from cotgrpo.runs.trained import Trained
from cotgrpo.training.export import run_export
from cotgrpo.training.inputs import model_of
from cotgrpo.training.stages import newest_stage, run_eval, run_grpo, run_sft
from cotgrpo.training.weights import restore_weights

if TYPE_CHECKING:
    from typing import TypeGuard

KEYS = [setting.key for setting in settings_in(Config())]
"""Every setting, by its dotted key."""
CODE = ("callbacks", "trackers", "function", "reward", "row_function")
"""Settings that are Python paths, by the last part of their names."""


class Run:
    """A run: its folder, its settings, and what is done with them.

    Settings have the names of a config file and are given as nested dicts, or as the dataclasses of `cotgrpo.config`:
    `Run("runs/a", data={"seq_len": 512}, sft={"optimizer": {"learning_rate": 1e-4}}, seed=1)`. docs/launch.md and
    `cotgrpo sft --help` list them.

    A stage that was interrupted goes on when it is called again. One that is complete only returns its report.

    Args:
        run_dir: the folder of the run.
        student: the student to start from: a folder, a hub id, or what `cotgrpo.models.load_pretrained` returned. A
            dict or a `StudentConfig` describes one from scratch. None: that of the settings.
        train: training rows: a list of dicts, a `datasets.Dataset`, a data frame, or names of files. docs/data.md
            lists the layouts of rows.
        test: held-out rows, in the same form. None: some of the training rows are held out.
        tokenizer: a folder, a hub id, or a tokenizer of `transformers`. None: that of the student.
        console: where progress is printed. None: standard output.
        settings: further settings, by section. Rows and models may be objects here too, as in
            `grpo={"ghosts": {"source": "teacher_model", "teacher": "org/name", "prompts": rows}}`, and functions of
            your own need no path: `verify={"function": is_right}`, `callbacks=[Mine()]` (docs/own_code.md).

    Objects are written to `RUN_DIR/given`, so that the run can be resumed without them.

    Raises:
        ConfigError: an unknown setting, or a value out of its range.
        DataError: rows that are no rows.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        student: object = None,
        train: object = None,
        test: object = None,
        tokenizer: object = None,
        console: Console | None = None,
        **settings: Any,
    ) -> None:
        tree = as_mapping(Config(), settings)
        for name, value in {"student": student, "tokenizer": tokenizer}.items():
            if value is not None:
                tree[name] = value if isinstance(value, Mapping) or is_section(value) else {"path": value}
        rows = {name: value for name, value in {"train": train, "test": test}.items() if value is not None}
        if rows:
            tree["data"] = {**tree.get("data", {}), **rows}
        self.console = console or Console()
        self.given = Given().over({"run_dir": str(run_dir)})
        self.config = Config(run_dir=str(run_dir))
        self.update(tree)

    @classmethod
    def of(cls, given: Given, console: Console | None = None) -> Run:
        """Return the run of settings that were given as dotted keys, as a command line gives them.

        Raises:
            ConfigError: a value out of its range, or a setting that does not apply.
        """
        run = cls.__new__(cls)
        run.console, run.given, run.config = console or Console(), given, build(Config(), given)
        return run

    @classmethod
    def open(cls, run_dir: str | Path, *, console: Console | None = None, **settings: Any) -> Run:
        """Return a run that exists, with the settings that its newest stage has saved, and others on top.

        Raises:
            ConfigError: no stage of the folder has a checkpoint.
        """
        run_dir = Path(run_dir)
        saved, unset = given_in(run_dir / newest_stage(run_dir) / "config.yaml")
        run = cls.of(Given().over(saved | {"run_dir": str(run_dir)}, unset), console)
        run.update(settings)
        return run

    def update(self, settings: Mapping[str, Any], kept_as: str = "") -> None:
        """Change settings, given as to `Run`. Objects are kept under their names with `kept_as` in front."""
        run_dir = Path(self.given.values.get("run_dir", Config().run_dir))
        values = dict(flat(as_mapping(Config(), settings), leaves=KEYS))
        objects = {
            key: (value, place) for key, value in values.items() if (place := place_of(key, value, run_dir, kept_as))
        }
        values |= {key: str(place) for key, (_, place) in objects.items()}
        checked, _ = checked_settings(values, KEYS, settings_parser(Config))
        last = max(self.given.sources.values(), default=0) + 1
        given = Given(self.given.values | checked, self.given.sources | dict.fromkeys(checked, last))
        config = build(Config(), given)
        with explain_disk_errors():
            for key, (value, place) in objects.items():
                keep(key, value, place, run_dir)
        self.given, self.config = given, config

    def sft(self, **settings: Any) -> dict[str, Any]:
        """Train with the next-token loss on the rows' own text, in `RUN_DIR/sft`. Return the stage's report.

        Args:
            settings: of the section `sft`, such as `steps=300`.
        """
        self.update({"sft": settings})
        with explain_disk_errors():
            return run_sft(self.config, self.console)

    def grpo(self, **settings: Any) -> dict[str, Any]:
        """Train with GhostRespond Policy Optimization, in `RUN_DIR/grpo`. Return the stage's report.

        Args:
            settings: of the section `grpo`, such as `steps=100, ghosts={"source": "privileged_self"}`. The objective
                may be a function of your own.
        """
        self.update({"grpo": settings})
        with explain_disk_errors():
            return run_grpo(self.config, self.console)

    def evaluate(self, *, test: object = None, **settings: Any) -> dict[str, Any]:
        """Measure the newest student on held-out rows. Return accuracy with its interval, loss and replies.

        The settings are those that its stage has saved, and those of this run on top. `eval.json` keeps the result.

        Args:
            test: other held-out rows, this once. None: those of the run.
            settings: of the section `eval`, such as `rows=200`.
        """
        given, config = self.given, self.config
        folder = Path(config.run_dir)
        saved, unset = given_in(folder / newest_stage(folder) / "config.yaml")
        self.given = given.over(saved, unset)
        try:
            self.update({"eval": settings} | ({} if test is None else {"data": {"test": test}}), kept_as="eval_")
            with explain_disk_errors():
                return run_eval(self.config, self.console)
        finally:
            self.given, self.config = given, config

    def model(self) -> Trained:
        """Return the newest student of the run, in memory."""
        folder = Path(self.config.run_dir)
        stage = newest_stage(folder)
        saved, unset = given_in(folder / stage / "config.yaml")
        model = model_of(build(Config(), Given().over(saved, unset)), folder / stage, folder / stage, [], copy=True)
        weights, step = restore_weights(folder / stage, model)
        return Trained(
            model.decoder,
            model.student,
            weights.adapted(),
            model.tokenizer,
            model.template(model.config.data.loss_on),
            model.vocab_size,
            stage,
            step,
            model.mesh,
        )

    def save(self, folder: str | Path, *, dtype: str | None = None, adapter: bool = False) -> Path:
        """Write the newest student as a folder that `transformers` loads, and return its path.

        Args:
            folder: new or empty.
            dtype: "float32", "bfloat16" or "float16"; None: as in the run.
            adapter: write LoRA's adapters alone, as `peft` loads them.
        """
        with explain_disk_errors():
            return run_export(
                Path(self.config.run_dir),
                Path(folder),
                dtype,
                self.console,
                adapter=adapter,
                allow_changed=[kind for kind in self.config.allowed_changes if kind == "student"],
            )


def as_mapping(section: DataclassInstance, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as nested dicts of what YAML holds: sections that are dataclasses become mappings."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = getattr(section, name, None)
        kind = dependent(fields[name]) if name in fields else None
        if name == "objective" and callable(value) and not isinstance(value, tuple(OBJECTIVES.values())):
            found[name] = {"name": "own", "function": path_of(value)}
        elif is_section(value):
            found[name] = tree_of(value) if kind is None else kind.tree(value)
        elif isinstance(value, Mapping) and inner is not None and is_section(inner):
            found[name] = as_mapping(inner, value)
        else:
            found[name] = plain_value(name, value)
    return found


def is_section(value: object) -> TypeGuard[DataclassInstance]:
    """Return whether a value is a section of settings."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type | ModelFolder)


def plain_value(name: str, value: object) -> object:
    """Return the value of a setting as YAML holds it: code by its Python path, paths as text, tuples as lists."""
    if name in CODE and not isinstance(value, str):
        return [path_of(part) for part in value] if isinstance(value, list | tuple) else path_of(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list | tuple) and all(isinstance(part, str | PurePath | int | float) for part in value):
        return [plain_value(name, part) for part in value]
    return value
