"""`pi05c.graph.io`: weights stay on disk, nothing is lost on the way through, trouble is named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from models import model_proto, run_file, run_proto, small_model
from onnx import numpy_helper

from pi05c.graph.check import problems
from pi05c.graph.edit import Editor, Names, remove_dead
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import INLINE_BYTES, DataFolder, Model, load, model_from_proto, save
from pi05c.graph.text import canonical_text
from pi05c.graph.weights import InMemory, Stored, Transposed, array_of, weight_of

LINEAR = "linear (float[4,64] x) => (float[4,64] y) { h = MatMul(x, w) y = Add(h, b) }"
NARROW = (
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2),
    *(ml_dtypes.float4_e2m1fn, np.float16, np.int8, np.bool_),
)
W = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) / 4096
B = np.arange(64, dtype=np.float32)

LOOP = """
    steps (float[4,64] x) => (float[4,64] y) <int64 n = {2}> {
      y = Loop(n, , x) <body = step (int64 i, bool c, float[4,64] carried) => (bool going, float[4,64] leaving) {
        h = MatMul(carried, w)
        leaving = Add(h, b)
        going = Identity(c)
      }>
    }"""


def _saved(tmp_path: Path, text: str = LINEAR) -> Path:
    save(small_model(text, {"w": W, "b": B}), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def _weight(path: Path, name: str) -> onnx.TensorProto:
    proto = onnx.load(path, load_external_data=False)
    bodies = [
        attribute.g for node in proto.graph.node for attribute in node.attribute if attribute.HasField("g")
    ]
    return next(t for graph in (proto.graph, *bodies) for t in graph.initializer if t.name == name)


def test_small_tensors_inside_large_ones_beside(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    assert B.nbytes <= INLINE_BYTES < W.nbytes
    assert numpy_helper.to_array(_weight(path, "b")).tolist() == B.tolist()
    entries = {entry.key: entry.value for entry in _weight(path, "w").external_data}
    assert entries["location"] == "m.onnx.data"
    assert int(entries["length"]) == W.nbytes == (tmp_path / "m.onnx.data").stat().st_size
    assert entries["checksum"] == hashlib.sha256(W.tobytes()).hexdigest()
    onnx.checker.check_model(path)


def test_no_data_file_where_nothing_is_large(tmp_path: Path) -> None:
    save(small_model("r (float[2] x) => (float[2] y) { y = Relu(x) }"), tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("text", [LINEAR, LOOP])
def test_through_load_and_save_it_computes_the_same(text: str, tmp_path: Path) -> None:
    path = _saved(tmp_path, text)
    (tmp_path / "again").mkdir()
    save(load(path), tmp_path / "again" / "m.onnx")
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    expected = run_proto(model_proto(text, {"w": W, "b": B}), {"x": x})
    np.testing.assert_array_equal(run_file(tmp_path / "again" / "m.onnx", {"x": x})[0], expected[0])
    assert (
        _weight(path, "w").SerializeToString()
        == _weight(tmp_path / "again" / "m.onnx", "w").SerializeToString()
    )


def test_loading_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _saved(tmp_path)
    monkeypatch.setattr(Stored, "read", lambda *_: pytest.fail("a weight was read"))
    model = load(path)
    assert problems(model) == []
    assert isinstance(weight_of(model.graph.nodes[0].inputs[1]), Stored)


def test_saving_over_the_file_that_it_came_from(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    model = load(path)
    matmul = model.graph.nodes[0]
    matmul.inputs[1] = Editor(model.graph, Names(model.graph)).constant(
        "w.T", Transposed(weight_of(matmul.inputs[1]), (1, 0))
    )
    save(model, path)
    np.testing.assert_array_equal(array_of(load(path).graph.nodes[0].inputs[1]), W.T)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _saved(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = load(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pi05c.graph.io._copy", full)
    with pytest.raises(Pi05cError, match=r"m\.onnx\.data cannot be written: the disk is full"):
        save(model, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_shared_weight_is_written_once(tmp_path: Path) -> None:
    model = small_model(
        "two (float[4,64] x) => (float[4,64] y) { h = MatMul(x, w) y = MatMul(h, w) }", {"w": W}
    )
    editor = Editor(model.graph, Names(model.graph))
    weight = weight_of(model.graph.nodes[0].inputs[1])
    model.graph.nodes[1].inputs[1] = editor.constant("v", weight)  # another initializer, the same weight
    save(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size == W.nbytes
    assert [node.inputs[1].name for node in load(tmp_path / "m.onnx").graph.nodes] == ["w", "v"]


def test_files_of_a_folder_share_what_they_derive_alike(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    folder = DataFolder(tmp_path)
    for name in ("first.onnx", "second.onnx"):
        model = load(path)
        node = model.graph.nodes[0]
        transposed = Transposed(weight_of(node.inputs[1]), (1, 0))
        node.inputs[1] = Editor(model.graph, Names(model.graph)).constant("turned", transposed)
        save(model, tmp_path / name, shared=folder)
    assert not (tmp_path / "second.onnx.data").exists()
    for name in ("first.onnx", "second.onnx"):
        assert (array_of(load(tmp_path / name).graph.nodes[0].inputs[1]) == W.T).all()


def test_a_replaced_value_of_a_stored_weight_is_the_one_that_is_written(tmp_path: Path) -> None:
    """onnx-graphsurgeon left to itself writes it as external data without a file."""
    model = load(_saved(tmp_path))
    model.graph.nodes[0].inputs[1].values = np.ones((64, 64), np.float32)
    save(model, tmp_path / "n.onnx")
    np.testing.assert_array_equal(
        array_of(load(tmp_path / "n.onnx").graph.nodes[0].inputs[1]), np.ones((64, 64))
    )


def test_what_onnx_graphsurgeon_drops_is_kept(tmp_path: Path) -> None:
    proto = model_proto(LOOP, {"w": W, "b": B})
    proto.doc_string, proto.domain, proto.model_version = "doc", "org.example", 7
    proto.metadata_props.add(key="config", value="pi05")
    body = proto.graph.node[0].attribute[0].g
    body.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="expert.q_proj")
    body.node[0].doc_string = "query"
    save(model_from_proto(proto), tmp_path / "m.onnx")
    saved = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert (saved.doc_string, saved.domain, saved.model_version) == ("doc", "org.example", 7)
    assert {prop.key: prop.value for prop in saved.metadata_props} == {"config": "pi05"}
    node = saved.graph.node[0].attribute[0].g.node[0]
    assert [(prop.key, prop.value) for prop in node.metadata_props] == [
        ("pkg.torch.onnx.name_scopes", "expert.q_proj")
    ]
    assert node.doc_string == "query"


def test_a_constant_node_keeps_the_type_that_it_states() -> None:
    """CASES 2: onnx-graphsurgeon makes float64 of `value_float`."""
    text = "c (float[2] x) => (float[2] y, int64 z) { two = Constant<value_float = 2.0>() y = Add(x, two) one = Constant<value_int = 1>() z = Identity(one) }"  # fmt: skip
    model = small_model(text)
    constant = model.graph.nodes[0].inputs[1]
    assert array_of(constant).dtype == np.float32
    assert array_of(model.graph.nodes[1].inputs[0]).dtype == np.int64
    assert problems(model) == []


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_types_keep_their_bytes(dtype: type, tmp_path: Path) -> None:
    """CASES 3 and 4: FNUZ is not FN, and an FP4 weight may be looked at."""
    values = np.array([[0, 1, 0.5, 2], [1, 1, 0, 4]], np.float32).astype(dtype)
    tensor = numpy_helper.from_array(values, "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["w"], ["y"], name="copy")],
        "narrow",
        [],
        [onnx.helper.make_tensor_value_info("y", tensor.data_type, [2, 4])],
        [tensor],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    model = model_from_proto(proto)
    constant = model.graph.nodes[0].inputs[0]
    assert weight_of(constant).amax() in (1, 4)
    assert canonical_text(model.graph)
    save(model, tmp_path / "m.onnx")
    saved = _weight(tmp_path / "m.onnx", "w")
    assert (saved.data_type, saved.raw_data) == (tensor.data_type, tensor.raw_data)
    assert problems(load(tmp_path / "m.onnx")) == []


@pytest.mark.parametrize(
    ("name", "opset", "to_a_byte"),
    [("FLOAT4E2M1", 23, 2), ("INT4", 23, 2), ("INT2", 25, 4), ("UINT2", 25, 4)],
)
def test_packed_types_in_external_data(name: str, opset: int, to_a_byte: int, tmp_path: Path) -> None:
    number = getattr(onnx.TensorProto, name, None)
    if number is None:
        pytest.skip(f"onnx {onnx.__version__} has no {name}")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(number)
    values = np.random.default_rng(0).standard_normal((64, 127)).round().clip(0, 1).astype(dtype)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["w"], ["y"], name="copy")],
        "packed",
        [],
        [onnx.helper.make_tensor_value_info("y", number, [64, 127])],
        [numpy_helper.from_array(values, "w")],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    proto = onnx.helper.make_model(
        graph, opset_imports=imports, ir_version=onnx.helper.find_min_ir_version_for(imports)
    )
    save(model_from_proto(proto), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    stored = weight_of(model.graph.nodes[0].inputs[0])
    assert isinstance(stored, Stored)
    assert stored.nbytes == (tmp_path / "m.onnx.data").stat().st_size == 64 * 127 // to_a_byte
    np.testing.assert_array_equal(stored.load().view(np.uint8), values.view(np.uint8))


def test_an_old_file_whose_constants_are_inputs(tmp_path: Path) -> None:
    """Up to IR version 3 every initializer is an input as well; the constants of nodes are not."""
    proto = model_proto(
        "old (float[2] x, float[2] w) => (float[2] y) { one = Constant<value = float[1] {1}>() h = Mul(x, w) y = Add(h, one) }",
        {"w": np.array([2, 3], np.float32)},
        opset=7,
    )
    proto.ir_version = 3
    onnx.checker.check_model(proto, full_check=True)
    inputs = {"x": np.array([1, 2], np.float32)}
    (expected,) = run_proto(proto, inputs)
    onnx.save(proto, tmp_path / "old.onnx")
    model = load(tmp_path / "old.onnx")
    assert [tensor.name for tensor in model.graph.inputs] == ["x"]
    assert problems(model) == []
    save(model, tmp_path / "m.onnx")
    assert np.array_equal(run_file(tmp_path / "m.onnx", inputs)[0], expected)


def test_a_model_without_operators_of_onnx_says_which_opset_they_would_be_of() -> None:
    """As those of scikit-learn pipelines: a Cast that a pass puts in is of some opset."""
    node = onnx.helper.make_node("Normalizer", ["x"], ["y"], name="n", domain="ai.onnx.ml")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "scaled", values[:1], values[1:])
    proto = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("ai.onnx.ml", 1)], ir_version=8
    )
    assert model_from_proto(proto).graph.opset == 18


def test_a_scalar_weight_is_an_array(tmp_path: Path) -> None:
    model = small_model("s (float[2] x) => (float[2] y) <float half = {0.5}> { y = Mul(x, half) }")
    value = array_of(model.graph.nodes[0].inputs[1])
    assert isinstance(value, np.ndarray)
    assert value.shape == ()


def test_a_weight_that_only_a_body_reads_is_kept(tmp_path: Path) -> None:
    """CASES 11."""
    model = load(_saved(tmp_path, LOOP))
    assert remove_dead(model.graph) == 0
    body = model.graph.nodes[0].attrs["body"]
    np.testing.assert_array_equal(array_of(body.nodes[0].inputs[1]), W)


def test_a_body_that_returns_a_tensor_from_outside() -> None:
    """onnx-graphsurgeon gives the body a tensor of its own, and then nothing needs the producer."""
    text = """
    r (float[2] x) => (float[2] y) <int64 n = {2}> {
      outer = Relu(x)
      y = Loop(n, , x) <body = b (int64 i, bool c, float[2] q) => (bool going, float[2] outer) { going = Identity(c) }>
    }"""
    model = small_model(text)
    assert model.graph.nodes[1].attrs["body"].outputs[1] is model.graph.nodes[0].outputs[0]
    assert remove_dead(model.graph) == 0


def test_what_two_scopes_read_is_one_initializer(tmp_path: Path) -> None:
    """onnx-graphsurgeon exports it into both branches, and imports two."""
    text = """
    two (float[4,64] x, bool c) => (float[4,64] y) {
      y = If(c) <
        then_branch = t () => (float[4,64] a) { a = MatMul(x, w) },
        else_branch = e () => (float[4,64] p) { q = MatMul(x, w) p = Add(q, b) }
      >
    }"""
    save(small_model(text, {"w": W, "b": B}), tmp_path / "m.onnx")
    branches = load(tmp_path / "m.onnx").graph.nodes[0].attrs
    assert branches["then_branch"].nodes[0].inputs[1] is branches["else_branch"].nodes[0].inputs[1]
    x = np.ones((4, 64), np.float32)
    np.testing.assert_allclose(run_file(tmp_path / "m.onnx", {"x": x, "c": np.array(False)})[0], x @ W + B)


def test_an_unsorted_graph_keeps_its_captures() -> None:
    text = """
    u (float[2] x, bool c) => (float[2] y) {
      y = If(c) <
        then_branch = t () => (float[2] a) { a = Neg(shared) },
        else_branch = e () => (float[2] b) { b = Exp(shared) }
      >
      shared = Relu(x)
    }"""
    model = small_model(text)
    assert remove_dead(model.graph) == 0
    assert [node.op for node in model.graph.nodes] == ["Relu", "If"]


def test_missing_types_are_inferred() -> None:
    model = small_model("t (float[2,3] x) => (float[2] y) { h = Relu(x) y = ReduceSum<keepdims = 0>(h, a) }", {"a": np.array([1])})  # fmt: skip
    assert (model.graph.nodes[0].outputs[0].dtype, model.graph.nodes[0].outputs[0].shape) == (
        np.float32,
        [2, 3],
    )


# What cannot be read


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(Pi05cError, match=r"there is no file .*absent\.onnx"):
        load(tmp_path / "absent.onnx")


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256))])
def test_not_a_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(Pi05cError, match=r"m\.onnx"):
        load(tmp_path / "m.onnx")


def test_data_file_missing(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(Pi05cError, match=r"m\.onnx\.data of initializer 'w' does not exist"):
        load(path)


def test_data_file_truncated(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    data = tmp_path / "m.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(Pi05cError, match="truncated or belongs to another model"):
        load(path)


@pytest.mark.parametrize("location", ["../m.onnx.data", "/etc/passwd", ""])
def test_data_outside_the_folder(location: str, tmp_path: Path) -> None:
    path = _saved(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "w")
    weight.external_data[0].value = location
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(Pi05cError, match="'w'"):
        load(path)


def test_data_behind_a_link(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    data = tmp_path / "m.onnx.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to("elsewhere")
    with pytest.raises(Pi05cError, match="symbolic link"):
        load(path)


def test_a_length_that_does_not_fit_the_shape(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "w")
    weight.dims[0] = 32
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(Pi05cError, match=r"'w' of shape \[32, 64\] takes 8192 bytes"):
        load(path)


def test_a_name_that_is_produced_twice() -> None:
    with pytest.raises(Pi05cError, match=r"'a' is produced twice \(second by node 'again'\)"):
        small_model("d (float[2] x) => (float[2] y) { a = Relu(x) [again] a = Neg(x) y = Exp(a) }")


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    model: Model = small_model("r (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(Pi05cError, match="cannot be written"):
        save(model, tmp_path / "absent" / "m.onnx")


def test_a_checksum_is_that_of_the_stored_bytes() -> None:
    model = small_model(LINEAR, {"w": W, "b": B})
    weight = weight_of(model.graph.nodes[0].inputs[1])
    assert isinstance(weight, InMemory)
    assert weight.checksum() == hashlib.sha256(W.tobytes()).hexdigest()
