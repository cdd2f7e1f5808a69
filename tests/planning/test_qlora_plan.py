"""Plan an 8B student on a card of 24 GB, with its kernels quantized under LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cotgrpo.accelerators.chips import parse_topology
from cotgrpo.config import ConfigError, parse_config
from cotgrpo.planning.stage_plan import StagePlan

LLAMA3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
KERNELS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
REST = 2 * 128256 * 4096 + (2 * 32 + 1) * 4096
"""Weights of embedding, head and norms."""
ADAPTERS = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
BITS = {"none": 16, "int8": 8 + 32 / 64, "nf4": 4 + 32 / 64}


def figures(tmp_path: Path, *more: str, stage: str = "sft") -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B), encoding="utf-8")
    student = ["--student.path", str(tmp_path), "--student.dtype", "bfloat16", "--student.param_dtype", "bfloat16"]
    sizes = ["--student.remat", "full", "--data.seq_len", "2048"]
    sizes += [f"--{name}.{size}=4" for name in ("sft", "grpo") for size in ("batch_size", "micro_batches")]
    config = parse_config([*student, *sizes, "--lora.rank", "16", *more])
    return StagePlan(config, "grpo" if stage == "grpo" else "sft", parse_topology("l4:1")).figures()


@pytest.mark.parametrize("to", BITS)
def test_an_8b_student_and_24_gb(to: str, tmp_path: Path) -> None:
    found = figures(tmp_path, "--lora.quantize_base", to)
    memory = found["bytes_per_device"]
    assert memory["frozen parameters"] == KERNELS * BITS[to] / 8 + 2 * REST
    assert memory["parameters"] == 4 * ADAPTERS and memory["optimizer"] == pytest.approx(8 * ADAPTERS, abs=100)
    assert found["fits"] == (memory["total"] <= 24e9) == (to != "none")
    assert found["quantized_base"] == to and found["student"]["parameters"] == KERNELS + REST


def test_a_reference_reads_the_same_base(tmp_path: Path) -> None:
    """Its parameters are the base with the adapters that the stage starts from."""
    nf4 = ("--lora.quantize_base", "nf4")
    alone, both = (
        figures(tmp_path, *nf4, *more, stage="grpo")["bytes_per_device"]["frozen parameters"]
        for more in ((), ("--grpo.reference_kl", "0.1"))
    )
    assert both == 2 * alone + 4 * ADAPTERS


def test_blocks_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^lora.block_size: layers/down/kernel: a block of 48 .* such as 16\.$"):
        figures(tmp_path, "--lora.quantize_base", "nf4", "--lora.block_size", "48")
