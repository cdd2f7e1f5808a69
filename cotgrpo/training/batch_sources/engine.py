"""Replies from an engine on a server (`grpo.rollouts`): what it is asked with, and how it gets weights."""

from __future__ import annotations

from pathlib import Path

import jax

from cotgrpo.config import ConfigError, LiveGhosts, RolloutServerSettings, VerifiedReward
from cotgrpo.distributed.processes import is_process_0, on_process_0
from cotgrpo.models.huggingface.adapters import save_adapter
from cotgrpo.models.huggingface.weights import save_pretrained
from cotgrpo.models.lora import AdaptedParams
from cotgrpo.rollout_servers.server import RolloutServer
from cotgrpo.rollouts.engine_replies import EngineReplies, EngineSettings, process_0_server
from cotgrpo.rollouts.journal import RolloutJournal
from cotgrpo.teacher_servers.server import Text
from cotgrpo.teacher_servers.vocabulary import Vocabulary
from cotgrpo.terminal import say
from cotgrpo.training.batch_sources.context import BatchContext
from cotgrpo.types import Params

SAMPLES, SAMPLE_TOKENS = 4, 64
"""Texts by which tokenizers and weights are compared, and how much of each."""


def make_engine(ghosts: LiveGhosts | VerifiedReward, at: BatchContext) -> EngineReplies:
    """Return a sampler whose replies an engine writes. The server is asked for a reply first.

    Raises:
        TeacherError: the server returns no token ids, or has another tokenizer.
        ConfigError: adapters alone are to be refreshed, and there are none, or the server does not take them.
    """
    config, model, rollouts = at.config, at.model, at.config.grpo.rollouts
    assert isinstance(rollouts, RolloutServerSettings)
    sampling = at.sampling(ghosts.max_new_tokens, ghosts.temperature if isinstance(ghosts, LiveGhosts) else 1.0)
    samples, vocabulary = sample_rows(at), Vocabulary(model.tokenizer, model.vocab_size)
    warn = lambda line: say(at.console, line, style="yellow")
    server = process_0_server(lambda: RolloutServer(rollouts, vocabulary, sampling, samples, warn))
    takes_adapters = on_process_0(lambda: server is not None and server.takes_adapters)
    is_adapter = refreshes_adapters(rollouts, config.lora is not None, takes_adapters)
    if config.lora is not None and config.lora.quantization is not None and not is_adapter:
        raise ConfigError(
            f"grpo.rollouts sends whole weights, which lora.quantize_base {config.lora.quantize_base} does not keep. "
            "Use vLLM with grpo.rollouts.refresh adapter, or set lora.quantize_base none."
        )
    folder = at.folder / "rollout_weights" if rollouts.folder is None else Path(rollouts.folder)
    settings = EngineSettings(
        sampling,
        refresh_every=rollouts.refresh_every,
        largest_gap=rollouts.largest_gap,
        folder=folder.resolve(),  # the server has another working folder
        is_adapter=is_adapter,
    )
    save = lambda params, to: save_version(at, rollouts, settings.is_adapter, params, to)
    keep = config.checkpoint.every * (config.checkpoint.keep + 2)
    journal = RolloutJournal(at.folder / "rollouts", keep)
    return EngineReplies(server, settings, model.student, save, journal, samples, say=warn, mesh=model.mesh)


def refreshes_adapters(rollouts: RolloutServerSettings, has_lora: bool, takes_adapters: bool) -> bool:
    """Return whether the server is given LoRA's adapters alone.

    Raises:
        ConfigError: it should be, and there are none, or it does not take them.
    """
    if rollouts.refresh == "auto":
        return has_lora and takes_adapters
    if rollouts.refresh == "adapter" and not has_lora:
        raise ConfigError("grpo.rollouts.refresh adapter needs LoRA, got lora.rank 0. Set it to weights.")
    if rollouts.refresh == "adapter" and not takes_adapters:
        raise ConfigError("grpo.rollouts.refresh adapter needs vLLM, got another server. Set it to weights.")
    return rollouts.refresh == "adapter"


def sample_rows(at: BatchContext) -> list[Text]:
    """Return the beginnings of some training rows, in the student's tokens."""
    examples = at.inputs.train[:SAMPLES]
    if not examples and at.inputs.stream is not None:
        count = min(SAMPLES, len(at.inputs.stream.triples.files))
        examples = at.inputs.stream.encode(list(range(count)))[0]
    rows = [[int(i) for i in example.tokens[:SAMPLE_TOKENS]] for example in examples]
    return [Text(row[:1], row[1:]) for row in rows if len(row) >= 2]


def save_version(
    at: BatchContext, rollouts: RolloutServerSettings, is_adapter: bool, params: Params, folder: Path
) -> None:
    """Write what the server is to load. Every process calls it, and process 0 writes."""
    model, weights = at.model, at.weights
    if not is_process_0():  # a slow process must not meet the folder that process 0 has written
        folder = folder.with_name(f"{folder.name}.process_{jax.process_index()}")
    if is_adapter:
        assert isinstance(params, AdaptedParams)
        save_adapter(folder, params.adapters, params.lora, weights.base_name, revision=weights.base_revision)
        return
    stops = list(at.inputs.template.stop_ids)
    has_source = model.source is not None and model.config.tokenizer.path is None
    save_pretrained(
        folder,
        model.decoder,
        params,
        source=model.source,
        tokenizer=None if has_source else model.tokenizer,
        generation_config={"eos_token_id": stops if len(stops) > 1 else stops[0]},
        dtype=rollouts.dtype or model.decoder.dtype,
    )
