"""Names and forms that settings had before, translated when a file is read: configs of saved runs, and a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED_KEYS = {
    "grpo.ghosts.slots": "grpo.ghosts.decode_batch_size",
    "grpo.ghosts.candidates": "grpo.ghosts.num_generations",
    "grpo.ghosts.reuse": "grpo.ghosts.updates_per_rollout",
    "grpo.ghosts.ahead": "grpo.ghosts.prefetch_rollouts",
    "grpo.objective.reference_kl": "grpo.reference_kl",
}
RENAMED_VALUES = {"student.remat": {"nothing": "none", "block": "full"}}

FLAT_DEFAULTS: dict[str, Any] = {
    "student.width": 256,
    "student.num_layers": 4,
    "student.num_heads": 4,
    "student.num_kv_heads": 2,
    "student.head_dim": 64,
    "student.mlp_width": 768,
    "student.rope_theta": 10_000.0,
    "student.tied_head": True,
    "student.init_scale": 0.02,
    "lora.alpha": 32.0,
    "lora.dropout": 0.0,
    "lora.targets": ["query", "key", "value", "out", "gate", "up", "down"],
    "lora.rslora": False,
    "data.separator": "<sep>",
    "data.reasoning": "plain",
    "data.answer_format": "",
    "data.system": "",
    "grpo.reference_kl": 0.0,
    "grpo.objective.beta": 1.0,
    "grpo.objective.nll_weight": 1.0,
    "grpo.objective.pair_weight": 0.3,
    "grpo.objective.negatives": "policy",
    "grpo.objective.estimator": "exact",
    "grpo.objective.samples": 1,
    "grpo.objective.top_k": 16,
    "grpo.objective.clip": 0.2,
    "grpo.ghosts.teacher": None,
    "grpo.ghosts.prompts": [],
    "grpo.ghosts.choice": "argmax",
    "grpo.ghosts.privileged_prompt": "{question}\n\nA correct solution, for reference:\n{rationale}\n{answer}\n\n"
    "Now answer the question: {question}",
    "grpo.ghosts.temperature": 1.0,
    "grpo.ghosts.max_new_tokens": 256,
    "grpo.ghosts.decode_batch_size": None,
    "grpo.ghosts.teacher_forced_share": 0.0,
    "grpo.ghosts.updates_per_rollout": 1,
    "grpo.ghosts.ratio_clip": 0.2,
    "grpo.ghosts.prefetch_rollouts": False,
    "grpo.ghosts.num_generations": 4,
    "grpo.ghosts.temperatures": [0.7, 1.0],
    "grpo.ghosts.questions": 256,
    "grpo.ghosts.refresh_every": 50,
}
"""Saved configs used to hold all of these settings, those that do not apply at these defaults."""


def translate(settings: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Return settings by their present keys and values, and the keys to ignore if they do not apply.

    Args:
        settings: value of each dotted key in a file.
    """
    found = {RENAMED_KEYS.get(key, key): value for key, value in settings.items()}
    for key, names in RENAMED_VALUES.items():
        if isinstance(found.get(key), str):
            found[key] = names.get(found[key], found[key])
    saved = FLAT_DEFAULTS.keys() <= found.keys()
    if saved and found.get("grpo.ghosts.source") in ("teacher_model", "privileged_self"):
        found.pop("grpo.ghosts.num_generations")  # which a live ghost did not have then
    unset = {key for key, value in FLAT_DEFAULTS.items() if saved and found.get(key, value) == value}
    if found.get("grpo.objective.name") == "group_relative" and "grpo.objective.reference_kl" in settings:
        found["grpo.objective.kl_weight"] = found.pop("grpo.reference_kl")
    return found, frozenset(unset & found.keys())
