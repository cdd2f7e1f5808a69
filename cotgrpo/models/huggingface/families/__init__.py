"""Families of Hugging Face models, as data: fields of their config.json as a `DecoderConfig`, and names of modules.

A family is a row of `FAMILIES`: the fields of its config.json, their defaults, the options of the decoder, and the
names of its modules. The files of this folder hold the rows. `cotgrpo.models.huggingface.config` reads and writes
config.json by these rows, and `cotgrpo.models.huggingface.tensor_layout` finds the decoder's parameters in a
checkpoint. A model with images around its text part is a row of `WRAPPERS`: the text part is one of the families.
"""

from __future__ import annotations

from cotgrpo.models.huggingface.families.dense import DENSE
from cotgrpo.models.huggingface.families.experts import EXPERTS
from cotgrpo.models.huggingface.families.gemma import GEMMA, GEMMA4_TEXT
from cotgrpo.models.huggingface.families.granite import GRANITE
from cotgrpo.models.huggingface.families.lfm import LFM
from cotgrpo.models.huggingface.families.llama import LLAMA
from cotgrpo.models.huggingface.families.modules import MODULES as MODULES
from cotgrpo.models.huggingface.families.modules import POST_NORM_MODULES as POST_NORM_MODULES
from cotgrpo.models.huggingface.families.modules import PROJECTIONS as PROJECTIONS
from cotgrpo.models.huggingface.families.olmo import OLMO
from cotgrpo.models.huggingface.families.qwen import QWEN
from cotgrpo.models.huggingface.family import Family, Wrapper
from cotgrpo.models.huggingface.family import ModelError as ModelError

FIRST = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
"""The rows that are tried first when a config.json is written."""
ROWS = {**LLAMA, **QWEN, **GEMMA, **DENSE, **GRANITE, **OLMO, **EXPERTS, **LFM}
FAMILIES: dict[str, Family] = {name: ROWS[name] for name in (*FIRST, *ROWS)}
"""{`model_type`: its row}. Where several rows can express a decoder, the first one is written."""

WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper(
        "Gemma3ForConditionalGeneration",
        ("gemma3_text",),
        # Published files leave out what equals the defaults of transformers.
        {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "gemma4": Wrapper("Gemma4ForConditionalGeneration", ("gemma4_text",), GEMMA4_TEXT),
    "gemma4_unified": Wrapper("Gemma4UnifiedForConditionalGeneration", ("gemma4_unified_text",), GEMMA4_TEXT),
    "qwen3_vl": Wrapper("Qwen3VLForConditionalGeneration", ("qwen3_vl_text",), {}),
    "qwen3_5": Wrapper(
        "Qwen3_5ForConditionalGeneration",
        ("qwen3_5_text",),
        {
            "vocab_size": 248320,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
        },
    ),
    "qwen3_5_moe": Wrapper(
        "Qwen3_5MoeForConditionalGeneration",
        ("qwen3_5_moe_text",),
        {"vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16},
    ),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", ("mistral", "ministral3"), {"head_dim": 128}),
}

LACKING = {
    "qwen3_next": "gated delta-net layers and gated attention next to experts",
    "gemma3n": "per-layer embeddings, shared keys and values, and low-rank residuals",
    "deepseek_v3": "experts and latent attention",
    "lfm2_moe": "experts in layers with short convolutions",
    "llama4": "experts and chunked attention",
}
"""{`model_type`: what the decoder lacks} of types that people ask for."""
