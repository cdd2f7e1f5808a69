"""Greedy generation against `transformers`, every family, and that no reply depends on how its prompt was read.

Needs torch (`pip install 'cotgrpo[parity]'`), which the package itself never imports.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.families import SMALL, make_torch, text_type

from cotgrpo.data.chat import ChatTemplate, generation_stop_ids
from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.models import Pretrained, load_pretrained
from cotgrpo.models.decoder import decode, init_cache
from cotgrpo.models.huggingface.families import FAMILIES
from cotgrpo.sampling import Prompts, Replies, SamplingSettings, make_sampler, pad_prompts
from cotgrpo.tiled_loss import HeadSpec

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch: pip install 'cotgrpo[parity]'")
transformers = pytest.importorskip("transformers")

FAMILY_CASES = ("llama31_scaled", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
MORE_CASES = ("gemma3_images", "qwen3_vl", "ministral3", "mistral_images", "gemma", "ministral", "cwm", "seed_oss")
MORE_CASES += ("internlm3_near", "ernie4_5", "smollm3", "granite", "granite4", "granite4_nope", "olmo2", "olmo3")
MORE_CASES += ("exaone4", "exaone4_small", "phi4_mini", "phi4", "hunyuan", "arcee", "apertus")
MORE_CASES += ("qwen3_moe", "qwen3_moe_mixed", "qwen2_moe", "olmoe", "mixtral", "granitemoe", "granitemoeshared")
MORE_CASES += ("gpt_oss",)
MORE_CASES += ("gemma4", "gemma4_images", "gemma4_even", "gemma4_large", "gemma4_unified")
MORE_CASES += ("qwen3_5", "qwen3_5_odd", "qwen3_5_images", "qwen3_5_moe", "lfm2", "lfm2_old")
"""The families that are combinations of options of the decoder."""
EMBEDDINGS = {"gemma": 0.05, "granite4_nope": 0.05, "olmo2": 4.0}
"""Factors of the embedding with which random models say more than one word."""
VIEW_CASES = ("llama31_scaled", "mistral", "gemma3")
"""One for each thing that a layer may see: all tokens, a window, either."""
PROMPTS = [np.random.default_rng(n).integers(3, SMALL["vocab_size"], n).astype(np.int32) for n in (13, 5, 1, 9)]
NEW = 24
PAD = SMALL["pad_token_id"]
TIE = 1e-4
"""Logits that differ by less are equal as far as two implementations in float32 can tell."""


class Case(NamedTuple):
    """A random model saved with two stop tokens, and both sides' replies to `PROMPTS` without one."""

    model: Any
    folder: Path
    loaded: Pretrained
    stops: tuple[int, ...]
    want: np.ndarray
    logits: np.ndarray
    got: Replies


def torch_greedy(model: Any, prompts: Prompts, new: int, pad_id: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """What `generate` returns: tokens `[B, new]`, padded with `pad_id`, and logits `[B, n, V]`, n <= new."""
    P = prompts.tokens.shape[1]
    real = np.arange(P)[None, :] >= P - prompts.lengths[:, None]
    out = model.generate(
        input_ids=torch.tensor(prompts.tokens, dtype=torch.long),
        attention_mask=torch.tensor(real, dtype=torch.long),
        do_sample=False,
        use_cache=True,
        max_new_tokens=new,
        pad_token_id=pad_id,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    tokens = out.sequences[:, P:].numpy()
    tokens = np.pad(tokens, ((0, 0), (0, new - tokens.shape[1])), constant_values=pad_id)
    return tokens, torch.stack(out.logits, dim=1).numpy()


def greedy(loaded: Pretrained, prompts: Prompts, new: int = NEW, **options: Any) -> Replies:
    settings = SamplingSettings(new, **({"pad_id": PAD} | options))
    sampler = jax.jit(make_sampler(loaded.config, settings, loaded.student.vocab_size))
    return jax.device_get(sampler(loaded.params, prompts, jax.random.key(0)))


def count_tied(got: np.ndarray, want: np.ndarray, logits: np.ndarray, tie: float) -> int:
    """Count rows of `got` that leave `want` `[B, N]`; each must do so at a tie in the oracle's logits `[B, n, V]`."""
    tied = 0
    for row in np.flatnonzero(np.any(got != want, axis=1)):
        at = int(np.argmax(got[row] != want[row]))
        going_on = at < logits.shape[1] and logits[row, at].argmax() == want[row, at]
        assert going_on, f"row {row}: no end after {at} tokens, where transformers has one"
        ours, theirs = (float(logits[row, at, tokens[row, at]]) for tokens in (got, want))
        message = (
            f"row {row}, token {at}: {got[row, at]} and not {want[row, at]}, whose logit is {theirs - ours:.1e} higher"
        )
        print(message)
        assert theirs - ours < tie, message
        tied += 1
    return tied


def ends_of(tokens: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    """int `[B]`: the length of each reply, the first stop token included."""
    hits = np.isin(tokens, stops)
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, tokens.shape[1])


def two_stops(tokens: np.ndarray) -> tuple[int, int]:
    """The two ids that end the rows at the most different times, each of them at least one row."""

    def ends(pair: tuple[int, int]) -> tuple[int, int]:
        lengths = ends_of(tokens, pair)
        last = tokens[np.arange(len(tokens)), lengths - 1]
        return len(set(lengths)) if set(pair) <= set(last) else 0, int(lengths.sum())

    first, second = max(itertools.combinations(np.unique(tokens).tolist(), 2), key=ends)
    return first, second


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other make products of this size a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def make(name: str) -> Case:
        model = make_torch(name)
        with torch.no_grad():
            # Small against what the layers add: a tied head would write the token that it has just read, for ever.
            model.get_input_embeddings().weight.mul_(0.3)
        model.generation_config.eos_token_id = None
        want, logits = torch_greedy(model, pad_prompts(PROMPTS), NEW, PAD)
        stops = two_stops(want)
        model.generation_config.eos_token_id = list(stops)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        loaded = load_pretrained(folder)
        return Case(model, folder, loaded, stops, want, logits, greedy(loaded, pad_prompts(PROMPTS)))

    return make


def test_every_family_has_a_case() -> None:
    assert {text_type(name) for name in FAMILY_CASES + MORE_CASES} == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CASES)
def test_48_greedy_tokens(name: str, tmp_path: Path) -> None:
    """As `test_greedy_tokens`, with twice the length."""
    model, prompts = make_torch(name), pad_prompts(PROMPTS)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(EMBEDDINGS.get(name, 0.3))
    model.generation_config.eos_token_id = None
    want, logits = torch_greedy(model, prompts, 48, PAD)
    model.save_pretrained(tmp_path)
    assert len(np.unique(want)) > 5, "replies that say something"
    got = greedy(load_pretrained(tmp_path), prompts, 48)
    assert count_tied(got.tokens, want, logits, TIE) <= 1


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_greedy_tokens(name: str, made: Callable[[str], Case]) -> None:
    """Left-padded prompts of different length; with a window, prompt and reply are longer than it."""
    case = made(name)
    assert len(np.unique(case.want)) > 8, "replies that say something"
    assert case.loaded.config.window is None or max(map(len, PROMPTS)) > case.loaded.config.window
    assert count_tied(case.got.tokens, case.want, case.logits, TIE) <= 1


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_stop_tokens_of_the_generation_config(name: str, made: Callable[[str], Case]) -> None:
    """Two of them, which end rows at different times; a row that has ended changes nothing in the others."""
    case = made(name)
    stops = generation_stop_ids(case.folder)
    assert stops == case.stops
    want, logits = torch_greedy(case.model, pad_prompts(PROMPTS), NEW, PAD)
    ends = ends_of(want, stops)
    assert len(set(ends)) >= 3 and np.all(want[np.arange(NEW)[None, :] >= ends[:, None]] == PAD)
    got = greedy(case.loaded, pad_prompts(PROMPTS), eos_ids=stops)
    assert count_tied(got.tokens, want, logits, TIE) <= 1
    same = np.all(got.tokens == want, axis=1)
    np.testing.assert_array_equal(got.lengths[same], ends[same])
    np.testing.assert_array_equal(got.finished[same], np.isin(want, stops).any(axis=1)[same])


@pytest.mark.parametrize("name", [*VIEW_CASES, pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_padding_and_batch_mates_change_nothing(name: str, made: Callable[[str], Case]) -> None:
    loaded, want = made(name).loaded, made(name).got
    wider = greedy(loaded, pad_prompts(PROMPTS[::-1], length=22, pad_id=5))
    np.testing.assert_array_equal(wider.tokens[::-1], want.tokens)
    np.testing.assert_allclose(wider.log_probs[::-1], want.log_probs, atol=1e-4)
    alone = greedy(loaded, pad_prompts(PROMPTS[1:2]))
    np.testing.assert_array_equal(alone.tokens[0], want.tokens[1])
    np.testing.assert_allclose(alone.log_probs[0], want.log_probs[1], atol=1e-4)


def greedy_in_chunks(loaded: Pretrained, prompts: Prompts, chunk: int) -> np.ndarray:
    """`[B, NEW]`: as a sampler does it, by hand, and with prompts that are read `chunk` columns at a time."""
    B, P = prompts.tokens.shape
    read = jax.jit(functools.partial(decode, loaded.config))
    spec, head_DV = HeadSpec(loaded.student.softcap), loaded.student.head(loaded.params)
    positions = np.arange(P, dtype=np.int32)[None, :] - (P - prompts.lengths[:, None])
    segments = (positions >= 0).astype(np.int32)
    cache = init_cache(loaded.config, B, P + NEW)
    for start in range(0, P, chunk):
        part = np.s_[:, start : start + chunk]
        hidden, cache = read(
            loaded.params, prompts.tokens[part], np.maximum(positions, 0)[part], segments[part], cache, jnp.int32(start)
        )
    tokens = []
    for index in range(NEW):
        tokens.append(np.asarray(spec.logits(hidden[:, -1], head_DV)).argmax(-1).astype(np.int32))
        hidden, cache = read(
            loaded.params,
            tokens[-1][:, None],
            prompts.lengths[:, None] + np.int32(index),
            np.ones((B, 1), np.int32),
            cache,
            jnp.int32(P + index),
        )
    return np.stack(tokens, axis=1)


@pytest.mark.parametrize("name", [*VIEW_CASES, pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_how_a_prompt_is_read_changes_nothing(name: str, made: Callable[[str], Case]) -> None:
    """At once, in chunks (the last is shorter, and some are padding alone), or with the beginning of its own reply."""
    loaded, want = made(name).loaded, made(name).got.tokens
    np.testing.assert_array_equal(greedy_in_chunks(loaded, pad_prompts(PROMPTS), 4), want)
    begun = [np.concatenate([prompt, reply[:7]]) for prompt, reply in zip(PROMPTS, want, strict=True)]
    np.testing.assert_array_equal(greedy(loaded, pad_prompts(begun), NEW - 7).tokens, want[:, 7:])


@pytest.mark.slow
@pytest.mark.skipif(
    not {"COTGRPO_SMOLLM2", "COTGRPO_GSM8K"} <= set(os.environ),
    reason="set COTGRPO_SMOLLM2 to SmolLM2-135M-Instruct's folder and COTGRPO_GSM8K to a JSONL file of questions",
)
def test_smollm2_on_real_questions() -> None:
    """Twenty GSM8K questions as chats: 64 tokens, identical in 19 rows at least, and the first one's the same alone."""
    folder = Path(os.environ["COTGRPO_SMOLLM2"])
    rows = Path(os.environ["COTGRPO_GSM8K"]).read_text(encoding="utf-8").splitlines()[:20]
    template = ChatTemplate(load_tokenizer(folder), more_stop_ids=generation_stop_ids(folder))
    prompts = [template.prompt(json.loads(row)["question"]) for row in rows]
    stops, pad_id = template.stop_ids, template.pad_id
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    want, logits = torch_greedy(model, pad_prompts(prompts), 64, pad_id, eos_token_id=list(stops))
    loaded = load_pretrained(folder, "float32")
    got = greedy(loaded, pad_prompts(prompts), 64, eos_ids=stops, pad_id=pad_id)
    tied = count_tied(got.tokens, want, logits, 1e-3)
    print(f"{len(rows) - tied} of {len(rows)} replies identical, {int(np.sum(got.finished))} ended by a stop token")
    assert len(rows) == 20 and tied <= 1
    alone = greedy(loaded, pad_prompts(prompts[:1]), 64, eos_ids=stops, pad_id=pad_id)
    assert count_tied(alone.tokens, got.tokens[:1], logits[:1], 1e-3) == 0
