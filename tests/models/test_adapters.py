"""LoRA adapters in and out, in `peft`'s format.

Compared with `peft` itself if torch is installed (`pip install 'cotgrpo[parity]'`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cotgrpo.models import ModelError, load_pretrained, save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params
from cotgrpo.models.huggingface.adapters import load_adapter, save_adapter
from cotgrpo.models.lora import LoraConfig, init_lora, lora_student, merge

CONFIG = DecoderConfig(
    vocab_size=97, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=40, tied_head=False
)
LORA = LoraConfig(rank=3, alpha=5.0, dropout=0.1)
T = 17


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(CONFIG, jax.random.key(0))


def trained(params: Any, lora: LoraConfig) -> Any:
    """Adapters as after some training: B is not zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), init_lora(params, lora, jax.random.key(1))
    )


@pytest.fixture
def folder(tmp_path: Path, params: Any) -> Path:
    return save_adapter(tmp_path / "adapter", trained(params, LORA), LORA, "owner/name")


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewrite(folder: Path, **tensors: np.ndarray | None) -> None:
    """Tensors of the file set anew, or taken out where None; `__` stands for a dot."""
    path = folder / "adapter_model.safetensors"
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in (load_file(path) | new).items() if tensor is not None}
    save_file(kept, path)


@pytest.mark.parametrize("targets", [LORA.targets, ("value", "down")], ids=["all", "two"])
def test_out_and_in_again(targets: tuple[str, ...], params: Any, tmp_path: Path) -> None:
    lora = dataclasses.replace(LORA, targets=targets, rslora=True, alpha=2.5)
    adapters = trained(params, lora)
    save_adapter(tmp_path / "adapter", adapters, lora)
    loaded, found = load_adapter(tmp_path / "adapter", jax.eval_shape(lambda: params))
    assert set(found.targets) == set(targets) and dataclasses.replace(found, targets=targets) == lora
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    jax.tree.map(
        np.testing.assert_array_equal,
        init_lora(params, found, jax.random.key(1)),
        init_lora(params, lora, jax.random.key(1)),
    )


def test_names_shapes_and_settings_are_those_of_peft(folder: Path, params: Any) -> None:
    tensors, pairs = load_file(folder / "adapter_model.safetensors"), trained(params, LORA)["layers"]
    assert len(tensors) == 2 * 2 * 7
    name = "base_model.model.model.layers.1.{}.weight"
    np.testing.assert_array_equal(tensors[name.format("self_attn.k_proj.lora_A")], pairs["key"]["lora_a"][1].T)
    np.testing.assert_array_equal(tensors[name.format("mlp.down_proj.lora_B")], pairs["down"]["lora_b"][1].T)
    assert tensors[name.format("mlp.down_proj.lora_A")].shape == (3, 40)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down"))
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (3, 5, 0.1)
    assert settings["base_model_name_or_path"] == "owner/name"


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"layers_to_transform": [0]},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1, 2]},
        {"some_new_method": True},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_are_not_supported_are_named(setting: dict[str, Any], folder: Path, params: Any) -> None:
    change(folder, **setting)
    (name, value), *_ = setting.items()
    with pytest.raises(ModelError, match=f"unsupported (setting )?{name}") as error:
        load_adapter(folder, params)
    assert repr(value) in str(error.value)


def test_settings_that_are_off_or_change_no_logit_are_read_over(folder: Path, params: Any) -> None:
    change(
        folder,
        use_dora=False,
        rank_pattern={},
        modules_to_save=None,
        megatron_core="megatron.core",
        qalora_group_size=16,
    )
    load_adapter(folder, params)
    change(folder, r=0)
    with pytest.raises(ModelError, match=r"adapter_config.json: LoraConfig.rank must be at least 1, got 0"):
        load_adapter(folder, params)


def test_an_adapter_of_another_model(folder: Path, params: Any) -> None:
    of = lambda **sizes: jax.eval_shape(lambda: init_params(dataclasses.replace(CONFIG, **sizes), jax.random.key(0)))
    with pytest.raises(
        ModelError, match=r"lora_a of layer 0 of mlp.down_proj has the shape \[3, 40\].* need \[3, 48\]"
    ):
        load_adapter(folder, of(mlp_width=48))
    with pytest.raises(ModelError, match=r"holds lora_a of layer 1 of mlp.down_proj, but this model has 1 layers"):
        load_adapter(folder, of(num_layers=1))
    with pytest.raises(ModelError, match=r"lacks lora_a of layer 2 of mlp.down_proj, but this model has 3 layers"):
        load_adapter(folder, of(num_layers=3))
    change(folder, r=4)
    with pytest.raises(ModelError, match=r"has the shape \[3, 40\], but this model and rank 4 need \[4, 40\]"):
        load_adapter(folder, params)


def test_tensors_that_are_missing_or_unknown(folder: Path, params: Any) -> None:
    rewrite(folder, base_model__model__lm_head__lora_A__weight=np.zeros((3, 32), np.float32))
    with pytest.raises(
        ModelError,
        match=r"lm_head.lora_A.weight adapts a projection that this model does not have. It has .*self_attn.q_proj",
    ):
        load_adapter(folder, params)
    rewrite(
        folder,
        base_model__model__lm_head__lora_A__weight=None,
        base_model__model__model__layers__1__mlp__up_proj__lora_B__weight=None,
    )
    with pytest.raises(ModelError, match=r"lacks lora_b of layer 1 of mlp.up_proj"):
        load_adapter(folder, params)


def test_files_that_are_missing_corrupt_or_in_the_way(folder: Path, params: Any) -> None:
    weights = folder / "adapter_model.safetensors"
    with pytest.raises(ModelError, match="is not empty"):
        save_adapter(folder, trained(params, LORA), LORA)
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        load_adapter(folder, params)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"No adapter_model.safetensors .* adapter_model.bin is a pickle"):
        load_adapter(folder, params)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"No adapter_config.json in"):
        load_adapter(folder, params)


def test_half_precision_and_sharded_adapters(folder: Path, params: Any, tmp_path: Path) -> None:
    """Stored in bfloat16, they are read as float32; spread over devices, they are gathered."""
    adapters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained(params, LORA))
    sharding = jax.sharding.NamedSharding(jax.make_mesh((8,), ("fsdp",)), jax.sharding.PartitionSpec(None, None, None))
    save_adapter(tmp_path / "half", jax.device_put(adapters, sharding), LORA)
    loaded, _ = load_adapter(tmp_path / "half", params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.tree.map(lambda x: x.astype(jnp.float32), adapters))


CASES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "rope_theta": 500_000.0},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7},
}


# What peft 0.21 does in transformers 5.
quiet = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Torch:
    """One small model, in torch and here: the oracle."""

    def __init__(self, model_type: str, folder: Path) -> None:
        self.torch = pytest.importorskip("torch", reason="the oracle is peft on torch: pip install 'cotgrpo[parity]'")
        self.peft = pytest.importorskip("peft")
        self.transformers = pytest.importorskip("transformers")
        sizes = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
        }
        self.folder = folder / "base"
        config = self.transformers.AutoConfig.for_model(model_type, **sizes, **CASES[model_type])
        self.torch.manual_seed(0)
        model = self.transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for weight in model.parameters():
            weight.data.add_(0.2 * self.torch.randn(weight.shape))
        model.save_pretrained(self.folder)
        self.tokens = np.random.default_rng(0).integers(1, 97, (3, T)).astype(np.int32)

    def model(self, folder: Path | None = None) -> Any:
        return self.transformers.AutoModelForCausalLM.from_pretrained(
            folder or self.folder, attn_implementation="eager"
        )

    def logits(self, model: Any) -> np.ndarray:
        with self.torch.no_grad():
            return model.eval()(self.torch.tensor(self.tokens, dtype=self.torch.long)).logits.numpy()

    def ours(self, student: Any, params: Any) -> np.ndarray:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (3, T))
        return np.asarray(
            jax.jit(student.logits)(params, jnp.asarray(self.tokens), positions, jnp.ones((3, T), jnp.int32))
        )


@pytest.fixture(params=list(CASES))
def oracle(request: Any, tmp_path: Path) -> Torch:
    return Torch(request.param, tmp_path)


def assert_same_logits(got: np.ndarray, want: np.ndarray, base: np.ndarray) -> None:
    assert np.abs(want - base).max() > 0.1, "the adapter does something"
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@quiet
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_from_peft(rslora: bool, oracle: Torch, tmp_path: Path) -> None:
    """What peft made and saved computes the same here, beside the weights and merged."""
    model = oracle.model()
    base = oracle.logits(model)
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "use_rslora": rslora, "task_type": "CAUSAL_LM"}
    targets = ["q_proj", "v_proj", "down_proj"] if rslora else "all-linear"
    model = oracle.peft.get_peft_model(model, oracle.peft.LoraConfig(target_modules=targets, **settings))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.add_(0.2 * oracle.torch.randn(weight.shape))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_pretrained(oracle.folder)
    adapters, lora = load_adapter(tmp_path / "adapter", loaded.params)
    assert (lora.rank, lora.alpha, lora.dropout, lora.rslora) == (4, 6, 0.1, rslora)
    assert set(lora.targets) == ({"query", "value", "down"} if rslora else set(LORA.targets))
    want = oracle.logits(model)
    assert_same_logits(oracle.ours(lora_student(loaded.student, loaded.params, lora), adapters), want, base)
    assert_same_logits(oracle.ours(loaded.student, merge(loaded.params, adapters, lora)), want, base)


@quiet
def test_to_peft(oracle: Torch, tmp_path: Path) -> None:
    """What we saved computes the same in peft; merged and exported, in transformers alone."""
    loaded = load_pretrained(oracle.folder)
    adapters = trained(loaded.params, LORA)
    save_adapter(tmp_path / "adapter", adapters, LORA, str(oracle.folder))
    model = oracle.model()
    base = oracle.logits(model)
    want = oracle.ours(lora_student(loaded.student, loaded.params, LORA), adapters)
    assert_same_logits(oracle.logits(oracle.peft.PeftModel.from_pretrained(model, tmp_path / "adapter")), want, base)
    auto = oracle.peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    assert_same_logits(oracle.logits(auto), want, base)
    save_pretrained(tmp_path / "merged", loaded.config, merge(loaded.params, adapters, LORA), source=loaded)
    assert_same_logits(oracle.logits(oracle.model(tmp_path / "merged")), want, base)
