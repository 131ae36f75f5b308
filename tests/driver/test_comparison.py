"""Error figures against plain numpy, and what they make of zeros, NaN and infinities."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pi05c.comparison import Comparison, compare, drift, error_of
from pi05c.graph.errors import Pi05cError
from pi05c.graph.runner import Array

NUMBERS = st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-6 else 0.0)
VECTORS = hnp.arrays(np.float32, 9, elements=NUMBERS)


def test_figures_of_a_small_example() -> None:
    error = error_of(np.array([3.0, 4.0], np.float32), np.array([3.0, 4.5], np.float32))
    assert error.relative_l2 == pytest.approx(0.1)
    assert error.sqnr_db == pytest.approx(20.0)
    assert error.max_abs == 0.5
    assert error.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))


@given(VECTORS, VECTORS)
def test_figures_are_those_of_numpy(reference: Array, result: Array) -> None:
    assume(reference.any() and result.any())
    error = error_of(reference, result)
    r, x = reference.astype(np.float64), result.astype(np.float64)
    assert error.relative_l2 == pytest.approx(np.linalg.norm(x - r) / np.linalg.norm(r), rel=1e-9)
    assert error.max_abs == np.abs(x - r).max()
    assert error.cosine == pytest.approx(x @ r / np.linalg.norm(x) / np.linalg.norm(r), abs=1e-9)
    assert -1 <= error.cosine <= 1
    if (x != r).any():
        noise = ((x - r) ** 2).sum()
        assert error.sqnr_db == pytest.approx(10 * math.log10((r**2).sum() / noise), abs=1e-6)


@given(VECTORS)
def test_equal_is_no_error(values: Array) -> None:
    error = error_of(values, values.copy())
    assert (error.relative_l2, error.sqnr_db, error.max_abs) == (0, math.inf, 0)
    assert error.cosine == pytest.approx(1)


def test_a_reference_of_zeros() -> None:
    zeros, ones = np.zeros(4), np.ones(4)
    assert error_of(zeros, zeros).cosine == 1
    wrong = error_of(zeros, ones)
    assert (wrong.relative_l2, wrong.sqnr_db, wrong.max_abs, wrong.cosine) == (math.inf, -math.inf, 1, 0)
    lost = error_of(ones, zeros)
    assert (lost.relative_l2, lost.sqnr_db, lost.cosine) == (1, 0, 0)
    empty = error_of(np.zeros((0, 2)), np.zeros((0, 2)))
    assert (empty.relative_l2, empty.max_abs) == (0, 0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_result_that_is_not_finite_never_passes(broken: float) -> None:
    reference = [{"actions": np.ones(5, np.float32)}] * 2
    result = [{"actions": np.ones(5, np.float32)}, {"actions": np.array([1, 1, broken, 1, 1], np.float32)}]
    comparison = compare(reference, result)
    assert not comparison.passes(1e30)
    assert not comparison.passes(1.0)
    worst = comparison.worst
    assert (worst.sample, worst.relative_l2, worst.max_abs, worst.sqnr_db, worst.cosine) == (
        1,
        math.inf,
        math.inf,
        -math.inf,
        -1,
    )


def test_sums_do_not_overflow_or_lose_digits() -> None:
    large = np.full(1000, 3e38, np.float32)
    assert error_of(large, large / 2).relative_l2 == pytest.approx(0.5)
    tiny = np.full(1000, 1e-40, np.float32)
    assert error_of(tiny, 2 * tiny).relative_l2 == pytest.approx(1, rel=1e-4)
    huge = np.full(10, 1e300)
    assert error_of(huge, huge * 1.5).relative_l2 == pytest.approx(0.5)
    many = np.full(2**21, 0.1, np.float16)
    off = many.copy()
    off[0] += np.float16(0.1)
    expected = float(off[0] - many[0]) / (float(many[0]) * 2**10.5)
    assert error_of(many, off).relative_l2 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int64, bool])
def test_results_of_any_type(dtype: type) -> None:
    values: Array = np.array([0, 1, 1, 0]).astype(dtype)
    assert error_of(np.array([0, 1, 1, 0], np.float32), values).max_abs == 0


def test_worst_is_over_all_samples_and_outputs() -> None:
    ones = np.ones(4, np.float32)
    reference = [{"a": ones, "b": ones}, {"a": ones, "b": ones}]
    result = [{"a": ones * 1.5, "b": ones, "unasked": ones}, {"a": ones, "b": ones * np.float32(1.25)}]
    comparison = compare(reference, result)
    assert [(e.sample, e.output, e.relative_l2) for e in comparison.errors] == [
        (0, "a", 0.5),
        (0, "b", 0),
        (1, "a", 0),
        (1, "b", 0.25),
    ]
    assert (comparison.worst.sample, comparison.worst.output) == (0, "a")
    by_output = comparison.worst_by_output()
    assert {name: error.relative_l2 for name, error in by_output.items()} == {"a": 0.5, "b": 0.25}
    assert comparison.passes(0.5)
    assert not comparison.passes(0.49)


def test_json_holds_infinities_and_comes_back() -> None:
    reference = [{"a": np.ones(3, np.float32)}, {"a": np.ones(3, np.float32)}]
    result = [{"a": np.ones(3, np.float32)}, {"a": np.full(3, np.nan, np.float32)}]
    comparison = compare(reference, result)
    text = json.dumps(comparison.as_json(), allow_nan=False)
    record = json.loads(text)
    assert record["worst"]["relative_l2"] == "inf"
    assert record["errors"][0]["sqnr_db"] == "inf"
    assert record["worst_by_output"]["a"]["cosine"] == -1
    assert Comparison.from_json(record) == comparison


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    ones = [{"a": np.ones(3)}]
    for reference, result, message in (
        (ones, [], "0 results cannot be compared with 1"),
        ([], [], "nothing to compare"),
        (ones, [{"b": np.ones(3)}], "sample 0 lacks output 'a': it has b"),
        (ones, [{"a": np.ones((3, 1))}], r"'a' of sample 0 has shape \[3, 1\] but its reference \[3\]"),
        ([{"a": np.array([np.nan] * 3)}], ones, "reference of output 'a' of sample 0 holds NaN"),
    ):
        with pytest.raises(Pi05cError, match=message):
            compare(reference, result)


def test_drift_is_the_relative_error_of_each_step() -> None:
    reference = np.stack([np.full((1, 2), 2.0), np.full((1, 2), 4.0), np.zeros((1, 2))]).astype(np.float32)
    result = reference + np.array([0, 1, 0], np.float32)[:, None, None]
    assert drift(list(reference), list(result)) == drift(reference, result) == (0, 0.25, 0)
    result[1] = np.nan
    assert drift(list(reference), list(result)) == (0, math.inf, 0)
    with pytest.raises(Pi05cError, match="run of 2 denoising steps cannot be compared with one of 3"):
        drift(list(reference), list(result[:2]))
    with pytest.raises(Pi05cError, match="denoising step 0 has shape"):
        drift([np.ones(2)], [np.ones(3)])
