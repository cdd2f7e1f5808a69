"""The student's replies from an engine on a server, in place of the sampler of this process.

The engine gets the newest weights as a folder, every so many rollouts. Its replies come back as token ids. The run
computes their log-probabilities with its own parameters, and logs how far those of the engine are from them:

- `rollout_gap`: mean |log p_engine - log p_student| of the replies' tokens, in nats.
- `rollout_ratio`: mean p_student / p_engine, 1 if both are one.
- `rollout_version`, `rollout_age`: the rollout that the engine's weights were written for, and rollouts since then.

Replies of older weights are off-policy. Their log-probabilities are then the engine's own, and they count as in a later
update on the same replies (`cotgrpo.ghosts.live.reweighted`, or the clipped ratio of `GroupRelative`).

Only process 0 asks, and broadcasts what it gets.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.distributed.interrupts import wait_for
from cotgrpo.distributed.processes import broadcast_arrays, is_process_0, on_process_0
from cotgrpo.ghosts.live import map_contexts, with_replies
from cotgrpo.objectives import softmax
from cotgrpo.rollout_servers.dialects import ServedReply
from cotgrpo.rollout_servers.server import RolloutServer, Version
from cotgrpo.rollouts.journal import Arrays, RolloutJournal
from cotgrpo.rollouts.rollouts import metric
from cotgrpo.sampling import Prompts, Replies, SamplingSettings
from cotgrpo.sharding import jit_eval
from cotgrpo.teacher_servers.server import Text
from cotgrpo.teachers.server_errors import TeacherError
from cotgrpo.types import Metric, Metrics, Params, Student

if TYPE_CHECKING:
    from cotgrpo.types import AnyArray, Float

SAME_STUDENT = 1e-3
"""Nats by which the log-probabilities of one reply may differ if the student is the same as before."""
LEAST_GAP = 1e-3
"""A gap in nats below which no older weights are looked for: rounding alone makes as much."""
KEPT_VERSIONS = 2


def reply_log_probs(student: Student, params: Params, rows: tuple[Prompts, Replies]) -> Float[AnyArray, "B N"]:
    """Return log p of each token of replies in the student's own distribution; 0 after their ends."""
    prompts, replies = rows
    own = with_replies(prompts, replies)
    log_prob = lambda logits_V, token: softmax(logits_V).log_prob(token)
    values_BT = map_contexts(student, jax.lax.stop_gradient(params), own, log_prob, own.targets)
    return values_BT[:, prompts.tokens.shape[1] - 1 : -1]


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How an engine is used.

    Attributes:
        sampling: how a reply is drawn.
        refresh_every: rollouts between two refreshes of its weights.
        largest_gap: as in `cotgrpo.rollout_servers.settings.RolloutServerSettings`.
        folder: of the versions of the weights.
        is_adapter: whether a version is LoRA's adapters alone.
    """

    sampling: SamplingSettings
    refresh_every: int
    largest_gap: float
    folder: Path
    is_adapter: bool = False


class EngineReplies:
    """A sampler whose replies an engine writes. Calls are numbered: each is one rollout.

    Args:
        server: None on every process but the first.
        settings: how it is used.
        student: computes the log-probabilities of the replies.
        save: writes the parameters into a new folder. Every process calls it.
        journal: keeps the rollouts.
        samples: texts by which the server's weights are compared with the student's own.
        say: prints a line for the user.
        mesh: of the parameters; None: JAX's default device.
    """

    def __init__(
        self,
        server: RolloutServer | None,
        settings: EngineSettings,
        student: Student,
        save: Callable[[Params, Path], None],
        journal: RolloutJournal,
        samples: Sequence[Text],
        *,
        say: Callable[[str], None] = lambda line: None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self.server, self.settings, self.save, self.journal, self.say = server, settings, save, journal, say
        self.log_probs = jit_eval(functools.partial(reply_log_probs, student), mesh)
        self.samples = texts_as_rows(samples)
        self.sample_lengths = [len(text.scored) for text in samples]
        self.number = 0  # of the next rollout
        self.version = -1  # of the engine's weights: the number of the rollout that they were written for
        self.versions: dict[int, int] = {}  # of the newest rollouts
        self.is_loaded = False  # whether this process has given the engine its weights
        self.older: list[np.ndarray] = []  # log p of the samples with the first version, and the one before this
        self.checks_samples = True
        self.metrics: Metrics = {}

    def __call__(self, params: Params, prompts: Prompts, key: jax.Array) -> Replies:
        """Return a reply to each prompt, as a sampler does. Waits for the server."""
        number, self.number = self.number, self.number + 1
        found = self.recall(number, params, prompts)
        if found is None:
            self.refresh(number, params)
            found = self.ask(number, prompts, key)
            found["own"] = np.asarray(jax.device_get(self.log_probs(params, (prompts, self.replies_of(found)))))
            self.check_gap(number, found)
            about = {"version": np.asarray(self.version), "prompts": np.asarray(checksum(prompts))}
            arrays = found | about
            on_process_0(lambda: self.journal.write(number, arrays))
        self.versions = {n: v for n, v in self.versions.items() if n > number - KEPT_VERSIONS} | {number: self.version}
        self.add_metrics(number, found)
        replies = self.replies_of(found)
        return replies.replace(log_probs=found["own"]) if self.version == number else replies

    @property
    def is_stale(self) -> bool:
        """Whether older weights than the student's wrote the newest replies."""
        return self.version_of(False) != self.number - 1

    def version_of(self, ahead: bool) -> int:
        """Return the version of the weights that wrote the newest replies, or with `ahead` the ones before."""
        return self.versions.get(self.number - 1 - ahead, self.version)

    def recall(self, number: int, params: Params, prompts: Prompts) -> Arrays | None:
        """Return a rollout that is in the journal, if this student wrote it in reply to these prompts."""
        entry: Arrays | None = None

        def find() -> int | None:
            nonlocal entry
            entry = self.journal.find(number)
            is_same = entry is not None and int(entry["prompts"]) == checksum(prompts)
            return int(entry["version"]) if entry is not None and is_same else None

        version = on_process_0(find)
        if version is None:
            return None
        like = self.empty(len(prompts.lengths)) | {"own": self.empty(len(prompts.lengths))["log_probs"]}
        found = broadcast_arrays(lambda: {name: (entry or {})[name] for name in like}, like)
        own = np.asarray(jax.device_get(self.log_probs(params, (prompts, self.replies_of(found)))))
        if np.abs(own - found["own"]).max() > SAME_STUDENT:
            return None  # of a run that went another way
        self.is_loaded = self.is_loaded and version == self.version
        self.version = version
        return found

    def refresh(self, number: int, params: Params) -> None:
        """Give the engine the parameters, if it is time to, or the version that it should have.

        Raises:
            TeacherError: it did not take them.
        """
        due = self.version < 0 or number - self.version >= self.settings.refresh_every
        folder = self.folder_of(number if due else self.version)
        if not due and not self.is_loaded and not on_process_0(folder.is_dir):
            due, folder = True, self.folder_of(number)  # the version is gone: a newer one does as well
        if not due and self.is_loaded:
            return
        if due:
            on_process_0(lambda: shutil.rmtree(folder, ignore_errors=True))
            self.save(params, folder)
            self.version = number
        self.load(Version(folder, self.version, self.settings.is_adapter), params if due else None)
        self.is_loaded = True
        on_process_0(self.remove_old)

    def load(self, version: Version, params: Params | None) -> None:
        """Let the engine load a version, and compare its log-probabilities of the samples with the student's own.

        `params` are the student's. None: the student has gone on since.
        """
        own = None if params is None else self.of_samples(self.log_probs(params, self.samples))

        def work() -> None:
            assert self.server is not None
            wait_for(self.server.load_later(version))
            if own is None or not self.checks_samples:
                return
            theirs = wait_for(self.server.probe_later())
            if theirs is None:
                self.checks_samples = False
                self.say(
                    f"{self.server.connection.name} gives no log-probabilities of a given text: its weights are "
                    "compared by those of its replies alone"
                )
                return
            self.check_samples(version, own, np.concatenate([np.asarray(row, np.float32) for row in theirs]))

        on_process_0(work)
        if own is not None:
            self.older = [self.older[0], own] if self.older else [own]

    def check_samples(self, version: Version, own: np.ndarray, theirs: np.ndarray) -> None:
        """Raise TeacherError if the engine's log-probabilities of the samples are not those of the new weights."""
        gap = float(np.abs(theirs - own).mean())
        before = min((float(np.abs(theirs - older).mean()) for older in self.older), default=np.inf)
        if gap > LEAST_GAP and before < gap / 2:
            assert self.server is not None
            raise TeacherError(
                f"{self.server.connection.name} still answers with older weights, though it said that it has loaded "
                f"{version.folder}: its log-probabilities are {before:.2g} nats from the older ones, and {gap:.2g} "
                "from the new ones. No reply of it is trained on. Update the server, or start it anew, and run the "
                "same command to continue."
            )
        if gap > self.settings.largest_gap:
            raise self.other_weights(version.number, gap)

    def check_gap(self, number: int, found: Arrays) -> None:
        """Raise TeacherError if replies of the newest weights have other log-probabilities than the student's own."""
        is_real = np.arange(found["tokens"].shape[1]) < found["lengths"][:, None]
        gap = float(np.abs(found["log_probs"] - found["own"])[is_real].mean())
        if self.version == number and gap > self.settings.largest_gap:
            raise self.other_weights(number, gap)

    def other_weights(self, version: int, gap: float) -> TeacherError:
        """Return the error of an engine whose weights are not the student's."""
        where = "The rollout server" if self.server is None else self.server.connection.name
        return TeacherError(
            f"{where} has other weights than version {version} of the student: its log-probabilities are {gap:.2g} "
            f"nats from the student's own on average, where grpo.rollouts.largest_gap is {self.settings.largest_gap:g}."
            " Serve the student itself, with log-probabilities before temperature (vLLM: --logprobs-mode raw_logprobs)"
            " and a number type as exact as student.dtype; or raise that setting."
        )

    def ask(self, number: int, prompts: Prompts, key: jax.Array) -> Arrays:
        """Return the engine's replies on every process."""
        count = len(prompts.lengths)

        def get() -> Arrays:
            assert self.server is not None
            rows = [
                row[len(row) - n :].tolist()
                for row, n in zip(np.asarray(prompts.tokens), np.asarray(prompts.lengths).tolist(), strict=True)
            ]
            keys = jax.random.bits(jax.random.fold_in(key, number), (count,), jnp.uint32)
            seeds = [int(seed) for seed in np.asarray(keys)]
            replies: list[ServedReply] = wait_for(self.server.write_later(rows, seeds))
            return self.arrays_of(replies)

        return broadcast_arrays(get, self.empty(count))

    def empty(self, count: int) -> Arrays:
        """Return arrays for the replies to `count` prompts."""
        N = self.settings.sampling.max_new_tokens
        return {
            "tokens": np.full((count, N), self.settings.sampling.pad_id, np.int32),
            "log_probs": np.zeros((count, N), np.float32),
            "lengths": np.zeros(count, np.int32),
        }

    def arrays_of(self, replies: Sequence[ServedReply]) -> Arrays:
        """Return replies as arrays."""
        found = self.empty(len(replies))
        for row, reply in enumerate(replies):
            n = len(reply.ids)
            found["tokens"][row, :n], found["log_probs"][row, :n], found["lengths"][row] = reply.ids, reply.log_probs, n
        return found

    def replies_of(self, found: Arrays) -> Replies:
        """Return arrays as replies. The last token tells whether a reply has finished."""
        last = found["tokens"][np.arange(len(found["lengths"])), found["lengths"] - 1]
        finished = np.isin(last, np.asarray(self.settings.sampling.eos_ids, np.int32))
        return Replies(  # of NumPy arrays, which a compiled function takes as well
            tokens=found["tokens"],  # type: ignore[arg-type]
            log_probs=found["log_probs"],  # type: ignore[arg-type]
            lengths=found["lengths"],  # type: ignore[arg-type]
            finished=finished,  # type: ignore[arg-type]
        )

    def of_samples(self, values_BN: Float[AnyArray, "B N"]) -> np.ndarray:
        """Return log p of the samples' tokens in one row."""
        rows = np.asarray(jax.device_get(values_BN))
        return np.concatenate([row[:n] for row, n in zip(rows, self.sample_lengths, strict=True)])

    def folder_of(self, version: int) -> Path:
        """Return the folder of a version of the weights."""
        return self.settings.folder / f"{version:08d}"

    def remove_old(self) -> None:
        """Remove all versions but the newest ones. Those of a run that went on further are newer, and go too."""
        own = [path for path in self.settings.folder.iterdir() if path.name.isdecimal()]
        kept = sorted((path for path in own if int(path.name) <= self.version), key=lambda path: int(path.name))
        for path in {*own} - {*kept[-KEPT_VERSIONS:]}:
            shutil.rmtree(path, ignore_errors=True)

    def add_metrics(self, number: int, found: Arrays) -> None:
        """Add the metrics of a rollout to those that `observed` returns."""
        is_real = np.arange(found["tokens"].shape[1]) < found["lengths"][:, None]
        difference, count = (found["own"] - found["log_probs"])[is_real], int(is_real.sum())
        new: Metrics = {
            "rollout_gap": Metric(np.asarray(np.abs(difference).sum(), np.float32), np.asarray(count, np.float32)),
            "rollout_ratio": Metric(np.asarray(np.exp(difference).sum(), np.float32), np.asarray(count, np.float32)),
            "rollout_version": metric(self.version, 1),
            "rollout_age": metric(number - self.version, 1),
        }
        add = lambda one, other: np.asarray(one + other, np.float32)
        self.metrics = jax.tree.map(add, self.metrics, new) if self.metrics else new

    def observed(self) -> Metrics:
        """Return the metrics of the rollouts since the last call."""
        found, self.metrics = self.metrics, {}
        return found

    def get_state(self) -> dict[str, Any]:
        """Return the position: the number of the next rollout, and the versions of the weights."""
        return {"number": self.number, "version": self.version, "versions": list(self.versions.items())}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the position. The engine gets its weights again before it is asked."""
        self.number, self.version, self.is_loaded = state["number"], state["version"], False
        self.versions = {int(number): int(version) for number, version in state["versions"]}


def checksum(prompts: Prompts) -> int:
    """Return a number that other prompts do not have."""
    return zlib.crc32(np.ascontiguousarray(np.asarray(prompts.tokens, np.int32)).tobytes())


def texts_as_rows(samples: Sequence[Text]) -> tuple[Prompts, Replies]:
    """Return texts as prompts of one token and replies."""
    lengths = np.array([len(text.scored) for text in samples], np.int32)
    tokens = np.zeros((len(samples), int(lengths.max())), np.int32)
    for row, text in zip(tokens, samples, strict=True):
        row[: len(text.scored)] = text.scored
    prompts = Prompts(np.array([text.context[-1:] for text in samples], np.int32), np.ones(len(samples), np.int32))
    empty = np.zeros(tokens.shape, np.float32)
    return prompts, Replies(tokens, empty, lengths, np.ones(len(samples), bool))  # type: ignore[arg-type]


def process_0_server(make: Callable[[], RolloutServer]) -> RolloutServer | None:
    """Return a connected server on process 0, and None on the others."""
    server = make() if is_process_0() else None

    def connect() -> None:
        if server is not None:
            server.connect()

    on_process_0(connect)
    return server
