"""What crosses slices, read from the form of text that only TPU programs for several slices have."""

from __future__ import annotations

import pytest

from cotgrpo.planning.slice_transfers import SliceTransfer, count_slices, slice_transfers


def transfer(name: str, array: str, kind: str = "ALL_REDUCE", target: str = "{1,2}x{0:7}") -> str:
    """The two instructions of a transfer."""
    attributes = (
        f'is_host_transfer=true, frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_host_transfer_rendezvous="{name}",_xla_megascale_reduce_operation="SUM",'
        f'_xla_megascale_target="{target}",_xla_megascale_transfer_type="{kind}"}}'
    )
    return (
        f"  %send.{name} = ({array}{{0:T(8,128)}}, u32[]{{:S(2)}}, token[]) send(%x, %t), channel_id=2, {attributes}\n"
        f"  %recv.{name} = ({array}{{0:T(8,128)}}, u32[]{{:S(2)}}, token[]) recv(%t), channel_id=1, {attributes}\n"
        f"  %send-done.{name} = token[] send-done(%send.{name}), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}\n'
    )


def program(of_loop: str, of_entry: str) -> str:
    return f"""HloModule jit_step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]) parameter(0)
{of_loop}}}

%test (p: (s32[], f32[8])) -> pred[] {{
  %p.1 = (s32[], f32[8]) parameter(0)
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8] parameter(0)
  %send.9 = (f32[8], u32[], token[]) send(%x, %t), channel_id=3, is_host_transfer=true
  %while.1 = (s32[], f32[8]) while(%x), condition=%test, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
{of_entry}}}
"""


def test_bytes_kinds_and_loops() -> None:
    text = program(
        transfer("a", "bf16[64,8,128]"),
        transfer("b", "f32[256]", target="{1:4}x{0:7}") + transfer("c", "s32[2]", "ALL_GATHER", "{1,3}x{0}"),
    )
    layers, head, scalars = slice_transfers(text)
    assert layers == SliceTransfer("all-reduce", 64 * 8 * 128 * 2, 2, (3,)) and layers.times() == 3
    assert head == SliceTransfer("all-reduce", 1024, 4, ()) and head.sent == 2 * 3 / 4 * 1024
    assert scalars == SliceTransfer("all-gather", 8, 2, ()) and scalars.sent == 4
    assert slice_transfers(program("", "")) == [], "a transfer to the host's memory crosses no slices"


@pytest.mark.parametrize(("numbers", "count"), [("1", 1), ("1,2", 2), ("1:8", 8), ("1,3:4", 3), ("0:1,4:7", 6)])
def test_numbers_of_slices(numbers: str, count: int) -> None:
    assert count_slices(numbers) == count


def test_text_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="This transfer between slices cannot be read: "):
        slice_transfers(program(transfer("a", "bf16[8]").replace("_transfer_type", "_kind"), ""))
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        slice_transfers("")
