"""The held-out split: a rule on the text of a question, kept with the run.

A question is held out if the hash of a salt and its text is at most a threshold. So the rule gives every question its
side, whatever rows are appended, shuffled or removed, and whatever the seed of a later stage is.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Container, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from cotgrpo.config import ConfigError
from cotgrpo.data.questions import Question, question_text

HASH_BYTES = 8
Drawn = Literal["threshold", "list", "older version"]


def text_hash(text: str, salt: str = "") -> int:
    """Return a hash of 64 bits of a salt and a text."""
    return int.from_bytes(
        hashlib.blake2b(f"{salt}\n{text}".encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest(), "little"
    )


@dataclasses.dataclass(frozen=True)
class HeldOutSplit:
    """Which questions are held out. `text in split` tests the `question_text` of one.

    Attributes:
        salt: comes before every text that is hashed.
        threshold: highest hash of a question that is held out; -1: none is.
        listed: further hashes that are held out.
        test_rows: how many questions were asked for when it was drawn.
        drawn: "threshold": the lowest hashes of all questions. "list": questions drawn from a stream, or from those
            that no stage was trained on. "older version": as versions without such a split drew them.
        numbers: rows of the stream that had them.
    """

    salt: str
    threshold: int = -1
    listed: frozenset[int] = frozenset()
    test_rows: int = 0
    drawn: Drawn = "threshold"
    numbers: tuple[int, ...] = ()

    def __contains__(self, text: object) -> bool:
        found = text_hash(str(text), self.salt)
        return found <= self.threshold or found in self.listed

    def __str__(self) -> str:
        how = {
            "threshold": f"by a hash of each question's text (salt {self.salt!r}, threshold {self.threshold:016x})",
            "list": f"drawn once and kept as a list of {len(self.listed)} hashes (salt {self.salt!r})",
            "older version": f"drawn as an older version did, and kept as a list of {len(self.listed)} hashes",
        }
        return f"{how[self.drawn]}, of data.test_rows {self.test_rows}"

    def to_dict(self) -> dict[str, Any]:
        """Return the split as JSON-able values."""
        return {
            "salt": self.salt,
            "threshold": None if self.threshold < 0 else f"{self.threshold:016x}",
            "listed": [f"{one:016x}" for one in sorted(self.listed)],
            "test_rows": self.test_rows,
            "drawn": self.drawn,
            "numbers": list(self.numbers),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeldOutSplit:
        """Return the split that `to_dict` described.

        Raises:
            ValueError: it is not one.
        """
        try:
            found = cls(
                salt=str(values["salt"]),
                threshold=-1 if values["threshold"] is None else int(values["threshold"], 16),
                listed=frozenset(int(one, 16) for one in values["listed"]),
                test_rows=int(values["test_rows"]),
                drawn=values["drawn"],
                numbers=tuple(map(int, values["numbers"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a held-out split: {error!r}") from error
        if found.drawn not in ("threshold", "list", "older version") or not (found.threshold >= 0 or found.listed):
            raise ValueError("not a held-out split: it holds nothing out")
        return found

    def of(self, questions: Iterable[Question]) -> list[Question]:
        """Return the questions that are held out, each text once, in their order."""
        first: dict[str, Question] = {}
        for question in questions:
            first.setdefault(question_text(question), question)
        return [question for text, question in first.items() if text in self]


@dataclasses.dataclass(frozen=True)
class HeldOutQuestions:
    """All questions that a stage must not be trained on. `text in questions` tests the `question_text` of one.

    Attributes:
        split: the run's split, or None.
        texts: further questions, of the rows of `data.test`.
    """

    split: HeldOutSplit | None = None
    texts: frozenset[str] = frozenset()

    def __contains__(self, text: object) -> bool:
        return text in self.texts or (self.split is not None and text in self.split)


def draw_split(questions: Iterable[Question], count: int, seed: int) -> HeldOutSplit:
    """Return the split that holds `count` of the questions out: those whose salted hash is lowest.

    Raises:
        ConfigError: none would be left to train on.
    """
    salt = f"seed {seed}"
    hashes = sorted({text_hash(question_text(question), salt) for question in questions})
    check_test_rows(count, len(hashes))
    return HeldOutSplit(salt, hashes[count - 1], test_rows=count)


def extend_split(
    split: HeldOutSplit | None, questions: Iterable[Question], trained: Container[int], count: int, seed: int
) -> HeldOutSplit:
    """Return a split that also holds out `count` of the questions, or fewer, none of which was trained on.

    Args:
        split: what is held out already.
        questions: of the training rows.
        trained: `text_hash` of questions that an earlier stage was trained on.
        count: how many are wanted.
        seed: salts the hashes, if there is no split.

    Raises:
        ConfigError: each was trained on.
    """
    salt = f"seed {seed}" if split is None else split.salt
    texts = {question_text(question) for question in questions}
    free = sorted(text_hash(text, salt) for text in texts if text_hash(text) not in trained)
    if not free or count < 1:
        raise ConfigError(
            "No question of data.train can be held out: the stage that this one starts from was trained on all of "
            "them. Name held-out rows in data.test, or choose another run_dir."
        )
    listed = frozenset(free[:count]) | (frozenset() if split is None else split.listed)
    return HeldOutSplit(salt, -1 if split is None else split.threshold, listed, count, "list")


def list_split(questions: Iterable[Question], count: int, seed: int, drawn: Drawn) -> HeldOutSplit:
    """Return the split that holds exactly these questions out; `count` is what was asked for."""
    salt = f"seed {seed}"
    hashes = frozenset(text_hash(question_text(question), salt) for question in questions)
    return HeldOutSplit(salt, listed=hashes, test_rows=count, drawn=drawn)


def draw_as_older_versions(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Draw `count` of the questions by their places in the file, and keep their order.

    Raises:
        ConfigError: none would be left to train on.
    """
    check_test_rows(count, len(questions))
    order = np.random.default_rng(seed).permutation(len(questions))
    chosen = {int(i) for i in order[:count]}
    return [question for i, question in enumerate(questions) if i in chosen]


def check_test_rows(count: int, rows: int) -> None:
    """Raise ConfigError unless so many held-out rows leave some of `rows` to train on."""
    if not 0 < count < rows:
        raise ConfigError(f"data.test_rows must leave rows to train on: expected 1 to {rows - 1}, got {count}.")
