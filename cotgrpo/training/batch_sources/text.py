"""Packed text: the training rows, alone or with a teacher's distribution from a file."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from rich.console import Console

from cotgrpo import objectives
from cotgrpo.config import Cached, Config
from cotgrpo.data.batches import make_batches
from cotgrpo.data.rows import DropReport
from cotgrpo.data.streaming import StreamedBatches
from cotgrpo.distributed.processes import process_rows
from cotgrpo.identity.fingerprints import tokenizer_fingerprint
from cotgrpo.logs.progress import PhaseProgress
from cotgrpo.models.huggingface.families import ModelError
from cotgrpo.rollouts.cached_ghosts import CachedBatches, check_tokenizer, read_cache, with_cached_ghosts
from cotgrpo.sharding import batch_sharding
from cotgrpo.teacher_servers.vocabulary import Vocabulary
from cotgrpo.terminal import say
from cotgrpo.training.batch_sources.context import BatchContext
from cotgrpo.training.inputs import QUIET, Model, StageInputs
from cotgrpo.training.loop import BatchSource


def own_rows(model: Model, batch_size: int) -> Sequence[int] | None:
    """Return the rows of every batch that this process reads; None: all."""
    if model.mesh is None or jax.process_count() == 1:
        return None
    rows = process_rows(batch_sharding(model.mesh), (batch_size, model.config.data.seq_len))
    return [int(row) for row in rows]


def text_batches(
    config: Config,
    inputs: StageInputs,
    batch_size: int,
    only_rows: Sequence[int] | None = None,
    console: Console = QUIET,
) -> BatchSource:
    """Return packed batches of the training rows. Each process fills only `only_rows`.

    Streamed rows add what was left out to the reports of `inputs`, and print it after each epoch.
    """
    data = config.data
    if inputs.stream is not None:
        report = inputs.reports["training rows"] = DropReport()

        def on_epoch(epochs: int) -> None:
            text = f"epoch {epochs}: all rows are read. Rows of all epochs so far: {report}"
            say(console, text)

        return StreamedBatches(
            inputs.stream,
            batch_size=batch_size,
            seed=config.seed,
            only_rows=only_rows,
            workers=data.num_workers,
            report=report,
            on_epoch=on_epoch,
            on_other_rows=(lambda text: say(console, text)) if "data" in config.allowed_changes else None,
        )
    with PhaseProgress("packing rows", console, len(inputs.train)) as progress:
        return make_batches(
            inputs.train,
            batch_size=batch_size,
            seq_len=data.seq_len,
            seed=config.seed,
            packing=data.packing,
            only_rows=only_rows,
            progress=progress,
        )


def cached_batches(ghosts: Cached, at: BatchContext) -> CachedBatches:
    """Return packed batches of the training rows with the teacher's distribution from a file.

    Raises:
        DataError: a file that cannot be read, or is of another tokenizer, or lacks what the objective or a row needs.
    """
    config, inputs, model = at.config, at.inputs, at.model
    data, batch_size = config.data, config.grpo.batch_size
    cache, vocabulary = read_cache(str(ghosts.path)), Vocabulary(model.tokenizer, model.vocab_size)
    check_tokenizer(cache, vocabulary, tokenizer_fingerprint(model.tokenizer))
    examples, report = with_cached_ghosts(
        inputs.train,
        inputs.train_triples,
        cache,
        vocabulary,
        top_k=listed_tokens(config, model),
        choice=ghosts.ghost_token,
        missing=ghosts.missing,
    )
    say(at.console, f"{ghosts.path}: {report}")
    batches = make_batches(
        examples,
        batch_size=batch_size,
        seq_len=data.seq_len,
        seed=config.seed,
        packing=data.packing,
        only_rows=own_rows(model, batch_size),
    )
    return CachedBatches(batches, cache)


def listed_tokens(config: Config, model: Model) -> int:
    """Return how many of the ghost's likeliest tokens the objective reads. Raises ModelError if there are fewer."""
    top_k = objectives.top_k(config.grpo.full_objective)
    if top_k > model.vocab_size:
        raise ModelError(
            f"grpo.objective.top_k is {top_k}, but the student's tokenizer has {model.vocab_size} tokens: lower it."
        )
    return top_k
