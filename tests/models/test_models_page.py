"""What loads and what does not: published config.json, their sizes, and docs/models.md, which lists them."""

from __future__ import annotations

import pytest
from helpers.models_page import PAGE, filled
from helpers.published_models import PUBLISHED

from cotgrpo.models import ModelError
from cotgrpo.models.huggingface.config import decoder_config
from cotgrpo.models.huggingface.families import FAMILIES, LACKING, WRAPPERS


def test_the_page_is_what_the_tables_say() -> None:
    """If it is not: `python tests/helpers/models_page.py`."""
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page and all(f"`{kind}`" in page for kind in {**FAMILIES, **WRAPPERS, **LACKING})


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Gemma 3 4B", 3_880_263_168),
        ("Gemma 2B", 2_506_172_416),
        ("SmolLM3 3B", 3_075_098_624),
        ("OLMo 2 1B", 1_484_916_736),
        ("EXAONE 4.0 1.2B", 1_279_391_488),
        ("Phi-4 mini", 3_836_021_760),
        ("Phi-4", 14_659_507_200),
        ("Apertus 8B", 8_053_338_176),
        ("LFM2 350M", 354_483_968),
        ("LFM2 1.2B", 1_170_340_608),
        ("Qwen3 30B A3B", 30_532_122_624),
        ("Qwen3 235B A22B", 235_093_634_560),
        ("Qwen1.5 MoE A2.7B", 14_315_784_192),
        ("OLMoE 1B 7B", 6_919_161_856),
        ("Mixtral 8x7B", 46_702_792_704),
        ("gpt-oss 20B", 20_914_757_184),
        ("gpt-oss 120B", 116_829_156_672),
        ("DeepSeek R1 0528 Qwen3 8B", 8_190_735_360),
    ],
)
def test_published_sizes(name: str, size: int) -> None:
    assert decoder_config(PUBLISHED[name]).num_params() == size


@pytest.mark.parametrize(
    ("name", "active"),
    [("Qwen3 30B A3B", 3.35), ("OLMoE 1B 7B", 1.28), ("Mixtral 8x7B", 12.88), ("gpt-oss 120B", 5.71)],
)
def test_published_active_sizes(name: str, active: float) -> None:
    """In billions, with the embedding and the head."""
    assert decoder_config(PUBLISHED[name]).num_active_params() / 1e9 == pytest.approx(active, abs=0.01)


@pytest.mark.parametrize("kind", LACKING)
def test_a_type_that_does_not_load_says_what_is_lacking(kind: str) -> None:
    with pytest.raises(ModelError) as error:
        decoder_config({"model_type": kind})
    assert LACKING[kind] in str(error.value) and "\n" not in str(error.value)


LLAMA, QWEN3_MOE = PUBLISHED["Llama 3.1 8B"], PUBLISHED["Qwen3 30B A3B"]


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (PUBLISHED["Gemma 3 4B"] | {"text_config": None}, "no text_config"),
        (PUBLISHED["Gemma 3 4B"] | {"text_config": {"model_type": "llama"}}, "supported: gemma3_text"),
        (PUBLISHED["Gemma 3 4B"] | {"quantization_config": {"bits": 4}}, "quantization_config is"),
        (PUBLISHED["Gemma 3 4B"] | {"residual_multiplier": 2.0}, "unsupported field residual_multiplier"),
        (PUBLISHED["InternLM3 8B"] | {"bias": True}, "qkv_bias is False and bias is True"),
        (PUBLISHED["SmolLM3 3B"] | {"no_rope_layers": [1, 0]}, "no_rope_layers must hold 0 or 1 for each of the 36"),
        (PUBLISHED["Granite 4.0 micro 3B"] | {"layer_types": ["mamba"] * 40}, "layers with a state"),
        (PUBLISHED["Granite 4.0 micro 3B"] | {"num_local_experts": 8}, "num_local_experts is 8"),
        (PUBLISHED["AFM 4.5B"] | {"hidden_act": "silu"}, "unsupported hidden_act 'silu'; supported: relu2"),
        (PUBLISHED["HunYuan 7B"] | {"use_cla": True}, "use_cla is True"),
        (PUBLISHED["Phi-4 mini"] | {"lm_head_bias": True}, "lm_head_bias is True"),
        (LLAMA | {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "they differ"),
        (LLAMA | {"use_rope": False}, "unsupported field use_rope"),
        (QWEN3_MOE | {"num_experts_per_tok": 129}, "num_experts_per_tok is 129, but num_experts is 128"),
        (QWEN3_MOE | {"num_local_experts": 64}, "num_experts is 128 and num_local_experts is 64"),
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (QWEN3_MOE | {"moe_intermediate_size": None}, "moe_intermediate_size is None"),
        (PUBLISHED["OLMoE 1B 7B"] | {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        (PUBLISHED["gpt-oss 20B"] | {"layer_types": ["full_attention"]}, "layer_types must name .* 24 layers"),
        (PUBLISHED["gpt-oss 20B"] | {"swiglu_limit": 0.0}, "Experts.limit must be positive"),
        (LLAMA | {"num_experts": 8}, "unsupported field num_experts"),
    ],
)
def test_configs_that_no_decoder_can_follow(hf: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        decoder_config(hf)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "more",
    [
        {"rope_parameters": LLAMA["rope_scaling"]},
        {"qkv_bias": False, "num_experts": 0, "router_aux_loss_coef": 0.0, "layer_norm": None, "loss_kwargs": {}},
    ],
)
def test_fields_without_effect(more: dict[str, object]) -> None:
    assert decoder_config(LLAMA | more) == decoder_config(LLAMA)
