"""Runs in onnxruntime: the same bits as the graph's types say, and errors that name the input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper
from small_graphs import SCALE, node, quantized, write_fp8_linear, write_model

from pi05c.backend.lowering import lower
from pi05c.backend.onnxruntime import OnnxRuntimeRunner, load_runner
from pi05c.graph.errors import Pi05cError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
ONNX_TYPE = {BFLOAT16: TensorProto.BFLOAT16, FLOAT16: TensorProto.FLOAT16}

Array = npt.NDArray[Any]


def random(shape: tuple[int, ...], dtype: np.dtype[Any], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def wide(values: Array) -> Array:
    return values.astype(np.float32)


def softmax(values: Array) -> Array:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_each_operator_rounds_once(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    """A chain of operators equals float32 arithmetic on rounded values, to the last bit."""
    number = ONNX_TYPE[dtype]
    x, w = random((48, 64), dtype, 1), random((64, 32), dtype, 2)
    path = write_model(
        tmp_path / "chain.onnx",
        [
            node("Exp", ["x"], ["e"]),
            node("Mul", ["e", "x"], ["m"]),
            node("Abs", ["m"], ["a"]),
            node("Sqrt", ["a"], ["s"]),
            node("MatMul", ["s", "w"], ["p"]),
            node("Transpose", ["p"], ["t"], perm=[1, 0]),
            node("Softmax", ["t"], ["q"]),
            node("Concat", ["q", "t"], ["y"], axis=0),
        ],
        [("x", number, [48, 64])],
        [("y", number, [64, 48])],
        {"w": w},
        external=True,
    )

    def rounded(values: Array) -> Array:
        return values.astype(dtype)

    s = rounded(np.sqrt(np.abs(wide(rounded(wide(rounded(np.exp(wide(x)))) * wide(x))))))
    t = rounded(wide(s) @ wide(w)).T
    expected = np.concatenate([rounded(softmax(wide(t))), t])
    result = load_runner(path).run({"x": x})["y"]
    assert result.dtype == dtype
    np.testing.assert_array_equal(wide(result), wide(expected))


def test_float16_overflows_where_it_should(tmp_path: Path) -> None:
    """300 * 300 exceeds 65504; onnxruntime alone would carry it through in float32."""
    path = write_model(
        tmp_path / "square.onnx",
        [node("Mul", ["x", "x"], ["square"]), node("Sqrt", ["square"], ["y"])],
        [("x", TensorProto.FLOAT16, [2])],
        [("y", TensorProto.FLOAT16, [2])],
    )
    result = load_runner(path).run({"x": np.array([200, 300], np.float16)})["y"]
    np.testing.assert_array_equal(result, np.array([200, np.inf], np.float16))


def test_fp8_linear(tmp_path: Path) -> None:
    path = write_fp8_linear(tmp_path / "model.onnx")
    x = random((16, 64), FLOAT16, 3)
    weight = quantized(np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32), SCALE)

    def dequantized(codes: Array) -> Array:
        return wide((wide(codes) * np.float32(SCALE)).astype(np.float16))

    expected = (dequantized(quantized(x, SCALE)) @ dequantized(weight)).astype(np.float16)
    np.testing.assert_array_equal(load_runner(path).run({"x": x})["y"], expected)


def test_bfloat16_quantization(tmp_path: Path) -> None:
    scale = np.asarray(0.01, BFLOAT16)
    path = write_model(
        tmp_path / "model.onnx",
        [
            node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
            node("DequantizeLinear", ["codes", "scale"], ["y"]),
        ],
        [("x", TensorProto.BFLOAT16, [8, 8])],
        [("y", TensorProto.BFLOAT16, [8, 8])],
        {"scale": scale, "zero": np.zeros((), FLOAT8)},
    )
    x = random((8, 8), BFLOAT16, 4)
    expected = (wide(quantized(x, scale)) * wide(scale)).astype(BFLOAT16)
    result = load_runner(path).run({"x": x})["y"]
    np.testing.assert_array_equal(wide(result), wide(expected))


@pytest.mark.parametrize("opset", [19, 21])
def test_moving_fp8_keeps_every_code(tmp_path: Path, opset: int) -> None:
    """All 256 codes, of which two are NaN, go through operators that onnxruntime has not for FP8."""
    path = write_model(
        tmp_path / "moves.onnx",
        [
            node("Transpose", ["x"], ["t"], perm=[1, 0]),
            node("Reshape", ["t", "shape"], ["r"]),
            node("Concat", ["r", "r"], ["c"], axis=0),
            node("Split", ["c", "sizes"], ["first", "second"], axis=0),
            node("Expand", ["second", "expanded"], ["y"]),
        ],
        [("x", TensorProto.FLOAT8E4M3FN, [2, 128])],
        [("y", TensorProto.FLOAT8E4M3FN, [2, 312])],
        {
            "shape": np.array([256], np.int64),
            "sizes": np.array([200, 312], np.int64),
            "expanded": np.array([2, 312], np.int64),
        },
        opset=opset,
    )
    x = np.arange(256, dtype=np.uint8).view(FLOAT8).reshape(2, 128)
    doubled = np.concatenate([x.T.reshape(256)] * 2)[200:]
    result = load_runner(path).run({"x": x})["y"]
    assert result.dtype == FLOAT8
    np.testing.assert_array_equal(wide(result), wide(np.broadcast_to(doubled, (2, 312))))


def write_loop(path: Path) -> Path:
    """Three times `state = state * w` in bfloat16, with `w` captured from outside."""
    body = helper.make_graph(
        [node("Identity", ["go"], ["go_on"]), node("Mul", ["state", "w"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.BFLOAT16, [4]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.BFLOAT16, [4]),
        ],
    )
    return write_model(
        path,
        [
            node("Cast", ["x"], ["start"], to=TensorProto.BFLOAT16),
            node("Loop", ["trips", "", "start"], ["end"], body=body),
            node("Cast", ["end"], ["y"], to=TensorProto.FLOAT),
        ],
        [("x", TensorProto.FLOAT, [4])],
        [("y", TensorProto.FLOAT, [4])],
        {"trips": np.array(3, np.int64), "w": np.array([1.01, 0.99, 3, 0.1], BFLOAT16)},
    )


def test_loop_bodies_are_lowered(tmp_path: Path) -> None:
    x = np.array([1.3, 1.7, -0.6, 1e-3], np.float32)
    state, factor = x.astype(BFLOAT16), wide(np.array([1.01, 0.99, 3, 0.1], BFLOAT16))
    for _ in range(3):
        state = (wide(state) * factor).astype(BFLOAT16)
    result = load_runner(write_loop(tmp_path / "loop.onnx")).run({"x": x})["y"]
    np.testing.assert_array_equal(result, wide(state))


def test_names_of_copies_avoid_those_of_the_graph(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "names.onnx",
        [node("Neg", ["x"], ["x__float32"]), node("Add", ["x__float32", "x"], ["y"])],
        [("x", TensorProto.BFLOAT16, [2])],
        [("y", TensorProto.BFLOAT16, [2])],
    )
    x = np.array([1, 2], BFLOAT16)
    np.testing.assert_array_equal(wide(load_runner(path).run({"x": x})["y"]), [0, 0])


def test_a_float32_graph_on_bfloat16_weights_is_left_alone(tmp_path: Path) -> None:
    w = random((8, 4), BFLOAT16, 5)
    path = write_model(
        tmp_path / "plain.onnx",
        [
            node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
            node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
            node("MatMul", ["x", "turned"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, [2, 4])],
        [("y", TensorProto.FLOAT, [2, 8])],
        {"w": w},
        external=True,
    )
    assert not lower(onnx.load_model(path, load_external_data=False)).changed
    x = random((2, 4), np.dtype(np.float32), 6)
    np.testing.assert_allclose(load_runner(path).run({"x": x})["y"], x @ wide(w).T, rtol=1e-6)


def test_functions_are_inlined(tmp_path: Path) -> None:
    domain = "small"
    twice = helper.make_function(
        domain, "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    graph = helper.make_graph(
        [helper.make_node("Twice", ["x"], ["y"], domain=domain)],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [2])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2])],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    path = tmp_path / "function.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[twice], ir_version=10), path)
    result = load_runner(path).run({"x": np.array([1.5, 2], BFLOAT16)})["y"]
    np.testing.assert_array_equal(wide(result), [3, 4])


def test_only_what_an_output_needs_is_run(tmp_path: Path) -> None:
    """The other output comes from an operator that no one has, so that running it would fail."""
    path = write_model(
        tmp_path / "two.onnx",
        [node("Neg", ["x"], ["y"]), node("NoSuchOperator", ["x"], ["z"])],
        [("x", TensorProto.FLOAT, [2])],
        [("y", TensorProto.FLOAT, [2]), ("z", TensorProto.FLOAT, [2])],
    )
    runner = OnnxRuntimeRunner(path, outputs=["y"])
    assert list(runner.run({"x": np.ones(2, np.float32)})) == ["y"]
    with pytest.raises(Pi05cError, match=r"onnxruntime cannot load .*NoSuchOperator"):
        load_runner(path)
    with pytest.raises(Pi05cError, match="has no output w: its outputs are y, z"):
        load_runner(path, outputs=["w"])


def test_outputs_of_a_loop_keep_what_the_body_captures(tmp_path: Path) -> None:
    path = write_loop(tmp_path / "loop.onnx")
    x = {"x": np.ones(4, np.float32)}
    np.testing.assert_array_equal(load_runner(path, outputs=["y"]).run(x)["y"], load_runner(path).run(x)["y"])


@pytest.fixture
def prompt_runner(tmp_path: Path) -> OnnxRuntimeRunner:
    """Takes `tokens` of 200 and `images` with a batch that both share."""
    path = write_model(
        tmp_path / "prompt.onnx",
        [
            node("Cast", ["tokens"], ["t"], to=TensorProto.FLOAT),
            node("MatMul", ["images", "t"], ["y"]),
        ],
        [("images", TensorProto.FLOAT, ["batch", "batch"]), ("tokens", TensorProto.INT64, ["batch", 200])],
        [("y", TensorProto.FLOAT, ["batch", 200])],
    )
    return OnnxRuntimeRunner(path)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"tokens": ((1, 200), np.int64)},
            r"missing input 'images': the graph takes images: float32\[batch,batch\]",
        ),
        (
            {"tokens": ((1, 200), np.int64), "images": ((1, 1), np.float32), "state": ((1,), np.float32)},
            "unknown input 'state': the graph takes images",
        ),
        (
            {"tokens": ((1, 200), np.int32), "images": ((1, 1), np.float32)},
            "input 'tokens' holds int32, but the graph takes int64",
        ),
        (
            {"tokens": ((200,), np.int64), "images": ((1, 1), np.float32)},
            r"input 'tokens' has 1 dimensions, \[200\], but the graph takes tokens: int64\[batch,200\]",
        ),
        (
            {"tokens": ((1, 208), np.int64), "images": ((1, 1), np.float32)},
            r"input 'tokens' has shape \[1, 208\], .* dimension 1 is 208 instead of 200; .*export the model",
        ),
        (
            {"tokens": ((2, 200), np.int64), "images": ((1, 1), np.float32)},
            "dimension 0 is 2 instead of 1, as 'images' has",
        ),
    ],
)
def test_input_errors_name_the_input(
    prompt_runner: OnnxRuntimeRunner, inputs: dict[str, tuple[tuple[int, ...], Any]], message: str
) -> None:
    with pytest.raises(Pi05cError, match=message) as error:
        prompt_runner.run({name: np.zeros(shape, dtype) for name, (shape, dtype) in inputs.items()})
    assert error.value.exit_code == 1


def test_right_inputs_run(prompt_runner: OnnxRuntimeRunner) -> None:
    inputs = {"images": np.full((3, 3), 2, np.float32), "tokens": np.ones((3, 200), np.int64)}
    np.testing.assert_array_equal(prompt_runner.run(inputs)["y"], np.full((3, 200), 6, np.float32))


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(Pi05cError, match=r"there is no file .*absent\.onnx"):
        load_runner(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(Pi05cError, match=r"text\.onnx cannot be read as an ONNX model"):
        load_runner(tmp_path / "text.onnx")


def test_nodes_of_one_name(tmp_path: Path) -> None:
    """ONNX allows them, onnxruntime refuses them."""
    nodes = [helper.make_node("Relu", ["x"], ["h"], "n"), helper.make_node("Neg", ["h"], ["y"], "n")]
    value = ("x", TensorProto.FLOAT, [2]), ("y", TensorProto.FLOAT, [2])
    path = write_model(tmp_path / "m.onnx", nodes, [value[0]], [value[1]])
    assert load_runner(path).run({"x": np.array([-1, 2], np.float32)})["y"].tolist() == [0, -2]


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_sequences(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    """What older exporters make of torch's `chunk`; onnxruntime splits no 16-bit tensor."""
    number = ONNX_TYPE[dtype]
    nodes = [
        node("SplitToSequence", ["x", "two"], ["parts"], axis=1),
        node("SequenceAt", ["parts", "one"], ["second"]),
        node("SequenceInsert", ["parts", "second"], ["three"]),
        node("ConcatFromSequence", ["three"], ["y"], axis=1),
    ]
    path = write_model(
        tmp_path / "m.onnx",
        nodes,
        [("x", number, [1, 4])],
        [("y", number, [1, 6])],
        {"two": np.array(2), "one": np.array(1)},
    )
    y = load_runner(path).run({"x": np.arange(4).reshape(1, 4).astype(dtype)})["y"]
    assert (y.dtype, wide(y).tolist()) == (dtype, [[0, 1, 2, 3, 2, 3]])


def test_a_body_reads_what_only_casts_stand_before(tmp_path: Path) -> None:
    """onnxruntime 1.32 takes away float16 -> float32 -> float16 where nothing of the same graph reads the result."""
    wave = helper.make_tensor_value_info("b", TensorProto.FLOAT16, [2])
    bodies = [
        helper.make_graph([helper.make_node(op, ["h"], ["b"])], op, [], [wave]) for op in ("Neg", "Relu")
    ]
    nodes = [
        node("Dropout", ["x"], ["h"]),
        node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1]),
    ]
    inputs = [("x", TensorProto.FLOAT16, [2]), ("c", TensorProto.BOOL, [])]
    path = write_model(tmp_path / "m.onnx", nodes, inputs, [("y", TensorProto.FLOAT16, [2])])
    outputs = load_runner(path).run({"x": np.array([-1, 2], np.float16), "c": np.array(True)})
    assert outputs["y"].tolist() == [1, -2]


def test_a_body_reads_what_casts_to_float64_stand_before(tmp_path: Path) -> None:
    """onnxruntime 1.32 takes away float32 -> float64 -> float32 where nothing of the same graph reads the result."""
    result = helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])
    bodies = [
        helper.make_graph([helper.make_node(op, ["h"], ["b"])], op, [], [result]) for op in ("Neg", "Relu")
    ]
    nodes = [
        node("Cast", ["x"], ["wide"], to=TensorProto.DOUBLE),
        node("Cast", ["wide"], ["h"], to=TensorProto.FLOAT),
        node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1]),
    ]
    inputs = [("x", TensorProto.FLOAT, [2]), ("c", TensorProto.BOOL, [])]
    path = write_model(tmp_path / "m.onnx", nodes, inputs, [("y", TensorProto.FLOAT, [2])])
    outputs = load_runner(path).run({"x": np.array([-1, 2], np.float32), "c": np.array(True)})
    assert outputs["y"].tolist() == [1, -2]


def test_an_output_between_a_transpose_and_a_product(tmp_path: Path) -> None:
    """Before 1.31 onnxruntime loses it when it fuses the Transpose."""
    weight = random((4, 3), FLOAT16, 1)
    path = write_model(
        tmp_path / "model.onnx",
        [
            node("Transpose", ["w"], ["turned"], perm=[1, 0]),
            node("Cast", ["turned"], ["wide"], to=TensorProto.FLOAT),
            node("MatMul", ["x", "wide"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, [2, 3])],
        [("y", TensorProto.FLOAT, [2, 4]), ("wide", TensorProto.FLOAT, [3, 4])],
        {"w": weight},
    )
    found = load_runner(path).run({"x": random((2, 3), np.dtype(np.float32), 2)})
    np.testing.assert_array_equal(found["wide"], wide(weight).T)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
def test_a_number_is_fed_without_axes(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    number = helper.np_dtype_to_tensor_dtype(dtype)
    path = write_model(
        tmp_path / "m.onnx", [node("Neg", ["x"], ["y"])], [("x", number, [])], [("y", number, [])]
    )
    y = load_runner(path).run({"x": np.array(2, dtype)})["y"]
    assert (y.shape, float(y)) == ((), -2.0)


def test_scattered_float16_is_added(tmp_path: Path) -> None:
    """onnxruntime 1.32 moves float16 in ScatterND, and does not add it."""
    half = TensorProto.FLOAT16
    path = write_model(
        tmp_path / "m.onnx",
        [node("ScatterND", ["x", "places", "more"], ["y"], reduction="add")],
        [("x", half, [3]), ("more", half, [2])],
        [("y", half, [3])],
        {"places": np.array([[1], [1]])},
    )
    inputs = {"x": np.array([1, 2, 3], FLOAT16), "more": np.array([4, 0.5], FLOAT16)}
    assert load_runner(path).run(inputs)["y"].tolist() == [1, 6.5, 3]


def test_a_dequantizer_that_nothing_reads_may_say_its_type(tmp_path: Path) -> None:
    """onnxruntime 1.32 cannot load it."""
    path = write_model(
        tmp_path / "m.onnx",
        [
            node("Cast", ["scale"], ["wide"], to=TensorProto.FLOAT),
            node("Div", ["x", "wide"], ["ratio"]),
            node("Cast", ["ratio"], ["q"], to=TensorProto.INT8),
            node("DequantizeLinear", ["q", "scale", "zero"], ["unread"], output_dtype=TensorProto.FLOAT16),
            node("Neg", ["x"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, [2])],
        [("y", TensorProto.FLOAT, [2])],
        {"scale": np.array(0.5, FLOAT16), "zero": np.array(0, np.int8)},
        opset=23,
    )
    assert load_runner(path).run({"x": np.float32([1, -2])})["y"].tolist() == [-1, 2]


def test_a_scan_gives_what_its_body_hands_on(tmp_path: Path) -> None:
    """onnxruntime 1.32 gives memory that nobody wrote where the body returns an input of its own."""
    state, row = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("s", "row"))
    body = helper.make_graph([], "body", [state, row], [state, row])
    path = write_model(
        tmp_path / "m.onnx",
        [node("Scan", ["start", "x"], ["last", "y"], body=body, num_scan_inputs=1)],
        [("start", TensorProto.FLOAT, [2]), ("x", TensorProto.FLOAT, [3, 2])],
        [("last", TensorProto.FLOAT, [2]), ("y", TensorProto.FLOAT, [3, 2])],
    )
    start, x = np.float32([7, 8]), np.arange(6, dtype=np.float32).reshape(3, 2)
    found = load_runner(path).run({"start": start, "x": x})
    assert (found["last"].tolist(), found["y"].tolist()) == (start.tolist(), x.tolist())


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn])
def test_codes_of_four_bits_go_in_and_come_out(tmp_path: Path, dtype: type) -> None:
    number = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    path = write_model(
        tmp_path / "codes.onnx",
        [node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT), node("Cast", ["wide"], ["y"], to=number)],
        [("x", number, [3])],
        [("wide", TensorProto.FLOAT, [3]), ("y", number, [3])],
        opset=23,
    )
    x = np.array([0, 3, 4]).astype(dtype)
    results = load_runner(path).run({"x": x})
    assert results["wide"].tolist() == [0, 3, 4]
    assert results["y"].dtype == dtype
    assert np.array_equal(results["y"], x)
