"""XLA's options of train steps: which apply where, that the user's own win, and errors that name the setting."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cotgrpo.accelerators.chips import CHIPS, parse_topology
from cotgrpo.accelerators.refused_options import explain_refused_option
from cotgrpo.compiler_options.measured import CHIP_NAMES, MEASURED, CompilerConfig, chip_name, options_for, options_line
from cotgrpo.config import Config, ConfigError, DataConfig, GrpoConfig, StudentConfig, TokenizerConfig
from cotgrpo.config.files import load_config, parse_config, save_config
from cotgrpo.planning.stage_plan import StagePlan
from cotgrpo.planning.tables import plan_table
from cotgrpo.planning.tpu_compile import compile_step, tpu_devices
from cotgrpo.sharding import jit_step, make_mesh, options_on

WINDOWED = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
COPIES = "xla_cpu_copy_insertion_use_region_analysis"
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def echo(state: Any, batch: Any) -> Any:
    return state, batch


def test_every_option_has_a_reason_and_a_known_chip() -> None:
    assert len({(option.name, option.platform, option.chips) for option in MEASURED}) == len(MEASURED)
    for option in MEASURED:
        assert option.name.startswith("xla_") and len(option.reason) > 20
        assert option.platform in ("cpu", "gpu", "tpu")
        assert set(option.chips) <= set(CHIPS)
    assert set(CHIP_NAMES.values()) == {name for name, chip in CHIPS.items() if chip.platform == "tpu"}


@pytest.mark.parametrize(
    ("place", "given", "expected"),
    [
        (("cpu",), None, {COPIES: True}),
        (("gpu", "", 8), None, None),
        (("tpu", "v5e", 8), None, {WINDOWED: 1_000_000}),
        (("tpu", "v5e", 1), None, None),
        (("tpu", "", 8), None, {WINDOWED: 1_000_000}),  # a chip that is not in the table
        (("tpu", "v5e", 8), {WINDOWED: 3}, {WINDOWED: 3}),
        (("tpu", "v5e", 8), {WINDOWED: None}, None),
        (("tpu", "v5e", 8), {"xla_a": 1}, {WINDOWED: 1_000_000, "xla_a": 1}),
        (("cpu",), {"xla_a": False}, {COPIES: True, "xla_a": False}),
    ],
)
def test_options_of_a_place(
    place: tuple[Any, ...],
    given: dict[str, Any] | None,
    expected: dict[str, Any] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    found = options_for(*place, given=given)
    subset = {name: found.get(name) for name in expected} if found and expected else found
    assert subset == expected, found
    if given and None in given.values():
        assert WINDOWED not in (found or {})


@pytest.mark.parametrize("variable", ["LIBTPU_INIT_ARGS", "XLA_FLAGS"])
def test_what_the_environment_names_is_left_to_it(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, f"--xla_other=1 --{WINDOWED}=0")
    assert WINDOWED not in (options_for("tpu", "v5e", 8) or {})
    assert (options_for("tpu", "v5e", 8, {WINDOWED: 5}) or {})[WINDOWED] == 5


def test_one_setting_turns_them_off() -> None:
    assert CompilerConfig(measured=False).given("tpu")[WINDOWED] is None
    assert options_for("tpu", "v5e", 8, CompilerConfig(measured=False).given("tpu")) is None
    own = CompilerConfig(measured=False, options={"xla_a": 2})
    assert options_for("tpu", "v5e", 8, own.given("tpu")) == {"xla_a": 2}
    assert CompilerConfig().given("tpu") == {}


@pytest.mark.parametrize("on_mesh", [False, True])
def test_jit_step_takes_options_with_and_without_a_mesh(on_mesh: bool) -> None:
    mesh = make_mesh(data=-1) if on_mesh else None
    assert options_on(mesh) == options_for("cpu")
    run = lambda **options: jit_step(echo, mesh, compiler_options=options)(jnp.ones((8, 4)), jnp.ones((8, 4)))
    jax.block_until_ready(run(xla_backend_optimization_level=1))
    message = r"compiler.options: .* no option xla_no_such_option; take .* out of"
    with pytest.raises(ConfigError, match=message), explain_refused_option():
        run(xla_no_such_option=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"xla_backend_optimization_level": "x"},
            "'x' is not a valid int32 value; take xla_b.* out of",
        ),
        ({COPIES: "maybe"}, "'maybe' is not a valid bool.* or set compiler.measured to false"),
    ],
)
def test_a_refused_value_names_the_setting(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error, explain_refused_option():
        jit_step(echo, compiler_options=options)(jnp.ones(3), jnp.ones(3))
    assert "\n" not in str(error.value)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="something else"), explain_refused_option():
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{foo: 1}", "compiler.options must have names that begin with xla_, without dashes, got 'foo'"),
        ("{--xla_a: 1}", "without dashes, got '--xla_a'"),
        ("{1: 2}", "names that begin with xla_"),
        ("{xla_a: [1]}", "a number, true, false or a word as xla_a"),
        ("3", "compiler.options"),
    ],
)
def test_options_that_cannot_be_used_are_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_config(["--compiler.options", text])
    assert "\n" not in str(error.value)


def test_settings_are_saved_and_read(tmp_path: Path) -> None:
    config = parse_config(
        ["--compiler.measured", "false", "--compiler.options", "{xla_a: true, xla_b: 3, xla_c: AUTO}"]
    )
    assert config.compiler == CompilerConfig(False, {"xla_a": True, "xla_b": 3, "xla_c": "AUTO"})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").compiler == config.compiler


TINY = Config(
    student=StudentConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64),
    tokenizer=TokenizerConfig(vocab_size=64),
    data=DataConfig(seq_len=16),
    grpo=GrpoConfig(batch_size=8),
)


def test_a_plan_names_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    topology = parse_topology("v5e:2x4")
    plan = StagePlan(TINY, "grpo", topology, {"fsdp": 8})
    figures = plan.figures(by_arithmetic=True)
    assert figures["compiler_options"] == options_for("tpu", "v5e", 8) != {}
    cells = [cell for column in plan_table(figures, topology).columns for cell in column.cells]
    assert options_line(figures["compiler_options"]) in cells
    off = parse_config(["--compiler.measured", "false"]).compiler
    off_plan = StagePlan(dataclasses.replace(TINY, compiler=off), "grpo", topology, {"fsdp": 8})
    assert off_plan.compiler_options == {}


@needs_libtpu
def test_devices_of_every_chip_are_known() -> None:
    for topology in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
        kinds = {device.device_kind for device in tpu_devices(parse_topology(topology))}
        assert {chip_name(kind) for kind in kinds} == {topology.partition(":")[0]}


@needs_libtpu
def test_a_plan_compiles_with_the_users_options() -> None:
    """The compiler refuses an unknown name before it compiles anything."""
    plan = StagePlan(TINY, "grpo", parse_topology("v5e:2x2"), {"fsdp": 4})
    step, arguments = plan.step()
    mesh = make_mesh(devices=tpu_devices(plan.topology), fsdp=4)
    with pytest.raises(ConfigError, match="no option xla_no_such_option"):
        compile_step(step, mesh, arguments, {"xla_no_such_option": True})
