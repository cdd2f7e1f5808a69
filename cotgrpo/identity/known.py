"""What a run already knows when a stage begins: its held-out split, and the records of this stage and the one before.

The split is in `held_out.json` of the run folder, and each stage keeps a copy in its record. A run that starts from a
stage of another run, or from an exported model, takes the split from there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cotgrpo.atomic_files import find_json_object, write_json
from cotgrpo.config import Config, ConfigError, load_config
from cotgrpo.config.files import given_in
from cotgrpo.data.sources import as_list
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.identity.record import ARRAYS, FILE, InputsRecord
from cotgrpo.identity.split import HeldOutSplit

HELD_OUT, EXPORTED = "held_out.json", "cotgrpo_held_out.json"
"""The split in a run folder, and in a folder that `cotgrpo export` has written."""
STAGES = ("sft", "grpo")


@dataclasses.dataclass(frozen=True)
class Known:
    """What a run knows before it reads its inputs.

    Attributes:
        split: the held-out split, or None.
        place: the file that it comes from.
        older: seed and number of rows that an older version held out, which kept no split; else None.
        own: the record of this stage if it goes on; else None.
        prior: the record of the stage that it starts from, or None.
        prior_folder: that stage's folder.
        folder: this stage's folder.
        conflict: another split, of the stage that this one starts from, and its file; else None.
    """

    split: HeldOutSplit | None = None
    place: str = ""
    older: tuple[int, int] | None = None
    own: InputsRecord | None = None
    prior: InputsRecord | None = None
    prior_folder: Path | None = None
    folder: Path | None = None
    conflict: str | None = None

    @property
    def recorded(self) -> InputsRecord | None:
        """The record that the inputs are compared with."""
        return self.own or self.prior

    @property
    def recorded_folder(self) -> Path:
        """The folder of that record."""
        found = self.folder if self.own is not None else self.prior_folder
        return found if found is not None else Path()


def find_known(config: Config, folder: Path | None = None, origin: Path | None = None) -> Known:
    """Return what is known of a stage's inputs. Every process gets it.

    Args:
        config: the settings.
        folder: the stage's folder; None: a model that no run has trained.
        origin: the folder of the stage that it starts from, or None.

    Raises:
        ConfigError: the split of a run is lost.
    """
    found = on_process_0(lambda: find_splits(config, folder, origin))
    split = found["split"]
    return Known(
        split=None if split is None else HeldOutSplit.from_dict(split),
        place=found["place"],
        older=None if found["older"] is None else (int(found["older"][0]), int(found["older"][1])),
        own=None if folder is None else InputsRecord.load(folder),
        prior=None if origin is None or origin == folder else InputsRecord.load(origin),
        prior_folder=origin,
        folder=folder,
        conflict=found["conflict"],
    )


def find_splits(config: Config, folder: Path | None, origin: Path | None) -> dict[str, Any]:
    """Return `split`, `place`, `older` and `conflict` of a stage's `Known`, JSON-able."""
    run_dir = Path(config.run_dir)
    found = split_of_run(run_dir, config, first=folder)
    elsewhere = None
    if origin is not None and origin.name in STAGES and origin.parent.resolve() != run_dir.resolve():
        elsewhere = split_of_run(origin.parent, config, first=origin)
    elif origin is None and config.student.path is not None:
        elsewhere = split_in(Path(config.student.path) / EXPORTED)
    found, elsewhere = found or elsewhere, elsewhere if found else None
    if found is None:
        return {"split": None, "place": "", "older": None, "conflict": None}
    other = elsewhere is not None and rule(elsewhere["split"]) != rule(found["split"])
    return {"older": None} | found | {"conflict": elsewhere["place"] if elsewhere and other else None}


def rule(split: dict[str, Any] | None) -> tuple[object, ...] | None:
    """Return what decides which questions a split holds out."""
    return None if split is None else (split["salt"], split["threshold"], split["listed"])


def split_of_run(run: Path, config: Config, first: Path | None) -> dict[str, Any] | None:
    """Return the split of a run: from its folder, from the record of a stage, or as an older version drew it.

    Args:
        run: the folder of the run.
        config: the settings of now.
        first: the stage whose older draw counts if the stages differ in it.
    """
    kept = split_in(run / HELD_OUT)
    folders = [run / stage for stage in STAGES]
    for folder in folders:
        if kept is None:
            kept = split_in(folder / FILE, "split")
    if kept is not None:
        return kept
    for folder in sorted(folders, key=lambda folder: folder != first):
        saved = load_config(folder / "config.yaml", may_be_newer=True) if (folder / "config.yaml").is_file() else None
        if saved is None or saved.data.test or config.data.test:
            continue
        if "allow_changed" in given_in(folder / "config.yaml")[0]:
            raise ConfigError(
                f"{run / HELD_OUT} is missing or damaged, and so is the copy in {folder / FILE}: which questions of "
                "data.train were held out is not known. Restore one of them from a backup. Or name other held-out "
                "rows in data.test, or choose another run_dir."
            )
        if as_list(saved.data.train) == as_list(config.data.train):
            return {"split": None, "place": str(folder), "older": [saved.seed, saved.data.test_rows]}
    return None


def split_in(path: Path, key: str | None = None) -> dict[str, Any] | None:
    """Return the split in a JSON file, whole or as the value of a key, and its place; None if there is none."""
    values = find_json_object(path)
    found = values if key is None or values is None else values.get(key)
    if found is None:
        return None
    try:
        HeldOutSplit.from_dict(found)
    except (ValueError, AttributeError):
        return None
    return {"split": found, "place": str(path)}


def save_split(split: HeldOutSplit, run_dir: Path) -> None:
    """Write the split of a run, unless it is there."""
    path = run_dir / HELD_OUT
    if find_json_object(path) != split.to_dict():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, split.to_dict())


def copy_split(run_dir: Path, out: Path) -> None:
    """Copy the split of a run into the folder of its exported student, if the run has one.

    A run that starts from that student then holds the same questions out.
    """
    found = split_in(run_dir / HELD_OUT)
    if found is not None:
        write_json(out / EXPORTED, found["split"])


def forget_record(folder: Path) -> None:
    """Remove the record of a stage that took no step."""
    for name in (FILE, ARRAYS):
        (folder / name).unlink(missing_ok=True)


def forget_split(folder: Path) -> None:
    """Remove the split of a run whose only stage, in this folder, took no step and gets other settings."""
    if not any((folder.parent / stage / "config.yaml").is_file() for stage in STAGES):
        (folder.parent / HELD_OUT).unlink(missing_ok=True)
