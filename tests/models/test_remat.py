"""Remat policies: what they keep, by bytes; what they compute again, by products; and the same gradients."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from cotgrpo.accelerators.roofline import Work
from cotgrpo.config import ConfigError
from cotgrpo.config.files import parse_config
from cotgrpo.models.config import KEPT_NAMES, LAYER_INPUT, PROJECTION_NAMES, REMAT_POLICIES, parse_remat
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student

PLAIN = DecoderConfig(
    vocab_size=61, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, init_scale=0.2
)
OPTIONS = dataclasses.replace(PLAIN, qk_norm=True, post_norms=True, biases=("query", "gate"))
CONFIGS = {"plain": PLAIN, "options": OPTIONS, "bfloat16": dataclasses.replace(PLAIN, dtype="bfloat16")}
B, T = 2, 24
LISTS = (
    "qkv_proj", "out_proj", "attention", "gate_proj,up_proj", "qkv_proj,attention,out_proj",
    "out_proj,offload:qkv_proj", "offload:layer_input,offload:gate_proj,offload:up_proj", "down_proj",
)  # fmt: skip
POLICIES = (*(policy for policy in REMAT_POLICIES if policy != "none"), *LISTS)


@functools.cache
def params_of(config: DecoderConfig) -> Any:
    return init_params(dataclasses.replace(config, remat="none"), jax.random.key(0))


def total(config: DecoderConfig, params: Any) -> Any:
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 61, (B, T)), jnp.int32)
    positions, segments = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32)
    rows = make_student(config).hidden(params, ids, positions, segments)
    return jnp.sum(jnp.sin(rows.astype(jnp.float32)))


def kept_bytes(config: DecoderConfig, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Return the bytes of what the scan over the layers hands to the backward pass, by where they lie."""
    print_saved_residuals(functools.partial(total, config), params_of(config))
    found = {"device": 0, "host": 0}
    for line in capsys.readouterr().out.splitlines():
        shape = re.match(rf"(f32|f16|bf16|float32|bfloat16)(<host>)?\[{config.num_layers},([\d,]*)\] output of", line)
        if shape is not None:
            size = 4 if shape[1].endswith("32") else 2
            numbers = config.num_layers * math.prod(int(n) for n in shape[3].split(","))
            found["host" if shape[2] else "device"] += numbers * size
    return found


KEPT_CASES = [
    *((policy, "plain") for policy in POLICIES),
    *((policy, "options") for policy in ("dots", "qkv_proj", "down_proj")),
    ("dots", "bfloat16"),
]
FAST = (("qkv_proj", "plain"), ("offload", "plain"))


@pytest.mark.parametrize(
    ("policy", "name"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in KEPT_CASES]
)
def test_a_policy_keeps_what_it_names(policy: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In bytes, on the device and on the host: those that `DecoderConfig.kept_sizes` gives for the names."""
    config = dataclasses.replace(CONFIGS[name], remat=policy)
    remat = parse_remat(policy)
    assert remat is not None
    size = B * T * config.num_layers * jnp.dtype(config.dtype).itemsize
    expected = {
        where: size * sum(config.kept_sizes[own] for own in names)
        for where, names in (("device", remat.on_device), ("host", remat.on_host))
    }
    assert kept_bytes(config, capsys) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "policies"), [("plain", POLICIES), ("options", ("minimal", LISTS[-3]))])
def test_gradients_are_equal_for_every_policy(name: str, policies: tuple[str, ...]) -> None:
    config = dataclasses.replace(CONFIGS[name], remat="none")
    grads = lambda config: jax.tree.leaves(
        jax.jit(jax.grad(functools.partial(total, config)))(params_of(CONFIGS[name]))
    )
    want = grads(config)
    for policy in policies:
        for own, other in zip(grads(dataclasses.replace(config, remat=policy)), want, strict=True):
            assert np.max(np.abs(own - other)) <= 3e-6 * np.max(np.abs(other)), policy


@pytest.mark.slow
def test_a_policy_computes_the_other_products_again() -> None:
    """Matrix products of the compiled backward pass, besides those of a program that keeps everything."""

    def products(policy: str) -> int:
        config = dataclasses.replace(PLAIN, remat=policy)
        compiled = jax.jit(jax.grad(functools.partial(total, config))).lower(params_of(PLAIN)).compile()
        return int(compiled.as_text().count(" dot("))

    least = products("dots")
    assert least == products("none")
    attention = products("minimal") - least  # the scores and the weighted values
    assert attention > 0
    for policy in ("full", *LISTS[:4], LISTS[-3]):
        remat = parse_remat(policy)
        assert remat is not None
        own = [name for name, saved in PROJECTION_NAMES.items() if saved not in remat.kept and name != "down"]
        again = len(own) + (attention if "attention" not in remat.kept else 0)
        assert products(policy) - least == again, policy


@pytest.mark.parametrize(
    ("policy", "again"),
    [
        ("none", ()),
        ("dots", ()),
        ("minimal", ()),
        ("out_proj", ("query", "key", "value", "gate", "up")),
        ("qkv_proj, offload:out_proj", ("gate", "up")),
        ("qkv_proj,out_proj,gate_proj,up_proj", ()),
    ],
)
def test_the_roofline_counts_what_is_computed_again(policy: str, again: tuple[str, ...]) -> None:
    config = dataclasses.replace(PLAIN, remat=policy)
    assert config.recomputed_products == again
    work = Work(config, tokens=64, seq_len=32)
    weights = sum(math.prod(config.projections[name]) for name in again)
    assert work.recomputed_weights == config.num_layers * weights
    kept = dataclasses.replace(config, remat="dots")
    attention_again = policy not in ("none", "dots")
    extra = work.hardware_flops - Work(kept, tokens=64, seq_len=32).hardware_flops
    scores = 2 * work.score_flops * work.masked * 9 / 16 if attention_again else 0
    assert extra == pytest.approx(64 * (2 * config.num_layers * weights + scores))


def test_arithmetic_of_memory_grows_with_what_is_kept() -> None:
    sizes = [
        Work(dataclasses.replace(PLAIN, remat=policy), tokens=64, seq_len=32).activation_bytes({})
        for policy in ("offload", "full", "out_proj", "qkv_proj,out_proj", "minimal", "dots")
    ]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("block", "got 'block'"),
        ("qkv_proj,foo", "got 'foo' in 'qkv_proj,foo'"),
        ("minimal,attention", "got 'minimal' in"),
        ("offload:", "got 'offload:'"),
        ("offload:dots", "got 'offload:dots'"),
        ("", "got ''"),
        ("gate_proj,gate_proj", "each name once, got 'gate_proj' twice"),
        ("qkv_proj,offload:qkv_proj", "each name once, got 'qkv_proj' twice"),
    ],
)
def test_a_wrong_name_is_an_error_that_lists_the_names(policy: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        parse_config(["--student.remat", policy])
    text = str(error.value)
    assert text.startswith("student.remat must") and "\n" not in text
    if "twice" not in message:
        assert all(repr(name) in text for name in (*REMAT_POLICIES, *KEPT_NAMES))
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(PLAIN, remat=policy)


def test_attention_that_keeps_no_result_cannot_be_named() -> None:
    message = "keeps the result of attention, which attention 'xla' does not keep"
    with pytest.raises(ConfigError, match=f"student.remat 'offload:attention' {message}"):
        parse_config(["--student.remat", "offload:attention", "--student.attention", "xla"])
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, attention="xla", remat="qkv_proj,attention")
    assert dataclasses.replace(PLAIN, attention="xla", remat="dots").remat == "dots"


def test_the_layers_input_is_always_kept() -> None:
    for policy in POLICIES:
        remat = parse_remat(policy)
        assert remat is not None and LAYER_INPUT in remat.kept
    assert parse_remat("layer_input") == parse_remat("full")
    assert parse_remat("offload:layer_input") == parse_remat("offload")
