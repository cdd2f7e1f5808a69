"""Stacks of unlike layers: their decomposition into loops, their parameters, and what grows with depth."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.models.layers.options import ShortConv
from cotgrpo.models.layers.pattern import Block, LayerKind, places_of, runs_of

KINDS = {letter: LayerKind(letter) for letter in "abcds"} | {"c": LayerKind("conv"), "A": LayerKind("attention")}


def kinds(text: str) -> tuple[LayerKind, ...]:
    return tuple(KINDS[letter] for letter in text)


@pytest.mark.parametrize(
    ("layers", "want"),
    [
        ("A", "(1A)x1"),
        ("ccAc", "(2c 1A 1c)x1"),
        ("ccAc" * 8, "(2c 1A 1c)x8"),
        ("cA", "(1c 1A)x1"),
        ("dddA", "(3d 1A)x1"),
        ("dddA" * 8, "(3d 1A)x8"),
        ("dddA" * 15 + "dd", "(3d 1A)x15 (1d)x2"),
        ("sssssA" * 10, "(5s 1A)x10"),
        ("cAcAcA", "(1c 1A)x3"),
        # LFM2-350M, 700M and 1.2B; LFM2-2.6B has more short convolutions between the layers of attention.
        ("ccAccAccAcAcAcAc", "(2c 1A)x3 (1c 1A)x3 (1c)x1"),
        ("ccA" * 2 + "cccA" * 4 + "ccA" * 2 + "cc", "(2c 1A 2c)x1 (1A 3c)x4 (1A 2c)x3"),
        ("A" + "sA" * 12, "(1A 1s)x12 (1A)x1"),
        ("ab" * 3 + "cd" * 4 + "ab" * 2, "(1a 1b)x3 (1c 1d)x4 (1a 1b)x2"),
    ],
)
def test_decomposition(layers: str, want: str) -> None:
    """Few loops with few blocks, in the order of the layers."""
    runs = runs_of(kinds(layers))
    letters = {kind: letter for letter, kind in KINDS.items()}
    text = [f"({' '.join(f'{b.count}{letters[b.kind]}' for b in run.blocks)})x{run.repeats}" for run in runs]
    assert " ".join(text) == want
    in_order = [
        block.kind for run in runs for _ in range(run.repeats) for block in run.blocks for _ in range(block.count)
    ]
    assert in_order == list(kinds(layers))


@pytest.mark.parametrize("layers", ["ccAccAccAcAcAcAc", "dddA" * 3 + "d", "abcd", "aabbaabbab"])
def test_every_layer_has_one_place(layers: str) -> None:
    """A block stacks its layers in their order."""
    places = places_of(kinds(layers))
    assert len(set(places)) == len(layers)
    for index, run in enumerate(runs_of(kinds(layers))):
        for block in range(len(run.blocks)):
            own = [i for i, place in enumerate(places) if place.path == ("layers", f"run_{index}", f"block_{block}")]
            assert own == run.layers_of(block) and [places[i].index for i in own] == list(range(len(own)))
            assert {layers[i] for i in own} == {layers[own[0]]}


def test_any_list_of_layers_decomposes() -> None:
    """Random lists: every layer once, and never more blocks than changes of kind."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        layers = "".join(rng.choice(list("abc"), rng.integers(1, 20)))
        runs = runs_of(kinds(layers))
        changes = 1 + sum(a != b for a, b in itertools.pairwise(layers))
        assert sum(len(run.blocks) for run in runs) <= changes
        covered = sorted(i for run in runs for block in range(len(run.blocks)) for i in run.layers_of(block))
        assert covered == list(range(len(layers)))
        assert all(isinstance(block, Block) for run in runs for block in run.blocks)


def config_of(layers: str, **options: Any) -> DecoderConfig:
    """Return a small decoder of these layers: c, a short convolution, or A, attention."""
    return DecoderConfig(
        **(
            {"vocab_size": 32, "width": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_width": 24} | options
        ),
        num_layers=len(layers),
        short_conv=ShortConv(),
        layer_kinds=kinds(layers),
    )


def count_equations(jaxpr: Any) -> int:
    """Return the number of equations of a program, with those of its loops and calls."""
    inner = [value for eqn in jaxpr.eqns for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)]
    return len(jaxpr.eqns) + sum(count_equations(getattr(own, "jaxpr", own)) for own in inner if is_jaxpr(own))


def is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def gradient_size(config: DecoderConfig) -> int:
    params = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    loss = lambda p, *inputs: jnp.sum(make_student(config).logits(p, *inputs))
    return count_equations(jax.make_jaxpr(jax.grad(loss))(params, ids, ids, ids).jaxpr)


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [("ccA", False), ("cccA", True)]
    + [pytest.param(p, w, marks=pytest.mark.slow) for p, w in (("cA", True), ("ccAc", False), ("cccccA", False))],
)
def test_the_program_does_not_grow_with_depth(pattern: str, windows: bool) -> None:
    """The gradient of 32 layers has at most 1.3 times the equations of that of 4.

    The pattern of six layers is counted once and six times.
    """

    def size(depth: int) -> int:
        layers = (pattern * depth)[:depth]
        local = tuple(i for i in range(depth) if layers[i] == "A" and i % 3 == 0)
        return gradient_size(config_of(layers, **({"window": 5, "local_layers": local} if windows and local else {})))

    few, many = (6, 36) if len(pattern) == 6 else (4, 32)
    assert size(many) <= 1.3 * size(few)
