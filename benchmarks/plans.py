"""Write benchmarks/generated_plans: `cotgrpo plan` for the configs of docs/launch.md, as JSON and as printed tables.

    python benchmarks/plans.py              all of them
    python benchmarks/plans.py NAME ...     these

It needs the `tpu` extra, and no TPU. Each plan has a process of its own. A plan of Llama-3-8B compiles for about a
minute on two idle cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]

PLANS: dict[str, tuple[str, str, str, str]] = {
    f"{config}-{stage}-{topology.replace(':', '-')}": (config, stage, topology, "")
    for config, topology in (
        ("llama3_8b_v5p32", "v5p:4x4x4"),
        ("llama3_8b_v5e16", "v5e:4x4"),
        ("llama3_8b_v5e16_full", "v5e:4x4"),
        ("llama3_8b_v5p32", "v5p:2x2x4"),
        ("llama3_8b_8gpu", "h100:8"),
        ("gemma3_1b_v5e8", "v5e:2x4"),
        ("qwen3_0.6b_v5e8", "v5e:2x4"),
    )
    for stage in ("grpo", "sft")
} | {
    # Shows that the loop over tiles does not send the head if the vocabulary is split too.
    "llama3_8b_v5p32-grpo-v5p-2x2x4-tensor": ("llama3_8b_v5p32", "grpo", "v5p:2x2x4", "--mesh.fsdp 8 --mesh.tensor 2"),
}
MODELS = {"llama3": "llama-3-8b", "gemma3": "gemma-3-1b", "qwen3": "qwen3-0.6b"}
"""Folders in configs/models with each config.json, so that no hub is needed."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"plans to write (default: all): {', '.join(PLANS)}")
    names = parser.parse_args(argv).names
    if unknown := sorted({*names} - {*PLANS}):
        parser.error(f"There is no plan {unknown[0]}. There are: {', '.join(PLANS)}.")
    for name, (config, stage, topology, more) in PLANS.items():
        if names and name not in names:
            continue
        command = [sys.executable, "-m", "cotgrpo.cli", "plan", "--config", f"configs/{config}.yaml"]
        command += ["--topology", topology, "--stage", stage, "--out", f"benchmarks/generated_plans/{name}.json"]
        command += ["--student.path", f"configs/models/{MODELS[config.partition('_')[0]]}"]
        command += more.split()
        print(" ".join(command[1:]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
