"""Commands that are killed with -9 at one of their own file operations, at any of them.

`python killed.py ROOT RECORD MOMENT DELAY COMMAND ...` runs a command of cotgrpo. Just before it does MOMENT, such as
"rename sft/report.json", or DELAY seconds later, the process kills itself with SIGKILL, which nothing can catch. So a
moment is a matter of progress: a slow machine is killed in the middle of a save as surely as a fast one. Without a
MOMENT the process writes all that it did to RECORD.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
NAMES = re.compile(r"(tfevents|orbax-checkpoint-tmp)[^/]*")
"""Names that hold a time differ between runs after this part."""


def moment(root: str, event: str, arguments: tuple[Any, ...]) -> str | None:
    """The operation that an audit event announces, if it changes something below `root`."""
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
        return None
    if event != "open" and event not in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
        return None
    path = arguments[1] if event == "os.rename" else arguments[0]
    if not isinstance(path, (str, bytes)):
        return None
    inside = os.path.relpath(os.path.abspath(os.fsdecode(path)), root)
    name = NAMES.sub(r"\1", inside)
    return None if inside.startswith("..") else f"{event.removeprefix('os.')} {name}"


def watch(root: str, record: str, wanted: str, delay: float) -> None:
    """Kill this process at a moment, or record all."""
    written = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def kill() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        found = moment(root, event, arguments)
        if found is None:
            return
        if not wanted:
            os.write(written, f"{found}\n".encode())
        elif found == wanted:
            threading.Thread(target=kill).start() if delay else kill()

    sys.addaudithook(hook)


class Killed:
    """A command that is killed again and again in a folder, and run to its end.

    Args:
        base: a new folder for the folders of the runs.
        command: the arguments of the command for a folder.
        prepare: fills a new folder before the first run in it.
        rng: draws the moments.

    Attributes:
        whole: the folder of the run that nothing disturbed.
        ended: the folders of the runs that were killed, and came to their end. A run that ends before it can be killed
            once more is one, and the next kill is in a new folder.
        moments: those at which a process was killed.
    """

    def __init__(
        self,
        base: Path,
        command: Callable[[Path], list[str]],
        rng: random.Random,
        prepare: Callable[[Path], object] = lambda folder: None,
    ) -> None:
        base.mkdir(parents=True)
        self.base, self.command, self.prepare, self.rng = base, command, prepare, rng
        self.whole, self.ended, self.moments = base / "whole", list[Path](), list[str]()
        self.folder = self.whole
        prepare(self.whole)

    def run(self, wanted: str = "", delay: float = 0.0) -> int:
        """Run the command in a process of its own. Fails unless it ends well, or is killed as wanted."""
        process = self.start(wanted, delay)
        output, _ = process.communicate(timeout=600)
        expected = (0, -signal.SIGKILL) if wanted else (0,)
        assert process.returncode in expected, f"{process.args}, {self.moments}\n{output}"
        return process.returncode

    def start(self, wanted: str = "", delay: float = 0.0) -> subprocess.Popen[str]:
        """Start the command in a process of its own."""
        record = self.base / f"{self.folder.name}.record"
        arguments = [sys.executable, __file__, str(self.folder), str(record), wanted, str(delay)]
        arguments += self.command(self.folder)
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def kill(self, count: int, targets: tuple[str, ...] = (), delay: float = 0.03) -> None:
        """Kill the command `count` times and at every target, from early moments to late ones, and let it end.

        Args:
            count: of kills at random moments, each equally likely among the command's file operations.
            targets: parts of moments; the first that has it is one.
            delay: most seconds after a random moment. A command that cannot be repeated once it is done has none.
        """
        self.run()
        done = list(dict.fromkeys((self.base / "whole.record").read_text().splitlines()))
        self.new_folder()
        wanted = {next(i for i, each in enumerate(done) if target in each) for target in targets}
        others = [i for i in range(len(done)) if i not in wanted]
        for i in sorted({*wanted, *self.rng.sample(others, min(count, len(others)))}):
            self.once(done[i], 0.0 if i in wanted or self.rng.random() < 0.4 else self.rng.random() * delay)
        while len(self.moments) < count + len(targets):  # a delay passed over the next moment
            self.once(self.rng.choice(done), 0.0)
        self.run()
        self.ended.append(self.folder)

    def new_folder(self) -> None:
        self.folder = self.base / f"killed{len(self.ended)}"
        self.prepare(self.folder)

    def once(self, wanted: str, delay: float) -> None:
        """Run the command, and count a kill if it came to that moment."""
        if self.run(wanted, delay):
            self.moments.append(wanted)
        else:
            self.ended.append(self.folder)
            self.new_folder()


if __name__ == "__main__":
    root, record, wanted, delay, *command = sys.argv[1:]
    watch(os.path.abspath(root), record, wanted, float(delay))
    from cotgrpo.cli import main

    sys.exit(main(command))
