"""The settings of a run: one tree of frozen dataclasses. `cotgrpo.config.files` reads them from YAML and from dotted options."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import optax

from cotgrpo.config.ghosts import LIVE, GhostsConfig
from cotgrpo.config.ghosts import ObjectiveConfig as ObjectiveConfig
from cotgrpo.models.decoder import DecoderConfig
from cotgrpo.models.lora import LoraConfig
from cotgrpo.optimizers import make_optimizer
from cotgrpo.sharding import MeshConfig


class ConfigError(ValueError):
    """Settings that cannot be used; the message names the key, what was expected and what came."""


def at_least(least: int, settings: Any, *names: str) -> None:
    """Raises ConfigError where a setting is smaller than `least`."""
    for name in names:
        value = getattr(settings, name)
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}.")


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The student: a pretrained model, or a shape that is trained from scratch.

    Attributes:
        path: a folder or hub id of a pretrained model, which brings its shape and tokenizer along; null: the shape below, from scratch.
        width: D, the size of the residual stream.
        num_layers: L.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides num_heads.
        head_dim: width of a head, even.
        mlp_width: the size of the gated MLP's middle.
        rope_theta: base of the rotary frequencies.
        tied_head: the head is the transposed embedding.
        init_scale: standard deviation of the initial weights.
        dtype: compute type.
        param_dtype: storage type of the parameters.
        remat: what the backward pass recomputes: nothing; all but matrix products (dots) and attention; the whole block; or that too, with its input kept in the host's memory (offload).
        attention: of whole sequences: blocks, or xla, which holds all scores, on any device; splash, a kernel of TPUs; auto: that on a TPU, else blocks.
    """

    path: str | None = None
    width: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    mlp_width: int = 768
    rope_theta: float = 10_000.0
    tied_head: bool = True
    init_scale: float = 0.02
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full", "offload"] = "dots"
    attention: Literal["auto", "blocks", "xla", "splash"] = "auto"

    def __post_init__(self) -> None:
        if self.path is None:
            self.decoder(vocab_size=1)  # checks the numbers
        for name in () if self.path is None else self.shape():
            if getattr(self, name) != getattr(StudentConfig, name):
                raise ConfigError(
                    f"student.{name} is no setting of a pretrained student, whose shape is that of its config.json. "
                    "Remove it, or student.path."
                )

    @classmethod
    def shape(cls) -> list[str]:
        """The settings that a pretrained student does not have."""
        shared = ("path", "dtype", "param_dtype", "remat", "attention")
        return [field.name for field in dataclasses.fields(cls) if field.name not in shared]

    def decoder(self, vocab_size: int) -> DecoderConfig:
        """The decoder with this shape and `vocab_size` tokens, stored and computed as a `DecoderConfig` is by default."""
        return DecoderConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in self.shape()})

    def computed(self, shape: DecoderConfig, platform: str) -> DecoderConfig:
        """A decoder of this shape, stored and computed as the settings say on JAX's platform "tpu", "gpu" or "cpu".

        Raises:
            ConfigError: attention that the platform does not have.
        """
        if self.attention == "splash" and platform != "tpu":
            raise ConfigError(
                f"student.attention is splash, a kernel of TPUs, and this is a {platform}. Leave it auto."
            )
        attention = self.attention if self.attention != "auto" else "splash" if platform == "tpu" else "blocks"
        return dataclasses.replace(
            shape, dtype=self.dtype, param_dtype=self.param_dtype, remat=self.remat, attention=attention
        )


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """LoRA: small matrices are trained beside the student's frozen weights; cotgrpo.models.lora has the formula.

    Attributes:
        rank: of the matrices; 0: no LoRA, all parameters are trained.
        alpha: the matrices' product is scaled by alpha / rank.
        dropout: share of the matrices' inputs that a train step sets to zero.
        targets: what is adapted: patterns, each searched in the names of the layers' projections.
        rslora: scale by alpha / sqrt(rank).
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = dataclasses.field(default_factory=lambda: list(LoraConfig.targets))
    rslora: bool = False

    def __post_init__(self) -> None:
        at_least(0, self, "rank")
        given = dataclasses.asdict(self) | {"targets": tuple(self.targets)}
        for name, value in given.items():
            if not self.rank and name != "rank" and value != getattr(LoraConfig, name):
                raise ConfigError(f"lora.{name} has no effect without LoRA. Remove it, or set lora.rank.")
        self.build()

    def build(self) -> LoraConfig | None:
        """What is adapted, and how; None: no LoRA. Raises ValueError where a setting is outside its range."""
        return LoraConfig(**dataclasses.asdict(self) | {"targets": tuple(self.targets)}) if self.rank else None


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The student's tokenizer.

    Attributes:
        path: a folder with tokenizer.json, or a hub id; null: that of student.path, or else one trained on the training rows.
        vocab_size: the most tokens of a tokenizer that is trained here.
    """

    path: str | None = None
    vocab_size: int = 4_096


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Rows, and how they become sequences.

    Attributes:
        train: .jsonl or .parquet files (one or a list), or hub ids ("org/name" or "org/name:config").
        test: held-out rows, likewise; empty: test_rows of the training rows are held out. All of them count for exact match, against
            gold, or the answer of a row without gold; those whose reply is correct count for the loss.
        train_split: keep only rows whose split field is this; of a hub id, the split to load.
        test_split: the same for test.
        test_rows: rows to hold out where test is empty, drawn by the seed from all that have a right answer, even where the reply is wrong.
        format: plain: question, rationale and answer with a separator between; chat: the tokenizer's own chat template.
        separator: of plain, the text between question, rationale and answer.
        reasoning: of chat, how the assistant replies: plain: rationale, blank line, answer; think: <think>rationale</think>, answer.
        answer_format: of chat, how the answer is written, with {answer} in it; empty: "#### {answer}" in plain replies, else the answer alone.
        system: of chat, a system message before every question whose row has none of its own; empty: none but what the template puts there.
        loss_on: what is supervised, the whole sequence or what follows the question.
        seq_len: positions of a row.
        packing: several documents a row.
        too_long: what to do with a document that does not fit. A held-out question counts for exact match where its prompt fits.
        bad_rows: what to do with a row that cannot be used.
        keep_incorrect: train on known mistakes of the teacher too; the held-out loss never counts them.
    """

    train: list[str] | str = dataclasses.field(default_factory=list)
    test: list[str] | str = dataclasses.field(default_factory=list)
    train_split: str | None = None
    test_split: str | None = None
    test_rows: int = 500
    format: Literal["plain", "chat"] = "plain"
    separator: str = "<sep>"
    reasoning: Literal["plain", "think"] = "plain"
    answer_format: str = ""
    system: str = ""
    loss_on: Literal["sequence", "completion"] = "sequence"
    seq_len: int = 512
    packing: bool = True
    too_long: Literal["error", "drop"] = "error"
    bad_rows: Literal["error", "drop"] = "error"
    keep_incorrect: bool = False

    def __post_init__(self) -> None:
        of_plain, of_chat = ("separator",), ("reasoning", "answer_format", "system")
        for name in of_chat if self.format == "plain" else of_plain:
            if getattr(self, name) != getattr(DataConfig, name):
                raise ConfigError(
                    f"data.{name} is no setting of the {self.format} format. Remove it, or choose the other data.format."
                )
        if self.answer_format and self.answer_format.count("{answer}") != 1:
            raise ConfigError(f"data.answer_format must hold {{answer}} once, got {self.answer_format!r}.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule.

    Attributes:
        name: which one; adafactor needs the least memory.
        learning_rate: the peak.
        warmup_steps: linear from near 0 to the peak.
        schedule: what follows the warm-up.
        final_fraction: of the peak, at the last step.
        weight_decay: decoupled, on matrices only.
        clip_norm: gradients of a larger global norm are scaled down to it; null: never.
        b1: first moment's decay.
        b2: second moment's decay.
        eps: Adam's epsilon.
    """

    name: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """The optimizer of a stage of so many steps. Raises ValueError where a setting is outside its range."""
        return make_optimizer(total_steps=total_steps, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Attributes:
        steps: updates.
        batch_size: packed rows of a batch.
        micro_batches: parts of a batch that are in memory one at a time; divides batch_size.
        init_from: the stage's folder whose newest checkpoint to start from, or student.path again for its own weights; null: those of
            student.path, or from scratch, for sft, and this run's sft for grpo.
        log_every: steps of one row in metrics.jsonl.
        eval_every: steps between held-out losses; 0: only at the end.
        optimizer: the optimizer and its schedule.
    """

    steps: int = 1_000
    batch_size: int = 16
    micro_batches: int = 1
    init_from: str | None = None
    log_every: int = 10
    eval_every: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "batch_size", "micro_batches", "log_every")
        at_least(0, self, "eval_every")
        if self.batch_size % self.micro_batches:
            raise ConfigError(f"micro_batches ({self.micro_batches}) must divide batch_size ({self.batch_size}).")
        self.optimizer.build(self.steps)  # a wrong setting is an error now, and not after the data is read


@dataclasses.dataclass(frozen=True)
class GrpoConfig(StageConfig):
    """The GhostRespond stage: as the stage before, and

    Attributes:
        objective: what is optimised at each token.
        ghosts: where the ideal token comes from, and on whose contexts.
        max_entropy_growth: stop where the student's entropy is more than so many times what it was at first; null: never.
    """

    objective: ObjectiveConfig = ObjectiveConfig()
    ghosts: GhostsConfig = GhostsConfig()
    max_entropy_growth: float | None = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective.build()
        if (self.objective.name == "group_relative") != (self.ghosts.source == "verified_reward"):
            raise ConfigError(
                "objective.name group_relative and ghosts.source verified_reward belong together: it is the one objective without a ghost, got "
                f"{self.objective.name} with {self.ghosts.source}. Set both, or neither."
            )
        if self.objective.name == "forward_kl" and self.ghosts.source not in LIVE:
            raise ConfigError(
                f"objective.name forward_kl needs a live ghost, whose distribution it is told: set ghosts.source to {' or '.join(LIVE)}, got {self.ghosts.source}."
            )
        if self.ghosts.source == "verified_reward" and self.batch_size % self.ghosts.num_generations:
            raise ConfigError(
                f"grpo.batch_size counts replies: expected a multiple of ghosts.num_generations, {self.ghosts.num_generations} to each question, got {self.batch_size}."
            )
        if self.max_entropy_growth is not None and not self.max_entropy_growth > 1:
            raise ConfigError(f"max_entropy_growth must be above 1 or null, got {self.max_entropy_growth}.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How exact match is measured.

    Attributes:
        rows: the most held-out rows to use.
        batch_size: replies at a time.
        max_new_tokens: replies are cut off here.
    """

    rows: int = 500
    batch_size: int = 128
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        at_least(1, self, "rows", "batch_size", "max_new_tokens")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved.

    Attributes:
        every: steps between checkpoints; there is always one at the end.
        keep: how many of the newest stay.
        keep_best: how many of those with the lowest held-out loss stay beside them; where it is not 0, each evaluation (eval_every) is saved.
        folder: where checkpoints go, in folders of their own for sft and grpo: a disk, a gs:// bucket, or s3:// or another store that fsspec knows, to which
            those on run_dir's disk are copied; null: beside the stage's logs in run_dir.
    """

    every: int = 200
    keep: int = 3
    keep_best: int = 0
    folder: str | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "every", "keep")
        at_least(0, self, "keep_best")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run.

    Attributes:
        run_dir: the folder of everything that the run writes; where it runs on several machines, one that all of them see.
        seed: of the parameters, the order of the data, and what is drawn.
        max_skipped: stop after this many updates in a row that were skipped because they were not finite.
        student: a pretrained student, or the shape of one from scratch.
        lora: train small matrices beside frozen weights.
        tokenizer: the student's tokenizer.
        data: rows, and how they become sequences.
        sft: supervised fine-tuning on the triples (chain-of-thought distillation).
        grpo: GhostRespond Policy Optimization (not Group Relative).
        eval: how exact match is measured.
        checkpoint: when the run is saved.
        mesh: how the devices share the work.
    """

    run_dir: str = "runs/run"
    seed: int = 0
    max_skipped: int = 10
    student: StudentConfig = StudentConfig()
    lora: LoraSettings = LoraSettings()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    sft: StageConfig = StageConfig()
    grpo: GrpoConfig = GrpoConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        at_least(0, self, "seed")
        at_least(1, self, "max_skipped")
        if "://" in self.run_dir:
            raise ConfigError(
                f"run_dir must be a folder of this machine, got {self.run_dir!r}: logs are appended to, which a bucket does not do. "
                "Mount it, or set checkpoint.folder, which may be a gs:// or s3:// bucket."
            )
