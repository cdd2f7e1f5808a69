"""A server on loopback that scores texts as vLLM, SGLang, llama.cpp and OpenAI's `echo` do, with a real model.

`python scoring_server.py FOLDER PORT [DIALECT...]` serves a model folder in a process of its own, through this library,
or through `transformers` if the folder is not one that it reads (`--transformers`).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

DIALECTS = ("vllm", "sglang", "echo", "echo_text", "llama_cpp")
Model = Callable[[list[int]], np.ndarray]
"""Token ids -> log-probabilities `[n, V]` of the token after each of them."""


class ScoringServer:
    """Scores texts. Use as a context manager; `url` is the endpoint.

    Args:
        model: gives the log-probabilities.
        tokenizer: reads and writes texts.
        dialects: what the server understands.
        port: 0: any.
        max_top: most log-probabilities at a place, as vLLM's --max-logprobs.
        key: the only one that is let in, or None: any.
        fault: called with the path and body of each request; it returns (status, body) in place of an answer, or None.
        change: called with the path and each answer; it returns the one that is sent.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        dialects: Collection[str] = DIALECTS,
        *,
        port: int = 0,
        max_top: int = 1000,
        key: str | None = None,
        fault: Callable[[str, Any], tuple[int, Any] | None] = lambda path, body: None,
        change: Callable[[str, Any], Any] = lambda path, answer: answer,
    ) -> None:
        self.model, self.tokenizer, self.dialects, self.max_top, self.key = model, tokenizer, dialects, max_top, key
        self.fault, self.change = fault, change
        self.asked: list[tuple[str, Any]] = []
        self.lock = threading.Lock()
        self.closed = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.closed:  # on a connection from before
                    self.close_connection = True
                    return
                with outer.lock:
                    outer.asked.append((self.path, body))
                sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
                try:
                    status, answer = outer.fault(self.path, body) or outer.answer(self.path, body, sent)
                    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: Any) -> None:  # of clients that are killed
                pass

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> ScoringServer:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.closed:
            return
        self.closed = True
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, path: str, body: Any, key: str) -> tuple[int, Any]:
        """Return the status and the body of an answer."""
        if self.key is not None and key != self.key:
            return 401, {"error": {"message": f"Incorrect API key provided: {key}."}}
        routes = {
            "/v1/completions": self.completions,
            "/generate": self.generate,
            "/completion": self.completion,
            "/tokenize": self.tokenize,
        }
        if path not in routes:
            return 404, {"detail": "Not Found"}
        status, answer = routes[path](body)
        return status, self.change(path, answer) if status == 200 else answer

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def piece(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def log_probs(self, ids: list[int]) -> np.ndarray:
        with self.lock:  # one model, one at a time
            return self.model(ids)

    @staticmethod
    def best(row: np.ndarray, count: int) -> list[int]:
        return [int(i) for i in np.argsort(-row, kind="stable")[:count]]

    def completions(self, body: Any) -> tuple[int, Any]:
        """OpenAI's completions: of vLLM with `prompt_logprobs`, of others with `echo`."""
        prompt = body["prompt"]
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
        if isinstance(prompt, list) and not {"vllm", "echo"} & set(self.dialects):
            return 422, {"detail": [{"msg": "prompt: Input should be a valid string"}]}
        if "vllm" in self.dialects and body.get("prompt_logprobs") is not None:
            if body["prompt_logprobs"] > self.max_top:
                words = f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed: "
                return 400, {"error": {"message": f"{words}{self.max_top}", "code": 400}}
            rows = self.log_probs(ids)
            places: list[Any] = [None]
            for token, row in zip(ids[1:], rows, strict=False):
                best = self.best(row, body["prompt_logprobs"])
                wanted = dict.fromkeys([token, *best])  # the text's own token comes first
                rank = lambda i, row=row: int((row > row[i]).sum()) + 1
                places.append(
                    {
                        str(i): {
                            "logprob": max(float(row[i]), -9999.0),
                            "rank": rank(i),
                            "decoded_token": self.piece(i),
                        }
                        for i in wanted
                    }
                )
            choice["prompt_logprobs"] = places
        echoes = {"echo", "echo_text"} & set(self.dialects)
        if echoes and body.get("echo") and body.get("logprobs") is not None:
            rows = self.log_probs(ids)
            new = self.best(rows[-1], 1)[0]
            whole = [*ids, new]
            tops = [{self.piece(i): float(row[i]) for i in self.best(row, body["logprobs"])} for row in rows]
            choice["logprobs"] = {
                "tokens": [self.piece(i) for i in whole],
                "token_logprobs": [None, *(float(row[i]) for row, i in zip(rows, whole[1:], strict=True))],
                "top_logprobs": [None, *tops],
                "text_offset": [],
            }
        return 200, {"object": "text_completion", "model": "m", "choices": [choice], "usage": {}}

    def generate(self, body: Any) -> tuple[int, Any]:
        """SGLang's own."""
        if "sglang" not in self.dialects:
            return 404, {"detail": "Not Found"}
        ids = self.encode(body["text"]) if "text" in body else body["input_ids"]
        start, count = body["logprob_start_len"], body["top_logprobs_num"]
        rows = [None, *self.log_probs(ids)]
        tokens, tops = [[None, ids[start], None]], [None]
        for place in range(start + 1, len(ids)):
            row = rows[place]
            assert row is not None
            tokens.append([float(row[ids[place]]), ids[place], None])
            tops.append([[float(row[i]), i, None] for i in self.best(row, count)])  # type: ignore[arg-type]
        meta = {"input_token_logprobs": tokens, "input_top_logprobs": tops, "prompt_tokens": len(ids)}
        return 200, {"text": "", "meta_info": meta}

    def completion(self, body: Any) -> tuple[int, Any]:
        """llama.cpp's own."""
        if "llama_cpp" not in self.dialects:
            return 404, {"error": {"message": "File Not Found", "code": 404}}
        row = self.log_probs(body["prompt"])[-1]
        top = [{"id": i, "token": self.piece(i), "logprob": float(row[i])} for i in self.best(row, body["n_probs"])]
        return 200, {"content": "", "completion_probabilities": [top[0] | {"top_logprobs": top}]}

    def tokenize(self, body: Any) -> tuple[int, Any]:
        """llama.cpp's."""
        return 200, {"tokens": self.encode(body["content"])}


def own_model(folder: str) -> tuple[Model, Any]:
    """Return a model folder through this library."""
    import jax
    import jax.numpy as jnp

    from cotgrpo.data.tokenizer import load_tokenizer
    from cotgrpo.models import load_pretrained

    model = load_pretrained(folder, "float32")

    @jax.jit
    def log_probs(tokens_BT: jax.Array) -> jax.Array:
        logits = model.student.logits(
            model.params, tokens_BT, jnp.arange(tokens_BT.shape[1])[None], jnp.ones_like(tokens_BT)
        )
        vocab = model.student.vocab_size or logits.shape[-1]
        return jax.nn.log_softmax(logits[0, :, :vocab])

    def score(ids: list[int]) -> np.ndarray:
        padded = np.zeros((1, -(-len(ids) // 128) * 128), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(log_probs(jnp.asarray(padded)))[: len(ids)]

    return score, load_tokenizer(folder)


def transformers_model(folder: str) -> tuple[Model, Any]:
    """Return a model folder through `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def score(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).numpy()

    return score, AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--transformers"]
    folder, port, *dialects = arguments
    load = transformers_model if "--transformers" in sys.argv else own_model
    with ScoringServer(*load(folder), dialects or DIALECTS, port=int(port)) as server:
        print(f"serving at {server.url}", flush=True)
        while True:
            time.sleep(3600)
