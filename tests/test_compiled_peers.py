"""`benchmarks/compiled_peers.py`: what it reads from compiled text, what it keeps, and its table."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROW = "qwen3-0.6b-v5e-2x4"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compiled_peers")


def figures(seconds: float, sent: float, temporaries: float, libtpu: str = "0.0.52") -> dict[str, Any]:
    versions = {"jax": "0.12.0", "libtpu": libtpu, "maxtext": "0.2.5"}
    sizes = {"compute_seconds": seconds, "sent_bytes": sent, "temporary_bytes": temporaries}
    return sizes | {"sent_bytes_by_kind": {"all-gather": sent}, "argument_bytes": 1, "versions": versions}


def keep(folder: pathlib.Path, flags: str, **sides: dict[str, Any]) -> None:
    for side, found in sides.items():
        (folder / f"{ROW}-{flags}-{side}.json").write_text(json.dumps(found))


def test_the_table_has_both_sides_and_their_ratio(
    peers: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A side that is missing is a dash, and programs of different compilers are not compared in silence."""
    keep(tmp_path, "default", cotgrpo=figures(0.9, 2**30, 2**31), maxtext=figures(1.0, 2**31, 2**31))
    keep(tmp_path, "no-loops", cotgrpo=figures(0.9, 2**30, 2**31))
    assert peers.main(["--table", "--kept", str(tmp_path), "--json", str(tmp_path / "table.json")]) == 0
    both, ours = capsys.readouterr().out.splitlines()[2:]
    for cell in ("0.90 / 1.00 / **0.90**", "1.00 / 2.00 / **0.50**", "2.00 / 2.00 / **1.00**", "0.12.0, 0.0.52, 0.2.5"):
        assert cell in both
    assert "0.90 / - / -" in ours
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["row"], row["flags"]) for row in rows] == [(ROW, "default"), (ROW, "no-loops")]
    assert rows[0]["ratios"] == {"compute_seconds": 0.9, "sent_bytes": 0.5, "temporary_bytes": 1.0}
    keep(tmp_path, "default", maxtext=figures(1.0, 2**31, 2**31, libtpu="0.0.50"))
    peers.main(["--table", "--kept", str(tmp_path)])
    assert "differ: compile again" in capsys.readouterr().out.splitlines()[2]


def test_an_interrupted_run_goes_on(peers: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is kept is not compiled again, and what fails is an exit code and a line."""
    python = tmp_path / "python"
    calls, kept = tmp_path / "calls", tmp_path / "kept"
    found = json.dumps(figures(1.0, 1.0, 1.0))
    python.write_text(
        f"#!{sys.executable}\nimport sys, pathlib\n"
        f"side, out = sys.argv[-2:]\nopen({str(calls)!r}, 'a').write(side + '\\n')\n"
        "if side == 'maxtext' and not pathlib.Path(out).parent.exists(): sys.exit(3)\n"
        f"pathlib.Path(out).parent.mkdir(exist_ok=True)\npathlib.Path(out).write_text({found!r})\n"
    )
    python.chmod(0o755)
    run = lambda *more: peers.main([ROW, "--flags", "default", "--maxtext", str(python), "--kept", str(kept), *more])
    assert run("--side", "maxtext") == 1
    assert f"{ROW}, default, maxtext did not compile (exit code 3)." in capsys.readouterr().err
    assert run() == 0 and run() == 0
    assert calls.read_text().split() == ["maxtext", "cotgrpo", "maxtext"]
    assert run("--again", "--side", "cotgrpo") == 0
    assert calls.read_text().split()[3:] == ["cotgrpo"]


def test_maxtext_has_no_step_for_lora(peers: Any, tmp_path: pathlib.Path) -> None:
    arguments = ["llama3-8b-lora-v5e-4x4", "--side", "maxtext", "--maxtext", "/nowhere", "--kept", str(tmp_path)]
    assert peers.main(arguments) == 0
    assert not list(tmp_path.iterdir())


PARAMETERS = {"llama-3-8b": 8_030_261_248, "gemma-3-1b": 999_885_952, "qwen3-0.6b": 596_049_920}


def test_our_side_of_every_row(peers: Any) -> None:
    """The plan has the row's model, tokens and options of XLA, and none that were measured to help."""
    for row in peers.ROWS.values():
        plan = peers.plan_of(row, peers.FLAGS["no-loops"])
        assert plan.decoder.num_params() == PARAMETERS[row.model]
        assert (plan.decoder.remat, plan.decoder.attention, plan.decoder.param_dtype) == (
            "full", "splash", row.param_dtype,
        )  # fmt: skip
        assert plan.mesh_sizes == {"data": 1, "fsdp": row.devices, "tensor": 1, "context": 1}
        assert plan.work.tokens == row.sequences * row.seq_len
        assert plan.config.compiler.given("tpu") == peers.FLAGS["no-loops"]
        left_out = peers.plan_of(row, peers.FLAGS["default"]).config.compiler.given("tpu")
        assert set(left_out.values()) == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["qwen"], "There is no row qwen"), ([ROW], "--maxtext is missing")],
)
def test_wrong_arguments(peers: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(arguments)
    assert message in capsys.readouterr().err


TEXT = """HloModule step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="jit(step)/LOOP"}
  %y = f32[8]{0} fusion(%sum), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[], f32[8]) tuple(%p, %y)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %more = pred[] custom-call(%p), custom_call_target="more"
}

ENTRY %main (a: f32[2]) -> f32[8] {
  %a = f32[2]{0} parameter(0)
  %g = f32[8]{0} all-gather(%a), replica_groups={{0,1,2,3}}, dimensions={0}, metadata={op_name="jit(step)/gather"}
  %z = f32[8]{0} fusion(%g), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"1000"}
  %w = (s32[], f32[8]) while(%z), condition=%condition, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize(("name", "tiles", "times"), [("shard_map/while/body", 5, 5), ("while/body", 5, 4)])
def test_figures_of_a_program(peers: Any, name: str, tiles: int, times: int) -> None:
    """By hand: a gather of 32 bytes, and an all-reduce of 32 in a loop of unknown length, among 4 devices."""
    memory = SimpleNamespace(
        temp_size_in_bytes=10, output_size_in_bytes=7, alias_size_in_bytes=5, argument_size_in_bytes=3
    )
    program = SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: TEXT.replace("LOOP", name))
    found = peers.figures_of(program, 1e3, lambda in_loss: tiles if in_loss else None)
    assert found["sent_bytes_by_kind"] == {"all-gather": 24.0, "all-reduce": times * 48.0}
    assert found["sent_bytes"] == 24.0 + times * 48.0
    assert found["compute_seconds"] == pytest.approx((1000 + tiles * 100) / 1e3)
    assert (found["temporary_bytes"], found["argument_bytes"]) == (12, 3)
    assert "jax" in found["versions"]


def test_the_page_has_the_table_of_the_results(peers: Any) -> None:
    table = peers.markdown(peers.table_rows(peers.KEPT))
    assert table.count("\n") > 2, "results are committed"
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert table in page, "put the table of `python benchmarks/compiled_peers.py --table` into docs/scaling.md"
