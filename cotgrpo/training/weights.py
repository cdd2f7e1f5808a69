"""What a stage trains and what it leaves alone: all parameters, or LoRA's adapters beside a frozen base."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from cotgrpo.checkpoints.manager import restore_params, steps_in
from cotgrpo.checkpoints.object_store_copy import ObjectStoreCopy
from cotgrpo.config.files import load_config
from cotgrpo.config.settings import Config, ConfigError
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.models.lora import LoraConfig, init_lora, merge
from cotgrpo.storage import CheckpointError, first_line, is_mirrored, open_folder
from cotgrpo.training.inputs import Model
from cotgrpo.training.mesh import laid_out, made_on
from cotgrpo.types import Params


@dataclasses.dataclass(frozen=True)
class StageWeights:
    """The weights of a stage.

    Attributes:
        trained: what its state and checkpoints hold: the parameters, or adapters.
        base: the frozen parameters beside adapters, or None.
        lora: how the adapters are applied, or None.
        base_name: hub id or folder of the pretrained model that the base is; None: it is another, or there is none.
    """

    trained: Any
    base: Params | None = None
    lora: LoraConfig | None = None
    base_name: str | None = None

    def merged(self, trained: Any = None) -> Params:
        """The parameters of the whole student, with `self.trained` or others in its place."""
        trained = self.trained if trained is None else trained
        return trained if self.lora is None else merge(self.base, trained, self.lora)


def first_weights(model: Model) -> StageWeights:
    """Those of a student that no stage has trained: pretrained or fresh parameters, and fresh adapters where LoRA is on.

    Raises:
        ModelError: weights that cannot be read.
        ConfigError: LoRA on a student from scratch, or a target that it does not have.
    """
    if model.config.lora.rank and model.source is None:
        raise ConfigError(
            "lora.rank is set, but the student is from scratch: frozen random weights learn nothing. Name a pretrained student "
            "in student.path or a trained stage in init_from, or set lora.rank to 0."
        )
    return adapted(model, model.first_params(), base_name(model))


def start_weights(folder: Path, model: Model) -> tuple[StageWeights, int]:
    """The weights that a stage starts from which goes on from another's folder, and that one's step.

    Adapters are trained on where both stages have the same; a stage without LoRA trains the student with its adapters merged.

    Raises:
        CheckpointError, ModelError: no weights that can be read.
        ConfigError: adapters of another shape, or as in `first_weights`.
    """
    weights, step = restore_weights(folder, model)
    lora = model.config.lora.build()
    if weights.lora is None:
        return adapted(model, weights.trained, None), step
    if lora is None:
        return StageWeights(weights.merged()), step
    if dataclasses.replace(lora, dropout=weights.lora.dropout) != weights.lora:
        raise ConfigError(
            f"{folder} holds adapters of {weights.lora}, which cannot be trained on as {lora}. "
            "Give the same lora settings (dropout may differ), or set lora.rank to 0 to train all parameters."
        )
    return dataclasses.replace(weights, lora=lora), step


def restore_weights(folder: Path, model: Model) -> tuple[StageWeights, int]:
    """The newest weights of a stage's folder, as it trained them, and their step. Raises as `start_weights` does."""
    saved = saved_config(folder)
    lora = None if saved is None else saved.lora.build()
    abstract = model.abstract_params()
    kept = readable_checkpoints(folder, model.config)
    if saved is None or lora is None:
        params, step = restore_params(kept, abstract)
        return StageWeights(params), step
    like = jax.eval_shape(functools.partial(init_lora, lora=lora, key=jax.random.key(0)), abstract)
    adapters, step = restore_params(kept, laid_out(like, model.mesh))
    base, name = base_of(folder, saved, model)
    return StageWeights(adapters, base, lora, name), step


def base_of(folder: Path, saved: Config, model: Model) -> tuple[Params, str | None]:
    """The frozen parameters beside the adapters of a stage's folder, and their name where they are a pretrained model's."""
    if folder.name not in ("sft", "grpo"):
        raise ConfigError(
            f"{folder} holds LoRA adapters, and where their base lies follows from its name: expected RUN_DIR/sft or RUN_DIR/grpo. "
            "Name the folder in its run."
        )
    origin = origin_of(folder.name, saved, folder.parent)
    if origin is None:
        return model.first_params(), base_name(model)
    before = saved_config(origin)
    if before is not None and before.lora.rank:
        return base_of(origin, before, model)
    return restore_params(readable_checkpoints(origin, model.config), model.abstract_params())[0], None


def origin_of(stage: str, config: Config, run_dir: Path) -> Path | None:
    """The folder of the stage that the student of `stage` comes from; None: pretrained, or from scratch."""
    start = getattr(config, stage).init_from
    if start is not None:
        return None if start == config.student.path else Path(start)
    return None if stage == "sft" else run_dir / "sft"


def checkpoints_of(folder: Path, config: Config | None = None) -> Any:
    """Where the checkpoints of a stage's folder are: of those with a mirror, on its disk.

    Args:
        folder: of the stage.
        config: of the run that asks; where the folder is not in its run_dir, or None is given, the folder's own config counts.
    """
    kept = place_of(folder, config)
    return folder / "checkpoints" if kept is None or is_mirrored(kept) else open_folder(kept) / folder.name


def mirror_of(folder: Path, config: Config | None = None) -> ObjectStoreCopy | None:
    """The mirror of a stage's checkpoints, where they go to a store that Orbax does not write to; arguments as in `checkpoints_of`."""
    kept = place_of(folder, config)
    if kept is None or not is_mirrored(kept):
        return None
    return ObjectStoreCopy(folder / "checkpoints", f"{kept.rstrip('/')}/{folder.name}")


def place_of(folder: Path, config: Config | None) -> str | None:
    """`checkpoint.folder` of the config that counts."""
    if config is None or folder.parent != Path(config.run_dir):
        config = saved_config(folder)
    return None if config is None else config.checkpoint.folder


def readable_checkpoints(folder: Path, config: Config | None = None) -> Any:
    """As `checkpoints_of`, and the newest is there: of a mirror it is fetched, where the disk lacks it."""
    mirror = mirror_of(folder, config)
    if mirror is not None:
        on_process_0(lambda: mirror.pull(newest_only=True))
    return checkpoints_of(folder, config)


def has_checkpoint(folder: Path, config: Config | None = None) -> bool:
    """Whether a stage's folder has one, damaged or not; arguments as in `checkpoints_of`. Raises CheckpointError where that cannot be found out."""
    kept = readable_checkpoints(folder, config)

    def look() -> bool:
        try:
            return bool(steps_in(kept))
        except Exception as error:  # the client of a cloud raises its own kinds
            raise CheckpointError(
                f"{kept} cannot be read ({first_line(error)}). Check the name, and that this machine may read it."
            ) from error

    return on_process_0(look)


def saved_config(folder: Path) -> Config | None:
    """The config that a stage has saved in its folder."""
    path = folder / "config.yaml"
    return load_config(path) if path.is_file() else None


def adapted(model: Model, params: Params, name: str | None) -> StageWeights:
    """Fresh adapters beside `params`; without LoRA, the parameters."""
    lora = model.config.lora.build()
    if lora is None:
        return StageWeights(params)
    try:
        make = functools.partial(init_lora, params, lora)
        adapters = made_on(model.mesh, make, jax.random.key(model.config.seed))
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error}") from error
    return StageWeights(adapters, params, lora, name)


def base_name(model: Model) -> str | None:
    """The hub id or folder of a pretrained student."""
    return None if model.source is None else model.source.hub_id or str(model.source.folder)
