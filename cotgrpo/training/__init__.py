"""Whole runs: `run_sft`, `run_grpo`, `run_eval`, `run_eval_pretrained` and `run_export`, from a config to a report."""

from cotgrpo.training.export import run_export
from cotgrpo.training.stages import run_eval, run_eval_pretrained, run_grpo, run_sft

__all__ = ["run_eval", "run_eval_pretrained", "run_export", "run_grpo", "run_sft"]
