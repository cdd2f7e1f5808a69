"""The weights of a stage: what it trains, and what stays frozen. With LoRA: the adapters and their base."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax

from cotgrpo.checkpoints.location import CheckpointLocation, saved_config
from cotgrpo.checkpoints.manager import restore_params
from cotgrpo.config import Config, ConfigError
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.models.huggingface.adapters import load_own_adapter
from cotgrpo.models.huggingface.families import ModelError
from cotgrpo.models.huggingface.folder import ModelFolder
from cotgrpo.models.huggingface.pinned import changed_parts, find_record, fingerprint
from cotgrpo.models.lora import (
    AdaptedParams,
    Adapters,
    LoraConfig,
    flatten_adapters,
    init_lora,
    is_quantized,
    merge,
    share_kept,
    target_kernels,
)
from cotgrpo.models.quantized.kernel import Quantization
from cotgrpo.models.quantized.quantize import quantize_base
from cotgrpo.training.inputs import Model
from cotgrpo.training.mesh import abstract_on_mesh, init_on_mesh
from cotgrpo.types import Params

WHOLE = 0.99
"""Least share of an update that counts as all of it."""


@dataclasses.dataclass(frozen=True)
class StageWeights:
    """The weights of a stage.

    Attributes:
        trained: what the train state and the checkpoints hold: all parameters, or LoRA's adapters.
        base: the frozen parameters that the adapters belong to, or None.
        lora: how the adapters are applied, or None.
        base_name: hub id or folder of the pretrained model that `base` is; None if it is anything else.
        base_revision: the commit of that hub id, or None.
        merged_share: share of the adapters' update that is left in `trained`, which they were merged into; None if
            nothing was merged.
    """

    trained: Params
    base: Params | None = None
    lora: LoraConfig | None = None
    base_name: str | None = None
    base_revision: str | None = None
    merged_share: float | None = None

    def adapted(self, trained: Params | None = None) -> Params:
        """Return what the student computes with, with `trained` in place of `self.trained` if it is given.

        With LoRA these are `AdaptedParams`: the adapters stay next to the base, as in training, and nothing is copied.
        """
        trained = self.trained if trained is None else trained
        return trained if self.lora is None else AdaptedParams(self.base, trained, self.lora)

    def merged(self, trained: Params | None = None) -> Params:
        """Return the parameters of the whole student as ordinary ones, rounded to the type of the base.

        A bfloat16 base loses most of a small update. Use `adapted` to compute.
        """
        trained = self.trained if trained is None else trained
        return trained if self.lora is None else merge(self.base, trained, self.lora)


def first_weights(model: Model) -> StageWeights:
    """Return the weights before any training: pretrained or random parameters, and fresh adapters with LoRA.

    Raises:
        ModelError: weights that cannot be read, or that are not those of a run that goes on.
        ConfigError: LoRA on a student from scratch, or a target that it does not have.
    """
    if model.config.lora is not None and model.source is None:
        raise ConfigError(
            "lora.rank is set, but the student is from scratch: frozen random weights learn nothing. "
            "Name a pretrained student in student.path or a trained stage in init_from, or set lora.rank to 0."
        )
    lora, source = model.config.lora, model.source
    base = first_params(model, quantization=None if lora is None else lora.quantization)
    if source is None or source.adapter is None:
        return with_fresh_adapters(model, base, source)
    adapters, own = load_own_adapter(source, base)
    if lora is not None:
        check_goes_on(base, adapters, own, lora, source.adapter)
        return StageWeights(adapters, base, lora, *name_of(source))
    share = share_kept(base, adapters, own, model.decoder.param_dtype)
    return StageWeights(merge(base, adapters, own), merged_share=share)


def check_goes_on(base: Params, adapters: Adapters, own: LoraConfig, lora: LoraConfig, name: str) -> None:
    """Raise ConfigError unless a stage's LoRA settings are those of the adapters that it starts from.

    Dropout may differ, and the base may be quantized.
    """
    paths = flatten_adapters(adapters).keys()
    try:
        same_targets = target_kernels(base, lora).keys() == paths
    except ValueError:
        same_targets = False
    if same_targets and (own.rank, own.alpha, own.rslora) == (lora.rank, lora.alpha, lora.rslora):
        return
    fix = f"lora.rank {own.rank}, lora.alpha {own.alpha:g}, lora.rslora {str(own.rslora).lower()} and lora.targets "
    raise ConfigError(
        f"{name} holds adapters of another form than lora has. To train them further set {fix}"
        f"[{', '.join(own.targets)}]; or set lora.rank 0 to merge them and train all parameters."
    )


def start_weights(folder: Path, model: Model) -> tuple[StageWeights, int]:
    """Return the weights of a stage that starts from another stage's folder, and that stage's step.

    If both stages have the same adapters, these are trained further. A stage without LoRA trains the student with the
    adapters merged.

    Raises:
        CheckpointError, ModelError: no weights that can be read.
        ConfigError: adapters of another shape, or as in `first_weights`.
    """
    lora = model.config.lora
    # Adapters are merged into the model as it was, not into its quantized kernels.
    weights, step = restore_weights(folder, model, quantized=lora is not None)
    if weights.lora is None:
        return with_fresh_adapters(model, weights.trained), step
    if lora is None:
        share = share_kept(weights.base, weights.trained, weights.lora, model.decoder.param_dtype)
        return StageWeights(weights.merged(), merged_share=share), step
    if dataclasses.replace(lora, dropout=weights.lora.dropout) != weights.lora:
        raise ConfigError(
            f"{folder} holds adapters of {weights.lora}, which cannot be trained further as {lora}. "
            "Give the same lora settings (dropout may differ), or set lora.rank to 0 to train all parameters."
        )
    return dataclasses.replace(weights, lora=lora), step


def restore_weights(
    folder: Path, model: Model, *, with_base: bool = True, quantized: bool = True
) -> tuple[StageWeights, int]:
    """Return the newest weights in a stage's folder, as it trained them, and their step.

    Without `with_base` the frozen base of adapters is not read, and is None. Without `quantized` it is what was
    quantized, read again.

    Raises as `start_weights` does.
    """
    saved = saved_config(folder)
    lora = None if saved is None else saved.lora
    abstract = model.abstract_params()
    checkpoints = CheckpointLocation.resolve(folder, model.config).readable()
    if saved is None or lora is None:
        params, step = restore_params(checkpoints, abstract)
        return StageWeights(params), step
    like = jax.eval_shape(functools.partial(init_lora, lora=lora, key=jax.random.key(0)), abstract)
    adapters, step = restore_params(checkpoints, abstract_on_mesh(like, model.mesh))
    origin = base_origin(folder, saved)
    source = model.source if origin is None else None
    if not with_base:
        base = None
    elif origin is None:
        base = first_params(model, folder, quantization=lora.quantization if quantized else None)
    else:
        at = CheckpointLocation.resolve(origin, model.config).readable()
        base, _ = restore_params(at, model.abstract_params())
        base = quantized_as(base, lora) if quantized else base
    return StageWeights(adapters, base, lora, *name_of(source)), step


def base_origin(folder: Path, saved: Config) -> Path | None:
    """Return the folder of the stage that is the base of the adapters in a stage's folder; None: a pretrained model."""
    if folder.name not in ("sft", "grpo"):
        raise ConfigError(
            f"{folder} holds LoRA adapters, and its name has to tell where their base is: expected RUN_DIR/sft or "
            "RUN_DIR/grpo. Name the folder inside its run."
        )
    origin = origin_of(folder.name, saved, folder.parent)
    before = None if origin is None else saved_config(origin)
    if origin is not None and before is not None and before.lora is not None:
        return base_origin(origin, before)
    return origin


def first_params(model: Model, folder: Path | None = None, quantization: Quantization | None = None) -> Params:
    """Return the parameters before any training, after a comparison of a pretrained model with what is recorded of it.

    Args:
        model: the student.
        folder: the stage whose record counts; None: the one that `model.source` comes from.
        quantization: as in `Model.first_params`.

    Raises:
        ModelError: the model has changed or is gone, or its weights cannot be read.
    """
    source = model.source
    record = None if folder is None else find_record(folder)
    recorded = record["fingerprint"] if record is not None else None if source is None else source.recorded
    if source is None or recorded is None:
        return model.first_params(quantization)
    where = source.base or str(source.folder)
    try:
        source.weights_folder()
        changed = changed_parts(recorded, on_process_0(lambda: fingerprint(source)))
        allowed = not changed or "student" in model.config.allowed_changes
        params = model.first_params(quantization) if allowed else None
    except ModelError as error:
        raise ModelError(
            f"{folder or 'This run'} started from {where}, whose weights are needed and cannot be read. Put that model "
            f"back. {error}"
        ) from error
    if params is None:
        raise ModelError(
            f"{where} is not the model any more that {folder or 'this run'} started from: it has other "
            f"{' and other '.join(changed)}. Put that model back, or go on with --allow_changed student."
        )
    return params


def origin_of(stage: str, config: Config, run_dir: Path) -> Path | None:
    """Return the folder of the stage that `stage` starts from; None if it starts pretrained or from scratch."""
    start = getattr(config, stage).init_from
    if start is not None:
        return None if start == config.student.path else Path(start)
    return None if stage == "sft" else run_dir / "sft"


def with_fresh_adapters(model: Model, params: Params, source: ModelFolder | None = None) -> StageWeights:
    """Return fresh adapters with `params`, which are those of `source`, as their base; without LoRA, train `params`."""
    lora = model.config.lora
    if lora is None:
        return StageWeights(params)
    try:
        make = functools.partial(init_lora, params, lora)
        adapters = init_on_mesh(model.mesh, make, jax.random.key(model.config.seed))
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error}") from error
    return StageWeights(adapters, quantized_as(params, lora), lora, *name_of(source))


def quantized_as(base: Params, lora: LoraConfig) -> Params:
    """Return the frozen parameters with their kernels quantized, if `lora` has it and they are not yet."""
    if lora.quantization is None or is_quantized(base):
        return base
    return quantize_base(base, *lora.quantization)


def name_of(source: ModelFolder | None) -> tuple[str | None, str | None]:
    """Return the hub id or folder of a pretrained model, and the commit of a hub id."""
    return (None, None) if source is None else (source.name, source.revision)


def merged_text(share: float, dtype: str, fix: str) -> str:
    """Return what to say of adapters that were merged into weights of a narrow type."""
    return (
        f"merged into {dtype} weights, {share:.0%} of the adapters' update is kept, and the rest is rounded away: "
        f"{fix} keeps all"
    )
