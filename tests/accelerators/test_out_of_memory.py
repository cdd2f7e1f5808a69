"""An allocation that failed is one line that names the settings, and the advised command works in the same folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import SETTINGS

from cotgrpo.accelerators.out_of_memory import explain_out_of_memory
from cotgrpo.config import ConfigError
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples

MESSAGES = {
    "RESOURCE_EXHAUSTED: Out of memory allocating 7052270136 bytes.": "7.1 GB",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34359738368 bytes.": "34.4 GB",
    "RESOURCE_EXHAUSTED: Failed to allocate request for 2.00GiB (2147483648B) on device ordinal 0": "2.00GiB",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.": "an array",
    "INTERNAL: std::bad_alloc": "an array",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_runtimes_report(message: str) -> None:
    with pytest.raises(ConfigError) as caught, explain_out_of_memory(lambda: "Lower sft.batch_size (8)."):
        raise RuntimeError(message)
    assert str(caught.value) == (
        f"Out of memory: {MESSAGES[message]} could not be allocated. Lower sft.batch_size (8)."
    )


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="INVALID_ARGUMENT"), explain_out_of_memory(lambda: ""):
        raise RuntimeError("INVALID_ARGUMENT: shapes differ")
    with pytest.raises(ConfigError, match="Out of memory: an array"), explain_out_of_memory(lambda: ""):
        raise MemoryError


@pytest.mark.slow
def test_a_limit_on_memory(tmp_path: Path) -> None:
    """The address space is limited; the batch is too large for it, and a small one is not, in the same folder."""
    write_triples(tmp_path / "rows.jsonl", ProceduralTeacher(seed=1).draw(60))
    (tmp_path / "c.yaml").write_text(f"run_dir: {tmp_path / 'run'}\n{SETTINGS}", encoding="utf-8")
    large = "--student.width 512 --student.num_heads 8 --student.num_kv_heads 8 --student.head_dim 64"
    large += " --student.mlp_width 2048 --student.num_layers 4 --data.seq_len 1024 --data.packing false --eval.rows 1"

    def run(stage: str, *sizes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cotgrpo.cli", stage, "--config", str(tmp_path / "c.yaml"), *large.split()]
        command += ["--data.train", str(tmp_path / "rows.jsonl"), f"--{stage}.steps", "2", *sizes]
        limited = ["bash", "-c", f'ulimit -v {6 << 20}; exec "$@"', "limited", *command]
        return subprocess.run(limited, capture_output=True, text=True)

    advised = {"sft": ("--sft.batch_size", "2"), "grpo": ("--grpo.batch_size", "2")}
    for stage, smaller in advised.items():
        failed = run(stage, f"--{stage}.batch_size", "256")
        lines = failed.stderr.strip().splitlines()
        assert failed.returncode == 2 and lines[-1].startswith("cotgrpo: Out of memory: "), failed.stderr
        assert f"{stage}.batch_size (256)" in lines[-1] and "The same run_dir can be used." in lines[-1]
        done = run(stage, *smaller)
        assert done.returncode == 0, done.stderr
