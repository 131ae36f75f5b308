"""`pi05c cost`: counts against sums by hand on small graphs, and against the full-size model's arithmetic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from full_size import write_full_size
from onnx import numpy_helper
from small_policy import write_policy

from pi05c import cli
from pi05c.backend.devices import DEVICES, Device, find_device
from pi05c.backend.targets import TARGETS
from pi05c.cost import AssumedRanges, cost_after_each_pass, cost_of, grouped, seconds, total
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import Model, load, model_from_proto
from pi05c.graph.weights import Stored, Weight
from pi05c.kernels import Kernel, kernels_of
from pi05c.passes import PRESETS, REGISTRY

GPU = Device("gpu", "a GPU", "sm90", {"fp32": 1e9, "fp16": 4e9, "fp8": 8e9}, 1e6, "made up")


def model_of(text: str, weights: Mapping[str, Any] | None = None, opset: int = 21) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]>\n{text}')
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    return model_from_proto(proto)


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


def test_a_linear_with_its_pointwise_operators_is_one_kernel() -> None:
    model = model_of(
        "g (float[4,8] x) => (float[4,16] y) { m = MatMul(x, w) a = Add(m, b) y = Relu(a) }",
        {"w": zeros(8, 16), "b": zeros(16)},
    )
    (kernel,) = kernels_of(model)
    assert kernel == Kernel(
        name="n0",
        part="prefix",
        kind="linear",
        dtype="float32",
        flops=2 * 4 * 8 * 16,
        vector_flops=2 * 4 * 16,
        weight_bytes=4 * (8 * 16 + 16),
        activation_bytes=4 * (4 * 8 + 4 * 16),
        operators=3,
    )


def test_a_value_is_written_once_and_read_by_each_kernel_that_needs_it() -> None:
    model = model_of(
        "g (float[4,8] x) => (float[4,8] y) { a = MatMul(x, w) b = MatMul(a, w) c = MatMul(a, w) y = Add(b, c) }",
        {"w": zeros(8, 8)},
    )
    first, second, third = kernels_of(model)
    activation = 4 * 4 * 8
    assert first.activation_bytes == 2 * activation  # x, a
    assert second.activation_bytes == 2 * activation  # a, b
    assert third.activation_bytes == 3 * activation  # a, b, y: c stays inside
    assert [kernel.weight_bytes for kernel in (first, second, third)] == [256] * 3
    assert third.operators == 2


def test_weights_count_as_stored_and_what_depends_on_constants_alone_costs_nothing() -> None:
    model = model_of(
        "g (float[4,8] x) => (float[4,16] y) { f = Cast<to=1>(w) t = Transpose<perm=[1,0]>(f) y = MatMul(x, t) }",
        {"w": zeros(16, 8, dtype=ml_dtypes.bfloat16)},
    )
    (kernel,) = kernels_of(model)
    assert (kernel.weight_bytes, kernel.operators, kernel.dtype) == (2 * 16 * 8, 1, "float32")


def test_a_quantized_product_computes_and_moves_what_its_quantizers_store() -> None:
    fp8 = ml_dtypes.float8_e4m3fn
    model = model_of(
        """g (float16[4,32] x) => (float16[4,16] y) {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(w, s, z)
            y = MatMul(d, e) }""",
        {"w": zeros(32, 16, dtype=fp8), "s": np.float16(1), "z": np.asarray(0, fp8)},
    )
    quantize, product = kernels_of(model)
    assert (quantize.kind, quantize.activation_bytes) == ("elementwise", 2 * 4 * 32 + 4 * 32)
    assert product.dtype == "float8e4m3fn"
    assert product.activation_bytes == 4 * 32 + 2 * 4 * 16
    assert product.weight_bytes == 32 * 16 + 2  # the codes, and the scale that both sides share
    assert product.operators == 2  # the DequantizeLinear of the weight is part of the engine


def test_fp4_weights_count_half_a_byte_and_a_scale_for_each_block() -> None:
    model = model_of(
        """g (float16[4,32] x) => (float16[4,16] y) {
            b = DequantizeLinear(bs, t) e = DequantizeLinear<axis=0, block_size=16>(w, b) y = MatMul(x, e) }""",
        {
            "w": zeros(32, 16, dtype=ml_dtypes.float4_e2m1fn),
            "bs": zeros(2, 16, dtype=ml_dtypes.float8_e4m3fn),
            "t": np.float16(1),
        },
        opset=23,
    )
    (kernel,) = kernels_of(model)
    assert kernel.dtype == "float16 x float4e2m1"
    assert kernel.weight_bytes == 32 * 16 // 2 + 2 * 16
    assert seconds(kernel, GPU) == pytest.approx(
        max(kernel.flops / 4e9, (288 + kernel.activation_bytes) / 1e6)
    )


def test_a_cut_is_read_in_part_and_a_transpose_moves_everything() -> None:
    model = model_of(
        """g (float[4,8] x) => (float[8,4] y, float[4,6] z) {
            a = Relu(x) l, r = Split<axis=1>(a, sizes) y = Transpose<perm=[1,0]>(a) z = MatMul(r, w) }""",
        {"sizes": np.array([2, 6]), "w": zeros(6, 6)},
    )
    relu, transpose, product = kernels_of(model)
    assert relu.activation_bytes == 2 * 4 * 8 * 4
    assert (transpose.kind, transpose.activation_bytes) == ("data movement", 2 * 4 * 8 * 4)
    assert product.activation_bytes == 2 * 4 * 6 * 4


def test_a_gather_reads_the_rows_that_it_returns() -> None:
    model = model_of("g (int64[5] i) => (float[5,8] y) { y = Gather(table, i) }", {"table": zeros(1000, 8)})
    (kernel,) = kernels_of(model)
    assert kernel.weight_bytes == 5 * 8 * 4
    assert kernel.activation_bytes == 5 * 8 + 5 * 8 * 4


LOOP = """
g (float[4,8] x) => (float[4,8] y) {
    y = Loop(limit, go, x) <body = b (int64 i, bool c, float[4,8] s) => (bool k, float[4,8] n) {
        k = Identity(c)
        m = MatMul(s, w)
        n = Add(s, m)
    }>
}"""


def test_a_loops_body_counts_as_often_as_it_runs_with_its_weights() -> None:
    model = model_of(LOOP, {"limit": np.array(7), "go": np.array(True), "w": zeros(8, 8)})
    kernels = kernels_of(model)
    (kernel,) = [kernel for kernel in kernels if kernel.kind == "linear"]
    assert kernel.times == 7
    assert kernel.activation_bytes == 2 * 4 * 8 * 4  # the state before and after
    cost = total(kernels)
    assert cost.flops == 7 * 2 * 4 * 8 * 8
    assert cost.weight_bytes == 7 * 8 * 8 * 4
    assert (cost.kernels, cost.operators, cost.seconds) == (7, 14, None)


def test_a_loop_of_unknown_length_is_refused_by_name() -> None:
    text = LOOP.replace("(float[4,8] x)", "(float[4,8] x, int64 limit)", 1)
    with pytest.raises(Pi05cError, match=r"how often Loop 'n0' runs .*give it a constant trip count"):
        kernels_of(model_of(text, {"go": np.array(True), "w": zeros(8, 8)}))


def test_the_slowest_of_product_vectors_and_memory_counts() -> None:
    kernel = Kernel("k", "vision", "linear", "float16", flops=8_000_000, vector_flops=1000, weight_bytes=1000)
    assert seconds(kernel, GPU) == pytest.approx(2e-3)
    assert seconds(replace(kernel, dtype="float8e4m3fn"), GPU) == pytest.approx(1e-3)
    assert seconds(replace(kernel, dtype="float8e4m3fn", activation_bytes=4000), GPU) == pytest.approx(5e-3)
    assert seconds(replace(kernel, dtype="bfloat16", times=3), GPU) == pytest.approx(3 * 8e-3)
    assert seconds(replace(kernel, flops=0, weight_bytes=0), GPU) == pytest.approx(1e-6)


def test_groups_sum_to_the_total() -> None:
    kernels = [
        Kernel("a", "denoise", "softmax", "float32", vector_flops=5, activation_bytes=3, times=2),
        Kernel("b", "vision", "linear", "float16", flops=7, weight_bytes=11, operators=4),
        Kernel("c", "vision", "linear", "float32", flops=1),
    ]
    assert [(g.part, g.kind, g.dtype) for g in grouped(kernels)] == [
        ("vision", "linear", "float16"),
        ("vision", "linear", "float32"),
        ("denoise", "softmax", "float32"),
    ]
    vision, denoise = grouped(kernels, GPU, by=("part",))
    everything = total(kernels, GPU)
    assert vision.cost.flops == 8
    assert denoise.cost.bytes == 6
    assert vision.cost.operators + denoise.cost.operators == everything.operators == 7
    assert vision.cost.seconds + denoise.cost.seconds == pytest.approx(everything.seconds)


def test_shapes_that_a_pass_left_open_are_inferred() -> None:
    model = model_of(
        "g (float[4,8] x) => (float[4,8] y) { a = MatMul(x, w) y = Relu(a) }", {"w": zeros(8, 8)}
    )
    closed = kernels_of(model)
    for node in model.graph.nodes:
        node.outputs[0].shape = None
    model.graph.outputs[0].shape = [4, 8]
    assert kernels_of(model) == closed


# --- the full-size model, against arithmetic on its sizes (width, MLP, heads as its paper and configuration give them)

LAYERS_VISION, VISION, VISION_MLP, TOKENS = 27, 1152, 4304, 3 * 256
LAYERS, PREFIX, PREFIX_MLP, EXPERT, EXPERT_MLP = 18, 2048, 16384, 1024, 4096
HEADS, HEAD, ROWS_PREFIX, HORIZON, ACTION, STEPS = 8, 256, 3 * 256 + 200, 10, 32, 10
BFLOAT16, FLOAT32 = 2, 4  # bytes

KEYS_VALUES = PREFIX * 2 * HEAD
LLM_LAYER = 2 * PREFIX * HEADS * HEAD + KEYS_VALUES + 3 * PREFIX * PREFIX_MLP
EXPERT_WEIGHTS = LAYERS * (2 * EXPERT * HEADS * HEAD + EXPERT * 2 * HEAD + 3 * EXPERT * EXPERT_MLP)
ADARMS_WEIGHTS = (2 * LAYERS + 1) * (EXPERT + 1) * 3 * EXPERT
ACTION_WEIGHTS = (ACTION + 1) * EXPERT + (EXPERT + 1) * ACTION
TIME_WEIGHTS = 2 * (EXPERT + 1) * EXPERT


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_full_size(tmp_path_factory.mktemp("full_size"))


@pytest.fixture
def unread_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Weight, region: object) -> None:
        raise AssertionError(f"{self.shape} was read")

    monkeypatch.setattr(Stored, "read", read)


def test_the_full_size_model_agrees_with_its_arithmetic(full_size: Path, unread_weights: None) -> None:
    kernels = cost_of(full_size)
    of = {(g.part, g.kind): g.cost for g in grouped(kernels, by=("part", "kind"))}
    layers = LAYERS_VISION * (4 * VISION * VISION + 2 * VISION * VISION_MLP)
    assert of["vision", "linear"].flops == 2 * TOKENS * (layers + VISION * PREFIX)
    assert 2 * TOKENS * layers == pytest.approx(0.63e12, rel=0.01)
    # The last prefix layer needs no more than its keys and values; with all of it the LLM's linears are 3.84 TFLOP.
    alive = (LAYERS - 1) * LLM_LAYER + KEYS_VALUES
    assert of["prefix", "linear"].flops == 2 * ROWS_PREFIX * alive
    assert pytest.approx(3.84e12, rel=0.002) == 2 * ROWS_PREFIX * LAYERS * LLM_LAYER
    products = 2 * 2 * ROWS_PREFIX * ROWS_PREFIX * HEADS * HEAD
    assert of["prefix", "attention"].flops == (LAYERS - 1) * products

    assert pytest.approx(311e6, rel=0.002) == EXPERT_WEIGHTS
    assert pytest.approx(116.5e6, rel=0.001) == ADARMS_WEIGHTS
    read_each_step = EXPERT_WEIGHTS + ADARMS_WEIGHTS + ACTION_WEIGHTS + TIME_WEIGHTS
    step_size = FLOAT32  # dt: the accumulation joins the last linear
    assert of["denoise", "linear"].weight_bytes == STEPS * (BFLOAT16 * read_each_step + step_size)
    attended = ROWS_PREFIX + HORIZON
    assert of["denoise", "attention"].flops == STEPS * LAYERS * 2 * 2 * HORIZON * attended * HEADS * HEAD


# --- passes


def test_each_pass_of_the_default_pipeline_has_its_cost(tiny_model: Path) -> None:
    states = cost_after_each_pass(tiny_model, "default")
    assert [state.name for state in states] == ["", *PRESETS["default"]]
    h100 = find_device("h100")
    first, last = (total(state.kernels, h100) for state in (states[0], states[-1]))
    assert last.weight_bytes < first.weight_bytes
    assert first.seconds is not None
    assert last.seconds is not None
    assert last.seconds < first.seconds
    parts = [{kernel.part for kernel in state.kernels} for state in states]
    assert parts == [{"vision", "prefix", "denoise"}] * len(states)
    by_name = {state.name: state.kernels for state in reversed(states)}
    weights = [
        total(k for k in by_name[name] if k.part == "denoise" and k.kind == "linear").weight_bytes
        for name in ("", "fuse_denoise_loop")
    ]
    width, layers = 64, 3  # of the expert, by its config.json
    adarms, time = (2 * layers + 1) * (width + 1) * 3 * width, 2 * (width + 1) * width
    gates = 2 * layers * width * FLOAT32  # rows of the tables, which residuals multiply by
    assert weights[0] - weights[1] == pytest.approx(STEPS * ((adarms + time) * BFLOAT16 - gates), rel=2e-3)
    dtypes = {kernel.dtype for kernel in states[-1].kernels if kernel.kind == "linear"}
    assert "float8e4m3fn" in dtypes


def test_assumed_ranges_leave_constants_as_they_are() -> None:
    model = model_of("g (float[2] x) => (float[2] y) { y = Mul(x, w) }", {"w": np.float32([3, -5])})
    activation, weight = model.graph.nodes[0].inputs
    assert AssumedRanges().amax(activation) == 1.0
    assert AssumedRanges().amax(weight) == 5.0


# --- devices


def test_every_device_is_a_target_with_the_formats_of_its_tensor_cores() -> None:
    targets = {target.name: target for target in TARGETS}
    for device in DEVICES:
        formats = set(device.rates) - {"fp32", "tf32"}
        assert formats == set(targets[device.target].formats), device.name
        assert device.name in targets[device.target].aliases
        assert device.rates["fp32"] <= device.rates["tf32"] <= device.rates["fp16"]
        assert device.source


def test_the_documents_table_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cost.md").read_text()
    for device in DEVICES:
        row = next(line for line in text.splitlines() if line.startswith(f"| {device.name} |"))
        figures = [*device.rates.values(), device.bandwidth * 1e3]
        assert [f"{figure / 1e12:.6g}" for figure in figures] == [
            cell for cell in row.split(" | ")[3:-1] if cell != "-"
        ]
        assert row.endswith(f"{device.source} |")


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("H100", "h100"), ("rtx 5090", "rtx5090"), ("sm120", "rtx5090"), ("jetson-thor", "thor")],
)
def test_a_device_is_found_by_its_names(spelling: str, name: str) -> None:
    assert find_device(spelling).name == name


@pytest.mark.parametrize("text", ["rtx4060", "sm75", "h100,thor", "nonsense"])
def test_a_device_without_rates_is_refused_with_those_that_have_some(text: str) -> None:
    with pytest.raises(UsageError, match="choose among"):
        find_device(text)


def test_a_format_that_a_gpu_lacks_runs_in_the_next_wider_one() -> None:
    assert find_device("a100").rate("fp8") == find_device("a100").rate("fp16")
    assert find_device("h100").rate("fp4") == find_device("h100").rate("fp8")


# --- the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_table_shows_parts_kinds_and_the_floor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "cost", write_policy(tmp_path / "model.onnx"), "--target", "h100")
    assert status == 0
    titles = "part kind type GFLOP weights MB activations MB kernels operators ms"
    assert out.split("\n")[0].split() == titles.split()
    assert "linear" in out
    assert "H100 SXM5" in out


def test_json_of_two_graphs_holds_both_and_the_devices_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write_policy(tmp_path / "one.onnx"), write_policy(tmp_path / "two.onnx", batch=2)
    status, out, _ = run(capsys, "cost", one, two, "--target", "rtx5090", "--json")
    found = json.loads(out)
    assert status == 0
    first, second = found["graphs"]
    assert second["total"]["flops"] == 2 * first["total"]["flops"] > 0
    assert sum(group["kernels"] for group in first["groups"]) == first["total"]["kernels"] == 1
    assert found["device"]["source"] == find_device("rtx5090").source


def test_two_graphs_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_policy(tmp_path / "one.onnx"), write_policy(tmp_path / "two.onnx", batch=64)
    status, out, _ = run(capsys, "cost", one, two)
    assert status == 0
    moved = [total(kernels_of(load(path))).activation_bytes / 1e6 for path in (one, two)]
    assert f"{moved[0]:.1f} → {moved[1]:.1f}" in out


def test_the_cost_after_each_pass_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_policy(tmp_path / "model.onnx")
    status, out, _ = run(capsys, "cost", model, "--passes", "fp16", "--target", "l4", "-q")
    assert status == 0
    listed = [line.split()[0] for line in out.splitlines()[1 : 2 + len(PRESETS["fp16"])]]
    assert listed == ["before", *PRESETS["fp16"]]
    assert "Ranges are assumed" in out
    status, out, _ = run(capsys, "cost", model, "--passes", "lower_precision", "--json", "-q")
    before, after = json.loads(out)["passes"]
    assert (before["pass"], after["pass"]) == ("before", "lower_precision")
    assert after["total"]["activation_bytes"] <= before["total"]["activation_bytes"]


def test_what_has_no_cost_is_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dynamic = write_policy(tmp_path / "dynamic.onnx", batch="batch")
    status, _, err = run(capsys, "cost", dynamic)
    assert status == 1
    assert "input 'x' has the shape ['batch', 8, 32]" in err
    assert "fixed sizes" in err
    fixed = write_policy(tmp_path / "fixed.onnx")
    assert run(capsys, "cost", fixed, fixed, "--passes", "exact")[0] == 2
    assert run(capsys, "cost", fixed, "--target", "gtx1080")[0] == 2
    assert run(capsys, "cost", tmp_path / "missing.onnx")[0] == 1


def test_passes_of_a_plug_in_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "idle.py"
    plugin.write_text(
        "from pi05c.passes import graph_pass\n\n\n@graph_pass(exact=True)\ndef idle(graph, ctx):\n    'Nothing.'\n"
    )
    model = write_policy(tmp_path / "model.onnx")
    before = dict(REGISTRY)
    try:
        status, out, _ = run(capsys, "cost", model, "--passes", "idle", "--plugin", plugin, "-q")
    finally:
        REGISTRY.clear()
        REGISTRY.update(before)
    assert status == 0
    assert "idle" in out


def test_passes_on_a_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(capsys, "cost", tmp_path, "--passes", "exact")
    assert status == 2
    assert "is a folder" in error
