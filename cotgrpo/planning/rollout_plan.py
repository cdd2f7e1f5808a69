"""The phases of a GhostRespond update on replies of the student: rollout, the ghosts' pass, the train step.

Rollouts are planned by arithmetic: the loop over tokens reads all weights and the cache once a token. Every reply is
taken to be as long as it may be, so the times are those of the longest rollouts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import AbstractMesh

from cotgrpo.accelerators.chips import Topology
from cotgrpo.accelerators.roofline import Work
from cotgrpo.accelerators.step_estimate import peak_share
from cotgrpo.config import PrivilegedSelf
from cotgrpo.config.ghosts import LiveGhosts, SelfReply, StudentReplies, TeacherModel, TeacherServer, VerifiedReward
from cotgrpo.config.settings import GrpoConfig
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params
from cotgrpo.rollout_servers.settings import InProcess
from cotgrpo.sampling.decoding_layout import DecodingLayout, decoding_bytes
from cotgrpo.sharding import state_sharding
from cotgrpo.types import Params

HBM_SHARE = 0.7
"""Share of the memory's bandwidth that a loop over tokens reaches: its reads are short."""
HOP_SECONDS = 2e-6
"""Least time of one collective in the loop."""


@dataclasses.dataclass(frozen=True)
class RolloutPlan:
    """Rollouts of one stage on a topology.

    Attributes:
        settings: the stage.
        decoder: the student.
        teachers: the live teachers in this process.
        seq_len: tokens of a row; what max_new_tokens leaves is for the prompt.
        topology: the chips.
        mesh: sizes of the mesh's axes.
        params: shapes of what the sampler reads.
    """

    settings: GrpoConfig
    decoder: DecoderConfig
    teachers: tuple[DecoderConfig, ...]
    seq_len: int
    topology: Topology
    mesh: Mapping[str, int]
    params: Params

    @property
    def ghosts(self) -> StudentReplies:
        """The source of the replies."""
        assert isinstance(self.settings.ghosts, StudentReplies)
        return self.settings.ghosts

    @property
    def replies(self) -> float:
        """Replies that are decoded for one update."""
        ghosts, batch = self.ghosts, self.settings.batch_size
        if isinstance(ghosts, SelfReply):
            return ghosts.questions * ghosts.num_generations / ghosts.refresh_every
        if isinstance(ghosts, LiveGhosts):
            return (batch - ghosts.forced_rows(batch)) / ghosts.updates_per_rollout
        return batch / (ghosts.updates_per_rollout if isinstance(ghosts, VerifiedReward) else 1)

    @property
    def rows(self) -> int:
        """Replies that are decoded at a time."""
        whole = self.settings.batch_size
        if isinstance(self.ghosts, LiveGhosts):
            whole -= self.ghosts.forced_rows(whole)
        return self.ghosts.decode_batch_size or whole

    @property
    def prompt_tokens(self) -> int:
        """Columns of the longest prompt."""
        return max(self.seq_len - self.ghosts.max_new_tokens, 1)

    @functools.cached_property
    def teacher_bytes(self) -> int:
        """Bytes of the live teachers' weights on one device; they are stored in the student's compute type."""
        mesh = AbstractMesh(tuple(self.mesh.values()), tuple(self.mesh))
        return sum(tree_bytes(teacher_params(teacher, self.decoder.dtype), mesh) for teacher in self.teachers)

    def holds_first_self(self, shared: bool) -> bool:
        """Return whether a frozen copy of the student is held as a ghost; `shared` if the step holds it anyway."""
        return isinstance(self.ghosts, PrivilegedSelf) and self.ghosts.self == "frozen" and not shared

    def layout(self, resident: int) -> DecodingLayout:
        """Return the sampler's layout if `resident` bytes of each device are not the student's state."""
        sizes = (self.rows, self.prompt_tokens, self.ghosts.max_new_tokens)
        memory = round(self.topology.hbm_bytes)
        return decoding_bytes(self.decoder, self.mesh, *sizes, memory=memory, params=self.params, resident=resident)

    @property
    def on_server(self) -> bool:
        """Whether an engine on a server writes the replies."""
        return not isinstance(self.settings.rollouts, InProcess)

    def rollout_seconds(self, layout: DecodingLayout) -> float:
        """Return the time of the replies of one update here: prefill, then a token of all rows at a time."""
        if self.on_server:
            return 0.0
        waves = self.replies / self.rows
        return waves * (self.prefill_seconds + self.ghosts.max_new_tokens * self.token_seconds(layout))

    @property
    def prefill_seconds(self) -> float:
        """Seconds of reading the prompts of all rows that are decoded at a time."""
        return self.forward_seconds(self.decoder, self.rows * self.prompt_tokens, self.prompt_tokens, supervised=0.0)

    def token_seconds(self, layout: DecodingLayout) -> float:
        """Return the time of one token of all rows."""
        chip, devices = self.topology.chip, self.topology.num_devices
        seen = (self.prompt_tokens + self.ghosts.max_new_tokens / 2) / self.seq_len
        bandwidth = HBM_SHARE * chip.hbm_bandwidth / chip.devices
        work = Work(self.decoder, tokens=1, seq_len=self.seq_len)
        flops = 2 * (work.layer_weights + work.head_weights) * self.rows
        compute = flops / (devices * peak_share(chip) * chip.flops / chip.devices)
        # Where weights are split, the residual stream is summed twice in each layer.
        split, sums = math.prod(layout.sizes[axis] for axis in layout.tensor), 2 * self.decoder.num_layers
        own_rows = self.rows / layout.parts("B", self.rows)
        sent = sums * 2 * (1 - 1 / split) * 2 * own_rows * self.decoder.width / self.topology.network_bandwidth
        hops = sums * HOP_SECONDS if split > 1 else 0.0
        return max((layout.bytes.copy + seen * layout.bytes.cache) / bandwidth, compute) + sent + hops

    def ghost_seconds(self) -> float:
        """Return the time in which the live ghosts of this process read the batch."""
        ghosts, tokens = self.ghosts, self.settings.batch_size * self.seq_len
        supervised = ghosts.max_new_tokens / self.seq_len
        if isinstance(ghosts, PrivilegedSelf):  # the ghost's prompt holds the solution too: about a row's length
            return self.forward_seconds(self.decoder, 2 * tokens, 2 * self.seq_len, supervised / 2)
        return sum(
            self.forward_seconds(teacher, tokens, self.seq_len, supervised) / len(self.teachers)
            for teacher in self.teachers
        )

    def forward_seconds(self, decoder: DecoderConfig, tokens: int, seq_len: int, supervised: float) -> float:
        """Return the time of a forward pass over tokens of rows of this length."""
        work, chip = Work(decoder, tokens=1, seq_len=seq_len), self.topology.chip
        flops = tokens * (2 * (work.layer_weights + supervised * work.head_weights) + 2 * work.score_flops)
        return flops / (self.topology.num_chips * peak_share(chip) * chip.flops)

    def notes(self) -> Iterator[str]:
        """Yield what the plan does not count."""
        if isinstance(self.ghosts, TeacherServer):
            yield "the ghosts' pass is on the teacher's server, and is not counted"
        if self.on_server:
            yield "the server writes the replies, which is not counted"
        yield f"every reply has max_new_tokens ({self.ghosts.max_new_tokens}) tokens"


@functools.cache
def teacher_params(teacher: DecoderConfig, dtype: str) -> Params:
    """Return the shapes of a live teacher's weights, in the student's compute type."""
    stored = dataclasses.replace(teacher, param_dtype=dtype)  # type: ignore[arg-type]
    return jax.eval_shape(functools.partial(init_params, stored), jax.eval_shape(jax.random.key, 0))


def tree_bytes(tree: Params, mesh: AbstractMesh) -> int:
    """Return the bytes of parameters on one device of the mesh."""
    shardings = state_sharding(tree, mesh)
    of = lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(of, tree, shardings)))


def teacher_paths(settings: GrpoConfig) -> tuple[str, ...]:
    """Return the folders or hub ids of the live teachers that a stage holds in this process."""
    ghosts = settings.ghosts
    if not isinstance(ghosts, TeacherModel):
        return ()
    if not ghosts.teachers:
        return (str(ghosts.teacher),)
    values = [value for value in ghosts.teachers.values() if isinstance(value, str)]
    return tuple(dict.fromkeys(values or ghosts.teachers))
