"""The commands `sft`, `grpo` and `eval`: read the inputs, measure, train, measure, report.

GRPO is GhostRespond Policy Optimization, not Group Relative.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from cotgrpo.accelerators.memory import check_fits, size_of
from cotgrpo.accelerators.mfu import StepFlops
from cotgrpo.accelerators.out_of_memory import explain_out_of_memory
from cotgrpo.accelerators.refused_options import explain_refused_option
from cotgrpo.atomic_files import write_json
from cotgrpo.checkpoints.location import CheckpointLocation, saved_config
from cotgrpo.checkpoints.manager import check_state, is_finite, steps_in
from cotgrpo.checkpoints.run_lock import locked
from cotgrpo.checkpoints.stops import say_stops
from cotgrpo.config import Config, ConfigError, PrivilegedSelf
from cotgrpo.data.tokenizer import find_tokenizer
from cotgrpo.distributed.processes import check_shared, is_process_0, on_process_0, put_on_mesh
from cotgrpo.evaluation.held_out import HeldOut
from cotgrpo.identity.known import forget_record, forget_split
from cotgrpo.identity.record import find_parts
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.models.quantized.quantize import abstract_base
from cotgrpo.reports.report import ReportError, is_whole_page, read_report, write_report
from cotgrpo.sharding import jit_step, state_sharding
from cotgrpo.terminal import complain, say
from cotgrpo.training.batch_sources import live_teacher_of, make_stage_batches
from cotgrpo.training.collapse import CollapseDetector
from cotgrpo.training.hooks import Hook, ReportHook, hooks_of_settings, send_missing_rows
from cotgrpo.training.inputs import Model, check_same_run, claim_folder, load_eval_inputs, load_inputs
from cotgrpo.training.loop import BatchSource, LoopSettings, train
from cotgrpo.training.mesh import check_stage_batch, run_options
from cotgrpo.training.reporting import (
    MeasurementCache,
    Timer,
    add_evaluation,
    announce,
    find_measurement,
    print_reports,
    write_live_report,
    write_stage_report,
)
from cotgrpo.training.steps import (
    EpochSteps,
    StageName,
    check_own_code,
    count_steps,
    needs_reference,
    needs_teacher,
    recorded_epochs,
    save_epochs,
    stage_optimizer,
    stage_step,
    stage_title,
    with_steps,
)
from cotgrpo.training.weights import (
    WHOLE,
    StageWeights,
    first_weights,
    merged_text,
    origin_of,
    restore_weights,
    start_weights,
)
from cotgrpo.types import Params, TrainState


def run_sft(config: Config, console: Console | None = None, hooks: Sequence[Hook] = ()) -> dict[str, Any]:
    """Train a student on triples with the next-token loss, in `run_dir/sft`. Resume if run again. Return the report.

    `hooks` are called between the steps, after the run's own.
    """
    return run_stage("sft", config, console or Console(), hooks)


def run_grpo(config: Config, console: Console | None = None, hooks: Sequence[Hook] = ()) -> dict[str, Any]:
    """Train the SFT student, or `grpo.init_from`, with a GhostRespond objective, in `run_dir/grpo`.

    Resume if run again. Return the report. `hooks` are called between the steps, after the run's own.
    """
    return run_stage("grpo", config, console or Console(), hooks)


def run_stage(stage: StageName, config: Config, console: Console, hooks: Sequence[Hook] = ()) -> dict[str, Any]:
    """Run a whole stage, or resume it. A finished one only returns its report."""
    check_stage_batch(config, stage)
    check_own_code(config, stage)
    hooks = [*hooks_of_settings(stage, config), *hooks]
    run_dir = Path(config.run_dir)
    with locked(run_dir) if is_process_0() else contextlib.nullcontext():
        return run_locked_stage(stage, config, console, run_dir, hooks)


def run_locked_stage(
    stage: StageName, config: Config, console: Console, run_dir: Path, hooks: Sequence[Hook]
) -> dict[str, Any]:
    """Run a stage in a run folder that no other process writes."""
    folder, origin = run_dir / stage, origin_of(stage, config, run_dir)
    location = CheckpointLocation.resolve(folder, config)
    on_process_0(lambda: check_folders(folder, config, stage, location))
    if isinstance(location.folder, Path):
        check_shared(location.folder.parent)
    if (done := on_process_0(lambda: finished_report(folder, config))) is not None:
        say(console, f"{folder} is complete: {folder / 'report.html'}")
        send_missing_rows(hooks)
        return done

    timer = Timer()
    inputs = load_inputs(config, folder, origin, console)
    print_reports(inputs, console)
    say(console, inputs.split_text)
    if origin is not None:
        say_stops((origin,), console)
    epochs = find_epochs(stage, config, folder) if location.exists() else None
    epochs = count_steps(config, stage, inputs.train) if epochs is None else epochs
    config = with_steps(config, stage, epochs)
    if epochs is not None:
        say(console, str(epochs))
    check_state_fits(stage, config, inputs.model)
    weights, start = initial_weights(stage, config, inputs.model, origin, location)
    batches = make_stage_batches(stage, config, inputs, weights, folder, console)
    if location.exists():
        check_state(location.folder, jax.eval_shape(functools.partial(new_state, stage, config), weights.trained))
    on_process_0(lambda: claim_folder(folder, inputs))
    on_process_0(lambda: save_epochs(folder, epochs))
    print_student(inputs.model, weights, start, console)
    announce(stage, config, inputs, console)
    title = stage_title(stage, config)
    warn_of_rounding(stage, config, weights)

    held_out = inputs.held_out(getattr(config, stage).batch_size, console)
    after_sft = origin if stage == "grpo" and origin == run_dir / "sft" else None
    cache = MeasurementCache(folder, held_out, after_sft, location.exists(), is_requantized(after_sft, config))
    with explain_out_of_memory(lambda: advice_for_eval(stage, config)):
        before = cache.measure("before.json", weights.adapted, f"before {title}")
    points = {} if before is None else {"base" if stage == "sft" or origin is None else "sft": before}
    live_report = ReportHook(lambda step: write_live_report(stage, config, inputs, points, timer.seconds(), step))
    advice = lambda: advice_for_training(stage, config, weights)
    with timer.training(), explain_out_of_memory(advice), explain_refused_option():
        state = train_stage(stage, config, inputs.model, weights, batches, held_out, console, [live_report, *hooks])
    with explain_out_of_memory(lambda: advice_for_eval(stage, config)):
        after = cache.measure("after.json", lambda: weights.adapted(state.params), f"after {title}")

    measured = points | ({} if after is None else {stage: after})
    if (base := on_process_0(lambda: cache.of_sft("before.json"))) is not None:
        measured = {"base": base} | measured
    wall = timer.seconds()
    return on_process_0(lambda: write_stage_report(stage, config, inputs, measured, wall, console))


def find_epochs(stage: StageName, config: Config, folder: Path) -> EpochSteps | None:
    """Return what a stage has recorded of its epochs, on every process."""

    def fields() -> dict[str, Any] | None:
        recorded = recorded_epochs(config, stage, folder)
        return None if recorded is None else dataclasses.asdict(recorded)

    found = on_process_0(fields)
    return None if found is None else EpochSteps(**found)


def check_folders(folder: Path, config: Config, stage: StageName, location: CheckpointLocation) -> None:
    """Check that the folder is free or holds this run, and that checkpoints outside of it can be written.

    A run that ended before its first step, for want of memory say, does not hold the folder. What it measured with
    other settings, and its record of the inputs, are removed.
    """
    started = read_metrics(folder) or (folder / "report.json").exists() or steps_in(location.folder)
    try:
        check_same_run(folder, config, stage)
    except ConfigError:
        if started:
            raise
        for name in ("config.yaml", "before.json"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        forget_split(folder)
    if not started:
        forget_record(folder)
    if config.checkpoint.folder is not None:
        location.check_works()


def finished_report(folder: Path, config: Config) -> dict[str, Any] | None:
    """Return the report of a finished stage, or None if something that the stage writes is to be made again.

    A page that is missing or damaged is written again.
    """
    try:
        report = read_report(folder / "report.json")
    except ReportError:
        return None
    if any(find_measurement(folder / name) is None for name in ("before.json", "after.json")):
        return None
    if not (folder / "config.yaml").is_file() or find_parts(folder) is None:
        return None
    has_own_tokenizer = config.tokenizer.path is None and config.student.path is None
    if has_own_tokenizer and find_tokenizer(folder / "tokenizer") is None:
        return None
    if not is_whole_page(folder / "report.html"):
        write_report(folder)
    return report


def initial_weights(
    stage: StageName, config: Config, model: Model, origin: Path | None, location: CheckpointLocation
) -> tuple[StageWeights, str]:
    """Return the weights before the first step, and a text that names where they come from.

    A stage that resumes takes its own newest weights, so that pretrained ones are not read again. But if it needs the
    first weights later, as a reference or as a teacher, it reads those.
    """
    folder = Path(config.run_dir) / stage
    ghosts = config.grpo.ghosts
    is_own_teacher = stage == "grpo" and isinstance(ghosts, PrivilegedSelf) and ghosts.self == "frozen"
    measured = on_process_0(lambda: find_measurement(folder / "before.json") is not None)
    if measured and location.exists() and not (is_own_teacher or needs_reference(config, stage)):
        origin = folder
    if origin is None:
        weights, start = first_weights(model), first_name(model)
    else:
        weights, step = start_weights(origin, model)
        start = f"{origin} at step {step}"
    mesh = model.mesh
    if mesh is None:
        return weights, start
    spread = lambda tree: put_on_mesh(tree, state_sharding(tree, mesh))
    return dataclasses.replace(weights, trained=spread(weights.trained), base=spread(weights.base)), start


def first_name(model: Model) -> str:
    """Return what a stage's first weights are, in words."""
    config, source = model.config, model.source
    if source is None or source.adapter is None:
        return config.student.path or f"scratch (seed {config.seed})"
    how = "merged" if config.lora is None else "trained further"
    return f"{source.name} with the adapter {source.adapter}, which is {how}"


def is_requantized(before: Path | None, config: Config) -> bool:
    """Return whether a stage quantizes the frozen kernels in another way than the stage before it."""
    saved = None if before is None else saved_config(before)
    of = lambda config: None if config.lora is None else config.lora.quantization
    return saved is not None and of(saved) != of(config)


def new_state(stage: StageName, config: Config, trained: Params, copy: bool = False) -> TrainState:
    """Return the train state before the first step. It takes the arrays of `trained`, or copies of them."""
    return TrainState.create(params=trained, tx=stage_optimizer(config, stage), key=config.seed, copy=copy)


def train_stage(
    stage: StageName,
    config: Config,
    model: Model,
    weights: StageWeights,
    batches: BatchSource,
    held_out: HeldOut,
    console: Console,
    hooks: Sequence[Hook] = (),
) -> TrainState:
    """Train to the last step. `weights.trained` are donated, unless they are the reference."""
    settings, mesh = getattr(config, stage), model.mesh
    is_reference = needs_reference(config, stage) and not needs_teacher(config, stage)
    teacher, teacher_params = live_teacher_of(batches) if needs_teacher(config, stage) else (None, None)
    step = stage_step(config, stage, model.student, stage_optimizer(config, stage), teacher=teacher)
    base = () if weights.lora is None else (weights.base,)
    reference = (weights.adapted(),) if is_reference else () if teacher is None else (teacher_params,)
    flops = StepFlops.of(
        model.decoder,
        config.data.seq_len,
        frozen=weights.lora is not None,
        devices=1 if mesh is None else mesh.size,
    )
    on_policy = stage == "grpo" and config.grpo.ghosts.on_policy
    measure = held_out.loss_and_accuracy if on_policy or settings.eval_accuracy else held_out.loss
    folder = Path(config.run_dir) / stage
    detector = CollapseDetector(folder, config.grpo.max_entropy_growth, settings.batch_size)
    options = config.compiler.given(jax.default_backend())
    if line := run_options(config, mesh):
        say(console, f"XLA's options of the step: {line}")
    return train(
        jit_step(step, mesh, compiler_options=options),
        new_state(stage, config, weights.trained, copy=is_reference),
        batches,
        folder,
        LoopSettings(
            title=stage_title(stage, config),
            total_steps=settings.steps,
            log_every=settings.log_every,
            eval_every=settings.eval_every,
            checkpoint=config.checkpoint,
            max_skipped=config.max_skipped,
            flops=flops,
            announce=True,
        ),
        extra=(*base, *reference),
        evaluate=lambda trained: measure(weights.adapted(trained)),
        hooks=[*([detector] if stage == "grpo" else []), *hooks],
        console=console,
    )


def check_state_fits(stage: StageName, config: Config, model: Model) -> None:
    """Raise ConfigError if parameters and optimizer alone cannot fit into memory. Nothing is allocated yet."""
    params = model.abstract_params()
    state = jax.eval_shape(functools.partial(new_state, stage, config), params)
    frozen = params
    if config.lora is not None and config.lora.quantization is not None:
        frozen = abstract_base(params, *config.lora.quantization)
    needed = size_of(state if config.lora is None else frozen) // (1 if model.mesh is None else model.mesh.size)
    with explain_out_of_memory(lambda: advice_for_training(stage, config, StageWeights(params))):
        check_fits("the train state", needed, needed)


def advice_for_training(stage: StageName, config: Config, weights: StageWeights) -> str:
    """Return which settings of a stage take memory, and what the train state alone takes."""
    settings = getattr(config, stage)
    state = jax.eval_shape(functools.partial(new_state, stage, config), weights.trained)
    leaves = jax.tree.leaves(state) + jax.tree.leaves(state.params)  # the gradients are as large as the parameters
    taken = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if jax.numpy.issubdtype(leaf.dtype, jnp.number))
    rest = "" if config.lora is not None else ", or train adapters only (lora.rank 16)"
    return (
        f"Lower {stage}.batch_size ({settings.batch_size}), or raise {stage}.micro_batches ({settings.micro_batches}) "
        f"for the same batch; then set student.remat full ({config.student.remat} now), lower data.seq_len "
        f"({config.data.seq_len}), set student.dtype and student.param_dtype bfloat16 with "
        f"{stage}.optimizer.rounding stochastic{rest}. Parameters, gradients and "
        f"optimizer take {taken / 1e9:.2f} GB in all; the rest grows with batch_size x seq_len / micro_batches. The "
        "same run_dir can be used."
    )


def advice_for_eval(stage: StageName, config: Config) -> str:
    """Return which settings of a measurement take memory."""
    return (
        f"Lower eval.batch_size ({config.eval.batch_size}) or eval.max_new_tokens ({config.eval.max_new_tokens}); for "
        f"the held-out loss, {stage}.batch_size ({getattr(config, stage).batch_size}) or data.seq_len "
        f"({config.data.seq_len}). The same run_dir can be used."
    )


def print_student(model: Model, weights: StageWeights, start: str, console: Console) -> None:
    """Print the student's size, and where it comes from."""
    size = f"{model.decoder.num_params() / 1e6:.2f} M parameters, {model.vocab_size} tokens in the vocabulary"
    say(console, f"student: {size}, from {start}")
    if weights.merged_share is not None and weights.merged_share < WHOLE:
        say(console, merged_text(weights.merged_share, model.decoder.param_dtype, "student.param_dtype float32"))
    if weights.lora is not None:
        count = sum(leaf.size for leaf in jax.tree.leaves(weights.trained)) / 1e6
        kept = weights.lora.quantize_base
        base = "" if kept == "none" else f", whose kernels are frozen in {kept}"
        say(console, f"LoRA: {count:.2f} M parameters are trained, in addition to the student's{base}")


def warn_of_rounding(stage: StageName, config: Config, weights: StageWeights) -> None:
    """Complain if the parameters are stored in bfloat16 and small updates of them are rounded away."""
    if (problem := getattr(config, stage).optimizer.rounding_loss(weights.trained)) and is_process_0():
        complain(
            f"warning: {problem}. Set student.param_dtype float32 (twice the memory), or {stage}.optimizer.rounding "
            "stochastic (no memory) or compensated (2 bytes a parameter)."
        )


def newest_stage(run_dir: Path) -> StageName:
    """Return the last stage that has a checkpoint.

    Raises:
        ConfigError: neither has one.
    """
    stages: tuple[StageName, ...] = ("grpo", "sft")
    for name in stages:
        if CheckpointLocation.resolve(run_dir / name).exists():
            return name
    expected = CheckpointLocation.resolve(run_dir / "sft").folder
    raise ConfigError(f"{run_dir} holds no trained student: expected {expected}. Run `cotgrpo sft` first.")


def run_eval(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Measure the newest student of `run_dir` on held-out rows, and write `eval.json` in its folder. Return it."""
    console = console or Console()
    run_dir = Path(config.run_dir)
    stage = newest_stage(run_dir)
    folder = run_dir / stage
    say_stops((run_dir / "sft", run_dir / "grpo"), console)
    inputs = load_eval_inputs(config, console, folder, origin_of(stage, config, run_dir))
    weights, step = restore_weights(folder, inputs.model)
    held_out = inputs.held_out(getattr(config, stage).batch_size, console)
    with explain_out_of_memory(lambda: advice_for_eval(stage, config)):
        measured = held_out.measure(weights.adapted(), f"{folder} at step {step}")
    check_loss(measured["loss"], f"{folder} at step {step}")
    about = {"student": str(folder), "step": step, "held_out_split": inputs.split_text}
    found = write_eval(about | measured, folder, console)
    on_process_0(lambda: add_evaluation(folder, f"cotgrpo eval, step {step}", measured))
    return found


def run_eval_pretrained(config: Config, out: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Measure the model at `student.path` on held-out rows. Write `eval.json` in the folder `out`, if it is given."""
    console = console or Console()
    inputs = load_eval_inputs(config, console)
    print_reports(inputs, console)
    name = str(config.student.path)
    held_out = inputs.held_out(config.sft.batch_size, console)
    about = {"model": name, "held_out_split": inputs.split_text}
    params = first_weights(inputs.model).adapted()
    if not is_finite(params):
        raise ConfigError(f"{name} holds parameters that are not finite, so there is nothing to measure.")
    with explain_out_of_memory(lambda: advice_for_eval("sft", config)):
        measured = about | held_out.measure(params, name)
    check_loss(measured["loss"], name)
    return measured if out is None else write_eval(measured, out, console)


def check_loss(loss: float | None, name: str) -> None:
    """Raise ConfigError if the held-out loss of the student `name` is not finite. None: it was not measured."""
    if loss is not None and not math.isfinite(loss):
        raise ConfigError(
            f"The held-out loss of {name} is {loss}: its parameters are of no use. Take an earlier checkpoint, or "
            "train again with a lower learning rate."
        )


def write_eval(measured: dict[str, Any], folder: Path, console: Console) -> dict[str, Any]:
    """Write `eval.json` in a folder, and return what it holds."""
    if is_process_0():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "eval.json", measured)
    say(console, f"written: {folder / 'eval.json'}")
    return measured
