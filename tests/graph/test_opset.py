"""`pi05c.graph.opset`: opsets are raised in every scope, and nothing but operators changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from models import model_proto, run_file, run_proto, small_model

from pi05c.graph.check import problems
from pi05c.graph.domains import bare_name
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, load, model_from_proto, save, scopes, to_whole_proto
from pi05c.graph.opset import raise_opset
from pi05c.graph.text import canonical_text

NORM_IN_A_LOOP = """
    steps (float[2,8] x) => (float[2,8] y) <int64 n = {3}> {
      first = Add(x, w)
      y = Loop(n, , first) <body = step (int64 i, bool c, float[2,8] carried) => (bool going, float[2,8] leaving) {
        mean = ReduceMean<axes = [-1], keepdims = 1>(carried)
        centred = Sub(carried, mean)
        left, right = Split<axis = 1>(centred)
        swapped = Concat<axis = 1>(right, left)
        leaving = Cast<to = 1>(swapped)
        going = Identity(c)
      }>
    }"""
WEIGHT = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)


def _operators(model: Model) -> list[str]:
    return [node.op for scope in scopes(model.graph) for node in scope.nodes]


@pytest.mark.parametrize("opset", [18, 19, 21, 23])
def test_axes_become_an_input_inside_a_loop_too(opset: int, tmp_path: Path) -> None:
    proto = model_proto(NORM_IN_A_LOOP, {"w": WEIGHT}, opset=17)
    onnx.save(proto, tmp_path / "before.onnx")
    model = model_from_proto(proto)
    operators = _operators(model)
    assert raise_opset(model, opset)
    assert _operators(model) == operators
    mean = next(node for scope in scopes(model.graph) for node in scope.nodes if node.op == "ReduceMean")
    assert "axes" not in mean.attrs
    assert mean.inputs[1].name == "mean.ReduceMean.axes"
    assert problems(model) == []
    save(model, tmp_path / "after.onnx")
    saved = onnx.load(tmp_path / "after.onnx")
    assert [(entry.domain, entry.version) for entry in saved.opset_import] == [("", opset)]
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    before, after = (run_file(tmp_path / f"{name}.onnx", {"x": x}) for name in ("before", "after"))
    np.testing.assert_array_equal(before[0], after[0])


def test_there_already() -> None:
    model = small_model(NORM_IN_A_LOOP, {"w": WEIGHT}, opset=17)
    raise_opset(model, 21)
    text = canonical_text(model.graph)
    assert not raise_opset(model, 21)
    assert not raise_opset(model, 17)
    assert canonical_text(model.graph) == text
    assert model.graph.opset == 21


def test_ir_version_follows_the_opset() -> None:
    model = small_model("plain (float[2] x) => (float[2] y) { y = Relu(x) }", opset=17)
    model.graph.ir_version = 8
    raise_opset(model, 21)
    assert model.graph.ir_version == 10


def test_external_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models over 2 GB are raised too (onnx #6529)."""
    weight = np.zeros((512, 512), np.float32)
    text = "linear (float[2,512] x) => (float[2,1] y) { z = MatMul(x, w) y = ReduceMax<axes = [1]>(z) }"
    save(small_model(text, {"w": weight}, opset=17), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    stored = model.graph.nodes[0].inputs[1]._values

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(type(stored), "read", refuse)
    raise_opset(model, 21)
    assert model.graph.nodes[0].inputs[1]._values is stored


def test_metadata_names_and_types_are_kept() -> None:
    proto = model_proto(NORM_IN_A_LOOP, {"w": WEIGHT}, opset=17)
    body = proto.graph.node[1].attribute[0].g
    body.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="norm")
    model = model_from_proto(proto)
    types = {t.name: t.dtype for scope in scopes(model.graph) for n in scope.nodes for t in n.outputs}
    raise_opset(model, 21)
    nodes = {node.name: node for scope in scopes(model.graph) for node in scope.nodes}
    assert nodes["mean.ReduceMean"].metadata == {"pkg.torch.onnx.name_scopes": "norm"}
    assert {t.name: t.dtype for scope in scopes(model.graph) for n in scope.nodes for t in n.outputs} == types


def test_custom_operators_stay() -> None:
    proto = model_proto("plain (float[2] x) => (float[2] y) { y = Relu(x) }", opset=17)
    proto.opset_import.append(onnx.helper.make_opsetid("trt", 1))
    proto.graph.node[0].domain, proto.graph.node[0].op_type = "trt", "ReduceMean"
    model = model_from_proto(proto)
    raise_opset(model, 21)
    assert (bare_name(model.graph.nodes[0]), model.graph.nodes[0].domain) == ("ReduceMean", "trt")
    assert {(entry.domain, entry.version) for entry in model.graph.import_domains} == {("", 21), ("trt", 1)}


def test_what_cannot_be_converted_is_named_and_nothing_is_edited() -> None:
    text = """norm (float[1,4,2,2] x) => (float[1,4,2,2] y) {
      mean = ReduceMean<axes = [1]>(x)
      centred = Sub(x, mean)
      y = GroupNormalization<num_groups = 2>(centred, s, s)
    }"""
    model = small_model(text, {"s": np.ones(2, np.float32)}, opset=18)
    before = canonical_text(model.graph)
    with pytest.raises(Pi05cError, match=r"GroupNormalization 'y\.GroupNormalization'"):
        raise_opset(model, 21)
    assert canonical_text(model.graph) == before
    assert model.graph.opset == 18


def test_an_opset_that_onnx_does_not_know() -> None:
    model = small_model("plain (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(Pi05cError, match="install a newer one"):
        raise_opset(model, 999)


@pytest.mark.parametrize(
    ("opset", "operator", "mode", "factor"),
    [
        (9, "Upsample", "nearest", 2.0),
        (9, "Upsample", "linear", 2.0),
        (10, "Resize", "nearest", 1.5),
        (10, "Resize", "nearest", 0.8),
        (10, "Resize", "linear", 1.5),
        (10, "Resize", "linear", 0.8),
    ],
)
def test_resized_images_take_the_pixels_that_they_took(
    opset: int, operator: str, mode: str, factor: float
) -> None:
    size = int(5 * factor)
    text = f"""resized (float[1,1,5,5] x) => (float[1,1,{size},{size}] y) {{
      y = {operator}<mode = "{mode}">(x, s)
    }}"""
    scales = np.array([1, 1, factor, factor], np.float32)
    model = small_model(text, {"s": scales}, opset=opset)
    x = np.random.default_rng(3).standard_normal((1, 1, 5, 5)).astype(np.float32)
    (before,) = run_proto(to_whole_proto(model), {"x": x})
    raise_opset(model, 21)
    (after,) = run_proto(to_whole_proto(model), {"x": x})
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        ("Resize(x, s)", {"s": np.array([1, 1, 2, 0.5], np.float32)}),
        ("Hardmax<axis = 1>(x)", {}),
    ],
    ids=["an image that grows along one axis and shrinks along another", "Hardmax"],
)
def test_what_the_converter_would_give_another_meaning_is_refused(
    node: str, weights: dict[str, np.ndarray]
) -> None:
    model = small_model(f"odd (float[1,1,4,4] x) => (float[1,1,h,w] y) {{ y = {node} }}", weights, opset=10)
    with pytest.raises(Pi05cError, match=f"onnx cannot convert {node.split('(')[0].split('<')[0]} "):
        raise_opset(model, 13)


def _with_function(function: str, opset: int) -> Model:
    text = f"""<ir_version: 10, opset_import: ["": {opset}, "own": 1]>
      called (float[2,4] x) => (float[2,4] y) {{ y = own.centred(x) }}
      <domain: "own", opset_import: ["": {opset}]> {function}"""
    return model_from_proto(onnx.parser.parse_model(text))


def test_functions_are_converted_too() -> None:
    model = _with_function(
        "centred (a) => (b) { mean = ReduceMean<axes = [-1], keepdims = 1>(a) b = Sub(a, mean) }", 13
    )
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    (before,) = run_proto(to_whole_proto(model), {"x": x})
    raise_opset(model, 21)
    assert problems(model) == []
    (after,) = run_proto(to_whole_proto(model), {"x": x})
    np.testing.assert_array_equal(after, before)


def test_attributes_that_callers_give_are_kept_or_refused() -> None:
    kept = _with_function("centred <slope> (a) => (b) { b = LeakyRelu<alpha: float = @slope>(a) }", 13)
    kept.graph.nodes[0].attrs["slope"] = 0.5
    raise_opset(kept, 21)
    assert problems(kept) == []
    lost = _with_function("centred <along> (a) => (b) { b = ReduceMean<axes: ints = @along>(a) }", 13)
    with pytest.raises(Pi05cError, match=r"has attributes that its callers give \(axes\)"):
        raise_opset(lost, 21)
