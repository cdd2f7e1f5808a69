"""Write the newest student of a run as a folder that transformers loads.

The folder holds safetensors, config.json, tokenizer, chat template, generation_config.json, and a model card with the
data, the objective, the settings and the measured accuracy.
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
        help="number type of the weights (default: as in the run)",
    )
    add(
        "--adapter",
        action="store_true",
        help="write LoRA's adapters alone, as peft loads them, instead of merging them",
    )
    add(
        "--allow_changed",
        type=Literal["student"] | None,
        metavar="student",
        help="merge LoRA's adapters into the student at student.path although it has changed since the run",
    )


def run(options: Options, console: Console) -> None:
    """Export the student."""
    from cotgrpo.training.export import run_export

    given = options.values
    if given.run_dir is None or given.out is None:
        raise ConfigError("export needs --run_dir DIR, the run's folder, and --out FOLDER for the model.")
    run_export(
        Path(given.run_dir),
        Path(given.out),
        given.dtype,
        console,
        adapter=given.adapter,
        allow_changed=given.allow_changed or (),
    )
