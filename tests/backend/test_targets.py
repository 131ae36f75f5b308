"""The table of targets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pi05c.backend.targets import TARGETS, Flavour, parse_targets, target_of, unsupported
from pi05c.graph.errors import UsageError


def test_names_of_the_table_are_unique() -> None:
    names = [name for target in TARGETS for name in (target.name, *target.aliases)]
    assert len(names) == len(set(names))
    assert all(target.name == "sm{}{}".format(*target.compute_capability) for target in TARGETS)


@pytest.mark.parametrize("spelling", ["sm89", "SM_89", "8.9", "rtx4090", "RTX 4090", "rtx-4090", "l4"])
def test_spellings_of_one_target(spelling: str) -> None:
    (target,) = parse_targets(spelling)
    assert target.compute_capability == (8, 9)


def test_a_list_keeps_its_order_and_holds_each_target_once() -> None:
    assert [target.name for target in parse_targets("sm120, rtx4090,sm89,thor")] == ["sm120", "sm89", "sm110"]


def test_unknown_targets_are_named_together_with_the_known() -> None:
    with pytest.raises(
        UsageError, match=r"unknown target gtx1080, sm99: choose among .*sm110 \(thor"
    ) as error:
        parse_targets("sm89,gtx1080,sm99")
    assert error.value.exit_code == 2


@pytest.mark.parametrize("text", ["", " , "])
def test_an_empty_list_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no target is given"):
        parse_targets(text)


@pytest.mark.parametrize(
    ("name", "dtypes", "lacks"),
    [
        ("orin", ["float16", "float8e4m3fn"], "FP8"),
        ("sm86", ["fp8"], "FP8"),
        ("sm89", ["float8e4m3fn", "float4e2m1"], "FP4"),
        ("h100", ["fp4"], "FP4"),
        ("sm75", ["bf16"], "BF16"),
        ("a100", ["fp8", "fp4"], "FP8 and no FP4"),
    ],
)
def test_what_a_target_lacks_is_said_with_what_it_has(name: str, dtypes: list[str], lacks: str) -> None:
    (target,) = parse_targets(name)
    reason = unsupported(target, dtypes)
    assert reason is not None
    assert f"has no {lacks} tensor cores; it has FP16" in reason
    assert name in reason


@pytest.mark.parametrize("name", ["sm89", "h100", "thor", "sm120", "spark"])
def test_fp8_is_there_from_ada_on(name: str) -> None:
    (target,) = parse_targets(name)
    assert unsupported(target, ["float16", "float8e4m3fn", "float32", "int64", "bool"]) is None


@pytest.mark.parametrize("name", ["b200", "b300", "thor", "sm120", "gb10"])
def test_fp4_is_there_from_blackwell_on(name: str) -> None:
    (target,) = parse_targets(name)
    assert unsupported(target, ["float4e2m1"]) is None


def test_the_table_agrees_with_the_installed_tensorrt_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    known = {name.lower() for name in rtx.ComputeCapability.__members__ if name.startswith("SM")}
    assert {target.name for target in TARGETS if Flavour.TENSORRT_RTX in target.flavours} == known


def test_target_of_a_gpu() -> None:
    target = target_of((11, 0))
    assert target is not None
    assert target.name == "sm110"
    assert target_of((6, 1)) is None


def test_the_table_needs_neither_tensorrt_nor_onnx() -> None:
    code = "import sys, pi05c.backend.targets; print({'onnx', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
