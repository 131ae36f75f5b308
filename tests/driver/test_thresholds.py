"""Calibration methods: histograms out of the graph against numpy, and the thresholds that are chosen on them."""

from __future__ import annotations

import math
import random as random_module
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from test_calibration import STEPS, WIDTH, looped, model_of, random, samples_of, value

from pi05c.calibration import cached_ranges, measure_ranges, read_ranges, save_ranges
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import Model
from pi05c.graph.runner import Array
from pi05c.reductions import BINS, BINS_AN_OCTAVE, OCTAVES
from pi05c.samples import Samples
from pi05c.thresholds import Histogram, Method, Thresholds, parse_method, threshold

RATIO = 2 ** (1 / BINS_AN_OCTAVE)


def histogram(values: Array) -> Histogram:
    """What the graph counts, by numpy in float64."""
    sizes = np.abs(values.astype(np.float64)).reshape(-1)
    exponent = math.floor(math.log2(sizes.max())) + 1 if sizes.any() else -100
    with np.errstate(divide="ignore"):
        places = np.floor(BINS_AN_OCTAVE * (np.log2(sizes) - (exponent - OCTAVES)))
    return Histogram(np.bincount(np.clip(places, 0, BINS - 1).astype(np.int64), minlength=BINS), exponent)


def identity(*shape: int, opset: int = 21) -> Model:
    return model_of(
        [helper.make_node("Mul", ["x", "one"], ["y"])],
        [value("x", list(shape))],
        [value("y", list(shape))],
        {"one": np.float32(1).reshape(())},
        opset,
    )


def thresholds(arrays: list[Array], method: str) -> Mapping[str, float]:
    model = identity(*arrays[0].shape)
    return measure_ranges(
        model, ["y"], samples_of(*arrays), quantized=["y"], method=parse_method(method), threads=1
    ).thresholds


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("max", Method()),
        ("percentile", Method("percentile", 99.99)),
        ("percentile{percent=99.5}", Method("percentile", 99.5)),
        ("mse{steps=joint}", Method("mse", joint=True)),
        ("entropy{steps=each}", Method("entropy")),
        ("percentile{percent=90,steps=joint}", Method("percentile", 90, True)),
    ],
)
def test_methods_are_read_and_written(text: str, method: Method) -> None:
    assert parse_method(text) == method
    assert parse_method(str(method)) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("median", "give one of max, percentile, mse, entropy"),
        ("percentile{percent=0}", "a number up to 100"),
        ("percentile{percent=nan}", "a number up to 100"),
        ("percentile{percent=many}", "a number up to 100"),
        ("mse{percent=99}", "'percent=99' of --calibration-method mse"),
        ("max{steps=some}", "'steps=some'"),
        ("mse{", "is not known"),
    ],
)
def test_what_is_no_method_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_method(text)


numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20).map(
    lambda found: np.array(found, np.float32)
)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(numbers, min_size=1, max_size=5), order=st.randoms(use_true_random=False))
def test_histograms_add_up_in_any_order(parts: list[Array], order: random_module.Random) -> None:
    together = histogram(np.concatenate(parts))
    shuffled = list(parts)
    order.shuffle(shuffled)
    half = len(shuffled) // 2
    groups = [group for group in (shuffled[:half], shuffled[half:]) if group]
    sums = []
    for group in groups:
        total = histogram(group[0])
        for part in group[1:]:
            total = histogram(part) + total
        sums.append(total)
    total = sums[0] if len(sums) == 1 else sums[1] + sums[0]
    assert total.exponent == max(histogram(part).exponent for part in parts)
    assert total.counts.sum() == sum(part.size for part in parts)
    if together.exponent == total.exponent:
        assert (total.counts == together.counts).all()


def test_a_percentile_is_that_of_numpy_but_for_a_bin() -> None:
    arrays = [random(seed, 50, 40) * np.float32(10.0**seed) for seed in range(3)]
    for percent in (50, 90, 99.9):
        exact = np.percentile(np.abs(np.stack(arrays)), percent, method="inverted_cdf")
        found = thresholds(arrays, f"percentile{{percent={percent}}}")["y"]
        assert exact / RATIO <= found <= exact * RATIO * 1.0001


def test_all_of_a_hundred_percent_is_the_largest_magnitude() -> None:
    x = random(0, 7, 9)
    assert thresholds([x], "percentile{percent=100}")["y"] == np.abs(x).max()


def test_zeros_do_not_count_in_a_percentile() -> None:
    x = np.zeros((100, 100), np.float32)
    x[0] = np.linspace(1, 2, 100)
    assert thresholds([x], "percentile{percent=99}")["y"] == pytest.approx(1.98, rel=0.02)


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.5, 1e-30, 1e-42, 448.0, 3e38])
def test_a_constant_has_a_range(method: str, constant: float) -> None:
    found = thresholds([np.full((4, 5), constant, np.float32)], method)["y"]
    exact = abs(float(np.float32(constant)))
    assert exact / RATIO <= found <= exact * RATIO


def test_squared_error_clips_rare_outliers_only_where_that_pays() -> None:
    """One element of 500 beside many that its scale would flush to zero: scale 2 against scale 1 and below."""
    few, many = (Histogram(np.zeros(BINS, np.int64), 9) for _ in range(2))
    place = int(np.searchsorted(few.edges, 0.0015))
    few.counts[-1], few.counts[place] = 1, 10
    many.counts[-1], many.counts[place] = 1, 10**12
    assert threshold(few, 500.0, Method("mse")) == 500.0
    clipped = threshold(many, 500.0, Method("mse"))
    assert clipped == 448 * 2.0 ** round(math.log2(clipped / 448)) < 500

    def error(hist: Histogram, scale: float) -> float:
        rounded = np.minimum(hist.centers / scale, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        return float(hist.counts @ (rounded.astype(np.float64) * scale - hist.centers) ** 2)

    tried = [2.0**-octave * 2 for octave in range(16)]
    assert clipped / 448 == min(tried, key=lambda scale: error(many, scale))


def test_entropy_clips_what_hides_the_distribution() -> None:
    values = np.abs(random(1, 100_000)) * np.float32(1e-3)
    plain = histogram(values)
    assert threshold(plain, float(values.max()), Method("entropy")) == pytest.approx(values.max(), rel=0.02)
    hidden = histogram(np.concatenate([values, np.array([4e4], np.float32)]))
    assert threshold(hidden, 4e4, Method("entropy")) < 4e3


@pytest.mark.parametrize("method", ["percentile{percent=75}", "mse", "entropy"])
def test_tensors_of_a_loop_are_counted_over_all_steps(method: str) -> None:
    x, w = random(5, 3, WIDTH), random(3, WIDTH, WIDTH)
    samples = Samples.of([{"x": x, "count": np.array(STEPS)}])
    ranges = measure_ranges(
        looped(), ["x", "next", "y"], samples, quantized=["x", "next"], method=parse_method(method)
    )
    states = [x]
    for _ in range(STEPS):
        states.append(states[-1] @ w)
    every = np.stack(states[1:])
    expected = threshold(histogram(every), float(np.abs(every).max()), parse_method(method))
    assert set(ranges.thresholds) == {"x", "next"}
    assert ranges.thresholds["next"] == pytest.approx(expected, rel=RATIO - 0.999)


def test_a_loop_that_runs_no_step_leaves_its_tensors_out() -> None:
    samples = Samples.of([{"x": random(5, 3, WIDTH), "count": np.array(0)}])
    ranges = measure_ranges(looped(), ["x", "next"], samples, quantized=["x", "next"], method=Method("mse"))
    assert set(ranges.thresholds) == {"x"}
    assert "next" in ranges.left_out


def test_unrolled_steps_share_a_threshold_where_that_is_asked_for() -> None:
    each, joint = Thresholds(Method("percentile", 50)), Thresholds(Method("percentile", 50, joint=True))
    names = ["step_0/a", "step_1/a", "step_10/a", "b/step_1/c", "b/step_2/c", "step_1/b"]
    amax = {}
    for index, name in enumerate(names):
        values = np.array([2.0**index, 2.0**index, 1000.0], np.float32)
        amax[name] = 1000.0
        for found in (each, joint):
            found.add(name, histogram(values))
    chosen = joint.choose(amax)
    assert len({chosen[name] for name in names[:3]}) == 1
    assert chosen["b/step_1/c"] == chosen["b/step_2/c"] != chosen["step_1/b"]
    assert chosen["step_0/a"] == pytest.approx(4, rel=0.02)
    assert each.choose(amax)["step_0/a"] == pytest.approx(1, rel=0.02)
    assert Thresholds(Method(joint=True)).choose({"step_0/a": 2.0, "step_1/a": 3.0}) == {
        "step_0/a": 3.0,
        "step_1/a": 3.0,
    }


def test_infinity_in_what_is_quantized_is_an_error_that_names_it() -> None:
    arrays = [random(0, 2, 3), random(1, 2, 3)]
    arrays[1][1, 1] = -np.inf
    with pytest.raises(Pi05cError, match=r"'y', which is to be quantized, holds infinity on sample 1"):
        thresholds(arrays, "entropy")
    arrays[1][1, 1] = np.nan
    with pytest.raises(Pi05cError, match=r"'y' holds NaN on sample 1"):
        thresholds(arrays, "entropy")


def test_an_opset_without_histograms_is_refused() -> None:
    model = identity(2, 3, opset=17)
    with pytest.raises(Pi05cError, match="histograms need opset 18"):
        measure_ranges(model, ["y"], samples_of(random(0, 2, 3)), quantized=["y"], method=Method("mse"))
    assert measure_ranges(model, ["y"], samples_of(random(0, 2, 3)), quantized=["y"]).thresholds == {}


def test_thresholds_are_kept_by_method_and_saved_with_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = identity(5, 8), samples_of(random(0, 5, 8))

    def measured(method: str) -> Mapping[str, float]:
        return cached_ranges(
            model, ["y"], samples, tmp_path, quantized=["y"], method=parse_method(method)
        ).thresholds

    found = {text: measured(text) for text in ("max", "percentile{percent=60}", "percentile{percent=70}")}
    assert found["max"] == {}
    assert found["percentile{percent=60}"]["y"] < found["percentile{percent=70}"]["y"]
    with monkeypatch.context() as patch:
        patch.setattr("pi05c.calibration._measure", None)
        assert {text: measured(text) for text in found} == found
    ranges = measure_ranges(model, ["y"], samples, quantized=["y"], method=Method("percentile", 60))
    save_ranges(tmp_path / "ranges.json", ranges)
    assert read_ranges(tmp_path / "ranges.json") == ranges
