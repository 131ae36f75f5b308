"""Reading, checking, finding and splitting samples."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi05c.backend.signature import TensorSpec
from pi05c.graph.dtypes import BOOL, FLOAT32, INT64
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import Model, load
from pi05c.graph.runner import Array
from pi05c.samples import Samples, find_samples, input_specs, load_samples, save_samples, split

STATE = TensorSpec("state", FLOAT32, ("batch", 3))
TOKENS = TensorSpec("tokens", INT64, ("batch", None))
MASKS = TensorSpec("masks", BOOL, (2,))
SPECS = (STATE, TOKENS, MASKS)


def sample(seed: int = 0, batch: int = 1) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {
        "state": generator.standard_normal((batch, 3)).astype(np.float32),
        "tokens": generator.integers(0, 99, (batch, 4)),
        "masks": generator.integers(0, 2, 2).astype(bool),
    }


def stacked(count: int) -> dict[str, Array]:
    return {name: np.stack([sample(i)[name] for i in range(count)]) for name in sample()}


def write(path: Path, arrays: Mapping[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


def model(path: Path | None = None, **metadata: str) -> Model:
    inputs = [gs.Variable(spec.name, spec.dtype, list(spec.shape)) for spec in SPECS]
    return Model(gs.Graph(inputs=inputs), metadata=dict(metadata), path=path)


def assert_equal(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_one_sample_many_samples_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "b.npz", sample(7))
    write(folder / "a.npz", stacked(3))
    (folder / "notes.txt").write_text("not read")
    single = write(tmp_path / "single.npz", sample(9, batch=2))
    samples = load_samples([folder, single], SPECS)
    assert len(samples) == 5
    for found, expected in zip(
        samples, [sample(0), sample(1), sample(2), sample(7), sample(9, 2)], strict=True
    ):
        assert_equal(found, expected)
    assert_equal(samples[-1], sample(9, 2))
    assert [len(part) for part in (samples[1:3], samples[:0])] == [2, 0]
    assert_equal(samples[1:3][1], sample(2))
    with pytest.raises(IndexError):
        samples[5]
    assert samples.source == "folder, single.npz"
    assert not samples.synthetic


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_in_either_form_and_any_memory_order(tmp_path: Path, save: Any) -> None:
    arrays = stacked(3)
    arrays["state"] = np.asfortranarray(arrays["state"])
    save(tmp_path / "samples.npz", **arrays)
    samples = load_samples([tmp_path / "samples.npz"], SPECS)
    for index in (2, 0, 1):
        assert_equal(samples[index], sample(index))
        assert samples[index]["state"].flags.c_contiguous


def test_a_sample_that_was_read_does_not_change_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "samples.npz", stacked(2))
    samples = load_samples([path], SPECS)
    samples[0]["state"][:] = 0
    assert_equal(samples[0], sample(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, r"lacks 'state': a sample holds state: float32\[batch,3\]"),
        ({"extra": np.zeros(3)}, "holds 'extra', which the model does not take"),
        (
            {"state": np.zeros((2, 1, 3))},
            r"sample 0: input 'state' holds float64, but the graph takes float32: convert",
        ),
        ({"tokens": np.zeros((2, 1, 4), np.int32)}, "'tokens' holds int32, but the graph takes int64"),
        (
            {"state": np.zeros((2, 1, 4), np.float32)},
            r"sample 0: input 'state' has shape \[1, 4\], .*float32\[batch,3\]: dimension 1 is 4",
        ),
        (
            {"state": np.zeros((2, 2, 1, 3), np.float32)},
            r"'state' .* has shape \[2, 2, 1, 3\].*one more leading",
        ),
        ({"state": np.zeros(3, np.float32)}, r"'state' .* has shape \[3\].*one more leading"),
        (
            {"state": np.zeros((3, 1, 3), np.float32)},
            "'tokens' .* holds 2 samples .* 'state' holds 3 samples",
        ),
        (
            {"masks": np.zeros(2, bool)},
            "'masks' .* holds one sample without a leading axis but 'state' holds 2",
        ),
        (
            {"state": np.array([[[0, 1, 2]], [[np.nan, 0, 0]]], np.float32)},
            "sample 1: input 'state' holds NaN",
        ),
        (
            {"state": np.array([[[0, 1, 2]], [[np.inf, 0, 0]]], np.float32)},
            "sample 1: input 'state' holds inf",
        ),
        ({"tokens": np.zeros((2, 5, 4), np.int64)}, "'tokens' has shape .* instead of 1, as 'state' has"),
        ({"synthetic": np.zeros(2, bool)}, "'synthetic' .* must be one bool"),
        ({"synthetic": np.array(1.0)}, "'synthetic' .* must be one bool"),
        (
            {name: array[:0] for name, array in stacked(2).items()},
            "holds no sample: its arrays have a leading axis of length 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: dict[str, Array | None], message: str
) -> None:
    arrays = {name: array for name, array in {**stacked(2), **change}.items() if array is not None}
    path = write(tmp_path / "bad.npz", arrays)
    with pytest.raises(Pi05cError, match=message) as error:
        load_samples([path], SPECS)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_hold_no_plain_arrays_are_refused(tmp_path: Path) -> None:
    objects = tmp_path / "objects.npz"
    np.savez(objects, state=np.array([{"code": "runs"}], object))
    with pytest.raises(Pi05cError, match=re.escape(f"{objects} holds pickled Python objects")):
        load_samples([objects], SPECS)
    pickle = tmp_path / "pickle.npz"
    pickle.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(Pi05cError, match=r"pickle\.npz cannot be read as an \.npz file of arrays"):
        load_samples([pickle], SPECS)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(Pi05cError, match="single array without a name"):
        load_samples([tmp_path / "array.npy"], SPECS)
    whole = write(tmp_path / "whole.npz", stacked(2)).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Pi05cError, match=r"cut\.npz cannot be read as an \.npz file"):
        load_samples([tmp_path / "cut.npz"], SPECS)
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(Pi05cError, match="cannot be read"):
        load_samples([tmp_path / "empty.npz"], SPECS)
    with pytest.raises(Pi05cError, match="there is no file"):
        load_samples([tmp_path / "missing.npz"], SPECS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(Pi05cError, match=r"holds no \.npz file"):
        load_samples([tmp_path / "folder"], SPECS)


def test_reference_outputs_may_stand_beside_inputs(tmp_path: Path) -> None:
    actions = TensorSpec("actions", FLOAT32, (5,))
    with_actions = {**sample(0), "actions": np.arange(5, dtype=np.float32)}
    path = write(tmp_path / "samples.npz", with_actions)
    assert_equal(load_samples([path], SPECS, [actions])[0], with_actions)
    without = write(tmp_path / "without.npz", sample(0))
    assert_equal(load_samples([without], SPECS, [actions])[0], sample(0))
    with pytest.raises(Pi05cError, match="'actions'"):
        load_samples([path], SPECS)


def test_a_file_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "samples.npz", sample(0))
    load_samples([path], SPECS)
    write(path, sample(1, batch=2))
    assert_equal(load_samples([path], SPECS)[0], sample(1, batch=2))


def test_the_hash_covers_values_and_not_files(tmp_path: Path) -> None:
    many = load_samples([write(tmp_path / "many.npz", stacked(2))], SPECS)
    singles = [write(tmp_path / f"{i}.npz", sample(i)) for i in range(2)]
    assert load_samples(singles, SPECS).sha256 == many.sha256
    assert Samples.of([sample(0), sample(1)]).sha256 == many.sha256
    hashes = {
        many.sha256,
        many[:1].sha256,
        many[1:].sha256,
        load_samples(singles[::-1], SPECS).sha256,
        Samples.of([sample(0), sample(2)]).sha256,
        Samples.of([sample(0), sample(1)], synthetic=True).sha256,
    }
    assert len(hashes) == 6


@given(st.integers(0, 200))
def test_the_split_is_whole_and_holds_back_the_last(count: int) -> None:
    samples = Samples.of([{"x": np.array(i)} for i in range(count)])
    used, held_back = split(samples)
    assert [int(s["x"]) for s in (*used, *held_back)] == list(range(count))
    assert len(held_back) == (max(1, count // 4) if count >= 2 else 0)


def test_saved_samples_come_back(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    for count in (1, 3):
        save_samples(path, [sample(i) for i in range(count)], synthetic=count == 3)
        samples = load_samples([path], SPECS)
        assert [*map(len, (samples, [*tmp_path.iterdir()]))] == [count, 1]
        assert samples.synthetic == (count == 3)
        for index, found in enumerate(samples):
            assert_equal(found, sample(index))
    with pytest.raises(Pi05cError, match="sample 1 has other names or shapes"):
        save_samples(path, [sample(0), sample(1, batch=2)])
    with pytest.raises(Pi05cError, match="no sample"):
        save_samples(path, [])
    with pytest.raises(Pi05cError, match="cannot be written"):
        save_samples(tmp_path / "missing" / "samples.npz", [sample(0)])


def test_the_model_says_what_it_takes() -> None:
    assert input_specs(model()) == SPECS
    untyped = model()
    untyped.graph.inputs[0].dtype = None
    with pytest.raises(Pi05cError, match=r"'state' .* no element type"):
        input_specs(untyped)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """Where a model is, though nothing is there but its sidecar."""
    write(tmp_path / "model.calibration.npz", stacked(2))
    return tmp_path / "model.onnx"


def test_recorded_samples_beside_the_model_are_found(beside: Path) -> None:
    found = find_samples(model(beside))
    assert found is not None
    assert (len(found), found.synthetic, found.source) == (2, False, "model.calibration.npz")


def test_named_files_come_before_the_sidecar(beside: Path, tmp_path: Path) -> None:
    named = write(tmp_path / "named.npz", {**sample(5), "synthetic": np.array(True)})
    found = find_samples(model(beside), [named])
    assert found is not None
    assert (len(found), found.synthetic) == (1, True)


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_samples(model(tmp_path / "model.onnx")) is None
    assert find_samples(model(None)) is None


def test_made_up_samples_beside_trained_weights_need_their_name(beside: Path) -> None:
    write(beside.with_name("model.calibration.npz"), {**stacked(2), "synthetic": np.array(True)})
    with pytest.raises(Pi05cError, match=r"made-up data and .* not random.*--calibration synthetic"):
        find_samples(model(beside))
    with pytest.raises(Pi05cError, match="made-up"):
        find_samples(model(beside, **{"pi05c.weights": "checkpoint"}))
    for found in (
        find_samples(model(beside, **{"pi05c.weights": "random"})),
        find_samples(model(beside), ["synthetic"]),
    ):
        assert found is not None
        assert found.synthetic


def test_the_word_synthetic_needs_a_sidecar_and_stands_alone(beside: Path, tmp_path: Path) -> None:
    recorded = find_samples(model(beside), ["synthetic"])
    assert recorded is not None
    assert not recorded.synthetic
    with pytest.raises(Pi05cError, match=r"there is no .*other\.calibration\.npz"):
        find_samples(model(tmp_path / "other.onnx"), ["synthetic"])
    with pytest.raises(Pi05cError, match="not loaded from a file"):
        find_samples(model(None), ["synthetic"])
    with pytest.raises(UsageError, match="stands beside files"):
        find_samples(model(beside), ["synthetic", tmp_path / "model.calibration.npz"])


def test_sizes_without_a_name_may_differ(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", ["x"], ["y"])],
        "graph",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["?", "?"]) for name in "x"],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["?", "?"])],
    )
    onnx.save(onnx.helper.make_model(graph, ir_version=10), tmp_path / "model.onnx")
    specs = input_specs(load(tmp_path / "model.onnx"))
    np.savez(tmp_path / "samples.npz", x=np.zeros((2, 3), np.float32))
    assert len(load_samples([tmp_path / "samples.npz"], specs)) == 1
