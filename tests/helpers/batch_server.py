"""A provider's batch API on loopback: files and batches of sums, with the faults that a test orders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from helpers.faulty_server import completion, worked
from helpers.loopback_server import Answer, Asked, LoopbackServer

PART = re.compile(rb"\r\n\r\n(.*?)\r\n--", re.DOTALL)


class BatchServer(LoopbackServer):
    """Ends a batch after it was looked at `looks` times.

    Args:
        looks: how often a batch is under way before it ends.
        status: how batches end.
        result: the result of a line of requests, or None: the batch ends without it.

    Attributes:
        files, batches: what was uploaded and created, by id.
        faults: answers to the next requests of "METHOD /path", before anything else happens.
        created_unseen: answer the next creation with an error, after the batch was created.
        error: what a failed batch says.
        refused: ids of batches that fail at once, whatever the status of the others.
    """

    def __init__(
        self,
        looks: int = 1,
        status: str = "completed",
        result: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
    ) -> None:
        super().__init__(self.respond)
        self.looks, self.status, self.result = looks, status, result or good_result
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.faults: dict[str, list[Answer]] = {}
        self.created_unseen = False
        self.error, self.refused = "the model is unknown", set[str]()

    def paid(self) -> list[str]:
        """Return the ids of all requests in batches that were created."""
        lines = [line for batch in self.batches.values() for line in self.files[batch["input_file_id"]].splitlines()]
        return [json.loads(line)["custom_id"] for line in lines]

    def respond(self, asked: Asked) -> Answer:
        path = asked.path.partition("?")[0].removeprefix("/v1")
        ordered = self.faults.get(f"{asked.method} {path}")
        if ordered:
            return ordered.pop(0)
        if asked.method == "POST" and path == "/files":
            return self.upload(asked.data)
        if asked.method == "POST" and path == "/batches":
            return self.create(asked.json())
        if path == "/batches":
            return Answer({"object": "list", "data": list(self.batches.values()), "has_more": False})
        if path.startswith("/batches/"):
            return self.look(path.removeprefix("/batches/"))
        if path.startswith("/files/"):
            return Answer(self.files[path.split("/")[2]], kind="application/octet-stream")
        return Answer({"error": {"message": "no such route"}}, 404)

    def upload(self, data: bytes) -> Answer:
        (content,) = (part for part in PART.findall(data) if part != b"batch")
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return Answer({"id": name, "object": "file", "bytes": len(content), "purpose": "batch", "filename": "r.jsonl"})

    def create(self, body: dict[str, Any]) -> Answer:
        name = f"batch-{len(self.batches)}"
        total = len(self.files[body["input_file_id"]].splitlines())
        counts = {"total": total, "completed": 0, "failed": 0}
        self.batches[name] = body | {"id": name, "object": "batch", "status": "validating", "request_counts": counts}
        self.batches[name] |= {"created_at": 1, "looks": 0}
        if self.created_unseen:
            self.created_unseen = False
            return Answer({"error": {"message": "lost"}}, 502)
        return Answer(self.batches[name])

    def look(self, name: str) -> Answer:
        batch = self.batches[name]
        if name in self.refused:
            error = {"code": "token_limit_exceeded", "message": self.error}
            batch |= {"status": "failed", "errors": {"object": "list", "data": [error]}}
        elif batch["looks"] < self.looks:
            batch |= {"looks": batch["looks"] + 1, "status": "in_progress"}
        elif batch["status"] != self.status:
            self.end(name, batch)
        return Answer(batch)

    def end(self, name: str, batch: dict[str, Any]) -> None:
        """Write the file of results and that of errors."""
        results: dict[str, list[dict[str, Any]]] = {"output": [], "error": []}
        for line in self.files[batch["input_file_id"]].splitlines():
            result = self.result(json.loads(line))
            if result is not None:
                is_good = (result.get("response") or {}).get("status_code") == 200
                results["output" if is_good else "error"].append(result)
        batch["status"] = self.status
        if self.status == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": "bad", "message": self.error}]}
        for kind, found in results.items():
            if found:
                self.files[f"{name}-{kind}"] = b"".join(json.dumps(result).encode() + b"\n" for result in found[::-1])
                batch[f"{kind}_file_id"] = f"{name}-{kind}"


def answered(request: dict[str, Any], body: object, status: int = 200) -> dict[str, Any]:
    """The line of a result."""
    return {"custom_id": request["custom_id"], "response": {"status_code": status, "body": body}, "error": None}


def good_result(request: dict[str, Any]) -> dict[str, Any]:
    """A right reply."""
    return answered(request, completion(worked(request["body"]["messages"][-1]["content"])))
