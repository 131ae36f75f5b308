"""Ranges measured inside the graph against ranges of dumped tensors and of plain numpy."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from pi05c import calibration
from pi05c.calibration import cached_ranges, measure_ranges, read_ranges, save_ranges
from pi05c.executors import LocalProcesses, executor_for
from pi05c.graph.dtypes import FLOAT32, to_numpy, to_onnx
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import INLINE_BYTES, Model, load, model_from_proto, save, scopes
from pi05c.graph.runner import Array
from pi05c.graph.text import canonical_text
from pi05c.graph.weights import InMemory, Stored, Transposed, Weight
from pi05c.samples import Samples, find_samples

WIDTH = 24
STEPS = 5


def value(
    name: str, shape: Sequence[int | str] | None, dtype: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: dict[str, Array] | None = None,
    opset: int = 21,
) -> Model:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        list(inputs),
        list(outputs),
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    return model_from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    )


def samples_of(*arrays: Array, name: str = "x") -> Samples:
    return Samples.of([{name: array} for array in arrays])


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def chain(dtype: np.dtype[Any] = FLOAT32, opset: int = 21) -> Model:
    """x -> MatMul -> Relu -> MatMul, in one type."""
    return model_of(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"], name="first"),
            helper.make_node("Relu", ["y"], ["z"], name="relu"),
            helper.make_node("MatMul", ["z", "w"], ["out"], name="second"),
        ],
        [value("x", [3, WIDTH], to_onnx(dtype))],
        [value("out", [3, WIDTH], to_onnx(dtype))],
        {"w": random(7, WIDTH, WIDTH).astype(dtype)},
        opset,
    )


def looped(opset: int = 21) -> Model:
    """x' = x @ w for `STEPS` steps; `y` = 3 x' lies in the body, and captures w, which lies outside."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"], name="step"),
            helper.make_node("Mul", ["next", "three"], ["y"], name="triple"),
            helper.make_node("Identity", ["going"], ["still"], name="go"),
        ],
        "body",
        [value("i", [], TensorProto.INT64), value("going", [], TensorProto.BOOL), value("state", [3, WIDTH])],
        [value("still", [], TensorProto.BOOL), value("next", [3, WIDTH])],
    )
    return model_of(
        [
            helper.make_node("Loop", ["count", "", "x"], ["last"], name="denoise", body=body),
            helper.make_node("Neg", ["last"], ["out"], name="negate"),
        ],
        [value("x", [3, WIDTH]), value("count", [], TensorProto.INT64)],
        [value("out", [3, WIDTH])],
        {"w": random(3, WIDTH, WIDTH), "three": np.float32(3).reshape(())},
        opset,
    )


def test_ranges_are_those_of_numpy_over_all_samples() -> None:
    model = chain()
    w = random(7, WIDTH, WIDTH)
    inputs = [random(seed, 3, WIDTH) for seed in range(4)]
    ranges = measure_ranges(model, ["x", "y", "z", "out"], samples_of(*inputs))
    y = np.stack(inputs) @ w
    expected = {"x": np.stack(inputs), "y": y, "z": np.maximum(y, 0), "out": np.maximum(y, 0) @ w}
    assert list(ranges.low) == ["x", "y", "z", "out"]
    for name, array in expected.items():
        assert ranges.low[name] == pytest.approx(array.min(), rel=1e-5)
        assert ranges.high[name] == pytest.approx(array.max(), rel=1e-5)
    assert ranges.left_out == {}
    assert ranges.samples == 4


def test_the_model_stays_as_it_is() -> None:
    model = looped()
    before = canonical_text(model.graph)
    samples = Samples.of([{"x": random(0, 3, WIDTH), "count": np.array(2)}])
    measure_ranges(model, ["y", "last"], samples)
    assert canonical_text(model.graph) == before


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_tensors_in_a_loop_are_joined_over_its_steps(opset: int) -> None:
    x, w = random(5, 3, WIDTH), random(3, WIDTH, WIDTH)
    samples = Samples.of([{"x": x, "count": np.array(STEPS)}])
    ranges = measure_ranges(looped(opset), ["state", "next", "y", "last", "out"], samples)
    states = [x]
    for _ in range(STEPS):
        states.append(states[-1] @ w)
    for name, arrays in {"state": states[:-1], "next": states[1:], "out": [-states[-1]]}.items():
        assert ranges.low[name] == pytest.approx(np.stack(arrays).min(), rel=1e-4)
        assert ranges.high[name] == pytest.approx(np.stack(arrays).max(), rel=1e-4)
    assert ranges.high["y"] == pytest.approx(3 * np.stack(states[1:]).max(), rel=1e-4)


def test_a_loop_that_runs_in_no_sample_leaves_its_tensors_out_and_in_one_sample_not() -> None:
    x = random(5, 3, WIDTH)
    never = Samples.of([{"x": x, "count": np.array(0)}])
    ranges = measure_ranges(looped(), ["next", "out"], never)
    assert set(ranges.low) == {"out"}
    assert "runs no step" in ranges.left_out["next"]
    once = Samples.of([{"x": x, "count": np.array(0)}, {"x": x, "count": np.array(1)}])
    ranges = measure_ranges(looped(), ["next", "out"], once)
    assert ranges.high["next"] == pytest.approx((x @ random(3, WIDTH, WIDTH)).max(), rel=1e-5)


def test_a_loop_in_a_scan_is_joined_over_both() -> None:
    """Scan over rows of x; in it a Loop that doubles the row twice: 2 x, 4 x."""
    inner = helper.make_graph(
        [
            helper.make_node("Add", ["s", "s"], ["twice"], name="double"),
            helper.make_node("Identity", ["c"], ["c2"], name="go"),
        ],
        "inner",
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("s", [WIDTH])],
        [value("c2", [], TensorProto.BOOL), value("twice", [WIDTH])],
    )
    outer = helper.make_graph(
        [
            helper.make_node("Loop", ["two", "", "row"], ["four"], name="loop", body=inner),
            helper.make_node("Add", ["four", "sum"], ["sum_next"], name="add"),
            helper.make_node("Neg", ["four"], ["negative"], name="neg"),
        ],
        "outer",
        [value("sum", [WIDTH]), value("row", [WIDTH])],
        [value("sum_next", [WIDTH]), value("negative", [WIDTH])],
    )
    scan = helper.make_node(
        "Scan",
        ["zero", "x"],
        ["total", "all"],
        name="scan",
        body=outer,
        num_scan_inputs=1,
        scan_output_axes=[1],
        scan_output_directions=[1],
    )
    model = model_of(
        [scan],
        [value("x", [3, WIDTH])],
        [value("total", [WIDTH]), value("all", [WIDTH, 3])],
        {"two": np.array(2), "zero": np.zeros(WIDTH, np.float32)},
    )
    x = random(9, 3, WIDTH)
    ranges = measure_ranges(model, ["s", "twice", "four", "sum_next", "all"], samples_of(x))
    sums = np.cumsum(4 * x, axis=0)
    for name, low, high in (
        ("s", min(x.min(), 2 * x.min()), max(x.max(), 2 * x.max())),
        ("twice", 4 * x.min(), 4 * x.max()),
        ("four", 4 * x.min(), 4 * x.max()),
        ("sum_next", sums.min(), sums.max()),
        ("all", -4 * x.max(), -4 * x.min()),
    ):
        assert (ranges.low[name], ranges.high[name]) == pytest.approx((low, high), rel=1e-5), name
    assert not ranges.left_out


def test_branches_are_left_out_with_the_reason() -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node(op, ["x"], [name], name=f"make_{name}")], name, [], [value(name, [3, WIDTH])]
        )

    model = model_of(
        [
            helper.make_node(
                "If",
                ["yes"],
                ["y"],
                name="if",
                then_branch=branch("a", "Neg"),
                else_branch=branch("b", "Abs"),
            )
        ],
        [value("x", [3, WIDTH]), value("yes", [], TensorProto.BOOL)],
        [value("y", [3, WIDTH])],
    )
    x = random(1, 3, WIDTH)
    ranges = measure_ranges(model, ["a", "y", "missing"], Samples.of([{"x": x, "yes": np.array(True)}]))
    assert ranges.low == {"y": pytest.approx(-x.max())}
    assert "If 'if'" in ranges.left_out["a"]
    assert "no tensor" in ranges.left_out["missing"]


def test_integer_tensors_are_passed_over() -> None:
    model = model_of(
        [
            helper.make_node("Cast", ["x"], ["n"], to=TensorProto.INT64),
            helper.make_node("Abs", ["n"], ["out"]),
        ],
        [value("x", [4])],
        [value("out", [4], TensorProto.INT64)],
    )
    ranges = measure_ranges(model, ["x", "n", "out"], samples_of(np.arange(4, dtype=np.float32)))
    assert ranges.low == {"x": 0.0}
    assert ranges.high == {"x": 3.0}
    assert ranges.left_out == {}


def test_sequences_are_passed_over() -> None:
    model = model_of(
        [
            helper.make_node("SequenceConstruct", ["x", "x"], ["two"]),
            helper.make_node("ConcatFromSequence", ["two"], ["out"], axis=0),
        ],
        [value("x", [4])],
        [value("out", [8])],
    )
    ranges = measure_ranges(model, ["x", "two", "out"], samples_of(np.arange(4, dtype=np.float32)))
    assert ranges.high == {"x": 3.0, "out": 3.0}
    assert ranges.left_out == {}


def test_a_sample_that_is_a_scalar() -> None:
    """Which numpy makes a vector of where it is asked for contiguous memory."""
    model = model_of(
        [helper.make_node("Unsqueeze", ["x", "axes"], ["out"])],
        [value("x", [])],
        [value("out", [1])],
        {"axes": np.array([0], np.int64)},
    )
    assert measure_ranges(model, ["x", "out"], samples_of(np.array(2, np.float32))).high["out"] == 2


def test_tensors_with_the_same_values_share_a_reduction() -> None:
    model = model_of(
        [
            helper.make_node("Exp", ["x"], ["y"], name="exp"),
            helper.make_node("Transpose", ["y"], ["t"], name="transpose"),
            helper.make_node("Reshape", ["t", "shape"], ["r"], name="reshape"),
            helper.make_node("Slice", ["r", "zero", "one", "zero"], ["out"], name="slice"),
        ],
        [value("x", [3, WIDTH])],
        [value("out", None)],
        {"shape": np.array([-1]), "zero": np.array([0]), "one": np.array([1])},
    )
    x = random(2, 3, WIDTH)
    ranges = measure_ranges(model, ["t", "r", "out"], samples_of(x))
    assert ranges.low["t"] == ranges.low["r"] == pytest.approx(np.exp(x).min(), rel=1e-5)
    assert ranges.high["t"] == ranges.high["r"] == pytest.approx(np.exp(x).max(), rel=1e-5)
    assert ranges.low["out"] == ranges.high["out"] == pytest.approx(np.exp(x[0, 0]), rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_graph_has_the_ranges_of_its_rounded_values(dtype: type[np.float16] | type[np.float32]) -> None:
    model = chain(np.dtype(dtype))
    x = random(4, 3, WIDTH).astype(dtype)
    ranges = measure_ranges(model, ["x", "y"], samples_of(x))
    y = (x.astype(np.float32) @ random(7, WIDTH, WIDTH).astype(dtype).astype(np.float32)).astype(dtype)
    resolution = {np.float16: 2.0**-10, np.float32: 2.0**-23}[dtype]
    assert (ranges.low["x"], ranges.high["x"]) == (float(x.min()), float(x.max()))
    assert ranges.high["y"] == pytest.approx(float(y.max()), rel=4 * resolution)


def test_float64_and_bfloat16_keep_what_float32_would_lose() -> None:
    model = model_of(
        [
            helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.DOUBLE),
            helper.make_node("Mul", ["wide", "huge"], ["product"]),
            helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
            helper.make_node("Cast", ["narrow"], ["out"], to=TensorProto.FLOAT),
        ],
        [value("x", [4])],
        [value("out", [4]), value("product", [4], TensorProto.DOUBLE)],
        {"huge": np.array(1e200)},
    )
    x = np.array([0.1, -0.3, 2.7, 1.0], np.float32)
    ranges = measure_ranges(model, ["x", "product", "narrow"], samples_of(x))
    assert ranges.high["product"] == pytest.approx(2.7e200, rel=1e-6)
    assert ranges.low["narrow"] == float(np.float32(-0.3).astype(ml_dtypes.bfloat16))


def test_infinities_are_kept() -> None:
    """An additive mask holds -inf; an overflow of both signs makes the sum NaN, not the tensor."""
    model = model_of(
        [helper.make_node("Add", ["x", "mask"], ["y"])],
        [value("x", [4])],
        [value("y", [4])],
        {"mask": np.array([0, -np.inf, np.inf, 0], np.float32)},
    )
    ranges = measure_ranges(model, ["x", "y"], samples_of(np.array([1, 2, 3, 4], np.float32)))
    assert (ranges.low["y"], ranges.high["y"]) == (-math.inf, math.inf)
    large = np.array([3e38, 3e38, -3e38, -3e38], np.float32)
    assert measure_ranges(model, ["x"], samples_of(large)).high["x"] == pytest.approx(3e38)


@pytest.mark.parametrize("place", [0, 7, 3 * WIDTH - 1])
def test_a_nan_anywhere_is_refused_naming_the_first_tensor(place: int) -> None:
    model = model_of(
        [
            helper.make_node("Sqrt", ["x"], ["root"], name="sqrt"),
            helper.make_node("Neg", ["root"], ["out"], name="neg"),
        ],
        [value("x", [3, WIDTH])],
        [value("out", [3, WIDTH])],
    )
    good, bad = np.ones((3, WIDTH), np.float32), np.ones((3, WIDTH), np.float32)
    bad.flat[place] = -1
    with pytest.raises(Pi05cError, match=r"tensor 'root' holds NaN on sample 1 .*first"):
        measure_ranges(model, ["x", "root", "out"], samples_of(good, bad))


def test_a_nan_in_one_step_of_a_loop_is_refused() -> None:
    samples = Samples.of([{"x": np.full((3, WIDTH), 3e37, np.float32), "count": np.array(6)}])
    with pytest.raises(Pi05cError, match="holds NaN on sample 0"):
        measure_ranges(looped(), ["next"], samples)


def test_no_sample_is_refused() -> None:
    with pytest.raises(Pi05cError, match="no sample"):
        measure_ranges(chain(), ["x"], Samples.of([]))


def test_what_onnxruntime_cannot_run_is_one_sentence() -> None:
    model = model_of(
        [helper.make_node("Unheard", ["x"], ["y"], domain="elsewhere")], [value("x", [4])], [value("y", [4])]
    )
    model.graph.outputs[0].dtype = np.float32
    with pytest.raises(Pi05cError, match="cannot be loaded for calibration"):
        measure_ranges(model, ["x", "y"], samples_of(np.ones(4, np.float32)))


def test_what_cannot_be_fed_is_one_sentence() -> None:
    model = model_of([helper.make_node("Sqrt", ["x"], ["y"])], [value("x", [4])], [value("y", [4])])
    with pytest.raises(Pi05cError, match="cannot be run for calibration"):
        measure_ranges(model, ["y"], Samples.of([{"x": np.zeros(4, ml_dtypes.float8_e4m3fn)}]))


def test_progress_counts_samples() -> None:
    seen: list[tuple[int, int]] = []
    inputs = [random(seed, 3, WIDTH) for seed in range(3)]
    measure_ranges(
        chain(), ["y"], samples_of(*inputs), progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


class _Counted(Weight):
    """A weight that tells how often it is read whole, and refuses to be read where `limit` is passed."""

    def __init__(self, base: Weight) -> None:
        super().__init__(base.shape, base.dtype)
        self.base = base
        self.reads = 0

    def read(self, region: tuple[slice, ...]) -> Array:
        self.reads += 1
        return self.base.read(region)


@pytest.fixture
def stored(tmp_path: Path) -> Model:
    """`chain` with its weight in external data, in bfloat16 behind a Cast."""
    model = model_of(
        [
            helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["x", "w32"], ["y"]),
            helper.make_node("MatMul", ["y", "w32"], ["out"]),
        ],
        [value("x", [3, 64])],
        [value("out", [3, 64])],
        {"w": random(11, 64, 64).astype(ml_dtypes.bfloat16)},
    )
    save(model, tmp_path / "model.onnx")
    return load(tmp_path / "model.onnx")


def test_external_weights_are_used_where_they_are(stored: Model, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    x = random(12, 3, 64)
    w = random(11, 64, 64).astype(ml_dtypes.bfloat16).astype(np.float32)
    ranges = measure_ranges(stored, ["y", "out"], samples_of(x), scratch=scratch)
    assert ranges.high["y"] == pytest.approx((x @ w).max(), rel=1e-5)
    assert not list(scratch.iterdir())
    constant = next(t for t in stored.graph.tensors().values() if t.name == "w")
    assert isinstance(constant._values, Stored)


def test_a_weight_that_is_a_computation_is_evaluated_once_and_cleaned_up(
    stored: Model, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    constant = stored.graph.tensors()["w"]
    lazy = _Counted(Transposed(constant._values, (1, 0)))
    lazy._checksum = "known"
    constant._values = lazy
    x = random(12, 3, 64)
    ranges = measure_ranges(stored, ["y"], samples_of(x, x + 1), scratch=scratch)
    w = random(11, 64, 64).astype(ml_dtypes.bfloat16).astype(np.float32).T
    assert ranges.high["y"] == pytest.approx(max((x @ w).max(), ((x + 1) @ w).max()), rel=1e-5)
    assert lazy.reads == 1
    assert not list(scratch.iterdir())


def test_a_weight_in_memory_that_a_body_captures_reaches_it() -> None:
    """Larger than what stays inline, it becomes an input of the graph, which the body captures."""
    model = looped()
    (constant,) = {id(tensor): tensor for tensor in _constants(model) if tensor.name == "w"}.values()
    constant._values = InMemory(3 * np.eye(WIDTH, WIDTH, dtype=np.float32))
    x = random(5, 3, WIDTH)
    samples = Samples.of([{"x": x, "count": np.array(2)}])
    assert constant._values.nbytes > INLINE_BYTES
    assert measure_ranges(model, ["next"], samples).high["next"] == pytest.approx(9 * x.max(), rel=1e-6)


def _constants(model: Model) -> list[gs.Constant]:
    inputs = (tensor for graph in scopes(model.graph) for node in graph.nodes for tensor in node.inputs)
    return [tensor for tensor in inputs if isinstance(tensor, gs.Constant)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=4, max_side=6),
        elements=st.floats(width=32, allow_nan=False),
    )
)
def test_whatever_the_shape_and_values_the_range_is_exact(array: Array) -> None:
    shape = list(array.shape)
    model = model_of([helper.make_node("Identity", ["x"], ["y"])], [value("x", shape)], [value("y", shape)])
    ranges = measure_ranges(model, ["x", "y"], samples_of(array), threads=1)
    for name in ("x", "y"):
        assert (ranges.low[name], ranges.high[name]) == (float(array.min()), float(array.max()))


def test_every_tensor_of_the_small_model_agrees_with_a_dump(brief_model: Path) -> None:
    """All tensors outside the Loop, dumped one by one."""
    model = load(brief_model)
    samples = find_samples(model)
    assert samples is not None
    names = [
        tensor.name
        for node in model.graph.nodes
        for tensor in node.outputs
        if to_numpy(tensor.dtype) == FLOAT32
    ]
    ranges = measure_ranges(model, names, samples[:2])
    proto = onnx.load(brief_model, load_external_data=False)
    proto = onnx.shape_inference.infer_shapes(proto)
    dumped = [info for info in proto.graph.value_info if info.name in names]
    assert len(dumped) > 100
    proto.graph.output.extend(dumped)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(brief_model.parent)
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    arrays = [session.run([info.name for info in dumped], sample) for sample in samples[:2]]
    for info, *values in zip(dumped, *arrays, strict=True):
        tolerance = 1e-4 * float(np.abs(np.stack(values)).max())
        assert ranges.low[info.name] == pytest.approx(np.stack(values).min(), abs=tolerance)
        assert ranges.high[info.name] == pytest.approx(np.stack(values).max(), abs=tolerance)


def test_the_cache_answers_the_same_question_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = calibration._measure

    def counted(*args: Any) -> calibration.MeasuredRanges:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(calibration, "_measure", counted)
    a, b = samples_of(random(0, 3, WIDTH)), samples_of(random(1, 3, WIDTH))
    first = cached_ranges(chain(), ["y", "z"], a, tmp_path)
    assert cached_ranges(chain(), ["z", "y"], a, tmp_path) == first
    assert len(calls) == 1
    cached_ranges(chain(), ["y"], a, tmp_path)
    cached_ranges(chain(), ["y", "z"], b, tmp_path)
    other = chain()
    other.graph.nodes[0].inputs[1] = _scaled(other)
    cached_ranges(other, ["y", "z"], a, tmp_path)
    assert len(calls) == 4
    assert len(list((tmp_path / "ranges").iterdir())) == 4


def _scaled(model: Model) -> object:
    return gs.Constant("w", 2 * model.graph.nodes[0].inputs[1].values)


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: "not json",
        lambda record: json.dumps([]),
        lambda record: json.dumps({**record, "format": 0}),
        lambda record: json.dumps({**record, "data": "other"}),
        lambda record: json.dumps({**record, "graph": "other"}),
        lambda record: json.dumps({**record, "ranges": {"y": [2.0, 1.0]}}),
        lambda record: json.dumps({**record, "ranges": {"y": [0.0]}}),
        lambda record: json.dumps({**record, "ranges": {"unasked": [0.0, 1.0]}}),
    ],
)
def test_a_damaged_entry_is_measured_again(tmp_path: Path, damage: object) -> None:
    samples = samples_of(random(0, 3, WIDTH))
    first = cached_ranges(chain(), ["y"], samples, tmp_path)
    (entry,) = (tmp_path / "ranges").iterdir()
    entry.write_text(damage(json.loads(entry.read_text())))  # type: ignore[operator]
    assert cached_ranges(chain(), ["y"], samples, tmp_path) == first
    assert json.loads(entry.read_text())["ranges"]["y"] == [first.low["y"], first.high["y"]]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ranges = cached_ranges(chain(), ["y"], samples_of(random(0, 3, WIDTH)), tmp_path / "file")
    assert "y" in ranges.high


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PI05C_CACHE", raising=False)
    assert calibration.default_cache_dir() == tmp_path / "xdg" / "pi05c"
    monkeypatch.setenv("PI05C_CACHE", str(tmp_path / "own"))
    assert calibration.default_cache_dir() == tmp_path / "own"


def test_saved_ranges_come_back(tmp_path: Path) -> None:
    model = model_of(
        [helper.make_node("Add", ["x", "mask"], ["y"])],
        [value("x", [2])],
        [value("y", [2])],
        {"mask": np.array([0, -np.inf], np.float32)},
    )
    samples = Samples.of([{"x": np.array([1, 2], np.float32)}], source="two numbers", synthetic=True)
    ranges = measure_ranges(model, ["y"], samples)
    path = tmp_path / "ranges.json"
    save_ranges(path, ranges)
    assert read_ranges(path) == ranges
    assert ranges.low["y"] == -math.inf
    path.write_text("{}")
    with pytest.raises(Pi05cError, match="no ranges that this version reads"):
        read_ranges(path)


def test_memory_does_not_grow_with_the_number_of_tensors() -> None:
    """40 tensors of 16 MiB each, measured one after the other: far fewer than that are alive at a time."""
    count, rows = 40, 65536
    nodes = [
        helper.make_node("MatMul", ["x" if i == 0 else f"y{i - 1}", "w"], [f"y{i}"]) for i in range(count)
    ]
    model = model_of(
        nodes,
        [value("x", [rows, 64])],
        [value(f"y{count - 1}", [rows, 64])],
        {"w": np.eye(64, dtype=np.float32)},
    )
    samples = samples_of(np.ones((rows, 64), np.float32))
    tensor_bytes = rows * 64 * 4
    base, peak, done = _resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ranges = measure_ranges(model, [f"y{i}" for i in range(count)], samples)
    finally:
        done.set()
        watcher.join()
    assert set(ranges.high.values()) == {1.0}
    assert peak - base < count * tensor_bytes / 4


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("the resident set is read from /proc")
    return int(statm.read_text().split()[1]) * 4096


# Rows


def rows_model(steps: int = 2) -> Model:
    """x [2, 6, 24] -> MatMul -> y; the product of y and the weight is made in a Loop as well."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["product"]),
            helper.make_node("Tanh", ["product"], ["next"]),
            helper.make_node("Identity", ["condition"], ["go_on"]),
        ],
        "body",
        [
            value("i", [], TensorProto.INT64),
            value("condition", [], TensorProto.BOOL),
            value("state", [2, 6, WIDTH]),
        ],
        [value("go_on", [], TensorProto.BOOL), value("next", [2, 6, WIDTH])],
    )
    return model_of(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            helper.make_node("Loop", ["steps", "", "y"], ["out"], body=body),
        ],
        [value("x", [2, 6, WIDTH])],
        [value("out", [2, 6, WIDTH])],
        {"w": random(7, WIDTH, WIDTH) / 5, "steps": np.array(steps)},
    )


def row_set(weight: Weight) -> set[bytes]:
    return {row.tobytes() for row in weight.load()}


def test_kept_rows_are_rows_of_the_tensor_as_many_as_asked_for() -> None:
    arrays = [random(seed, 2, 6, WIDTH) for seed in range(4)]
    asked = {"x": 7, "y": 1000}
    ranges = measure_ranges(rows_model(), ["x", "y"], samples_of(*arrays), rows=asked)
    assert {name: weight.shape for name, weight in ranges.rows.items()} == {"x": (7, WIDTH), "y": (48, WIDTH)}
    every = np.concatenate([array.reshape(-1, WIDTH) for array in arrays])
    assert row_set(ranges.rows["x"]) <= {row.tobytes() for row in every.astype(ml_dtypes.bfloat16)}
    kept = ranges.rows["y"].load().astype(np.float32)
    np.testing.assert_allclose(kept, every @ (random(7, WIDTH, WIDTH) / 5), rtol=2**-8, atol=1e-6)
    plain = measure_ranges(rows_model(), ["x", "y"], samples_of(*arrays))
    assert (plain.low, plain.high) == (ranges.low, ranges.high)
    assert plain.rows == {}


def test_rows_come_from_all_samples_whatever_their_order() -> None:
    arrays = [seed + 0.01 * random(seed, 2, 6, WIDTH) for seed in range(4)]
    first = measure_ranges(rows_model(), ["x"], samples_of(*arrays), rows={"x": 24})
    again = measure_ranges(rows_model(), ["x"], samples_of(*arrays[::-1]), rows={"x": 24})
    assert row_set(first.rows["x"]) == row_set(again.rows["x"])
    means = {round(float(row.astype(np.float32).mean())) for row in first.rows["x"].load()}
    assert means == {0, 1, 2, 3}


def test_no_rows_are_taken_of_tensors_inside_bodies_or_of_unknown_shape() -> None:
    ranges = measure_ranges(
        rows_model(), ["next"], samples_of(random(0, 2, 6, WIDTH)), rows={"next": 5, "y": 5, "missing": 5}
    )
    assert set(ranges.rows) == {"y"}
    open_model = model_of(
        [helper.make_node("Relu", ["x"], ["y"])], [value("x", ["n", WIDTH])], [value("y", ["n", WIDTH])]
    )
    assert measure_ranges(open_model, ["y"], samples_of(random(0, 3, WIDTH)), rows={"y": 2}).rows == {}


def test_rows_are_kept_with_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, asked = samples_of(random(0, 2, 6, WIDTH)), {"x": 5, "y": 3}
    first = cached_ranges(rows_model(), ["x"], samples, tmp_path, rows=asked)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "_measure", None)
        again = cached_ranges(rows_model(), ["x"], samples, tmp_path, rows=asked)
    for name, weight in first.rows.items():
        assert isinstance(again.rows[name], Stored)
        assert (again.rows[name].load() == weight.load()).all()
    assert set(cached_ranges(rows_model(), ["x"], samples, tmp_path, rows={"x": 4}).rows) == {"x"}
    for path in (tmp_path / "ranges").glob("*.rows"):
        path.write_bytes(path.read_bytes()[:-1])
    renewed = cached_ranges(rows_model(), ["x"], samples, tmp_path, rows=asked)
    assert row_set(renewed.rows["y"]) == row_set(first.rows["y"])


def test_rows_are_saved_and_loaded_with_ranges(tmp_path: Path) -> None:
    model = rows_model()
    ranges = measure_ranges(model, ["x"], samples_of(random(0, 2, 6, WIDTH)), rows={"x": 5})
    save_ranges(tmp_path / "ranges.json", ranges)
    loaded = read_ranges(tmp_path / "ranges.json")
    assert (loaded.rows["x"].load() == ranges.rows["x"].load()).all()
    assert (loaded.low, loaded.high) == (ranges.low, ranges.high)


# More than one process


def spread_model(tmp_path: Path) -> Model:
    """`rows_model` from a file, its weight transposed, which workers compute from the file."""
    save(rows_model(), tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    for constant in {id(t): t for t in _constants(model) if t.name == "w"}.values():
        constant._values = Transposed(constant._values, (1, 0))
    return model


@pytest.mark.parametrize("kind", ["threads", "processes", "dask"])
def test_whoever_runs_the_samples_ranges_and_rows_have_the_same_bits(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, samples = spread_model(tmp_path), samples_of(*(random(seed, 2, 6, WIDTH) for seed in range(5)))
    names, rows = ["x", "y", "product", "next"], {"y": 17}
    alone = measure_ranges(model, names, samples, rows=rows)
    seen: list[tuple[int, int]] = []
    with ExitStack() as stack:
        executor: Executor | None
        if kind == "threads":
            executor = stack.enter_context(ThreadPoolExecutor(3))
        elif kind == "processes":
            executor = stack.enter_context(LocalProcesses(2))
        else:
            address = request.getfixturevalue("dask_cluster").scheduler_address
            executor = stack.enter_context(executor_for(dask=address))
        spread = measure_ranges(
            model, names, samples, rows=rows, executor=executor, progress=lambda *done: seen.append(done)
        )
    assert (spread.low, spread.high) == (alone.low, alone.high)
    assert spread.rows["y"].load().tobytes() == alone.rows["y"].load().tobytes()
    assert seen == [(done, 5) for done in range(1, 6)]


def test_a_process_that_dies_while_it_calibrates_loses_no_sample(tmp_path: Path) -> None:
    model, samples = spread_model(tmp_path), samples_of(*(random(seed, 2, 6, WIDTH) for seed in range(12)))
    alone = measure_ranges(model, ["y", "next"], samples, rows={"y": 9})
    with LocalProcesses(2) as processes:
        killed: list[int] = []

        def kill_one(done: int, total: int) -> None:
            if not killed:
                killed.append(next(iter(processes._pool._processes)))
                os.kill(killed[0], signal.SIGKILL)

        spread = measure_ranges(
            model, ["y", "next"], samples, rows={"y": 9}, executor=processes, progress=kill_one
        )
    assert killed
    assert (spread.low, spread.high, spread.samples) == (alone.low, alone.high, 12)
    assert spread.rows["y"].load().tobytes() == alone.rows["y"].load().tobytes()


def test_workers_that_live_on_see_the_weights_of_the_next_model(tmp_path: Path) -> None:
    """Another model of the same graph takes the place of the first, which the workers still have loaded."""
    samples = samples_of(random(0, 2, 6, WIDTH))
    highs = []
    with LocalProcesses(1) as process:
        for factor in (1, 2):
            model = rows_model()
            for constant in {id(t): t for t in _constants(model) if t.name == "w"}.values():
                constant._values = InMemory(np.float32(factor) * constant._values.load())
            save(model, tmp_path / "model.onnx")
            loaded = load(tmp_path / "model.onnx")
            highs.append(measure_ranges(loaded, ["y"], samples, executor=process).high["y"])
    assert highs[1] == 2 * highs[0]


def test_nan_is_found_whoever_runs_the_samples() -> None:
    arrays = [random(seed, 3, WIDTH) for seed in range(3)]
    arrays[1][0, 0] = np.nan
    with ThreadPoolExecutor(2) as threads, pytest.raises(Pi05cError, match="'x' holds NaN on sample 1"):
        measure_ranges(chain(), ["x", "y"], samples_of(*arrays), executor=threads)


def test_small_tensors_are_reduced_in_groups_whatever_their_number() -> None:
    """More than one group holds, of two shapes by turns, and a NaN in the first of them by execution order."""
    count = 150
    nodes = [helper.make_node("Add", [f"t{i - 1}" if i else "x", "one"], [f"t{i}"]) for i in range(count)]
    nodes += [helper.make_node("ReduceMax", [f"t{i}"], [f"s{i}"], keepdims=1) for i in range(count)]
    model = model_of(nodes, [value("x", [2, 3])], [value("s0", [1, 1])], {"one": np.float32(1).reshape(())})
    names = [f"{kind}{i}" for i in range(count) for kind in "st"]
    ranges = measure_ranges(model, names, samples_of(np.arange(6, dtype=np.float32).reshape(2, 3)))
    assert [ranges.low[f"t{i}"] for i in range(count)] == list(range(1, count + 1))
    assert [ranges.high[f"t{i}"] for i in range(count)] == list(range(6, count + 6))
    assert all(ranges.low[f"s{i}"] == ranges.high[f"s{i}"] == i + 6 for i in range(count))
    with pytest.raises(Pi05cError, match="'t0' holds NaN"):
        measure_ranges(model, names, samples_of(np.full((2, 3), np.nan, np.float32)))
