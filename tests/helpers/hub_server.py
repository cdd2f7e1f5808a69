"""A server on loopback with the part of the Hugging Face Hub's protocol that an upload and a download need."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from helpers.loopback_server import Answer, Asked, LoopbackServer

TOKEN = "hf_right"
REGULAR = 10_000
"""Files of fewer bytes are committed as text, and the others through LFS."""


@dataclasses.dataclass
class Hub:
    """What the hub holds.

    Attributes:
        repositories: {owner/name: {"private": whether it is, "files": {path: content}}}.
        objects: {SHA-256: content} of large files.
        uploads: bytes of each large file that was sent.
        commits: number of commits.
        broken: answer the next request for a commit with an error.
    """

    url: str = ""
    repositories: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    objects: dict[str, bytes] = dataclasses.field(default_factory=dict)
    uploads: list[int] = dataclasses.field(default_factory=list)
    commits: int = 0
    broken: bool = False
    tokens: list[str | None] = dataclasses.field(default_factory=list)

    def answer(self, asked: Asked) -> Answer:
        path = urlsplit(asked.path).path
        if path.startswith("/lfs/"):
            self.uploads.append(len(asked.data))
            self.objects[path.removeprefix("/lfs/")] = asked.data
            return Answer({})
        self.tokens.append(asked.token)
        if asked.token != TOKEN:
            return Answer({"error": "Invalid credentials"}, status=401)
        if path == "/api/whoami-v2":
            return Answer({"name": "owner", "type": "user", "auth": {}})
        if path == "/api/validate-yaml":
            return Answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(asked.json())
        if path.endswith("/objects/batch"):
            return self.batch(asked.json())
        if "/preupload/" in path:
            return self.preupload(asked.json())
        if "/commit/" in path:
            return self.commit(path.removeprefix("/api/models/").partition("/commit/")[0], asked.data)
        name = path.removeprefix("/api/models/").partition("/revision/")[0]
        if name in self.repositories:
            return Answer({"id": name, "sha": f"{self.commits:040x}", "siblings": []})
        return Answer({"error": "Repository not found"}, status=404)

    def create(self, wanted: dict[str, Any]) -> Answer:
        owner = wanted.get("organization") or "owner"
        if owner != "owner":
            return Answer({"error": "You don't have the rights to create a model there"}, status=403)
        name = f"{owner}/{wanted['name']}"
        if name in self.repositories:
            return Answer({"error": "exists", "url": f"{self.url}/{name}"}, status=409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.repositories[name] = {"private": bool(private), "files": {}}
        return Answer({"url": f"{self.url}/{name}", "name": name, "id": name})

    def preupload(self, wanted: dict[str, Any]) -> Answer:
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] > REGULAR else "regular", "shouldIgnore": False}
            for f in wanted["files"]
        ]
        return Answer({"files": modes})

    def batch(self, wanted: dict[str, Any]) -> Answer:
        objects = [
            dict(found)
            if found["oid"] in self.objects
            else found | {"actions": {"upload": {"href": f"{self.url}/lfs/{found['oid']}", "header": {}}}}
            for found in wanted["objects"]
        ]
        return Answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def commit(self, name: str, data: bytes) -> Answer:
        if self.broken:
            self.broken = False
            return Answer({"error": "the server is being restarted"}, status=500)
        files = self.repositories[name]["files"]
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
        self.commits += 1
        url = f"{self.url}/{name}/commit/{self.commits:040x}"
        return Answer({"commitUrl": url, "commitOid": f"{self.commits:040x}", "success": True})


@contextlib.contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN) -> Iterator[Hub]:
    """Serve a hub, which `huggingface_hub` of this process then uses with this token."""
    from huggingface_hub import constants

    hub = Hub()
    with LoopbackServer(hub.answer) as server:
        hub.url = server.url.removesuffix("/v1")
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        yield hub
