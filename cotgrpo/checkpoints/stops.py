"""Why a stage stopped before its end, and which checkpoint is its last good one: `stopped.json` in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cotgrpo.atomic_files import find_json_object, write_json
from cotgrpo.distributed.processes import is_process_0, on_process_0
from cotgrpo.terminal import say

if TYPE_CHECKING:
    from rich.console import Console

STOPPED = "stopped.json"


def record_stop(folder: Path, reason: str, step: int, last_good: int | None) -> str:
    """Write `stopped.json` in a stage's folder. Return a sentence that names the last good checkpoint and what to do.

    Args:
        folder: of the stage.
        reason: why it stopped.
        step: after which it stopped.
        last_good: the step of the last good checkpoint, or None.
    """
    if is_process_0():
        write_json(folder / STOPPED, {"step": step, "reason": reason, "last_good": last_good})
    if last_good is None:
        return "No checkpoint was saved before: start again in another run_dir."
    return (
        f"The checkpoint of step {last_good} is the last good one: eval, export and the next stage take it. To train "
        f"on from it with other settings, name {folder} as init_from in another run_dir."
    )


def last_good_step(folder: Path) -> int | None:
    """Return the step of the last good checkpoint of a stage that stopped, or None."""
    return (find_json_object(folder / STOPPED) or {}).get("last_good")


def clear_stop(folder: Path) -> None:
    """Remove `stopped.json`: the stage went on and has a new checkpoint."""
    if is_process_0():
        (folder / STOPPED).unlink(missing_ok=True)


def stop_text(folder: Path) -> str | None:
    """Return why a stage stopped and which checkpoint is its last good one; None if it did not stop."""
    stop = find_json_object(folder / STOPPED)
    if stop is None:
        return None
    last_good, step, reason = (stop.get(name) for name in ("last_good", "step", "reason"))
    taken = (
        "it has no good checkpoint" if last_good is None else f"its last good checkpoint is that of step {last_good}"
    )
    return f"{folder} stopped after step {step}, and {taken}. {reason}"


def say_stops(folders: Sequence[Path], console: Console) -> None:
    """Print a line for each of these stages that stopped before its end."""
    for text in on_process_0(lambda: [stop_text(folder) for folder in folders]):
        if text is not None:
            say(console, text, style="yellow")
