"""Commands on eight devices: the same run as on one device, another mesh later, and meshes that are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cotgrpo.cli import main
from cotgrpo.config import Config, ConfigError
from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.logs.completions import read_completions
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.models import save_pretrained
from cotgrpo.models.decoder import DecoderConfig, init_params
from cotgrpo.sharding import MeshConfig
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training.loop import TIME_KEYS
from cotgrpo.training.mesh import run_mesh

SETTINGS = """
student: {width: 32, num_layers: 1, num_heads: 4, num_kv_heads: 2, head_dim: 8, mlp_width: 64}
tokenizer: {vocab_size: 300}
data: {seq_len: 256, test_rows: 10}
sft: {steps: 3, batch_size: 8, micro_batches: 2, log_every: 1}
grpo: {steps: 2, batch_size: 8, log_every: 1, reference_kl: 0.1}
eval: {rows: 10, batch_size: 6, max_new_tokens: 8}
"""
MESH = ("--mesh.data", "-1", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.context", "2")


@pytest.fixture(autouse=True)
def all_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine with eight: the tests' own choice of the first is taken back."""
    with jax.default_device(None):
        yield


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    write_triples(tmp_path / "rows.jsonl", ProceduralTeacher(seed=1).draw(120))
    (tmp_path / "c.yaml").write_text(SETTINGS, encoding="utf-8")
    return ["--config", str(tmp_path / "c.yaml"), "--data.train", str(tmp_path / "rows.jsonl")]


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_KEYS and k != "time"} for row in read_metrics(folder)]


@pytest.mark.slow
def test_eight_devices_are_one(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both stages on a mesh of all kinds and on one device: every logged number, the held-out loss, and each reply."""
    many, one = tmp_path / "many", tmp_path / "one"
    for command in ("sft", "grpo"):
        assert main([command, *options, "--run_dir", str(many), *MESH]) == 0
        with jax.default_device(jax.devices()[0]):
            assert main([command, *options, "--run_dir", str(one)]) == 0
    for stage, steps in (("sft", 3), ("grpo", 2)):
        here, there = numbers(many / stage), numbers(one / stage)
        assert len(here) == len(there) >= steps
        for ours, theirs in zip(here, there, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        for name in ("before.json", "after.json"):
            ours, theirs = (json.loads((folder / stage / name).read_text()) for folder in (many, one))
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours["replies"] == theirs["replies"]
    # Trained on eight devices in one layout, measured on eight in another, and on one.
    loss = json.loads((one / "grpo" / "after.json").read_text())["loss"]
    for data, fsdp in (("8", "1"), ("1", "-1")):
        mesh = ["--mesh.data", data, "--mesh.fsdp", fsdp, "--mesh.tensor", "1", "--mesh.context", "1"]
        assert main(["eval", *options, "--run_dir", str(many), *mesh]) == 0
        assert json.loads((many / "grpo" / "eval.json").read_text())["loss"] == pytest.approx(loss, rel=1e-4)
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["pair", "forward_kl"])
def test_on_policy_on_eight_devices(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    """Replies with a live teacher of another shape, used twice, and rows of text: logs, replies, and the student."""
    many, one, teacher = tmp_path / "many", tmp_path / "one", tmp_path / "teacher"
    with jax.default_device(jax.devices()[0]):
        assert main(["sft", *options, "--run_dir", str(one), "--sft.steps", "1"]) == 0
    tokenizer = load_tokenizer(one / "sft" / "tokenizer")
    shape = DecoderConfig(
        vocab_size=304, width=48, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, mlp_width=32, init_scale=0.2
    )
    save_pretrained(teacher, shape, init_params(shape, jax.random.key(5)), tokenizer=tokenizer)
    live = ["--grpo.ghosts.source", "teacher_model", "--grpo.ghosts.teacher", str(teacher), "--grpo.steps", "3"]
    live += [
        "--grpo.ghosts.updates_per_rollout",
        "2",
        "--grpo.ghosts.teacher_forced_share",
        "0.25",
        "--grpo.ghosts.max_new_tokens",
        "8",
    ]
    live += ["--grpo.objective.name", objective, "--grpo.init_from", str(one / "sft"), *options]
    assert main(["grpo", "--run_dir", str(many), *MESH, *live]) == 0
    with jax.default_device(jax.devices()[0]):
        assert main(["grpo", "--run_dir", str(one), *live]) == 0
    here, there = numbers(many / "grpo"), numbers(one / "grpo")
    assert len(here) == len(there) >= 3
    for ours, theirs in zip(here, there, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for ours, theirs in zip(*(read_completions(run / "grpo", 100) for run in (many, one)), strict=True):
        assert ours.pop("rewards") == pytest.approx(theirs.pop("rewards"), abs=1e-4)
        assert ours == theirs
    ours, theirs = (json.loads((run / "grpo" / "after.json").read_text())["replies"] for run in (many, one))
    assert ours == theirs
    capsys.readouterr()
    shape, other = dataclasses.replace(shape, mlp_width=33), tmp_path / "other"
    save_pretrained(other, shape, init_params(shape, jax.random.key(5)), tokenizer=tokenizer)
    live += ["--grpo.ghosts.teacher", str(other), "--run_dir", str(tmp_path / "third")]
    assert main(["grpo", *MESH, *live]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "mesh and the live teacher do not go together. The mesh axis tensor=2 does not divide" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--mesh.data", "3"], "asks for 3 devices, but there are 8"),
        (["--mesh.tensor", "4", "--mesh.data", "2"], "tensor=4 does not divide the model's num_kv_heads, 2"),
        (["--mesh.data", "8"], "2 micro-batches of a batch of 8 cannot fill evenly: expected a multiple of 16"),
        (
            ["--mesh.data", "1", "--mesh.context", "8", "--data.seq_len", "250"],
            "context=8 does not divide the 250 tokens",
        ),
        (["--mesh.model", "8"], "mesh.model"),
        (["--mesh.fsdp", "-1"], "with at most one -1"),
    ],
)
def test_refused(settings: list[str], message: str, options: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main(["sft", *options, "--run_dir", str(tmp_path / "run"), *settings]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_one_device_needs_no_mesh() -> None:
    with jax.default_device(jax.devices()[0]):
        assert run_mesh(Config()) is None
        with pytest.raises(ConfigError, match=r"mesh: .* asks for 2 devices, but there are 1"):
            run_mesh(Config(mesh=MeshConfig(data=2)))
