"""`export --push`: a folder on the Hugging Face Hub, against a server with the hub's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
from helpers.commands import error_of
from helpers.hub_server import REGULAR, hub_server

from cotgrpo.cli import main
from cotgrpo.models import save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params

# An upload of huggingface_hub calls its HTTP library in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
CONFIG = DecoderConfig(97, 16, 1, 2, 1, 8, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(tmp_path_factory.mktemp("push") / "student", CONFIG, init_params(CONFIG, jax.random.key(0)))


def push(folder: Path, name: str, *more: str) -> int:
    return main(["export", "--out", str(folder), "--push", name, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("more", [(), ("--public",)], ids=str)
def test_every_file_arrives(more: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    weights = (folder / "model.safetensors").stat().st_size
    assert weights > REGULAR, "the weights go through LFS"
    with hub_server(monkeypatch) as hub:
        assert push(folder, "owner/student", *more) == 0
        found = hub.repositories["owner/student"]
        assert found["files"] == contents(folder)
        assert found["private"] is not bool(more)
        assert (hub.uploads, hub.commits) == ([weights], 1)
        assert f"uploaded to owner/student: {hub.url}/owner/student/commit/" in "".join(capsys.readouterr()).replace(
            "\n", ""
        ), "the address is printed"


def test_an_upload_that_broke_off_is_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The large files that the hub has already are not sent again, and a repetition changes nothing."""
    with hub_server(monkeypatch) as hub:
        hub.broken = True
        assert push(folder, "owner/student") == 2
        error = error_of(capsys)
        assert f"{folder} is whole: repeat with `cotgrpo export --out {folder} --push owner/student`" in error
        assert hub.repositories["owner/student"]["files"] == {} and len(hub.uploads) == 1
        for _ in range(2):
            assert push(folder, "owner/student") == 0
            assert hub.repositories["owner/student"]["files"] == contents(folder)
        assert len(hub.uploads) == 1


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (None, "owner/student", "no token of the Hugging Face Hub. Run `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", "owner/student", "the hub refuses the token (HTTP 401)"),
        ("hf_right", "other/student", "the hub refuses the token (HTTP 403)"),
        ("hf_right", "student", "expected OWNER/NAME of a model on the Hugging Face Hub, got 'student'"),
        ("hf_right", "../student", "expected OWNER/NAME"),
        ("hf_right", "a/b/c", "expected OWNER/NAME"),
    ],
)
def test_what_the_hub_refuses(
    token: str | None, name: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with hub_server(monkeypatch, token) as hub:
        assert push(folder, name) == 2
        error = error_of(capsys)
        assert message in error and "hf_" not in error.replace("hf auth", ""), error
        assert not hub.repositories and not hub.uploads


def test_the_token_is_asked_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A run that cannot be pushed is not exported either."""
    with hub_server(monkeypatch, token=None):
        assert main(["export", "--run_dir", str(tmp_path), "--out", str(tmp_path / "x"), "--push", "owner/x"]) == 2
    assert "no token" in error_of(capsys) and not (tmp_path / "x").exists()


def test_a_hub_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with hub_server(monkeypatch):
        pass
    assert push(folder, "owner/student") == 2
    assert "the hub cannot be reached" in error_of(capsys)


def test_what_is_not_an_export(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with hub_server(monkeypatch) as hub:
        assert push(tmp_path, "owner/student") == 2
        assert "has no config.json or adapter_config.json" in error_of(capsys)
        assert not hub.repositories
        assert main(["export", "--run_dir", str(tmp_path), "--out", str(folder), "--public"]) == 2
        assert "Give --push OWNER/NAME" in error_of(capsys)
