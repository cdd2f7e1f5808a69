"""Write the newest student of a run as a folder that transformers loads.

The folder holds safetensors, config.json, tokenizer, chat template, generation_config.json, and a model card with the
data, the objective, the settings and the measured accuracy. `--push OWNER/NAME` uploads it to the Hugging Face Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cotgrpo.config import ConfigError
from cotgrpo.config.files import Options

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console


def add_options(parser: ArgumentParser) -> None:
    """Add the run, the folder, and the form of the weights."""
    add = parser.add_argument
    add("--run_dir", type=str, metavar="DIR", help="the folder of the run")
    add("--out", type=str, metavar="FOLDER", help="a new or empty folder")
    add(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16"] | None,
        metavar="{float32,bfloat16,float16}",
        help="number type of the weights (default: that of the pretrained student, or as in the run)",
    )
    add(
        "--adapter",
        action="store_true",
        help="write LoRA's adapters alone, as peft loads them, instead of merging them",
    )
    add(
        "--push",
        type=str,
        metavar="OWNER/NAME",
        help="upload the folder to this model of the Hugging Face Hub, which is made if it does not exist; without "
        "--run_dir, upload what --out holds already",
    )
    add("--public", action="store_true", help="a model that --push makes is public (default: private)")
    add(
        "--allow_changed",
        type=Literal["student"] | None,
        metavar="student",
        help="merge LoRA's adapters into the student at student.path although it has changed since the run",
    )


def run(options: Options, console: Console) -> None:
    """Export the student, and upload it with `--push`."""
    from cotgrpo.training.export import run_export
    from cotgrpo.training.push import check_access, push_folder

    given = options.values
    if given.out is None or (given.run_dir is None and given.push is None):
        raise ConfigError("export needs --run_dir DIR, the run's folder, and --out FOLDER for the model.")
    if given.public and given.push is None:
        raise ConfigError("--public says who may see a model that --push makes. Give --push OWNER/NAME, too.")
    if given.push is not None:
        check_access(given.push)  # before the weights are written, which may take long
    if given.run_dir is not None:
        run_export(
            Path(given.run_dir),
            Path(given.out),
            given.dtype,
            console,
            adapter=given.adapter,
            allow_changed=given.allow_changed or (),
        )
    if given.push is not None:
        push_folder(Path(given.out), given.push, console, private=not given.public)
