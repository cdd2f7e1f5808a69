"""The weights of a stage: what it trains, and what stays frozen. With LoRA: the adapters and their base."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax

from cotgrpo.checkpoints.location import CheckpointLocation, saved_config
from cotgrpo.checkpoints.manager import restore_params
from cotgrpo.config import Config, ConfigError
from cotgrpo.models.lora import AdaptedParams, LoraConfig, init_lora, merge
from cotgrpo.training.inputs import Model
from cotgrpo.training.mesh import abstract_on_mesh, init_on_mesh
from cotgrpo.types import Params


@dataclasses.dataclass(frozen=True)
class StageWeights:
    """The weights of a stage.

    Attributes:
        trained: what the train state and the checkpoints hold: all parameters, or LoRA's adapters.
        base: the frozen parameters that the adapters belong to, or None.
        lora: how the adapters are applied, or None.
        base_name: hub id or folder of the pretrained model that `base` is; None if it is anything else.
    """

    trained: Params
    base: Params | None = None
    lora: LoraConfig | None = None
    base_name: str | None = None

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
        ModelError: weights that cannot be read.
        ConfigError: LoRA on a student from scratch, or a target that it does not have.
    """
    if model.config.lora is not None and model.source is None:
        raise ConfigError(
            "lora.rank is set, but the student is from scratch: frozen random weights learn nothing. "
            "Name a pretrained student in student.path or a trained stage in init_from, or set lora.rank to 0."
        )
    return with_fresh_adapters(model, model.first_params(), base_name(model))


def start_weights(folder: Path, model: Model) -> tuple[StageWeights, int]:
    """Return the weights of a stage that starts from another stage's folder, and that stage's step.

    If both stages have the same adapters, these are trained further. A stage without LoRA trains the student with the
    adapters merged.

    Raises:
        CheckpointError, ModelError: no weights that can be read.
        ConfigError: adapters of another shape, or as in `first_weights`.
    """
    weights, step = restore_weights(folder, model)
    lora = model.config.lora
    if weights.lora is None:
        return with_fresh_adapters(model, weights.trained, None), step
    if lora is None:
        return StageWeights(weights.merged()), step
    if dataclasses.replace(lora, dropout=weights.lora.dropout) != weights.lora:
        raise ConfigError(
            f"{folder} holds adapters of {weights.lora}, which cannot be trained further as {lora}. "
            "Give the same lora settings (dropout may differ), or set lora.rank to 0 to train all parameters."
        )
    return dataclasses.replace(weights, lora=lora), step


def restore_weights(folder: Path, model: Model) -> tuple[StageWeights, int]:
    """Return the newest weights in a stage's folder, as it trained them, and their step.

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
    base, name = base_of(folder, saved, model)
    return StageWeights(adapters, base, lora, name), step


def base_of(folder: Path, saved: Config, model: Model) -> tuple[Params, str | None]:
    """Return the frozen base of the adapters in a stage's folder, and its name if it is a pretrained model."""
    if folder.name not in ("sft", "grpo"):
        raise ConfigError(
            f"{folder} holds LoRA adapters, and its name has to tell where their base is: expected RUN_DIR/sft or "
            "RUN_DIR/grpo. Name the folder inside its run."
        )
    origin = origin_of(folder.name, saved, folder.parent)
    if origin is None:
        return model.first_params(), base_name(model)
    before = saved_config(origin)
    if before is not None and before.lora is not None:
        return base_of(origin, before, model)
    checkpoints = CheckpointLocation.resolve(origin, model.config).readable()
    return restore_params(checkpoints, model.abstract_params())[0], None


def origin_of(stage: str, config: Config, run_dir: Path) -> Path | None:
    """Return the folder of the stage that `stage` starts from; None if it starts pretrained or from scratch."""
    start = getattr(config, stage).init_from
    if start is not None:
        return None if start == config.student.path else Path(start)
    return None if stage == "sft" else run_dir / "sft"


def with_fresh_adapters(model: Model, params: Params, name: str | None) -> StageWeights:
    """Return fresh adapters with `params` as their base; without LoRA, train `params` themselves."""
    lora = model.config.lora
    if lora is None:
        return StageWeights(params)
    try:
        make = functools.partial(init_lora, params, lora)
        adapters = init_on_mesh(model.mesh, make, jax.random.key(model.config.seed))
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error}") from error
    return StageWeights(adapters, params, lora, name)


def base_name(model: Model) -> str | None:
    """Return the hub id or folder of a pretrained student, or None."""
    return None if model.source is None else model.source.hub_id or str(model.source.folder)
