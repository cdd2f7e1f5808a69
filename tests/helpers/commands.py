"""Small settings, a small model folder, and what a command reads and writes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.checkpoints.manager import CheckpointError
from cotgrpo.cli import main
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.models import Pretrained, save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training import stages

SETTINGS = """
student: {width: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 16, mlp_width: 64}
tokenizer: {vocab_size: 300}
data: {seq_len: 256, test_rows: 20}
sft: {steps: 6, batch_size: 2, log_every: 2, eval_every: 3, optimizer: {learning_rate: 1.0e-3}}
grpo: {steps: 4, batch_size: 2, log_every: 2, optimizer: {learning_rate: 1.0e-3}}
eval: {rows: 20, batch_size: 8, max_new_tokens: 12}
checkpoint: {every: 2}
"""


PRETRAINED_SETTINGS = """
data: {seq_len: 320, test_rows: 12}
sft: {steps: 4, batch_size: 2, log_every: 2, optimizer: {learning_rate: 1.0e-3}}
grpo: {steps: 2, batch_size: 2, log_every: 1, optimizer: {learning_rate: 1.0e-3}}
eval: {rows: 12, batch_size: 12, max_new_tokens: 8}
checkpoint: {every: 2}
"""


def options(folder: Path, *more: str) -> list[str]:
    return ["--config", str(folder / "c.yaml"), "--data.train", str(folder / "rows.jsonl"), *more]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command said on stderr, which is one line."""
    error = capsys.readouterr().err
    assert error.startswith("cotgrpo: ") and error.count("\n") == 1, error
    return error


CONTROLS = ("<pad>", "<eos>", "<sep>", "<|im_start|>", "<|im_end|>")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder: Path, texts: list[str]) -> Path:
    """Write a random model with a padded embedding and two stop tokens: one ends a text, one a turn."""
    tokenizer = train_tokenizer(texts, vocab_size=320, special_tokens=CONTROLS)
    tokenizer.chat_template = CHATML
    config = DecoderConfig(
        vocab_size=len(tokenizer) + 5, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48
    )
    params = init_params(dataclasses.replace(config, init_scale=0.2), jax.random.key(7))
    stops = {"eos_token_id": [CONTROLS.index("<eos>"), CONTROLS.index("<|im_end|>")]}
    return save_pretrained(folder, config, params, tokenizer=tokenizer, generation_config=stops)


def write_rows_and_model(folder: Path) -> None:
    """`rows.jsonl`, `model` and `c.yaml`, which names the model and has small settings."""
    rows = ProceduralTeacher(seed=1).draw(60)
    write_triples(folder / "rows.jsonl", rows)
    write_model(folder / "model", [f"{t.question}\n{t.rationale}" for t in rows])
    (folder / "c.yaml").write_text(f"student: {{path: {folder / 'model'}}}\n{PRETRAINED_SETTINGS}", encoding="utf-8")


def logits_of(model: Pretrained, tokens: np.ndarray) -> np.ndarray:
    """Logits of one sequence, `[T, V]`; what is padded behind it to one length for all does not reach back."""
    tokens_BT = jnp.asarray(np.pad(tokens, (0, 320 - len(tokens)))[None], jnp.int32)
    logits_BTV = model.student.logits(model.params, tokens_BT, jnp.arange(320)[None], jnp.ones_like(tokens_BT))
    return np.asarray(logits_BTV[0, : len(tokens)], np.float64)


def whole_and_cut(
    folder: Path, more: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[float | None]]:
    """The losses of `grpo` after the SFT run in `folder`: run at once, and killed after its first step and resumed."""
    losses = {}
    for name in ("whole", "cut"):
        shutil.copytree(folder / "run" / "sft", tmp_path / name / "sft")
        arguments = ["grpo", *options(folder, *more, "--run_dir", str(tmp_path / name))]
        if name == "cut":
            with monkeypatch.context() as patch:

                def stop(*args: object, **kwargs: object) -> None:
                    raise CheckpointError("stopped on the way")

                patch.setattr(stages, "write_stage_report", stop)
                assert main(arguments) == 2
            (tmp_path / name / "grpo" / "after.json").unlink()
            for step in ("2", "3"):
                shutil.rmtree(tmp_path / name / "grpo" / "checkpoints" / step)
        assert main(arguments) == 0
        lines = (tmp_path / name / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[name] = [json.loads(line).get("train/loss") for line in lines]
    return losses
