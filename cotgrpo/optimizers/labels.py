"""What each leaf of a parameter tree is: `param_labels`. Weight decay, muon and your own masks go by it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import jax

if TYPE_CHECKING:
    from cotgrpo.types import Params, PyTree

Label = Literal["matrix", "embedding", "norm", "bias", "adapter", "filter"]

ADAPTER = re.compile(r"lora|adapter")
BIAS = re.compile(r"bias$|^(b|beta|offset|alpha_[pn]|decay_log|sinks|shared_gate)$")
NORM_LEAF = re.compile(r"(^|_)(scale|gamma)$|norm")
NORM_MODULE = re.compile(r"norm|^ln(_|\d|$)|_ln\d*$")
EMBEDDING = re.compile(r"embed|^(wte|wpe|shared)$|^(lm_?)?head$|^output_layer$")
EXPERTS = ("gate", "up", "down")
"""Leaves of a module `experts` that have one more axis, a matrix for each expert."""
WRAPPERS = ("value", "raw_value", "")
"""Names that a framework adds below the name of a parameter, such as `.value` of an NNX variable."""


def param_labels(params: Params) -> PyTree:
    """Return what each leaf of a parameter tree is, as a tree of the same structure.

    Counting dimensions does not tell: a layer stack gives every leaf one more. So the labels go by names first. They
    know the trees of `cotgrpo.models` and the usual names of Flax, Equinox and Hugging Face.

        matrix      a kernel, with or without a layer axis in front
        embedding   the embedding of the tokens, and the head
        norm        the scale of a norm
        bias        a bias, and any vector or scalar without a known name
        adapter     LoRA's A and B
        filter      a depthwise convolution, one filter for each channel

    Use it for masks, as `optax.masked(tx, lambda p: jax.tree.map(lambda label: label == "matrix", param_labels(p)))`.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: label_of(names_of(path), leaf.ndim), params)


def decayed(params: Params) -> PyTree:
    """Return True for the leaves that weight decay applies to: not norm scales or biases."""
    return jax.tree.map(lambda label: label not in ("norm", "bias"), param_labels(params))


def label_of(names: tuple[str, ...], ndim: int) -> Label:
    """Return the label of the leaf at a path of lower-case names."""
    module, leaf = ("", "", *names)[-2:]
    if ADAPTER.search(leaf) or ADAPTER.search(module):
        return "adapter"
    if BIAS.search(leaf):
        return "bias"
    if NORM_LEAF.search(leaf) or (NORM_MODULE.search(module) and leaf != "kernel"):
        return "norm"
    if ndim < 2:
        return "bias"
    if leaf == "filters":
        return "filter"
    return "embedding" if EMBEDDING.search(leaf) or EMBEDDING.search(module) else "matrix"


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the lower-case names of a path of `jax.tree_util`. A key such as "layers.0.weight" is several names."""
    keys = (str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
    names = [name for key in keys for name in re.split(r"[./]", key.lower())]
    while names and names[-1] in WRAPPERS:
        names.pop()
    return tuple(names)


def stacked_matrices(params: Params) -> PyTree:
    """Return True for the leaves that hold matrices in their last two axes: the labels `matrix` and `adapter`.

    Raises:
        ValueError: a leaf whose axes before the last two are not those of a layer stack or its experts, such as an
            attention kernel `[D, heads, H]`. The norms next to it tell: a stack gives them the same axes.
    """
    norms = [
        (names_of(path), leaf.ndim)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if label_of(names_of(path), leaf.ndim) == "norm"
    ]

    def is_stack(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        names = names_of(path)
        if label_of(names, leaf.ndim) not in ("matrix", "adapter"):
            return False
        for depth in range(len(names) - 1, -1, -1) if leaf.ndim > 2 else ():
            if near := {ndim for other, ndim in norms if other[:depth] == names[:depth]}:
                if leaf.ndim - 1 - (names[-2:-1] == ("experts",) and names[-1] in EXPERTS) not in near:
                    raise ValueError(
                        f"muon needs matrices: expected [in, out], or [layers, in, out] for a layer stack, got "
                        f"{'/'.join(names)} with the shape {leaf.shape}. Give optax.contrib.muon its "
                        "muon_weight_dimension_numbers, and pass that as the step's optimizer."
                    )
                break
        return True

    return jax.tree_util.tree_map_with_path(is_stack, params)
