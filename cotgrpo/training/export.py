"""The command `export`: write the newest student of a run as a folder that `transformers` loads."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cotgrpo.checkpoints.stops import say_stops
from cotgrpo.config import Config, ConfigError, load_config, tree_of
from cotgrpo.data.template import AnyTemplate
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.identity.known import copy_split
from cotgrpo.models.huggingface.adapters import save_adapter
from cotgrpo.models.huggingface.folder import refuse_used
from cotgrpo.models.huggingface.pinned import changed_parts, fingerprint, tokenizer_files
from cotgrpo.models.huggingface.weights import save_pretrained, stored_dtype
from cotgrpo.models.lora import share_kept
from cotgrpo.reports.report import ReportError, read_report
from cotgrpo.terminal import say
from cotgrpo.training.inputs import Model, model_of
from cotgrpo.training.stages import newest_stage
from cotgrpo.training.steps import recorded_epochs, with_steps
from cotgrpo.training.weights import WHOLE, StageWeights, merged_text, restore_weights


def run_export(
    run_dir: Path,
    out: Path,
    dtype: str | None = None,
    console: Console | None = None,
    *,
    adapter: bool = False,
    allow_changed: Sequence[str] | str = (),
) -> Path:
    """Write the newest student of `run_dir` to `out`.

    The folder holds weights, config.json, tokenizer, chat template, generation config and model card. LoRA's adapters
    are merged into the weights in float32, which are rounded once, unless `adapter` asks for them alone. Only this
    merge reads the pretrained student, and it must be the one that was trained. All else is kept in the run. Of a run
    with a quantized base, the weights that it was quantized from are read again and merged into.

    Args:
        run_dir: a folder that `sft` or `grpo` has filled. A run of an older version keeps no files of its student:
            those at `student.path` are read then.
        out: new or empty.
        dtype: "float32", "bfloat16" or "float16"; None: that of the pretrained student, or from scratch that of the
            parameters in the run.
        console: where the path is printed.
        adapter: write the adapters alone, as a folder that `peft` loads on top of the pretrained student.
        allow_changed: "student": merge into the weights at `student.path` although they have changed.

    Raises:
        ConfigError, CheckpointError, ModelError, DataError: no trained student that can be read, or `out` is in use.
            With `adapter`: a run without LoRA, a base that is not a pretrained model, or a `dtype`.
    """
    refuse_used(out)
    stage = newest_stage(run_dir)
    folder = run_dir / stage
    console = console or Console()
    say_stops((run_dir / "sft", run_dir / "grpo"), console)
    config = load_config(folder / "config.yaml", may_be_newer=True)
    config = with_steps(config, stage, recorded_epochs(config, stage, folder))
    if allow_changed:
        allowed = allow_changed if isinstance(allow_changed, str) else list(allow_changed)
        config = dataclasses.replace(config, allow_changed=allowed)
    model = model_of(config, folder, folder, [], copy=True)
    if model.source is not None and model.source.recorded is None:
        say(
            console,
            f"{folder} is of an older version, which recorded nothing of {model.source.name}: whether it has changed "
            "since could not be checked",
        )
    weights, step = restore_weights(folder, model, with_base=not adapter, quantized=False)
    template = model.template(config.data.loss_on)
    card = model_card_facts(config, stage, step, template, folder)
    if adapter:
        check_adapter(weights, folder, dtype)
        write_adapter(out, run_dir, model, weights, card, console)
    else:
        write_student(out, run_dir, model, weights, template, card, dtype, console)
    say(console, f"{'adapter of ' * adapter}{folder} at step {step} written to {out}")
    return out


def write_student(
    out: Path,
    run_dir: Path,
    model: Model,
    weights: StageWeights,
    template: AnyTemplate,
    card: dict[str, Any],
    dtype: str | None,
    console: Console,
) -> None:
    """Write the whole student. Say how much of the adapters' update its number type keeps, if that is not all."""
    if weights.lora is not None and weights.lora.quantization is not None:
        say(
            console,
            f"merged into the weights as they were before {weights.lora.quantize_base}: the student was trained next "
            "to their quantized form, and computes a little different",
        )
    of_origin = stored_dtype(model.source) if model.source is not None else None
    stored = dtype or of_origin or model.decoder.param_dtype
    if dtype is None and stored != model.decoder.param_dtype:
        say(console, f"weights are written in {stored}, as the student at the start; --dtype sets another type")
    if weights.lora is not None and stored != "float32":
        share = share_kept(weights.base, weights.trained, weights.lora, stored)
        if share < WHOLE:
            say(console, merged_text(share, stored, "--dtype float32, or --adapter,"))
    stops = list(template.stop_ids)
    of_source = model.source is not None and model.config.tokenizer.path is None
    save_pretrained(
        out,
        model.decoder,
        weights.adapted(),
        source=model.source,
        tokenizer=None if of_source else model.tokenizer,
        # Generation stops at the same tokens as in the measurement of accuracy.
        generation_config={"eos_token_id": stops if len(stops) > 1 else stops[0]},
        card=card,
        dtype=dtype,
        also=functools.partial(copy_split, run_dir),
    )


def write_adapter(
    out: Path, run_dir: Path, model: Model, weights: StageWeights, card: dict[str, Any], console: Console
) -> None:
    """Write the adapters alone. Say if the pretrained student that they belong to has changed since."""
    source = model.source
    assert weights.lora is not None and source is not None
    recorded = source.recorded or {}
    if changed := on_process_0(lambda: changed_parts(recorded, fingerprint(source))):
        say(
            console,
            f"{source.name} has other {' and other '.join(changed)} now: the adapters belong to what it was",
        )
    save_adapter(
        out,
        weights.trained,
        weights.lora,
        weights.base_name,
        card,
        revision=weights.base_revision,
        also=functools.partial(write_beside_adapter, run_dir, model),
        hf_config=source.hf_config,
    )


def write_beside_adapter(run_dir: Path, model: Model, folder: Path) -> None:
    """Write the tokenizer, its chat template and the held-out split into an adapter's folder."""
    copy_split(run_dir, folder)
    source = model.source
    if source is None or model.config.tokenizer.path is not None:
        model.tokenizer.save_pretrained(folder)
        return
    for path in tokenizer_files(source.tokenizer_folder):
        shutil.copyfile(path, folder / path.name)


def check_adapter(weights: StageWeights, folder: Path, dtype: str | None) -> None:
    """Raise ConfigError unless a stage has an adapter that can be exported alone."""
    if weights.lora is None:
        raise ConfigError(f"{folder} was trained without LoRA and has no adapter. Leave --adapter out.")
    if weights.base_name is None:
        raise ConfigError(
            f"The base of the adapters in {folder} is a trained stage, and not a pretrained model, so nobody could "
            "load them alone. Leave --adapter out: they are merged into the weights then."
        )
    if dtype is not None:
        raise ConfigError("Adapters are stored in float32, as they were trained. Leave --dtype out, or --adapter.")


def model_card_facts(config: Config, stage: str, step: int, template: AnyTemplate, folder: Path) -> dict[str, Any]:
    """Return what the model card needs. It has the accuracy only if the report is that of this step."""
    try:
        report = read_report(folder / "report.json") if step == getattr(config, stage).steps else None
    except ReportError:
        report = None
    sources = [[data] if isinstance(data, str) else data for data in (config.data.train, config.data.test)]
    settings = tree_of(config)
    if config.lora is None:
        del settings["lora"]
    known: dict[str, Any] = {
        "datasets": [name.partition(":")[0] for name in sources[0] if not is_file(name)],
        "objective": objective_text(config, stage, step),
        "data": data_text(config, template, *sources),
        "config": settings,
    }
    if report is not None:
        known["versions"] = report["versions"]
        known["accuracy"] = {
            f"held-out rows, {name}": f"{row['value']:.1%} of {row['n']} "
            f"(95 % interval {row['low']:.1%} to {row['high']:.1%})"
            for name, row in report["accuracy"].items()
        }
    return known


def is_file(source: str) -> bool:
    """Return whether a source of rows is a file, and not a hub id."""
    return source.endswith((".jsonl", ".json", ".parquet"))


def objective_text(config: Config, stage: str, step: int) -> str:
    """Describe what was optimised."""
    what = f"Stage {stage}, step {step} of {getattr(config, stage).steps}. "
    if stage == "sft":
        start = config.sft.init_from or config.student.path or "scratch"
        return f"{what}Next-token loss on the {config.data.loss_on}, from {start}."
    start = config.grpo.init_from or "the SFT student of the same run"
    return f"{what}GhostRespond Policy Optimization (not Group Relative) from {start}: `{config.grpo.full_objective}`."


def data_text(config: Config, template: AnyTemplate, train: list[str], test: list[str]) -> str:
    """Describe the rows and the form of a prompt."""
    data = config.data
    held_out = named(test, data.test_split) if test else f"{data.test_rows} of these rows, left out of training"
    prompt = template.tokenizer.decode(template.prompt("QUESTION"))
    return (
        f"Trained on {named(train, data.train_split)}; held out: {held_out}.\n\n"
        f"A prompt, as the student read it:\n\n```text\n{prompt}\n```"
    )


def named(sources: list[str], split: str | None) -> str:
    """Name files and hub ids, and the split."""
    return f"`{', '.join(sources)}`" + (f" (split {split})" if split else "")
