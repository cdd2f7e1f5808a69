"""Stores that Orbax cannot write to: a copy is whole or does not count, and a new machine resumes from it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers.checkpoint_states import assert_same, latest, make_state
from helpers.commands import SETTINGS, options, read

from cotgrpo.checkpoints.integrity import COMMITTED, files_below
from cotgrpo.checkpoints.manager import Checkpoints
from cotgrpo.checkpoints.object_store_copy import ObjectStoreCopy
from cotgrpo.cli import main
from cotgrpo.disk_errors import CheckpointError
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples


@pytest.fixture
def url() -> Iterator[str]:
    """A store in this process's memory, empty again at the end."""
    yield "memory://kept/run"
    fsspec.filesystem("memory").rm("/kept", recursive=True)


def save(folder: Path, url: str, *steps: int, **options: Any) -> None:
    checkpoints = Checkpoints(folder, **options, copy=ObjectStoreCopy(folder, url))
    for step in steps:
        checkpoints.save(step, make_state(step), {"batches": step}, loss=float(abs(step - 3)))
    checkpoints.close()


def test_the_store_holds_what_the_disk_does(url: str, tmp_path: Path) -> None:
    save(tmp_path / "here", url, 1, 2, 3, 4, 5, keep=1, keep_best=1)
    mirror = ObjectStoreCopy(tmp_path / "here", url)
    assert mirror.steps() == [5, 3] == sorted((int(path.name) for path in (tmp_path / "here").iterdir()), reverse=True)
    there, here = fsspec.filesystem("memory"), tmp_path / "here" / "5"
    for path in files_below(here):
        assert there.cat_file(f"{url}/5/{path.relative_to(here)}") == path.read_bytes()


def test_a_disk_that_is_new_gets_all_and_a_reader_the_newest(url: str, tmp_path: Path) -> None:
    save(tmp_path / "here", url, 2, 4, 6, keep=2)
    ObjectStoreCopy(tmp_path / "reader" / "checkpoints", url).pull(newest_only=True)
    assert [path.name for path in (tmp_path / "reader" / "checkpoints").iterdir()] == ["6"]
    found = latest(tmp_path / "reader" / "checkpoints")
    assert found is not None
    assert_same(found[0], make_state(6))
    save(tmp_path / "new" / "checkpoints", url, 8, keep=2)
    assert sorted(path.name for path in (tmp_path / "new" / "checkpoints").iterdir()) == ["6", "8"]
    assert ObjectStoreCopy(tmp_path / "new", url).steps() == [8, 6]
    assert not (tmp_path / "new" / "fetching").exists()


def test_half_a_copy_does_not_count_and_a_damaged_one_neither(url: str, tmp_path: Path) -> None:
    save(tmp_path / "here", url, 2, 4, 6)
    there = fsspec.filesystem("memory")
    there.rm_file(f"{url}/6/{COMMITTED}")
    name = next(path for path in there.find(f"{url}/4/state") if "/d/" in path)
    data = bytearray(there.cat_file(name))
    data[len(data) // 2] ^= 1
    there.pipe_file(name, bytes(data))
    elsewhere = tmp_path / "new" / "checkpoints"
    ObjectStoreCopy(elsewhere, url).pull(newest_only=True)
    assert [path.name for path in elsewhere.iterdir()] == ["2"]
    assert ObjectStoreCopy(elsewhere, url).steps() == [2]
    save(elsewhere, url, 4)
    found = latest(elsewhere)
    assert found is not None
    assert_same(found[0], make_state(4))
    assert ObjectStoreCopy(elsewhere, url).steps() == [4, 2]


def test_what_cannot_be_reached_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route to the store\nand more")

    with pytest.raises(CheckpointError, match=r"no-such-store://b/run: no library .*mount it"):
        ObjectStoreCopy(tmp_path, "no-such-store://b/run").check_works()
    memory = type(fsspec.filesystem("memory"))
    for method, call, what in (
        ("ls", lambda mirror: mirror.steps(), "read"),
        ("pipe_file", lambda mirror: mirror.check_works(), "written"),
        ("put", lambda mirror: mirror.push(tmp_path, 3, set()), "written: checkpoint 3 is not there"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(memory, method, unreachable)
            expected = f"memory://kept/run cannot be {what} (ConnectionError: no route to the store). Check"
            with pytest.raises(CheckpointError) as caught:
                call(ObjectStoreCopy(tmp_path, "memory://kept/run/"))
            assert str(caught.value).startswith(expected)


def test_a_copy_that_fails_stops_the_run_and_leaves_the_checkpoint_before(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, url, 2)

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route to the store")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put", unreachable)
    with pytest.raises(CheckpointError, match="checkpoint 4 is not there"):
        save(tmp_path, url, 4)
    monkeypatch.undo()
    assert ObjectStoreCopy(tmp_path, url).steps() == [2]
    found = latest(tmp_path)
    assert found is not None
    assert_same(found[0], make_state(2))


def commands(folder: Path, url: str) -> None:
    """Rows, and a config whose checkpoints go to the store."""
    write_triples(folder / "rows.jsonl", ProceduralTeacher(seed=1).draw(120))
    settings = SETTINGS.replace("{every: 2}", f"{{every: 2, keep: 1, keep_best: 1, folder: {url}}}")
    (folder / "c.yaml").write_text(f"run_dir: {folder / 'run'}\n{settings}", encoding="utf-8")


def test_commands_and_a_new_machine(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands(tmp_path, url)
    assert main(["sft", *options(tmp_path)]) == 0
    loss = read(tmp_path / "run" / "sft" / "after.json")["loss"]
    assert ObjectStoreCopy(tmp_path, f"{url}/sft").steps()[0] == 6
    shutil.rmtree(tmp_path / "run" / "sft" / "checkpoints")
    assert main(["eval", *options(tmp_path)]) == 0
    assert read(tmp_path / "run" / "sft" / "eval.json")["step"] == 6
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    assert main(["sft", *options(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "sft: all 6 steps are done already." in out, out
    assert read(tmp_path / "run" / "sft" / "after.json")["loss"] == loss


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which a program finds a real S3 server on this machine, with the bucket `kept` in it."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with socket.create_server(("localhost", 0)) as taken:
        port = int(taken.getsockname()[1])
    endpoint = f"http://localhost:{port}"
    log = tmp_path_factory.mktemp("s3") / "log"
    with open(log, "w") as file:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=file, stderr=file)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"{endpoint}/kept", method="PUT")).close()
                break
            except OSError:
                assert time.monotonic() < until and server.poll() is None, log.read_text()
                time.sleep(0.2)
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        yield {**os.environ, **keys, "AWS_ENDPOINT_URL": endpoint, "JAX_PLATFORMS": "cpu"}
    finally:
        server.kill()
        server.wait()


def start(folder: Path, environment: dict[str, str], command: str, *more: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "cotgrpo.cli", command, *options(folder, *more)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_s3(s3: dict[str, str], tmp_path: Path) -> None:
    """Killed once a copy exists and resumed on a new machine, a run has the rows and loss of an undisturbed one."""
    commands(tmp_path, "s3://kept/runs")
    more = ("--sft.steps", "40", "--checkpoint.every", "4", "--checkpoint.keep", "2", "--sft.eval_every", "0")
    calm = ("--run_dir", str(tmp_path / "calm"), "--checkpoint.folder", str(tmp_path / "calm_kept"))
    undisturbed = start(tmp_path, s3, "sft", *more, *calm)
    assert "after sft" in undisturbed.communicate()[0] and undisturbed.returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        for name in s3.keys() - os.environ.keys():
            patch.setenv(name, s3[name])
        mirror = ObjectStoreCopy(tmp_path, "s3://kept/runs/sft")
        killed = start(tmp_path, s3, "sft", *more)
        while not mirror.steps():
            assert killed.poll() is None
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        step = mirror.steps()[0]
        assert step < 40
        shutil.rmtree(tmp_path / "run")
        again = start(tmp_path, s3, "sft", *more)
        said = again.communicate()[0]
        assert again.returncode == 0 and f"Resuming after step {step}." in said, said
        assert mirror.steps()[0] == 40 and len(mirror.steps()) == 2
    assert read(tmp_path / "run" / "sft" / "after.json") == read(tmp_path / "calm" / "sft" / "after.json")
    shutil.rmtree(tmp_path / "run" / "sft" / "checkpoints")
    evaluated = start(tmp_path, s3, "eval", *more)
    evaluated.communicate()
    assert evaluated.returncode == 0 and read(tmp_path / "run" / "sft" / "eval.json")["step"] == 40
    refused = start(
        tmp_path, s3, "sft", *more, "--checkpoint.folder", "s3://not-there/runs", "--run_dir", str(tmp_path)
    )
    said = refused.communicate()[0]
    assert refused.returncode == 2 and "cotgrpo: s3://not-there/runs/sft cannot be written (" in said, said
