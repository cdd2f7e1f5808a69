"""Settings that name code of the user's own by its Python path, and those of trackers and of the profiler."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from cotgrpo.config.sections import ConfigError, NotApplicable
from cotgrpo.data.own.loading import OwnCodeError, call, load_object, path_problem
from cotgrpo.data.own.verifier import Verifier

TRACKERS = ("wandb", "mlflow", "trackio")
"""Trackers that are known by name."""
PROTOCOL = ("num_draws", "draw_logits", "batch_fields", "needs_reference", "top_k", "value_and_grad")
"""Optional attributes of an objective (`cotgrpo.objectives.Objective`)."""


@dataclasses.dataclass(frozen=True)
class OwnVerifier:
    """Functions of your own that judge replies, in every command.

    Attributes:
        function: a function of your own, "package.module:function"; empty: compare the answer with the row's. It is
            called as function(reply, gold, row), and returns whether the reply is right, or (whether it is, a message).
        reward: a reward of your own, "package.module:function"; empty: 1 for a right reply, else 0. It is called as
            function(reply, gold, row), and returns a finite number.
    """

    function: str = ""
    reward: str = ""

    def __post_init__(self) -> None:
        check_paths(self, "function", "reward")

    @property
    def is_own(self) -> bool:
        """Whether a function of the user's own is asked."""
        return bool(self.function or self.reward)

    @functools.cached_property
    def verifier(self) -> Verifier:
        """The verifier. Raises OwnCodeError if a function cannot be loaded."""
        return Verifier(self.function, self.reward)


@dataclasses.dataclass(frozen=True)
class OwnObjective:
    """An objective of the user's own. It has the attributes of `cotgrpo.objectives.Objective` that theirs has.

    Attributes:
        function: "package.module:name" of a function objective(logits_V, token), or of a class that makes one.
        options: arguments for the class by name, or further arguments of the function.
    """

    function: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_paths(self, "function")

    @functools.cached_property
    def objective(self) -> Callable[..., Any]:
        """The user's objective.

        Raises:
            OwnCodeError: it cannot be loaded or made.
        """
        if not self.function:
            raise OwnCodeError("grpo.objective.function is empty: expected package.module:function of your objective.")
        found = load_object(self.function, "grpo.objective.function")
        if isinstance(found, type):
            found = self.call(functools.partial(found, **self.options))
        elif self.options and callable(found):
            found = functools.partial(found, **self.options)
        if not callable(found):
            raise OwnCodeError(
                f"grpo.objective.function: {self.function} must be a function objective(logits_V, token) or a class "
                f"that makes one, got a {type(found).__name__}."
            )
        return found

    def __call__(self, logits_V: Any, token: Any) -> Any:
        """Return the loss and the metrics of one token. Raises OwnCodeError if the user's objective returns others."""
        found = self.call(self.objective, logits_V, token)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
            raise OwnCodeError(
                f"grpo.objective.function {self.function} must return (loss, metrics), a scalar and a dict of scalars, "
                f"got {shown(found)}."
            )
        for name, value in {"the loss": found[0], **found[1]}.items():
            if getattr(value, "shape", () if isinstance(value, int | float) else None) != ():
                raise OwnCodeError(
                    f"grpo.objective.function {self.function}: {name} must be a scalar, got {shown(value)}."
                )
        return jnp.asarray(found[0], logits_V.dtype), dict(found[1])

    def __getattr__(self, name: str) -> Any:
        """Return an optional attribute of the user's objective."""
        if name not in PROTOCOL:
            raise AttributeError(name)
        found = getattr(self.objective, name)
        is_function = callable(found) and not isinstance(found, type)
        return functools.partial(self.call, found) if is_function else found

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call code of the user's own. Raises OwnCodeError if it fails."""
        return call(function, self.function, "grpo.objective.function", "The objective", *arguments)


@dataclasses.dataclass(frozen=True)
class TrackerConfig:
    """Where trackers log, if `trackers` names some.

    Attributes:
        project: project of the tracker (an experiment in MLflow).
        name: name of the run; empty: that of run_dir. The stage follows it.
        offline: keep everything on this disk, without a server: in the stage's folder, or where trackio keeps its runs.
        uri: address of the tracker's server (MLflow, trackio), or its Space (trackio); empty: its own default.
    """

    project: str = "cotgrpo"
    name: str = ""
    offline: bool = False
    uri: str = ""

    def __post_init__(self) -> None:
        if not self.project.strip():
            raise ConfigError("project is empty: expected the name of a project.")

    def not_applicable(self) -> NotApplicable:
        """Return the address, without a server."""
        if not self.offline:
            return NotApplicable()
        return NotApplicable(("uri",), "offline", "a run without a server (tracker.offline true). Remove one of them.")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Profile some steps of a stage with JAX's profiler, into the folder `profile` of the stage.

    Attributes:
        steps: first and last step to profile, as 10:13; empty: none.
    """

    steps: str = ""

    def __post_init__(self) -> None:
        found = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", self.steps)
        if self.steps and (found is None or not 1 <= int(found[1]) <= int(found[2])):
            raise ConfigError(
                f"steps must be FIRST:LAST, two steps from 1 in order, such as 10:13, got {self.steps!r}."
            )

    @property
    def range(self) -> tuple[int, int] | None:
        """The first and the last step, or None."""
        return None if not self.steps else (int(self.steps.split(":")[0]), int(self.steps.split(":")[1]))


def shown(value: object) -> str:
    """Return what a value is, for a message. Of an array, that is its shape: it has no numbers while it is traced."""
    if hasattr(value, "shape"):
        return f"an array of the shape {value.shape}"
    return f"{type(value).__name__} {value!r:.80}"


def check_paths(section: object, *names: str) -> None:
    """Raise ConfigError if one of these settings is not empty, and not a Python path."""
    for name in names:
        if problem := path_problem(getattr(section, name), name):
            raise ConfigError(problem)


def names_in(setting: list[str] | str) -> list[str]:
    """Return a setting that may be one name, several with commas, or a list."""
    given = [setting] if isinstance(setting, str) else setting
    return [name.strip() for text in given for name in text.split(",") if name.strip()]


def check_callbacks(callbacks: list[str] | str, trackers: list[str] | str) -> None:
    """Raise ConfigError for a callback or a tracker that is no Python path, nor a tracker's name."""
    for name in names_in(callbacks):
        if problem := path_problem(name, "callbacks"):
            raise ConfigError(problem)
    for name in names_in(trackers):
        if name not in TRACKERS and path_problem(name, "trackers"):
            raise ConfigError(
                f"trackers must be some of {', '.join(TRACKERS)} or package.module:name of your own, got {name!r}."
            )
