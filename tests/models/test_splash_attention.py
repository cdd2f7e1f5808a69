"""The TPU kernel against plain attention, on a CPU: Pallas interprets the kernel's program.

Both compute in float32 here, in another order: outputs and gradients of size 1 agree to 2e-5.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.config import ConfigError, StudentConfig
from cotgrpo.models import decoder
from cotgrpo.models.attention import attention, causal_segment_mask
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.models.splash_attention import splash_attention

B, T, Q, H = 2, 600, 4, 16  # 600 rows are padded to five blocks of 128
TOLERANCE = 2e-5

DOCUMENTS = ((250, 3, 300, 47), (129, 471))  # the 47 are padding
SEGMENTS = np.stack([np.repeat(ids, lengths) for ids, lengths in zip(([1, 2, 3, 0], [1, 2]), DOCUMENTS, strict=True)])
SEGMENTS = SEGMENTS.astype(np.int32)
POSITIONS = np.stack([np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]) for lengths in DOCUMENTS])


def inputs(num_kv_heads: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (
        jax.random.normal(key, (B, T, heads, H))
        for key, heads in zip(keys, (Q, num_kv_heads, num_kv_heads, Q), strict=True)
    )
    return q, k, v, cotangent * (SEGMENTS != 0)[:, :, None, None]  # nobody reads what padding computes


def plain(window: int | None, softcap: float | None, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    mask = causal_segment_mask(POSITIONS, SEGMENTS, POSITIONS, SEGMENTS, window)
    return attention(q, k, v, mask, None, softcap) * (SEGMENTS != 0)[:, :, None, None]


def kernel(windows: tuple[int | None, ...], is_local: bool | None, softcap: float | None, *qkv: jax.Array) -> jax.Array:
    local = None if is_local is None else jnp.asarray(is_local)
    mixed = splash_attention(*qkv, jnp.asarray(SEGMENTS), windows, local, None, softcap, interpret=True)
    return mixed * (SEGMENTS != 0)[:, :, None, None]


def value_and_gradients(
    attend: functools.partial, q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array
) -> list:
    @jax.jit
    def both(*qkv: jax.Array) -> tuple[jax.Array, ...]:
        mixed, pull_back = jax.vjp(attend, *qkv)
        return (mixed, *pull_back(cotangent))

    return [np.asarray(x) for x in both(q, k, v)]


def assert_same(found: list, expected: list) -> None:
    for name, mine, theirs in zip(("output", "d query", "d key", "d value"), found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("num_kv_heads", "windows", "is_local", "softcap"),
    [
        pytest.param(1, (40,), None, 5.0, id="window and soft-cap"),
        pytest.param(2, (None, 40), False, None, id="global of two"),
        pytest.param(4, (None, 40), True, None, id="local of two", marks=pytest.mark.slow),
        pytest.param(2, (None,), None, None, id="causal", marks=pytest.mark.slow),
    ],
)
def test_the_kernel_is_plain_attention(
    num_kv_heads: int, windows: tuple[int | None, ...], is_local: bool | None, softcap: float | None
) -> None:
    arrays = inputs(num_kv_heads)
    window = windows[0] if is_local is None else windows[is_local]
    expected = value_and_gradients(functools.partial(plain, window, softcap), *arrays)
    assert_same(value_and_gradients(functools.partial(kernel, windows, is_local, softcap), *arrays), expected)
    if window is not None:  # the window counts
        other = value_and_gradients(functools.partial(plain, window + 1, softcap), *arrays)
        assert np.max(np.abs(other[0] - expected[0])) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("sizes", "num_kv_heads"),
    [
        pytest.param({"data": 1, "fsdp": 2, "tensor": 2, "context": 2}, 2, id="every axis"),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 1, id="axes that do not divide", marks=pytest.mark.slow),
    ],
)
def test_the_kernel_is_the_same_on_a_mesh(sizes: dict[str, int], num_kv_heads: int) -> None:
    """The second mesh has four places for two sequences, and two for one key/value head."""
    arrays = inputs(num_kv_heads)
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    with jax.set_mesh(jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)):
        found = value_and_gradients(functools.partial(kernel, (None,), None, None), *arrays)
    assert_same(found, value_and_gradients(functools.partial(plain, None, None), *arrays))


@pytest.mark.slow
def test_a_decoder_with_local_layers_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's pattern: windows in some layers, a soft-cap, its own query scale; gradients through scan and remat."""
    segments, positions = SEGMENTS[:, 100:356], POSITIONS[:, 100:356]
    monkeypatch.setattr(decoder, "splash_attention", functools.partial(splash_attention, interpret=True))
    plain = DecoderConfig(
        vocab_size=31, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=16, init_scale=0.5,
        window=40, local_layers=(0,), attention_softcap=5.0, query_scale=0.3, local_rope_theta=100.0, remat="full",
    )  # fmt: skip
    kernel = DecoderConfig(**{**vars(plain), "attention": "splash"})
    params = init_params(plain, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, init_params(kernel, jax.random.key(0)), params)
    tokens = jax.random.randint(jax.random.key(1), segments.shape, 0, 31)
    cotangent = jax.random.normal(jax.random.key(2), (*segments.shape, 16)) * (segments != 0)[:, :, None]

    def loss(config: DecoderConfig, params: object) -> jax.Array:
        return jnp.sum(cotangent * make_student(config).hidden(params, tokens, positions, segments))

    expected, found = (jax.jit(jax.value_and_grad(functools.partial(loss, c)))(params) for c in (plain, kernel))

    def same(mine: jax.Array, theirs: jax.Array) -> None:
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE * float(jnp.max(jnp.abs(theirs))), rtol=0)

    jax.tree.map(same, found, expected)


@pytest.mark.parametrize(
    ("remat", "calls"), [("dots", 3), ("full", 4), pytest.param("none", 3, marks=pytest.mark.slow)]
)
def test_dots_keeps_the_kernels_result(remat: str, calls: int) -> None:
    """One call forward and one for each half of the backward pass; full remat calls the forward one twice."""
    config = DecoderConfig(
        vocab_size=31, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=16,
        attention="splash", remat=remat,
    )  # fmt: skip
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    gradient = jax.grad(lambda params, *inputs: jnp.sum(make_student(config).hidden(params, *inputs)))
    text = jax.jit(gradient).trace(params, ids, ids, ids).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == calls


def test_auto_is_the_kernel_on_a_tpu_alone() -> None:
    student = StudentConfig(attention="auto")
    shape = student.decoder(vocab_size=16)
    assert [student.computed(shape, where).attention for where in ("tpu", "gpu", "cpu")] == [
        "splash",
        "blocks",
        "blocks",
    ]
    assert StudentConfig(attention="xla").computed(shape, "tpu").attention == "xla"
    with pytest.raises(ConfigError, match=r"student\.attention.*splash.*TPU.*cpu"):
        StudentConfig(attention="splash").computed(shape, "cpu")
