"""An engine on loopback: it writes replies as vLLM and SGLang do, with this library's sampler, and loads folders.

`python rollout_server.py FOLDER PORT [DIALECT...]` serves a model folder in a process of its own.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.models import Pretrained, load_pretrained
from cotgrpo.models.huggingface.adapters import load_adapter
from cotgrpo.models.huggingface.families import ModelError
from cotgrpo.models.lora import AdaptedParams
from cotgrpo.rollouts.engine_replies import reply_log_probs
from cotgrpo.sampling import Replies, SamplingSettings, make_sampler, pad_prompts
from helpers.scoring_server import ScoringServer

COLUMNS = 128
"""Columns of a prompt, so that a program is compiled once."""
DIALECTS = ("vllm", "sglang")


class RolloutServer(ScoringServer):
    """Writes replies. Use as a context manager; `url` is the endpoint.

    Args:
        folder: the model that it starts with.
        dialects: what it understands.
        options: as of `ScoringServer`.

    Attributes:
        loaded: the folders that it has loaded.
        keeps_old: whether it says that it has loaded a folder, and does not.
    """

    def __init__(self, folder: str | Path, dialects: Collection[str] = DIALECTS, **options: Any) -> None:
        self.first = load_pretrained(folder, "float32")
        self.params: Any = self.first.params
        self.adapters: dict[str, Any] = {}
        self.version = "default"
        self.loaded: list[str] = []
        self.keeps_old = False
        tokenizer = load_tokenizer(folder)
        self.size = len(tokenizer)
        super().__init__(self.log_probs_of, tokenizer, dialects, **options)

    def restart(self) -> None:
        """Forget all that was loaded, as a server that is started anew."""
        self.params, self.adapters, self.version = self.first.params, {}, "default"

    def answer(self, path: str, body: Any, key: str) -> tuple[int, Any]:
        routes: dict[str, Callable[[Any], tuple[int, Any]]] = {"/tokenize": self.tokenize_vllm}
        if "vllm" in self.dialects:
            routes |= {
                "/collective_rpc": self.reload,
                "/reset_prefix_cache": lambda body: (200, {"success": True}),
                "/v1/load_lora_adapter": self.load_lora,
                "/v1/unload_lora_adapter": self.unload_lora,
            }
        if "sglang" in self.dialects:
            routes["/update_weights_from_disk"] = self.update
        if path in routes:
            status, answer = routes[path](body)
            return status, self.change(path, answer) if status == 200 else answer
        return super().answer(path, body, key)

    def completions(self, body: Any) -> tuple[int, Any]:
        """vLLM's, of a given text or of a reply."""
        if body.get("prompt_logprobs") is not None or "vllm" not in self.dialects:
            return super().completions(body)
        if (name := body.get("model") or "").startswith("student-") and name not in self.adapters:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        ids, values = self.draw(body, body["prompt"], body["max_tokens"], body.get("seed"))
        choice = {
            "index": 0,
            "text": self.tokenizer.decode(ids),
            "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
            "logprobs": {"token_logprobs": values, "tokens": [self.piece(i) for i in ids]},
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
        }
        return 200, {"object": "text_completion", "choices": [choice], "usage": {}}

    def generate(self, body: Any) -> tuple[int, Any]:
        """SGLang's, of a given text or of a reply."""
        if "sglang" not in self.dialects or "logprob_start_len" in body:
            return super().generate(body)
        sampling = body["sampling_params"]
        ids, values = self.draw(sampling, body["input_ids"], sampling["max_new_tokens"], sampling.get("sampling_seed"))
        pairs = [[value, token, None] for value, token in zip(values, ids, strict=True)]
        meta = {"output_token_logprobs": pairs, "weight_version": self.version, "finish_reason": {}}
        return 200, {"text": self.tokenizer.decode(ids), "output_ids": ids, "meta_info": meta}

    def draw(self, sampling: Any, prompt: list[int], count: int, seed: int | None) -> tuple[list[int], list[float]]:
        """A reply and log p of its tokens, by the sampler of this library."""
        assert (sampling["top_k"], sampling["min_p"], sampling["repetition_penalty"]) == (-1, 0.0, 1.0)
        settings = SamplingSettings(
            count, tuple(sampling["stop_token_ids"]), temperature=sampling["temperature"], top_p=sampling["top_p"]
        )
        key = jax.random.key(time.time_ns() % 2**31 if seed is None else seed)
        prompts = pad_prompts([np.array(prompt, np.int32)], length=COLUMNS)
        with self.lock:
            replies = self.sampler(settings)(self.params_of(self.model_name(sampling)), prompts, key)
        ids = [int(i) for i in np.asarray(replies.tokens[0, : int(replies.lengths[0])])]
        return ids, [float(p) for p in np.asarray(replies.log_probs[0, : len(ids)])]

    @functools.lru_cache(maxsize=8)  # noqa: B019  a server lives as long as its test
    def sampler(self, settings: SamplingSettings) -> Any:
        return jax.jit(make_sampler(self.first.config, settings, self.size))

    def model_name(self, body: Any) -> str | None:
        return body.get("model") if isinstance(body, dict) else None

    def params_of(self, name: str | None) -> Any:
        return self.adapters.get(name or "", self.params)

    def log_probs_of(self, ids: list[int]) -> np.ndarray:
        """`[n, V]`, for a given text."""
        padded = np.zeros((1, COLUMNS * 2), np.int32)
        padded[0, : len(ids)] = ids
        newest = next(reversed(self.adapters.values()), self.params)
        return np.asarray(self.forward(newest, jnp.asarray(padded)))[: len(ids), : self.size]

    @functools.cached_property
    def forward(self) -> Any:
        from cotgrpo.models.decoder import make_student
        from cotgrpo.models.lora import with_adapters

        student = with_adapters(make_student(self.first.config, self.size))

        def log_probs(params: Any, tokens_BT: jax.Array) -> jax.Array:
            positions = jnp.arange(tokens_BT.shape[1])[None]
            logits = student.logits(params, tokens_BT, positions, jnp.ones_like(tokens_BT))
            return jax.nn.log_softmax(logits[0, :, : self.size])

        return jax.jit(log_probs)

    def reload(self, body: Any) -> tuple[int, Any]:
        """vLLM's `/collective_rpc` for `reload_weights`."""
        assert body["method"] == "reload_weights"
        return self.load(body["kwargs"]["weights_path"], {"results": [None]}, 500)

    def update(self, body: Any) -> tuple[int, Any]:
        """SGLang's `/update_weights_from_disk`."""
        status, answer = self.load(body["model_path"], {"success": True, "message": "Succeeded."}, 400)
        if status == 200 and not self.keeps_old:
            self.version = body["weight_version"]
        return status, answer

    def load(self, folder: str, done: Any, failed: int) -> tuple[int, Any]:
        try:
            found: Pretrained = load_pretrained(folder, "float32")
        except ModelError as error:
            return failed, {"error": {"message": str(error)}, "success": False, "message": str(error)}
        self.loaded.append(folder)
        if not self.keeps_old:
            self.params = found.params
        return 200, done

    def load_lora(self, body: Any) -> tuple[int, Any]:
        """vLLM's `/v1/load_lora_adapter`, which answers with a text."""
        adapters, lora = load_adapter(body["lora_path"], self.first.params)
        self.loaded.append(body["lora_path"])
        self.adapters[body["lora_name"]] = AdaptedParams(self.first.params, adapters, lora)
        return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def unload_lora(self, body: Any) -> tuple[int, Any]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, {"error": {"message": "no such adapter"}}
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def tokenize_vllm(self, body: Any) -> tuple[int, Any]:
        ids = self.encode(body["prompt"])
        return 200, {"count": len(ids), "max_model_len": 4096, "tokens": ids}


def log_probs_by(model: Pretrained, size: int, prompt: list[int], ids: list[int]) -> np.ndarray:
    """Log p of a reply's tokens by a model in this process."""
    from cotgrpo.models.decoder import make_student

    nothing, length = np.zeros((1, len(ids)), np.float32), np.array([len(ids)], np.int32)
    replies = Replies(np.array([ids], np.int32), nothing, length, np.ones(1, bool))  # type: ignore[arg-type]
    rows = pad_prompts([np.array(prompt, np.int32)]), replies
    return np.asarray(reply_log_probs(make_student(model.config, size), model.params, rows))[0]


if __name__ == "__main__":
    folder, port, *dialects = sys.argv[1:]
    with RolloutServer(folder, dialects or DIALECTS, port=int(port)) as server:
        print(f"serving at {server.url}", flush=True)
        while True:
            time.sleep(3600)
