"""Collectives read from compiled text: programs with known traffic, and the forms of text that only TPUs write."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cotgrpo.planning.hlo import (
    attention_kernels,
    bytes_sent,
    collectives,
    estimated_cycles,
    first_group,
    group_size,
)

RING = [(i, (i + 1) % 4) for i in range(4)]
MESH = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def text_of(function: Any, in_specs: Any, out_specs: Any, *shapes: tuple[int, ...]) -> str:
    """The compiled text of a function of float32 arrays, manual over the whole mesh."""
    mapped = jax.shard_map(function, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    at = [NamedSharding(MESH, spec) for spec in in_specs]
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=where) for s, where in zip(shapes, at, strict=True)]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    ("function", "out", "kind", "payload", "group", "sent"),
    [
        (lambda x: jax.lax.psum(x, "b"), P("a"), "all-reduce", 2 * 64, 4, 2 * 3 / 4 * 2 * 64),
        (lambda x: jax.lax.psum(x, ("a", "b")), P(), "all-reduce", 2 * 64, 8, 2 * 7 / 8 * 2 * 64),
        (lambda x: jax.lax.all_gather(x, "b", tiled=True), P("a"), "all-gather", 8 * 64, 4, 3 / 4 * 8 * 64),
        (
            lambda x: jax.lax.psum_scatter(x, "a", scatter_dimension=1, tiled=True),
            P("b", "a"),
            "reduce-scatter",
            2 * 64,
            2,
            1 / 2 * 2 * 64,
        ),
        (lambda x: jax.lax.ppermute(x, "b", RING), P("a", "b"), "collective-permute", 128, 8, 128),
    ],
    ids=["psum", "psum-all", "gather", "scatter", "permute"],
)  # fmt: skip
def test_kinds_and_bytes(function: Any, out: Any, kind: str, payload: int, group: int, sent: float) -> None:
    """Sixteen rows of 64 bytes over eight devices: two rows each."""
    (found,) = collectives(text_of(function, (P(("a", "b")),), out, (16, 16)))
    assert (found.kind, found.bytes, found.group, found.loops) == (kind, payload, group, ())
    assert found.sent == sent and found.times() == 1


def test_loops_multiply() -> None:
    """A scan of three inside a scan of five, and a loop whose length depends on the data."""

    def function(x: Any) -> Any:
        def inner(x: Any, _: Any) -> Any:
            return jax.lax.psum(jnp.sin(x), "b"), None

        def outer(x: Any, _: Any) -> Any:
            return jax.lax.psum(jnp.cos(jax.lax.scan(inner, x, None, length=3)[0]), "a"), None

        x = jax.lax.scan(outer, x, None, length=5)[0]
        rounds = jax.lax.psum(x[0, 0], ("a", "b")).astype(jnp.int32)
        return jax.lax.fori_loop(0, rounds, lambda _, x: jax.lax.psum(jnp.tan(x), ("a", "b")), x)

    found = collectives(text_of(function, (P(),), P(), (4, 4)))
    loops = {c.group: c.loops for c in found if c.bytes == 64}
    assert loops == {4: (5, 3), 2: (5,), 8: (None,)}
    sums = bytes_sent(found, unknown=10)
    assert sums == {"all-reduce": 64 * (15 * 2 * 3 / 4 + 5 * 2 * 1 / 2 + 10 * 2 * 7 / 8) + 4 * 2 * 7 / 8}
    assert "all-reduce f32[4,4] among 8 x ?" in {str(c).partition(" (")[0] for c in found}


def test_collectives_of_one_channel_are_all_counted() -> None:
    """JAX gives all of a `shard_map` the same one: two of one shape in a loop, and two after it."""

    def function(x: Any) -> Any:
        def turn(pair: Any, _: Any) -> Any:
            return (jax.lax.ppermute(pair[0], "b", RING), jax.lax.ppermute(jnp.sin(pair[1]), "b", RING)), None

        one, other = jax.lax.scan(turn, (x, jnp.cos(x)), None, length=3)[0]
        return jax.lax.psum(one * jax.lax.ppermute(other, "b", RING), "a")

    found = collectives(text_of(function, (P(),), P(), (4, 4)))
    assert sorted((c.kind, c.loops) for c in found) == [
        ("all-reduce", ()),
        ("collective-permute", ()),
        ("collective-permute", (3,)),
        ("collective-permute", (3,)),
    ]
    assert bytes_sent(found)["collective-permute"] == 64 * (2 * 3 + 1)


TPU = """HloModule jit_step, entry_computation_layout={(f32[8])->f32[8]}, num_partitions=8

%all-reduce-scatter.1.clone (input.7: f32[128,64]) -> f32[32,64] {
  %input.7 = f32[128,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[128,64]{1,0:T(8,128)} all-reduce(%input.7), channel_id=28, replica_groups={{0,2,4,6},{1,3,5,7}}
  ROOT %dynamic-slice.1 = f32[32,64]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={32,64}
}

%start (param_0: bf16[1,512]) -> (bf16[1,512], bf16[4,512]) {
  %param_0 = bf16[1,512]{1,0} parameter(0)
  %gather.82 = bf16[4,512]{1,0} all-gather(%param_0), channel_id=33, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
  ROOT %call.39 = (bf16[1,512], bf16[4,512]) custom-call(%gather.82), custom_call_target="AsyncCollectiveStart"
}

%done (param_1: bf16[1,512]) -> bf16[4,512] {
  %param_1 = bf16[1,512]{1,0} parameter(0)
  %gather.84 = bf16[4,512]{1,0} all-gather(%param_1), channel_id=33, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
  ROOT %custom-call.41 = bf16[4,512]{1,0} custom-call(%gather.84), custom_call_target="AsyncCollectiveDone"
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="jit(step)/while/cond/lt"}
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %f.1 = (bf16[1,512], bf16[4,512]) fusion(%q), kind=kCustom, calls=%start
  %f.2 = bf16[4,512]{1,0} fusion(%f.1), kind=kCustom, calls=%done
  ROOT %t = (s32[]{:T(128)}, f32[8]{0}) tuple(%q)
}

%windowed_condition (r: (f32[16], u32[])) -> pred[] {
  %r = (f32[16]{0}, u32[]{:T(128)}) parameter(0)
  %done.1 = u32[]{:T(128)} get-tuple-element(%r), index=1
  %parts = u32[]{:T(128)} constant(5), metadata={op_name="jit(step)/dot_general"}
  ROOT %below = pred[]{:T(512)} compare(%done.1, %parts), direction=LT, metadata={op_name="jit(step)/dot_general"}
}

%windowed_body (s: (f32[16], u32[])) -> (f32[16], u32[]) {
  %s = (f32[16]{0}, u32[]{:T(128)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %part = f32[16]{0} get-tuple-element(%s), index=0
  %done.2 = u32[]{:T(128)} get-tuple-element(%s), index=1
  %sent = (f32[16], f32[16], u32[], u32[]) collective-permute-start(%part), source_target_pairs={{0,1},{1,0}}
  %got = f32[16]{0} collective-permute-done(%sent)
  %next = u32[]{:T(128)} add(%done.2, %two), metadata={op_name="jit(step)/dot_general"}
  ROOT %both = (f32[16]{0}, u32[]{:T(128)}) tuple(%got, %next)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %scattered = f32[32,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone
  %w = (s32[]{:T(128)}, f32[8]{0}) while(%x), condition=%condition, body=%body
  %gathered = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), channel_id=5, replica_groups=[1,8]<=[8]
  %windowed = (f32[16]{0}, u32[]{:T(128)}) while(%x), condition=%windowed_condition, body=%windowed_body
  ROOT %result = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_what_tpus_and_gpus_write() -> None:
    """A fused reduce-scatter, one gather in two fusions, a start with its operands, and loops without a trip count.

    One of the loops counts by two.
    """
    scatter, gather, started, permuted = collectives(TPU)
    assert (scatter.kind, scatter.bytes, scatter.sent) == ("reduce-scatter", 4 * 128 * 64, 3 / 4 * 4 * 128 * 64)
    assert (gather.kind, gather.bytes, gather.group, gather.loops) == ("all-gather", 2 * 4 * 512, 4, (7,))
    assert (started.kind, started.bytes, started.group) == ("all-gather", 4 * 16 * 8, 8)
    assert (permuted.kind, permuted.bytes, permuted.loops) == ("collective-permute", 4 * 16, (3,))


def test_groups() -> None:
    assert group_size("x, replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=2] {'data','fsdp':(2)4}, y") == 8
    assert group_size("x, replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a','b'}, y") == 2
    assert group_size("x, replica_groups=[2,4]<=[4,2]T(1,0), y") == 4
    with pytest.raises(ValueError, match="The devices of this collective cannot be read: x"):
        group_size("x")


def test_text_of_something_else() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("module @jit_f { }")


SPLIT = """HloModule jit_step, num_partitions=16

%begin (p: bf16[1,512]) -> (bf16[1,512], bf16[16,512]) {
  %p = bf16[1,512]{1,0} parameter(0)
  %g.1 = bf16[16,512]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %c.1 = (bf16[1,512], bf16[16,512]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%go_on (p.1: bf16[1,512]) -> bf16[16,512] {
  %p.1 = bf16[1,512]{1,0} parameter(0)
  ROOT %g.2 = bf16[16,512]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}
}

%finish (p.2: bf16[1,512]) -> bf16[16,512] {
  %p.2 = bf16[1,512]{1,0} parameter(0)
  %g.3 = bf16[16,512]{1,0} all-gather(%p.2), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %c.3 = bf16[16,512]{1,0} custom-call(%g.3), custom_call_target="AsyncCollectiveDone"
}

%part_body (q.1: (s32[], bf16[1,512])) -> (s32[], bf16[1,512]) {
  %q.1 = (s32[], bf16[1,512]) parameter(0)
  %a.2 = bf16[16,512]{1,0} fusion(%q.1), kind=kCustom, calls=%go_on
  ROOT %t.1 = (s32[], bf16[1,512]) tuple(%q.1)
}

%layers (q: (s32[], bf16[1,512])) -> (s32[], bf16[1,512]) {
  %q = (s32[], bf16[1,512]) parameter(0)
  %a.1 = (bf16[1,512], bf16[16,512]) fusion(%q), kind=kCustom, calls=%begin
  %w.1 = (s32[], bf16[1,512]) while(%a.1), condition=%c, body=%part_body, backend_config={"known_trip_count":{"n":"4"}}
  %w.2 = (s32[], bf16[1,512]) while(%w.1), condition=%c, body=%part_body, backend_config={"known_trip_count":{"n":"6"}}
  %a.3 = bf16[16,512]{1,0} fusion(%w.2), kind=kCustom, calls=%finish
  ROOT %t = (s32[], bf16[1,512]) tuple(%q)
}

ENTRY %main (x: bf16[1,512]) -> bf16[1,512] {
  %x = bf16[1,512]{1,0} parameter(0)
  %first = (bf16[1,512], bf16[16,512]) fusion(%x), kind=kCustom, calls=%begin
  %all = (s32[], bf16[1,512]) while(%first), condition=%c, body=%layers, backend_config={"known_trip_count":{"n":"31"}}
  ROOT %out = bf16[1,512]{1,0} get-tuple-element(%all), index=1
}
"""


def test_an_asynchronous_gather_counts_once_where_it_starts() -> None:
    """It starts before the loop over layers and in it, goes on in two loops over parts, and ends: 32 gathers, not 343.

    Its bytes are those of 32 gathers of 16 x 512 bfloat16 numbers.
    """
    found = collectives(SPLIT)
    assert sorted(c.loops for c in found) == [(), (31,)]
    assert all(c.asynchronous and c.members == tuple(range(16)) for c in found)
    assert bytes_sent(found) == {"all-gather": 32 * 15 / 16 * 2 * 16 * 512}


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}, x", (0, 2, 4, 6)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}, x", (0, 4)),
        ("replica_groups=mesh['fsdp'=8] {'fsdp':(1)2}, x", (0, 4)),  # the outer part of the axis
        ("replica_groups=mesh['fsdp'=8] {'fsdp':(4)2}, x", (0, 1)),
        ("replica_groups=mesh['a'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}, x", (0, 2, 4, 6)),
        ("source_target_pairs={{0,1},{1,0}}, x", ()),
    ],
)
def test_devices_of_the_first_group(groups: str, members: tuple[int, ...]) -> None:
    assert first_group(groups) == members
    assert not members or len(members) == group_size(groups)


KERNEL = """  %{0} = bf16[2,8,256,64] custom-call(%{1}), custom_call_target="tpu_custom_call", {2}={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": 64, \\"use_fused_bwd_kernel\\": {3}}}"
}}}}, metadata={{op_name="kernel"}}"""
"""A kernel's definition, which runs over three lines, with its name, operand and whether its backward is fused."""
OPERANDS = "operand_layout_constraints={s8[1,4,4]{2,1,0}, bf16[2,8,256,64]{3,2,1,0}}, frontend_attributes"


def with_kernels(text: str) -> str:
    """Return the text with each `@name operand fused` as a kernel."""
    return re.sub(r"@(\S+) (\S+) (\w+)", lambda found: KERNEL.format(found[1], found[2], OPERANDS, found[3]), text)


KERNELS = with_kernels("""HloModule step

%local (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
@splash_mha_fwd.1 x false
  ROOT %a = f32[8] add(%x, %x), backend_config={"estimated_cycles":"100"}
}

%global (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8] parameter(0)
@splash_mha_fwd.2 x.1 false
  ROOT %b = f32[8] add(%x.1, %x.1), backend_config={"estimated_cycles":"300"}
}

%body (x.2: f32[8]) -> f32[8] {
  %x.2 = f32[8] parameter(0)
  %dkv = f32[8] conditional(%x.2), branch_computations={%local, %global}
@splash_mha_dkv.1 x.2 true
  ROOT %d = f32[8] add(%x.2, %x.2), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (x.3: f32[8]) -> f32[8] {
  %x.3 = f32[8] parameter(0)
  %scan = f32[8] while(%x.3), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"6"}}
@splash_mha_dq.1 scan false
  ROOT %e = f32[8] add(%scan, %scan)
}
""")


def test_attention_kernels_count_by_their_own_operations() -> None:
    """Two forward kernels in the branches of a conditional: one of them runs in each of six turns."""
    found = {kernel.name.partition(".")[0]: 0.0 for kernel in attention_kernels(KERNELS)}
    for kernel in attention_kernels(KERNELS):
        found[kernel.name.partition(".")[0]] += kernel.flops(seen_keys=128.0)
    score = 2 * 2 * 8 * 256 * 64 * 128  # one product: 2 B Q T H for each key
    assert found == {
        "splash_mha_fwd": 6 * 2 * score,
        "splash_mha_dkv": 6 * 5 * score,  # fused: the queries' gradient too
        "splash_mha_dq": 3 * score,
    }


def test_a_conditional_takes_the_mean_of_its_branches() -> None:
    assert estimated_cycles(KERNELS) == 6 * (1000 + (100 + 300) / 2)


@pytest.mark.parametrize(
    ("operands", "shape"),
    [
        ("s8[1,4,4]{2,1,0}, bf16[2,32,512,128]{3,2,1,0}, bf16[2,8,512,128]{3,2,1,0}", (2, 32, 512, 128)),
        ("s8[1,4,4]{2,1,0}, s8[32,4,4]{2,1,0}, bf16[32,512,128]{2,1,0}, bf16[8,512,128]{2,1,0}", (1, 32, 512, 128)),
    ],
    ids=["two", "one"],
)
def test_attention_of_a_shard_with_one_sequence(operands: str, shape: tuple[int, ...]) -> None:
    """The compiler leaves out a dimension of one sequence. The blocks of the mask have three dimensions in any case."""
    text = f"""HloModule step

ENTRY %main (p: f32[1]) -> f32[1] {{
  %p = f32[1]{{0}} parameter(0)
  ROOT %splash_mha_fwd.1 = f32[1]{{0}} custom-call(%p), custom_call_target="tpu_custom_call", \
operand_layout_constraints={{{operands}}}, frontend_attributes={{}}
}}
"""
    assert [kernel.shape for kernel in attention_kernels(text)] == [shape]
