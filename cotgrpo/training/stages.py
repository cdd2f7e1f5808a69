"""The commands `sft`, `grpo` and `eval`: set up, measure, train, measure, report. GRPO is GhostRespond Policy Optimization, not Group Relative."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from cotgrpo.accelerators.mfu import StepFlops
from cotgrpo.atomic_files import read_json, write_json
from cotgrpo.checkpoints.manager import check_state
from cotgrpo.checkpoints.object_store_copy import ObjectStoreCopy
from cotgrpo.config.settings import Config, ConfigError
from cotgrpo.distributed.processes import is_process_0, on_process_0, process_rows, put_on_mesh
from cotgrpo.evaluation.held_out import HeldOut
from cotgrpo.reports.report import write_report
from cotgrpo.sharding import batch_sharding, jit_step, state_sharding
from cotgrpo.storage import check_folder_works
from cotgrpo.training.batch_sources import group_relative_batches, live_batches, self_reply_batches, text_batches
from cotgrpo.training.collapse import CollapseDetector
from cotgrpo.training.inputs import StageInputs, check_folder, claim_folder, load_eval_inputs, load_inputs
from cotgrpo.training.loop import LoopSettings, train
from cotgrpo.training.mesh import check_stage_batch, run_mesh
from cotgrpo.training.steps import StageName, needs_reference, stage_step
from cotgrpo.training.weights import (
    StageWeights,
    checkpoints_of,
    first_weights,
    has_checkpoint,
    mirror_of,
    origin_of,
    restore_weights,
    start_weights,
)
from cotgrpo.types import TrainState

PACKAGES = ("cotgrpo", "jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
SAMPLES_SHOWN = 12
GROUP_RELATIVE = (
    "The objective of this run was the other one, group_relative: Group Relative Policy Optimization, what the field calls GRPO, "
    "which has no ghost and learns from whether whole replies are right."
)


def run_sft(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Trains a student on triples with the next-token loss, in `run_dir/sft`; run again, it resumes. Returns the report."""
    return StageRunner("sft", config, console or Console()).run()


def run_grpo(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Trains on with a GhostRespond objective, in `run_dir/grpo`, from the SFT student or `grpo.init_from`. Returns the report."""
    return StageRunner("grpo", config, console or Console()).run()


def newest_stage(run_dir: Path) -> StageName:
    """The last stage that has a checkpoint.

    Raises:
        ConfigError: neither has one.
    """
    stages: tuple[StageName, ...] = ("grpo", "sft")
    for name in stages:
        if has_checkpoint(run_dir / name):
            return name
    raise ConfigError(
        f"{run_dir} holds no trained student: expected {checkpoints_of(run_dir / 'sft')}. Run `cotgrpo sft` first."
    )


def run_eval(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Measures the newest student of `run_dir` on held-out rows and writes `eval.json` beside it. Returns what it holds."""
    stage = StageRunner(newest_stage(Path(config.run_dir)), config, console or Console())
    weights, step = restore_weights(stage.folder, stage.setup.model)
    when = f"{stage.folder} at step {step}"
    measured = {"student": str(stage.folder), "step": step} | stage.held_out.measure(weights.merged(), when)
    if is_process_0():
        write_json(stage.folder / "eval.json", measured)
    stage.console.print(f"written: {stage.folder / 'eval.json'}", highlight=False, soft_wrap=True)
    return measured


def run_eval_pretrained(config: Config, out: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Measures the model at `student.path` on held-out rows; with `out`, writes `eval.json` in that folder. Returns what it holds."""
    console = console or Console()
    setup = load_eval_inputs(config)
    print_reports(setup, console)
    name = str(config.student.path)
    measured = {"model": name} | HeldOut(setup, config.sft.batch_size, console).measure(
        setup.model.first_params(), name
    )
    if out is not None and is_process_0():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "eval.json", measured)
        console.print(f"written: {out / 'eval.json'}", highlight=False, soft_wrap=True)
    return measured


def print_reports(setup: StageInputs, console: Console) -> None:
    """What was read, and what was left out."""
    for title, report in setup.reports.items():
        console.print(f"{title}: {report}", highlight=False, markup=False, soft_wrap=True)


@dataclasses.dataclass
class StageRunner:
    """One stage of a run, "sft" or "grpo"."""

    name: StageName
    config: Config
    console: Console

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir) / self.name

    @property
    def settings(self) -> Any:
        return getattr(self.config, self.name)

    @property
    def origin(self) -> Path | None:
        """The folder of the stage that the student comes from; None: pretrained, or from scratch."""
        return origin_of(self.name, self.config, Path(self.config.run_dir))

    @functools.cached_property
    def setup(self) -> StageInputs:
        return load_inputs(self.config, self.folder, self.origin)

    @functools.cached_property
    def held_out(self) -> HeldOut:
        return HeldOut(self.setup, self.settings.batch_size, self.console)

    def run(self) -> dict[str, Any]:
        """The whole stage. Run again, it goes on where it was; a finished one only returns its report."""
        check_stage_batch(self.config, self.name)
        on_process_0(lambda: self.check_folders())
        path = self.folder / "report.json"
        done = on_process_0(lambda: read_json(path) if path.is_file() else None)
        if done is not None:
            page = path.with_suffix(".html")
            self.console.print(f"{self.folder} is complete: {page}", highlight=False, soft_wrap=True)
            return dict(done)
        started = time.perf_counter()
        model = self.setup.model
        print_reports(self.setup, self.console)
        weights, start = self.start_weights()
        batches = self.make_batches(weights)
        if has_checkpoint(self.folder, self.config):
            check_state(self.checkpoints, jax.eval_shape(self.new_state, weights.trained))
        on_process_0(lambda: claim_folder(self.folder, model))
        size = f"{model.decoder.num_params() / 1e6:.2f} M parameters, {model.vocab_size} tokens in the vocabulary"
        self.console.print(f"student: {size}, from {start}", highlight=False, soft_wrap=True)
        if weights.lora is not None:
            count = sum(leaf.size for leaf in jax.tree.leaves(weights.trained))
            self.console.print(
                f"LoRA: {count / 1e6:.2f} M parameters are trained, beside the student's", highlight=False
            )
        before = self.measured_once("before.json", weights.merged, f"before {self.name}")
        training = time.perf_counter()
        state = self.train(weights, batches)
        trained = time.perf_counter()
        after = self.measured_once("after.json", lambda: weights.merged(state.params), f"after {self.name}")
        ended = time.perf_counter()
        wall = {
            "training": trained - training,
            "evaluation": ended - trained + training - started,
            "total": ended - started,
        }
        return on_process_0(lambda: self.report(before, after, wall))

    @property
    def checkpoints(self) -> Any:
        return checkpoints_of(self.folder, self.config)

    @property
    def mirror(self) -> ObjectStoreCopy | None:
        return mirror_of(self.folder, self.config)

    def check_folders(self) -> None:
        """Whether the run can go on in its folders; of a folder for checkpoints elsewhere, whether it can be written."""
        check_folder(self.folder, self.config, self.name)
        if self.mirror is not None:
            self.mirror.check_works()
        elif self.config.checkpoint.folder is not None:
            check_folder_works(self.checkpoints)

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The devices of all processes, in the layout of the config; None where there is one device."""
        return run_mesh(self.config)

    def make_batches(self, weights: StageWeights) -> Any:
        """What the stage learns from; `weights` are those before its first step."""
        source = self.config.grpo.ghosts.source
        if self.name == "sft" or source == "teacher_forced":
            return text_batches(self.config, self.setup, self.settings.batch_size, self.own_rows())
        makers: dict[str, Any] = {"self_reply": self_reply_batches, "verified_reward": group_relative_batches}
        return makers.get(source, live_batches)(self.config, self.setup, weights, self.folder)

    @property
    def on_policy(self) -> bool:
        """Whether the contexts are the student's own replies."""
        return self.name == "grpo" and self.config.grpo.ghosts.on_policy

    def train(self, weights: StageWeights, batches: Any) -> TrainState:
        """Trains to the last step. `weights.trained` are donated, unless the objective keeps near them."""
        settings = self.settings
        tx = settings.optimizer.build(settings.steps)
        step, extra = self.build_step(tx, weights)
        # The state is donated, and a reference's parameters are still wanted.
        first = jax.tree.map(jnp.copy, weights.trained) if self.needs_reference else weights.trained
        measure = self.held_out.loss_and_accuracy if self.on_policy else self.held_out.loss
        return train(
            step,
            self.new_state(first),
            batches,
            self.folder,
            LoopSettings(
                title=self.name,
                total_steps=settings.steps,
                log_every=settings.log_every,
                eval_every=settings.eval_every,
                checkpoint_every=self.config.checkpoint.every,
                keep=self.config.checkpoint.keep,
                keep_best=self.config.checkpoint.keep_best,
                max_skipped=self.config.max_skipped,
                flops=self.flops(weights),
            ),
            extra=extra,
            evaluate=lambda trained: measure(weights.merged(trained)),
            watch=CollapseDetector(self.folder, settings.max_entropy_growth) if self.name == "grpo" else None,
            console=self.console,
            checkpoint_folder=self.checkpoints,
            mirror=self.mirror,
        )

    def flops(self, weights: StageWeights) -> StepFlops:
        """What a step has to compute, and what the run's devices can."""
        devices = 1 if self.mesh is None else self.mesh.size
        frozen = weights.lora is not None
        return StepFlops.of(self.setup.model.decoder, self.config.data.seq_len, frozen=frozen, devices=devices)

    def new_state(self, trained: Any) -> TrainState:
        """The state before the first step."""
        tx = self.settings.optimizer.build(self.settings.steps)
        return TrainState.create(params=trained, tx=tx, key=self.config.seed)

    def own_rows(self) -> Any:
        """The rows of every batch that this process reads; None: all."""
        if self.mesh is None or jax.process_count() == 1:
            return None
        return process_rows(batch_sharding(self.mesh), (self.settings.batch_size, self.config.data.seq_len))

    def build_step(self, tx: Any, weights: StageWeights) -> tuple[Any, tuple[Any, ...]]:
        """The compiled step and its further arguments: LoRA's frozen base, and the reference's parameters where the objective keeps near one."""
        base = () if weights.lora is None else (weights.base,)
        reference = (weights.merged(),) if self.needs_reference else ()
        model = self.setup.model
        return jit_step(stage_step(self.config, self.name, model.student, tx), self.mesh), (*base, *reference)

    @property
    def needs_reference(self) -> bool:
        """Whether the objective keeps near the student before this stage."""
        return needs_reference(self.config, self.name)

    def start_weights(self) -> tuple[StageWeights, str]:
        """Weights before the first step, and where they come from.

        A stage that goes on takes its own newest ones, unless it keeps near the first: pretrained weights are not read again.
        """
        model, origin = self.setup.model, self.origin
        keeps_first = self.needs_reference or (self.on_policy and self.config.grpo.ghosts.source == "privileged_self")
        measured = on_process_0(lambda: (self.folder / "before.json").is_file())
        if measured and has_checkpoint(self.folder, self.config) and not keeps_first:
            origin = self.folder
        if origin is None:
            weights, start = first_weights(model), self.config.student.path or f"scratch (seed {self.config.seed})"
        else:
            weights, step = start_weights(origin, model)
            start = f"{origin} at step {step}"
        if self.mesh is None:
            return weights, start
        spread = lambda tree: put_on_mesh(tree, state_sharding(tree, self.mesh))
        return dataclasses.replace(weights, trained=spread(weights.trained), base=spread(weights.base)), start

    def measured_once(self, name: str, params: Callable[[], Any], when: str) -> dict[str, Any]:
        """What `measure` finds, kept in a file: a resumed run does not measure again, nor does GRPO what SFT has measured."""
        path = self.folder / name
        known = on_process_0(lambda: self.known(path))
        if known is None:
            known = self.held_out.measure(params(), when)
        if is_process_0() and not path.is_file():
            write_json(path, known)
        return dict(known)

    def known(self, path: Path) -> Any:
        """What an earlier call of `measured_once` has measured, or SFT's; None: nothing yet."""
        if path.is_file():
            return read_json(path)
        return self.of_sft("after.json") if path.name == "before.json" else None

    def of_sft(self, name: str) -> Any:
        """What the SFT stage that the student comes from measured, on the same rows; None otherwise."""
        path = Path(self.config.run_dir) / "sft" / name
        if self.name == "sft" or self.origin != path.parent or not path.is_file():
            return None
        measured = read_json(path)
        rows = [question.question for question in self.setup.test_questions], len(self.setup.test)
        known = [reply["question"] for reply in measured["replies"]], measured.get("loss_rows")
        return measured if known == rows else None

    def report(self, before: dict[str, Any], after: dict[str, Any], wall: dict[str, float]) -> dict[str, Any]:
        """Writes `report.json` and `report.html`."""
        start = "base" if self.name == "sft" or self.origin is None else "sft"
        measured = {start: before, self.name: after}
        base = self.of_sft("before.json")
        measured = {"base": base} | measured if base else measured
        config = self.folder / "config.yaml"
        report = {
            "title": f"cotgrpo {self.name}",
            "command": f"cotgrpo {self.name} --config {shlex.quote(str(config))}",
            "accuracy": {name: m["accuracy"] for name, m in measured.items()},
            "held_out_loss": {name: m["loss"] for name, m in measured.items() if m["loss"] is not None},
            "held_out_rows": {"accuracy": len(self.setup.test_questions), "loss": len(self.setup.test)},
            "wall_seconds": wall,
            "samples": merge_samples({name: m["replies"] for name, m in measured.items()}),
            "data": {title: r.to_dict() for title, r in self.setup.reports.items()},
            "config": config.read_text(encoding="utf-8"),
            "versions": versions(),
        }
        if self.name == "grpo" and self.config.grpo.objective.name == "group_relative":
            report["notes"] = [GROUP_RELATIVE]
        write_json(self.folder / "report.json", report)
        self.console.print(f"report: {write_report(self.folder)}", highlight=False, soft_wrap=True)
        return report


def merge_samples(replies: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The same questions as the student answered them at each point: up to two thirds that changed, those between stages of training first, then others."""
    rows = []
    for answers in zip(*replies.values(), strict=True):
        by_name = {n: {"text": a["text"], "correct": a["correct"]} for n, a in zip(replies, answers, strict=True)}
        rows.append({"question": answers[0]["question"], "gold": answers[0]["gold"], "replies": by_name})
    trained = [name for name in replies if name != "base"]  # a student before it is right nowhere, as a rule
    differ = lambda row, names: len({row["replies"][name]["correct"] for name in names}) > 1
    changed = sorted((r for r in rows if differ(r, replies)), key=lambda r: not differ(r, trained))
    same = [r for r in rows if r not in changed]
    first = changed[: SAMPLES_SHOWN * 2 // 3]
    return first + same[: SAMPLES_SHOWN - len(first)]


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the device."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | {
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
