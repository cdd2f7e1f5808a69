"""Compare the bytes that one device sends in a train step with theory, on 1, 2, 4 and 8 devices.

    python benchmarks/weak_scaling.py --json benchmarks/results/cpu/weak_scaling.json

The tokens of a step grow with the devices. Nothing runs: the step is compiled for virtual CPU devices, and its
collectives are read from the compiled text (`cotgrpo.planning.hlo`). Those in loops count as often as they run. An
all-reduce of S bytes among n devices counts 2 (n - 1) / n S for each, a gather and a scatter (n - 1) / n S.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

import cotgrpo
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.planning.hlo import bytes_sent, collectives
from cotgrpo.sharding import AXES, mesh_shape
from cotgrpo.types import SftBatch, TrainState

CONFIG = DecoderConfig(
    vocab_size=2_048, width=128, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=16, mlp_width=256, tied_head=False
)  # fmt: skip
BATCH, SEQ, TILE = 4, 128, 64


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows = [row(axis, count) for axis in args.axes for count in args.devices]
    print("| axis | devices | tokens a step | MB sent | theory | ratio |\n|---|---|---|---|---|---|")
    for r in rows:
        ratio = f"{r['sent'] / r['theory']:.3f}" if r["theory"] else "-"
        print(
            f"| {r['axis']} | {r['devices']} | {r['tokens']} | {r['sent'] / 1e6:.3f} | {r['theory'] / 1e6:.3f} "
            f"| {ratio} |"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n")


def row(axis: str, count: int) -> dict[str, Any]:
    """Measure a mesh with `count` devices on one axis. Batch or, on the context axis, sequences grow with it."""
    batch, seq = (BATCH, SEQ * count) if axis == "context" else (BATCH * count, SEQ)
    found = collectives(compiled_text(axis, count, batch, seq))
    # The length of the loop over tiles depends on the data. Here every token is supervised, and each shard has its own.
    own = batch * seq // (count if axis != "tensor" else 1)
    kinds = bytes_sent(found, unknown=own // TILE)
    theory = expected(axis, count, batch, seq)
    return {
        "axis": axis,
        "devices": count,
        "tokens": batch * seq,
        "sent": sum(kinds.values()),
        "by_kind": kinds,
        "theory": sum(theory.values()),
        "theory_by_part": theory,
    }


def compiled_text(axis: str, count: int, batch: int, seq: int) -> str:
    """Return the compiled text of an SFT step on the first `count` devices."""
    shape = mesh_shape({axis: count}, count)
    devices = np.array(jax.devices()[:count]).reshape(tuple(shape.values()))
    mesh = Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
    tx = optax.sgd(0.1)
    params = jax.eval_shape(functools.partial(init_params, CONFIG), jax.random.key(0))
    state = jax.eval_shape(lambda params: TrainState.create(params=params, tx=tx, key=0), params)
    ids, mask = (np.zeros((batch, seq), kind) for kind in (np.int32, np.float32))
    step = cotgrpo.jit_step(cotgrpo.make_sft_step(make_student(CONFIG), tx, tile_size=TILE), mesh=mesh)
    return step.lower(state, SftBatch(ids, ids, ids, ids, mask)).compile().as_text()


def expected(axis: str, n: int, batch: int, seq: int) -> dict[str, float]:
    """Return the bytes that a device sends in float32, by what is sent.

    Scalars, row sums of the softmax and norms do not count. The layers' gradients are all-reduced on the fsdp axis too:
    XLA for CPU does not turn an all-reduce and a slice into a reduce-scatter, as XLA for TPU does on some slices.
    """
    c, part = CONFIG, 4 * (n - 1) / n
    layers = c.num_layers * (2 * c.width * c.head_dim * (c.num_heads + c.num_kv_heads) + 3 * c.width * c.mlp_width)
    embeddings = 2 * c.vocab_size * c.width
    if axis == "tensor":
        stream = batch * seq * c.width
        # In a layer: out and down forward; backward the inputs of query, key, value, gate and up.
        # Outside: the embedding's rows and d hidden.
        return {"residual stream": 2 * part * stream * (7 * c.num_layers + 2)}
    if axis == "fsdp":
        head, rows = c.vocab_size * c.width, batch * seq * c.width / n
        return {
            # The layers' are gathered again in the backward pass. The embedding stays where it lies: its rows travel.
            "parameters": part * (2 * layers + head),
            "gradients": part * (2 * layers + head),
            "the embedding's rows and their gradients": 2 * part * rows,
        }
    sums = {"gradients": 2 * part * (layers + embeddings)}
    if axis == "context":
        keys = c.num_layers * batch * seq * 2 * c.num_kv_heads * c.head_dim
        return sums | {"keys and values": part * keys, "their gradients": 2 * part * keys}
    return sums


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
