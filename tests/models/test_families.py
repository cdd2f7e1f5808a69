"""Every family against `transformers` on small random models: logits, gradients, and the way back.

Needs torch (`pip install 'cotgrpo[parity]'`), which the package itself never imports.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.families import CASES, SMALL, auto_class, make_torch, old_config, text_type

from cotgrpo.models import Pretrained, load_pretrained, save_pretrained
from cotgrpo.models.huggingface.config import config_json, decoder_config
from cotgrpo.models.huggingface.families import FAMILIES, WRAPPERS

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch: pip install 'cotgrpo[parity]'")
transformers = pytest.importorskip("transformers")

WITH_EXPERTS = ("qwen3_moe_mixed", "qwen2_moe", "mixtral", "granitemoeshared", "gpt_oss")
"""One for each way in which a checkpoint names its experts."""
T = 64
"""Longer than the context of every case: 48 positions, 16 before scaling."""


class Batch(NamedTuple):
    """Three rows: full, padded on the right, padded on the left."""

    tokens: np.ndarray
    positions: np.ndarray
    real: np.ndarray

    @classmethod
    def make(cls, start: int = 0) -> Batch:
        tokens = np.random.default_rng(0).integers(3, SMALL["vocab_size"], (3, T)).astype(np.int32)
        real = np.ones((3, T), bool)
        real[1, 50:] = False
        real[2, :11] = False
        positions = start + np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
        return cls(np.where(real, tokens, 0).astype(np.int32), positions, real)


def torch_logits(model: Any, batch: Batch) -> Any:
    return model(
        input_ids=torch.tensor(batch.tokens, dtype=torch.long),
        attention_mask=torch.tensor(batch.real, dtype=torch.long),
        position_ids=torch.tensor(batch.positions, dtype=torch.long),
        use_cache=False,
    ).logits


def logits(loaded: Pretrained, batch: Batch) -> np.ndarray:
    compute = jax.jit(loaded.student.logits)
    return np.asarray(compute(loaded.params, batch.tokens, batch.positions, batch.real.astype(np.int32)))


def assert_same_logits(got: np.ndarray, want: Any, real: np.ndarray, tolerance: float = 2e-4) -> None:
    got, want = got[real], want.detach().numpy()[real]
    assert np.abs(got - want).max() <= tolerance
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(torch model, what we load of it) by case, made when first asked for."""
    made: dict[str, tuple[Any, Pretrained]] = {}

    def of(case: str) -> tuple[Any, Pretrained]:
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            model = make_torch(case)
            model.save_pretrained(folder)
            made[case] = model, load_pretrained(folder)
        return made[case]

    return of


def test_every_family_has_a_case() -> None:
    assert {text_type(case) for case in CASES} == set(FAMILIES)
    assert {case["model_type"] for case in CASES.values()} - set(FAMILIES) == set(WRAPPERS)


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, saved: Any) -> None:
    model, loaded = saved(case)
    batch = Batch.make()
    # A delta net's norm divides by what a head reads from its state, which is small for some tokens. Gemma 4 does not
    # scale its scores down, so the softmax makes more of a rounded product.
    tolerance = 2e-4 if loaded.config.delta_net or loaded.config.query_scale == 1 else 1e-4
    assert_same_logits(logits(loaded, batch), torch_logits(model, batch), batch.real, tolerance)


@pytest.mark.parametrize("case", ["llama31_scaled", "llama_dynamic", "llama_yarn", "gemma3"])
def test_logits_far_from_zero(case: str, saved: Any) -> None:
    """An angle at position 5000 shows the last bits of its frequency."""
    _, loaded = saved(case)
    model = make_torch(case)  # transformers' dynamic scaling remembers earlier calls
    batch = Batch.make(start=5000)
    assert_same_logits(logits(loaded, batch), torch_logits(model, batch), batch.real)


@pytest.mark.parametrize("case", CASES)
def test_old_and_new_configs_say_the_same(case: str, saved: Any) -> None:
    """transformers 5 writes rope_parameters and fills in defaults; the hub has rope_scaling and rope_theta."""
    _, loaded = saved(case)
    assert loaded.config == decoder_config(loaded.hf_config) == decoder_config(old_config(case))


@pytest.mark.parametrize(
    "case",
    ["llama_biased", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "apertus"]
    + [
        pytest.param(case, marks=pytest.mark.slow)
        for case in ("granite4", "phi3", "hunyuan", "smollm3", "exaone4", "qwen3_5", "lfm2")
    ]
    + [pytest.param(case, marks=pytest.mark.slow) for case in ("gemma4", "gemma4_large")]
    + [pytest.param(case, marks=pytest.mark.slow) for case in WITH_EXPERTS],
)
def test_gradients(case: str, saved: Any, tmp_path: Path) -> None:
    """Of the mean next-token loss, leaf by leaf: |difference| <= 1e-3 of the leaf's largest entry."""
    from safetensors.torch import save_file

    model, loaded = saved(case)
    batch = Batch.make()
    targets = np.roll(batch.tokens, -1, axis=1)
    weight = (batch.real & np.roll(batch.real, -1, axis=1) & (np.arange(T) < T - 1)).astype(np.float32)

    model.zero_grad()
    nll = torch.nn.functional.cross_entropy(
        torch_logits(model, batch).transpose(1, 2), torch.tensor(targets, dtype=torch.long), reduction="none"
    )
    ((nll * torch.tensor(weight)).sum() / weight.sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    # Gemma 4's scales of the layers are not trained, there and here.
    gradients |= {name: torch.zeros_like(b) for name, b in model.named_buffers() if name.endswith("layer_scalar")}
    save_file(gradients, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(loaded.hf_config))
    want = load_pretrained(tmp_path).params

    def loss(params: Any) -> jax.Array:
        found = loaded.student.logits(params, batch.tokens, batch.positions, batch.real.astype(np.int32))
        nll = -jnp.take_along_axis(jax.nn.log_softmax(found), targets[..., None], axis=-1)[..., 0]
        return jnp.sum(nll * weight) / weight.sum()

    got = jax.jit(jax.grad(loss))(loaded.params)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = float(np.abs(w).max())
        assert scale > 0 or (path[-1].key == "layer_scale" and not np.any(g))
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("case", CASES)
def test_a_decoder_without_a_source_exports_too(case: str, saved: Any, tmp_path: Path) -> None:
    """config.json is written from `DecoderConfig` alone, and transformers computes the same logits from it."""
    model, loaded = saved(case)
    assert decoder_config(config_json(loaded.config)) == decoder_config(loaded.hf_config)
    save_pretrained(tmp_path / "out", loaded.config, loaded.params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    batch = Batch.make()
    atol = 1e-5 if case == "ernie4_5" else 1e-6  # it goes out as a Llama, with its rows in another order
    torch.testing.assert_close(torch_logits(again, batch), torch_logits(model, batch), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    ["llama_biased", "smollm2", "qwen3", "gemma3", "ernie4_5", "phi3"]
    + [
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            "gemma3_images",
            "qwen3_vl",
            "ministral3_images",
            "granite4",
            "apertus",
            "hunyuan",
            "olmo3",
            "qwen3_5_images",
        )
    ]
    + [pytest.param(case, marks=pytest.mark.slow) for case in ("gemma4", "gemma4_images", "gemma4_unified", "lfm2")]
    + [pytest.param(case, marks=pytest.mark.slow) for case in WITH_EXPERTS],
)
def test_round_trip(case: str, dtype: str, tmp_path: Path) -> None:
    """In from shards, out into shards: bit-equal tensors, the same config, the same logits."""
    from safetensors.torch import load_file

    model = make_torch(case).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").is_file()
    loaded = load_pretrained(tmp_path / "in", "stored")
    assert loaded.config.param_dtype == dtype
    assert load_pretrained(tmp_path / "in").config.param_dtype == "float32"
    save_pretrained(tmp_path / "out", loaded.config, loaded.params, source=loaded, max_shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1

    def tensors(folder: Path) -> dict[str, Any]:
        return {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}

    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    bits = {"float32": torch.int32, "bfloat16": torch.int16}[dtype]
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor.view(bits), after[name].view(bits)), name
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("in", "out")]
    assert configs[0] == configs[1]
    models = []
    for name in ("in", "out"):
        # torch's own kernel for experts does not take every size in bfloat16.
        experts: Any = {"experts_implementation": "eager"} if case in WITH_EXPERTS else {}
        found, report = auto_class(case).from_pretrained(
            tmp_path / name, attn_implementation="eager", output_loading_info=True, **experts
        )
        assert not any(report.values()), report
        models.append(found)
    want, got = (torch_logits(model, Batch.make()) for model in models)
    assert got.dtype == getattr(torch, dtype) and torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.skipif(
    not {"COTGRPO_SMOLLM2", "COTGRPO_GSM8K"} <= set(os.environ),
    reason="set COTGRPO_SMOLLM2 to SmolLM2-135M-Instruct's folder and COTGRPO_GSM8K to a JSONL file of questions",
)
def test_smollm2_on_real_questions() -> None:
    """Twenty GSM8K questions in float32: logits within 2e-3, argmax equal."""
    folder = Path(os.environ["COTGRPO_SMOLLM2"])
    rows = Path(os.environ["COTGRPO_GSM8K"]).read_text(encoding="utf-8").splitlines()[:20]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(json.loads(row)["question"])["input_ids"] for row in rows]
    tokens = np.zeros((20, max(map(len, ids))), np.int32)
    real = np.zeros(tokens.shape, bool)
    for row, sequence in enumerate(ids):
        tokens[row, : len(sequence)], real[row, : len(sequence)] = sequence, True
    batch = Batch(tokens, np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape), real)
    with torch.no_grad():
        want = torch_logits(model, batch)
    assert_same_logits(logits(load_pretrained(folder, "float32"), batch), want, real, 2e-3)
