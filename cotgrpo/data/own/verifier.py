"""The one verdict on a reply: exact match, or a function of the user's own; and a reward of the user's own.

    def verify(reply: str, gold: str, row: dict) -> bool:             # or (bool, "what is wrong with the reply")
    def reward(reply: str, gold: str, row: dict) -> float:

Whatever asks whether a reply of a model is right asks the verifier of its template: evaluations, rollouts, self
replies, and `cotgrpo generate`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cotgrpo.data.answers import grade
from cotgrpo.data.own.loading import OwnCodeError, call, check_signature, load_function, name_of

ARGUMENTS = ("reply", "gold", "row")
Verify = Callable[[str, str, dict[str, Any]], Any]
"""`verify(reply, gold, row)` returns whether the reply is right, alone or with a message: `(False, "no unit")`."""
RewardFunction = Callable[[str, str, dict[str, Any]], Any]
"""`reward(reply, gold, row)` returns a finite number."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict on a reply.

    Attributes:
        correct: whether it is right.
        reward: the reward of the user's own; None without one.
        message: why, in the words of the user's function or of `grade`.
    """

    correct: bool
    reward: float | None = None
    message: str = ""


class Verifier:
    """Judges replies.

    Args:
        verify: a function of your own, or its Python path; empty: the answer is compared with the right one.
        reward: a reward of your own, or its Python path; empty: none.

    Raises:
        OwnCodeError: a path that cannot be loaded, or a function with other arguments.

    Example:
        >>> Verifier()("The answer is 42.", "42", "42", {}, "rows.jsonl:1").correct
        True
        >>> short = Verifier(lambda reply, gold, row: (len(reply) < row["most"], "too long"))
        >>> short("a long reply", None, "", {"most": 5}, "row 1")
        Verdict(correct=False, reward=None, message='too long')
    """

    def __init__(self, verify: str | Verify = "", reward: str | RewardFunction = "") -> None:
        self.verify_name, self.verify = loaded(verify, "verify.function")
        self.reward_name, self.reward = loaded(reward, "verify.reward")

    @property
    def names(self) -> dict[str, str]:
        """The functions of the user's own, by setting."""
        found = {"function": self.verify_name, "reward": self.reward_name}
        return {name: path for name, path in found.items() if path}

    def __call__(self, reply: str, answer: str | None, gold: str, row: Mapping[str, Any], place: str) -> Verdict:
        """Return the verdict on a reply.

        Args:
            reply: the whole reply, without the token that ends it.
            answer: the part of it that the template takes for the answer, which is compared without `verify`.
            gold: the right answer; empty: the row has none.
            row: the row as it was read.
            place: of the row, for errors.

        Raises:
            OwnCodeError: a function of the user's own failed, or returned something else.
        """
        if self.verify is None:
            graded = grade(answer, gold)
            correct, message = graded.correct, graded.why
        else:
            given = call(self.verify, self.verify_name, "verify.function", place, reply, gold, dict(row))
            correct, message = self.verdict_of(given, place)
        return Verdict(correct, self.reward_of(reply, gold, row, place), message)

    def verdict_of(self, given: object, place: str) -> tuple[bool, str]:
        """Return the two parts of what `verify` returned."""
        correct, message = given if isinstance(given, tuple) and len(given) == 2 else (given, "")
        if not isinstance(correct, bool | np.bool_) or not isinstance(message, str):
            raise OwnCodeError(
                f"{place}: verify.function {self.verify_name} must return True or False, or (True or False, message), "
                f"got {type(given).__name__} {given!r:.80}."
            )
        return bool(correct), message

    def reward_of(self, reply: str, gold: str, row: Mapping[str, Any], place: str) -> float | None:
        """Return the reward of a reply; None without a function. Arguments and errors are those of `__call__`."""
        if self.reward is None:
            return None
        given = call(self.reward, self.reward_name, "verify.reward", place, reply, gold, dict(row))
        is_scalar = isinstance(given, numbers.Real | np.bool_) or getattr(given, "shape", None) == ()
        try:
            value = float(given) if is_scalar else math.nan
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
            raise OwnCodeError(
                f"{place}: verify.reward {self.reward_name} must return a finite number, got "
                f"{type(given).__name__} {given!r:.80}."
            )
        return value


def loaded(given: str | Callable[..., Any], setting: str) -> tuple[str, Callable[..., Any] | None]:
    """Return the name of a function and the function; it may be given by its path. Empty: none."""
    if not given:
        return "", None
    if isinstance(given, str):
        return given, load_function(given, setting, ARGUMENTS)
    name = name_of(given)
    check_signature(given, name, setting, ARGUMENTS)
    return name, given


EXACT_MATCH = Verifier()
"""Compares the answer with the right one."""
