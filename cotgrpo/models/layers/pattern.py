"""Stacks of unlike layers: what a layer is, and how a list of layers becomes a few loops.

The decoder compiles one body for each block of a run, whatever the number of layers:

    c c A  c c A  c c A  c A  c A  c A  c      ->      (2 c, 1 A) x 3,  (1 c, 1 A) x 3,  (1 c) x 1

A run is a loop over its repeats, a block of several layers is a loop in its body. A block's parameters are stacked over
all its layers, as those of a stack of like layers are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

COST_OF_A_RUN = 0.5
"""The loop of a run, next to the body of a layer, for a compiler."""
LONGEST_PATTERN = 64


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What sets a layer of a stack apart from others, as far as it changes shapes. None: as in the decoder's config.

    Attributes:
        mixer: what mixes the tokens, one of `MIXERS`.
        mlp: what follows it, one of `MLPS`.
        mlp_width: inner size of the MLP.
        head_dim, num_kv_heads, key_is_value, shared_keys: as in `DecoderConfig`.
        is_local: whether the layer has the window. It sets apart layers of a stack with shared keys and values.
    """

    mixer: str = "attention"
    mlp: str | None = None
    mlp_width: int | None = None
    head_dim: int | None = None
    num_kv_heads: int | None = None
    key_is_value: bool | None = None
    shared_keys: bool | None = None
    is_local: bool | None = None


@dataclasses.dataclass(frozen=True)
class Block:
    """Layers of one kind that follow each other in every repeat of a run."""

    kind: LayerKind
    count: int


@dataclasses.dataclass(frozen=True)
class Run:
    """Layers that repeat a pattern.

    Attributes:
        blocks: the pattern.
        repeats: how often it occurs.
        start: index of the first layer.
    """

    blocks: tuple[Block, ...]
    repeats: int
    start: int

    def layers_of(self, block: int) -> list[int]:
        """Return the indices of the layers whose parameters a block stacks, in this order."""
        length, before = sum(b.count for b in self.blocks), sum(b.count for b in self.blocks[:block])
        firsts = (self.start + repeat * length + before for repeat in range(self.repeats))
        return [first + i for first in firsts for i in range(self.blocks[block].count)]


@dataclasses.dataclass(frozen=True)
class LayerPlace:
    """Where the parameters of one layer are.

    Attributes:
        path: of the stacked layers in the parameter tree.
        index: in the stack.
    """

    path: tuple[str, ...]
    index: int


@functools.cache
def runs_of(kinds: tuple[LayerKind, ...]) -> tuple[Run, ...]:
    """Return the cheapest decomposition of a list of layers: few blocks, few runs, then short patterns."""
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    layers = [numbers[kind] for kind in kinds]
    changes = [0, *itertools.accumulate(a != b for a, b in itertools.pairwise(layers))]
    # best[j]: (cost, number of runs, layers in their patterns, runs as (start, length, repeats)) of the first j layers.
    best: list[tuple[float, int, int, tuple[tuple[int, int, int], ...]]] = [(0.0, 0, 0, ())]
    for stop in range(1, len(layers) + 1):
        found = []
        for length in range(1, min(stop, LONGEST_PATTERN) + 1):
            first, pattern = stop - length, layers[stop - length : stop]
            own = 1 + changes[stop - 1] - changes[first] + COST_OF_A_RUN
            while True:
                cost, runs, in_patterns, before = best[first]
                run = (first, length, (stop - first) // length)
                found.append((cost + own, runs + 1, in_patterns + length, (*before, run)))
                if first < length or layers[first - length : first] != pattern:
                    break
                first -= length
        best.append(min(found, key=lambda option: option[:3]))
    return tuple(Run(blocks_of(kinds[start : start + length]), n, start) for start, length, n in best[-1][3])


def blocks_of(kinds: tuple[LayerKind, ...]) -> tuple[Block, ...]:
    """Return a list of layers as blocks."""
    return tuple(Block(kind, len(list(same))) for kind, same in itertools.groupby(kinds))


@functools.cache
def places_of(kinds: tuple[LayerKind, ...]) -> tuple[LayerPlace, ...]:
    """Return the place of each layer of a stack of unlike layers."""
    places: dict[int, LayerPlace] = {}
    for run_index, run in enumerate(runs_of(kinds)):
        for block_index in range(len(run.blocks)):
            path = ("layers", f"run_{run_index}", f"block_{block_index}")
            places |= {layer: LayerPlace(path, at) for at, layer in enumerate(run.layers_of(block_index))}
    return tuple(places[layer] for layer in range(len(kinds)))
