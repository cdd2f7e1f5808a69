"""What an engine is sent for a reply and for new weights, and where the sampled token ids stand in its answer.

Prompts go out as token ids, and the sampled ids come back: a text that is tokenized again may have other tokens. An
answer is checked as it is read. One that cannot be used raises `Malformed`, and is never trained on.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from cotgrpo.sampling import SamplingSettings
from cotgrpo.teacher_servers.dialects import Call, Dialect, Malformed, Sglang, Vllm, field, log_prob_of, rows_of
from cotgrpo.teacher_servers.vocabulary import Token

UNKNOWN_VERSION = "default"
"""What SGLang gives as the version of weights that were loaded without one."""


@dataclasses.dataclass(frozen=True)
class ServedReply:
    """A reply as an engine drew it.

    Attributes:
        ids: its tokens. If it ended by itself, the last is a stop token.
        log_probs: log p of each in the engine's distribution, without temperature.
    """

    ids: list[int]
    log_probs: list[float]


class RolloutDialect(Dialect):
    """How one kind of engine is asked for replies, and given new weights."""

    returns_ids: ClassVar[str]
    """What gives the token ids of a reply, for messages."""
    takes_weights: ClassVar[str]
    """What to set on the server, so that it takes new weights, for messages."""
    takes_adapters: ClassVar[bool]

    @abc.abstractmethod
    def reply_call(self, prompt: list[int], sampling: SamplingSettings, seed: int | None) -> Call:
        """Return the request for one reply."""

    @abc.abstractmethod
    def reply_fields(self, answer: object, prompt: list[int], version: int | None) -> tuple[list[Any], list[Any]]:
        """Return the token ids of a reply and their log-probabilities, not checked yet.

        Args:
            answer: the answer to `reply_call`.
            prompt: what it replies to.
            version: of the weights that must have written it; None: any.
        """

    def read_reply(
        self, answer: object, prompt: list[int], sampling: SamplingSettings, version: int | None
    ) -> ServedReply:
        """Return a reply that a sampler with these settings may have drawn.

        Raises:
            Malformed: token ids or log-probabilities are missing, or it ends where the sampler would not.
        """
        ids, values = self.reply_fields(answer, prompt, version)
        rows_of(values, "the list of log-probabilities", len(ids))
        if not 1 <= len(ids) <= sampling.max_new_tokens:
            raise Malformed(f"the reply has {len(ids)} tokens, where 1 to {sampling.max_new_tokens} were asked for")
        for place, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int):
                raise Malformed(f"token {place + 1} of the reply is {token!r:.40}, not an id")
            if not 0 <= token < self.vocabulary.size:
                raise Malformed(f"it drew token {token}, and the student's tokenizer has {self.vocabulary.size} tokens")
            if token in sampling.eos_ids and place < len(ids) - 1:
                raise Malformed(f"the reply goes on after the stop token {token}")
        if len(ids) < sampling.max_new_tokens and ids[-1] not in sampling.eos_ids:
            raise Malformed(
                f"the reply ends after {len(ids)} tokens with token {ids[-1]}, which is not one of the stop tokens "
                f"{list(sampling.eos_ids)}, where {sampling.max_new_tokens} tokens were asked for"
            )
        return ServedReply(ids, [min(log_prob_of(value, place), 0.0) for place, value in enumerate(values)])

    @abc.abstractmethod
    def weights_calls(self, folder: str, version: int) -> list[Call]:
        """Return the requests, in order, that load the weights in a folder."""

    @abc.abstractmethod
    def adapter_call(self, folder: str, name: str) -> Call:
        """Return the request that loads the adapter in a folder under a name."""

    @abc.abstractmethod
    def unload_call(self, name: str) -> Call:
        """Return the request that forgets an adapter."""

    def check_loaded(self, answer: object) -> None:
        """Raise Malformed if an answer to one of these requests says that it failed."""
        if isinstance(answer, dict) and answer.get("success") is False:
            raise Malformed(str(answer.get("message") or "success is false"))

    @abc.abstractmethod
    def probe_call(self, ids: list[int]) -> Call:
        """Return the request for the log-probabilities of a given text."""

    @abc.abstractmethod
    def read_probe(self, answer: object, ids: list[int]) -> list[float]:
        """Return log p of each token of that text but the first. Raises Malformed."""


def sampling_fields(sampling: SamplingSettings) -> dict[str, Any]:
    """Return how tokens are drawn, in the names that both engines have.

    Each field is sent: the server's own default may be another, from the model's generation_config.json.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.eos_ids),
    }


@dataclasses.dataclass(frozen=True)
class VllmRollouts(Vllm, RolloutDialect):
    """vLLM: OpenAI's completions with `return_token_ids`.

    New weights: `POST /collective_rpc` calls the workers' `reload_weights(weights_path=)` and `POST
    /reset_prefix_cache` drops what older weights have computed. Both need VLLM_SERVER_DEV_MODE=1
    (https://docs.vllm.ai/en/latest/features/sleep_mode/). Adapters: `POST /v1/load_lora_adapter`
    (https://docs.vllm.ai/en/latest/features/lora/).
    """

    returns_ids = "vLLM 0.10.2 or newer gives them for return_token_ids"
    takes_weights = "Start vLLM with VLLM_SERVER_DEV_MODE=1, in a version whose reload_weights takes weights_path"
    takes_adapters = True

    def reply_call(self, prompt: list[int], sampling: SamplingSettings, seed: int | None) -> Call:
        body = sampling_fields(sampling) | {
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "ignore_eos": True,  # only the run's own stop tokens end a reply
            "logprobs": 1,
            "return_token_ids": True,
        }
        return Call(self.completions, self.named(body | ({} if seed is None else {"seed": seed})))

    def reply_fields(self, answer: object, prompt: list[int], version: int | None) -> tuple[list[Any], list[Any]]:
        read = field(answer, "choices", 0).get("prompt_token_ids")
        if read is not None and read != prompt:
            raise Malformed(f"it read a prompt of {len(read)} tokens that are not the {len(prompt)} it was sent")
        return field(answer, "choices", 0, "token_ids"), field(answer, "choices", 0, "logprobs", "token_logprobs")

    def weights_calls(self, folder: str, version: int) -> list[Call]:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        return [Call(f"{self.root}/collective_rpc", reload), Call(f"{self.root}/reset_prefix_cache", {})]

    def adapter_call(self, folder: str, name: str) -> Call:
        return Call(f"{self.root}/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def unload_call(self, name: str) -> Call:
        return Call(f"{self.root}/v1/unload_lora_adapter", {"lora_name": name})

    def token_call(self, text: str) -> Call:
        return Call(f"{self.root}/tokenize", self.named({"prompt": text, "add_special_tokens": False}))

    def read_tokens(self, answer: object) -> list[Token | None]:
        return list(field(answer, "tokens"))

    def probe_call(self, ids: list[int]) -> Call:
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        return Call(self.completions, self.named(body))

    def read_probe(self, answer: object, ids: list[int]) -> list[float]:
        places = rows_of(self.prompt_log_probs(answer), "prompt_logprobs", len(ids))
        found = []
        for place in range(1, len(ids)):
            values = [value for token, value in self.entries(places[place], place) if token == ids[place]]
            if not values:
                raise Malformed(f"its prompt_logprobs at place {place + 1} lack the token {ids[place]} of the text")
            found.append(log_prob_of(values[0], place))
        return found


@dataclasses.dataclass(frozen=True)
class SglangRollouts(Sglang, RolloutDialect):
    """SGLang: `/generate` with `return_logprob`, whose log-probabilities come with the sampled ids.

    New weights: `POST /update_weights_from_disk` (https://docs.sglang.io/advanced_features/sglang_for_rl.html). The
    version that is sent with them comes back with each reply.
    """

    returns_ids = "SGLang gives them at /generate"
    takes_weights = "SGLang takes them at /update_weights_from_disk"
    takes_adapters = False

    def reply_call(self, prompt: list[int], sampling: SamplingSettings, seed: int | None) -> Call:
        # With ignore_eos SGLang would ignore stop_token_ids too.
        own = {"max_new_tokens": sampling.max_new_tokens, "no_stop_trim": True}
        parameters = sampling_fields(sampling) | own | ({} if seed is None else {"sampling_seed": seed})
        body = {"input_ids": prompt, "sampling_params": parameters, "return_logprob": True}
        return Call(f"{self.root}/generate", body)

    def reply_fields(self, answer: object, prompt: list[int], version: int | None) -> tuple[list[Any], list[Any]]:
        meta = field(answer, "meta_info")
        written = meta.get("weight_version")
        if version is not None and written not in (None, UNKNOWN_VERSION, str(version)):
            raise Malformed(f"it comes from version {written!r:.20} of the weights, where {version} was refreshed")
        pairs = field(meta, "output_token_logprobs")
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) >= 2 for pair in pairs):
            raise Malformed("its meta_info.output_token_logprobs is no list of log-probabilities with token ids")
        ids = [pair[1] for pair in pairs]
        output = answer.get("output_ids") if isinstance(answer, dict) else None
        if output is not None and output not in (ids, ids[:-1]):  # some versions leave the stop token out
            raise Malformed("its output_ids are other tokens than those of output_token_logprobs")
        return ids, [pair[0] for pair in pairs]

    def weights_calls(self, folder: str, version: int) -> list[Call]:
        body = {"model_path": folder, "weight_version": str(version), "flush_cache": True}
        return [Call(f"{self.root}/update_weights_from_disk", body)]

    def adapter_call(self, folder: str, name: str) -> Call:
        return Call(f"{self.root}/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def unload_call(self, name: str) -> Call:
        return Call(f"{self.root}/unload_lora_adapter", {"lora_name": name})

    def probe_call(self, ids: list[int]) -> Call:
        return Call(f"{self.root}/generate", self.body({"input_ids": ids}, 0, 1))

    def read_probe(self, answer: object, ids: list[int]) -> list[float]:
        tokens = rows_of(field(answer, "meta_info", "input_token_logprobs"), "input_token_logprobs", len(ids))
        return [log_prob_of(field(token, 0), place) for place, token in enumerate(tokens[1:], 1)]


ROLLOUT_DIALECTS: Sequence[type[RolloutDialect]] = (VllmRollouts, SglangRollouts)
"""In the order in which they are tried."""
