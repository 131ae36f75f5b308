"""The cost model: totals of the full-size graph derived by hand, small graphs, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from full_size import write_full_size
from onnx import helper, numpy_helper

from pi05c import cli
from pi05c.backend.devices import DEVICES, find_device
from pi05c.cost import cost_of, grouped, seconds, total
from pi05c.graph.errors import Pi05cError
from pi05c.kernels import Kernel

VIEWS, PATCHES, TEXT, STEPS = 3, 256, 200, 10
TOKENS = VIEWS * PATCHES + TEXT
VISION = (27, 1152, 4304)
PREFIX = (18, 2048, 16384)
EXPERT = (18, 1024, 4096)
QUERY, KEY = 8 * 256, 256


def gemma_layer(width: int, mlp: int) -> int:
    """Parameters of the linears of one Gemma layer."""
    return width * (QUERY + 2 * KEY) + QUERY * width + 3 * width * mlp


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kernel, ...]:
    return cost_of(write_full_size(tmp_path_factory.mktemp("full_size")))


def part_of(kernels: tuple[Kernel, ...], part: str, kind: str = "linear") -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.part == part and kernel.kind == kind]


def test_vision_linears(full_size: tuple[Kernel, ...]) -> None:
    layers, width, mlp = VISION
    parameters = layers * (4 * width**2 + 2 * width * mlp) + width * PREFIX[1]
    flops = total(part_of(full_size, "vision")).flops
    assert flops == 2 * VIEWS * PATCHES * parameters
    assert flops == pytest.approx(0.63e12, rel=0.01)


def test_prefix_linears_but_what_only_a_dead_output_needs(full_size: tuple[Kernel, ...]) -> None:
    layers, width, mlp = PREFIX
    needed = (layers - 1) * gemma_layer(width, mlp) + 2 * width * KEY
    flops = total(part_of(full_size, "prefix")).flops
    assert flops == 2 * TOKENS * needed
    assert flops == pytest.approx(3.84e12 * (1 - 0.055), rel=0.01)


def test_each_step_reads_the_expert_and_its_modulation(full_size: tuple[Kernel, ...]) -> None:
    layers, width, mlp = EXPERT
    expert = layers * gemma_layer(width, mlp)
    assert expert == pytest.approx(311e6, rel=0.01)
    modulation = (2 * layers + 1) * width * 3 * width
    assert modulation == pytest.approx(116.5e6, rel=0.01)
    ends = 2 * 32 * width + 2 * width**2  # action_in_proj, action_out_proj, and the time MLP
    bytes_a_step = total(part_of(full_size, "denoise")).weight_bytes / STEPS
    assert bytes_a_step == pytest.approx(2 * (expert + modulation + ends), rel=1e-3)


def linear(dtype: int = onnx.TensorProto.FLOAT, rows: int | str = 8) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", dtype, [rows, 16])
    y = helper.make_tensor_value_info("y", dtype, [rows, 32])
    weight = helper.make_tensor("w", dtype, [16, 32], [0.5] * 512)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def write(proto: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    onnx.save(proto, folder / name)
    return folder / name


def test_one_linear(tmp_path: Path) -> None:
    (kernel,) = cost_of(write(linear(), tmp_path))
    assert kernel.flops == 2 * 8 * 16 * 32
    assert kernel.weight_bytes == 4 * 16 * 32
    assert kernel.activation_bytes == 4 * (8 * 16 + 8 * 32)
    h100 = find_device("h100")
    moved = kernel.weight_bytes + kernel.activation_bytes
    assert seconds(kernel, h100) == max(kernel.flops / h100.rate("fp32"), moved / h100.bandwidth)


def test_half_the_bytes_in_float16(tmp_path: Path) -> None:
    wide = total(cost_of(write(linear(), tmp_path, "a.onnx")))
    narrow = total(cost_of(write(linear(onnx.TensorProto.FLOAT16), tmp_path, "b.onnx")))
    assert narrow.flops == wide.flops
    assert 2 * narrow.bytes == wide.bytes


def test_a_loop_counts_its_steps(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[8,16] x) => (float[8,16] y) <int64 steps = {7}> {
          y = Loop(steps, , x) <body = step (int64 i, bool again, float[8,16] a) => (bool keep, float[8,16] b) {
            keep = Identity(again)
            b = MatMul(a, w)
          }>
        }"""
    )
    weight = numpy_helper.from_array(
        numpy_helper.to_array(helper.make_tensor("w", 1, [16, 16], [0.5] * 256)), "w"
    )
    model.graph.initializer.append(weight)
    cost = total(cost_of(write(model, tmp_path)))
    assert cost.flops == 7 * 2 * 8 * 16 * 16
    assert cost.weight_bytes == 7 * 4 * 16 * 16


def test_groups_add_up(full_size: tuple[Kernel, ...]) -> None:
    device = find_device("thor")
    everything = total(full_size, device)
    for by in (("part",), ("kind",), ("part", "kind", "dtype")):
        groups = grouped(full_size, device, by=by)
        assert sum(group.cost.flops for group in groups) == everything.flops
        assert sum(group.cost.bytes for group in groups) == everything.bytes
        assert sum(group.cost.seconds or 0 for group in groups) == pytest.approx(everything.seconds)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_narrower_formats_are_no_slower(device) -> None:  # type: ignore[no-untyped-def]
    rates = [device.rate(number_format) for number_format in ("fp32", "fp16", "fp8", "fp4")]
    assert rates == sorted(rates)
    assert device.source


def test_dynamic_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Pi05cError, match="rows"):
        cost_of(write(linear(rows="rows"), tmp_path))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(linear(), tmp_path)
    assert cli.main(["cost", str(path), "--target", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["name"] == "h100"
    assert cli.main(["cost", str(path), str(path), "--target", "h100"]) == 0
    assert "linear" in capsys.readouterr().out
    assert cli.main(["cost", str(path), "--passes", "exact"]) == 0
    assert "dedupe" in capsys.readouterr().out


def test_unknown_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost", str(write(linear(), tmp_path)), "--target", "abacus"]) == 2
    error = capsys.readouterr().err
    assert "abacus" in error
    assert "h100" in error
