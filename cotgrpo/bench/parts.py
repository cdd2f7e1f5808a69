"""The parts that `cotgrpo bench` measures: their functions, options and columns."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from cotgrpo.bench import checkpointing, compilation, generation, input_pipeline, kernels, steps
from cotgrpo.models.config import REMAT_POLICIES, DecoderConfig

Option = tuple[str, dict[str, Any]]
TIMES = (("median s", "median_s", "seconds"), ("min", "min_s", "seconds"), ("max", "max_s", "seconds"))
SPEED = (("tokens/s", "tokens_per_sec", "count"), ("MFU", "mfu", "percent"))


@dataclasses.dataclass(frozen=True)
class Part:
    """One part to measure.

    Attributes:
        about: one line of help.
        measure: function of the decoder and the options; returns a dict with `rows`.
        columns: (title, key of a row, format) of the table.
        options: its own options, besides those of all parts.
        defaults: its defaults of the options of all parts.
        lines: function of the result; returns lines to print below the table.
    """

    about: str
    measure: Callable[[DecoderConfig, argparse.Namespace], dict[str, Any]]
    columns: tuple[tuple[str, str, str], ...]
    options: tuple[Option, ...] = ()
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    lines: Callable[[dict[str, Any]], list[str]] = lambda _: []


def numbers(help: str, *default: int | float) -> dict[str, Any]:
    """Return the settings of an option that takes several numbers of the defaults' type."""
    shown = " ".join(map(str, default))
    return {"type": type(default[0]), "nargs": "+", "default": list(default), "help": f"{help} ({shown})"}


NEW_TOKENS: Option = ("--new-tokens", {"type": int, "default": 64, "help": "tokens of a reply"})
PARTS: dict[str, Part] = {
    "step": Part(
        "one SFT step and one GRPO (GhostRespond) step, teacher-forced, on the same batch in turn",
        steps.measure_step,
        (
            ("step", "step", "text"),
            *TIMES,
            *SPEED,
            ("compile s", "compile_s", "seconds"),
            ("temp MB", "temp_bytes", "MB"),
            ("peak MB", "peak_bytes_so_far", "MB"),
        ),
        (
            ("--supervised", {"type": float, "default": 1.0, "help": "share of tokens with a loss"}),
            ("--micro-batches", {"type": int, "default": 1, "help": "parts of a batch"}),
        ),
        lines=steps.step_lines,
    ),
    "supervised": Part(
        "the time of a GRPO step against the share of supervised tokens",
        steps.measure_supervised,
        (
            ("supervised", "supervised", "percent"),
            *TIMES,
            *SPEED,
            ("time", "time_share", "ratio"),
            ("FLOPs", "flops_share", "ratio"),
        ),
        (("--shares", numbers("shares of tokens with a loss", 1.0, 0.5, 0.25, 0.1)),),
    ),
    "remat": Part(
        "the GRPO step with each remat policy, in turn on the same batch",
        steps.measure_remat,
        (
            ("remat", "policy", "text"),
            *TIMES,
            *SPEED,
            ("time", "time_share", "ratio"),
            ("compile s", "compile_s", "seconds"),
            ("temp MB", "temp_bytes", "MB"),
        ),
        (("--policies", {"nargs": "+", "choices": REMAT_POLICIES, "default": ["dots", "none", "full"]}),),
    ),
    "on_policy": Part(
        "a GRPO update on the student's own replies: rollout, live ghost, step",
        generation.measure_on_policy,
        (("part", "part", "text"), *TIMES, ("share", "share", "percent"), SPEED[0]),
        (NEW_TOKENS,),
    ),
    "memory": Part(
        "memory of the compiled GRPO step by vocabulary and batch; nothing runs",
        compilation.measure_memory,
        (
            ("V", "vocab", "count"),
            ("tokens", "tokens", "count"),
            ("state MB", "state_bytes", "MB"),
            ("gradient MB", "gradient_bytes", "MB"),
            ("temp MB", "temp_bytes", "MB"),
            ("logits alone MB", "logits_bytes", "MB"),
        ),
        (("--vocab", numbers("vocabulary sizes", 32_768, 131_072, 262_144)),),
        lines=compilation.memory_lines,
    ),
    "compile": Part(
        "compile time of a GRPO step by depth, in fresh processes",
        compilation.measure_compile,
        (
            ("layers", "layers", "count"),
            ("lower s", "lower_s", "seconds"),
            ("compile s", "compile_s", "seconds"),
            ("total s", "total_s", "seconds"),
            ("text", "text_chars", "count"),
        ),
        (("--layers", numbers("depths", 4, 32)), ("--here", {"action": "store_true", "help": argparse.SUPPRESS})),
        {"shape": "tiny", "batch": 2, "seq": 128, "repeats": 3},
        lines=compilation.compile_lines,
    ),
    "engine": Part(
        "the head with loss and gradients: time against three matrix products, memory against all logits at once",
        kernels.measure_engine,
        (
            ("V", "vocab", "count"),
            ("objective", "objective", "text"),
            ("tile", "tile_size", "count"),
            *TIMES,
            *SPEED,
            ("temp MB", "temp_bytes", "MB"),
            ("naive MB", "naive_bytes", "MB"),
            ("naive / engine", "naive_over_engine", "ratio"),
        ),
        (
            ("--vocab", numbers("vocabulary sizes", 32_768, 131_072)),
            ("--objectives", {"nargs": "+", "choices": list(kernels.OBJECTIVES), "default": list(kernels.OBJECTIVES)}),
        ),
        {"repeats": 3},
    ),
    "attention": Part(
        "one layer's causal attention, forward and backward, by length",
        kernels.measure_attention,
        (
            ("T", "seq", "count"),
            ("B", "batch", "count"),
            ("attention", "attention", "text"),
            *TIMES,
            *SPEED,
            ("temp MB", "temp_bytes", "MB"),
        ),
        (("--lengths", numbers("tokens of a sequence", 256, 512, 1_024, 2_048)),),
        {"repeats": 5},
    ),
    "generate": Part(
        "greedy replies with a key/value cache",
        generation.measure_generate,
        (
            ("B", "batch", "count"),
            *TIMES,
            SPEED[0],
            ("first token s", "first_token_s", "seconds"),
            ("further token s", "further_token_s", "seconds"),
            ("bandwidth", "bandwidth", "percent"),
            ("compile s", "compile_s", "seconds"),
        ),
        (NEW_TOKENS, ("--batches", numbers("replies at a time", 1, 8))),
        {"seq": 64, "repeats": 5},
    ),
    "data": Part(
        "steps on packed text in turn with the same step on a constant batch, and packing efficiency",
        input_pipeline.measure_data,
        (("batches", "batches", "text"), *TIMES, SPEED[0], ("padded tokens/s", "padded_tokens_per_sec", "count")),
        (
            ("--rows", {"help": "triples, .jsonl or .parquet (default: made-up sums)"}),
            ("--steps", {"type": int, "default": 5, "help": "steps of a block"}),
        ),
        lines=input_pipeline.data_lines,
    ),
    "checkpoint": Part(
        "saving and restoring the train state",
        checkpointing.measure_checkpoint,
        (("part", "part", "text"), *TIMES, ("GB/s", "bytes_per_sec", "GB/s")),
        (("--folder", {"help": "where to write (default: the system's temporary folder)"}),),
        {"repeats": 3},
    ),
}
