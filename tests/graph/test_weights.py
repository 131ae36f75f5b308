"""`pi05c.graph.weights`: chains of operations, evaluated in chunks, have the values of the arrays they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05c.graph import weights
from pi05c.graph.errors import Pi05cError
from pi05c.graph.weights import (
    Cast,
    InMemory,
    Joined,
    Projected,
    Quantized,
    Reshaped,
    Scaled,
    Selected,
    Stored,
    Transposed,
    Weight,
    array_of,
    stored_bytes,
    weight_of,
)

Array = npt.NDArray[np.float32]

BASE = np.random.default_rng(0).standard_normal((12, 8, 6)).astype(np.float32)
FACTOR = np.random.default_rng(1).uniform(0.5, 2, (12, 1, 6)).astype(np.float32)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)

CHAINS: dict[str, tuple[Callable[[Weight], Weight], Callable[[Array], npt.NDArray[np.generic]]]] = {
    "transposed": (lambda w: Transposed(w, (2, 0, 1)), lambda a: a.transpose(2, 0, 1)),
    "reshaped": (lambda w: Reshaped(w, (24, 24)), lambda a: a.reshape(24, 24)),
    "joined": (lambda w: Joined([w, w], 1), lambda a: np.concatenate([a, a], 1)),
    "selected": (lambda w: Selected(w, 0, [7, 2, 2, 11]), lambda a: a[[7, 2, 2, 11]]),
    "selected columns": (lambda w: Selected(w, 2, range(3, 6)), lambda a: a[..., 3:]),
    "scaled": (lambda w: Scaled(w, FACTOR), lambda a: a * FACTOR),
    "cast": (lambda w: Cast(w, ml_dtypes.bfloat16), lambda a: a.astype(ml_dtypes.bfloat16)),
    "quantized": (
        lambda w: Quantized(w, np.array(0.01, np.float16), FP8),
        lambda a: np.clip(a / np.float32(np.float16(0.01)), -448, 448).astype(FP8),
    ),
    "quantized by row": (
        lambda w: Quantized(w, FACTOR, FP8),
        lambda a: np.clip(a / FACTOR, -448, 448).astype(FP8),
    ),
    "a chain": (
        lambda w: Cast(Transposed(Scaled(Joined([w, w], 2), np.float32(3)), (1, 2, 0)), np.float16),
        lambda a: (np.concatenate([a, a], 2) * np.float32(3)).transpose(1, 2, 0).astype(np.float16),
    ),
}


@pytest.fixture(params=["memory", "file"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Weight:
    if request.param == "memory":
        return InMemory(BASE)
    path = tmp_path / "data"
    path.write_bytes(b"\0" * 64 + BASE.tobytes())
    return Stored(path, 64, BASE.shape, BASE.dtype)


@pytest.mark.parametrize("name", CHAINS)
def test_values(name: str, base: Weight) -> None:
    build, numpy_form = CHAINS[name]
    weight, expected = build(base), numpy_form(BASE)
    assert (weight.shape, weight.dtype) == (expected.shape, expected.dtype)
    assert weight.nbytes == expected.nbytes
    np.testing.assert_array_equal(weight.load().astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("name", CHAINS)
def test_regions_join_to_the_whole(name: str, base: Weight) -> None:
    build, numpy_form = CHAINS[name]
    weight, expected = build(base), numpy_form(BASE)
    chunks = [weight.read(region) for region in weight.regions(200)]
    assert len(chunks) > 1
    np.testing.assert_array_equal(np.concatenate(chunks).astype(np.float32), expected.astype(np.float32))
    assert weight.amax() == float(np.abs(expected.astype(np.float32)).max())
    whole_bytes = b"".join(bytes(stored_bytes(chunk)) for chunk in chunks)
    assert whole_bytes == expected.tobytes()


@pytest.mark.parametrize("name", CHAINS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_region(name: str, data: st.DataObject) -> None:
    build, numpy_form = CHAINS[name]
    weight, expected = build(InMemory(BASE)), numpy_form(BASE)
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in weight.shape]
    region = tuple(slice(start, stop) for start, stop in bounds)
    np.testing.assert_array_equal(weight.read(region).astype(np.float32), expected[region].astype(np.float32))


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_projected_row(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector times a weight, over chunks of rows, is what numpy makes of the whole in float64."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", 200)
    rng = np.random.default_rng(0)
    base = rng.standard_normal((12, 30)).astype(ml_dtypes.bfloat16)
    vector = rng.standard_normal(12).astype(np.float32)
    bias = rng.standard_normal(30).astype(np.float16) if with_bias else np.zeros(30, np.float16)
    weight = Projected(InMemory(base), vector, InMemory(bias) if with_bias else None)
    assert len(list(weight.base.chunks())) > 1
    expected = (vector.astype(np.float64) @ base.astype(np.float64) + bias).astype(np.float32)
    assert (weight.shape, weight.dtype) == ((30,), np.float32)
    np.testing.assert_array_equal(weight.load(), expected)
    np.testing.assert_array_equal(weight.read((slice(3, 9),)), expected[3:9])
    twin = Projected(InMemory(base.copy()), vector.copy(), weight.bias)
    other = Projected(InMemory(base), vector + 1, weight.bias)
    assert twin.fingerprint() == weight.fingerprint() != other.fingerprint()


def test_quantizing_saturates() -> None:
    weight = Quantized(InMemory(np.array([1e6, -1e6, 440], np.float32)), np.array(1, np.float32), FP8)
    assert weight.load().astype(np.float32).tolist() == [448, -448, 448]


def test_large_16_bit_weights_take_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of all 65,536 inputs gives what computing each element gives."""
    values = np.random.default_rng(0).standard_normal(4096).astype(ml_dtypes.bfloat16)
    values[:3] = [np.inf, -np.inf, 0]
    direct = Quantized(InMemory(values), np.array(0.01, np.float32), FP8).load()
    monkeypatch.setattr(weights, "_TABLE_THRESHOLD", 1)
    table = Quantized(InMemory(values), np.array(0.01, np.float32), FP8).load()
    np.testing.assert_array_equal(direct.view(np.uint8), table.view(np.uint8))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, FP8])
def test_amax(dtype: npt.DTypeLike) -> None:
    values = np.array([0.5, -2, 1], np.float32).astype(dtype)
    assert InMemory(values).amax() == 2
    assert InMemory(values[:0]).amax() == 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_amax_shows_what_is_not_finite(dtype: npt.DTypeLike) -> None:
    assert InMemory(np.array([1, -np.inf], np.float32).astype(dtype)).amax() == np.inf
    assert np.isnan(InMemory(np.array([1, np.nan], np.float32).astype(dtype)).amax())


def test_equal_bytes_have_equal_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(BASE.tobytes())
    stored, memory = Stored(tmp_path / "data", 0, BASE.shape, BASE.dtype), InMemory(BASE.copy())
    assert stored.fingerprint() == memory.fingerprint()
    assert Transposed(stored, (2, 1, 0)).fingerprint() == Transposed(memory, (2, 1, 0)).fingerprint()
    assert Transposed(stored, (2, 1, 0)).fingerprint() != Transposed(stored, (1, 2, 0)).fingerprint()
    assert InMemory(BASE).fingerprint() != InMemory(BASE.reshape(-1)).fingerprint()
    assert InMemory(BASE).fingerprint() != InMemory(BASE.view(np.int32)).fingerprint()


def test_a_file_exchanged_under_its_name_is_not_read_in_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(BASE.tobytes())
    old = Stored(path, 0, BASE.shape, BASE.dtype)
    (tmp_path / "new").write_bytes((BASE + 1).tobytes())
    (tmp_path / "new").replace(path)
    np.testing.assert_array_equal(old.load(), BASE)
    np.testing.assert_array_equal(Stored(path, 0, BASE.shape, BASE.dtype).load(), BASE + 1)


def test_a_range_outside_the_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"\0" * 10)
    with pytest.raises(Pi05cError, match="holds 10 bytes"):
        Stored(tmp_path / "data", 8, [1], np.float32)


def test_a_constant_made_elsewhere_gets_a_weight() -> None:
    constant = gs.Constant("c", np.arange(3, dtype=np.float32))
    assert weight_of(constant) is weight_of(constant)
    assert array_of(constant).tolist() == [0, 1, 2]


def test_a_declared_export_type_is_the_type() -> None:
    """onnx-graphsurgeon keeps bfloat16 values as float32 with a type to export as."""
    constant = gs.Constant("c", np.array([1.001], np.float32), export_dtype=16)
    assert weight_of(constant).dtype == np.dtype(ml_dtypes.bfloat16)
    assert array_of(constant).astype(np.float32).tolist() == [1.0]


def test_a_large_transposed_weight_has_the_bytes_and_the_counts_of_its_values() -> None:
    values = np.random.default_rng(0).standard_normal((300, 1100)).astype(ml_dtypes.bfloat16)
    base = InMemory(values)
    half = Transposed(base, (1, 0))
    weight = Quantized(Cast(Joined([half, half], 1), np.float16), np.array(0.01, np.float32), FP8)
    turned = np.concatenate([values.T, values.T], axis=1).astype(np.float16)
    expected = np.clip(turned.astype(np.float32) / np.float32(0.01), -448, 448).astype(FP8)
    assert b"".join(bytes(stored_bytes(chunk)) for chunk in weight.chunks()) == expected.tobytes()
    pieces = [bytes(stored_bytes(weight.read(region))) for region in weight.regions(10_000)]
    assert len(pieces) > 3
    assert b"".join(pieces) == expected.tobytes()
    found, counts = Joined([half, Reshaped(half, half.shape)], 1).histogram()
    expected_values, expected_counts = np.unique(values.astype(np.float32), return_counts=True)
    order = np.argsort(found)
    np.testing.assert_array_equal(found[order], expected_values)
    np.testing.assert_array_equal(counts[order], 2 * expected_counts)


def test_content_does_not_depend_on_where_a_weight_lies(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    found = []
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(values.tobytes())
        found.append(Cast(Transposed(Stored(tmp_path / name, 0, (8, 4), np.float32), (1, 0)), np.float16))
    assert found[0].content() == found[1].content()
    other = Cast(Transposed(InMemory(values + 1), (1, 0)), np.float16)
    assert found[0].content() != other.content()
