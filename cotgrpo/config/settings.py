"""The settings of a run: one tree of frozen dataclasses. `cotgrpo.config.files` reads it from YAML and from options."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Literal

from cotgrpo.compiler_options.measured import CompilerConfig
from cotgrpo.config.ghosts import SOURCES, Cached, Ghosts, LiveGhosts, TeacherForced, Teachers, VerifiedReward
from cotgrpo.config.own_code import OwnObjective, OwnVerifier, ProfileConfig, TrackerConfig, check_callbacks
from cotgrpo.config.sections import ConfigError, NotApplicable, at_least, choice, expect, optional
from cotgrpo.data.layouts.own import columns_problem, row_function_problem
from cotgrpo.models.config import DecoderConfig, DecoderPrecision, DecoderShape, check_remat
from cotgrpo.models.layers.experts import Products
from cotgrpo.models.lora import LoraConfig
from cotgrpo.objectives import (
    Divergence,
    ForwardKl,
    GhostRespond,
    GroupRelative,
    JensenShannon,
    Nll,
    Objective,
    Pair,
    ReferenceKl,
    Reinforce,
    ReverseKl,
    RewardedGhost,
    RewardGradient,
    SkewedKl,
    num_draws,
    reads_teacher,
)
from cotgrpo.optimizers import OptimizerConfig
from cotgrpo.rollout_servers.settings import ENGINES, InProcess, RolloutServerSettings
from cotgrpo.sharding import MeshConfig

OBJECTIVES = {
    "pair": Pair,
    "nll": Nll,
    "forward_kl": ForwardKl,
    "reverse_kl": ReverseKl,
    "jensen_shannon": JensenShannon,
    "skewed_kl": SkewedKl,
    "ghost_respond": GhostRespond,
    "reward_gradient": RewardGradient,
    "reinforce": Reinforce,
    "group_relative": GroupRelative,
    "own": OwnObjective,
}
SET_NAME = re.compile(r"\w[\w.-]{0,63}")
"""The name of a test set."""
SHAPE = tuple(field.name for field in dataclasses.fields(DecoderShape))
"""The settings of a student that a pretrained one does not have."""


@dataclasses.dataclass(frozen=True)
class StudentConfig(DecoderPrecision, DecoderShape):
    """The student: a pretrained model, or a shape that is trained from scratch.

    Attributes:
        path: folder or hub id of a pretrained model, with its shape and tokenizer; null: train the shape from scratch.
            A branch, tag or commit may follow a hub id, as owner/name@v1. A run keeps to the commit that it began with.
        attention: attention implementation for training: `blocks` (blockwise, any device), `xla` (materializes all
            scores), `splash` (TPU kernel) or `auto`. `auto` is `splash` on a TPU and `blocks` elsewhere.
        balance_weight: factor of the load-balancing loss of a student with experts, which is added to the loss
            (`router_aux_loss_coef`). 0: it is measured and not added.
    """

    path: str | None = None
    attention: Literal["auto", "blocks", "xla", "splash"] = "auto"
    balance_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_remat(self.remat, self.attention)
        expect(0 <= self.balance_weight < math.inf, self, "balance_weight", "at least 0")

    def not_applicable(self) -> NotApplicable:
        """Return the shape, if the student is pretrained."""
        if self.path is None:
            return NotApplicable()
        reason = "a pretrained student, whose shape is that of its config.json. Remove it, or student.path."
        return NotApplicable(SHAPE, "path", reason)

    def decoder(self, vocab_size: int) -> DecoderConfig:
        """Return the decoder of this shape with `vocab_size` tokens, and the default precision."""
        return DecoderConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in SHAPE})

    def computed(self, shape: DecoderConfig, platform: str) -> DecoderConfig:
        """Return a decoder of another shape with this precision, on JAX's platform "tpu", "gpu" or "cpu".

        Raises:
            ConfigError: the platform does not have this attention, or a load-balancing loss has no experts.
        """
        if self.attention == "splash" and platform != "tpu":
            raise ConfigError(
                f"student.attention splash needs a TPU, but this machine has a {platform}. Use auto instead."
            )
        attention = self.attention if self.attention != "auto" else "splash" if platform == "tpu" else "blocks"
        precision = {field.name: getattr(self, field.name) for field in dataclasses.fields(DecoderPrecision)}
        experts = shape.experts
        if experts is not None:
            products: Products = "ragged" if platform == "tpu" else "blocks"
            experts = dataclasses.replace(experts, balance_weight=self.balance_weight, products=products)
        elif self.balance_weight:
            raise ConfigError(
                f"student.balance_weight is {self.balance_weight}, but the student has no experts: remove it."
            )
        return dataclasses.replace(shape, **precision, attention=attention, experts=experts)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The student's tokenizer.

    Attributes:
        path: folder with tokenizer.json, or a hub id (owner/name or owner/name@revision); null: that of student.path,
            or one trained on the training rows.
        vocab_size: most tokens of a tokenizer that is trained here.
    """

    path: str | None = None
    vocab_size: int = 4_096

    def __post_init__(self) -> None:
        at_least(1, self, "vocab_size")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Rows, and how they become sequences.

    Attributes:
        train: files (.jsonl, .json, .csv, .tsv or .parquet, also compressed), folders, patterns such as data/*.jsonl
            (one or a list), or hub ids ("org/name:config@revision"). docs/data.md lists the layouts of rows.
        test: held-out rows, in the same form; empty: hold out test_rows of the training rows. All of them count for
            exact match, against gold, or against the answer of a row without gold. Those with a correct reply count for
            the loss.
        columns: our names of fields and the columns that hold them, such as {question: q, gold: meta.answer}; empty:
            the columns are found by their names.
        row_function: a function of your own, "package.module:function", that turns a row into one of a known layout.
            It returns None to leave the row out.
        train_split: keep only rows with this split field; for a folder or a hub id, the split to load.
        test_split: the same for the held-out rows.
        test_rows: questions to hold out if test is empty. The first stage draws them, by a hash of each question's text
            that the seed salts, from all rows that have a right answer, even if the reply is wrong. The run keeps that
            rule for all of its stages, whatever their rows, seeds and test_rows are.
        format: plain: question, rationale and answer with a separator between; chat: the tokenizer's chat template.
        separator: plain: text between question, rationale and answer.
        reasoning: chat: form of a reply: rationale, blank line, answer; or <think>rationale</think>, answer.
        answer_format: chat: how the answer is written, with {answer} in it. Empty: "#### {answer}" in plain replies,
            else the answer alone.
        system: chat: system message before each question whose row has none; empty: that of the chat template.
        loss_on: supervised tokens: the whole sequence, or what follows the question.
        turns: chat: replies that loss_on completion supervises in a chat of several turns: the last, or all. A greeting
            before the first question is never one of them, nor an earlier message with weight: 0. A chat becomes
            several sequences if the template renders an earlier turn in another way later on.
        seq_len: positions of a packed row.
        packing: pack several documents into a row.
        too_long: what to do with a document that does not fit. A held-out question counts for exact match if its prompt
            fits.
        bad_rows: what to do with a row that cannot be used.
        keep_incorrect: train on known mistakes of the teacher too. The held-out loss never counts them.
        streaming: read and tokenize the training rows during the training, for files that do not fit into memory. Rows
            are then packed in windows, and of duplicates only exact copies of a line are left out.
        num_workers: processes that read and tokenize rows; 0: a thread of the training process. They never change the
            batches.
    """

    train: list[str] | str = dataclasses.field(default_factory=list)
    test: list[str] | str = dataclasses.field(default_factory=list)
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    row_function: str = ""
    train_split: str | None = None
    test_split: str | None = None
    test_rows: int = 500
    format: Literal["plain", "chat"] = "plain"
    separator: str = "<sep>"
    reasoning: Literal["plain", "think"] = "plain"
    answer_format: str = ""
    system: str = ""
    loss_on: Literal["sequence", "completion"] = "sequence"
    turns: Literal["last", "all"] = "last"
    seq_len: int = 512
    packing: bool = True
    too_long: Literal["error", "drop"] = "error"
    bad_rows: Literal["error", "drop"] = "error"
    keep_incorrect: bool = False
    streaming: bool = False
    num_workers: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "seq_len")
        at_least(0, self, "test_rows", "num_workers")
        if problem := columns_problem(self.columns) or row_function_problem(self.row_function):
            raise ConfigError(problem)
        if self.answer_format and self.answer_format.count("{answer}") != 1:
            raise ConfigError(f"answer_format must hold {{answer}} once, got {self.answer_format!r}.")

    def not_applicable(self) -> NotApplicable:
        """Return the settings of the other format."""
        names = ("reasoning", "answer_format", "system", "turns") if self.format == "plain" else ("separator",)
        return NotApplicable(names, "format", f"data.format {self.format}. Remove it, or choose the other format.")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Attributes:
        steps: number of updates.
        epochs: passes over the packed training rows, in place of steps; null: steps counts. Fractions are allowed.
        batch_size: packed rows of a batch.
        micro_batches: parts of a batch that are in memory one at a time; divides batch_size.
        init_from: folder of the stage to start from, or student.path for its own weights. null: sft starts from
            student.path or from scratch, grpo from this run's sft.
        log_every: steps between rows of metrics.jsonl.
        eval_every: steps between held-out losses; 0: only at the end.
        eval_accuracy: measure the accuracy of greedy replies at eval_every too, which takes time. It always is with
            on-policy ghosts.
        optimizer: the optimizer and its schedule.
    """

    steps: int = 1_000
    batch_size: int = 16
    micro_batches: int = 1
    init_from: str | None = None
    log_every: int = 10
    eval_every: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: float | None = None
    eval_accuracy: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "batch_size", "micro_batches", "log_every")
        at_least(0, self, "eval_every")
        if self.batch_size % self.micro_batches:
            raise ConfigError(f"micro_batches ({self.micro_batches}) must divide batch_size ({self.batch_size}).")
        expect(self.epochs is None or self.epochs > 0, self, "epochs", "above 0 or null")
        if self.epochs is not None:
            return  # the number of steps follows from the rows, and is checked then
        try:
            self.optimizer.make_schedule(self.steps)
        except ValueError as error:
            raise ConfigError(f"optimizer.{error}") from error

    def not_applicable(self) -> NotApplicable:
        """Return the number of steps, if it follows from the epochs."""
        if self.epochs is None:
            return NotApplicable()
        reason = "a stage with a number of epochs, which its steps follow from. Remove it, or set epochs to null."
        return NotApplicable(("steps",), "epochs", reason)


@dataclasses.dataclass(frozen=True)
class GrpoConfig(StageConfig):
    """The GhostRespond stage: a stage of training, and the settings below.

    Attributes:
        objective: objective of one token (cotgrpo.objectives has the formulas).
        ghosts: source of the ghost tokens, and of the contexts.
        rollouts: who writes the student's replies: this process, or an engine on a server (docs/rollouts.md).
        reference_kl: weight of KL(student || student before this stage); 0: none. group_relative has
            grpo.objective.kl_weight instead.
        reward_weight: weight of the group-relative loss of the replies' verified reward, which is added to the
            objective of a live ghost; 0: none. It compares the replies to a question (ghosts.num_generations).
        max_entropy_growth: stop if the student's entropy grows by more than this factor; null: never.
        reward_gain: log the change of the reward on each batch by its own update, at the price of two forward passes.
    """

    objective: Objective = choice("name", OBJECTIVES, Pair())
    ghosts: Ghosts = choice("source", SOURCES, TeacherForced())
    rollouts: InProcess | RolloutServerSettings = choice("engine", ENGINES, InProcess())
    reference_kl: float = 0.0
    reward_weight: float = 0.0
    max_entropy_growth: float | None = 2.0
    reward_gain: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "reference_kl", "reward_weight")
        name, source = type(self.objective).__name__, self.ghosts.source
        if isinstance(self.objective, GroupRelative) != isinstance(self.ghosts, VerifiedReward):
            raise ConfigError(
                "objective.name group_relative and ghosts.source verified_reward belong together, as the one objective "
                f"without a ghost: got {name} with {source}. Set both, or neither."
            )
        own = isinstance(self.objective, OwnObjective)  # the stage checks it, so that other commands need not load it
        if self.ghosts.on_policy and not own and num_draws(self.objective) > 1:
            raise ConfigError(
                f"objective.samples must be 1 with ghosts.source {source}, got {num_draws(self.objective)}: the token "
                "drawn at a context is that of the student's reply. Set it to 1, or take ghosts.source teacher_forced."
            )
        if isinstance(self.objective, GroupRelative) and self.reward_gain:
            raise ConfigError("reward_gain is that of a ghost token, and group_relative has none. Remove it.")
        self.check_divergence()
        self.check_replies()
        self.check_rollouts()
        if isinstance(self.ghosts, VerifiedReward) and self.batch_size % self.ghosts.num_generations:
            raise ConfigError(
                "batch_size counts replies with group_relative: expected a multiple of ghosts.num_generations, "
                f"{self.ghosts.num_generations} to each question, got {self.batch_size}."
            )
        growth = self.max_entropy_growth
        expect(growth is None or growth > 1, self, "max_entropy_growth", "above 1 or null")
        if self.epochs is not None and not isinstance(self.ghosts, TeacherForced):
            raise ConfigError(
                f"epochs counts passes over packed rows, which ghosts.source {source} does not make: it trains on the "
                "student's own replies, whose length is not known before. Set steps instead."
            )

    def check_rollouts(self) -> None:
        """Raise ConfigError if an engine would write replies that are not trained on, or not at the right time."""
        if not isinstance(self.rollouts, RolloutServerSettings):
            return
        if not self.ghosts.on_policy:
            raise ConfigError(
                "rollouts.engine server writes new replies of the student, which ghosts.source "
                f"{self.ghosts.source} does not train on: set grpo.ghosts.source to teacher_model, teacher_server, "
                "privileged_self or verified_reward, or rollouts.engine to in_process."
            )
        if getattr(self.ghosts, "prefetch_rollouts", False) and self.rollouts.refresh_every > 1:
            raise ConfigError(
                "ghosts.prefetch_rollouts true needs rollouts.refresh_every 1, got "
                f"{self.rollouts.refresh_every}: replies that are one update old anyway cannot be of older weights too."
            )

    def check_divergence(self) -> None:
        """Raise ConfigError if the ghosts do not hand over what a divergence compares with."""
        if isinstance(self.ghosts, LiveGhosts) and self.ghosts.has_other_tokenizer:
            self.check_other_tokenizer()
        if not isinstance(self.objective, Divergence):
            return
        name = next((name for name, kind in OBJECTIVES.items() if type(self.objective) is kind), "a divergence")
        if not isinstance(self.ghosts, LiveGhosts | Cached):
            raise ConfigError(
                f"objective.name {name} needs the distribution of a live ghost: set grpo.ghosts.source to "
                f"teacher_model, teacher_server, privileged_self or cached, got {self.ghosts.source}."
            )
        if not reads_teacher(self.objective):
            return
        exact = f"objective.top_k null takes the whole distribution of the live ghost for {name}"
        if not self.ghosts.is_fixed_model:
            raise ConfigError(
                f"{exact}, which has to be a frozen model in this process, got ghosts.source {self.ghosts.source}. "
                "Set a number of tokens, such as 16, or take teacher_model, or a frozen privileged_self that reads no "
                "reply."
            )
        if isinstance(self.ghosts, LiveGhosts) and self.ghosts.teacher_forced_share:
            raise ConfigError(f"{exact}, which rows of text do not have: set ghosts.teacher_forced_share to 0.")
        if self.reference_kl:
            raise ConfigError(f"{exact} in the place of the reference: set reference_kl to 0, or top_k to a number.")

    def check_other_tokenizer(self) -> None:
        """Raise ConfigError if more is read of a teacher with another tokenizer than its choice."""
        assert isinstance(self.ghosts, LiveGhosts)
        why = f"ghosts.source {self.ghosts.source} has another tokenizer here, and gives the teacher's choice alone"
        if isinstance(self.objective, Divergence):
            raise ConfigError(f"{why}: set objective.name to one that reads no distribution, such as pair.")
        if self.ghosts.choice != "argmax":
            raise ConfigError(f"{why}: set ghosts.choice to argmax, got {self.ghosts.choice}.")

    def check_replies(self) -> None:
        """Raise ConfigError if the replies of a batch cannot be compared as the settings want it."""
        live = isinstance(self.ghosts, LiveGhosts)
        if self.reward_weight and not live:
            raise ConfigError(
                "reward_weight adds a reward to the objective of a live ghost: set grpo.ghosts.source to teacher_model "
                f"or privileged_self, got {self.ghosts.source}. For a reward without a ghost, set objective.name "
                "group_relative and ghosts.source verified_reward."
            )
        if not isinstance(self.ghosts, LiveGhosts):
            return
        count = self.ghosts.num_generations
        if self.reward_weight and count < 2:
            raise ConfigError(
                "reward_weight compares the replies to a question: set ghosts.num_generations to 2 or more, which "
                f"divides batch_size, got {count}."
            )
        if self.reward_weight and self.ghosts.temperature != 1:
            raise ConfigError(
                "reward_weight needs replies of the student's own distribution: set ghosts.temperature to 1, got "
                f"{self.ghosts.temperature}."
            )
        if self.reward_weight and self.ghosts.teacher_forced_share:
            raise ConfigError("reward_weight needs replies in every row: set ghosts.teacher_forced_share to 0.")
        replies = self.batch_size - self.ghosts.forced_rows(self.batch_size)
        if replies % count:
            raise ConfigError(
                f"batch_size leaves {replies} replies: expected a multiple of ghosts.num_generations, {count} to each "
                f"question. batch_size is {self.batch_size}, less the rows of ghosts.teacher_forced_share."
            )

    def not_applicable(self) -> NotApplicable:
        """Return `reference_kl`, if the objective has its own, or the steps, if they follow from the epochs."""
        if not isinstance(self.objective, GroupRelative):
            return super().not_applicable()
        reason = "the objective 'group_relative'. Set grpo.objective.kl_weight instead."
        return NotApplicable(("reference_kl",), "objective.name", reason)

    @functools.cached_property
    def full_objective(self) -> Objective:
        """The objective, gated or with a reward if the settings say so, and with the KL if `reference_kl` is set."""
        objective, ghosts = self.objective, self.ghosts
        if isinstance(ghosts, LiveGhosts) and (ghosts.when != "always" or self.reward_weight):
            objective = RewardedGhost(objective, self.reward_weight, ghosts.ratio_clip)
        return ReferenceKl(objective, self.reference_kl) if self.reference_kl else objective


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How exact match is measured: of greedy replies, and of sampled ones for pass@k and maj@k.

    Attributes:
        rows: most held-out rows to use, of each test set.
        batch_size: replies decoded at a time.
        max_new_tokens: longest reply in tokens.
        sets: further test sets, as {name: files}, in the form of data.test. Each has its own row in eval.json and in
            the report. data.test_split, data.columns and data.row_function apply to them.
        samples: replies to draw to each question, for pass@k and maj@k; 0: greedy replies only.
        k: the k of pass@k and maj@k, one or several, each at most samples. Empty: 1 and samples.
        temperature: of the drawn replies. The greedy ones have none.
        top_p: draw from the likeliest tokens that have at least this probability together.
        seed: seed of the draws. A draw depends on it, the question and its own number only.
    """

    rows: int = 500
    batch_size: int = 128
    max_new_tokens: int = 256
    sets: dict[str, list[str] | str] = dataclasses.field(default_factory=dict)
    samples: int = 0
    k: list[int] | int = dataclasses.field(default_factory=list)
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "rows", "batch_size", "max_new_tokens")
        at_least(0, self, "samples", "temperature", "seed")
        expect(0 < self.top_p <= 1, self, "top_p", "in (0, 1]")
        for name, files in self.sets.items():
            if not SET_NAME.fullmatch(name):
                raise ConfigError(f"sets names a test set {name!r}: expected letters, digits and . _ - alone.")
            if not (names := [files] if isinstance(files, str) else files) or not all(each.strip() for each in names):
                raise ConfigError(f"sets.{name} must name at least one file or hub id, got {files!r}.")
        if not self.samples:
            at_least_one = all(k >= 1 for k in ([self.k] if isinstance(self.k, int) else self.k))
            expect(at_least_one, self, "k", "at least 1")
            return
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"temperature 0 would draw the same reply {self.samples} times (samples): set temperature above 0, "
                "such as 0.7, or samples to 0 for greedy replies."
            )
        for k in self.ks:
            if not 1 <= k <= self.samples:
                raise ConfigError(f"k must lie between 1 and samples, which is {self.samples}, got {k}.")

    @property
    def ks(self) -> list[int]:
        """The k of pass@k and maj@k, in order."""
        given = [self.k] if isinstance(self.k, int) else self.k
        return sorted(set(given or (1, self.samples)))

    def not_applicable(self) -> NotApplicable:
        """Return the settings of drawn replies, if there are none."""
        if self.samples:
            return NotApplicable()
        reason = "greedy replies. Set eval.samples too, such as 8, or remove it."
        return NotApplicable(("k", "temperature", "top_p", "seed"), "samples", reason)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When and where the run is saved.

    Attributes:
        every: steps between checkpoints. There is always one at the end.
        keep: number of newest checkpoints to keep. One more stays until a later step shows that the newest is good.
        keep_best: number of checkpoints with the lowest held-out loss to keep besides. Unless it is 0, each evaluation
            (eval_every) is saved.
        folder: where checkpoints go: a disk, or a bucket (gs://, s3:// or another store of fsspec). sft and grpo have
            folders of their own in it. Checkpoints for a store other than gs:// are copied from run_dir's disk. null:
            next to the stage's logs in run_dir.
    """

    every: int = 200
    keep: int = 3
    keep_best: int = 0
    folder: str | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "every", "keep")
        at_least(0, self, "keep_best")


CHANGES = ("data", "held_out", "tokenizer", "student")
"""Kinds of inputs that a run records."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run.

    Attributes:
        run_dir: folder of everything that the run writes. Machines that share a run share it too.
        seed: seed of the parameters, the order of the data, and all draws.
        max_skipped: stop after this many consecutive updates that were skipped because they were not finite.
        allow_changed: inputs that may have changed since the run recorded them, one or several of data, held_out,
            tokenizer and student. The run goes on with what they are now. It is never saved with the run.
        student: a pretrained student, or the shape of one from scratch.
        lora: LoRA: train small matrices next to frozen weights.
        tokenizer: the student's tokenizer.
        data: rows, and how they become sequences.
        sft: supervised fine-tuning on the triples (chain-of-thought distillation).
        grpo: GhostRespond Policy Optimization (not Group Relative).
        eval: how exact match is measured.
        verify: functions of your own that judge replies, in every command.
        callbacks: callbacks of your own, as one or several "package.module:name" (`cotgrpo.training.hooks.Callback`).
        trackers: one or several of wandb, mlflow and trackio, or "package.module:name" of your own
            (`cotgrpo.logs.trackers.Tracker`). metrics.jsonl and TensorBoard's events are always written.
        tracker: where the trackers log.
        profile: which steps are profiled.
        checkpoint: when and where the run is saved.
        mesh: how the devices share the work.
        compiler: XLA's options of the train step.
    """

    run_dir: str = "runs/run"
    seed: int = 0
    max_skipped: int = 10
    allow_changed: list[str] | str = dataclasses.field(default_factory=list)
    student: StudentConfig = StudentConfig()
    lora: LoraConfig | None = optional("rank", LoraConfig)
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    sft: StageConfig = StageConfig()
    grpo: GrpoConfig = GrpoConfig()
    eval: EvalConfig = EvalConfig()
    verify: OwnVerifier = OwnVerifier()
    callbacks: list[str] | str = dataclasses.field(default_factory=list)
    trackers: list[str] | str = dataclasses.field(default_factory=list)
    tracker: TrackerConfig = TrackerConfig()
    profile: ProfileConfig = ProfileConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    compiler: CompilerConfig = CompilerConfig()

    def __post_init__(self) -> None:
        at_least(0, self, "seed")
        at_least(1, self, "max_skipped")
        check_callbacks(self.callbacks, self.trackers)
        expect(self.allowed_changes <= {*CHANGES}, self, "allow_changed", f"some of {', '.join(CHANGES)}")
        expect(bool(self.run_dir.strip()), self, "run_dir", "the name of a folder")
        for name, stage in (("sft", self.sft), ("grpo", self.grpo)):
            if stage.epochs is not None and self.data.streaming:
                raise ConfigError(
                    f"{name}.epochs needs the number of packed rows, which data.streaming does not know before it has "
                    f"read them. Set {name}.steps instead, or data.streaming to false."
                )
        if "://" in self.run_dir:
            raise ConfigError(
                f"run_dir must be a folder of this machine, got {self.run_dir!r}: logs are appended to, which a bucket "
                "does not do. Mount it, or set checkpoint.folder, which may be a gs:// or s3:// bucket."
            )

    @property
    def reads_rows(self) -> bool:
        """Whether more is read of a row than its texts: by a verifier of one's own, or by a route to teachers."""
        return self.verify.is_own or (isinstance(self.grpo.ghosts, Teachers) and bool(self.grpo.ghosts.route))

    @property
    def allowed_changes(self) -> frozenset[str]:
        """The kinds of inputs that may have changed."""
        given = [self.allow_changed] if isinstance(self.allow_changed, str) else self.allow_changed
        return frozenset(kind.strip() for text in given for kind in text.split(",")) - {""}
