"""Model folders in and out: what is written, what is refused, how much memory it takes. No torch."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from cotgrpo import make_mesh
from cotgrpo.data.tokenizer import load_tokenizer, train_tokenizer
from cotgrpo.models import ModelError, load_pretrained, save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params
from cotgrpo.models.huggingface.config import config_json, decoder_config
from cotgrpo.models.huggingface.model_card import model_card
from cotgrpo.models.huggingface.safetensors_files import NewTensor, StoredTensor, list_tensors, write_tensors
from cotgrpo.models.huggingface.weights import abstract_params, leaves_by_path, names_by_path, stored_shape
from cotgrpo.models.rotary import RopeScaling
from cotgrpo.sharding import state_sharding

CONFIG = DecoderConfig(
    vocab_size=320, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24, tied_head=False
)
TEXTS = ["What is 2 + 3?", "2 + 3 = 5, so the answer is 5."] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, vocab_size=270)


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture
def folder(tmp_path: Path, params: Any, tokenizer: Any) -> Path:
    return save_pretrained(tmp_path / "model", CONFIG, params, tokenizer=tokenizer)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def rewrite_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_equal(got: Any, want: Any) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_out_and_in_again(folder: Path, params: Any, tokenizer: Any) -> None:
    loaded = load_pretrained(folder)
    assert dataclasses.replace(loaded.config, max_positions=None) == CONFIG
    assert_equal(loaded.params, params)
    assert list(loaded.params) == list(params)
    assert loaded.student.vocab_size == len(tokenizer) < CONFIG.vocab_size, "padded rows are never drawn"
    assert load_tokenizer(folder).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded.generation_config == {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    assert loaded.hf_config["eos_token_id"] == tokenizer.eos_token_id


def test_the_safetensors_library_reads_what_we_write(folder: Path, params: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(
        tensors["model.layers.2.self_attn.q_proj.weight"], params["layers"]["query"]["kernel"][2].T
    )
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embedding"])
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"].T)
    assert len(tensors) == 3 + 3 * 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_and_slices_of_any_dtype(dtype: str, tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(5, 7)).astype(jnp.dtype(dtype))
    save_file({"b": array, "a": array[:0]}, tmp_path / "x.safetensors")
    found = list_tensors(tmp_path / "x.safetensors")
    assert found.keys() == {"a", "b"} and found["b"].shape == (5, 7)
    part = (slice(1, 3), slice(None))
    for got, want in ((found["b"].read(), array), (found["a"].read(), array[:0]), (found["b"].read(part), array[part])):
        assert got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


@pytest.mark.parametrize(("stored", "as_loaded"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_dtypes(stored: str, as_loaded: str, folder: Path, params: Any, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "other", CONFIG, params, dtype=stored)
    loaded = load_pretrained(tmp_path / "other", "stored")
    assert loaded.config.param_dtype == loaded.config.dtype == as_loaded
    want = jax.tree.map(lambda x: x.astype(stored).astype(as_loaded), params)
    assert_equal(loaded.params, want)
    trained = load_pretrained(tmp_path / "other")
    assert (trained.config.param_dtype, trained.config.dtype) == ("float32", as_loaded), "what is trained is float32"
    assert_equal(trained.params, jax.tree.map(lambda x: x.astype("float32"), want))
    wide = load_pretrained(tmp_path / "other", "float32", compute_dtype="bfloat16", remat="full")
    assert (wide.config.param_dtype, wide.config.dtype, wide.config.remat) == ("float32", "bfloat16", "full")
    assert_equal(wide.params, jax.tree.map(lambda x: x.astype(stored).astype("float32"), params))
    assert wide.student.hidden(wide.params, *np.zeros((3, 1, 2), np.int32)).dtype == jnp.bfloat16


def count_reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """{tensor: bytes of each read}, filled from now on."""
    reads: dict[str, list[int]] = {}
    read = StoredTensor.read

    def counted(self: StoredTensor, index: Any = None) -> np.ndarray:
        part = read(self, index)
        reads.setdefault(self.name, []).append(part.nbytes)
        return part

    monkeypatch.setattr(StoredTensor, "read", counted)
    return reads


@pytest.mark.parametrize(
    ("sizes", "kernel_parts"),
    [({"data": 2, "fsdp": 2, "tensor": 2}, 4), pytest.param({"fsdp": 8}, 8, marks=pytest.mark.slow)],
    ids=str,
)
def test_onto_a_mesh_and_back(
    sizes: dict[str, int],
    kernel_parts: int,
    folder: Path,
    params: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every shard is a read of its own slice, and no slice is read twice for devices that hold the same."""
    mesh, reads = make_mesh(**sizes), count_reads(monkeypatch)
    loaded = load_pretrained(folder, mesh=mesh)
    query = 4 * CONFIG.width * CONFIG.num_heads * CONFIG.head_dim
    assert reads["model.layers.1.self_attn.q_proj.weight"] == [query // kernel_parts] * kernel_parts
    assert sum(map(sum, reads.values())) == 4 * CONFIG.num_params()
    assert_equal(loaded.params, params)
    got, want = (jax.tree.leaves(tree) for tree in (loaded.params, state_sharding(params, mesh)))
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x, sharding in zip(got, want, strict=True))
    save_pretrained(tmp_path / "out", loaded.config, loaded.params, source=loaded)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


TWO_PROCESSES = """
import sys
import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from cotgrpo import make_mesh
from cotgrpo.models import load_pretrained, save_pretrained
from cotgrpo.models.huggingface.safetensors_files import StoredTensor

taken, read = [], StoredTensor.read
StoredTensor.read = lambda self, index=None: taken.append(read(self, index)) or taken[-1]
loaded = load_pretrained(sys.argv[3], mesh=make_mesh(fsdp=2, tensor=2))
assert sum(part.nbytes for part in taken) < 0.6 * 4 * loaded.config.num_params(), "its own half, and the norms"
assert not loaded.params["layers"]["query"]["kernel"].is_fully_addressable
save_pretrained(sys.argv[4], loaded.config, loaded.params, source=loaded)
"""


@pytest.mark.slow
def test_two_processes_read_and_write_one_model(folder: Path, tmp_path: Path) -> None:
    """Each holds a part of every kernel; the first one writes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    paths = [str(folder), str(tmp_path / "out")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(process), *paths],
            env={**os.environ, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
        )
        for process in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_export_in_shards(params: Any, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "out", CONFIG, params, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * CONFIG.num_params()
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
    assert_equal(load_pretrained(tmp_path / "out").params, params)


def test_the_source_lends_its_files(folder: Path, params: Any, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7], "temperature": 0.6}')
    rewrite_config(folder, _name_or_path="x", torch_dtype="float32", rope_theta=10_000)
    loaded = load_pretrained(folder)
    save_pretrained(tmp_path / "out", loaded.config, loaded.params, source=loaded, dtype="bfloat16")
    names = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    for name in names - {"README.md", "generation_config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    again = load_pretrained(tmp_path / "out")
    assert again.generation_config == loaded.generation_config
    assert again.hf_config == {**loaded.hf_config, "torch_dtype": "bfloat16", "dtype": "bfloat16"}


def test_model_card() -> None:
    text = model_card(
        "student",
        {
            "base_model": "owner/base",
            "data": "593 correct PaLM rows of SVAMP.",
            "objective": "Pair(beta=1.0)",
            "config": {"lr": 1e-4, "betas": (0.9, 0.95), "folder": Path("x")},
            "accuracy": {"SVAMP, 200 rows": "41.5 %"},
        },
    )
    _, front, body = text.split("---\n", 2)
    assert (
        yaml.safe_load(front)["base_model"] == "owner/base" and yaml.safe_load(front)["library_name"] == "transformers"
    )
    for part in (
        "593 correct",
        "Pair(beta=1.0)",
        "lr: 0.0001",
        "| SVAMP, 200 rows | 41.5 % |",
        f"jax {jax.__version__}",
    ):
        assert part in body
    with pytest.raises(ValueError, match="'acuracy'"):
        model_card("student", {"acuracy": {}})


MEMORY = """
import sys
import jax, jax.numpy as jnp
from cotgrpo.models import load_pretrained

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

jax.block_until_ready(jnp.zeros(1) + 1)
before = peak()
params = jax.block_until_ready(load_pretrained(sys.argv[1]).params)
print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's peak memory from /proc")
def test_loading_takes_little_more_than_the_model(tmp_path: Path) -> None:
    """Half of SmolLM2-135M's layers in bfloat16, 170 MB. JAX's CPU device holds the model in host memory too."""
    config = DecoderConfig(49152, 576, 16, 9, 3, 64, 1536, param_dtype="bfloat16")
    leaves = leaves_by_path(abstract_params(config))
    shapes = {
        name: stored_shape(path, leaves[path].shape) for path, names in names_by_path(config).items() for name in names
    }
    write_tensors(
        tmp_path,
        [NewTensor(n, np.dtype(jnp.bfloat16), s, lambda s=s: np.ones(s, jnp.bfloat16)) for n, s in shapes.items()],
        max_shard_bytes=10**9,
    )
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) <= 1.3, done.stdout


def raises(match: str) -> Any:
    return pytest.raises(ModelError, match=match)


def test_missing_extra_and_misshapen_tensors(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with raises(r"lacks model\.layers\.1\.mlp\.up_proj\.weight: it does not belong"):
        load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(whole)
    rewrite(folder, lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t["model.layers.2.mlp.up_proj.weight"]}))
    with raises(r"unexpected model\.layers\.3\.mlp\.up_proj\.weight"):
        load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(whole)
    rewrite(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1]}))
    with raises(r"model\.norm\.weight has the shape \[15\], but config\.json needs \[16\]"):
        load_pretrained(folder)


def test_a_tied_head_may_be_stored_twice_but_not_differ(folder: Path, params: Any) -> None:
    rewrite_config(folder, tie_word_embeddings=True)
    with raises("ties the head to the embedding"):
        load_pretrained(folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    loaded = load_pretrained(folder)
    assert "head" not in loaded.params
    np.testing.assert_array_equal(loaded.params["embedding"], params["embedding"])


def test_a_tokenizer_of_another_model(folder: Path, params: Any, tokenizer: Any) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with raises("tokenizer.json is not a tokenizer"):
        load_pretrained(folder)
    bigger = train_tokenizer(TEXTS, vocab_size=270)
    bigger.add_tokens([f"<extra_{i}>" for i in range(60)])
    bigger.save_pretrained(folder)
    last = len(bigger) - 1
    with raises(rf"gives '<extra_59>' the id {last}, but the embedding has 320 rows"):
        load_pretrained(folder)
    with raises(f"The tokenizer has {last + 1} tokens"):
        save_pretrained(folder.parent / "out", CONFIG, params, tokenizer=bigger)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 3000, -4, -1])
def test_truncated_files(keep: int, folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    with raises(r"model\.safetensors is not a whole safetensors file"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "not a whole safetensors file"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "missing field `data_offsets`"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}}', "not a whole safetensors file"),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}', "not a whole safetensors file"),
        (b'{"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}', "a is stored as F8_E4M3; supported"),
    ],
)
def test_corrupt_headers(header: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with raises(message):
        list_tensors(tmp_path / "x.safetensors")


def test_corrupt_shards(params: Any, tmp_path: Path) -> None:
    folder = save_pretrained(tmp_path / "out", CONFIG, params, max_shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    name, shard = next(iter(whole["weight_map"].items()))
    for changed, message in (
        ({"weight_map": whole["weight_map"] | {name: "../secret.safetensors"}}, "no such file"),
        ({"weight_map": whole["weight_map"] | {name: "model-00009.safetensors"}}, "no such file"),
        ({"weight_map": whole["weight_map"] | {"model.more.weight": shard}}, r"lists model\.more\.weight in"),
        ({"weights": {}}, "corrupt: expected JSON with a weight_map"),
    ):
        index.write_text(json.dumps(changed))
        with raises(message):
            load_pretrained(folder)
    index.write_text("{")
    with raises("corrupt: expected JSON"):
        load_pretrained(folder)


def test_pickles_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with raises("No weights in"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with raises(r"pickled weights \(pytorch_model\.bin\)"):
        load_pretrained(folder)


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def hub(model_type: str, V: int, D: int, F: int, L: int, Q: int, K: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L}
    heads = {"num_attention_heads": Q, "num_key_value_heads": K}
    return {"model_type": model_type, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, **sizes, **heads, **more}


PUBLISHED = {
    "Llama-3.2-1B": (
        hub("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True, pretraining_tp=1)
        | {"rope_theta": 500000.0, "rope_scaling": ROPE | {"original_max_position_embeddings": 8192}}
        | {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "use_cache": True},
        1_235_814_400,
    ),
    "SmolLM2-135M": (
        hub("llama", 49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True, is_llama_config=True, rope_interleaved=False)
        | {"rope_scaling": None, "transformers.js_config": {"dtype": "q4"}},
        134_515_008,
    ),
    "Mistral-7B-v0.3": (hub("mistral", 32768, 4096, 14336, 32, 32, 8, sliding_window=None), 7_248_023_552),
    "Qwen2.5-0.5B": (
        hub("qwen2", 151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True, use_sliding_window=False)
        | {"sliding_window": 32768, "max_window_layers": 24, "use_mrope": False},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        hub("qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True, sliding_window=None),
        596_049_920,
    ),
    "Gemma-2-2B": (
        hub("gemma2", 256000, 2304, 9216, 26, 8, 4, hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid")
        | {"hidden_activation": "gelu_pytorch_tanh"},
        2_614_341_888,
    ),
    "Gemma-3-1B": (
        hub("gemma3_text", 262144, 1152, 6912, 26, 4, 1, sliding_window=512, sliding_window_pattern=6)
        | {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000, "rope_scaling": None},
        999_885_952,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    hf, size = PUBLISHED[name]
    assert decoder_config(hf).num_params() == size


def test_windows_of_published_models() -> None:
    """Gemma 2 has one in every other layer, the first included; Gemma 3 in five of six; Mistral 0.1 in all."""
    gemma2, gemma3 = (decoder_config(PUBLISHED[name][0]) for name in ("Gemma-2-2B", "Gemma-3-1B"))
    assert gemma2.window == 4096 and gemma2.local_layers == tuple(range(0, 26, 2)) and gemma2.local_rope_theta is None
    assert gemma3.local_layers == tuple(i for i in range(26) if i not in (5, 11, 17, 23)) and gemma3.window == 512
    assert (gemma3.rope_theta, gemma3.local_rope_theta) == (1e6, 1e4)
    mistral = decoder_config(PUBLISHED["Mistral-7B-v0.3"][0] | {"sliding_window": 4096})
    assert mistral.window == 4096 and mistral.local_layers is None and mistral.num_local == 32


LLAMA = config_json(CONFIG)
GEMMA2 = {**{k: v for k, v in LLAMA.items() if k not in ("hidden_act", "mlp_bias")}, "model_type": "gemma2"}


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({}, "unknown model_type None; supported: llama, mistral, qwen2, qwen3, gemma2, gemma3_text"),
        (LLAMA | {"model_type": "mamba"}, "unknown model_type 'mamba'"),
        (LLAMA | {"model_type": "gemma3"}, "text-only checkpoints are gemma3_text"),
        (LLAMA | {"residual_multiplier": 0.2}, "of a llama model: unsupported field residual_multiplier"),
        (LLAMA | {"sliding_window": 5}, "unsupported field sliding_window"),
        (LLAMA | {"attention_dropout": 0.1}, "attention_dropout is 0.1; supported: 0"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config is"),
        (LLAMA | {"auto_map": {"AutoModel": "code.Model"}}, "auto_map is"),
        (LLAMA | {"hidden_act": "relu2"}, "unsupported hidden_act 'relu2'; supported: silu"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size is missing; expected a positive integer"),
        (LLAMA | {"num_hidden_layers": "3"}, "num_hidden_layers is '3'; expected a positive integer"),
        (LLAMA | {"num_attention_heads": 3}, "num_heads .3. must be a multiple of num_kv_heads .2."),
        (LLAMA | {"num_attention_heads": 3, "head_dim": None}, "no head_dim, and hidden_size 16 is not a multiple"),
        (LLAMA | {"head_dim": 7}, "head_dim must be even"),
        (LLAMA | {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "unsupported rope_scaling type 'longrope'"),
        (
            LLAMA | {"rope_scaling": ROPE | {"beta_fast": 3}},
            "unsupported field beta_fast in rope_scaling of type 'llama3'",
        ),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks high_freq_factor, low_freq_factor"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        (
            LLAMA | {"rope_scaling": ROPE, "rope_parameters": ROPE | {"factor": 2.0}},
            r"both rope_scaling .* differ \(factor\)",
        ),
        (LLAMA | {"rope_scaling": {"partial_rotary_factor": 0.5}}, "unsupported partial_rotary_factor"),
        (GEMMA2 | {"layer_types": ["full_attention"]}, "layer_types must name"),
        (GEMMA2 | {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types must name"),
        (GEMMA2 | {"sliding_window": None}, "sliding_window is null"),
        (
            GEMMA2 | {"attention_bias": False, "use_bidirectional_attention": True},
            "use_bidirectional_attention is True",
        ),
        (GEMMA2 | {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configs_that_no_decoder_can_follow(hf: dict[str, Any], message: str) -> None:
    with raises(message):
        decoder_config(hf)


def test_a_decoder_that_no_family_can_express() -> None:
    with raises("No family of transformers"):
        config_json(dataclasses.replace(CONFIG, qk_norm=True, logit_softcap=30.0))
    scaled = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("dynamic", 2.0, 512), max_positions=512)
    assert decoder_config(config_json(scaled)) == scaled


def test_what_cannot_be_saved(folder: Path, params: Any, tmp_path: Path) -> None:
    loaded = load_pretrained(folder)
    with raises("is not empty"):
        save_pretrained(folder, CONFIG, params)
    other = dataclasses.replace(CONFIG, width=32)
    with raises(r"parameters do not belong to the config: only one of them has embedding \[320, (16|32)\]"):
        save_pretrained(tmp_path / "out", other, params)
    with raises(r"The config is not that of .*: rope_theta \(7.0 here, 10000.0 there\)"):
        save_pretrained(
            tmp_path / "out", dataclasses.replace(loaded.config, rope_theta=7.0), loaded.params, source=loaded
        )
    with raises("dtype must be one of float32, bfloat16, float16 or None, got 'int8'"):
        save_pretrained(tmp_path / "out", CONFIG, params, dtype="int8")
    with pytest.raises(ValueError, match="no place for 'x'"):
        save_pretrained(tmp_path / "out", CONFIG, params, card={"x": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_no_model_folder(tmp_path: Path, folder: Path) -> None:
    with raises("No folder .*absent: expected a model folder, or a hub id such as owner/name"):
        load_pretrained(tmp_path / "absent")
    with raises(r"No config\.json in"):
        load_pretrained(tmp_path)
    (folder / "config.json").write_text("{")
    with raises(r"config\.json is not JSON"):
        load_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with raises("holds list; expected a JSON object"):
        load_pretrained(folder)


HUB = """
from cotgrpo.models import ModelError, load_pretrained
loaded = load_pretrained("owner/student")
print(loaded.hub_id, loaded.params["embedding"].shape)
try:
    load_pretrained("owner/absent")
except ModelError as error:
    print(error)
"""


def test_a_hub_id_is_found_in_the_cache(folder: Path, tmp_path: Path) -> None:
    """A cache as huggingface_hub lays it out, and no network."""
    snapshot = tmp_path / "hub" / "models--owner--student" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    done = subprocess.run(
        [sys.executable, "-c", HUB],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert first == "owner/student (320, 16)"
    assert second.startswith("No folder owner/absent, and the hub has no model of this id")
