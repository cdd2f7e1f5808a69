"""The student that a run started from: its record, the copies in the run, and what happens when it changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.commands import error_of, options, read, write_rows_and_model
from safetensors.numpy import load_file, save_file

from cotgrpo.cli import main
from cotgrpo.data.chat import generation_stop_ids
from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.models import ModelError, load_pretrained
from cotgrpo.models.huggingface import pinned
from cotgrpo.models.huggingface.folder import open_folder, split_revision
from cotgrpo.training import weights

LORA = ["--lora.rank", "2", "--lora.alpha", "4", "--lora.targets", "[query, down]"]
SMALL = ["--data.format", "chat", "--data.seq_len", "192", "--data.test_rows", "4", "--eval.rows", "4"]
SMALL += ["--eval.batch_size", "4", "--eval.max_new_tokens", "4", "--sft.steps", "2", "--grpo.steps", "1"]
SMALL += ["--checkpoint.every", "1", "--sft.optimizer.learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a model, and the runs `lora` and `full` of SFT."""
    folder = tmp_path_factory.mktemp("pinned")
    write_rows_and_model(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "merge", lambda *args: pytest.fail("nothing is merged while a student is trained"))
        for name, more in (("lora", LORA), ("full", [])):
            assert main(["sft", *options(folder, *SMALL, *more, "--run_dir", str(folder / name))]) == 0
    return folder


@pytest.fixture
def folder(made: Path) -> Iterator[Path]:
    """The same, with the model put back after the test."""
    shutil.copytree(made / "model", made / "kept")
    yield made
    shutil.rmtree(made / "model", ignore_errors=True)
    (made / "kept").rename(made / "model")


def rewrite(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def replace_weights(model: Path) -> None:
    """Another model of the same shape."""
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: -tensors[name]}, model / "model.safetensors", metadata={"format": "pt"})


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "replaced": (replace_weights, "other weights"),
    "truncated": (lambda m: os.truncate(m / "model.safetensors", 1000), "other weights"),
    "config": (lambda m: rewrite(m / "config.json", rope_theta=123.0), "other config"),
    "generation config": (lambda m: rewrite(m / "generation_config.json", eos_token_id=1), "other generation_config"),
    "tokenizer": (lambda m: rewrite(m / "tokenizer_config.json", eos_token="<pad>"), "other tokenizer"),
    "gone": (shutil.rmtree, "cannot be read"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "cannot be read"),
}
"""A change of the folder at student.path, and what an export of LoRA says of it."""

FAST = ("replaced", "gone", "tokenizer")
KINDS = [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in CHANGES]


@pytest.mark.parametrize("kind", KINDS)
def test_export_merges_into_the_student_that_was_trained(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = CHANGES[kind]
    run = ["export", "--run_dir", str(folder / "lora"), "--out"]
    assert main([*run, str(tmp_path / "before")]) == 0
    assert main([*run, str(tmp_path / "alone"), "--adapter"]) == 0
    change(folder / "model")
    capsys.readouterr()
    assert main([*run, str(tmp_path / "after")]) == 2
    error = error_of(capsys)
    assert message in error and str(folder / "model") in error and "Put that model back" in error
    assert not (tmp_path / "after").exists()
    # What needs no weights of the student goes on.
    assert main([*run, str(tmp_path / "alone again"), "--adapter"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "alone again" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    if "cannot" not in message:
        assert "--allow_changed student" in error
        can_be_read = kind != "truncated"
        assert main([*run, str(tmp_path / "allowed"), "--allow_changed", "student"]) == (0 if can_be_read else 2)
        if can_be_read:
            allowed, before = (load_file(tmp_path / name / "model.safetensors") for name in ("allowed", "before"))
            same = all(np.array_equal(allowed[name], before[name]) for name in before)
            assert same == (kind != "replaced")
            assert read(tmp_path / "allowed" / "config.json") == read(tmp_path / "before" / "config.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fully_trained_student_needs_the_run_alone(kind: str, folder: Path, tmp_path: Path) -> None:
    run = ["export", "--run_dir", str(folder / "full"), "--out"]
    assert main([*run, str(tmp_path / "before" / "student")]) == 0
    CHANGES[kind][0](folder / "model")
    assert main([*run, str(tmp_path / "after" / "student")]) == 0
    names = sorted(path.name for path in (tmp_path / "before" / "student").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in names:
        assert (tmp_path / "after" / "student" / name).read_bytes() == (
            tmp_path / "before" / "student" / name
        ).read_bytes(), name


def cut(folder: Path, name: str, to: Path) -> Path:
    """A copy of a run whose last step is lost."""
    shutil.copytree(folder / name, to)
    shutil.rmtree(to / "sft" / "checkpoints" / "2")
    for lost in ("report.json", "after.json"):
        (to / "sft" / lost).unlink()
    return to


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("lora", "replaced"), ("lora", "truncated"), ("lora", "gone"), ("full", "replaced"), ("full", "gone")],
)
def test_every_command_after_a_change(
    name: str, kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resume, the next stage and eval notice another student. One that is gone matters if its weights are needed."""
    run, more = cut(folder, name, tmp_path / "run"), LORA if name == "lora" else []
    whole = shutil.copytree(folder / name, tmp_path / "whole")
    CHANGES[kind][0](folder / "model")
    commands = {
        "resume": ["sft", *options(folder, *SMALL, *more, "--run_dir", str(run))],
        "next stage": ["grpo", *options(folder, *SMALL, *more, "--run_dir", str(whole))],
        "eval": ["eval", "--run_dir", str(folder / name)],
    }
    for what, command in commands.items():
        capsys.readouterr()
        code = main(command)
        if kind == "gone" and name == "full":
            assert code == 0, what
            continue
        assert code == 2, what
        error = error_of(capsys)
        assert str(folder / "model") in error
        assert ("cannot be read" if kind == "gone" else "other weights") in error
    if kind == "replaced":
        assert main([*commands["next stage"], "--allow_changed", "student"]) == 0
        assert pinned.find_record(whole / "grpo") != pinned.find_record(whole / "sft")
        assert main(["export", "--run_dir", str(whole), "--out", str(tmp_path / "out")]) == 0


def test_a_run_of_an_older_version_is_exported_with_a_word(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(folder / "lora", tmp_path / "run")
    shutil.rmtree(run / "sft" / "student")
    for out in ("a", "b"):
        assert main(["export", "--run_dir", str(run), "--out", str(tmp_path / out)]) == 0
        assert "could not be checked" in " ".join(capsys.readouterr().out.split())
        replace_weights(folder / "model")


def test_another_student_than_that_of_the_adapters(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`student.path` names another folder with a model of the same shape."""
    shutil.copytree(folder / "model", tmp_path / "other")
    replace_weights(tmp_path / "other")
    run = shutil.copytree(folder / "lora", tmp_path / "run")
    more = [*SMALL, *LORA, "--student.path", str(tmp_path / "other"), "--run_dir", str(run)]
    assert main(["grpo", *options(folder, *more)]) == 2
    assert "other weights" in error_of(capsys)


def test_what_a_stage_keeps(folder: Path) -> None:
    kept = folder / "lora" / "sft" / "student"
    assert not list(kept.glob("*.safetensors"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (kept / name).read_bytes() == (folder / "model" / name).read_bytes()
    record = pinned.find_record(folder / "lora" / "sft")
    assert record is not None and record["fingerprint"] == pinned.fingerprint(open_folder(folder / "model"))
    assert set(record["fingerprint"]) == {"weights", "config", "generation_config", "tokenizer"}


def test_white_space_and_shards_of_a_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = pinned.fingerprint(open_folder(folder / "model"))
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(dict(reversed(read(path).items())), indent=7), encoding="utf-8")
    assert pinned.fingerprint(open_folder(folder / "model")) == before
    # A change that keeps size and time of modification.
    weights_file = folder / "model" / "model.safetensors"
    times = weights_file.stat()
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(data)
    os.utime(weights_file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = pinned.fingerprint(open_folder(folder / "model"))
    assert pinned.changed_parts(before, after) == ["weights"]


class Hub:
    """A cache of the hub with commits of `owner/student`, and no network."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = folder / "models--owner--student"
        for name in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
            monkeypatch.setattr(f"{name}.HF_HUB_CACHE", str(folder))
            monkeypatch.setattr(f"{name}.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(folder))

    def add(self, commit: str, model: Path, *names: str) -> str:
        """Add a commit with the files of a model, and let branches or tags name it."""
        shutil.copytree(model, self.root / "snapshots" / commit)
        (self.root / "refs").mkdir(exist_ok=True)
        for name in names:
            (self.root / "refs" / name).write_text(commit)
        return commit


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


def test_branches_tags_and_commits(hub: Hub, folder: Path) -> None:
    first = hub.add("1" * 40, folder / "model", "v1")
    replace_weights(folder / "model")
    rewrite(folder / "model" / "generation_config.json", eos_token_id=3)
    second = hub.add("2" * 40, folder / "model", "main", "v2")
    for name, commit in (("", second), ("@v1", first), ("@v2", second), ("@main", second), (f"@{first}", first)):
        found = open_folder(f"owner/student{name}")
        assert (found.hub_id, found.revision, found.folder.name) == ("owner/student", commit, commit)
        stops = (3,) if commit == second else (1, 4)
        assert generation_stop_ids(f"owner/student{name}") == stops
        assert load_tokenizer(f"owner/student{name}").eos_token == "<eos>"
    first_params, second_params = (load_pretrained(f"owner/student@{name}") for name in ("v1", "v2"))
    assert first_params.revision == first
    name = "down"
    one, two = (np.asarray(p.params["layers"][name]["kernel"]) for p in (first_params, second_params))
    np.testing.assert_array_equal(one[1], -two[1])
    with pytest.raises(ModelError, match="the hub has no model owner/student with the revision v9"):
        open_folder("owner/student@v9")


def test_a_folder_with_an_at_sign_is_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "model", tmp_path / "owner" / "student@v1")
    found = open_folder("owner/student@v1")
    assert (found.hub_id, found.revision, str(found.folder)) == (None, None, "owner/student@v1")
    assert load_tokenizer("owner/student@v1").eos_token == "<eos>"
    assert split_revision("owner/student@v2") == ("owner/student", "v2")
    for name in ("owner/student", "owner/student@", "/abs/path", "@"):
        assert split_revision(name) == (name, None)


def test_a_run_stays_at_the_commit_that_it_began_with(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`main` moves after SFT. Export and the record of the run keep to its commit."""
    first = hub.add("1" * 40, folder / "model", "main")
    run = tmp_path / "run"
    more = [*SMALL, *LORA, "--student.path", "owner/student", "--run_dir", str(run)]
    assert main(["sft", *options(folder, *more)]) == 0
    assert yaml.safe_load((run / "sft" / "config.yaml").read_text())["student"]["path"] == "owner/student"
    export = ["export", "--run_dir", str(run), "--out"]
    assert main([*export, str(tmp_path / "before")]) == 0
    replace_weights(folder / "model")
    hub.add("2" * 40, folder / "model", "main")
    assert main([*export, str(tmp_path / "after")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert pinned.reopen("owner/student", [run / "sft"]).revision == first
    assert main([*export, str(tmp_path / "adapter"), "--adapter"]) == 0
    settings = read(tmp_path / "adapter" / "adapter_config.json")
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/student", first)
    # A commit that is in the cache no more cannot be merged into, and the error names it.
    shutil.rmtree(hub.root / "snapshots" / first)
    capsys.readouterr()
    assert main([*export, str(tmp_path / "gone")]) == 2
    assert f"owner/student@{first}" in error_of(capsys)


def test_the_tokenizer_of_a_path_is_kept(folder: Path, tmp_path: Path) -> None:
    """Of a student from scratch: an export needs the run alone."""
    shutil.copytree(folder / "model", tmp_path / "tokenizer")
    shape = [
        "--student.path",
        "null",
        "--student.width",
        "16",
        "--student.num_layers",
        "1",
        "--student.mlp_width",
        "32",
    ]
    shape += ["--student.num_heads", "2", "--student.num_kv_heads", "1", "--student.head_dim", "8"]
    shape += ["--student.mlp_width", "32"]
    more = [*SMALL, *shape, "--tokenizer.path", str(tmp_path / "tokenizer"), "--run_dir", str(tmp_path / "run")]
    assert main(["sft", *options(folder, *more)]) == 0
    export = ["export", "--run_dir", str(tmp_path / "run"), "--out"]
    assert main([*export, str(tmp_path / "before" / "student")]) == 0
    shutil.rmtree(tmp_path / "tokenizer")
    assert main([*export, str(tmp_path / "after" / "student")]) == 0
    for path in (tmp_path / "before" / "student").iterdir():
        assert (tmp_path / "after" / "student" / path.name).read_bytes() == path.read_bytes(), path.name
